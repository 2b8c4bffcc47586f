"""Compute log-probabilities of many sequences: batches of equal length, without padding."""

import itertools
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .._checks import check_number, check_prompts, embedding_rows, positions_of
from .._progress import tqdm
from .perplexity import token_losses

BATCH_TOKENS = 2048  # tokens to read at once on a CPU
GPU_BATCH_TOKENS = 1 << 15  # A GPU needs many tokens at once to be busy.
LOGITS = 1 << 30  # logits to hold at once; they take most of the memory

Tokens = tuple[int, ...]


class ScoredTokens(NamedTuple):
    """Hold a sequence and how many of its last tokens are scored; the others are context.

    Attributes
    ----------
    tokens : tuple of int
        At least one more than `scored`.
    scored : int
    """

    tokens: Tokens
    scored: int


def log_probabilities(
    model: nn.Module,
    sequences: Iterable[ScoredTokens],
    batch: int | None = None,
    progress: bool = True,
    title: str = "sequences",
) -> dict[ScoredTokens, float]:
    """Compute the total log-probability of each sequence's scored tokens, given all tokens before.

    Equal sequences are scored once, so they tie exactly. The order of the sequences does not change the result.

    Parameters
    ----------
    model : transformers causal language model
    sequences : iterable of ScoredTokens
    batch : int, optional
        Tokens to read at once; by default 2,048 on a CPU and 32,768 on a GPU. Fewer are read if their logits are more
        than LOGITS numbers. Logits are computed from the first scored position of a batch on.
    progress : bool
        Whether to show a progress bar.
    title : str
        What stands before the progress bar.

    Raises
    ------
    ValueError
        If `batch` is not positive, a sequence has more tokens than the model has positions, or a token has no row in
        the embedding.
    """
    if batch is not None:
        check_number("batch", batch, low=1, whole=True)
    unique = sorted(set(sequences), key=lambda each: (len(each.tokens), each.scored, each.tokens))
    rows = embedding_rows(model)
    check_prompts([each.tokens for each in unique], 0, rows, positions_of(model))  # The last token is not read.
    device = next(model.parameters()).device
    batch = batch or (BATCH_TOKENS if device.type == "cpu" else GPU_BATCH_TOKENS)
    sums: list[Tensor] = []
    with torch.inference_mode():
        parts = list(equal_lengths(unique, batch, LOGITS // (rows or 1)))
        for part in tqdm(parts, desc=title, unit="batch", disable=not progress):
            scored = torch.tensor([each.scored for each in part], device=device)
            most = part[-1].scored
            losses = token_losses(model, torch.tensor([each.tokens for each in part], device=device), most)
            counted = torch.arange(most, 0, -1, device=device) <= scored[:, None]
            sums.append(torch.where(counted, losses, 0).sum(1))
    return dict(zip(unique, torch.cat(sums).neg().tolist(), strict=True)) if unique else {}


def equal_lengths(sequences: list[ScoredTokens], batch: int, positions: int) -> Iterator[list[ScoredTokens]]:
    """Divide sorted sequences into batches of one length, with at most `batch` tokens and `positions` logit rows."""
    for length, group in itertools.groupby(sequences, key=lambda each: len(each.tokens)):
        left = list(group)
        while left:
            most = left[min(len(left), max(1, batch // length)) - 1].scored  # They are sorted: the last scores most.
            count = max(1, min(batch // length, positions // most))
            yield left[:count]
            left = left[count:]
