"""Measure initialization alone: relative error and perplexity of SmolLM2, untrained, over initializers and bits.

    python book/experiments/untrained.py OUT.json [--device cuda] [--windows 8]
    python book/experiments/untrained.py OUT.json --inits admm my_module:my_init --bits 0.55 1.0

Every row quantizes all linear layers, without training, and measures perplexity on the bundled evaluation text, with
factors in float32. An initializer is a registered name, or a function (weight, rank) -> Factors that is named as
module:function.
"""

import argparse
import json
import shlex
import statistics
import sys
import time
from pathlib import Path

import littlebit.fast as lb
from littlebit.fast.bench.timing import device_name, save_results
from littlebit.fast.checkpoints.texts import text_tokens
from littlebit.fast.evaluation.perplexity import SAMPLE_TEXT, TRAINING_TEXT
from littlebit.fast.models.registry import load_function

MODEL = "smollm2"
CALIBRATION_TOKENS = 8192
ROWS = [
    {"init": init, "paths": paths, "bits": bits, "importance": False, "allocation": "uniform"}
    for bits in (0.55, 1.0, 2.0, 4.0)
    for init in ("dual-svid", "itq", "admm")
    for paths in ((1, 2) if bits < 4 else (2,))
    if init != "itq" or bits <= 1.0  # its small SVDs take minutes at high ranks
] + [
    {"init": "admm", "paths": paths, "bits": bits, "importance": True, "allocation": allocation}
    for bits in (0.55, 1.0, 2.0, 4.0)
    for paths in ((1, 2) if bits < 4 else (2,))
    for allocation in ("uniform", "sensitivity")
]


def measure(source: str, settings: dict, device: str, windows: int) -> dict:
    """Quantize a model, measure its perplexity, and return a row of results."""
    tokenizer, model = lb.load_tokenizer(source), lb.load_model(source, device)
    calibration = text_tokens(tokenizer, TRAINING_TEXT)[:CALIBRATION_TOKENS]
    start = time.perf_counter()
    init = load_function(settings["init"]) if ":" in settings["init"] else settings["init"]
    results = lb.quantize_(model, lb.Config(**settings | {"init": init}), calibration, progress=False)
    seconds = time.perf_counter() - start
    score = lb.perplexity(model, text_tokens(tokenizer, SAMPLE_TEXT), max_windows=windows, progress=False)
    weights = sum(result.d_out * result.d_in for result in results.values())
    stored = sum(result.bits * result.d_out * result.d_in for result in results.values()) / weights
    error = statistics.mean(result.error for result in results.values())
    return settings | {"stored_bits": stored, "error": error, "perplexity": score.perplexity, "seconds": seconds}


def main() -> None:
    """Measure every row, and save the rows after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--inits", nargs="+", help="registered names, or module:function; by default the rows above")
    parser.add_argument("--bits", nargs="+", type=float, default=[0.55, 1.0], help="budgets of --inits")
    arguments = parser.parse_args()
    chosen = [
        {"init": init, "paths": paths, "bits": bits, "importance": False, "allocation": "uniform"}
        for bits in arguments.bits
        for init in arguments.inits or ()
        for paths in (1, 2)
    ]
    device = device_name(arguments.device)
    command = shlex.join(["python", "book/experiments/untrained.py", "OUT.json", *sys.argv[2:]])
    rows = []
    for settings in chosen or ROWS:
        rows.append(measure(arguments.model, settings, arguments.device, arguments.windows))
        print(json.dumps(rows[-1]), flush=True)
        save_results(arguments.out, rows, command, device)


if __name__ == "__main__":
    main()
