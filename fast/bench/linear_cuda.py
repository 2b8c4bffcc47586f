"""Time the packed linear layer on a GPU against torch's float16 layer, in replayed CUDA graphs."""

import itertools
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm

from ..bits import layer_bits, rank_for_bits
from ..kernels.cuda_layer import CudaPackedLayer
from ..kernels.cuda_schedule import MAX_GEMV_ROWS, LaunchConfig
from ..packing import PackedFactors
from .linear import exact_path, random_path
from .tune import REPLAYS, fastest, replay_seconds

SHAPES = ((4096, 4096), (11008, 4096), (4096, 11008), (13824, 5120), (28672, 8192), (8192, 28672))
BITS = (0.1, 0.3, 0.55, 1.0)
ROTATED_BYTES = 160 << 20  # weights of all copies of a layer: three times the L2 cache of an H100
TUNED_BYTES = 30 << 20  # the same while tuning, to try many configurations in little time
MAX_COPIES = 400
COPIED_BYTES = 1 << 30


def bench_linear_cuda(
    shapes: Sequence[tuple[int, int]] = SHAPES,
    bits: Sequence[float] = BITS,
    paths: int = 1,
    batches: Sequence[int] = (1,),
    tune: bool = False,
    progress: bool = True,
) -> list[dict[str, Any]]:
    """Time the packed float16 layer and `torch.nn.functional.linear`, and compare both with float64.

    A CUDA graph runs through copies of a layer with more weights than the L2 cache holds. A time is the median over
    replays of the graph, divided by the number of copies.

    Parameters
    ----------
    shapes : sequence of (d_out, d_in)
    bits : sequence of float
        Targets in stored bits per weight, never exceeded.
    paths : int
    batches : sequence of int
        Rows of the input.
    tune : bool
        Try other configurations than `cuda_schedule.launch_config` chooses, and take the fastest, where the GEMV runs.
    progress : bool

    Returns
    -------
    list of dict, one for each shape, bits and batch:

    - d_out, d_in, bits (stored), rank (of each path), paths, batch;
    - time_us (the kernels that the layer chooses), plain_us and tensor_us (slower versions of the GEMV, see
      `cuda_driver.VERSIONS`; None for batches of the GEMM), dense_us (torch), gemlite_us (see `gemlite_seconds`), and
      speedup, dense_us / time_us;
    - schedule (LaunchConfig or GemmConfig);
    - error and dense_error (root mean square of y - y64, divided by that of y64);
    - bytes (weights and vectors) and fraction_of_copy (bytes per second, divided by the bytes per second that a
      device-to-device copy reads and writes).
    """
    copy_rate = copy_bytes_per_second()
    cases = tqdm(list(itertools.product(shapes, bits, batches)), desc="bench linear", disable=not progress)
    return [bench_case(*shape, target, paths, batch, tune, copy_rate) for shape, target, batch in cases]


