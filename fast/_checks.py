"""Checks of numbers, token ids and positions against what a model allows; errors name the value and what to do.

No check imports torch unless it is given a model.
"""

import math
from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


class LittleBitWarning(UserWarning):
    """Warn of something in this package: the command shows such warnings, and hides the ones of libraries."""


def check_number(
    name: str,
    value: Any,
    low: float = -math.inf,
    high: float = math.inf,
    above: float = -math.inf,
    below: float = math.inf,
    whole: bool = False,
) -> None:
    """Raise ValueError unless a setting is a finite number within its limits.

    Parameters
    ----------
    name : str
        What the caller knows the setting by.
    value : object
    low, high : float
        Smallest and largest value that is allowed.
    above, below : float
        Largest and smallest value that is not allowed.
    whole : bool
        Whether it must be an integer.

    Examples
    --------
    >>> check_number("bits", float("nan"), above=0)
    Traceback (most recent call last):
    ...
    ValueError: bits must be a finite number > 0, got nan
    >>> check_number("window", 1, low=2, whole=True)
    Traceback (most recent call last):
    ...
    ValueError: window must be a whole number >= 2, got 1
    """
    number: Any = value if isinstance(value, Integral if whole else Real) and not isinstance(value, bool) else math.nan
    if not (math.isfinite(number) and low <= number <= high and above < number < below):
        limits = [(">=", low), (">", above), ("<=", high), ("<", below)]
        allowed = " and ".join(f"{sign} {limit:g}" for sign, limit in limits if math.isfinite(limit))
        kind = "whole" if whole else "finite"
        raise ValueError(f"{name} must be a {kind} number {allowed or 'of any size'}, got {value!r}")


def check_token_ids(tokens: Sequence[int], rows: int | None) -> None:
    """Raise ValueError unless there are tokens, and each is the number of one of the `rows` of an embedding."""
    if not len(tokens):
        raise ValueError("there are no tokens: give at least one")
    wrong = [token for token in (min(tokens), max(tokens)) if token < 0 or (rows is not None and token >= rows)]
    if wrong:
        raise ValueError(
            f"token {wrong[0]} is not one of 0 to {'...' if rows is None else rows - 1}, the rows of the model's "
            "embedding: use the tokenizer that belongs to the model, or resize the embedding before quantising"
        )


def check_positions(needed: int, limit: int | None, what: str) -> None:
    """Raise ValueError if tokens need more positions than the model has; `what` says whose they are."""
    if limit is not None and needed > limit:
        raise ValueError(
            f"{what} needs {needed} positions, but the model has {limit} (max_position_embeddings): "
            "give or ask for fewer tokens"
        )


def check_prompts(prompts: Sequence[Sequence[int]], new: int, rows: int | None, limit: int | None) -> None:
    """Raise ValueError unless a model with `rows` and `limit` positions can read prompts and add `new` tokens."""
    for prompt in prompts:
        check_token_ids(prompt, rows)
        check_positions(len(prompt) + new - 1, limit, f"a prompt of {len(prompt)} tokens with {new} new ones")


def position_limit(positions: int | None, rope: Mapping[str, Any] | None) -> int | None:
    """Count the positions that a model has: what its configuration names, or what its scaled rotary angles reach.

    Parameters
    ----------
    positions : int, optional
        max_position_embeddings.
    rope : mapping, optional
        The `rope_parameters` of the configuration.

    Examples
    --------
    >>> position_limit(32768, {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768})
    131072
    """
    if not isinstance(positions, int) or positions < 1:
        return None
    scaling = rope or {}
    factor, trained = scaling.get("factor"), scaling.get("original_max_position_embeddings", positions)
    scaled = all(isinstance(each, int | float) and math.isfinite(each) for each in (factor, trained))
    return max(positions, int(factor * trained)) if scaled else positions


def has_sliding_window(config: Mapping[str, Any]) -> bool:
    """Decide whether a configuration, as config.json holds it, lets a layer attend to its nearest tokens alone."""
    mistral = config.get("model_type") == "mistral"
    size = config.get("sliding_window", 4096 if mistral else None)  # what transformers takes where it is missing
    layers = config.get("layer_types") or ()
    return bool(config.get("use_sliding_window", mistral) and size) or any(each != "full_attention" for each in layers)


def text_config(model: Any) -> Any:
    """Find the part of a transformers model's configuration that describes its decoder; None for other modules."""
    config: Any = getattr(model, "config", None)
    return config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config


def positions_of(model: Any) -> int | None:
    """Count the positions of a loaded model; None where its configuration names no limit."""
    config = text_config(model)
    rope = getattr(config, "rope_parameters", None)  # or one for each type of layer, of which none is a factor
    return position_limit(getattr(config, "max_position_embeddings", None), rope)


def embedding_rows(model: Any) -> int | None:
    """Count the rows of a loaded model's embedding; None where it has none that is known."""
    embedding = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    weight = getattr(embedding, "weight", None)
    table = getattr(embedding, "table", None)
    return len(weight) if weight is not None else len(table.codes) if table is not None else None


def flat_tokens(tokens: Any, model: Any, least: int = 1) -> "Tensor":
    """Turn the tokens of one text, (n,) or (1, n), into an (n,) int64 tensor on the CPU that the model can read.

    Raises
    ------
    ValueError
        If they have another shape or are no integers, are fewer than `least`, or have no row in the embedding.
    """
    import torch

    try:
        found = torch.as_tensor(tokens)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"tokens must be a tensor or list of integers, got {type(tokens).__name__}") from error
    shape = tuple(found.shape)
    if found.ndim == 2 and shape[0] == 1:
        found = found[0]
    if found.ndim != 1 or found.is_floating_point() or found.is_complex() or found.dtype == torch.bool:
        raise ValueError(f"tokens must be integers of shape (n,) or (1, n), got shape {shape} of {found.dtype}")
    if len(found) < least:
        raise ValueError(f"at least {least} tokens are needed, got {len(found)}: give a longer text")
    check_token_ids([int(found.min()), int(found.max())], embedding_rows(model))
    return found.to("cpu", torch.int64)


def window_for(model: Any, window: int | None, default: int) -> int:
    """Choose how many tokens a model reads at once: `window`, else `default` or all positions that it has.

    Raises
    ------
    ValueError
        If `window` is no whole number of at least 2, or more than the model has positions.
    """
    limit = positions_of(model)
    if window is None:
        return default if limit is None else max(2, min(default, limit))
    check_number("window", window, low=2, whole=True)
    check_positions(window, limit, f"a window of {window} tokens")
    return window
