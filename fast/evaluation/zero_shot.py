"""Evaluate a language model on zero-shot tasks: BLiMP here, all others by the lm-evaluation-harness."""

import importlib
import json
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from torch import nn

from ..models.wrappers import unwrapped
from .archives import read_files
from .scoring import ScoredTokens, Tokens, log_probabilities

SENTENCE_BYTES = 1000  # longest sentence; BLiMP's has 147 bytes
BEFORE_SENTENCE = " "  # The harness puts this between a task's context, which is empty here, and an answer.
HARNESS_BATCH = 8  # requests that the harness reads at once


class BlimpResult(NamedTuple):
    """Hold the accuracy on minimal pairs.

    Attributes
    ----------
    accuracy : float
        Mean over the paradigms, between 0 and 1; chance is 0.5.
    paradigms : dict of str to float
        Accuracy by paradigm.
    pairs : int
        Number of scored pairs.
    """

    accuracy: float
    paradigms: dict[str, float]
    pairs: int


def blimp(
    model: nn.Module,
    tokenizer: Any,
    path: str | Path,
    items: int | None = None,
    batch: int | None = None,
    progress: bool = True,
) -> BlimpResult:
    """Measure how often a model prefers the grammatical sentence of a minimal pair (BLiMP, arXiv 1912.00582).

    score of a sentence = sum_t log p(token_t | BOS, token_1 ... token_{t-1}), not divided by its length

    A pair is correct if the grammatical sentence scores strictly higher. The scored text is the same as in the task
    `blimp` of the lm-evaluation-harness 0.4.13: a space and the sentence, tokenized without special tokens, after the
    BOS token, or after EOS if the tokenizer has no BOS. But the harness counts ties as correct. Seven of BLiMP's 67,000
    pairs hold two equal sentences.

    Parameters
    ----------
    model : transformers causal language model, dense or packed
    tokenizer : transformers tokenizer
    path : str or Path
        Zip archive or folder with a file NAME.jsonl for each paradigm, whose lines hold `sentence_good` and
        `sentence_bad`. It may hold up to 64 MiB of text. Other files in it are ignored.
    items : int, optional
        Number of pairs to score of each paradigm, from the first.
    batch : int, optional
        Tokens to read at once; see `scoring.log_probabilities`.
    progress : bool
        Whether to show a progress bar.

    Raises
    ------
    ValueError
        If the archive is corrupt or holds no paradigm, a line is not a minimal pair, `items` or `batch` is not
        positive, or the tokenizer has neither BOS nor EOS.
    """
    paradigms = read_paradigms(path, items)
    sentences = sorted({text for pairs in paradigms.values() for pair in pairs for text in pair})
    rows = {
        text: ScoredTokens(tokens, len(tokens) - 1)
        for text, tokens in zip(sentences, sentence_tokens(tokenizer, sentences), strict=True)
    }
    scores = log_probabilities(model, rows.values(), batch, progress, "BLiMP")
    accuracies = {
        name: fmean(scores[rows[good]] > scores[rows[bad]] for good, bad in pairs) for name, pairs in paradigms.items()
    }
    return BlimpResult(fmean(accuracies.values()), accuracies, sum(map(len, paradigms.values())))


def sentence_tokens(tokenizer: Any, sentences: list[str]) -> list[Tokens]:
    """Tokenize sentences, each after BOS (EOS if there is no BOS) unless the tokenizer adds it itself."""
    prefix = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    if prefix is None:
        raise ValueError(
            "the tokenizer must have a BOS or an EOS token to precede a sentence, but has neither: set one"
        )
    rows = tokenizer([BEFORE_SENTENCE + text for text in sentences], add_special_tokens=False)["input_ids"]
    tokens = [tuple(row) if row[:1] == [prefix] else (prefix, *row) for row in rows]
    if empty := [text for text, row in zip(sentences, tokens, strict=True) if len(row) < 2]:
        raise ValueError(f"the sentence {empty[0]!r} has no token to score; remove its pair")
    return tokens


