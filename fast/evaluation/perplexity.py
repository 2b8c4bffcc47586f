"""Measure the perplexity of a language model on a text."""

import math
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from .._checks import check_number, flat_tokens, window_for
from .._progress import tqdm
from ..models.calibrate import windows

WINDOW = 2048  # default tokens in a window
SAMPLE_TEXT = Path(__file__).parents[1] / "data" / "roosevelt_1901.txt"  # for evaluation only
TRAINING_TEXT = SAMPLE_TEXT.with_name("lincoln_1862.txt")  # for calibration and small training runs
LOGIT_ROWS = 256  # positions whose logits are converted to float32 at once


class Perplexity(NamedTuple):
    """Hold a perplexity and what it was measured on.

    Attributes
    ----------
    perplexity : float
        exp(mean negative log-likelihood of the scored tokens).
    windows : int
        Number of windows.
    window : int
        Tokens in a window.
    scored : int
        Number of scored tokens, window - 1 in each window.
    """

    perplexity: float
    windows: int
    window: int
    scored: int


def perplexity(
    model: nn.Module, tokens: Tensor, window: int | None = None, max_windows: int | None = None, progress: bool = True
) -> Perplexity:
    """Measure the perplexity of a model on a text's tokens.

    perplexity = exp(-mean of log p(token_t | token_1 ... token_{t-1}))

    The tokens are cut into consecutive windows that do not overlap. An incomplete last window is dropped, unless it is
    the only one. Each window starts without context, so its first token is not scored. The mean is over all scored
    tokens.

    Parameters
    ----------
    model : transformers causal language model
    tokens : (n,) or (1, n) integer tensor, at least two
    window : int, optional
        Tokens in a window; by default 2048, or all positions of a model that has fewer.
    max_windows : int, optional
        Number of windows to evaluate at most.
    progress : bool
        Whether to show a progress bar.

    Raises
    ------
    ValueError
        If there are fewer than two tokens, they have another shape, a token has no row in the embedding, a window has
        fewer than two tokens or more than the model has positions, or `max_windows` is not positive.
    """
    tokens, window = flat_tokens(tokens, model, least=2), window_for(model, window, WINDOW)
    if max_windows is not None:
        check_number("max_windows", max_windows, low=1, whole=True)
    parts = windows(tokens, window)[:max_windows]
    device = next(model.parameters()).device
    total = 0.0
    with torch.inference_mode():
        for part in tqdm(parts, desc="perplexity", unit="window", disable=not progress):
            total += token_losses(model, part[None].to(device)).sum().item()
    length = min(window, len(tokens))
    scored = len(parts) * (length - 1)
    return Perplexity(math.exp(min(total / scored, 700.0)), len(parts), length, scored)


def token_losses(model: nn.Module, tokens: Tensor, last: int | None = None) -> Tensor:
    """Compute the negative log-likelihoods of the `last` tokens, by default all but the first, (batch, last) float64.

    Each token's is computed in float32, for LOGIT_ROWS rows of logits at once.
    """
    last = last or tokens.shape[1] - 1
    logits = last_logits(model, tokens[:, :-1], last).flatten(0, 1)  # (batch last, vocabulary)
    losses = [
        functional.cross_entropy(rows.float(), targets, reduction="none")
        for rows, targets in zip(logits.split(LOGIT_ROWS), tokens[:, -last:].flatten().split(LOGIT_ROWS), strict=True)
    ]
    return torch.cat(losses).double().view(len(tokens), -1)


def last_logits(model: nn.Module, tokens: Tensor, last: int) -> Tensor:
    """Compute the logits, (batch, last, vocabulary), at the `last` positions of (batch, length) tokens."""
    kept = {} if last == tokens.shape[1] else {"logits_to_keep": last}
    return model(tokens, use_cache=False, **kept).logits[:, -last:]  # without PEFT's prompt
