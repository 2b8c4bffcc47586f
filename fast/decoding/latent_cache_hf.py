"""Store latents in a subclass of transformers' Cache; `latent_cache` makes it. Importing this needs transformers."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicLayer

from .._checks import check_positions
from ..kv_cache import Latents, round_latents

GROWTH = 512  # tokens by which the memory of a cache grows


class GrowingTensor:
    """Hold a tensor (batch, tokens, ...) to which tokens are appended; its memory grows by GROWTH tokens at a time."""

    def __init__(self) -> None:
        self.buffer: Tensor | None = None
        self.length = 0

    def append(self, new: Tensor) -> None:
        """Append tokens, (batch, new tokens, ...)."""
        length = self.length + new.shape[1]
        if self.buffer is None or self.buffer.shape[1] < length:
            larger = new.new_empty(new.shape[0], -(-length // GROWTH) * GROWTH, *new.shape[2:])
            if self.buffer is not None:
                larger[:, : self.length] = self.filled()
            self.buffer = larger
        self.buffer[:, self.length : length] = new
        self.length = length

    def filled(self) -> Tensor:
        """Return a view of all tokens; the next change makes it invalid."""
        if self.buffer is None:
            raise ValueError("the latent cache is empty: run the model on a prompt first")
        return self.buffer[:, : self.length]

    def transform(self, function: Callable[[Tensor], Tensor]) -> None:
        """Replace the tokens by a function of them."""
        if self.buffer is not None:
            self.buffer = function(self.filled())
            self.length = self.buffer.shape[1]

    @property
    def nbytes(self) -> int:
        """Count the bytes of the tokens, without the memory for more."""
        return 0 if self.buffer is None else self.filled().nbytes


class LatentLayer(DynamicLayer):
    """Hold the latents of one attention layer: codes and scales of its keys, codes and scales of its values."""

    def __init__(self) -> None:
        super().__init__()
        self.tensors = [GrowingTensor() for _ in range(4)]

    def get_seq_length(self) -> int:
        """Count the stored tokens."""
        return self.tensors[0].length

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Raise ValueError, because this cache takes latents."""
        raise ValueError(
            "a latent cache takes latents, not keys and values: make it with latent_cache from the model that uses it"
        )


class LatentCache(Cache):
    """Hold the latents of all layers, and the tokens' positions, which the layers share.

    Parameters
    ----------
    layers : int
    dtype : torch.dtype
        dtype of the stored latents; see `kv_cache.round_latents`.
    rotary : torch.nn.Module
        The model's rotary embedding, which maps positions (batch, tokens) to cosines and sines (batch, tokens, size).
    limit : int, optional
        The largest number of tokens in a context.
    """

    def __init__(self, layers: int, dtype: torch.dtype, rotary: nn.Module, limit: int | None):
        super().__init__(layers=[LatentLayer() for _ in range(layers)])
        self.dtype, self.rotary, self.limit = dtype, rotary, limit
        self.positions = GrowingTensor()
        self.cos_sin: tuple[Tensor, Tensor] | None = None

    @property
    def tensors(self) -> list[GrowingTensor]:
        """List all tensors that grow with the tokens."""
        return [self.positions, *(part for layer in self.layers for part in layer.tensors)]  # type: ignore[union-attr]

    @property
    def nbytes(self) -> int:
        """Count the bytes stored for the tokens: codes, scales and positions."""
        return sum(tensor.nbytes for tensor in self.tensors)

    def append_latents(self, layer: int, keys: Tensor, values: Tensor, positions: Tensor) -> tuple[Latents, Latents]:
        """Append the latents of new tokens to one layer, and return all of that layer.

        Parameters
        ----------
        layer : int
            Number of the layer.
        keys, values : (batch, tokens, R) float tensor
            Latents of k_proj and v_proj; each has its own R.
        positions : (batch or 1, tokens) integer tensor

        Returns
        -------
        Latents of the keys and of the values of all tokens.

        Raises
        ------
        ValueError
            If the context exceeds the model's positions, or the batch size has changed.
        """
        cache: Any = self.layers[layer]
        length, buffer = cache.get_seq_length() + keys.shape[1], cache.tensors[0].buffer
        check_positions(length, self.limit, f"a context of {length} tokens")
        if buffer is not None and buffer.shape[0] != len(keys):
            raise ValueError(
                f"the batch must have the {buffer.shape[0]} sequences of the latent cache, got {len(keys)}: make a new "
                "one with latent_cache for each batch"
            )
        if self.positions.length < length:  # only the first layer of a step appends them
            self.positions.append(positions.to(torch.int32).expand(len(keys), -1))
            self.cos_sin = None
        new = (*round_latents(keys, self.dtype), *round_latents(values, self.dtype))
        for part, tensor in zip(cache.tensors, new, strict=True):
            part.append(tensor)
        key_codes, key_scale, value_codes, value_scale = (part.filled() for part in cache.tensors)
        return Latents(key_codes, key_scale), Latents(value_codes, value_scale)

    def angles(self) -> tuple[Tensor, Tensor]:
        """Compute RoPE's cosines and sines of all tokens, each (batch, tokens, size / 2) float32; layers share them."""
        if self.cos_sin is None:
            positions = self.positions.filled()
            cosine, sine = self.rotary(torch.zeros((), device=positions.device), positions)
            half = cosine.shape[-1] // 2  # the other half is the same
            self.cos_sin = cosine[..., :half].contiguous(), sine[..., :half].contiguous()
        return self.cos_sin

    def transform(self, function: Callable[[Tensor], Tensor]) -> None:
        """Apply a function to every tensor that grows with the tokens."""
        self.cos_sin = None
        for tensor in self.tensors:
            tensor.transform(function)

    def reset(self) -> None:
        """Remove all tokens."""
        self.cos_sin = None
        for tensor in self.tensors:
            tensor.buffer, tensor.length = None, 0

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last -tokens_to_remove tokens; transformers passes a negative number."""
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes the tokens to remove as a negative number, got {tokens_to_remove}")
        self.transform(lambda tensor: tensor[:, : tensor.shape[1] + tokens_to_remove])

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorder the batch for beam search: sequence i becomes the former sequence beam_idx[i]."""
        self.transform(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each sequence."""
        self.transform(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep only the sequences `indices` of the batch."""
        self.transform(lambda tensor: tensor[indices])
