"""What a decoded token needs beside its linear layers, for fused_engine.py: in torch, or by the kernels of cuda_decode.

Both are used in the same way, and the tests compare them: embedding, norms, gates, and attention with its cache.
"""

import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..kernels.unpacked import signs
from ..kv_cache import Latents, apply_rope, latent_attention, round_latents
from ..models.embeddings import QuantizedEmbedding, QuantizedHead, Table
from ..models.layers import PackedLinear
from ..packing import pack_signs
from .architecture import NotDecodableError

#: Activations of a gated MLP: as torch computes them. cuda.ACTIVATIONS has the same names.
ACTIVATIONS = {"silu": functional.silu, "gelu_tanh": partial(functional.gelu, approximate="tanh")}


class Stream:
    """The residual stream of some sequences, and numbers that together are the sum of squares of each.

    Attributes
    ----------
    x : (rows, hidden) float32 tensor
    squares : (rows, count) float32 tensor
        Whoever writes x puts new ones here.
    """

    def __init__(self, x: Tensor, squares: Tensor):
        self.x, self.squares = x, squares


class Heads(NamedTuple):
    """The sizes of attention.

    Attributes
    ----------
    heads, kv_heads, size : int
    """

    heads: int
    kv_heads: int
    size: int

    @property
    def group(self) -> int:
        """Heads that have the same key and value."""
        return self.heads // self.kv_heads


class Spans(NamedTuple):
    """Where the latents of a layer's one or two paths lie in a row.

    Attributes
    ----------
    begins, counts : tuple of int
        As they are kept: each path's filled up to a multiple of eight.
    """

    begins: tuple[int, ...]
    counts: tuple[int, ...]

    @classmethod
    def at(cls, begin: int, ranks: Sequence[int], width: Callable[[int], int] = lambda rank: kept_width([rank])) -> Any:
        """Paths of such ranks one after the other from `begin` on, `width` of a rank apart."""
        begins = itertools.accumulate(map(width, ranks), initial=begin)
        return cls(tuple(begins)[:-1], tuple(kept_width([rank]) for rank in ranks))


