"""Benchmarks on a GPU: the packed linear layer beside torch's float16 one, in replayed CUDA graphs."""

import itertools
import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm

from .bench import exact_path, random_path
from .bits import layer_bits, rank_for_bits
from .kernels import cuda as kernels
from .packing import PackedFactors

SHAPES = ((4096, 4096), (11008, 4096), (4096, 11008), (13824, 5120), (28672, 8192), (8192, 28672))
BITS = (0.1, 0.3, 0.55, 1.0)
ROTATED_BYTES = 160 << 20  # three times the second-level cache of an H100
TUNED_BYTES = 60 << 20  # less, to try many plans
REPLAYS = 9
COPIED_BYTES = 1 << 30


def bench_linear_cuda(
    shapes: Sequence[tuple[int, int]] = SHAPES,
    bits: Sequence[float] = BITS,
    paths: int = 1,
    batch: int = 1,
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
    paths, batch : int
    tune : bool
        Try other plans than that of `kernels.cuda.plan_for`, and take the fastest.
    progress : bool

    Returns
    -------
    One dict per shape and bits: d_out, d_in, bits (stored), rank (per path), paths, batch, time_us, dense_us, speedup,
    plan, error and dense_error (root mean square of y - y64 over that of y64), bytes (of weights and vectors),
    fraction_of_copy (bytes per second over those of a device-to-device copy, read and written).
    """
    copy_rate = copy_bytes_per_second()
    cases = tqdm(list(itertools.product(shapes, bits)), desc="bench linear", disable=not progress)
    return [bench_case(*shape, target, paths, batch, tune, copy_rate) for shape, target in cases]


def bench_case(
    d_out: int, d_in: int, target: float, paths: int, batch: int, tune: bool, copy_rate: float
) -> dict[str, Any]:
    """One row of `bench_linear_cuda`."""
    generator = torch.Generator("cuda").manual_seed(0)
    rank = rank_for_bits(d_out, d_in, target, paths)
    stored = layer_bits(d_out, d_in, (rank,) * paths)
    copies = range(ROTATED_BYTES // (stored // 8) + 1)
    layers = [[random_path(d_out, d_in, rank, generator) for _ in range(paths)] for _ in copies]
    x = torch.randn(batch, d_in, generator=generator, device="cuda", dtype=torch.float16) / 64  # float16 ends at 65504
    plan = kernels.plan_for(d_out, d_in, [rank] * paths, torch.cuda.get_device_properties(0).multi_processor_count)
    if tune:
        plan = tuned(x, layers, plan)
    seconds = packed_seconds(x, layers, plan)
    weights = dense_weights(d_out, d_in)
    dense_s = replay_seconds([lambda weight=weight: functional.linear(x, weight) for weight in weights])
    size = stored // 8 + batch * (2 * (d_in + d_out) + 8 * paths * rank)
    return {
        "d_out": d_out,
        "d_in": d_in,
        "bits": stored / (d_out * d_in),
        "rank": rank,
        "paths": paths,
        "batch": batch,
        "time_us": seconds * 1e6,
        "dense_us": dense_s * 1e6,
        "speedup": dense_s / seconds,
        "plan": plan._asdict(),
        "error": packed_error(x, layers[0], plan),
        "dense_error": dense_error(x, weights[0]),
        "bytes": size,
        "fraction_of_copy": size / seconds / copy_rate,
    }


def tuned(x: Tensor, layers: Sequence[Sequence[PackedFactors]], plan: kernels.Plan) -> kernels.Plan:
    """The fastest of the plans near one: first for `latent`, then for `output`."""
    layers = layers[: TUNED_BYTES // sum(t.nbytes for path in layers[0] for t in path) + 1]

    def best(candidates: Iterable[kernels.Plan]) -> kernels.Plan:
        return min(candidates, key=lambda each: packed_seconds(x, layers, each, 3))

    largest = min(8, kernels.power_of_two(-(-x.shape[1] // (32 * kernels.GROUP))))
    parts = sorted({min(largest, max(1, round(plan.parts * factor))) for factor in (0.5, 1, 2, 4)})
    blocks = ((4, 1), (4, 4), (8, 1), (8, 2), (8, 4), (8, 8))
    plan = best(plan._replace(parts=part) for part in parts)
    plan = best(plan._replace(latent_warps=warps, latent_sharing=sharing) for warps, sharing in blocks)
    return best(plan._replace(output_warps=warps, output_sharing=sharing) for warps, sharing in blocks)


def packed_seconds(x: Tensor, layers: Sequence[Sequence[PackedFactors]], plan: Any, replays: int = REPLAYS) -> float:
    """Seconds of the packed layer."""
    return replay_seconds([lambda layer=layer: kernels.packed_linear(x, layer, plan) for layer in layers], replays)


def replay_seconds(calls: Sequence[Callable[[], Any]], replays: int = REPLAYS) -> float:
    """Seconds of a call, in a graph that runs all calls one after the other; median over replays."""
    calls[0]()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times = []
    for _ in range(replays + 1):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3 / len(calls))
    return statistics.median(times[1:])


def dense_weights(d_out: int, d_in: int) -> list[Tensor]:
    """Copies of a random float16 weight."""
    copies = ROTATED_BYTES // (2 * d_out * d_in) + 2
    return list(torch.randn(copies, d_out, d_in, device="cuda", dtype=torch.float16).unbind())


def packed_error(x: Tensor, paths: Sequence[PackedFactors], plan: Any) -> float:
    """Root mean square error of the packed layer, relative to the exact output's."""
    exact = torch.stack([exact_path(x, path) for path in paths]).sum(0)
    return float((kernels.packed_linear(x, paths, plan).double() - exact).norm() / exact.norm())


def dense_error(x: Tensor, weight: Tensor) -> float:
    """Root mean square error of torch's layer, relative to the exact output's."""
    exact = x.double() @ weight.double().T
    return float((functional.linear(x, weight).double() - exact).norm() / exact.norm())


def copy_bytes_per_second() -> float:
    """Bytes read and written by a copy from device to device."""
    source = torch.empty(COPIED_BYTES, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * COPIED_BYTES / replay_seconds([lambda: target.copy_(source)])
