"""Measure the relative error and perplexity of SmolLM2 after initialisation alone, by initialiser and bits.

    python book/experiments/untrained.py OUT.json [--device cuda] [--windows 8]

Every row quantises all linear layers, without training, and measures perplexity on the shipped evaluation text, from
factors in float32.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import littlebit.fast as lb
import torch
from littlebit.fast.bench.timing import cpu_name, save_results
from littlebit.fast.checkpoints.texts import text_tokens
from littlebit.fast.evaluation.perplexity import SAMPLE_TEXT, TRAINING_TEXT

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
    """Quantise with these settings, then measure perplexity."""
    tokenizer, model = lb.load_tokenizer(source), lb.load_model(source, device)
    calibration = text_tokens(tokenizer, TRAINING_TEXT)[:CALIBRATION_TOKENS]
    start = time.perf_counter()
    results = lb.quantize_(model, lb.Config(**settings), calibration, progress=False)
    seconds = time.perf_counter() - start
    score = lb.perplexity(model, text_tokens(tokenizer, SAMPLE_TEXT), max_windows=windows, progress=False)
    weights = sum(result.d_out * result.d_in for result in results.values())
    stored = sum(result.bits * result.d_out * result.d_in for result in results.values()) / weights
    error = statistics.mean(result.error for result in results.values())
    return settings | {"stored_bits": stored, "error": error, "perplexity": score.perplexity, "seconds": seconds}


def main() -> None:
    """Measure every row; the file is written after each, so that a run cut short leaves what it has."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--windows", type=int, default=8)
    arguments = parser.parse_args()
    device = torch.cuda.get_device_name() if arguments.device == "cuda" else cpu_name()
    command = f"python book/experiments/untrained.py OUT.json --device {arguments.device} --windows {arguments.windows}"
    rows = []
    for settings in ROWS:
        rows.append(measure(arguments.model, settings, arguments.device, arguments.windows))
        print(json.dumps(rows[-1]), flush=True)
        save_results(arguments.out, rows, command, device)


if __name__ == "__main__":
    main()