def kept_width(ranks: Sequence[int]) -> int:
    """Latents of a token as they are kept: each path's are filled up to a multiple of eight, as tensor cores want."""
    return sum(-(-rank // 8) * 8 for rank in ranks)


def stored_latents(x: Tensor, ranks: Sequence[int]) -> Tensor:
    """Latents of all paths side by side, (..., R), as they are kept, filled up with zeros."""
    parts = x.split(list(ranks), -1)
    return torch.cat([functional.pad(part, (0, -part.shape[-1] % 8)) for part in parts], -1)


def used_latents(kept: Latents, ranks: Sequence[int]) -> Latents:
    """Kept latents without what each path's are filled up with."""
    begins = Spans.at(0, ranks).begins
    columns = [begin + at for begin, rank in zip(begins, ranks, strict=True) for at in range(rank)]
    return Latents(kept.codes[..., columns], kept.scale)


class Expansion(NamedTuple):
    """What expands latents as they are kept, as `cuda_latent_attention` reads it.

    Attributes
    ----------
    words : (d_out, width) int32 tensor
        Signs of U of the one or two paths side by side, each path's in pairs of words.
    scales : two (d_out,) float16 tensors
        h of each path.
    first_words : int
        Words of the first path.
    counts : two int
        Latents of each path as they are kept.
    bias : (d_out,) float32 tensor, optional
    """

    words: Tensor
    scales: tuple[Tensor, Tensor]
    first_words: int
    counts: tuple[int, int]
    bias: Tensor | None

    @classmethod
    def of(cls, layer: PackedLinear, rotated: bool) -> "Expansion":
        """That of a layer; tensor cores take the entries of each word of keys, which are rotated, in pairs."""
        paths, counts = layer.factors(), [kept_width([rank]) for rank in layer.ranks]
        each = [functional.pad(signs(path.u_words, path.rank), (0, -path.rank % 64), value=1.0) for path in paths]
        every = torch.cat(each, -1)
        if rotated:
            every = every.unflatten(-1, (-1, 16, 2)).transpose(-1, -2).flatten(1)
        scales = [path.h.half().contiguous() for path in paths]
        bias = None if layer.bias is None else layer.bias.float()
        both = counts[0], sum(counts[1:])
        return cls(pack_signs(every).contiguous(), (scales[0], scales[-1]), each[0].shape[-1] // 32, both, bias)


class HeadNorms(NamedTuple):
    """RMSNorms of each query and key.

    Attributes
    ----------
    query, key : (size,) float32 tensor
    """

    query: Tensor
    key: Tensor


class TorchSteps:
    """All steps in torch, on any device.

    Parameters
    ----------
    heads : Heads
    dtype : torch.dtype
        Of what is between the layers, and of the cache.
    eps : float
        Of every RMSNorm.
    """

    def __init__(self, heads: Heads, dtype: torch.dtype, eps: float):
        self.heads, self.dtype, self.eps = heads, dtype, eps

    def embed(self, tokens: Tensor, embedding: nn.Module) -> Stream:
        """A stream that begins with the rows of `tokens`, (rows,) int64."""
        x = embedding(tokens).float()
        return Stream(x, squares_of(x))

    def added(self, y: Tensor, stream: Stream) -> None:
        """Add to the stream."""
        stream.x = stream.x + y
        stream.squares = squares_of(stream.x)

    def normed(self, stream: Stream, weight: Tensor) -> Tensor:
        """RMSNorm of the stream, (rows, hidden), for `weight` (hidden,) float32."""
        mean = stream.squares.sum(-1, keepdim=True) / stream.x.shape[-1]
        return (stream.x * torch.rsqrt(mean + self.eps) * weight).to(self.dtype)

    def gated(self, x: Tensor, activation: str) -> Tensor:
        """The activation of the first half of each row times the second half."""
        gate, up = x.float().chunk(2, -1)
        return (ACTIVATIONS[activation](gate) * up).to(x.dtype)

    def logits(self, x: Tensor, head: nn.Module) -> Tensor:
        """Logits (rows, vocabulary) of a head, for (rows, hidden)."""
        return head(x)

    def attend(
        self,
        projected: Tensor,
        keys: Tensor,
        values: Tensor,
        positions: Tensor,
        angles: Tensor,
        norms: HeadNorms | None,
        whole: bool = True,
    ) -> Tensor:
        """Attention of one new token of each sequence, whose key and value are kept.

        Parameters
        ----------
        projected : (rows, (heads + 2 kv_heads) * size) tensor
            Query, key and value, with no rotation yet.
        keys, values : (rows, kv_heads, capacity, size) tensor
            Changed.
        positions : (rows,) int64 tensor
            How many are there.
        angles : (2, capacity, size / 2) float32 tensor
            Cosines and sines of each position.
        norms : HeadNorms, optional
        whole : bool
            False where `cuda.Shares` will do too: (rows, heads, shares, numbers of a share) float32.

        Returns
        -------
        (rows, heads * size) tensor of projected's dtype, or Shares.
        """
        rows = torch.arange(len(projected), device=projected.device)
        query, key, value = split_heads(projected, self.heads, norms, self.eps, *angles[:, positions, None])
        keys[rows, :, positions], values[rows, :, positions] = key.to(keys.dtype), value.to(values.dtype)
        seen = torch.arange(keys.shape[2], device=keys.device) <= positions[:, None]
        mixed = functional.scaled_dot_product_attention(
            query[:, :, None].to(keys.dtype), keys, values, attn_mask=seen[:, None, None], enable_gqa=True
        )
        return mixed.flatten(1).to(projected.dtype)

    def expansions(self, pair: Sequence[PackedLinear]) -> Sequence[PackedLinear]:
        """What expands latents of keys and values: their layers."""
        return pair

    def attend_latents(
        self,
        projected: Tensor,
        part: Tensor,
        spans: Sequence[Spans],
        cache: Sequence[Latents],
        expansions: Sequence[Any],
        positions: Tensor,
        angles: Tensor,
        whole: bool = True,
    ) -> Tensor:
        """Attention of one new token of each sequence, whose latents are kept.

        Parameters
        ----------
        projected, positions, angles, whole
            See `attend`; what projected has of keys and values is not read.
        part : (parts, rows, columns) float32 tensor
            The latents of the new tokens, to be summed over parts.
        spans : two Spans
            The columns that keys' and values' layers have of it.
        cache : two Latents
            codes (rows, capacity, kept width) float16 or int8, scale (rows, capacity, 1) float32. Changed.
        expansions : what `expansions` gives

        Returns
        -------
        (rows, heads * size) tensor of projected's dtype, or Shares.
        """
        heads, rows = self.heads, torch.arange(len(projected), device=projected.device)
        for of, (codes, scale) in zip(spans, cache, strict=True):
            pieces = [part[..., at : at + count] for at, count in zip(*of, strict=True)]
            new = round_latents(torch.cat(pieces, -1).sum(0), codes.dtype)
            codes[rows, positions], scale[rows, positions] = new
        query, _, _ = split_heads(projected, heads, None, self.eps, *angles[:, positions, None])
        (key, value), capacity = expansions, cache[0].codes.shape[1]
        keys, values = (used_latents(each, layer.ranks) for each, layer in zip(cache, expansions, strict=True))
        seen = torch.arange(capacity, device=projected.device) <= positions[:, None]
        paths, (cosine, sine) = (key.factors(), value.factors()), angles[:, :capacity]
        query = query[:, :, None]
        mixed = latent_attention(query, keys, values, *paths, cosine, sine, seen[:, None], value_bias=value.bias)
        return mixed.flatten(1).to(projected.dtype)


def squares_of(x: Tensor) -> Tensor:
    """Sum of squares of each row, (rows, 1)."""
    return x.square().sum(-1, keepdim=True)


def split_heads(
    projected: Tensor, heads: Heads, norms: HeadNorms | None, eps: float, cosine: Tensor, sine: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Query and key, normed and rotated, and value: (..., heads, size) float32 each."""
    parts = projected.float().unflatten(-1, (-1, heads.size))
    query, key, value = parts.split([heads.heads, heads.kv_heads, heads.kv_heads], -2)
    if norms:
        query, key = (rms_norm(x, weight, eps) for x, weight in zip((query, key), norms, strict=True))
    return apply_rope(query, cosine, sine), apply_rope(key, cosine, sine), value


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm of float32 rows."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


class CudaSteps:
    """The same by CUDA kernels of Numba's.

    Parameters
    ----------
    heads, dtype, eps
        See TorchSteps; dtype float16 or bfloat16.
    batch : int
    device : torch.device

    Raises
    ------
    NotDecodableError
        If the kernels cannot be used, or are not made for heads of such a size.
    """

    # Tokens of a context that a block takes at least: shared by several blocks it has to be put together again, which
    # pays sooner where there are few blocks
    shortest_of_many, shortest_of_few = 256, 64
    few = 32  # blocks
    # Shares of a context that the output layer puts together, each a number more that it reads for an entry of its
    # input. More blocks, put together as above, pay where each would look at its share more often than this.
    most_shares, few_looks = 8, 4
    # What a block with a tile of latents does beside the expansion of heads of keys takes as long as that of so many
    heads_worth = 2
    fewest_tiles = 32  # of a share, if there are shares

    def __init__(self, heads: Heads, dtype: torch.dtype, eps: float, batch: int, device: torch.device):
        from ..kernels import dispatch

        index = device.index or 0
        if dispatch.cuda_kernels(index) is None:
            raise NotDecodableError("the CUDA kernels cannot be used")
        if heads.size not in (64, 128, 256):
            raise NotDecodableError(f"its heads have {heads.size} entries, not 64, 128 or 256")
        from ..kernels import cuda_decode, cuda_driver, cuda_latent_attention, cuda_schedule

        self.kernels, self.latent = cuda_decode, cuda_latent_attention
        self.driver, self.schedules = cuda_driver, cuda_schedule
        self.heads, self.dtype, self.eps, self.index = heads, dtype, eps, index
        capability = torch.cuda.get_device_capability(index)
        self.early = capability >= cuda_driver.PDL_CAPABILITY
        self.grouped = capability == cuda_schedule.WGMMA_CAPABILITY
        group, most = heads.heads // heads.kv_heads, 8 if self.early else 2  # that the registers suffice for
        self.group = next(count for count in range(min(group, most), 0, -1) if group % count == 0)
        self.chunks = group // self.group
        self.blocks = batch * heads.kv_heads * self.chunks
        self.shortest = self.shortest_of_few if self.blocks < self.few else self.shortest_of_many
        self.tickets = torch.zeros(self.blocks, dtype=torch.int32, device=device)

    def start(self, kernel: Any, grid: tuple[int, int, int], *arguments: Any, **how: int) -> None:
        """Start a kernel on torch's current stream; tensors become addresses."""
        arrays = [self.driver.array(each) if isinstance(each, Tensor) else each for each in arguments]
        threads, size, early = how.get("threads", self.kernels.EIGHTS), how.get("size", 0), bool(how.get("early"))
        with torch.cuda.device(self.index):
            stream = torch.cuda.current_stream().cuda_stream
            self.driver.start(stream, early, kernel, grid, threads, size, arrays)

    def kind(self, tensor: Tensor) -> str:
        """What the kernels call a tensor's dtype."""
        return self.schedules.DTYPE_NAMES[tensor.dtype]

    def grid(self, x: Tensor, size: int) -> tuple[int, int, int]:
        """Of a kernel with eight of `size` columns for each thread."""
        return -(-size // (8 * self.kernels.EIGHTS)), len(x), 1

    def embed(self, tokens: Tensor, embedding: Any) -> Stream:
        """As that of TorchSteps."""
        if isinstance(embedding, QuantizedEmbedding):
            kind, arrays, size, group = table_arrays(embedding.table)
        else:
            table = embedding.weight
            kind, arrays, size, group = self.kind(table), (table, tokens, tokens), table.shape[1], table.shape[1]
        grid = self.grid(tokens, size)
        x = torch.empty(len(tokens), size, device=tokens.device)
        stream = Stream(x, torch.empty(len(tokens), grid[0], device=tokens.device))
        self.start(self.kernels.embed(kind), grid, tokens, *arrays, stream.x, stream.squares, size, group)
        return stream

    def added(self, y: Tensor, stream: Stream) -> None:
        """As that of TorchSteps, in place."""
        grid = self.grid(y, y.shape[1])
        stream.squares = torch.empty(len(y), grid[0], device=y.device)
        self.start(self.kernels.added(self.kind(y)), grid, y, stream.x, stream.squares, y.shape[1])

    def normed(self, stream: Stream, weight: Tensor) -> Tensor:
        """As that of TorchSteps."""
        y = torch.empty(stream.x.shape, dtype=self.dtype, device=weight.device)
        numbers = stream.x.shape[1], stream.squares.shape[1], self.eps
        grid = self.grid(y, y.shape[1])
        self.start(self.kernels.normed(self.kind(y)), grid, stream.x, weight, stream.squares, y, *numbers)
        return y

    def gated(self, x: Tensor, activation: str) -> Tensor:
        """As that of TorchSteps."""
        size = x.shape[1] // 2
        y = torch.empty(len(x), size, dtype=x.dtype, device=x.device)
        self.start(self.kernels.gated(self.kind(x), activation), self.grid(x, size), x, y, size)
        return y

    def logits(self, x: Tensor, head: nn.Module) -> Tensor:
        """As that of TorchSteps; float32 for a table of 8 or 4 bits."""
        if not isinstance(head, QuantizedHead):
            return head(x)
        kind, arrays, size, group = table_arrays(head.table)
        vectors, count = self.schedules.vectors_of(len(x)), len(head.table.codes)
        y = torch.empty(len(x), count, device=x.device)
        grid = -(-count // (self.kernels.WARPS * self.kernels.LOGIT_ROWS)), -(-len(x) // vectors), 1
        self.start(self.kernels.logits(self.kind(x), kind, vectors), grid, x, *arrays, y, len(x), count, size, group)
        return y

    def made(self, projected: Tensor, keys: Tensor, norms: HeadNorms | None) -> Any:
        """What the kernel of `attend` is made for; sixteen warps where the registers suffice, as the tests see."""
        warps = 16 if self.early and self.group == 1 and self.heads.size > 64 and not norms else 8
        kinds = self.kind(projected), self.kind(keys)
        return self.kernels.Attention(*kinds, self.heads.size, self.group, warps, norms is not None)

    def attend(
        self,
        projected: Tensor,
        keys: Tensor,
        values: Tensor,
        positions: Tensor,
        angles: Tensor,
        norms: HeadNorms | None,
        whole: bool = True,
    ) -> Tensor:
        """As that of TorchSteps."""
        rows, kv_heads, capacity, size = keys.shape
        made = self.made(projected, keys, norms)
        blocks, at_once = 2 * self.driver.device_properties(self.index).multiprocessors, made.at_once(self.early)
        enough, shortest = -(-blocks // self.blocks), self.shortest
        whole = whole or min(blocks // self.blocks, capacity // (self.few_looks * at_once)) > self.most_shares
        if not whole:
            made, shortest, enough = made._replace(whole=False), at_once, min(enough, self.most_shares)
        splits = max(1, min(enough, -(-capacity // shortest)))
        left = torch.empty(rows, self.heads.heads, splits, size + self.kernels.SUMMARY, device=keys.device)
        y = torch.empty(rows, self.heads.heads * size, dtype=projected.dtype, device=keys.device) if whole else left
        cosine, sine = angles
        self.start(
            self.kernels.attend(made, self.early),
            (splits, kv_heads * self.chunks, rows),
            *(projected, keys, values, cosine, sine),
            *(norms or (cosine, cosine)),
            *(positions, y, left, self.tickets, kv_heads, self.chunks, capacity, shortest),
            *(size**-0.5, self.eps),
            threads=made.threads,
            size=made.shared_bytes,
            early=self.early,
        )
        return y

    def expansions(self, pair: Sequence[PackedLinear]) -> list[Expansion]:
        """As that of TorchSteps.

        Raises
        ------
        NotDecodableError
            If the ranks are too large for the GPU's shared memory.
        """
        found = [Expansion.of(layer, rotated) for layer, rotated in zip(pair, (True, False), strict=True)]
        self.tile("single", "half", 1, 1, found)
        return found

    def attend_latents(
        self,
        projected: Tensor,
        part: Tensor,
        spans: Sequence[Spans],
        cache: Sequence[Latents],
        expansions: Sequence[Expansion],
        positions: Tensor,
        angles: Tensor,
        whole: bool = True,
    ) -> Tensor:
        """As that of TorchSteps."""
        kernels, driver, (keys, values), heads = self.latent, self.driver, expansions, self.heads
        scales = tuple(driver.array(each.scale) for each in cache)
        words = tuple(driver.array(each.codes.view(torch.int32)) for each in cache)
        kind, kept = self.kind(projected), "byte" if cache[0].codes.dtype == torch.int8 else "half"
        rows, capacity = cache[0].codes.shape[:2]
        begins_1, begins_2 = (tuple(sum(of.begins[at : at + 1]) for of in spans) for at in (0, 1))
        self.start(
            kernels.latents(kept, self.early),
            (rows, 2, 1),
            *(part, tuple(driver.array(each.codes) for each in cache), scales, positions),
            *(begins_1, (keys.counts[0], values.counts[0]), begins_2, (keys.counts[1], values.counts[1])),
            *(*part.shape, capacity),
            threads=kernels.THREADS,
            early=self.early,
        )
        made, of_block = self.tile(kind, kept, rows, capacity, expansions)
        tiles, group, value_width = -(-capacity // made.tokens), heads.group, sum(values.counts)
        left = torch.empty(rows, heads.heads, tiles, value_width + self.kernels.SUMMARY, device=projected.device)
        shapes = keys.words.shape[1], keys.first_words, *keys.counts, value_width, capacity
        sizes, parts = (of_block * group, shapes[0], value_width), made.parts(of_block * group, value_width)
        self.start(
            kernels.attend_latents(made, self.early),
            (tiles, -(-heads.kv_heads // of_block), rows),
            *(projected, words, scales, keys.words, tuple(map(driver.array, keys.scales))),
            *(*angles, positions, left, heads.kv_heads, group, of_block, *shapes, parts),
            *(made.held(*sizes), heads.size**-0.5),
            threads=made.threads,
            size=made.shared_bytes(*sizes),
            early=self.early,
        )
        whole = whole or values.bias is not None
        if whole:
            y, shares = projected.new_empty(rows, heads.heads * heads.size), 1
        else:
            few = self.driver.device_properties(self.index).multiprocessors // (rows * heads.heads)
            shares = max(1, min(few, tiles // self.fewest_tiles, self.most_shares))
            y = torch.empty(rows, heads.heads, shares, heads.size + self.kernels.SUMMARY, device=projected.device)
        width = values.words.shape[1]
        self.start(
            kernels.expand_latents(self.kind(y), heads.size, whole, self.early),
            (heads.heads, rows, shares),
            *(left, values.words, tuple(map(driver.array, values.scales)), positions, y),
            *(group, made.tokens, tiles, width, values.first_words, *values.counts),
            threads=kernels.THREADS,
            size=kernels.expanding_bytes(tiles, width, value_width),
            early=self.early,
        )
        if values.bias is None:
            return y
        bias = values.bias.unflatten(0, (heads.kv_heads, -1)).repeat_interleave(heads.group, 0)
        return (y + bias.flatten()).to(y.dtype)

    def tile(self, kind: str, kept: str, rows: int, capacity: int, expansions: Sequence[Expansion]) -> tuple[Any, int]:
        """The largest tile that shared memory has room for, and so many heads of keys for a block as are quickest.

        Raises
        ------
        NotDecodableError
            If there is room for none.
        """
        kernels, (keys, values), heads = self.latent, expansions, self.heads
        device, width, value_width = self.driver.device_properties(self.index), keys.words.shape[1], sum(values.counts)
        for tokens in kernels.TILES if self.early else kernels.TILES[1:]:  # the registers suffice for
            made, times = kernels.LatentTile(kind, kept, heads.size, tokens, self.grouped), {}
            for turns in (1, 2, 4, 8, 16, 32):
                of_block = turns * made.heads_at_once
                size = made.shared_bytes(of_block * heads.group, width, value_width)
                if size <= device.shared_bytes:
                    at_once = device.multiprocessors * made.blocks_at_once(device.shared_bytes, size)
                    blocks = rows * -(-capacity // tokens) * -(-heads.kv_heads // of_block)
                    times[of_block] = -(-blocks // at_once) * (self.heads_worth + turns)
            if times:
                return made, min(times, key=times.__getitem__)
        wide = f"latents of {sum(keys.counts)} and {sum(values.counts)} entries do not fit the GPU's shared memory"
        raise NotDecodableError(f"{wide}; keep keys and values instead (kv_cache='full')")


def table_arrays(table: Table) -> tuple[str, tuple[Tensor, Tensor, Tensor], int, int]:
    """A table's kind for the kernels, its arrays, the size of a row, and of a group."""
    offset = table.scale if table.offset is None else table.offset
    return str(table.bits), (table.codes, table.scale, offset), table.size, table.group
