"""Quantize and train a model in a fixed time, and measure its perplexity: one run of the speedrun.

    python book/experiments/speedrun.py                                    # the tiny model, two minutes of one core
    python book/experiments/speedrun.py --seconds 20                       # a shorter form
    python book/experiments/speedrun.py --recipe paper                     # another recipe of RECIPES
    python book/experiments/speedrun.py --settings '{"rule": "smooth_sign"}' --name "SmoothSign"
    python book/experiments/speedrun.py --model smollm2 --device cuda --seconds 600 --texts A.txt B.txt --test C.txt

Quantization and training count, and nothing else. On a CPU the clock is the processor time of one thread, so that other
work on the machine changes no result. On a GPU it is the time that passes. A short training comes first and shows how
many tokens the time that is left is good for; it counts, too. --save adds the run to book/results/speedrun.json.
"""

import argparse
import copy
import json
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from littlebit.fast import Config, TrainConfig, load_model, load_tokenizer, perplexity, quantize_, train_
from littlebit.fast.bench.timing import device_name, save_results
from littlebit.fast.checkpoints.texts import text_tokens
from littlebit.fast.evaluation.perplexity import SAMPLE_TEXT, TRAINING_TEXT
from training import calibration, pack_scales, pick

BOOK = Path(__file__).parents[1]
RESULTS = BOOK / "results" / "speedrun.json"
PROBE_STEPS = 5
SPARE = 0.95  # share of the time that is left which the training may plan with
BUDGETS = {"tiny": 120.0, "smollm2": 600.0}
#: What a run always has, by model.
SHARED: dict[str, dict[str, Any]] = {
    "tiny": {"bits": 1.5, "sequence_length": 128, "batch_size": 8},
    "smollm2": {"bits": 0.55, "sequence_length": 1024, "batch_size": 8},
}
#: Recipes in the order in which they were tried.
RECIPES: dict[str, dict[str, Any]] = {
    "paper": {
        "init": "dual-svid",
        "paths": 2,
        "rule": "smooth_sign",
        "hidden_loss_weight": 10.0,
        "normalize": False,
        "lr_latents": 2e-3,
        "lr_scales": 2e-3,
    },
    "defaults": {"init": "admm", "paths": 1},
    "Muon": {
        "init": "admm",
        "paths": 1,
        "optimizer": "muon",
        "lr_latents": 7e-3,
        "lr_scales": 1.75e-3,
        "latent_scale": 0.3,
    },
}
WINDOWS = {"tiny": 128, "smollm2": 2048}  # of the measured text, in tokens
#: The recipe of the record, by model.
BEST = {"tiny": "defaults", "smollm2": "Muon"}


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=BUDGETS, default="tiny")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seconds", type=float, help="120 for the tiny model, 600 for SmolLM2")
    parser.add_argument("--recipe", choices=RECIPES, help="default: the best so far")
    parser.add_argument("--settings", type=json.loads, default={}, help="JSON: fields of Config and TrainConfig")
    parser.add_argument("--name", help="of the run in the table; default: the recipe")
    parser.add_argument("--texts", nargs="+", type=Path, default=[TRAINING_TEXT], help="to learn from")
    parser.add_argument("--test", type=Path, default=SAMPLE_TEXT, help="to measure on")
    parser.add_argument("--save", action="store_true", help=f"add the run to {RESULTS.name}")
    arguments = parser.parse_args()
    if arguments.model == "smollm2" and arguments.texts == [TRAINING_TEXT]:
        parser.error("--model smollm2 needs --texts: the package's own text has 50 kB, which it would learn by heart")
    seconds = arguments.seconds or BUDGETS[arguments.model]
    recipe = arguments.recipe or BEST[arguments.model]
    settings = SHARED[arguments.model] | RECIPES[recipe] | arguments.settings
    row = run(arguments.model, arguments.device, seconds, settings, arguments.texts, arguments.test)
    row = {"name": arguments.name or recipe, "settings": settings} | row
    print(json.dumps(row, indent=1))
    if arguments.save:
        add(row)


def run(
    model: str, device: str, seconds: float, settings: dict[str, Any], texts: list[Path], test: Path
) -> dict[str, Any]:
    """Quantize and train a model in a number of seconds, round it to what is stored, and measure it."""
    unused = set(settings) - set(vars(Config())) - set(vars(TrainConfig()))
    if unused:
        raise ValueError(f"settings must be fields of Config or TrainConfig, but {sorted(unused)} are not")
    clock = stopwatch(device)
    tokenizer, teacher = load_tokenizer(model), load_model(model, device)
    learn = [text_tokens(tokenizer, path) for path in texts]
    student: Any = copy.deepcopy(teacher)
    begin = clock()
    found = quantize_(student, pick(Config, settings), calibration(learn, None), progress=False)
    weights = sum(each.d_out * each.d_in for each in found.values())
    bits = sum(each.bits * each.d_out * each.d_in for each in found.values()) / weights
    quantized = clock()

    def train(trained: Any, tokens: int) -> float:
        """Train on a number of tokens; return the seconds."""
        options, start = pick(TrainConfig, settings | {"total_tokens": tokens}), clock()
        train_(trained, copy.deepcopy(teacher), learn, options, progress=False)
        return clock() - start

    step = pick(TrainConfig, settings).step_tokens
    probe = train(copy.deepcopy(student), PROBE_STEPS * step)
    left = SPARE * (seconds - (clock() - begin))
    steps = int(left * PROBE_STEPS / probe)
    if steps < 1:
        raise ValueError(f"{seconds:g} seconds are too few: quantization alone took {quantized - begin:.0f}")
    train(student, steps * step)
    spent = clock() - begin
    pack_scales(student)
    scores = [
        perplexity(each, text_tokens(tokenizer, test), WINDOWS[model], progress=False) for each in (student, teacher)
    ]
    return {
        "model": model,
        "device": device_name(device),
        "budget_s": seconds,
        "spent_s": spent,
        "quantization_s": quantized - begin,
        "tokens": steps * step,
        "bits": bits,
        "perplexity": scores[0].perplexity,
        "original": scores[1].perplexity,
    }


def stopwatch(device: str) -> Callable[[], float]:
    """Choose a clock: processor time of one thread on a CPU, passing time after all work is done on a GPU."""
    if device == "cpu":
        torch.set_num_threads(1)
        return time.process_time

    def passed() -> float:
        torch.cuda.synchronize()
        return time.perf_counter()

    return passed


def add(row: dict[str, Any]) -> None:
    """Add a run to the results; it replaces an older run of the same name and model."""
    rows = json.loads(RESULTS.read_text(encoding="utf-8"))["rows"] if RESULTS.exists() else []
    kept = [each for each in rows if (each["model"], each["name"]) != (row["model"], row["name"])]
    save_results(
        RESULTS, [*kept, row], shlex.join(["python", "book/experiments/speedrun.py", *sys.argv[1:]]), row["device"]
    )


if __name__ == "__main__":
    main()
