"""Check numbers, token ids and positions against what a model allows.

Errors name the value and say what to do. Only functions that take a model import torch.
"""

import math
from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


class LittleBitWarning(UserWarning):
    """Mark a warning of this package; the command shows these and hides the warnings of other libraries."""


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
        Name of the setting, for the error.
    value : object
    low, high : float
        Inclusive limits.
    above, below : float
        Exclusive limits.
    whole : bool
        Require an integer.

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
    """Raise ValueError unless there are tokens, each from 0 to `rows` - 1, the rows of the embedding."""
    if not len(tokens):
        raise ValueError("at least one token is needed, got none")
    wrong = [token for token in (min(tokens), max(tokens)) if token < 0 or (rows is not None and token >= rows)]
    if wrong:
        raise ValueError(
            f"token ids must be from 0 to {'...' if rows is None else rows - 1}, the last row of the embedding, got "
            f"{wrong[0]}: use the tokenizer that belongs to the model, or resize the embedding before quantizing"
        )


def check_positions(needed: int, limit: int | None, what: str) -> None:
    """Raise ValueError if `what`, a text or window, needs more positions than the model has."""
    if limit is not None and needed > limit:
        raise ValueError(
            f"{what} needs {needed} positions, but the model has {limit} (max_position_embeddings): use fewer tokens"
        )


def check_prompts(prompts: Sequence[Sequence[int]], new: int, rows: int | None, limit: int | None) -> None:
    """Raise ValueError unless a model can read prompts and generate `new` tokens.

    Parameters
    ----------
    prompts : sequence of sequences of int
        Token ids.
    new : int
    rows : int or None
        Rows of the model's embedding, if known.
    limit : int or None
        Positions of the model, if limited.
    """
    for prompt in prompts:
        check_token_ids(prompt, rows)
        check_positions(len(prompt) + new - 1, limit, f"a prompt of {len(prompt)} tokens with {new} new ones")


def position_limit(positions: int | None, rope: Mapping[str, Any] | None) -> int | None:
    """Count a model's positions: max_position_embeddings, or what its scaled rotary angles reach if that is more.

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
    """Tell whether a config.json gives any layer sliding-window attention."""
    mistral = config.get("model_type") == "mistral"
    size = config.get("sliding_window", 4096 if mistral else None)  # transformers' default
    layers = config.get("layer_types") or ()
    return bool(config.get("use_sliding_window", mistral) and size) or any(each != "full_attention" for each in layers)


def text_config(model: Any) -> Any:
    """Return the part of a transformers configuration that describes the decoder; None for other modules."""
    config: Any = getattr(model, "config", None)
    return config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config


def positions_of(model: Any) -> int | None:
    """Count the positions of a loaded model; None if its configuration gives no limit."""
    config = text_config(model)
    rope = getattr(config, "rope_parameters", None)  # some models have one for each layer type, without a factor here
    return position_limit(getattr(config, "max_position_embeddings", None), rope)


def embedding_rows(model: Any) -> int | None:
    """Count the rows of a loaded model's embedding; None if it has no embedding that is known here."""
    embedding = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    weight = getattr(embedding, "weight", None)
    table = getattr(embedding, "table", None)
    return len(weight) if weight is not None else len(table.codes) if table is not None else None


def flat_tokens(tokens: Any, model: Any, least: int = 1) -> "Tensor":
    """Check the token ids of one text, (n,) or (1, n), and convert them to (n,) int64 on the CPU.

    Raises
    ------
    ValueError
        If they have another shape, are not integers, are fewer than `least`, or have no row in the model's embedding.
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
    """Choose how many tokens a model reads at once: `window`, or `default` but at most the model's positions.

    Raises
    ------
    ValueError
        If `window` is not an integer of at least 2, or exceeds the model's positions.
    """
    limit = positions_of(model)
    if window is None:
        return default if limit is None else max(2, min(default, limit))
    check_number("window", window, low=2, whole=True)
    check_positions(window, limit, f"a window of {window} tokens")
    return window
