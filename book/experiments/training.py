r"""Train SmolLM2-135M-Instruct below one bit: measure speed, compare recipes, make the shipped checkpoints.

Each experiment is a set of changes to the defaults; a row of results is written as soon as it is measured. The
figures of book/results/training_smollm2.json came from this script, one GPU for each process:

    python book/experiments/training.py speed  --out speed.json
    python book/experiments/training.py write  --out teacher.npy --texts wikitext2-train.txt books.txt
    python book/experiments/training.py ladder --out ladder.json --test test.txt \
        --texts wikitext2-train.txt books.txt teacher.npy --experiments book/experiments/training_ladder.json
    python book/experiments/training.py ladder --out ladder.json --texts SIX --test test.txt \
        --experiments book/experiments/training_ladder_texts.json
    python book/experiments/training.py ship   --out smollm2-0.55bit.json --bits 0.55 --seconds 470 \
        --texts SIX --test test.txt --blimp blimp.zip --settings SETTINGS
    python book/experiments/training.py ratios --out ratios.json --texts ENDS --test test.txt \
        --models smollm2-0.55bit smollm2-0.3bit --blimp blimp.zip

SIX are WikiText-2 train, encyclopedia in its form, encyclopedia, books, explanations and dialogue in the chat template
(see training_text.py), ENDS what was held out of them; SETTINGS is the row of the results as JSON. Texts are UTF-8
files, or .npy files of tokens made from them. The test text is only evaluated on.
"""

import argparse
import copy
import json
import math
import shlex
import sys
import tempfile
import time
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from littlebit.fast import (
    Checkpointer,
    Config,
    TrainConfig,
    load,
    load_model,
    load_tokenizer,
    perplexity,
    quantize_,
    save,
    train_,
)
from littlebit.fast.bench.timing import device_name, save_results
from littlebit.fast.checkpoints.bundling import export_delta
from littlebit.fast.checkpoints.texts import text_tokens, training_tokens
from littlebit.fast.evaluation.perplexity import token_losses
from littlebit.fast.evaluation.zero_shot import blimp
from littlebit.fast.models.calibrate import windows
from littlebit.fast.packing import pack_factors, unpack_factors
from littlebit.fast.training.config import with_new_names
from littlebit.fast.training.student import littlebit_layers

TEACHER = "smollm2"
HELD_OUT = 60_000  # tokens
CALIBRATION_TOKENS = 16_384
WINDOW = 2048  # tokens
POSITIONS = ((512, 1024), (1024, 1536), (1536, 2048))  # of a window
PROBE_STEPS = 80  # to see how fast a training is
PROMPT, WRITTEN = 16, 2048  # tokens of a prompt, and sequences of 512 that the teacher writes
SPEEDS = (  # sequences in a step, tokens in a sequence, weight of the hidden-state loss
    (8, 512, 0.0),
    (8, 512, 0.1),
    (4, 1024, 0.1),
    (32, 512, 0.0),
    (32, 512, 0.1),
)


class Data(NamedTuple):
    """Texts that the students learn from, and texts that they are measured on."""

    tokenizer: Any
    texts: list[torch.Tensor]  # the first without its end
    held_out: torch.Tensor  # that end
    test: torch.Tensor


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["speed", "write", "ladder", "ship", "ratios"])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--texts", nargs="+", type=Path, default=[])
    parser.add_argument("--test", type=Path)
    parser.add_argument("--experiments", type=Path, help="JSON: a list of objects, each a name and changed settings")
    parser.add_argument("--bits", type=float, help="of the checkpoint to ship")
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin no experiment, or end, after so long")
    parser.add_argument(
        "--tokens", type=int, help="tokens that the checkpoint to ship reads; without it, a short training finds out"
    )
    parser.add_argument("--states", type=Path, help="folder for the state of the training, which resumes from it")
    parser.add_argument("--settings", type=json.loads, default={}, help="JSON: settings of the checkpoint's training")
    parser.add_argument("--blimp", type=Path, help="BLiMP's archive, to score the checkpoint on")
    parser.add_argument("--models", nargs="+", default=[], help="trained checkpoints to compare with the original")
    parser.add_argument("--windows", type=int, default=1000, help="of 2048 tokens, to read of each text at most")
    parser.add_argument("--device", default="cuda")
    arguments = parser.parse_args()
    globals()[arguments.what](arguments)


