"""Compare initializers: the error of the weights of two blocks of SmolLM2 at several budgets, with one path and two.

    python book/experiments/initialisation.py book/results/initialisation_smollm2.json
    python book/experiments/initialisation.py my.json --inits admm my_module:my_init --bits 0.55

Every row factorizes the linear layers of the blocks under one budget, without training. That takes a few minutes on one
core. An initializer is a registered name, or a function (weight, rank) -> Factors that is named as module:function.
"""

import argparse
import copy
import shlex
import statistics
import sys
import time
from pathlib import Path

import littlebit.fast as lb
import torch
from littlebit.fast.bench.timing import cpu_name, save_results
from littlebit.fast.models.initializers import INITS
from littlebit.fast.models.registry import load_function

BLOCKS = (2, 20)
BITS = (0.1, 0.3, 0.55, 0.8, 1.0)


def measure(model: torch.nn.Module, init: str, paths: int, bits: float, blocks: list[int]) -> dict:
    """Factorize the layers of some blocks of a model, and return a row of results."""
    include = tuple(f"model.layers.{block}.*" for block in blocks)
    chosen = load_function(init) if ":" in init else init
    config = lb.Config(bits=bits, init=chosen, paths=paths, include=include)
    start = time.process_time()
    found = lb.quantize_(copy.deepcopy(model), config, progress=False)
    row = {"blocks": blocks, "bits": bits, "init": init, "paths": paths}
    row["error"] = statistics.mean(layer.error for layer in found.values())
    row["errors"] = {name: layer.error for name, layer in found.items()}
    return row | {"processor_s": time.process_time() - start}


def main() -> None:
    """Measure every row, and save the rows after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--inits", nargs="+", default=list(INITS), help="registered names, or module:function")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--blocks", nargs="+", type=int, default=list(BLOCKS))
    parser.add_argument("--bits", nargs="+", type=float, default=list(BITS))
    arguments = parser.parse_args()
    if unknown := [init for init in arguments.inits if init not in INITS and ":" not in init]:
        parser.error(f"--inits must be among {', '.join(INITS)}, or module:function, got {unknown[0]!r}")
    model, rows = lb.load_model(arguments.model), []
    command = shlex.join(["python", "book/experiments/initialisation.py", *sys.argv[1:]])
    for bits in arguments.bits:
        for init in arguments.inits:
            for paths in (1, 2):
                try:
                    rows.append(measure(model, init, paths, bits, arguments.blocks))
                except ValueError as error:
                    if "smallest possible value" not in str(error):
                        raise
                    continue  # The scales of two paths alone exceed the smallest budget.
                print(rows[-1], flush=True)
                save_results(arguments.out, rows, command, cpu_name())


if __name__ == "__main__":
    main()
