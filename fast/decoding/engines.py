"""Choose the fastest decoder that can run a model.

| device | model | cache | decoder |
|---|---|---|---|
| CPU | Llama-like | full | cpu_decoder.py: compiled by Numba |
| GPU | Llama-like | full | `FusedEngine` (fused_llama.py): fused CUDA kernels |
| GPU | Llama-like | latent | `LatentEngine` (fused_llama_latent.py): fused CUDA kernels |
| GPU | any other that transformers runs with a cache of fixed size | full | `StaticEngine` (static_cache.py) |
| any | any other | any | transformers' generate (torch_weights.py, latent_cache_hf.py) |

`choose_engine` decides between the engines, which graph_decoder.py runs. `generate.stream_tokens` decides between them,
the CPU's decoder and transformers: whatever cannot run a model raises NotDecodableError, and the next one is tried.
"""

import logging
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from ..models.quantize import device_of
from .architecture import NotDecodableError
from .fused_llama import FusedEngine, Model, parts_of
from .fused_llama_latent import LatentEngine

log = logging.getLogger(__name__)


class Engine(Protocol):
    """Run a model on a batch of sequences, one token of each at a time, with a cache of fixed size.

    Attributes
    ----------
    device : torch.device
    batch : int
        Sequences.
    capacity : int
        Tokens of each sequence that the cache has room for.
    """

    device: torch.device
    batch: int
    capacity: int

    @property
    def next_capacity(self) -> int:
        """The capacity to grow to."""
        ...

    def prefill(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Compute logits (batch, vocabulary) after the prompts, which fill the empty cache."""
        ...

    def step(self, tokens: Tensor) -> Tensor:
        """Compute logits (batch, vocabulary) after one more token of each sequence, (batch,) int64.

        The call never waits for the device, so that a CUDA graph can capture it.
        """
        ...

    def grow(self, capacity: int) -> None:
        """Enlarge the cache to a capacity, and keep what it holds."""
        ...


def choose_engine(model: Any, batch: int, capacity: int, kv_cache: str = "full") -> Engine:
    """Make the fastest engine that can run a model.

    Parameters
    ----------
    model : transformers causal language model, on one device
    batch, capacity : int
        Sequences, and tokens of each that the cache has room for.
    kv_cache : str
        A type of cache in memory.KV_CACHES.

    Raises
    ------
    NotDecodableError
        If no engine can.
    """
    from .static_cache import StaticEngine

    try:
        return fused_engine(model, batch, capacity, kv_cache)
    except NotDecodableError as reason:
        if kv_cache != "full":
            raise
        log.info("littlebit: transformers' own forward runs this model's steps, not the fused kernels: %s", reason)
    return StaticEngine(model, batch, capacity)


def fused_engine(model: Any, batch: int, capacity: int, kv_cache: str = "full") -> FusedEngine:
    """Make a fused engine for a loaded model, in float16 on a GPU and float32 on a CPU; see `choose_engine`.

    Raises
    ------
    NotDecodableError
        If the fused engines cannot run the model.
    """
    device = device_of(model)
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    return engine_of(parts_of(model, dtype), batch, capacity, device, dtype, kv_cache)


def engine_of(
    model: Model, batch: int, capacity: int, device: torch.device, dtype: torch.dtype, kv_cache: str = "full"
) -> FusedEngine:
    """Make a fused engine for the parts of a model; see `choose_engine` and `FusedEngine`."""
    if kv_cache == "full":
        return FusedEngine(model, batch, capacity, device, dtype)
    return LatentEngine(model, batch, capacity, device, dtype, kv_cache=kv_cache)
