"""Names that transformers changed within the versions that are allowed, found by looking at its functions."""

import inspect
from collections.abc import Callable
from typing import Any

#: What a key-value cache is called, the newest name first.
CACHE_NAMES = ("cache", "past_key_values")


def takes(function: Callable[..., Any], name: str) -> bool:
    """Decide whether a function of the installed transformers has a parameter of this name."""
    return name in inspect.signature(function).parameters


def dense_gguf() -> dict[str, Any]:
    """Ask transformers for the dense weights of a GGUF file; its older versions give nothing else."""
    import transformers

    kind = getattr(transformers, "GgufConfig", None)
    return {} if kind is None else {"quantization_config": kind(dequantize=True)}


def cache_argument(cache: Any, function: Callable[..., Any] | None = None) -> dict[str, Any]:
    """Give a key-value cache the name by which the installed transformers takes it.

    Parameters
    ----------
    cache : transformers Cache
    function : callable, optional
        What will be called, such as `model.forward`; by default `generate`, whose signature names no cache.

    Returns
    -------
    Keyword arguments: {"cache": cache}, or {"past_key_values": cache} where that is the only name.

    Examples
    --------
    >>> cache_argument(None, lambda tokens, past_key_values=None: tokens)
    {'past_key_values': None}
    """
    from transformers.generation.utils import GenerationMixin

    generation: Any = GenerationMixin
    for each in filter(None, (function, generation.prepare_inputs_for_generation)):
        if name := next((name for name in CACHE_NAMES if takes(each, name)), None):
            return {name: cache}
    raise RuntimeError("the installed transformers takes no cache by a known name: install transformers>=5.0,<6")
