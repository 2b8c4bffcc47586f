r"""Training SmolLM2-135M-Instruct below one bit: how fast, and which recipe.

Each experiment is a set of changes to the defaults; a row of results is written as soon as it is measured. The
figures of book/results/training_smollm2.json came from this script, one GPU for each process:

    python book/training.py speed  --out speed.json
    python book/training.py ladder --out ladder.json --texts wikitext2-train.txt books.txt --test test.txt \
        --experiments book/training_ladder.json
    python book/training.py ship   --out smollm2-0.55bit.json --bits 0.55 --seconds 470 --texts ... --test ...

Texts are UTF-8 files, or .npy files of tokens made from them. The test text is only evaluated on.
"""

import argparse
import copy
import json
import math
import tempfile
import time
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from littlebit.fast import Config, TrainConfig, load_model, load_tokenizer, perplexity, quantize_, save, shipped, train_
from littlebit.fast.bench import save_results
from littlebit.fast.hf import text_tokens
from littlebit.fast.student import littlebit_layers

TEACHER = "smollm2"
HELD_OUT = 60_000  # tokens
PILOT_TOKENS, PILOT_RATES = 4_096_000, (4e-3, 8e-3)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["speed", "ladder", "ship"])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--texts", nargs="+", type=Path, default=[])
    parser.add_argument("--test", type=Path)
    parser.add_argument("--experiments", type=Path, help="JSON: a list of objects, each a name and changed settings")
    parser.add_argument("--bits", type=float, help="of the checkpoint to ship")
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin no experiment, or end, after so long")
    parser.add_argument("--sequence", type=int, default=512, help="tokens in a sequence of the checkpoint's training")
    parser.add_argument("--batch", type=int, default=8, help="sequences in a step of the checkpoint's training")
    parser.add_argument("--device", default="cuda")
    arguments = parser.parse_args()
    globals()[arguments.what](arguments)


def speed(arguments: argparse.Namespace) -> None:
    """Tokens per second at several sizes of a step, on random tokens."""
    teacher, rows = load_model(TEACHER, arguments.device), []
    tokens = torch.randint(0, teacher.config.vocab_size, (1 << 20,), generator=torch.Generator().manual_seed(0))
    start = copy.deepcopy(teacher)
    quantize_(start, Config(bits=0.55, paths=1))
    for batch, compiled in ((8, True), (32, True), (8, False)):
        student, config = copy.deepcopy(start), TrainConfig(tokens=60 * batch * 512, batch=batch)
        torch.cuda.reset_peak_memory_stats()
        begin = time.perf_counter()
        log = train_(student, copy.deepcopy(teacher), tokens, config, compile=compiled)
        rows.append(
            {"tokens_a_step": batch * 512, "compile": compiled} | log[-1] | {"seconds": time.perf_counter() - begin}
        )
        print(rows[-1], flush=True)
        save_results(arguments.out, rows, "python book/training.py speed", torch.cuda.get_device_name())


def ladder(arguments: argparse.Namespace) -> None:
    """Train once for every experiment and measure perplexity on the test text."""
    begin = time.perf_counter()
    tokenizer = load_tokenizer(TEACHER)
    texts = [read_tokens(path, tokenizer) for path in arguments.texts]
    test = read_tokens(arguments.test, tokenizer)
    teacher = load_model(TEACHER, arguments.device)
    rows = [{"name": "teacher", "perplexity": perplexity(teacher, test, progress=False).perplexity}]
    quantised: dict[Config, torch.nn.Module] = {}
    for changes in json.loads(arguments.experiments.read_text()):
        if time.perf_counter() - begin > arguments.seconds:
            break
        row, _ = experiment(dict(changes), teacher, texts, test, quantised)
        rows.append(row)
        print(json.dumps({key: value for key, value in row.items() if key != "log"}), flush=True)
        save_results(arguments.out, rows, "python book/training.py ladder", torch.cuda.get_device_name())


