"""One call of every CUDA kernel, for compute-sanitizer: `make test-gpu`."""

# pyright: reportArgumentType=false

import itertools

import torch
from littlebit.fast.bench import random_path
from littlebit.fast.bench_decode_cuda import random_model
from littlebit.fast.embeddings import QuantizedEmbedding, QuantizedHead, quantize_table
from littlebit.fast.fused_engine import FusedEngine, engine_of
from littlebit.fast.kernels import cuda_launch
from littlebit.fast.memory import ModelShape

generator = torch.Generator("cuda").manual_seed(0)
for (d_in, ranks), rows, dtype in itertools.product(
    ((600, (70,)), (1152, (128, 40)), (512, (300,))), (1, 2, 5), (torch.float16, torch.float32)
):
    tensors = [tensor for rank in ranks for tensor in random_path(50, d_in, rank, generator)]
    plan, x = cuda_launch.Plan(tensors), torch.randn(rows, d_in, generator=generator, device="cuda").to(dtype)
    for version in cuda_launch.VERSIONS:
        plan(x, version)
    if dtype == torch.float16:
        for unpacked in (torch.float16, torch.bfloat16):
            plan.factors(unpacked)
for grouped, rows, d_in in itertools.product((True, False), (9, 30, 60, 130), (600, 602)):
    tensors = [tensor for rank in (70, 130) for tensor in random_path(150, d_in, rank, generator)]
    plan, x = cuda_launch.Plan(tensors), torch.randn(rows, d_in, generator=generator, device="cuda").half()
    if not grouped:
        plan.capability = (8, 0)
    for tile in cuda_launch.tiles_for(rows, grouped):
        plan.batch(x, torch.empty(rows, 150, device="cuda").half(), rows, cuda_launch.BatchSchedule(2, tile, tile))
layers = [[*random_path(d_out, 512, rank, generator)] for d_out, rank in ((64, 40), (32, 33), (32, 64))]
group = cuda_launch.Siblings(layers)
for rows in (1, 3):
    x, weight = torch.randn(rows, 512, generator=generator, device="cuda"), torch.ones(512, device="cuda")
    squares, y = x.square().sum(1, keepdim=True), torch.empty(rows, 128, device="cuda")
    part = torch.empty(group.part_size(rows, group.schedule(rows)), device="cuda")
    group.launch(x, y, part, norm=(weight, squares, 1, 1e-5), bias=torch.ones(128, device="cuda"))
    last = cuda_launch.Siblings([[*random_path(512, 64, 40, generator)]])
    squares = torch.empty(rows, cuda_launch.output_blocks(512, last.schedule(rows)), device="cuda")
    last.launch(
        y, x, torch.empty(last.part_size(rows, last.schedule(rows)), device="cuda"), activation="silu", squares=squares
    )

shape = ModelShape("a small one", 256, 320, 1, 4, 2, 64, 100, 256)
for bits, batch in ((1.0, 3), (None, 1)):
    model = random_model(shape, bits)
    engine = FusedEngine(model, batch, 200, torch.device("cuda", 0), torch.float16)
    with torch.inference_mode():
        engine.pretend(150)
        engine.step(torch.arange(batch, device="cuda"))
        for table_bits in (8, 4):
            table = quantize_table(model.head.weight.float().cpu(), table_bits).cuda()
            stream = engine.steps.embed(torch.arange(batch, device="cuda"), QuantizedEmbedding(table))
            engine.steps.logits(engine.steps.normed(stream, model.norm), QuantizedHead(table))
model = random_model(shape, 1.0)
for kind in ("latent", "latent-int8"):
    engine = engine_of(model, 2, 200, torch.device("cuda", 0), torch.float16, kind)
    engine.positions.copy_(torch.tensor([63, 150]))
    with torch.inference_mode():
        engine.step(torch.arange(2, device="cuda"))
torch.cuda.synchronize()
print("every kernel ran")
