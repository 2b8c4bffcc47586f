"""Choose the engine that decodes a model on a GPU."""

import logging
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from ..models.quantize import device_of
from .architecture import NotDecodableError
from .fused_llama import FusedEngine, Model, parts_of


def fused_engine(model: Any, batch: int, capacity: int, kv_cache: str = "full") -> FusedEngine:
    """An engine for a loaded model, in float16 on a GPU, else in float32, with a cache of a kind in memory.KV_CACHES.

    Raises
    ------
    NotDecodableError
        If it cannot run the model.
    """
    device = device_of(model)
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    return engine_of(parts_of(model, dtype), batch, capacity, device, dtype, kv_cache)


def engine_of(
    model: Model, batch: int, capacity: int, device: torch.device, dtype: torch.dtype, kv_cache: str = "full"
) -> FusedEngine:
    """An engine with a cache of a kind in memory.KV_CACHES."""
    if kv_cache == "full":
        return FusedEngine(model, batch, capacity, device, dtype)
    from .fused_llama_latent import LatentEngine

    return LatentEngine(model, batch, capacity, device, dtype, kind=kv_cache)


log = logging.getLogger(__name__)


class Engine(Protocol):
    """A model with a cache of fixed size, and how it goes on by one token.

    Attributes
    ----------
    device : torch.device
    batch : int
        Sequences.
    capacity : int
        Tokens of each sequence that the cache has room for.
    larger : int
        The capacity to grow to.
    """

    device: torch.device
    batch: int
    capacity: int

    @property
    def larger(self) -> int: ...  # noqa: D102

    def prefill(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Logits (batch, vocabulary) after the prompts, which fill the empty cache."""
        ...

    def step(self, tokens: Tensor) -> Tensor:
        """Logits (batch, vocabulary) after one more token of each sequence, (batch,) int64; nothing waits for it."""
        ...

    def grow(self, capacity: int) -> None:
        """Make room for more tokens, and keep those that are there."""
        ...


def engine_for(model: Any, batch: int, capacity: int, kv_cache: str = "full") -> Engine:
    """The engine that runs a model.

    Raises
    ------
    NotDecodableError
        If none does.
    """
    from .engines import fused_engine
    from .static_cache import StaticEngine

    try:
        return fused_engine(model, batch, capacity, kv_cache)
    except NotDecodableError as reason:
        if kv_cache != "full":
            raise
        log.info("littlebit: transformers' own forward runs this model's steps, not the fused kernels: %s", reason)
    return StaticEngine(model, batch, capacity)
