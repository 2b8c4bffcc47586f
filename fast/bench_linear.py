"""Benchmarks: one packed linear layer beside torch's own."""

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import numba
import torch
from torch import Tensor
from torch.nn import functional

from .bench_peers import MOST_ERROR, PEERS, relative_error
from .bits import layer_bits, rank_for_bits
from .digests import code_digest
from .kernels.cpu import lookups_per_second
from .kernels.cpu_threads import MAX_THREADS
from .layers import PackedLinear
from .packing import PackedFactors, row_words, unpack_factors
from .progress import tqdm
from .writing import write_text

SHAPES = ((4096, 4096), (11008, 4096), (4096, 11008), (28672, 8192))
BITS = (0.1, 0.55)
LEAST_ROTATED_BYTES = 1 << 25  # several times a core's second-level cache
MOST_COPIES = 1 << 13  # of a layer: a smaller layer than 1/8192 of what is rotated stays in a cache


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
    """Time the packed CPU layer and torch's layers of 16, 8 and 4 bits, and compare the packed one with float64.

    Each side rotates through copies of its weights that fill twice the last cache, so that no call finds its weights
    there (`rotated_bytes`). A figure is the median over all calls of `repeats` rotations; the sides take turns, with
    measurements of the kernel's innermost loop alone between them, so that all see the same machine. With one thread
    the clock is that thread's processor time, which a busy machine disturbs less: otherwise a call of milliseconds
    waits for other programs, and a call of microseconds mostly does not.

    Parameters
    ----------
    shapes : tuple of (d_out, d_in)
    bits : tuple of float
        Ceilings in stored bits per weight.
    batch : int
        Rows of x.
    threads : int
        For every side.
    paths : int
    repeats : int
    progress : bool

    Returns
    -------
    One dict per shape and bits: d_out, d_in, bits (stored), rank (per path), paths, batch, threads, time_us,
    dense_us (bfloat16), speedup (over bfloat16), int8_us and int4_us (see bench_peers.py; None where this torch or
    processor has no such layer, or d_in does not divide), int8_error and int4_error (root mean square of y - y64 over
    that of y64), rotated_bytes (of the packed copies), max_error (largest |y - y64| over the largest |y64|),
    sign_adds_per_s, peak_sign_adds_per_s (`kernels.cpu.lookups_per_second` with the same threads), fraction_of_peak;
    with several threads also one_thread_us, times_one_thread (how many times faster than one) and
    times_one_thread_of_lookups (the same of the innermost loop, whose threads share nothing: what this machine's cores
    allow).
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
        """Set the threads of a side, and measure the lookups alone beside the packed layer."""
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
    """Make the calls of torch's layers of 8 and 4 bits, and compute their relative errors.

    A layer that this torch, this processor or these sizes do not allow is left out.

    Raises
    ------
    RuntimeError
        If a layer's output is far from the weight's: its time would mean nothing.
    """
    errors, calls = {}, {}
    for name, bits, make, dtype in PEERS:
        try:
            layers = make(weight, copies_beyond_cache(weight.numel() * bits // 8))
            own_x = x.to(dtype)
            errors[name] = relative_error(layers[0], weight, own_x)
        except (RuntimeError, NotImplementedError, AttributeError):  # whatever torch raises where it has no such kernel
            continue
        if not errors[name] < MOST_ERROR[name]:
            raise RuntimeError(f"torch's {name} layer is {errors[name]:.2f} off, so that it is not worth timing")
        calls[name] = [partial(layer, own_x) for layer in layers]
    return errors, calls


def copies_beyond_cache(size: int) -> int:
    """Count the copies of `size` bytes that exceed `rotated_bytes`, MOST_COPIES at most."""
    return min(rotated_bytes() // size + 1, MOST_COPIES)


@cache
def rotated_bytes() -> int:
    """Bytes of weights through which a benchmark rotates: twice the last cache, which need not replace in order."""
    return max(LEAST_ROTATED_BYTES, 2 * last_cache_bytes())


def last_cache_bytes(folder: Path = Path("/sys/devices/system/cpu")) -> int:
    """Size of the largest cache of this machine's processors, 0 where the system does not say."""
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    sizes = [0]
    for file in folder.glob("cpu[0-9]*/cache/index*/size"):
        text = file.read_text(encoding="utf-8").strip()
        if text[:-1].isdigit() and text[-1] in units:
            sizes.append(int(text[:-1]) * units[text[-1]])
    known = getattr(os, "sysconf_names", {})
    sizes += [os.sysconf(name) for name in ("SC_LEVEL3_CACHE_SIZE", "SC_LEVEL4_CACHE_SIZE") if name in known]
    return max(sizes)


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
    """Write measurements as JSON with what is needed to repeat them: command, device, commit, versions, code."""
    record = {
        "command": command,
        "device": device,
        "commit": commit(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "numba": numba.__version__},
        "code": loaded_code(),
        "rows": rows,
    }
    write_text(path, json.dumps(record, indent=1) + "\n")


def loaded_code() -> dict[str, str]:
    """Compute `code_digest` of each module of this package that is loaded, so that a later reader sees what changed."""
    package = ".".join(__name__.split(".")[:2]) + "."
    loaded = {name.removeprefix(package): module for name, module in sys.modules.items() if name.startswith(package)}
    return {
        name: code_digest(Path(str(module.__file__)).read_text(encoding="utf-8"))
        for name, module in sorted(loaded.items())
    }


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
