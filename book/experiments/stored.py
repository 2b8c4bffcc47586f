"""Count what the shipped checkpoints store, layers and descriptions, from their files.

    python book/experiments/stored.py book/results/stored_smollm2.json

Seconds on any machine.
"""

import argparse
from pathlib import Path

import littlebit.fast as lb
from littlebit.fast.bench.timing import save_results
from littlebit.fast.checkpoints.names import bundled_names

KEYS = ("target_bits", "bits_per_weight", "described_bits_per_weight", "weights", "linear_bytes", "description_bytes")


def main() -> None:
    """Count every checkpoint and save the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    rows = []
    for name in bundled_names():
        stored = lb.info(lb.fetch(name))
        rows.append({"name": name} | {key: stored[key] for key in (*KEYS, "file_bytes", "embedding_bits", "format")})
    save_results(
        arguments.out, rows, "python book/experiments/stored.py book/results/stored_smollm2.json", "none: files alone"
    )


if __name__ == "__main__":
    main()
