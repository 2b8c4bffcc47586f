"""Benchmark one packed linear layer on a CPU against torch's 16-bit, 8-bit and 4-bit layers.

At batch 1 all of them are GEMVs: each weight is read once and used once.
"""

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from .._progress import tqdm
from ..bits import layer_bits, rank_for_bits
from ..kernels.cpu import lookups_per_second
from ..kernels.cpu_threads import MAX_THREADS
from ..models.layers import PackedLinear
from ..packing import PackedFactors, row_words, unpack_factors
from .peers import MAX_ERROR, PEERS, relative_error
from .timing import alternate, copies_beyond_cache

SHAPES = ((4096, 4096), (11008, 4096), (4096, 11008), (28672, 8192))  # (d_out, d_in) of Llama-2 layers
BITS = (0.1, 0.55)


def random_path(d_out: int, d_in: int, rank: int, generator: torch.Generator) -> PackedFactors:
    """Make a packed path of random signs and scales near one, on the generator's device, without a dense weight."""
    device = generator.device

    def words(rows: int, count: int) -> Tensor:
        number, dtype = row_words(count)
        whole = torch.randint(-(2**31), 2**31, (rows, number), generator=generator, dtype=torch.int32, device=device)
        if count % 32:
            whole[:, -1] &= (1 << count % 32) - 1  # clear the pad bits
        return whole.to(dtype)

    def scale(count: int) -> Tensor:
        return (0.5 + torch.rand(count, generator=generator, device=device)).half()

    return PackedFactors(words(d_out, rank), words(rank, d_in), scale(d_out), scale(rank), scale(d_in))


def bench_linear(
    shapes: tuple[tuple[int, int], ...] = SHAPES,
    bits: tuple[float, ...] = BITS,
    batch: int = 1,
    threads: int = 1,
    paths: int = 2,
    repeats: int = 15,
    progress: bool = True,
) -> list[dict[str, Any]]:
    """Time the packed CPU layer and torch's 16-bit, 8-bit and 4-bit layers, and compare the packed one with float64.

    Each layer cycles through copies of its weights that fill twice the last-level cache, so that each call reads its
    weights from memory (`rotated_bytes`). A figure is the median over all calls of `repeats` cycles. The layers take
    turns, and between them the innermost loop of the kernel is measured alone, so that all see the same machine. With
    one thread the clock is the thread's processor time, because other programs would otherwise delay calls of
    milliseconds more often than calls of microseconds.

    Parameters
    ----------
    shapes : tuple of (d_out, d_in)
    bits : tuple of float
        Upper bounds on stored bits per weight; each rank is the largest within its bound.
    batch : int
        Rows of x.
    threads : int
        Threads of every layer.
    paths : int
        Paths of the packed layer (2: a residual path).
    repeats : int
        Measured cycles through all copies.
    progress : bool
        Show a progress bar.

    Returns
    -------
    list of dict
        One for each shape and bits, with these columns:

        - d_out, d_in, bits (as stored), rank (of each path), paths, batch, threads
        - time_us: microseconds of a call of the packed layer
        - dense_us: the same of torch's bfloat16 layer; speedup = dense_us / time_us
        - int8_us, int4_us: the same of torch's 8-bit and 4-bit layers (peers.py). None if this torch or this processor
          has no such layer, or d_in is not a multiple of the group
        - int8_error, int4_error: |y - y64| / |y64| of those layers, y64 the product in float64
        - rotated_bytes: size of all copies of the packed layer
        - max_error: the largest |y - y64| of the packed layer, divided by the largest |y64|
        - sign_adds_per_s: signs times rows of x, divided by the time
        - peak_sign_adds_per_s: the same of the kernel's innermost loop alone (`kernels.cpu.lookups_per_second`) on the
          same number of threads: the ceiling; fraction_of_peak = sign_adds_per_s / peak_sign_adds_per_s

        With several threads also:

        - one_thread_us: time_us with one thread; times_one_thread = one_thread_us / time_us
        - times_one_thread_of_lookups: the same speed-up of the innermost loop, whose threads share nothing: the ceiling
          of times_one_thread
    """
    cases = [(shape, rank_for_bits(*shape, target, paths)) for shape in shapes for target in bits]
    before = torch.get_num_threads()
    torch.set_num_threads(min(threads, MAX_THREADS))
    try:
        with torch.inference_mode():
            bar = tqdm(cases, desc="bench linear", disable=not progress)
            return [bench_case(*shape, rank, batch, threads, paths, repeats) for shape, rank in bar]
    finally:
        torch.set_num_threads(before)


