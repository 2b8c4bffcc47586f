"""Run `DecoderOps` by the CUDA kernels of kernels/cuda_decode.py and kernels/cuda_latent_attention.py."""

# ruff: noqa: D102 (`DecoderOps` documents the methods)

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..kv_cache import Latents
from ..models.embeddings import EmbeddingTable, QuantizedEmbedding, QuantizedHead
from ..models.layers import PackedLinear
from .architecture import NotDecodableError
from .ops import DecoderOps, HeadNorms, Heads, ResidualStream, Spans, UpProjection

HEAD_SIZES = (64, 128, 256)  # entries of a head that the attention kernels are written for


class CudaOps(DecoderOps):
    """Implement `DecoderOps` by CUDA kernels, for float16 caches.

    Parameters
    ----------
    heads, dtype, eps
        See `DecoderOps`; dtype is float16.
    batch : int
        Rows of every call.
    device : torch.device

    Raises
    ------
    NotDecodableError
        If the GPU cannot run the kernels, the dtype is not float16, or heads have another size than HEAD_SIZES.
    """

    # Fewest tokens of a split of a context (split-KV), when a step has many blocks or few. Combining splits takes time,
    # which pays sooner where few blocks would leave the GPU idle.
    min_split_many, min_split_few = 256, 64
    few_blocks = 32
    # Most split-KV partials per head that the output projection combines, since each is one more number to read for
    # every entry of its input. If more splits could each run `few_rounds` rounds of `AttentionConfig.tokens_in_flight`,
    # `attend` uses them and combines them itself.
    max_partials, few_rounds = 8, 4
    # Fixed cost of a tile of latents, in units of the time to up-project one group of key heads
    tile_overhead = 2
    min_split_tiles = 32  # fewest tiles of a split of `up_project_values`

    def __init__(self, heads: Heads, dtype: torch.dtype, eps: float, batch: int, device: torch.device):
        from ..kernels import dispatch

        index = device.index or 0
        if dispatch.cuda_kernels(index) is None:
            raise NotDecodableError("the CUDA kernels cannot be used")
        if dtype != torch.float16:
            raise NotDecodableError(f"the CUDA kernels keep keys and values in float16, not {dtype}")
        if heads.size not in HEAD_SIZES:
            raise NotDecodableError(f"its heads have {heads.size} entries, not 64, 128 or 256")
        from ..kernels import cuda_decode, cuda_driver, cuda_latent_attention, cuda_schedule

        self.kernels, self.latent = cuda_decode, cuda_latent_attention
        self.driver, self.schedules = cuda_driver, cuda_schedule
        self.heads, self.dtype, self.eps, self.index = heads, dtype, eps, index
        capability = torch.cuda.get_device_capability(index)
        self.early = capability >= cuda_driver.PDL_CAPABILITY
        self.grouped = capability == cuda_schedule.WGMMA_CAPABILITY
        most = 8 if self.early else 2  # query heads of a block for which the registers suffice
        self.group = next(count for count in range(min(heads.group, most), 0, -1) if heads.group % count == 0)
        self.chunks = heads.group // self.group
        self.blocks = batch * heads.kv_heads * self.chunks  # blocks of `attend` without splits
        self.min_split = self.min_split_few if self.blocks < self.few_blocks else self.min_split_many
        self.arrivals = torch.zeros(self.blocks, dtype=torch.int32, device=device)

    def start(self, kernel: Any, grid: tuple[int, int, int], *arguments: Any, **how: int) -> None:
        """Launch a kernel on torch's current stream; tensors become addresses."""
        arrays = [self.driver.array(each) if isinstance(each, Tensor) else each for each in arguments]
        threads, size, early = how.get("threads", self.kernels.THREADS), how.get("size", 0), bool(how.get("early"))
        with torch.cuda.device(self.index):
            stream = torch.cuda.current_stream().cuda_stream
            self.driver.start(stream, early, kernel, grid, threads, size, arrays)

    def kernel_dtype(self, tensor: Tensor) -> str:
        """Return the kernels' name of a tensor's dtype."""
        return self.schedules.DTYPE_NAMES[tensor.dtype]

    def grid(self, x: Tensor, size: int) -> tuple[int, int, int]:
        """Compute the grid of an element-wise kernel over the rows of x, with `size` columns each."""
        return -(-size // (8 * self.kernels.THREADS)), len(x), 1

    def embed(self, tokens: Tensor, embedding: Any) -> ResidualStream:
        if isinstance(embedding, QuantizedEmbedding):
            table, arrays, size, group = table_arrays(embedding.table)
        else:
            weight = embedding.weight
            table, arrays, size = self.kernel_dtype(weight), (weight, tokens, tokens), weight.shape[1]
            group = size
        grid = self.grid(tokens, size)
        x = torch.empty(len(tokens), size, device=tokens.device)
        stream = ResidualStream(x, torch.empty(len(tokens), grid[0], device=tokens.device))
        self.start(self.kernels.embed(table), grid, tokens, *arrays, stream.x, stream.squares, size, group)
        return stream

    def add(self, y: Tensor, stream: ResidualStream) -> None:
        grid = self.grid(y, y.shape[1])
        stream.squares = torch.empty(len(y), grid[0], device=y.device)
        self.start(self.kernels.add(self.kernel_dtype(y)), grid, y, stream.x, stream.squares, y.shape[1])

    def rms_norm(self, stream: ResidualStream, weight: Tensor) -> Tensor:
        y = torch.empty(stream.x.shape, dtype=self.dtype, device=weight.device)
        numbers = stream.x.shape[1], stream.squares.shape[1], self.eps
        kernel = self.kernels.rms_norm(self.kernel_dtype(y))
        self.start(kernel, self.grid(y, y.shape[1]), stream.x, weight, stream.squares, y, *numbers)
        return y

    def swiglu(self, x: Tensor) -> Tensor:
        size = x.shape[1] // 2
        y = torch.empty(len(x), size, dtype=x.dtype, device=x.device)
        self.start(self.kernels.swiglu(self.kernel_dtype(x)), self.grid(x, size), x, y, size)
        return y

    def logits(self, x: Tensor, head: nn.Module) -> Tensor:
        """Compute logits; a quantized head's are float32, and another head runs as a module."""
        if not isinstance(head, QuantizedHead):
            return head(x)
        table, arrays, size, group = table_arrays(head.table)
        vectors, count = self.schedules.vectors_of(len(x)), len(head.table.codes)
        y = torch.empty(len(x), count, device=x.device)
        grid = -(-count // (self.kernels.WARPS * self.kernels.LOGIT_ROWS)), -(-len(x) // vectors), 1
        kernel = self.kernels.logits(self.kernel_dtype(x), table, vectors)
        self.start(kernel, grid, x, *arrays, y, len(x), count, size, group)
        return y

    def attention_config(self, projected: Tensor, norms: HeadNorms | None) -> Any:
        """Choose the `attend` kernel: 16 warps a block where registers suffice (compile tests check it), else 8."""
        warps = 16 if self.early and self.group == 1 and self.heads.size > 64 and not norms else 8
        dtype = self.kernel_dtype(projected)
        return self.kernels.AttentionConfig(dtype, self.heads.size, self.group, warps, norms is not None)

    def split_context(self, config: Any, capacity: int, combine: bool) -> tuple[Any, int, int]:
        """Choose how blocks share a context, and who combines their partials.

        Returns
        -------
        config : AttentionConfig
        min_split : int
            Fewest tokens of a split.
        splits : int
            Most splits of a context. The kernel uses as many of them as the position needs.
        """
        in_flight = config.tokens_in_flight(self.early)
        most_blocks, min_split = 2 * self.driver.device_properties(self.index).multiprocessors, self.min_split
        enough = -(-most_blocks // self.blocks)
        if not combine:
            wanted = min(most_blocks // self.blocks, capacity // (self.few_rounds * in_flight))
            combine = wanted > self.max_partials
        if not combine:
            config, min_split, enough = config._replace(combine=False), in_flight, min(enough, self.max_partials)
        return config, min_split, max(1, min(enough, -(-capacity // min_split)))

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
        rows, kv_heads, capacity, size = keys.shape
        config, min_split, splits = self.split_context(self.attention_config(projected, norms), capacity, combine)
        partials = torch.empty(rows, self.heads.heads, splits, size + self.kernels.SUMMARY, device=keys.device)
        y = partials
        if config.combine:
            y = torch.empty(rows, self.heads.heads * size, dtype=projected.dtype, device=keys.device)
        cosine, sine = angles
        self.start(
            self.kernels.attend(config, self.early),
            (splits, kv_heads * self.chunks, rows),
            *(projected, keys, values, cosine, sine),
            *(norms or (cosine, cosine)),
            *(positions, y, partials, self.arrivals, kv_heads, self.chunks, capacity, min_split),
            *(size**-0.5, self.eps),
            threads=config.threads,
            size=config.shared_bytes,
            early=self.early,
        )
        return y

    def up_projections(self, pair: Sequence[PackedLinear]) -> list[UpProjection]:
        found = [UpProjection.of(layer, keys) for layer, keys in zip(pair, (True, False), strict=True)]
        self.choose_tile("single", "half", 1, 1, found)
        return found

    def attend_latents(
        self,
        projected: Tensor,
        part: Tensor,
        spans: Sequence[Spans],
        cache: Sequence[Latents],
        up: Sequence[UpProjection],
        positions: Tensor,
        angles: Tensor,
        combine: bool = True,
    ) -> Tensor:
        self.store_latents(part, spans, cache, up, positions)
        partials, tokens = self.attend_tiles(projected, cache, up, positions, angles)
        return self.up_project_values(projected, partials, tokens, up[1], positions, combine)

    def store_latents(
        self,
        part: Tensor,
        spans: Sequence[Spans],
        cache: Sequence[Latents],
        up: Sequence[UpProjection],
        positions: Tensor,
    ) -> None:
        """Append the new tokens' latents to the cache; see `DecoderOps.attend_latents`."""
        array, (keys, values) = self.driver.array, up
        rows, capacity = cache[0].codes.shape[:2]
        begins_1, begins_2 = (tuple(sum(each.begins[at : at + 1]) for each in spans) for at in (0, 1))
        self.start(
            self.latent.store_latents(stored_dtype(cache), self.early),
            (rows, 2, 1),
            *(part, tuple(array(each.codes) for each in cache), tuple(array(each.scale) for each in cache), positions),
            *(begins_1, (keys.counts[0], values.counts[0]), begins_2, (keys.counts[1], values.counts[1])),
            *(*part.shape, capacity),
            threads=self.latent.THREADS,
            early=self.early,
        )

    def attend_tiles(
        self,
        projected: Tensor,
        cache: Sequence[Latents],
        up: Sequence[UpProjection],
        positions: Tensor,
        angles: Tensor,
    ) -> tuple[Tensor, int]:
        """Sum value latents by softmax weights, tile by tile.

        Returns
        -------
        partials : (rows, heads, tiles, padded width + SUMMARY) float32 tensor
        tokens : int
            Tokens of a tile.
        """
        array, (keys, values), heads = self.driver.array, up, self.heads
        rows, capacity = cache[0].codes.shape[:2]
        dtype = self.kernel_dtype(projected)
        config, of_block = self.choose_tile(dtype, stored_dtype(cache), rows, capacity, up)
        tiles, value_width = -(-capacity // config.tokens), sum(values.counts)
        summary = self.kernels.SUMMARY
        partials = torch.empty(rows, heads.heads, tiles, value_width + summary, device=projected.device)
        width, queries = keys.words.shape[1], of_block * heads.group  # query heads of a block
        shapes = width, keys.first_words, *keys.counts, value_width, capacity
        self.start(
            self.latent.attend_latents(config, self.early),
            (tiles, -(-heads.kv_heads // of_block), rows),
            *(projected, tuple(array(each.codes.view(torch.int32)) for each in cache)),
            *(tuple(array(each.scale) for each in cache), keys.words, tuple(map(array, keys.scales))),
            *(*angles, positions, partials, heads.kv_heads, heads.group, of_block, *shapes),
            *(config.token_parts(queries, value_width), config.reused_words(queries, width, value_width)),
            heads.size**-0.5,
            threads=config.threads,
            size=config.shared_bytes(queries, width, value_width),
            early=self.early,
        )
        return partials, config.tokens

    def up_project_values(
        self, projected: Tensor, partials: Tensor, tokens: int, up: UpProjection, positions: Tensor, combine: bool
    ) -> Tensor:
        """Combine tiles of `tokens` tokens and up-project their sums; returns what `attend_latents` returns."""
        heads, (rows, _, tiles, _) = self.heads, partials.shape
        combine = combine or up.bias is not None
        if combine:
            y, splits = projected.new_empty(rows, heads.heads * heads.size), 1
        else:
            enough = self.driver.device_properties(self.index).multiprocessors // (rows * heads.heads)
            splits = max(1, min(enough, tiles // self.min_split_tiles, self.max_partials))
            y = torch.empty(rows, heads.heads, splits, heads.size + self.kernels.SUMMARY, device=projected.device)
        width = up.words.shape[1]
        self.start(
            self.latent.up_project_values(self.kernel_dtype(y), heads.size, combine, self.early),
            (heads.heads, rows, splits),
            *(partials, up.words, tuple(map(self.driver.array, up.scales)), positions, y),
            *(heads.group, tokens, tiles, width, up.first_words, *up.counts),
            threads=self.latent.THREADS,
            size=self.latent.up_projection_bytes(tiles, width, sum(up.counts)),
            early=self.early,
        )
        if up.bias is None:
            return y
        bias = up.bias.unflatten(0, (heads.kv_heads, -1)).repeat_interleave(heads.group, 0)
        return (y + bias.flatten()).to(y.dtype)

    def choose_tile(
        self, dtype: str, cache_dtype: str, rows: int, capacity: int, up: Sequence[UpProjection]
    ) -> tuple[Any, int]:
        """Choose the largest tile that fits shared memory, and the fastest number of key heads for a block.

        The time is modelled as waves of blocks times the work of a block.

        Returns
        -------
        config : LatentTile
        of_block : int
            Key heads of a block.

        Raises
        ------
        NotDecodableError
            If no tile fits.
        """
        kernels, (keys, values), heads = self.latent, up, self.heads
        device, width, value_width = self.driver.device_properties(self.index), keys.words.shape[1], sum(values.counts)
        for tokens in kernels.TILE_TOKENS if self.early else kernels.TILE_TOKENS[1:]:  # limited by registers
            config, times = kernels.LatentTile(dtype, cache_dtype, heads.size, tokens, self.grouped), {}
            for turns in (1, 2, 4, 8, 16, 32):
                of_block = turns * config.heads_at_once
                size = config.shared_bytes(of_block * heads.group, width, value_width)
                if size <= device.shared_bytes:
                    at_once = device.multiprocessors * config.blocks_per_sm(device.shared_bytes, size)
                    blocks = rows * -(-capacity // tokens) * -(-heads.kv_heads // of_block)
                    times[of_block] = -(-blocks // at_once) * (self.tile_overhead + turns)
            if times:
                return config, min(times, key=times.__getitem__)
        wide = f"latents of {sum(keys.counts)} and {sum(values.counts)} entries do not fit the GPU's shared memory"
        raise NotDecodableError(f"{wide}; keep keys and values instead (kv_cache='full')")


def stored_dtype(cache: Sequence[Latents]) -> str:
    """Return the kernels' name of the type in which a cache stores latents."""
    return "byte" if cache[0].codes.dtype == torch.int8 else "half"


def table_arrays(table: EmbeddingTable) -> tuple[str, tuple[Tensor, Tensor, Tensor], int, int]:
    """Return a table's type in `cuda_decode.TABLES`, its arrays, and the sizes of a row and of a group."""
    offset = table.scale if table.offset is None else table.offset
    return str(table.bits), (table.codes, table.scale, offset), table.size, table.group
