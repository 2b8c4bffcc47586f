"""Benchmarks on a GPU: the packed linear layer beside torch's float16 one, in replayed CUDA graphs."""

import itertools
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm

from ..bits import layer_bits, rank_for_bits
from ..kernels.cuda_layer import Plan
from ..kernels.cuda_schedule import SMALL_BATCH, Schedule
from ..packing import PackedFactors
from .linear import exact_path, random_path
from .tune import REPLAYS, fastest, replay_seconds

SHAPES = ((4096, 4096), (11008, 4096), (4096, 11008), (13824, 5120), (28672, 8192), (8192, 28672))
BITS = (0.1, 0.3, 0.55, 1.0)
ROTATED_BYTES = 160 << 20  # three times the second-level cache of an H100
TUNED_BYTES = 30 << 20  # less, to try many schedules
MOST_COPIES = 400
COPIED_BYTES = 1 << 30


def bench_linear_cuda(
    shapes: Sequence[tuple[int, int]] = SHAPES,
    bits: Sequence[float] = BITS,
    paths: int = 1,
    batches: Sequence[int] = (1,),
    tune: bool = False,
    progress: bool = True,
) -> list[dict[str, Any]]:
    """Time the packed float16 layer against `torch.nn.functional.linear`, and compare both with float64.

    Layers rotate through copies of their weights, more of them than the second-level cache holds; one CUDA graph runs
    through all copies, and a figure is the median over replays of a replay's time divided by the copies.

    Parameters
    ----------
    shapes : sequence of (d_out, d_in)
    bits : sequence of float
        Ceilings in stored bits per weight.
    paths : int
    batches : sequence of int
        Rows of the input.
    tune : bool
        Try other schedules than that of `cuda_schedule.schedule_for`, and take the fastest; for rows that it serves.
    progress : bool

    Returns
    -------
    One dict per shape, bits and batch: d_out, d_in, bits (stored), rank (per path), paths, batch, time_us (of what the
    layer uses), plain_us and tensor_us (of the other versions of the kernels; None if they are not meant for
    the batch), dense_us, gemlite_us (of its layer of one bit a weight, `gemlite_seconds`; None if it is not installed),
    speedup, schedule, error and dense_error (root mean square of y - y64 over that of y64),
    bytes (of weights and vectors), fraction_of_copy (bytes per second over those of a device-to-device copy, read and
    written).
    """
    copy_rate = copy_bytes_per_second()
    cases = tqdm(list(itertools.product(shapes, bits, batches)), desc="bench linear", disable=not progress)
    return [bench_case(*shape, target, paths, batch, tune, copy_rate) for shape, target, batch in cases]


def bench_case(
    d_out: int, d_in: int, target: float, paths: int, batch: int, tune: bool, copy_rate: float
) -> dict[str, Any]:
    """One row of `bench_linear_cuda`."""
    generator = torch.Generator("cuda").manual_seed(0)
    rank = rank_for_bits(d_out, d_in, target, paths)
    stored = layer_bits(d_out, d_in, (rank,) * paths)
    copies = range(min(MOST_COPIES, ROTATED_BYTES // (stored // 8) + 1))
    layers = [[random_path(d_out, d_in, rank, generator) for _ in range(paths)] for _ in copies]
    plans = [Plan([tensor for path in layer for tensor in path]) for layer in layers]
    x = torch.randn(batch, d_in, generator=generator, device="cuda", dtype=torch.float16) / 64  # float16 ends at 65504
    tune, schedule = tune and batch <= SMALL_BATCH, plans[0].schedule(batch)
    if tune:
        schedule = tuned(x, plans)
    seconds = packed_seconds(x, plans, schedule if tune else None)
    others = {
        f"{version}_us": packed_seconds(x, plans, schedule, version) * 1e6 if batch <= SMALL_BATCH else None
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
        "schedule": schedule if batch <= SMALL_BATCH else plans[0].batch_schedule(batch),
        "error": packed_error(x, layers[0], plans[0]),
        "dense_error": dense_error(x, weights[0]),
        "bytes": size,
        "fraction_of_copy": size / seconds / copy_rate,
    }


def tuned(x: Tensor, plans: Sequence[Plan]) -> Schedule:
    """The fastest schedule."""
    plan = plans[0]
    plans, schedule = plans[: TUNED_BYTES // sum(tensor.nbytes for tensor in plan.kept[0]) + 2], plan.schedule(len(x))
    assert schedule
    return fastest(plan.sizes, len(x), plan.device, schedule, lambda each: packed_seconds(x, plans, each, replays=3))


def packed_seconds(
    x: Tensor,
    plans: Sequence[Plan],
    schedule: Schedule | None = None,
    version: str | None = None,
    replays: int = REPLAYS,
) -> float:
    """Seconds of the packed layer."""
    return replay_seconds([lambda plan=plan: plan(x, version, schedule) for plan in plans], replays)


def dense_weights(d_out: int, d_in: int) -> list[Tensor]:
    """Copies of a random float16 weight."""
    copies = ROTATED_BYTES // (2 * d_out * d_in) + 2
    return list(torch.randn(copies, d_out, d_in, device="cuda", dtype=torch.float16).unbind())


@cache
def gemlite_seconds(d_out: int, d_in: int, batch: int) -> float | None:
    """Seconds of gemlite's layer of such sizes, one bit a weight and a scale for each output; None without gemlite.

    It is the same for all bits: no low rank, so d_out * d_in bits of signs. Its first call tunes it.
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
    """Raise RuntimeError unless the layer multiplies with the signs that its codes stand for."""
    exact = x.double() @ (2.0 * codes.double() - 1).T
    if (layer(x).double() - exact).norm() > 0.01 * exact.norm():
        raise RuntimeError("gemlite's layer does not give the product of its signs; measure without it (uninstall it)")


def packed_error(x: Tensor, paths: Sequence[PackedFactors], plan: Plan) -> float:
    """Root mean square error of the packed layer, relative to the exact output's."""
    exact = torch.stack([exact_path(x, path) for path in paths]).sum(0)
    return float((plan(x).double() - exact).norm() / exact.norm())


def dense_error(x: Tensor, weight: Tensor) -> float:
    """Root mean square error of torch's layer, relative to the exact output's."""
    exact = x.double() @ weight.double().T
    return float((functional.linear(x, weight).double() - exact).norm() / exact.norm())


def copy_bytes_per_second() -> float:
    """Bytes read and written by a copy from device to device."""
    source = torch.empty(COPIED_BYTES, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * COPIED_BYTES / replay_seconds([lambda: target.copy_(source)])
