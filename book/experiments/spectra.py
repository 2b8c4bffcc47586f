"""Measure how low-rank weights are: singular values of every linear layer of SmolLM2's blocks.

    python book/experiments/spectra.py book/results/spectra_smollm2.json

A row for each type of layer: the share of ||W||_F^2 in the largest singular values, at several fractions of the full
rank, averaged over the layers, and the same for a matrix of equal shape with independent normal entries.
"""

import argparse
from pathlib import Path

import littlebit.fast as lb
import torch
from littlebit.fast.bench.timing import cpu_name, save_results
from littlebit.fast.models.quantize import target_layers
from littlebit.fast.models.selection import linear_weight

FRACTIONS = [at / 32 for at in range(33)]  # of the full rank


def energies(weight: torch.Tensor) -> torch.Tensor:
    """Compute the share of the squared norm in the largest singular values, at each of FRACTIONS."""
    squares = torch.linalg.svdvals(weight.double()).square()
    total = torch.cat([torch.zeros(1), squares.cumsum(0).cpu()]) / squares.sum()
    return total[[round(fraction * len(squares)) for fraction in FRACTIONS]]


def main() -> None:
    """Decompose every layer and save a row for each kind."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    kinds: dict[str, list[torch.Tensor]] = {}
    for name, layer in target_layers(lb.load_model("smollm2"), lb.Config()):
        kinds.setdefault(name.split(".")[-1], []).append(linear_weight(layer))
    generator = torch.Generator().manual_seed(0)
    rows = []
    for kind, weights in kinds.items():
        d_out, d_in = weights[0].shape
        rows.append(
            {
                "kind": kind,
                "layers": len(weights),
                "d_out": d_out,
                "d_in": d_in,
                "fractions": FRACTIONS,
                "energy": torch.stack([energies(weight) for weight in weights]).mean(0).tolist(),
                "normal_energy": energies(torch.randn(d_out, d_in, generator=generator)).tolist(),
            }
        )
    save_results(arguments.out, rows, f"python book/experiments/spectra.py {arguments.out}", cpu_name())


if __name__ == "__main__":
    main()
