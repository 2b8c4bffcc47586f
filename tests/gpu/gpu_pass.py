"""Call every CUDA kernel once, under compute-sanitizer: `make test-gpu`.

Arguments select parts: `python tests/gpu/gpu_pass.py gemm latents`.
"""

# pyright: reportArgumentType=false

import itertools
import sys

import torch
from littlebit.fast.bench.decode_cuda import random_model
from littlebit.fast.bench.linear import random_path
from littlebit.fast.decoding.engines import engine_of
from littlebit.fast.decoding.fused_llama import FusedEngine
from littlebit.fast.kernels import cuda_driver, cuda_layer, cuda_schedule
from littlebit.fast.memory import ModelShape
from littlebit.fast.models.embeddings import QuantizedEmbedding, QuantizedHead, quantize_table

GENERATOR = torch.Generator("cuda").manual_seed(0)
SHAPE = ModelShape("small", 256, 320, 1, 4, 2, 64, 100, 256)


def numbers(*shape: int) -> torch.Tensor:
    """Draw float32 numbers from a normal distribution."""
    return torch.randn(shape, generator=GENERATOR, device="cuda")


def tensors(d_out: int, d_in: int, *ranks: int) -> list[torch.Tensor]:
    """Draw the tensors of a layer's paths, one path for each rank."""
    return [tensor for rank in ranks for tensor in random_path(d_out, d_in, rank, GENERATOR)]


def gemv() -> None:
    """Run every version of the GEMV."""
    for (d_in, ranks), rows in itertools.product(((600, (70,)), (1152, (128, 40)), (512, (300,))), (1, 2, 5)):
        packed = cuda_layer.CudaPackedLayer(tensors(50, d_in, *ranks))
        for dtype, version in itertools.product((torch.float16, torch.float32), cuda_driver.VERSIONS):
            packed(numbers(rows, d_in).to(dtype), version)


def unpacked() -> None:
    """Unpack layers to dense factors."""
    for d_in, ranks in ((600, (70,)), (1152, (128, 40)), (512, (300,))):
        for dtype in (torch.float16, torch.bfloat16):
            cuda_layer.CudaPackedLayer(tensors(50, d_in, *ranks)).factors(dtype)


def gemm() -> None:
    """Run every tile of the GEMM, by wgmma and by mma."""
    for wgmma, rows, d_in in itertools.product((True, False), (9, 30, 60, 130), (600, 602)):
        packed, x = cuda_layer.CudaPackedLayer(tensors(150, d_in, 70, 130)), numbers(rows, d_in)
        if not wgmma:
            packed.capability = (8, 0)
        for tile, dtype in itertools.product(cuda_schedule.tiles_for(rows, wgmma), (torch.float16, torch.bfloat16)):
            y = torch.empty(rows, 150, dtype=dtype, device="cuda")
            packed.gemm(x.to(dtype), y, rows, cuda_schedule.GemmConfig(2, tile, tile))


def fused_projections() -> None:
    """Run layers that share their input, with prologues and epilogues."""
    layers = [tensors(d_out, 512, rank) for d_out, rank in ((64, 40), (32, 33), (32, 64))]
    group, last = cuda_layer.FusedProjections(layers), cuda_layer.FusedProjections([tensors(512, 64, 40)])
    for rows in (1, 3):
        x, weight, y = numbers(rows, 512), torch.ones(512, device="cuda"), torch.empty(rows, 128, device="cuda")
        latent = [
            torch.empty(each.latent_size(rows, each.launch_config(rows)), device="cuda") for each in (group, last)
        ]
        norm = weight, x.square().sum(1, keepdim=True), 1, 1e-5
        group.launch(x, y, latent[0], norm=norm, bias=torch.ones(128, device="cuda"))
        squares = torch.empty(rows, cuda_layer.output_blocks(512, last.launch_config(rows)), device="cuda")
        last.launch(y, x, latent[1], activation="silu", squares=squares)


def steps() -> None:
    """Run the decoder's other kernels, after packed layers and after layers of torch."""
    model, device, batch = random_model(SHAPE, 1.0), torch.device("cuda", 0), 3
    tokens = torch.arange(batch, device=device)
    engine = FusedEngine(model, batch, 200, device, torch.float16)
    engine.fill_cache_with_random(150)
    with torch.inference_mode():
        engine.step(tokens)
        for table_bits in (8, 4):
            table = quantize_table(model.head.weight.float().cpu(), table_bits).cuda()
            stream = engine.ops.embed(tokens, QuantizedEmbedding(table))
            engine.ops.logits(engine.ops.rms_norm(stream, model.norm), QuantizedHead(table))
        stream = engine.ops.embed(tokens, model.embedding)
        engine.ops.rms_norm(stream, model.norm)
        projected, cache = numbers(batch, (4 + 2 * 2) * 64).half(), (engine.keys[0], engine.values[0])
        mixed = engine.ops.attend(projected, *cache, engine.positions, engine.angles, None)
        engine.ops.add(mixed, stream)
        engine.ops.swiglu(numbers(batch, 2 * 320).half())


def latents() -> None:
    """Run attention to a latent cache."""
    model = random_model(SHAPE, 1.0)
    for cache_type in ("latent", "latent-int8"):
        engine = engine_of(model, 2, 200, torch.device("cuda", 0), torch.float16, cache_type)
        engine.positions.copy_(torch.tensor([63, 150]))
        with torch.inference_mode():
            engine.step(torch.arange(2, device="cuda"))


PARTS = {part.__name__: part for part in (gemv, unpacked, gemm, fused_projections, steps, latents)}
for name in sys.argv[1:] or PARTS:
    PARTS[name]()
    torch.cuda.synchronize()
    print(name, "ran", flush=True)