def bench_case(
    d_out: int, d_in: int, target: float, paths: int, batch: int, tune: bool, copy_rate: float
) -> dict[str, Any]:
    """Measure one row of `bench_linear_cuda`."""
    generator = torch.Generator("cuda").manual_seed(0)
    rank = rank_for_bits(d_out, d_in, target, paths)
    stored = layer_bits(d_out, d_in, (rank,) * paths)
    copies = range(min(MAX_COPIES, ROTATED_BYTES // (stored // 8) + 1))
    layers = [[random_path(d_out, d_in, rank, generator) for _ in range(paths)] for _ in copies]
    packed = [CudaPackedLayer([tensor for path in layer for tensor in path]) for layer in layers]
    x = torch.randn(batch, d_in, generator=generator, device="cuda", dtype=torch.float16) / 64  # float16 ends at 65504
    tune, config = tune and batch <= MAX_GEMV_ROWS, packed[0].launch_config(batch)
    if tune:
        config = tuned(x, packed)
    seconds = packed_seconds(x, packed, config if tune else None)
    others = {
        f"{version}_us": packed_seconds(x, packed, config, version) * 1e6 if batch <= MAX_GEMV_ROWS else None
        for version in ("plain", "tensor")
    }
    weights = dense_weights(d_out, d_in)
    dense_s = replay_seconds([lambda weight=weight: functional.linear(x, weight) for weight in weights])
    gemlite_s = gemlite_seconds(d_out, d_in, batch)
    size = stored // 8 + batch * (2 * (d_in + d_out) + 8 * paths * rank)
    return {
        "d_out": d_out,
        "d_in": d_in,
        "bits": stored / (d_out * d_in),
        "rank": rank,
        "paths": paths,
        "batch": batch,
        "time_us": seconds * 1e6,
        **others,
        "dense_us": dense_s * 1e6,
        "gemlite_us": None if gemlite_s is None else gemlite_s * 1e6,
        "speedup": dense_s / seconds,
        "schedule": config if batch <= MAX_GEMV_ROWS else packed[0].gemm_config(batch),
        "error": packed_error(x, layers[0], packed[0]),
        "dense_error": dense_error(x, weights[0]),
        "bytes": size,
        "fraction_of_copy": size / seconds / copy_rate,
    }


def tuned(x: Tensor, layers: Sequence[CudaPackedLayer]) -> LaunchConfig:
    """Find the fastest configuration."""
    layer = layers[0]
    few = layers[: TUNED_BYTES // sum(tensor.nbytes for tensor in layer.kept[0]) + 2]
    config = layer.launch_config(len(x))
    assert config
    return fastest(layer.shape, len(x), layer.device, config, lambda each: packed_seconds(x, few, each, replays=3))


def packed_seconds(
    x: Tensor,
    layers: Sequence[CudaPackedLayer],
    config: LaunchConfig | None = None,
    version: str | None = None,
    replays: int = REPLAYS,
) -> float:
    """Measure the seconds of a call of the packed layer."""
    return replay_seconds([lambda layer=layer: layer(x, version, config) for layer in layers], replays)


def dense_weights(d_out: int, d_in: int) -> list[Tensor]:
    """Make enough random float16 weights to exceed the L2 cache."""
    copies = ROTATED_BYTES // (2 * d_out * d_in) + 2
    return list(torch.randn(copies, d_out, d_in, device="cuda", dtype=torch.float16).unbind())


@cache
def gemlite_seconds(d_out: int, d_in: int, batch: int) -> float | None:
    """Measure the seconds of gemlite's 1-bit layer with a scale for each output; None if gemlite is not installed.

    The layer has no low rank, so it stores d_out * d_in bits whatever the target. Its first call tunes it.
    """
    try:
        from gemlite import DType, GemLiteLinear  # type: ignore[import-not-found]
    except ImportError:
        return None
    scales, zeros = (torch.full((d_out, 1), value, device="cuda", dtype=torch.float16) for value in (2.0, 0.5))
    x, layers = torch.randn(batch, d_in, device="cuda", dtype=torch.float16) / 64, []
    for _ in range(ROTATED_BYTES // (d_out * d_in // 8) + 1):
        layer = GemLiteLinear(1, d_in, d_in, d_out, input_dtype=DType.FP16, output_dtype=DType.FP16)
        codes = torch.randint(0, 2, (d_out, d_in), dtype=torch.uint8, device="cuda")
        layer.pack(codes, scales, zeros)
        layers.append(layer)
        if len(layers) == 1:
            check_gemlite(layer, codes, x)
    return replay_seconds([lambda layer=layer: layer(x) for layer in layers])


def check_gemlite(layer: Any, codes: Tensor, x: Tensor) -> None:
    """Raise RuntimeError unless gemlite's layer multiplies with the signs that its codes stand for."""
    exact = x.double() @ (2.0 * codes.double() - 1).T
    if (layer(x).double() - exact).norm() > 0.01 * exact.norm():
        raise RuntimeError("gemlite's layer must give the product with its signs, but does not: uninstall it to go on")


def packed_error(x: Tensor, paths: Sequence[PackedFactors], layer: CudaPackedLayer) -> float:
    """Compute the packed layer's root mean square error, relative to the exact output."""
    exact = torch.stack([exact_path(x, path) for path in paths]).sum(0)
    return float((layer(x).double() - exact).norm() / exact.norm())


def dense_error(x: Tensor, weight: Tensor) -> float:
    """Compute the root mean square error of torch's layer, relative to the exact output."""
    exact = x.double() @ weight.double().T
    return float((functional.linear(x, weight).double() - exact).norm() / exact.norm())


def copy_bytes_per_second() -> float:
    """Measure the bytes per second that a device-to-device copy reads and writes."""
    source = torch.empty(COPIED_BYTES, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * COPIED_BYTES / replay_seconds([lambda: target.copy_(source)])
