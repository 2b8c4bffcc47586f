"""The latent key-value cache as transformers knows caches; `latent_cache` makes it. This module needs transformers."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicLayer

from .._checks import check_positions
from ..kv_cache import Latents, round_latents

GROWTH = 512  # tokens that room is made for at once


class GrowingTensor:
    """A tensor (batch, tokens, ...) that tokens are appended to, with room for GROWTH more at a time."""

    def __init__(self) -> None:
        self.room: Tensor | None = None
        self.length = 0

    def append(self, new: Tensor) -> None:
        """Append tokens."""
        length = self.length + new.shape[1]
        if self.room is None or self.room.shape[1] < length:
            room = new.new_empty(new.shape[0], -(-length // GROWTH) * GROWTH, *new.shape[2:])
            if self.room is not None:
                room[:, : self.length] = self.filled()
            self.room = room
        self.room[:, self.length : length] = new
        self.length = length

    def filled(self) -> Tensor:
        """All tokens: a view, good until the next change."""
        if self.room is None:
            raise ValueError("the latent cache is empty: run the model on a prompt first")
        return self.room[:, : self.length]

    def change(self, how: Callable[[Tensor], Tensor]) -> None:
        """Put `how` of the tokens in their place."""
        if self.room is not None:
            self.room = how(self.filled())
            self.length = self.room.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of the tokens, without the room for more."""
        return 0 if self.room is None else self.filled().nbytes


class LatentLayer(DynamicLayer):
    """What one attention layer keeps: codes and scales of the latents of its keys, and of its values."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = [GrowingTensor() for _ in range(4)]

    def get_seq_length(self) -> int:
        """Tokens kept."""
        return self.parts[0].length

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Refuse keys and values."""
        raise ValueError(
            "a latent cache takes latents, not keys and values: make it with latent_cache from the model that uses it"
        )


class LatentCache(Cache):
    """Latents of all layers, and the tokens' positions, which the layers share.

    Parameters
    ----------
    layers : int
    dtype : torch.dtype
        Of the latents, see `kv_cache.round_latents`.
    rotary : torch.nn.Module
        The model's rotary embedding: cosines and sines, (batch, tokens, size), of positions, (batch, tokens).
    limit : int, optional
        Tokens of a context at most.
    """

    def __init__(self, layers: int, dtype: torch.dtype, rotary: nn.Module, limit: int | None):
        super().__init__(layers=[LatentLayer() for _ in range(layers)])
        self.dtype, self.rotary, self.limit = dtype, rotary, limit
        self.positions = GrowingTensor()
        self.turned: tuple[Tensor, Tensor] | None = None

    @property
    def tensors(self) -> list[GrowingTensor]:
        """All that grows with the tokens."""
        return [self.positions, *(part for layer in self.layers for part in layer.parts)]  # type: ignore[union-attr]

    @property
    def nbytes(self) -> int:
        """Bytes of all that is kept for the tokens: codes, scales and positions."""
        return sum(tensor.nbytes for tensor in self.tensors)

    def put_latents(self, at: int, keys: Tensor, values: Tensor, positions: Tensor) -> tuple[Latents, Latents]:
        """Append latents, (batch, tokens, R), and positions, (batch or 1, tokens); return all of layer `at`.

        Raises
        ------
        ValueError
            If the context grows longer than the model knows, or the batch is another one.
        """
        layer: Any = self.layers[at]
        length, room = layer.get_seq_length() + keys.shape[1], layer.parts[0].room
        check_positions(length, self.limit, f"a context of {length} tokens")
        if room is not None and room.shape[0] != len(keys):
            raise ValueError(
                f"the latent cache holds {room.shape[0]} sequences, but {len(keys)} go on: make a new one with "
                "latent_cache for each batch"
            )
        if self.positions.length < length:  # the first layer of a step
            self.positions.append(positions.to(torch.int32).expand(len(keys), -1))
            self.turned = None
        new = (*round_latents(keys, self.dtype), *round_latents(values, self.dtype))
        for part, tensor in zip(layer.parts, new, strict=True):
            part.append(tensor)
        key_codes, key_scale, value_codes, value_scale = (part.filled() for part in layer.parts)
        return Latents(key_codes, key_scale), Latents(value_codes, value_scale)

    def angles(self) -> tuple[Tensor, Tensor]:
        """Cosines and sines of all tokens' positions, (batch, tokens, size / 2) float32, shared by a step's layers."""
        if self.turned is None:
            positions = self.positions.filled()
            cosine, sine = self.rotary(torch.zeros((), device=positions.device), positions)
            half = cosine.shape[-1] // 2  # the other half is the same
            self.turned = cosine[..., :half].contiguous(), sine[..., :half].contiguous()
        return self.turned

    def change(self, how: Callable[[Tensor], Tensor]) -> None:
        """Change the tokens of every tensor in the same way."""
        self.turned = None
        for tensor in self.tensors:
            tensor.change(how)

    def reset(self) -> None:
        """Forget all tokens."""
        self.turned = None
        for tensor in self.tensors:
            tensor.room, tensor.length = None, 0

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last -tokens_to_remove tokens."""
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes the tokens to remove as a negative number, not {tokens_to_remove}")
        self.change(lambda tensor: tensor[:, : tensor.shape[1] + tokens_to_remove])

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Put the sequences `beam_idx` in the batch's places."""
        self.change(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each sequence."""
        self.change(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the sequences `indices` alone."""
        self.change(lambda tensor: tensor[indices])
