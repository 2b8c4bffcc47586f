"""Benchmarks: one packed linear layer beside torch's own."""

import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numba
import torch
from torch import Tensor
from torch.nn import functional

from .bits import layer_bits, rank_for_bits
from .kernels.cpu import MAX_THREADS, lookups_per_second
from .layers import PackedLinear
from .packing import PackedFactors, row_words, unpack_factors
from .progress import tqdm

SHAPES = ((4096, 4096), (11008, 4096), (4096, 11008), (28672, 8192))
BITS = (0.1, 0.55)
ROTATED_BYTES = 1 << 25  # 32 MiB, several times a core's second-level cache


def random_path(d_out: int, d_in: int, rank: int, generator: torch.Generator) -> PackedFactors:
    """A packed path of random signs and of scales near one, without its dense form, on the generator's device."""
    device = generator.device

    def words(rows: int, count: int) -> Tensor:
        number, dtype = row_words(count)
        whole = torch.randint(-(2**31), 2**31, (rows, number), generator=generator, dtype=torch.int32, device=device)
        if count % 32:
            whole[:, -1] &= (1 << count % 32) - 1  # pad bits; a narrow word has all its signs below them
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
    """Time the packed CPU layer against torch's bfloat16 linear, and compare it with float64.

    Both sides rotate through copies of their weights, more of them than the second-level cache holds, so that no call
    finds its weights warm. A figure is the median over all calls of `repeats` rotations; packed and dense rotations,
    and measurements of the kernel's innermost loop alone, alternate, so that all see the same machine. With one thread
    the clock is that thread's processor time, which a busy machine disturbs less: else a call of milliseconds waits for
    other programs, and one of microseconds mostly does not.

    Parameters
    ----------
    shapes : tuple of (d_out, d_in)
    bits : tuple of float
        Ceilings in stored bits per weight.
    batch : int
        Rows of x.
    threads : int
        For both.
    paths : int
    repeats : int
    progress : bool

    Returns
    -------
    One dict per shape and bits: d_out, d_in, bits (stored), rank (per path), paths, batch, threads, time_us,
    dense_us, speedup, max_error (largest |y - y64| over the largest |y64|), sign_adds_per_s,
    peak_sign_adds_per_s (`kernels.cpu.lookups_per_second` of so many threads), fraction_of_peak; with several threads
    also one_thread_us, times_one_thread (how many times faster than one) and times_one_thread_of_lookups (the same of
    the innermost loop, whose threads share nothing: what this machine's cores allow).
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
    """One row of `bench_linear`."""
    generator = torch.Generator().manual_seed(0)
    stored = layer_bits(d_out, d_in, (rank,) * paths)
    copies = copies_beyond_cache(stored // 8)
    packed = [PackedLinear([random_path(d_out, d_in, rank, generator) for _ in range(paths)]) for _ in range(copies)]
    dense_copies = copies_beyond_cache(2 * d_out * d_in)
    dense = torch.randn(dense_copies, d_out, d_in, generator=generator, dtype=torch.bfloat16)
    x = torch.randn(batch, d_in, generator=generator)
    dense_x = x.bfloat16()
    calls = [partial(layer, x) for layer in packed]
    peaks: dict[int, list[float]] = {threads: [], 1: []}

    def before(order: int) -> None:
        """The lists are: packed on all threads, dense on all threads, packed on one thread."""
        torch.set_num_threads(threads if order < 2 else 1)
        if order != 1:
            peaks[torch.get_num_threads()].append(lookups_per_second(torch.get_num_threads()))

    time_s, dense_s, *single_s = alternate(
        calls,
        [partial(functional.linear, dense_x, weight) for weight in dense],
        *([calls] if threads > 1 else []),
        repeats=repeats,
        before=before,
        clock=time.thread_time if threads == 1 else time.perf_counter,
    )
    exact = torch.stack([exact_path(x, path) for path in packed[0].factors()]).sum(0)
    error = (packed[0](x).double() - exact).abs().max() / exact.abs().max()
    rate, peak = batch * paths * rank * (d_out + d_in) / time_s, statistics.median(peaks[threads])
    scaling = (
        {
            "one_thread_us": single_s[0] * 1e6,
            "times_one_thread": single_s[0] / time_s,
            "times_one_thread_of_lookups": peak / statistics.median(peaks[1]),
        }
        if single_s
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
        "dense_us": dense_s * 1e6,
        "speedup": dense_s / time_s,
        "max_error": float(error),
        "sign_adds_per_s": rate,
        "peak_sign_adds_per_s": peak,
        "fraction_of_peak": rate / peak,
        **scaling,
    }


def copies_beyond_cache(size: int) -> int:
    """How many copies of `size` bytes it takes to exceed ROTATED_BYTES."""
    return ROTATED_BYTES // size + 1


def alternate(
    *lists: Sequence[Callable[[], Any]],
    repeats: int,
    before: Callable[[int], Any] = lambda order: None,
    clock: Callable[[], float] = time.perf_counter,
) -> list[float]:
    """Median seconds of a call of each of several lists of calls that take turns, after one warm-up each.

    `before` is called with a list's number before each of its turns.
    """
    samples: list[list[float]] = [[] for _ in lists]
    for turn in range(repeats + 1):
        for order, calls in enumerate(lists):
            before(order)
            for call in calls:
                start = clock()
                call()
                if turn:
                    samples[order].append(clock() - start)
    return [statistics.median(each) for each in samples]


def exact_path(x: Tensor, packed: PackedFactors) -> Tensor:
    """A path's output in float64."""
    u, v, h, ell, g = (tensor.double() for tensor in unpack_factors(packed))
    return ((x.double() * g) @ v * ell) @ u.T * h


def save_results(path: Path, rows: list[dict[str, Any]], command: str, device: str) -> None:
    """Write measurements as JSON with all that is needed to repeat them: command, device, commit, versions."""
    record = {
        "command": command,
        "device": device,
        "commit": commit(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "numba": numba.__version__},
        "rows": rows,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def cpu_name() -> str:
    """The processor's name, with the instruction sets that matter to the kernels."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    values = dict(line.split(":", 1) for line in reversed(lines) if ":" in line)
    values = {key.strip(): value.strip() for key, value in values.items()}
    sets = [
        name for name in ("avx512f", "avx2", "asimd") if name in values.get("flags", values.get("Features", "")).split()
    ]
    return f"{values.get('model name', platform.machine())} ({', '.join(sets) or 'no vector sets known'})"


def commit() -> str | None:
    """The commit of the source checkout, marked if it has changes; None outside a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--abbrev=12", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
