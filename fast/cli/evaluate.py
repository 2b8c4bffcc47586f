"""Measure a model's quality: the `eval` command."""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .arguments import Command, add_compute, count, model_help, number
from .models import load_any

if TYPE_CHECKING:
    import torch

    from ..evaluation.tasks import TaskScores
    from ..evaluation.zero_shot import BlimpResult


def add_arguments(sub: argparse.ArgumentParser) -> None:
    """Add the arguments of `littlebit eval`."""
    sub.add_argument("model", help=f"a packed checkpoint, or a dense model: {model_help()}")
    sub.add_argument(
        "--text",
        type=Path,
        help="UTF-8 text to measure perplexity on (default: an included one, unless tasks are given)",
    )
    sub.add_argument(
        "--window",
        type=number(int, low=2),
        help="tokens in a window, whose first token is not scored (default: 2048, or the model's context if shorter)",
    )
    sub.add_argument("--max-windows", type=count, help="score at most this many windows (default: the whole text)")
    sub.add_argument(
        "--kl",
        metavar="ORIGINAL",
        help="measure KL(ORIGINAL || model) on the text too; ORIGINAL is the model that this one was made from",
    )
    sub.add_argument("--blimp", type=Path, metavar="ZIP", help="measure accuracy on the pairs of a BLiMP archive")
    sub.add_argument("--blimp-items", type=count, help="score this many pairs of each BLiMP paradigm (default: all)")
    sub.add_argument(
        "--tasks",
        type=Path,
        metavar="FOLDER",
        help="measure accuracy on WinoGrande, HellaSwag, OpenBookQA, BoolQ, PIQA and ARC (folder or zip of .jsonl)",
    )
    sub.add_argument("--tasks-items", type=count, help="score this many items of each task (default: all)")
    sub.add_argument("--lm-eval", metavar="TASK[,TASK]", help="run these tasks of the lm-evaluation-harness")
    sub.add_argument(
        "--lm-eval-include", type=Path, metavar="DIR", help="folder with YAML files that define more tasks"
    )
    add_compute(sub)


def run(arguments: argparse.Namespace) -> None:
    """Measure perplexity on a text, accuracy on BLiMP or scores on lm-evaluation-harness tasks."""
    from ..checkpoints.dense import load_tokenizer
    from ..checkpoints.texts import text_tokens
    from ..evaluation.perplexity import SAMPLE_TEXT
    from ..evaluation.tasks import score_tasks
    from ..evaluation.zero_shot import blimp, harness, lm_eval

    tokenizer = load_tokenizer(arguments.model)
    asked = arguments.blimp or arguments.tasks or arguments.lm_eval
    text = arguments.text or (None if asked and not arguments.kl else SAMPLE_TEXT)
    tokens = text and text_tokens(tokenizer, text)
    if arguments.kl and text and tokens is not None:
        check_same_tokens(arguments.kl, text, tokens)
    if arguments.lm_eval:
        lm_eval()  # raises here, before any work, if the package is missing
    model = load_any(arguments.model, arguments.device)
    results: dict[str, Any] = {}
    reports = []
    if arguments.blimp:
        pairs = blimp(model, tokenizer, arguments.blimp, arguments.blimp_items)
        results["blimp"] = pairs._asdict()
        reports.append(blimp_table(pairs))
    if arguments.tasks:
        scores = score_tasks(model, tokenizer, arguments.tasks, arguments.tasks_items)
        results["tasks"] = scores._asdict() | {"tasks": {name: each._asdict() for name, each in scores.tasks.items()}}
        reports.append(tasks_table(scores))
    if text and tokens is not None:
        found, report = measure_text(model, text.name, tokens, arguments)
        results |= found | {"text": str(text)}
        reports.append(report)
    if arguments.lm_eval:
        tasks = harness(model, tokenizer, arguments.lm_eval.split(","), arguments.lm_eval_include)
        results["lm_eval"] = tasks.results
        reports.append(tasks.table)
    print(json.dumps(results) if arguments.json else "\n".join(reports))


def check_same_tokens(original: str, text: Path, tokens: "torch.Tensor") -> None:
    """Raise ValueError unless the original's tokenizer gives the same tokens of the text."""
    import torch

    from ..checkpoints.dense import load_tokenizer
    from ..checkpoints.texts import text_tokens

    if not torch.equal(text_tokens(load_tokenizer(original), text), tokens):
        raise ValueError(
            f"--kl must name a model with the same tokenizer, but {original} reads {text.name} as other tokens: name "
            "the model that this one was made from"
        )


def measure_text(
    model: "torch.nn.Module", name: str, tokens: "torch.Tensor", arguments: argparse.Namespace
) -> tuple[dict[str, Any], str]:
    """Measure perplexity and, with --kl, divergence on a text's tokens; return the results and a report."""
    from ..evaluation.perplexity import divergence, perplexity

    given = tokens, arguments.window, arguments.max_windows
    if arguments.kl:
        found = divergence(model, load_any(arguments.kl, arguments.device), *given)
        beside = f", original {found.original_perplexity:.4g}"
        last = f"\nKL(original || model) {found.kl:.4g} nats a token, same first choice {found.same_top:.1%}"
    else:
        found, beside, last = perplexity(model, *given), "", ""
    return found._asdict(), (
        f"perplexity {found.perplexity:.4g}{beside} on {name} "
        f"({found.windows} windows of {found.window} tokens, {found.scored} tokens scored){last}"
    )


def blimp_table(result: "BlimpResult") -> str:
    """Lay out the accuracy of each BLiMP paradigm, and their mean, as text."""
    lines = [f"{name:<54}{accuracy:>8.3f}" for name, accuracy in result.paradigms.items()]
    mean = f"BLiMP accuracy {result.accuracy:.4f} (mean of {len(lines)} paradigms, {result.pairs} pairs)"
    return "\n".join([*lines, mean])


def tasks_table(scores: "TaskScores") -> str:
    """Lay out the accuracy on each task with its standard error, and the means, as text."""

    def cell(value: float | None, error: float | None) -> str:
        text = "" if value is None else f"{value:.4f}" if error is None else f"{value:.4f} ± {error:.4f}"
        return f"{text:>18}"

    lines = [f"{'task':<16}{'items':>8}{'chance':>9}{'acc':>18}{'acc_norm':>18}"]
    for name, each in scores.tasks.items():
        cells = cell(each.acc, each.acc_stderr) + cell(each.acc_norm, each.acc_norm_stderr)
        lines.append(f"{name:<16}{each.items:>8}{each.chance:>9.4f}{cells}".rstrip())
    means = f"{scores.mean_acc:.4f}{'':>9}{scores.mean_acc_norm:>9.4f}"
    return "\n".join([*lines, f"{f'mean of {len(scores.tasks)}':<24}{scores.mean_chance:>9.4f}{means:>27}"])


COMMANDS = {
    "eval": Command(
        run,
        add_arguments,
        "Measure a model's perplexity on a text, or its zero-shot accuracy on tasks.",
        (
            "eval out --text some.txt",
            "eval smollm2-0.55bit --json",
            "eval smollm2-0.55bit --kl smollm2 --max-windows 4",
            "eval out --blimp blimp.zip --blimp-items 20",
            "eval out --tasks zero-shot.zip --tasks-items 100",
        ),
    )
}
