"""Declare what a decoded token needs besides its linear layers: embedding, norms, SwiGLU, attention, logits.

`DecoderOps` is the interface. torch_ops.py implements it in torch, for CPUs and as the reference; cuda_ops.py launches
the kernels of kernels/cuda_decode.py. The tests compare the two.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..kernels.unpacked import signs
from ..kv_cache import Latents
from ..models.layers import PackedLinear
from ..packing import pack_signs


class ResidualStream:
    """Hold the residual stream of a batch, with sums of squares for the next RMSNorm.

    Attributes
    ----------
    x : (rows, hidden) float32 tensor
    squares : (rows, count) float32 tensor
        Partial sums: each row's total is the sum of squares of x. Whatever writes x replaces them.
    """

    def __init__(self, x: Tensor, squares: Tensor):
        self.x, self.squares = x, squares


class Heads(NamedTuple):
    """The shape of attention.

    Attributes
    ----------
    heads, kv_heads : int
        Query heads, and key-value heads.
    size : int
        Entries of a head.
    """

    heads: int
    kv_heads: int
    size: int

    @property
    def group(self) -> int:
        """Query heads that share a key-value head (grouped-query attention)."""
        return self.heads // self.kv_heads


class HeadNorms(NamedTuple):
    """Weights of the RMSNorms of each query head and key head (QK-norm).

    Attributes
    ----------
    query, key : (size,) float32 tensor
    """

    query: Tensor
    key: Tensor


class Spans(NamedTuple):
    """The columns that hold a layer's latents, one span per path.

    Attributes
    ----------
    begins, counts : tuple of int
        First column and number of columns of each span. Counts are padded to multiples of eight.
    """

    begins: tuple[int, ...]
    counts: tuple[int, ...]

    @classmethod
    def at(
        cls, begin: int, ranks: Sequence[int], width: Callable[[int], int] = lambda rank: padded_width([rank])
    ) -> Any:
        """Lay out paths of the given ranks from column `begin` on, where a path takes width(rank) columns."""
        begins = itertools.accumulate(map(width, ranks), initial=begin)
        return cls(tuple(begins)[:-1], tuple(padded_width([rank]) for rank in ranks))


def padded_width(ranks: Sequence[int]) -> int:
    """Count the latents of a token as a cache stores them: each path is padded to a multiple of eight."""
    return sum(-(-rank // 8) * 8 for rank in ranks)


def pad_latents(x: Tensor, ranks: Sequence[int]) -> Tensor:
    """Pad each path's latents with zeros to a multiple of eight: (..., sum of ranks) to (..., padded width)."""
    parts = x.split(list(ranks), -1)
    return torch.cat([functional.pad(part, (0, -part.shape[-1] % 8)) for part in parts], -1)


def unpad_latents(cached: Latents, ranks: Sequence[int]) -> Latents:
    """Remove the padding of `pad_latents` from cached latents."""
    begins = Spans.at(0, ranks).begins
    columns = [begin + at for begin, rank in zip(begins, ranks, strict=True) for at in range(rank)]
    return Latents(cached.codes[..., columns], cached.scale)


