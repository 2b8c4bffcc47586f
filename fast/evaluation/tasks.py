"""Evaluate a language model on seven multiple-choice tasks, by the prompts and scores of the lm-evaluation-harness."""

import json
import math
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from torch import nn

from .._checks import positions_of
from .archives import read_files
from .scoring import ScoredTokens, log_probabilities

TEXT_BYTES = 1 << 16  # longest text of an item; BoolQ's longest passage has 5 kB
MOST_CHOICES = 64

#: What the harness capitalizes in HellaSwag: the first letter of a last sentence that has no end yet.
UNFINISHED = re.compile(r"(?<=[.!?] )[a-z](?=[^.!?]*$)")


class TaskScore(NamedTuple):
    """Hold the accuracy on a task.

    Attributes
    ----------
    acc : float
        Share of items whose right choice has the highest log-probability.
    acc_stderr : float or None
        Standard error of `acc`; None for one item.
    acc_norm, acc_norm_stderr : float or None
        The same for log-probabilities divided by the number of characters of the choice; None for tasks without it.
    chance : float
        Expected accuracy of random choices.
    items : int
        Number of scored items.
    """

    acc: float
    acc_stderr: float | None
    acc_norm: float | None
    acc_norm_stderr: float | None
    chance: float
    items: int


class TaskScores(NamedTuple):
    """Hold the accuracy on each task, and the means over the tasks.

    Attributes
    ----------
    tasks : dict of str to TaskScore
    mean_acc : float
    mean_acc_norm : float
        Mean of `acc_norm`, or of `acc` for tasks without it.
    mean_chance : float
    """

    tasks: dict[str, TaskScore]
    mean_acc: float
    mean_acc_norm: float
    mean_chance: float


class Item(NamedTuple):
    """Hold an item: a pair (context, ending) for each choice, the choices' lengths in characters, the right choice."""

    pairs: tuple[tuple[str, str], ...]
    lengths: tuple[int, ...]
    gold: int


class Task(NamedTuple):
    """Define a task: how a context is made of a `query`, and whether the harness reports acc_norm for it."""

    context: Callable[[str], str]
    normalized: bool


def plain(query: str) -> str:
    """Return a query as it is."""
    return query


def answered(query: str) -> str:
    """Add a line "Answer:" to a question."""
    return query.removesuffix("\n") + "\nAnswer:"


def passage(query: str) -> str:
    """Remove the word "Passage: ", and add a line "Answer:" to the question that follows the passage."""
    return answered(query.removeprefix("Passage: "))


def capitalized(query: str) -> str:
    """Capitalize the sentence that the choices complete."""
    return UNFINISHED.sub(lambda letter: letter[0].upper(), query, count=1)


#: File name -> task. WinoGrande's lines hold the contexts themselves.
TASKS = {
    "winogrande": Task(plain, False),
    "hellaswag": Task(capitalized, True),
    "openbook_qa": Task(plain, True),
    "boolq": Task(passage, False),
    "piqa": Task(answered, True),
    "arc_easy": Task(answered, True),
    "arc_challenge": Task(answered, True),
}


def score_tasks(
    model: nn.Module,
    tokenizer: Any,
    path: str | Path,
    items: int | None = None,
    batch: int | None = None,
    progress: bool = True,
) -> TaskScores:
    """Measure a model's accuracy on WinoGrande, HellaSwag, OpenBookQA, BoolQ, PIQA, ARC-easy and ARC-challenge.

    score of a choice = sum of log p(token | context and the choice's tokens before)

    Contexts, choices and scores are the same as in the tasks of the lm-evaluation-harness 0.4.13, without examples in
    the context. In WinoGrande, the choices are contexts, and the score is for the rest of the sentence.

    Parameters
    ----------
    model : transformers causal language model, dense or packed
    tokenizer : transformers tokenizer
    path : str or Path
        Folder or zip archive with a file NAME.jsonl for each task, NAME in `TASKS`; others are ignored. Each line holds
        `query`, `choices` and `gold`, the index of the right choice; for WinoGrande `context_options`, `continuation`
        and `gold`. See `TASKS` for what is added to a query.
    items : int, optional
        Number of items to score of each task, from the first.
    batch : int, optional
        Tokens to read at once; see `scoring.log_probabilities`.
    progress : bool
        Whether to show a progress bar.

    Raises
    ------
    ValueError
        If the archive is corrupt or holds no task, a line is not an item, or `items` or `batch` is not positive.
    """
    scores = {
        name: score_task(model, tokenizer, name, read, batch, progress)
        for name, read in read_tasks(path, items).items()
    }
    return TaskScores(
        scores,
        fmean(score.acc for score in scores.values()),
        fmean(score.acc if score.acc_norm is None else score.acc_norm for score in scores.values()),
        fmean(score.chance for score in scores.values()),
    )


