"""Measure each initialiser's weight error at several budgets: two blocks of SmolLM2, one path and two.

    python book/experiments/initialisation.py book/results/initialisation_smollm2.json

Every row factorises the linear layers of the blocks under one budget, without training. A few minutes on one core.
"""

import argparse
import copy
import statistics
import time
from pathlib import Path

import littlebit.fast as lb
from littlebit.fast.bench.timing import cpu_name, save_results

BLOCKS = (2, 20)
BITS = (0.1, 0.3, 0.55, 0.8, 1.0)


def main() -> None:
    """Measure every row and save them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    model = lb.load_model("smollm2")
    include = tuple(f"model.layers.{block}.*" for block in BLOCKS)
    rows = []
    for bits in BITS:
        for init in ("dual-svid", "itq", "admm"):
            for paths in (1, 2):
                config = lb.Config(bits=bits, init=init, paths=paths, include=include)
                start = time.process_time()
                try:
                    found = lb.quantize_(copy.deepcopy(model), config, progress=False)
                except ValueError:  # the scales of two paths alone are too much
                    continue
                row = {"blocks": list(BLOCKS), "bits": bits, "init": init, "paths": paths}
                row["error"] = statistics.mean(layer.error for layer in found.values())
                row["errors"] = {name: layer.error for name, layer in found.items()}
                rows.append(row | {"processor_s": time.process_time() - start})
                print(row, flush=True)
                save_results(
                    arguments.out, rows, f"python book/experiments/initialisation.py {arguments.out}", cpu_name()
                )


if __name__ == "__main__":
    main()
