"""Any causal language model of transformers as an engine for decode_cuda.py: its forward, a cache of fixed size.

transformers' StaticCache keeps the length of windows in Python, which a captured graph cannot change. Here all layers
have room for all tokens, where the next one goes is a tensor that they share, and windows are left to the masks, which
transformers makes on the device from that tensor.
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
    """Keys and values of one layer.

    Parameters
    ----------
    capacity : int
        Tokens.
    position : () int64 tensor
        Where the next one goes; shared.
    """

    keys: Any
    values: Any

    def __init__(self, capacity: int, position: Tensor):
        super().__init__(capacity)
        self.position = position

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Put the keys and values of new tokens into their places; returns all."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        places = self.position + torch.arange(key_states.shape[-2], device=self.position.device)
        self.keys.index_copy_(2, places, key_states)
        self.values.index_copy_(2, places, value_states)
        return self.keys, self.values

    def get_mask_sizes(self, *_: Any) -> tuple[int, int]:
        """Tokens that a mask must cover, and the first one."""
        return self.max_cache_len, 0

    def get_seq_length(self, *_: Any) -> Any:
        """Tokens kept: on the device, since it must not be known when a graph is captured."""
        return self.position

    def grow(self, capacity: int) -> None:
        """Make room for more tokens."""
        more = capacity - self.max_cache_len
        self.keys = torch.nn.functional.pad(self.keys, (0, 0, 0, more))
        self.values = torch.nn.functional.pad(self.values, (0, 0, 0, more))
        self.max_cache_len = capacity


class StaticEngine:
    """A model, and a cache for a batch of sequences; see decode_cuda.Engine.

    Shorter prompts are filled up on the left, and what fills them is masked.

    Parameters
    ----------
    model : transformers causal language model, on one device
    batch, capacity : int

    Raises
    ------
    NotDecodableError
        If transformers says that the model takes no cache of fixed size, or it has experts.
    """

    def __init__(self, model: Any, batch: int, capacity: int):
        if not getattr(model, "_can_compile_fullgraph", False):
            raise NotDecodableError(f"{type(model).__name__} takes no cache of fixed size")
        if has_experts(model):
            raise NotDecodableError("which experts run depends on the text, and a captured graph cannot choose")
        self.model, self.batch, self.capacity = model, batch, capacity
        self.device = device_of(model)
        self.position = torch.zeros((), dtype=torch.int64, device=self.device)
        self.positions = torch.zeros(batch, dtype=torch.int64, device=self.device)  # without what fills them up
        self.mask = torch.ones(batch, capacity, dtype=torch.bool, device=self.device)
        layers = model.config.get_text_config(decoder=True).num_hidden_layers
        self.cache = Cache(layers=[FixedLayer(capacity, self.position) for _ in range(layers)])
        self.past = cache_argument(self.cache, model.forward)
        self.takes_places = has_parameter(model.forward, "cache_position")  # else the cache itself is asked for them

    def prefill(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Logits (batch, vocabulary) after the prompts."""
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
        """Logits (batch, vocabulary) after one more token of each sequence."""
        logits = self.forward(tokens[:, None], self.mask, self.positions[:, None])
        self.position.add_(1)
        self.positions.add_(1)
        return logits

    def forward(self, tokens: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
        """Logits of the last tokens."""
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
    def larger(self) -> int:
        """The capacity to grow to."""
        return 2 * self.capacity

    def grow(self, capacity: int) -> None:
        """Make room for more tokens."""
        for layer in self.cache.layers:
            layer.grow(capacity)  # type: ignore[attr-defined]
        self.mask = torch.nn.functional.pad(self.mask, (0, capacity - self.capacity), value=True)
        self.capacity = capacity