class UpProjection(NamedTuple):
    """U of a k_proj or v_proj, laid out for the kernels of cuda_latent_attention.py.

    Attributes
    ----------
    words : (d_out, width) int32 tensor
        Signs of U of the one or two paths side by side, each path in whole pairs of words.
    scales : two (d_out,) float16 tensors
        h of each path.
    first_words : int
        Words of the first path.
    counts : two int
        Padded latents of each path.
    bias : (d_out,) float32 tensor, optional
    """

    words: Tensor
    scales: tuple[Tensor, Tensor]
    first_words: int
    counts: tuple[int, int]
    bias: Tensor | None

    @classmethod
    def of(cls, layer: PackedLinear, interleaved: bool) -> "UpProjection":
        """Lay out a layer's U.

        Parameters
        ----------
        layer : PackedLinear
        interleaved : bool
            For keys: order the bits of each word 0, 2, ..., 30, 1, 3, ..., 31, as tensor cores take entries in pairs.
        """
        paths, counts = layer.factors(), [padded_width([rank]) for rank in layer.ranks]
        each = [functional.pad(signs(path.u_words, path.rank), (0, -path.rank % 64), value=1.0) for path in paths]
        every = torch.cat(each, -1)
        if interleaved:
            every = every.unflatten(-1, (-1, 16, 2)).transpose(-1, -2).flatten(1)
        scales = [path.h.half().contiguous() for path in paths]
        bias = None if layer.bias is None else layer.bias.float()
        both = counts[0], sum(counts[1:])
        return cls(pack_signs(every).contiguous(), (scales[0], scales[-1]), each[0].shape[-1] // 32, both, bias)


class DecoderOps(Protocol):
    """Compute what a decoded token needs besides its linear layers.

    A row is one sequence of the batch, and each call handles one new token of each. No call waits for the device, so
    CUDA graphs can capture all of them.

    Attributes
    ----------
    heads : Heads
    dtype : torch.dtype
        Type of the inputs of linear layers, and of keys and values in the cache.
    eps : float
        Added to the mean square in every RMSNorm.
    """

    heads: Heads
    dtype: torch.dtype
    eps: float

    def embed(self, tokens: Tensor, embedding: nn.Module) -> ResidualStream:
        """Start a residual stream with the embeddings of `tokens`, (rows,) int64."""
        ...

    def add(self, y: Tensor, stream: ResidualStream) -> None:
        """Add y, (rows, hidden), to the residual stream."""
        ...

    def rms_norm(self, stream: ResidualStream, weight: Tensor) -> Tensor:
        """Compute the RMSNorm of the residual stream, (rows, hidden), with `weight` (hidden,) float32."""
        ...

    def swiglu(self, x: Tensor) -> Tensor:
        """Compute silu(gate) * up, (rows, n), for gate and up side by side in x, (rows, 2 n)."""
        ...

    def logits(self, x: Tensor, head: nn.Module) -> Tensor:
        """Compute the head's logits (rows, vocabulary) for x, (rows, hidden)."""
        ...

    def attend(
        self,
        projected: Tensor,
        keys: Tensor,
        values: Tensor,
        positions: Tensor,
        angles: Tensor,
        norms: HeadNorms | None,
        combine: bool = True,
    ) -> Tensor:
        """Append the new tokens' keys and values to a cache, and attend to all tokens in it.

        Parameters
        ----------
        projected : (rows, (heads + 2 kv_heads) * size) tensor
            Queries, keys and values, before QK-norm and RoPE.
        keys, values : (rows, kv_heads, capacity, size) tensor
            The cache, changed in place.
        positions : (rows,) int64 tensor
            Tokens in the cache before this one.
        angles : (2, capacity, size / 2) float32 tensor
            Cosines and sines of RoPE at each position.
        norms : HeadNorms, optional
        combine : bool
            False if the caller can also take split-KV partials, (rows, heads, splits, size + SUMMARY) float32, as
            `cuda_gemv.SplitKvPartials` describes them.

        Returns
        -------
        (rows, heads * size) tensor of projected's dtype, or split-KV partials.
        """
        ...

    def up_projections(self, pair: Sequence[PackedLinear]) -> Sequence[Any]:
        """Prepare k_proj and v_proj for `attend_latents`, which takes the result as `up`.

        Raises
        ------
        NotDecodableError
            If the ranks are too large for the GPU's shared memory.
        """
        ...

    def attend_latents(
        self,
        projected: Tensor,
        part: Tensor,
        spans: Sequence[Spans],
        cache: Sequence[Latents],
        up: Sequence[Any],
        positions: Tensor,
        angles: Tensor,
        combine: bool = True,
    ) -> Tensor:
        """Append the new tokens' latents to a latent cache (MLA), and attend to all tokens in it.

        Parameters
        ----------
        projected, positions, angles, combine
            See `attend`. Only the queries of `projected` are read.
        part : (parts, rows, columns) float32 tensor
            Latents of the new tokens as split-K partials: the sum over parts counts.
        spans : two Spans
            The columns of `part` that hold the latents of keys and of values.
        cache : two Latents
            Of keys and values, changed in place: codes (rows, capacity, padded width) float16 or int8, scale
            (rows, capacity, 1) float32.
        up : two up-projections, from `up_projections`

        Returns
        -------
        (rows, heads * size) tensor of projected's dtype, or split-KV partials.
        """
        ...
