"""Time functions in alternation, with weights that no cache holds, and save results with device and commit."""

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numba
import torch

from ..files.atomic import write_text
from ..files.digests import code_digest

MIN_ROTATED_BYTES = 1 << 25  # several times a core's second-level cache
MAX_COPIES = 1 << 13  # of a layer; so layers below 1/8192 of `rotated_bytes` stay in a cache


def copies_beyond_cache(size: int) -> int:
    """Count the copies of `size` bytes that together exceed `rotated_bytes`; at most MAX_COPIES."""
    return min(rotated_bytes() // size + 1, MAX_COPIES)


@cache
def rotated_bytes() -> int:
    """Compute the bytes of weights that a benchmark cycles through, so that each call reads its weights from memory.

    Twice the last-level cache, because a cache need not evict the oldest line first.
    """
    return max(MIN_ROTATED_BYTES, 2 * last_cache_bytes())


def last_cache_bytes(folder: Path = Path("/sys/devices/system/cpu")) -> int:
    """Find the size in bytes of the largest cache of this machine's processors; 0 if the system does not report it."""
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
    """Time lists of calls in alternation, so that all of them see the same state of the machine.

    Parameters
    ----------
    lists : sequences of callables
        Each is one side of a comparison, for instance one layer in several copies.
    repeats : int
        Rounds that are measured, after one that is not. In each round, every list is called through once.
    before : callable, optional
        Called with the index of a list before each of its turns.
    clock : callable, optional
        Returns the time in seconds.

    Returns
    -------
    The median seconds of a call, for each list.
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


def save_results(path: Path, rows: list[dict[str, Any]], command: str, device: str) -> None:
    """Write measurements as JSON, with the command, device, commit, versions and code digests to repeat them."""
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
    """Compute `code_digest` of each loaded module of this package, to see later which of them changed since."""
    package = ".".join(__name__.split(".")[:2]) + "."
    loaded = {name.removeprefix(package): module for name, module in sys.modules.items() if name.startswith(package)}
    return {
        name: code_digest(Path(str(module.__file__)).read_text(encoding="utf-8"))
        for name, module in sorted(loaded.items())
    }


def device_name(device: str) -> str:
    """Return the name of the GPU or, for "cpu", of the processor."""
    return torch.cuda.get_device_name() if device.startswith("cuda") else cpu_name()


def cpu_name() -> str:
    """Find the processor's name, and which of AVX-512, AVX2 and NEON it has."""
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
    """Find the commit of the source checkout, with the suffix -dirty if files changed; None outside a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--abbrev=12", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