def ship(arguments: argparse.Namespace) -> None:
    """Train a checkpoint for so many seconds, initialisation included, and write it as the package ships it.

    Short trainings at two learning rates come first. The one with the lower perplexity on the end of the first text,
    which is held out, decides: three quarters of its rate train for the time that is left.
    """
    begin = time.perf_counter()
    tokenizer = load_tokenizer(TEACHER)
    texts = [read_tokens(path, tokenizer) for path in arguments.texts]
    texts[0], held_out = texts[0][:-HELD_OUT], texts[0][-HELD_OUT:]
    test = read_tokens(arguments.test, tokenizer)
    teacher = load_model(TEACHER, arguments.device)
    rows: list[dict[str, Any]] = []
    quantised: dict[Config, torch.nn.Module] = {}
    shared = {"bits": arguments.bits, "weights": [1 / len(texts)] * len(texts), "hidden": 0.1}
    shared |= {"sequence": arguments.sequence, "batch": arguments.batch}

    def run(name: str, rate: float, tokens: int) -> tuple[dict[str, Any], torch.nn.Module]:
        changes = shared | {"name": name, "tokens": tokens, "lr_latents": rate, "lr_scales": rate / 4}
        row, student = experiment(changes, teacher, texts, test, quantised)
        row["validation"] = perplexity(student, held_out, arguments.sequence, progress=False).perplexity
        rows.append(row)
        print(json.dumps({key: value for key, value in row.items() if key != "log"}), flush=True)
        save_results(arguments.out, rows, "python book/training.py ship", torch.cuda.get_device_name())
        return row, student

    pilots = [run(f"pilot, latents {rate}", rate, PILOT_TOKENS)[0] for rate in PILOT_RATES]
    best = min(pilots, key=lambda row: row["validation"])
    left = arguments.seconds - (time.perf_counter() - begin)
    row, student = run(arguments.out.stem, 0.75 * best["lr_latents"], int(0.95 * left * best["tokens_per_s"]))
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = save(student.cpu(), Path(folder) / "checkpoint", tokenizer, arguments.bits)
        training = {key: value for key, value in row.items() if key != "log"}
        shipped.ship(checkpoint, TEACHER, arguments.out.with_suffix(".safetensors"), training)


def experiment(
    changes: dict[str, Any],
    teacher: torch.nn.Module,
    texts: list[torch.Tensor],
    test: torch.Tensor,
    quantised: dict[Config, torch.nn.Module],
) -> tuple[dict[str, Any], torch.nn.Module]:
    """One row: initialise, train, round to what is stored, measure."""
    row: dict[str, Any] = dict(changes)
    weights = changes.pop("weights", None)
    name = changes.pop("name")
    settings = {"bits": 0.55, "paths": 1, "init": "admm"} | changes
    config, options = (pick(kind, settings) for kind in (Config, TrainConfig))
    unknown = set(changes) - {field.name for kind in (Config, TrainConfig) for field in fields(kind)}
    if unknown:
        raise ValueError(f"experiment {name}: unknown settings {unknown}")
    torch.cuda.reset_peak_memory_stats()
    begin = time.perf_counter()
    if config not in quantised:
        quantised.clear()
        quantised[config] = copy.deepcopy(teacher)
        results = quantize_(quantised[config], config, texts[0][:65536], progress=False)
        row["error"] = sum(result.error for result in results.values()) / len(results)
    student = copy.deepcopy(quantised[config])
    row["initialisation_s"] = time.perf_counter() - begin
    begin = time.perf_counter()
    row["log"] = train_(student, copy.deepcopy(teacher), texts, options, weights, log_steps=50, progress=False)
    row["training_s"] = time.perf_counter() - begin
    row["tokens_per_s"] = float(np.median([entry["tokens_per_s"] for entry in row["log"]]))
    row["loss"] = row["log"][-1]["loss"]
    row["memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
    row["bits"] = config.bits
    round_scales(student)
    row["perplexity"] = perplexity(student, test, progress=False).perplexity
    return row | {"name": name}, student


def pick(kind: type, settings: dict[str, Any]) -> Any:
    """A dataclass filled with those of the settings that it has."""
    return kind(**{field.name: settings[field.name] for field in fields(kind) if field.name in settings})


def round_scales(model: torch.nn.Module) -> None:
    """Round every scale to float16, in place, as a checkpoint does."""
    for layer in littlebit_layers(model).values():
        for path in layer.factors():
            for tensor in (path.h, path.ell, path.g):
                tensor.data = tensor.data.half().float()


def read_tokens(path: Path, tokenizer: Any) -> torch.Tensor:
    """Tokens of a text file or of a .npy file."""
    if path.suffix == ".npy":
        return torch.from_numpy(np.load(path).astype(np.int64))
    return text_tokens(tokenizer, path)


if __name__ == "__main__":
    main()