def read_paradigms(path: str | Path, items: int | None = None) -> dict[str, list[tuple[str, str]]]:
    """Read the first `items` pairs (good, bad) of each paradigm of an archive, by name; see `blimp`."""
    paradigms = read_files(path, items, read_pair, "pairs")
    if not paradigms:
        raise ValueError(f"{path} holds no paradigm: there must be a file NAME.jsonl for each")
    return paradigms


def read_pair(line: bytes, name: str, place: str) -> tuple[str, str]:
    """Read the good and the bad sentence of a line; `place` names the line in errors."""
    try:
        row = json.loads(line)
        good, bad = row["sentence_good"], row["sentence_bad"]
        for text in (good, bad):
            if not isinstance(text, str) or not text.strip() or len(text.encode()) > SENTENCE_BYTES:
                raise ValueError(f"a sentence is not a text of 1 to {SENTENCE_BYTES} bytes")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(
            f"{place} is not a minimal pair ({error!r}); it must be a JSON object with the texts sentence_good and "
            "sentence_bad"
        ) from error
    return good, bad


class HarnessResult(NamedTuple):
    """Hold the results of the lm-evaluation-harness.

    Attributes
    ----------
    results : dict
        The harness's record without settings and samples: metrics, versions, shots and sample counts by task and group.
    table : str
        The table that the harness prints.
    """

    results: dict[str, Any]
    table: str


def harness(
    model: nn.Module,
    tokenizer: Any,
    tasks: Sequence[str],
    include: str | Path | None = None,
    batch: int = HARNESS_BATCH,
) -> HarnessResult:
    """Run tasks of the lm-evaluation-harness on a model (`lm_eval.simple_evaluate`, with its own settings).

    The harness seeds the global random generators, and adds a padding token to a tokenizer that has none.

    Parameters
    ----------
    model : transformers causal language model, dense or packed
    tokenizer : transformers tokenizer
    tasks : sequence of str
        Names of tasks or groups, or patterns such as "blimp_*".
    include : str or Path, optional
        Folder with more tasks, as YAML files. They may name Python code, which runs: use only folders that you trust.
    batch : int
        Requests to read at once.

    Raises
    ------
    ImportError
        If the harness is not installed.
    ValueError
        If the harness has no such task, or `include` is not a folder.
    """
    package = lm_eval()
    if include is not None and not Path(include).is_dir():
        raise ValueError(f"include must be a folder of YAML task files, got {include}: it is not a folder")
    manager = package.tasks.TaskManager(include_path=None if include is None else str(include))
    if unknown := [name for name in tasks if not manager.match_tasks([name])]:
        raise ValueError(
            f"the lm-evaluation-harness has no task {unknown[0]!r}; `lm-eval ls tasks` lists them; or include a folder"
        )
    results = package.simple_evaluate(
        package.models.huggingface.HFLM(pretrained=unwrapped(model), tokenizer=tokenizer, batch_size=batch),
        tasks=manager.match_tasks(list(tasks)),
        task_manager=manager,
        log_samples=False,
    )
    columns = [column for column in ("results", "groups") if results.get(column)]
    kept = (*columns, "versions", "n-shot", "n-samples", "lm_eval_version")
    return HarnessResult(
        {key: results[key] for key in kept if key in results},
        "\n".join(package.utils.make_table(results, column) for column in columns),
    )


def lm_eval() -> Any:
    """Import the lm-evaluation-harness when it is first needed.

    Raises
    ------
    ImportError
        If it is not installed. The message says what to install.
    """
    try:
        for part in ("models.huggingface", "tasks", "utils"):
            importlib.import_module(f"lm_eval.{part}")
        return importlib.import_module("lm_eval")
    except ImportError as error:
        raise ImportError(f"this needs the lm-evaluation-harness: pip install 'littlebit[eval]' ({error})") from error
