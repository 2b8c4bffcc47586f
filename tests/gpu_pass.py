"""One call of every CUDA kernel, for compute-sanitizer: `make test-gpu`."""

import itertools

import torch
from littlebit.fast.bench import random_path
from littlebit.fast.kernels import cuda_launch

generator = torch.Generator("cuda").manual_seed(0)
for (d_in, ranks), rows, dtype in itertools.product(
    ((600, (70,)), (1152, (128, 40)), (512, (300,))), (1, 2, 5), (torch.float16, torch.float32)
):
    tensors = [tensor for rank in ranks for tensor in random_path(50, d_in, rank, generator)]
    plan, x = cuda_launch.Plan(tensors), torch.randn(rows, d_in, generator=generator, device="cuda").to(dtype)
    for version in cuda_launch.VERSIONS:
        plan(x, version)
    if dtype == torch.float16:
        plan.factors(dtype)
torch.cuda.synchronize()
print("every kernel ran")
