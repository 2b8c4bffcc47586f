"""Perplexity, stated exactly."""

import math
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from .._checks import check_number, flat_tokens, window_for
from .._progress import tqdm
from ..models.calibrate import windows

WINDOW = 2048


SAMPLE_TEXT = Path(__file__).parents[1] / "data" / "roosevelt_1901.txt"  # for evaluation only


TRAINING_TEXT = SAMPLE_TEXT.with_name("lincoln_1862.txt")  # for calibration and small training runs


LOGIT_ROWS = 256  # positions whose logits are turned into float32 at once


class Perplexity(NamedTuple):
    """A perplexity and what it was measured on.

    Attributes
    ----------
    perplexity : float
        exp(mean negative log-likelihood), natural logarithm.
    windows : int
        Windows evaluated.
    window : int
        Tokens in a window.
    scored : int
        Tokens scored, window - 1 in each window.
    """

    perplexity: float
    windows: int
    window: int
    scored: int


def perplexity(
    model: nn.Module, tokens: Tensor, window: int | None = None, max_windows: int | None = None, progress: bool = True
) -> Perplexity:
    """Perplexity of a model on a text's tokens.

    The tokens are cut into consecutive windows that do not overlap; an incomplete last window is dropped, unless it
    is the only one. Each window is read on its own, without tokens before it; its first token is not scored. The
    result is the exponential of the mean over all scored tokens.

    Parameters
    ----------
    model : transformers causal language model
    tokens : (n,) or (1, n) integer tensor, at least two
    window : int, optional
        Tokens in a window; by default 2048, or all positions of a model that has fewer.
    max_windows : int, optional
        Stop after so many windows.
    progress : bool
        Whether to show a progress bar.

    Raises
    ------
    ValueError
        If there are fewer than two tokens, they have another shape or no row in the model's embedding, a window is
        shorter than two or longer than the model has positions, or `max_windows` is not positive.
    """
    tokens, window = flat_tokens(tokens, model, least=2), window_for(model, window, WINDOW)
    if max_windows is not None:
        check_number("max_windows", max_windows, low=1, whole=True)
    parts = windows(tokens, window)[:max_windows]
    device = next(model.parameters()).device
    total = 0.0
    with torch.inference_mode():
        for part in tqdm(parts, desc="perplexity", unit="window", disable=not progress):
            total += sequence_losses(model, part[None].to(device)).item()
    length = min(window, len(tokens))
    scored = len(parts) * (length - 1)
    return Perplexity(math.exp(min(total / scored, 700.0)), len(parts), length, scored)


def sequence_losses(model: nn.Module, tokens: Tensor) -> Tensor:
    """Summed negative log-likelihood of all tokens but the first, (batch,) float64, of sequences (batch, length).

    Each token's is computed in float32, for a few rows of logits at once.
    """
    logits = model(tokens[:, :-1], use_cache=False).logits
    logits = logits[:, 1 - tokens.shape[1] :].flatten(0, 1)  # (batch (length - 1), vocabulary), without PEFT's prompts
    losses = [
        functional.cross_entropy(rows.float(), targets, reduction="none")
        for rows, targets in zip(logits.split(LOGIT_ROWS), tokens[:, 1:].flatten().split(LOGIT_ROWS), strict=True)
    ]
    return torch.cat(losses).double().view(len(tokens), -1).sum(1)
