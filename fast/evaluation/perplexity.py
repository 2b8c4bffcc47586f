"""Measure the perplexity of a language model on a text, and its divergence from another model."""

import math
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from .._checks import check_number, flat_tokens, window_for
from .._progress import tqdm
from ..distill import kl_loss
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
    parts = scored_windows(model, tokens, window, max_windows)
    device, total = device_of(model), 0.0
    with torch.inference_mode():
        for part in tqdm(parts, desc="perplexity", unit="window", disable=not progress):
            total += token_losses(model, part[None].to(device)).sum().item()
    length = len(parts[0])
    scored = len(parts) * (length - 1)
    return Perplexity(exp_mean(total, scored), len(parts), length, scored)


def scored_windows(model: nn.Module, tokens: Tensor, window: int | None, max_windows: int | None) -> list[Tensor]:
    """Check a text's tokens, and cut them into windows; see `perplexity`."""
    tokens, window = flat_tokens(tokens, model, least=2), window_for(model, window, WINDOW)
    if max_windows is not None:
        check_number("max_windows", max_windows, low=1, whole=True)
    return windows(tokens, window)[:max_windows]


def exp_mean(total: float, count: int) -> float:
    """Compute exp(total / count), at most exp(700)."""
    return math.exp(min(total / count, 700.0))


class Divergence(NamedTuple):
    """Hold how much a model's predictions differ from the original's on a text.

    Attributes
    ----------
    kl : float
        Mean over the scored tokens of KL(original || model), in nats.
    same_top : float
        Share of scored tokens for which both models find the same token most likely.
    perplexity, original_perplexity : float
        See `Perplexity`.
    windows, window, scored : int
        See `Perplexity`.
    """

    kl: float
    same_top: float
    perplexity: float
    original_perplexity: float
    windows: int
    window: int
    scored: int


def divergence(
    model: nn.Module,
    original: nn.Module,
    tokens: Tensor,
    window: int | None = None,
    max_windows: int | None = None,
    progress: bool = True,
) -> Divergence:
    """Measure how much a model's next-token distributions diverge from another model's on a text.

    KL(p || q) = sum over the vocabulary of p (log p - log q),  p = softmax(original's logits),  q = softmax(model's)

    Windows and scored tokens are the same as in `perplexity`, which is measured for both models too.

    Parameters
    ----------
    model, original : transformers causal language models with one vocabulary
    tokens, window, max_windows, progress
        See `perplexity`.

    Raises
    ------
    ValueError
        If the vocabularies have different sizes; see also `perplexity`.
    """
    parts = scored_windows(model, tokens, window, max_windows)
    kl, same, losses = 0.0, 0, [0.0, 0.0]
    with torch.inference_mode():
        for part in tqdm(parts, desc="divergence", unit="window", disable=not progress):
            q, p = (
                last_logits(each, part[None, :-1].to(device_of(each)), len(part) - 1)[0] for each in (model, original)
            )
            if p.shape != q.shape:
                raise ValueError(
                    f"the model and the original must have one vocabulary, but theirs have {q.shape[1]} and "
                    f"{p.shape[1]} tokens: give the model that this one was made from"
                )
            p, targets = p.to(q.device), part[1:].to(q.device)
            kl += kl_loss(q, p).item() * len(targets)
            same += int((p.argmax(-1) == q.argmax(-1)).sum())
            losses = [
                total + target_losses(each, targets).sum().item() for total, each in zip(losses, (q, p), strict=True)
            ]
    length = len(parts[0])
    scored = len(parts) * (length - 1)
    found, wanted = (exp_mean(total, scored) for total in losses)
    return Divergence(kl / scored, same / scored, found, wanted, len(parts), length, scored)


def device_of(model: nn.Module) -> torch.device:
    """Return the device of a model's first parameter."""
    return next(model.parameters()).device


def token_losses(model: nn.Module, tokens: Tensor, last: int | None = None) -> Tensor:
    """Compute the negative log-likelihoods of the `last` tokens, by default all but the first, (batch, last) float64.

    Each token's is computed in float32, for LOGIT_ROWS rows of logits at once.
    """
    last = last or tokens.shape[1] - 1
    logits = last_logits(model, tokens[:, :-1], last).flatten(0, 1)  # (batch last, vocabulary)
    return target_losses(logits, tokens[:, -last:].flatten()).view(len(tokens), -1)


def target_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Compute the negative log-likelihoods, (rows,) float64, of (rows,) targets from (rows, vocabulary) logits."""
    losses = [
        functional.cross_entropy(rows.float(), some, reduction="none")
        for rows, some in zip(logits.split(LOGIT_ROWS), targets.split(LOGIT_ROWS), strict=True)
    ]
    return torch.cat(losses).double()


def last_logits(model: nn.Module, tokens: Tensor, last: int) -> Tensor:
    """Compute the logits, (batch, last, vocabulary), at the `last` positions of (batch, length) tokens."""
    kept = {} if last == tokens.shape[1] else {"logits_to_keep": last}
    return model(tokens, use_cache=False, **kept).logits[:, -last:]  # without PEFT's prompt