def speed(arguments: argparse.Namespace) -> None:
    """Measure tokens per second at several batch sizes, with random weights of SmolLM2-135M's shapes."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shapes = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
    )
    teacher, rows = LlamaForCausalLM(shapes).to(arguments.device).eval(), []
    tokens = torch.randint(0, shapes.vocab_size, (1 << 21,))
    start = copy.deepcopy(teacher)
    quantize_(start, Config(bits=0.55, paths=1, init="dual-svid"))
    for batch, sequence, hidden in SPEEDS:
        student, steps = copy.deepcopy(start), 60
        config = TrainConfig(steps * batch * sequence, sequence, batch, hidden_loss_weight=hidden)
        torch.cuda.reset_peak_memory_stats()
        begin = time.perf_counter()
        log = train_(student, copy.deepcopy(teacher), tokens, config, progress=False)
        row = {"tokens_a_step": batch * sequence, "sequence": sequence, "hidden": hidden} | log[-1]
        rows.append(row | {"seconds": time.perf_counter() - begin})
        print(rows[-1], flush=True)
        write_rows(arguments.out, rows)


def write(arguments: argparse.Namespace) -> None:
    """Let the teacher continue short pieces of the texts: a million tokens, as a .npy file."""
    tokenizer = load_tokenizer(TEACHER)
    texts = [training_tokens(tokenizer, path)[:-HELD_OUT] for path in arguments.texts]
    teacher: Any = load_model(TEACHER, arguments.device, torch.bfloat16)
    generator, prompts = torch.Generator().manual_seed(0), []
    for text in texts:
        starts = torch.randint(0, len(text) - PROMPT, (WRITTEN // len(texts),), generator=generator)
        prompts.append(text[starts[:, None] + torch.arange(PROMPT)])
    torch.manual_seed(0)
    written = teacher.generate(
        torch.cat(prompts).to(arguments.device),
        attention_mask=torch.ones(WRITTEN, PROMPT, dtype=torch.int64, device=arguments.device),
        max_length=512,
        min_length=512,
        do_sample=True,
        top_k=0,
        pad_token_id=tokenizer.eos_token_id,
    )
    np.save(arguments.out, written[torch.randperm(WRITTEN)].flatten().cpu().numpy().astype(np.uint16))


def ladder(arguments: argparse.Namespace) -> None:
    """Train once for every experiment and measure perplexity on the test text."""
    begin = time.perf_counter()
    data, teacher = read(arguments), load_model(TEACHER, arguments.device)
    rows: list[dict[str, Any]] = []
    quantised: dict[Config, torch.nn.Module] = {}
    for changes in json.loads(arguments.experiments.read_text()):
        if time.perf_counter() - begin > arguments.seconds:
            break
        experiment(changes, teacher, data, quantised, rows, arguments.out)


def ship(arguments: argparse.Namespace) -> None:
    """Train a checkpoint for `--seconds`, initialisation included, and write it as the package ships it.

    Without `--tokens`, a short training comes first and shows how many the time that is left is good for: nothing else
    may use the GPU later that does not use it then. The last quarter of them is read in the longer sequences.
    """
    begin = time.perf_counter()
    data, teacher = read(arguments), load_model(TEACHER, arguments.device)
    rows: list[dict[str, Any]] = []
    quantised: dict[Config, torch.nn.Module] = {}
    shared = {"bits": arguments.bits, "weights": [1 / len(data.texts)] * len(data.texts)} | arguments.settings

    def run(name: str, tokens: int, states: Path | None = None) -> torch.nn.Module:
        changes = shared | {"name": name, "tokens": tokens, "long_tokens": tokens // 4}
        return experiment(changes, teacher, data, quantised, rows, arguments.out, states)

    tokens = arguments.tokens
    if tokens is None:
        run("probe", PROBE_STEPS * pick(TrainConfig, shared).step_tokens)
        left = arguments.seconds - (time.perf_counter() - begin)
        tokens = int(0.95 * left * rows[0]["tokens_per_s"])
    student = run(arguments.out.stem, tokens, arguments.states)
    row = rows[-1]
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = save(student.cpu(), Path(folder) / "checkpoint", data.tokenizer, arguments.bits)
        training = {key: value for key, value in row.items() if key != "log"}
        export_delta(checkpoint, TEACHER, arguments.out.with_name(f"{arguments.out.stem}.safetensors"), training)
        packed: Any = load(checkpoint, arguments.device)
    row["perplexity_packed"] = perplexity(packed, data.test, progress=False).perplexity
    if arguments.blimp:
        result = blimp(packed, data.tokenizer, arguments.blimp, progress=False)
        row |= {"blimp": result.accuracy, "blimp_pairs": result.pairs}
    print(row["perplexity_packed"], row.get("blimp"), flush=True)
    write_rows(arguments.out, rows)


def ratios(arguments: argparse.Namespace) -> None:
    """Divide the perplexities of trained checkpoints on held-out texts by the original's, also by position."""
    tokenizer = load_tokenizer(TEACHER)
    texts = {path.stem: training_tokens(tokenizer, path) for path in arguments.texts}
    texts[arguments.test.stem] = text_tokens(tokenizer, arguments.test)
    rows: list[dict[str, Any]] = []
    original: dict[str, np.ndarray] = {}
    for name in (TEACHER, *arguments.models):
        model: Any = (load_model if name == TEACHER else load)(name, arguments.device)
        found = {text: losses_by_position(model, tokens, arguments.windows) for text, tokens in texts.items()}
        original = original or found
        above = {text: found[text] - original[text] for text in texts}  # nats
        by_text = {text: math.exp(loss.mean()) for text, loss in above.items()}
        by_position = {
            f"{start} to {end}": math.exp(above[arguments.test.stem][start - 1 : end - 1].mean())
            for start, end in POSITIONS
        }
        row = {"name": name, "windows": arguments.windows, "ratios": by_text, "ratios_by_position": by_position}
        if arguments.blimp:
            row["blimp"] = blimp(model, tokenizer, arguments.blimp, progress=False).accuracy
        rows.append(row)
        print(json.dumps(row), flush=True)
        write_rows(arguments.out, rows)


