r"""Repeat the paper's ablations and its baselines on SmolLM2-135M-Instruct, all on equally many tokens.

    python book/experiments/ablations.py --out ablations.json --texts TEXTS --test test.txt
    python book/experiments/ablations.py --out tried.json --texts TEXTS --test test.txt --device cpu --blocks 2 \
        --windows 1 --settings '{"sequence_length": 32, "batch_size": 2, "total_tokens": 128}'

Each experiment of EXPERIMENTS changes BASE. It is trained at each of two learning rates, and then on two more orders of
the text at the rate that was better on held-out text. Experiments stand in the order of their worth; no training begins
after `--seconds`. A row is written as soon as it is measured. Two processes share the work with --part 0/2 and --part
1/2; `--join ONE TWO` writes their files into one. The figures of book/results/ablations_smollm2.json came from this
script. Texts are UTF-8 files, or .npy files of tokens; the test text is only evaluated on.
"""

import argparse
import copy
import json
import math
import time
from pathlib import Path
from typing import Any

from baselines import LAYERS, UnitLatentScale, random_init
from littlebit.fast import Config, TrainConfig, load_model, perplexity, quantize_, register_init, train_
from littlebit.fast.bits import layer_bits
from littlebit.fast.models.layers import LatentModule, Path as LowRankPath
from littlebit.fast.models.quantize import replace_modules, target_layers
from littlebit.fast.training.student import littlebit_layers
from littlebit.fast.training.trainer import TrainingError
from training import TEACHER, Data, pack_scales, pick, read, write_rows

SEEDS = 3
TEST_WINDOWS = 40  # the first ones, of 2048 tokens
BASE: dict[str, Any] = {
    "layer": "littlebit",
    "bits": 0.55,
    "paths": 1,
    "init": "dual-svid",
    "rates": (5e-3, 1.5e-2),  # of the latents, to try; scales learn at a quarter of it
    "total_tokens": 786_432,
    "sequence_length": 512,
    "batch_size": 8,
}
SMOOTH = {"rule": "smooth_sign", "rates": (1.5e-3, 5e-3)}  # Larger steps carry latents out of its reach.
PAPER = {"paths": 2, "hidden_loss_weight": 10.0, "normalize": False, **SMOOTH}
TENTH = {"bits": 0.1, "scale_bits": 8}  # With 16-bit scales, two paths of rank 1 would take more.
#: What each experiment changes. Those that start from the same student train one after the other.
EXPERIMENTS: tuple[dict[str, Any], ...] = (
    {"name": "one path"},
    {"name": "SmoothSign", **SMOOTH},
    {"name": "two paths", "paths": 2},
    {"name": "the paper's recipe", **PAPER},
    {"name": "one path", **TENTH},
    {"name": "SmoothSign", **SMOOTH, **TENTH},
    {"name": "two paths", "paths": 2, **TENTH},
    {"name": "OneBit", "layer": "onebit", "bits": 1.0},
    {"name": "one path", "bits": 1.046},  # as many as OneBit's layers have in SmolLM2
    {"name": "pruned 1:8", "layer": "pruned 1:8"},
    {"name": "random", "init": "random"},
    {"name": "ADMM", "init": "admm"},
    {"name": "Joint-ITQ", "init": "itq"},
    {"name": "one path", "bits": 1.0},
    {"name": "two paths", "bits": 1.0, "paths": 2},
    {"name": "latent scale 1", "layer": "latent scale 1"},
    {"name": "group scales", "layer": "group scales", "bits": 1.0},
    {"name": "one path", "bits": 0.3},
    {"name": "two paths", "bits": 0.3, "paths": 2},
    {"name": "4x rank of k and v", "kv_rank_factor": 4.0, **TENTH},
    {"name": "4x rank of k and v", "kv_rank_factor": 4.0},
)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--texts", nargs="+", type=Path, help="to learn from; UTF-8, or .npy files of tokens")
    parser.add_argument("--test", type=Path, help="to measure on")
    parser.add_argument("--settings", type=json.loads, default={}, help="JSON: changes to BASE")
    parser.add_argument("--windows", type=int, default=TEST_WINDOWS, help="of 2048 tokens, to measure on at most")
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin no training after so long")
    parser.add_argument("--part", default="0/1", help="share of the work: I/N")
    parser.add_argument("--first", type=int, default=0, help="number of the experiment to begin with, from 0")
    parser.add_argument("--blocks", type=int, help="of the original to keep, to try the script on a CPU")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--join", nargs="+", type=Path, help="results of several parts, to write into one file")
    arguments = parser.parse_args()
    if arguments.join:
        found = [json.loads(path.read_text(encoding="utf-8")) for path in arguments.join]
        rows = sorted((row for each in found for row in each["rows"]), key=lambda row: row["order"])
        arguments.out.write_text(json.dumps(found[0] | {"rows": rows}, indent=1) + "\n", encoding="utf-8")
        return
    begin = time.perf_counter()
    register_init("random", random_init, batched=True)
    data = read(arguments)
    teacher: Any = load_model(TEACHER, arguments.device)
    if arguments.blocks:
        teacher.model.layers = teacher.model.layers[: arguments.blocks]
        teacher.config.num_hidden_layers = arguments.blocks
    part, parts = map(int, arguments.part.split("/"))
    runner = Runner(teacher, data, arguments.windows, arguments.out, begin + arguments.seconds)
    if part == 0:
        runner.add({"name": "original", "order": -1} | runner.measured(teacher))
    experiments = [BASE | arguments.settings | changes for changes in EXPERIMENTS]
    keys = list(dict.fromkeys(map(start_key, experiments)))
    for order, settings in enumerate(experiments):
        if order >= arguments.first and keys.index(start_key(settings)) % parts == part:
            runner.tune(settings | {"order": order})


