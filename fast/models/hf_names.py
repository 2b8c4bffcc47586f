"""Find the names that the installed transformers uses, where versions 5.x differ, from its functions' signatures."""

import inspect
from collections.abc import Callable
from typing import Any

#: The names of the argument that takes a key-value cache, the newest first.
CACHE_NAMES = ("cache", "past_key_values")


def has_parameter(function: Callable[..., Any], name: str) -> bool:
    """Decide whether a function of the installed transformers has a parameter of this name."""
    return name in inspect.signature(function).parameters


def dense_gguf() -> dict[str, Any]:
    """Return the keyword arguments with which transformers loads a GGUF file as dense weights.

    Older versions always do and need no argument.
    """
    import transformers

    config = getattr(transformers, "GgufConfig", None)
    return {} if config is None else {"quantization_config": config(dequantize=True)}


def cache_argument(cache: Any, function: Callable[..., Any] | None = None) -> dict[str, Any]:
    """Return a key-value cache as the keyword argument that the installed transformers accepts.

    Parameters
    ----------
    cache : transformers Cache
    function : callable, optional
        The function that the cache is for, such as `model.forward`; by default `model.generate`.

    Returns
    -------
    {"cache": cache}, or {"past_key_values": cache} where only that name exists.

    Raises
    ------
    RuntimeError
        If transformers has neither name.

    Examples
    --------
    >>> cache_argument(None, lambda tokens, past_key_values=None: tokens)
    {'past_key_values': None}
    """
    from transformers.generation.utils import GenerationMixin

    generation: Any = GenerationMixin  # the signature of its `generate` names no cache
    for each in filter(None, (function, generation.prepare_inputs_for_generation)):
        if name := next((name for name in CACHE_NAMES if has_parameter(each, name)), None):
            return {name: cache}
    raise RuntimeError("transformers must accept a cache as `cache` or `past_key_values`: install transformers>=5.0,<6")