def bench_case(d_out: int, d_in: int, rank: int, batch: int, threads: int, paths: int, repeats: int) -> dict[str, Any]:
    """Measure one row of `bench_linear`."""
    generator = torch.Generator().manual_seed(0)
    stored = layer_bits(d_out, d_in, (rank,) * paths)
    copies = copies_beyond_cache(stored // 8)
    packed = [PackedLinear([random_path(d_out, d_in, rank, generator) for _ in range(paths)]) for _ in range(copies)]
    weight, x = (torch.randn(rows, d_in, generator=generator) for rows in (d_out, batch))
    dense_x, dense = x.bfloat16(), [weight.bfloat16() for _ in range(copies_beyond_cache(2 * d_out * d_in))]
    errors, peers = peer_calls(weight, x)
    calls = [partial(layer, x) for layer in packed]
    sides = {
        "packed": calls,
        "dense": [partial(functional.linear, dense_x, each) for each in dense],
        **peers,
        **({"one thread": calls} if threads > 1 else {}),
    }
    names = list(sides)
    peaks: dict[int, list[float]] = {threads: [], 1: []}

    def before(order: int) -> None:
        """Set the number of threads; before the packed layer, also measure its innermost loop alone."""
        torch.set_num_threads(1 if names[order] == "one thread" else threads)
        if sides[names[order]] is calls:
            peaks[torch.get_num_threads()].append(lookups_per_second(torch.get_num_threads()))

    clock = time.thread_time if threads == 1 else time.perf_counter
    seconds = dict(zip(names, alternate(*sides.values(), repeats=repeats, before=before, clock=clock), strict=True))
    time_s = seconds["packed"]
    exact = torch.stack([exact_path(x, path) for path in packed[0].factors()]).sum(0)
    error = (packed[0](x).double() - exact).abs().max() / exact.abs().max()
    rate, peak = batch * paths * rank * (d_out + d_in) / time_s, statistics.median(peaks[threads])
    scaling = (
        {
            "one_thread_us": seconds["one thread"] * 1e6,
            "times_one_thread": seconds["one thread"] / time_s,
            "times_one_thread_of_lookups": peak / statistics.median(peaks[1]),
        }
        if threads > 1
        else {}
    )
    return {
        "d_out": d_out,
        "d_in": d_in,
        "bits": stored / (d_out * d_in),
        "rank": rank,
        "paths": paths,
        "batch": batch,
        "threads": threads,
        "time_us": time_s * 1e6,
        "dense_us": seconds["dense"] * 1e6,
        "speedup": seconds["dense"] / time_s,
        **{f"{name}_us": seconds[name] * 1e6 if name in seconds else None for name, *_ in PEERS},
        **{f"{name}_error": errors.get(name) for name, *_ in PEERS},
        "rotated_bytes": copies * (stored // 8),
        "max_error": float(error),
        "sign_adds_per_s": rate,
        "peak_sign_adds_per_s": peak,
        "fraction_of_peak": rate / peak,
        **scaling,
    }


def peer_calls(weight: Tensor, x: Tensor) -> tuple[dict[str, float], dict[str, list[Callable[[], Any]]]]:
    """Make calls of torch's 8-bit and 4-bit layers, and compute their relative errors.

    Layers that this torch, this processor or these sizes do not support are left out.

    Returns
    -------
    errors : dict
        `relative_error` by the name of the layer.
    calls : dict
        The calls to time, one for each copy of the weights, by the name of the layer.

    Raises
    ------
    RuntimeError
        If a layer's relative error exceeds MAX_ERROR: it would not compute the same product.
    """
    errors, calls = {}, {}
    for name, bits, make, dtype in PEERS:
        try:
            layers = make(weight, copies_beyond_cache(weight.numel() * bits // 8))
            own_x = x.to(dtype)
            errors[name] = relative_error(layers[0], weight, own_x)
        except (RuntimeError, NotImplementedError, AttributeError):  # torch raises one of these where it has no kernel
            continue
        if not errors[name] < MAX_ERROR[name]:
            raise RuntimeError(
                f"torch's {name} layer must have a relative error below {MAX_ERROR[name]}, got {errors[name]:.2f}: it "
                "does not compute this product, so leave it out of the comparison"
            )
        calls[name] = [partial(layer, own_x) for layer in layers]
    return errors, calls


def exact_path(x: Tensor, packed: PackedFactors) -> Tensor:
    """Compute a path's output in float64, from its unpacked signs."""
    u, v, h, ell, g = (tensor.double() for tensor in unpack_factors(packed))
    return ((x.double() * g) @ v * ell) @ u.T * h
