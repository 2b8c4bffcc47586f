"""Time the ladder of CPU kernels on the same packed layer, on one thread.

    python book/experiments/ladder.py book/results/cpu_ladder.json

Times are processor times, so that a machine that others use too disturbs them little; the kernels take turns, and
weights rotate through more memory than the second-level cache. A minute or two on one core.
"""

import argparse
import statistics
import time
from pathlib import Path

import torch
from littlebit.fast.bench.linear import random_path
from littlebit.fast.bench.timing import copies_beyond_cache, cpu_name, save_results
from littlebit.fast.bits import layer_bits, rank_for_bits
from littlebit.fast.kernels.cpu import KERNELS
from littlebit.fast.kernels.cpu_layer import CpuPackedLayer

SHAPES = ((4096, 4096), (11008, 4096))
BITS = (0.1, 0.55)
PATHS = 2
ROUNDS = 5


def rows_of(d_out: int, d_in: int, bits: float) -> list[dict]:
    """Time each kernel on one layer."""
    rank = rank_for_bits(d_out, d_in, bits, PATHS)
    stored = layer_bits(d_out, d_in, (rank,) * PATHS)
    generator = torch.Generator().manual_seed(0)
    plans = [
        CpuPackedLayer([tensor for _ in range(PATHS) for tensor in random_path(d_out, d_in, rank, generator)])
        for _ in range(copies_beyond_cache(stored // 8))
    ]
    x = torch.randn(1, d_in, generator=generator)
    times: dict[str, list[float]] = {name: [] for name in KERNELS}
    for turn in range(ROUNDS + 1):  # the first compiles, and warms up
        for name, kernel in KERNELS.items():
            start = time.thread_time()
            for plan in plans:
                plan(x, kernel)
            if turn:
                times[name].append((time.thread_time() - start) / len(plans))
    row = {"d_out": d_out, "d_in": d_in, "bits": stored / (d_out * d_in), "rank": rank, "paths": PATHS}
    medians = {name: statistics.median(found) for name, found in times.items()}
    return [
        row | {"kernel": name, "time_us": seconds * 1e6, "sign_adds_per_s": PATHS * rank * (d_out + d_in) / seconds}
        for name, seconds in medians.items()
    ]


def main() -> None:
    """Measure every row and save them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = [row for shape in SHAPES for bits in BITS for row in rows_of(*shape, bits)]
    save_results(arguments.out, rows, f"python book/experiments/ladder.py {arguments.out}", cpu_name())


if __name__ == "__main__":
    main()