def start_key(settings: dict[str, Any]) -> tuple[str, Config]:
    """Name what decides how a student starts: its kind of layer, and its quantization."""
    return settings["layer"], pick(Config, settings)


class Runner:
    """Train students and collect rows.

    Parameters
    ----------
    teacher : transformers causal language model
    data : Data
    windows : int
        Windows of 2048 tokens to measure on at most.
    out : Path
        Results file.
    end : float
        Time of `time.perf_counter` after which no training begins.
    """

    def __init__(self, teacher: Any, data: Data, windows: int, out: Path, end: float):
        self.teacher, self.data, self.windows, self.out, self.end = teacher, data, windows, out, end
        self.rows: list[dict[str, Any]] = []
        self.starts: dict[tuple[str, Config], tuple[Any, dict[str, float]]] = {}

    def tune(self, settings: dict[str, Any]) -> None:
        """Train at each rate, then on other orders of the text at the better one."""
        tried = [row for rate in settings["rates"] if (row := self.train(settings, rate, 0))]
        if len(tried) == len(settings["rates"]):
            best = min(tried, key=lambda row: row.get("held_out", math.inf))["lr_latents"]
            for seed in range(1, SEEDS):
                self.train(settings, best, seed)

    def train(self, settings: dict[str, Any], rate: float, seed: int) -> dict[str, Any] | None:
        """Train one student, round its scales to what is stored, measure it and write its row; None if it is late."""
        if time.perf_counter() > self.end:
            return None
        settings = settings | {"lr_latents": rate, "lr_scales": rate / 4}
        begin = time.perf_counter()
        start, row = self.start(settings)
        student, ready = copy.deepcopy(start), time.perf_counter()
        options = pick(TrainConfig, settings | {"seed": seed})
        row = settings | row | {"seed": seed, "tokens": options.steps * options.step_tokens}
        try:
            log = train_(student, copy.deepcopy(self.teacher), self.data.texts, options, log_steps=50, progress=False)
        except TrainingError as error:
            return self.add(row | {"failed": str(error)})
        row |= {"initialization_s": ready - begin, "training_s": time.perf_counter() - ready}
        row |= {"loss": log[-1]["loss"], "tokens_per_s": log[-1]["tokens_per_s"]}
        round_scales(student)
        return self.add(row | self.measured(student))

    def start(self, settings: dict[str, Any]) -> tuple[Any, dict[str, float]]:
        """Find or make a student that has not trained yet, with its stored bits and the error of its weights."""
        key = start_key(settings)
        if key not in self.starts:
            student, layer = copy.deepcopy(self.teacher), settings["layer"]
            if layer not in LAYERS:
                quantize_(student, key[1], progress=False)
            made: dict[str, Any] = {}
            if layer in LAYERS:
                made = {name: LAYERS[layer](dense.weight) for name, dense in target_layers(student, Config())}
            elif layer == "latent scale 1":
                made = {name: UnitLatentScale(each) for name, each in littlebit_layers(student).items()}
            replace_modules(student, made)
            self.starts[key] = student, {"stored_bits": stored_bits(self.teacher, student)}
        return self.starts[key]

    def measured(self, model: Any) -> dict[str, Any]:
        """Measure perplexity on the first windows of the test text and of held-out text."""
        test, held_out = (
            perplexity(model, text, max_windows=self.windows, progress=False)
            for text in (self.data.test, self.data.held_out)
        )
        return {"perplexity": test.perplexity, "windows": test.windows, "held_out": held_out.perplexity}

    def add(self, row: dict[str, Any]) -> dict[str, Any]:
        """Add a row to the results file, and show it."""
        self.rows.append(row)
        print(json.dumps(row), flush=True)
        write_rows(self.out, self.rows)
        return row


def stored_bits(teacher: Any, student: Any) -> float:
    """Count the stored bits per weight of the layers that were replaced."""
    weights = bits = 0
    for name, dense in target_layers(teacher, Config()):
        layer = student.get_submodule(name)
        weights += dense.weight.numel()
        if hasattr(layer, "stored_bits"):
            bits += layer.stored_bits()
        else:
            bits += layer_bits(layer.d_out, layer.d_in, layer.ranks, layer.scale_bits)
    return bits / weights


def round_scales(student: Any) -> None:
    """Round every scale in place to what is stored: float16, or the 8-bit codes of a LittleBit layer."""
    pack_scales(student)
    for module in student.modules():
        if isinstance(module, LatentModule) and not isinstance(module, LowRankPath):
            for name, parameter in module.named_parameters():
                if name not in module.latents:
                    parameter.data = parameter.data.half().float()


if __name__ == "__main__":
    main()
