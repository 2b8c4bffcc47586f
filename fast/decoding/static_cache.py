"""Decode any causal language model of transformers: its own forward, with a cache of fixed size.

transformers' StaticCache keeps the length of sliding windows in Python, which a captured graph cannot change. Here all
layers have room for all tokens and share a tensor with the next position. Windows are left to the attention masks,
which transformers computes on the device from that tensor.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, StaticLayer

from ..models.experts import has_experts
from ..models.hf_names import cache_argument, has_parameter
from ..models.quantize import device_of
from .architecture import NotDecodableError


class FixedLayer(StaticLayer):
    """Hold the keys and values of one layer, (batch, kv_heads, capacity, size).

    Parameters
    ----------
    capacity : int
        Tokens that there is room for.
    position : () int64 tensor
        Position of the next token, shared by all layers.
    """

    keys: Any
    values: Any

    def __init__(self, capacity: int, position: Tensor):
        super().__init__(capacity)
        self.position = position

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Store the keys and values of new tokens; return the whole cache."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        places = self.position + torch.arange(key_states.shape[-2], device=self.position.device)
        self.keys.index_copy_(2, places, key_states)
        self.values.index_copy_(2, places, value_states)
        return self.keys, self.values

    def get_mask_sizes(self, *_: Any) -> tuple[int, int]:
        """Return how many tokens a mask must cover, and the position of the first."""
        return self.max_cache_len, 0

    def get_seq_length(self, *_: Any) -> Any:
        """Return the number of cached tokens as a tensor, since a graph must not capture its value."""
        return self.position

    def grow(self, capacity: int) -> None:
        """Enlarge the cache to a capacity, and keep what it holds."""
        more = capacity - self.max_cache_len
        self.keys = torch.nn.functional.pad(self.keys, (0, 0, 0, more))
        self.values = torch.nn.functional.pad(self.values, (0, 0, 0, more))
        self.max_cache_len = capacity


class StaticEngine:
    """Run a transformers model on a batch of sequences, with a cache of fixed size; implements `engines.Engine`.

    Shorter prompts are padded on the left, and the padding is masked.

    Parameters
    ----------
    model : transformers causal language model, on one device
    batch, capacity : int

    Raises
    ------
    NotDecodableError
        If transformers does not support a cache of fixed size for the model, or it has experts.
    """

    def __init__(self, model: Any, batch: int, capacity: int):
        if not getattr(model, "_can_compile_fullgraph", False):
            raise NotDecodableError(f"{type(model).__name__} takes no cache of fixed size")
        if has_experts(model):
            raise NotDecodableError("which experts run depends on the text, and a captured graph cannot choose")
        self.model, self.batch, self.capacity = model, batch, capacity
        self.device = device_of(model)
        self.position = torch.zeros((), dtype=torch.int64, device=self.device)
        self.positions = torch.zeros(batch, dtype=torch.int64, device=self.device)  # without the padding
        self.mask = torch.ones(batch, capacity, dtype=torch.bool, device=self.device)
        layers = model.config.get_text_config(decoder=True).num_hidden_layers
        self.cache = Cache(layers=[FixedLayer(capacity, self.position) for _ in range(layers)])
        self.past = cache_argument(self.cache, model.forward)
        self.takes_places = has_parameter(model.forward, "cache_position")  # else the cache itself is asked for them

    def prefill(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Compute logits (batch, vocabulary) after the prompts, which fill the empty cache."""
        longest = max(map(len, prompts))
        rows = [[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts]
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=self.device)
        self.position.zero_()
        self.positions.copy_(lengths)
        self.mask.copy_(torch.arange(self.capacity, device=self.device) >= longest - lengths[:, None])
        places = torch.arange(longest, device=self.device) - (longest - lengths[:, None])
        logits = self.forward(torch.tensor(rows, device=self.device), self.mask[:, :longest], places.clamp(min=0))
        self.position.add_(longest)
        return logits

    def step(self, tokens: Tensor) -> Tensor:
        """Compute logits (batch, vocabulary) after one more token of each sequence, (batch,) int64."""
        logits = self.forward(tokens[:, None], self.mask, self.positions[:, None])
        self.position.add_(1)
        self.positions.add_(1)
        return logits

    def forward(self, tokens: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
        """Compute logits (batch, vocabulary) after the last of `tokens`, (batch, count) int64.

        Parameters
        ----------
        tokens : (batch, count) int64 tensor
        mask : (batch, length) bool tensor
            False where padding is.
        positions : (batch, count) int64 tensor
        """
        further = dict(self.past)
        if self.takes_places:
            further["cache_position"] = self.position + torch.arange(tokens.shape[1], device=self.device)
        found = self.model(
            input_ids=tokens,
            attention_mask=mask,
            position_ids=positions,
            use_cache=True,
            logits_to_keep=1,
            **further,
        )
        return found.logits[:, -1]

    @property
    def next_capacity(self) -> int:
        """The capacity to grow to."""
        return 2 * self.capacity

    def grow(self, capacity: int) -> None:
        """Enlarge the cache to a capacity, and keep what it holds."""
        for layer in self.cache.layers:
            layer.grow(capacity)  # type: ignore[attr-defined]
        self.mask = torch.nn.functional.pad(self.mask, (0, capacity - self.capacity), value=True)
        self.capacity = capacity