def score_task(
    model: nn.Module, tokenizer: Any, name: str, items: list[Item], batch: int | None = None, progress: bool = True
) -> TaskScore:
    """Measure a model's accuracy on the items of the task `name`; of choices with equal scores the first counts."""
    rows = encode(tokenizer, {pair for item in items for pair in item.pairs}, positions_of(model))
    found = log_probabilities(model, rows.values(), batch, progress, name)
    right, right_norm = [], []
    for item in items:
        scores = [found[rows[pair]] for pair in item.pairs]
        by_length = [score / length for score, length in zip(scores, item.lengths, strict=True)]
        right.append(scores.index(max(scores)) == item.gold)
        right_norm.append(by_length.index(max(by_length)) == item.gold)
    norm = mean_and_error(right_norm) if TASKS[name].normalized else (None, None)
    chance = fmean(1 / len(item.pairs) for item in items)
    return TaskScore(*mean_and_error(right), *norm, chance, len(items))


def mean_and_error(right: list[bool]) -> tuple[float, float | None]:
    """Compute the mean of right answers, and its standard error, sqrt(p (1 - p) / (n - 1)); None for one answer."""
    p, n = fmean(right), len(right)
    return p, math.sqrt(p * (1 - p) / (n - 1)) if n > 1 else None


def encode(
    tokenizer: Any, pairs: Iterable[tuple[str, str]], positions: int | None
) -> dict[tuple[str, str], ScoredTokens]:
    """Tokenize pairs (context, ending), with the special tokens that the tokenizer adds; the ending is scored.

    Context and ending are tokenized as one text. As many tokens are scored as it has more than the context alone.
    Spaces at the end of the context count to the ending. Where the model has fewer positions, the first tokens are cut.
    """
    ordered = sorted(pairs)
    contexts = sorted({context.rstrip() for context, _ in ordered})
    known = dict(zip(contexts, map(len, tokenizer(contexts)["input_ids"]), strict=True))
    rows = {}
    for pair, tokens in zip(ordered, tokenizer(["".join(pair) for pair in ordered])["input_ids"], strict=True):
        scored = len(tokens) - known[pair[0].rstrip()]
        if scored < 1:
            raise ValueError(f"the choice {pair[1]!r} has no token to score after {pair[0][-40:]!r}; remove its item")
        if positions is not None and scored > positions:
            raise ValueError(f"the choice {pair[1][:40]!r} needs {scored} positions, but the model has {positions}")
        rows[pair] = ScoredTokens(tuple(tokens if positions is None else tokens[-positions - 1 :]), scored)
    return rows


def read_tasks(path: str | Path, items: int | None = None) -> dict[str, list[Item]]:
    """Read the first `items` items of each task of a folder or archive, in the order of TASKS; see `score_tasks`."""
    found = read_files(path, items, read_item, "items", TASKS)
    if not found:
        raise ValueError(f"{path} holds no task: there must be a file {'.jsonl, '.join(TASKS)}.jsonl, or several")
    return {name: found[name] for name in TASKS if name in found}


def read_item(line: bytes, name: str, place: str) -> Item:
    """Read a line of a task; `place` names the line in errors."""
    partial = name == "winogrande"
    try:
        row = json.loads(line)
        gold, choices = row["gold"], row["context_options" if partial else "choices"]
        shared = row["continuation" if partial else "query"]
        for text in (shared, *choices):
            if not isinstance(text, str) or not text.strip() or len(text.encode()) > TEXT_BYTES:
                raise ValueError(f"a text is empty or longer than {TEXT_BYTES} bytes, or not a text")
        if not isinstance(choices, list) or not 2 <= len(choices) <= MOST_CHOICES:
            raise ValueError(f"the number of choices is not from 2 to {MOST_CHOICES}")
        if type(gold) is not int or not 0 <= gold < len(choices):
            raise ValueError(f"gold is not the index of a choice: {gold!r}")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        keys = "context_options, continuation" if partial else "query, choices"
        raise ValueError(
            f"{place} is not an item of {name} ({error!r}); it must be a JSON object with {keys} and gold"
        ) from error
    if partial:
        pairs = tuple((context, f" {shared}") for context in choices)
    else:
        context = TASKS[name].context(shared)
        pairs = tuple((context, f" {choice}") for choice in choices)
    return Item(pairs, tuple(map(len, choices)), gold)