def losses_by_position(model: Any, tokens: torch.Tensor, most: int) -> np.ndarray:
    """Average the losses of each position over `most` windows of WINDOW tokens, (WINDOW - 1,) nats."""
    with torch.inference_mode():
        losses = [token_losses(model, part[None].to(model.device))[0].cpu() for part in windows(tokens, WINDOW)[:most]]
    return torch.stack(losses).mean(0).numpy()


def experiment(
    changes: dict[str, Any],
    teacher: torch.nn.Module,
    data: Data,
    quantised: dict[Config, torch.nn.Module],
    rows: list[dict[str, Any]],
    out: Path,
    states: Path | None = None,
) -> torch.nn.Module:
    """Initialise, train, round to what is stored, measure, and add a row to the results. Return the student."""
    row: dict[str, Any] = dict(changes)
    settings = {"bits": 0.55, "paths": 1, "init": "admm"} | changes
    config, options = (pick(kind, settings) for kind in (Config, TrainConfig))
    known = {field.name for kind in (Config, TrainConfig) for field in fields(kind)} | {"name", "weights"}
    if unknown := set(with_new_names(changes)) - known:
        raise ValueError(f"experiment {changes['name']}: unknown settings {unknown}")
    torch.cuda.reset_peak_memory_stats()
    begin = time.perf_counter()
    if config not in quantised:
        quantised.clear()
        quantised[config] = copy.deepcopy(teacher)
        results = quantize_(quantised[config], config, calibration(data.texts, changes.get("weights")), progress=False)
        row["error"] = sum(result.error for result in results.values()) / len(results)
    student = copy.deepcopy(quantised[config])
    row["initialisation_s"] = time.perf_counter() - begin
    begin = time.perf_counter()
    weights = changes.get("weights")
    saver = Checkpointer(states, minutes=1.0) if states else None
    row["log"] = train_(
        student, copy.deepcopy(teacher), data.texts, options, weights, log_steps=50, progress=False, checkpointer=saver
    )
    row["training_s"] = time.perf_counter() - begin
    row["tokens_per_s"] = float(np.median([entry["tokens_per_s"] for entry in row["log"]]))
    row["loss"] = row["log"][-1]["loss"]
    row["memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
    row["bits"] = config.bits
    pack_scales(student)
    row["perplexity"] = perplexity(student, data.test, progress=False).perplexity
    for window in (512, 2048):
        row[f"held_out_{window}"] = perplexity(student, data.held_out, window, progress=False).perplexity
    rows.append(row)
    print(json.dumps({key: value for key, value in row.items() if key != "log"}), flush=True)
    write_rows(out, rows)
    return student


def calibration(texts: list[torch.Tensor], weights: list[float] | None) -> torch.Tensor:
    """Take the beginnings of the texts, in proportion to their weights or, without weights, to their lengths."""
    weights = weights or [len(text) for text in texts]
    shares = zip(texts, weights, strict=True)
    return torch.cat([text[: int(CALIBRATION_TOKENS * share / sum(weights))] for text, share in shares])


def write_rows(out: Path, rows: list[dict[str, Any]]) -> None:
    """Write the rows so far, with the command that makes them; of absolute paths only the files' names."""
    words = [Path(word).name if Path(word).is_absolute() else word for word in sys.argv]
    device = device_name("cuda" if torch.cuda.is_available() else "cpu")
    save_results(out, rows, shlex.join(["python", *words]), device)


def pick(kind: type, settings: dict[str, Any]) -> Any:
    """Fill a dataclass with the settings that it has fields for."""
    settings = with_new_names(settings)  # The JSON files keep the names that they were measured under.
    return kind(**{field.name: settings[field.name] for field in fields(kind) if field.name in settings})


def pack_scales(model: torch.nn.Module) -> None:
    """Round every scale in place, as a checkpoint does; 8-bit scales hand their signs to the latents."""
    for layer in littlebit_layers(model).values():
        for path in layer.factors():
            for tensor, packed in zip(path, unpack_factors(pack_factors(path, layer.scale_bits)), strict=True):
                tensor.data = packed


def read(arguments: argparse.Namespace) -> Data:
    """Read the texts that the command line names, as tokens."""
    tokenizer = load_tokenizer(TEACHER)
    texts = [training_tokens(tokenizer, path) for path in arguments.texts]
    return Data(
        tokenizer, [texts[0][:-HELD_OUT], *texts[1:]], texts[0][-HELD_OUT:], text_tokens(tokenizer, arguments.test)
    )


if __name__ == "__main__":
    main()
