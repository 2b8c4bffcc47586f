"""Measure why a rotation helps: Dual-SVID of a matrix of rank 8, with its own axes and with rotated ones.

    python book/experiments/rotation.py book/results/rotation.json

The real factors have more columns than the matrix has ranks; the further ones are zero, until a rotation spreads the
eight directions over all columns. A few seconds on one core.
"""

import argparse
from pathlib import Path

import littlebit.fast as lb
import torch
from littlebit.fast.bench.timing import cpu_name, save_results
from littlebit.fast.dual_svid import balanced_factors, factors_from

SIZE, TRUE_RANK, MATRICES = 256, 8, 5
NAMES = ("own_axes", "random_rotation", "own_axes_refitted", "random_rotation_refitted")
RANKS = (8, 16, 32, 64, 128, 256)


def errors(seed: int, rank: int) -> list[float]:
    """Compute the relative errors with own axes and with rotated ones, and both again with scales refitted."""
    generator = torch.Generator().manual_seed(seed)
    left, right = (torch.randn(SIZE, TRUE_RANK, generator=generator, dtype=torch.float64) for _ in range(2))
    weight = left @ right.T
    u, v = (torch.nn.functional.pad(each, (0, rank - TRUE_RANK)) for each in balanced_factors(weight, TRUE_RANK))
    turn = lb.random_rotation(torch.randn(rank, rank, generator=generator, dtype=torch.float64))
    found = [factors_from(u, v), factors_from(u @ turn, v @ turn)]
    found += [lb.refit_scales(weight, each) for each in found]
    return [((weight - each.to_dense()).norm() / weight.norm()).item() for each in found]


def main() -> None:
    """Measure every rank and save the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    rows = []
    for rank in RANKS:
        found = torch.tensor([errors(seed, rank) for seed in range(MATRICES)]).mean(dim=0)
        rows.append({"rank": rank} | dict(zip(NAMES, found.tolist(), strict=True)))
        print(rows[-1], flush=True)
    command = "python book/experiments/rotation.py book/results/rotation.json"
    save_results(parser.parse_args().out, rows, command, cpu_name())


if __name__ == "__main__":
    main()
