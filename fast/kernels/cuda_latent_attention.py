"""Attend to a latent key-value cache on NVIDIA GPUs, in Numba CUDA, without storing keys or values in memory.

A latent cache keeps what the first stage of k_proj and v_proj computes of each token, t = ell * V_sign^T (g * x), rank
numbers instead of d_kv (kv_cache.py). DeepSeek calls this multi-head latent attention (MLA). Three kernels:

    store_latents       append a token's latents to the cache, in float16 or int8
    attend_latents      scores of a tile of tokens, and the weighted sum of their value latents
    up_project_values   combine the tiles, and multiply the sum by U of v_proj

Keys. RoPE stands between the up-projection k = h * (U_sign t) and the score, so U cannot move to the query's side. (It
can in MLA, which keeps the entries that rotate apart.) A block of `attend_latents` has a tile of tokens, and its warps
up-project their keys on tensor cores as `cuda_gemm.products` multiplies: signs of U become +h or -h in registers, and t
comes from shared memory. A lane holds the same entries of the lower and upper half of a key, for the same tokens, of
one head after the other. So the cosines and sines of RoPE stay in its registers, and so do the keys, until their
product with the query is all that remains.

Values. sum_t p_t (U t_t) = U (sum_t p_t t_t): the tile's softmax weights first sum the latents, and the sum is
up-projected once per head and split ("weight absorption" in MLA).

Tiles are split-KV partials: each holds its largest score, its sum of weights and its weighted latents, and combines
with others by the rule of online softmax (cuda_decode.py). Signs of U are double buffered in registers: the words of
the next product load while the current one runs.

Bytes per token: each step reads the latents of every cached token once per group of heads. In Llama-2-7B's shape at 0.1
bits they are 776 bytes a token and layer in float16 and 392 in int8, where full keys and values are 16384. Measured
there on an H100, attention of one layer, us (book/results/cuda_cache.json):

    context                              1024     8192     32768
    full cache                           11.9     47.8     175.9
    latent                               25.8     61.2     208.2
    latent-int8                          26.8     61.5     206.3
    bandwidth / copy, latent             0.01     0.04     0.05

So memory bandwidth is not the limit. The up-projection of keys is: 2 * rank * d_kv operations a token, 1.6 million.
"""

# The Python stand-ins of cuda.threadIdx and similar names have other types than Numba gives them.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportOperatorIssue=false
# pyright: reportGeneralTypeIssues=false, reportIndexIssue=false, reportOptionalSubscript=false

from functools import partial
from typing import Any, NamedTuple

from numba import cuda, float32, int32, types, uint8, uint32

from .cuda_decode import (
    BYTES,
    INTEGERS,
    LOWEST,
    block_sum,
    bytes_to_floats,
    halves_to_floats,
    map_tuple,
    store8,
    warp_reduce_sum,
)
from .cuda_elements import (
    AT,
    ELEMENTS,
    HALVES,
    ROUND,
    SIGNATURES,
    SINGLES,
    WORDS,
    add4,
    add8,
    half_at,
    kernel_factory,
    load2,
    load4,
    scale4,
    scale8,
    warp_sum,
    zeros8,
)
from .cuda_gemm import two_halves
from .cuda_gemv import SUMMARY
from .cuda_intrinsics import (
    as_bits,
    as_float,
    cp_async_4,
    cp_async_16,
    cp_async_wait_all,
    exponential,
    griddep_launch_dependents,
    griddep_wait,
    larger,
    round_to_half,
    store4,
)
from .cuda_mma import fence_async_proxy, store_scores, warp_mma, warpgroup_mma, zero_accumulators

WARPS = 16  # warps per block of the first and last kernel
THREADS = 32 * WARPS
TILE_WARPS = 4  # fewest warps per block of `attend_latents`
THREADS_PER_SM = 256  # threads of `attend_latents` for which a multiprocessor has enough registers
TILE_TOKENS = (64, 32, 16, 8)  # tile sizes; the largest that fits shared memory is used
LOADS_IN_FLIGHT, TILES_IN_FLIGHT = 4, 8  # independent loads of a thread: of latents and queries, and of tiles
PAIR_WORDS = 32  # words of shared memory for the 64 float16 latents that belong to two words of signs


@cuda.jit(device=True, forceinline=True)
def warp_reduce_max(value):
    """Reduce a float32 to its maximum over a warp, the same in every lane."""
    for distance in (16, 8, 4, 2, 1):
        value = larger(value, cuda.shfl_xor_sync(0xFFFFFFFF, value, distance))
    return value


@cuda.jit(device=True, forceinline=True)
def block_max(value, shared):
    """Reduce a float32 to its maximum over a block, the same in every thread."""
    value, thread = warp_reduce_max(value), int32(cuda.threadIdx.x)
    if thread & 31 == 0:
        shared[uint32(thread >> 5)] = value
    cuda.syncthreads()
    for warp in range(WARPS):
        value = larger(value, shared[uint32(warp)])
    return value


@cuda.jit(device=True, forceinline=True)
def round_to_int8(value):
    """Round a float32 to the nearest integer; return its lowest byte.

    A float32 between 2^23 and 2^24 is an integer, and its lowest mantissa bits are that integer's.
    """
    return uint8(as_bits(value + float32(12582912.0)) & uint32(0xFF))  # 1.5 * 2^23


@cuda.jit(device=True, forceinline=True)
def start_half_copy(signal, target, codes, eighth):
    """Begin an asynchronous copy of eight float16 latents to shared memory (cp.async)."""
    cp_async_16(signal, uint32(target), codes, uint32(4 * eighth))
    return uint32(0), uint32(0)


@cuda.jit(device=True, forceinline=True)
def finish_half_copy(signal, target, words):
    """Do nothing: `start_half_copy` has written to shared memory already."""


@cuda.jit(device=True, forceinline=True)
def start_int8_load(signal, target, codes, eighth):
    """Load eight int8 latents into registers."""
    return load2(codes, uint32(2 * eighth))


@cuda.jit(device=True, forceinline=True)
def finish_int8_load(signal, target, words):
    """Store eight int8 latents in shared memory as float16."""
    (a, b, c, d), (e, f, g, h) = bytes_to_floats(words[0]), bytes_to_floats(words[1])
    store4(signal, uint32(target), two_halves(a, b), two_halves(c, d), two_halves(e, f), two_halves(g, h))


class CacheFormat(NamedTuple):
    """How a cache stores latents.

    Attributes
    ----------
    rounded : device function
        Rounds a latent, divided by its token's scale, to the stored type.
    array : type
    largest : float
        The stored value of a token's largest magnitude.
    start_load, finish_load : device functions
        Bring eight latents into shared memory as float16. The second takes what the first returned, so that a thread
        can start several loads before it waits for one.
    """

    rounded: Any
    array: Any
    largest: float
    start_load: Any
    finish_load: Any


#: Stored type -> format.
CACHE_FORMATS = {
    "half": CacheFormat(round_to_half, HALVES, 1.0, start_half_copy, finish_half_copy),
    "byte": CacheFormat(round_to_int8, BYTES, 127.0, start_int8_load, finish_int8_load),
}
PAIR = partial(types.UniTuple, count=2)


@kernel_factory
def store_latents(cache_dtype: str, early: bool) -> Any:
    """Make the kernel that appends a token's latents to a cache of a type in CACHE_FORMATS.

    The scale of a token is its largest magnitude / `CacheFormat.largest`.
    """
    rounded, array, largest, _, _ = CACHE_FORMATS[cache_dtype]

    @cuda.jit(device=True, forceinline=True)
    def latent(part, place, stride, parts, item, begin_1, count_1, begin_2):
        """Sum a latent over the split-K partials that the projection's first kernel left."""
        at = int32(place + (int32(begin_1 + item) if item < count_1 else int32(begin_2 + int32(item - count_1))))
        total, number = float32(0), int32(0)
        while number < parts:
            total += part[uint32(at)]
            number, at = int32(number + 1), int32(at + stride)
        return total

    @cuda.jit
    def kernel(part, codes, scales, positions, begins_1, counts_1, begins_2, counts_2, parts, rows, columns, capacity):
        """Grid (sequences, 2): keys and values.

        part : (parts, rows, columns) float32
            Latents of the new tokens, to be summed over parts; a layer's paths begin at two columns of each row.
        codes, scales : pairs of (sequences, capacity, width) and (sequences, capacity)
        positions : (sequences,) int64
            Tokens in the cache, which is where the new one goes.
        """
        shared = cuda.shared.array(WARPS, float32)
        row, which, thread = int32(cuda.blockIdx.x), int32(cuda.blockIdx.y), int32(cuda.threadIdx.x)
        begin_1, count_1, begin_2 = int32(begins_1[which]), int32(counts_1[which]), int32(begins_2[which])
        place, stride, width = int32(row * columns), int32(rows * columns), int32(count_1 + counts_2[which])
        target = int32(int32(row * capacity) + int32(positions[row]))
        if early:
            griddep_wait()
            griddep_launch_dependents()
        # the scale: the largest magnitude becomes `largest`
        top, item = float32(0), thread
        while item < width:
            top = larger(top, abs(latent(part, place, stride, parts, item, begin_1, count_1, begin_2)))
            item = int32(item + THREADS)
        scale = block_max(top, shared) / float32(largest)
        scale = float32(1) if scale == float32(0) else scale
        item = thread
        while item < width:
            value = latent(part, place, stride, parts, item, begin_1, count_1, begin_2)
            codes[which][uint32(int32(target * width) + item)] = rounded(value / scale)
            item = int32(item + THREADS)
        if thread == 0:
            scales[which][uint32(target)] = scale

    numbers = PAIR(types.int32)
    SIGNATURES[kernel] = types.void(
        SINGLES, PAIR(array), PAIR(SINGLES), INTEGERS, numbers, numbers, numbers, numbers, *[types.int32] * 4
    )
    return kernel


class LatentTile(NamedTuple):
    """Parameters that an `attend_latents` kernel is compiled for.

    Attributes
    ----------
    dtype : str
        Type of the projections: a key of cuda_elements.AT.
    cache_dtype : str
        A key of CACHE_FORMATS.
    size : int
        Entries of a head: 64, 128 or 256.
    tokens : int
        Tokens of a tile, one of TILE_TOKENS.
    grouped : bool
        Whether groups of four warps multiply together (wgmma, see `cuda_gemm.products`).
    """

    dtype: str
    cache_dtype: str
    size: int
    tokens: int
    grouped: bool

    @property
    def warps_of_head(self) -> int:
        """Warps that share a key: each has 16 entries of both of its halves."""
        return self.size // 32

    @property
    def heads_at_once(self) -> int:
        """Key heads that a block up-projects at the same time."""
        return self.warps // self.warps_of_head

    @property
    def warps(self) -> int:
        """Warps of a block."""
        return max(TILE_WARPS, self.warps_of_head)

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return 32 * self.warps

    def token_parts(self, heads: int, value_width: int) -> int:
        """Count the parts into which a block with `heads` query heads divides the tokens of its sum of latents."""
        return max(1, self.threads // (value_width // 8 * -(-heads // 4)))

    def reused_words(self, heads: int, width: int, value_width: int) -> int:
        """Count the words of shared memory for key latents, queries and scores, and later for sums of latents.

        Parameters
        ----------
        heads : int
            Query heads of a block.
        width : int
            Words of signs in a row of U.
        value_width : int
            Value latents of a token.
        """
        first = self.tokens * (width // 2 * PAIR_WORDS + self.warps_of_head * heads) + heads * self.size
        return max(first, self.token_parts(heads, value_width) * heads * value_width)

    def shared_bytes(self, heads: int, width: int, value_width: int) -> int:
        """Compute a block's shared memory in bytes: `reused_words`, then value latents, weights and scales."""
        later = -(-value_width // 64) * PAIR_WORDS + heads + 2
        return 4 * (self.reused_words(heads, width, value_width) + self.tokens * later)

    def blocks_per_sm(self, shared_bytes: int, of_block: int) -> int:
        """Compute the occupancy: blocks of `of_block` bytes of shared memory that a multiprocessor runs at once."""
        return max(1, min(THREADS_PER_SM // self.threads, shared_bytes // of_block))


@kernel_factory
def attend_latents(config: LatentTile, early: bool) -> Any:
    """Make the kernel for scores and weighted sums of latents of a tile; the top of this file explains it."""
    dtype, cache_dtype, size, tokens, grouped = config
    cache_format = CACHE_FORMATS[cache_dtype]
    at_place, start_load, finish_load = AT[dtype], cache_format.start_load, cache_format.finish_load
    half, warps, threads, across, pair_words = size // 2, config.warps, config.threads, tokens // 8, tokens * PAIR_WORDS
    warps_of_head, heads_at_once = config.warps_of_head, config.heads_at_once
    mine, sums_of_half = tokens // 4, 4 * across  # tokens, and sums of one half of a key, of a lane
    first_half, second_half = (warp_mma(2, across, which, 8 * PAIR_WORDS) for which in range(2))
    both_halves, no_keys, score_keys = warpgroup_mma(across), zero_accumulators(2 * sums_of_half), store_scores(across)
    angle_numbers = tuple(range(2 * mine))
    at_once = min(LOADS_IN_FLIGHT, tokens // warps)
    token_numbers, query_numbers = tuple(range(at_once)), tuple(range(LOADS_IN_FLIGHT))
    heads_together = threads // half  # whose queries all threads read at once

    @cuda.jit(device=True, forceinline=True)
    def load_angle(number, rest):
        """Load a cosine or sine of one of a lane's tokens, for one of its two rows."""
        table, place, first, last = rest
        token = min(int32(first + int32(8 * (number >> 2) + ((number >> 1) & 1))), last)
        return table[uint32(int32(token * half) + int32(place + 8 * (number & 1)))]

    load_angles = map_tuple(load_angle, 2 * mine)

    @cuda.jit(device=True, forceinline=True)
    def swizzle(target, token, chunk):
        """Compute where eight latents of a token go: an XOR swizzle of each pair's chunks avoids bank conflicts."""
        return int32(int32(target + int32(token * PAIR_WORDS)) + int32(int32(chunk ^ int32(token & 7)) << 2))

    @cuda.jit(device=True, forceinline=True)
    def start_token(number, rest):
        """Begin to load eight latents of one of the tokens in flight."""
        signal, target, chunk, token, codes, base, last, width, column = rest
        token = int32(token + warps * number)
        eighth = int32(int32(base + min(token, last)) * width + column)
        return number, start_load(signal, swizzle(target, token, chunk), codes, eighth)

    @cuda.jit(device=True, forceinline=True)
    def finish_token(item, rest):
        """Finish loading eight latents of one of the tokens in flight."""
        signal, target, chunk, token = rest
        number, words = item
        finish_load(signal, swizzle(target, int32(token + warps * number), chunk), words)
        return number

    start_tokens, finish_tokens = map_tuple(start_token, at_once), map_tuple(finish_token, at_once)

    @cuda.jit(device=True, forceinline=True)
    def load_latents(signal, held, codes, base, last, chunks, first_chunks, count_1, count_2, warp, lane):
        """Load a tile's latents into shared memory, grouped by the pair of words of signs that they belong to.

        A token has `chunks` chunks of eight latents, of which the first path has `first_chunks`. Each path is padded
        with zeros to whole pairs of words.
        """
        width, item = int32(int32(count_1 + count_2) >> 3), lane
        while item < chunks:
            within = item if item < first_chunks else int32(item - first_chunks)
            limit = count_1 if item < first_chunks else count_2
            column = within if item < first_chunks else int32(within + int32(count_1 >> 3))
            target, chunk, token = int32(held + int32(item >> 3) * pair_words), int32(item & 7), warp
            while token < tokens:
                if int32(within << 3) < limit:
                    read = start_tokens(token_numbers, (signal, target, chunk, token, codes, base, last, width, column))
                    finish_tokens(read, (signal, target, chunk, token))
                else:
                    for number in range(at_once):
                        place = uint32(swizzle(target, int32(token + warps * number), chunk))
                        store4(signal, place, uint32(0), uint32(0), uint32(0), uint32(0))
                token = int32(token + warps * at_once)
            item = int32(item + 32)

    @cuda.jit(device=True, forceinline=True)
    def load_query(number, rest):
        """Load an entry of both halves of one of the queries in flight."""
        projected, place, head, last = rest
        at = int32(place + int32(min(int32(head + heads_together * number), last) * size))
        return at_place(projected, at), at_place(projected, int32(at + half))

    load_queries = map_tuple(load_query, LOADS_IN_FLIGHT)

    @cuda.jit(device=True, forceinline=True)
    def store_queries(shared, held, projected, cosine, sine, position, place, heads, factor, thread):
        """Apply RoPE and the softmax scale to the queries, and store them in shared memory."""
        entry, head = int32(thread & (half - 1)), int32(thread // half)
        turn = uint32(int32(position * half) + entry)
        c, s = cosine[turn] * factor, sine[turn] * factor
        while head < heads:
            read = load_queries(query_numbers, (projected, int32(place + entry), head, int32(heads - 1)))
            for number in range(LOADS_IN_FLIGHT):
                other = int32(head + heads_together * number)
                if other < heads:
                    at, (low, high) = int32(held + int32(other * size) + entry), read[number]
                    shared[uint32(at)], shared[uint32(at + half)] = low * c - high * s, high * c + low * s
            head = int32(head + heads_together * LOADS_IN_FLIGHT)

    @cuda.jit(device=True, forceinline=True)
    def load_signs(words, row, width, pair):
        """Load two words of signs of each of a lane's four rows of U."""
        at = int32(int32(row * width) + int32(2 * pair))
        a, b = load2(words, uint32(at))
        c, d = load2(words, uint32(at + int32(8 * width)))
        e, f = load2(words, uint32(at + int32(half * width)))
        g, h = load2(words, uint32(at + int32((half + 8) * width)))
        return a, b, c, d, e, f, g, h

    @cuda.jit(device=True, forceinline=True)
    def load_scale_twice(scales, row):
        """Load the scale h of a row and repeat it in both halves of a word."""
        bits = uint32(scales[uint32(row)])
        return uint32(bits | bits << uint32(16))

    @cuda.jit(device=True, forceinline=True)
    def load_scales(scales, row):
        """Load the scales h of a lane's four rows of U."""
        a, b = load_scale_twice(scales, row), load_scale_twice(scales, int32(row + 8))
        return a, b, load_scale_twice(scales, int32(row + half)), load_scale_twice(scales, int32(row + half + 8))

    @cuda.jit(device=True, forceinline=True)
    def multiply_mma(sums, signs, scales, signal, place, lane):
        """Add a pair's products to both halves of a key, a warp at a time (mma)."""
        row, chunk = int32(lane & 7), int32(lane >> 3)
        sums = first_half(sums, signs, scales, signal, uint32(swizzle(place, row, chunk)), lane)
        return second_half(sums, signs, scales, signal, uint32(swizzle(place, row, int32(chunk + 4))), lane)

    @cuda.jit(device=True, forceinline=True)
    def multiply_wgmma(sums, signs, scales, signal, place, lane):
        """Add a pair's products to both halves of a key, four warps at a time (wgmma)."""
        low = both_halves(sums[:sums_of_half], signs[:4], scales[:2], signal, uint32(place), lane)
        high = both_halves(sums[sums_of_half:], signs[4:], scales[2:], signal, uint32(place), lane)
        return low + high

    multiply = multiply_wgmma if grouped else multiply_mma

    @cuda.jit(device=True, forceinline=True)
    def query_entries(shared, place):
        """Load a query's entries for a lane's four rows."""
        at = uint32(place)
        return shared[at], shared[at + 8], shared[at + half], shared[at + half + 8]

    @cuda.jit
    def kernel(
        projected, codes, scales, words, row_scales, cosine, sine, positions, partials,
        kv_heads, group, of_block, width, first_words, count_1, count_2, value_width, capacity, parts, held, factor,
    ):  # fmt: skip
        """Grid (tiles of the capacity, groups of `of_block` key heads, sequences).

        codes : latents of keys and of values, as words
            (sequences, capacity, count_1 + count_2) for keys, (sequences, capacity, value_width) for values.
        scales : pair of (sequences, capacity) float32
        words : (kv_heads * size, width) uint32
            Signs of U of the key's paths side by side, each path in whole pairs of words. The bits of a word are in the
            order 0, 2, ..., 30, 1, 3, ..., 31.
        row_scales : pair of (kv_heads * size,) float16
            h of each path.
        partials : (sequences, heads, tiles, value_width + SUMMARY) float32
            Each tile's weighted latents, largest score and sum of weights.
        parts : int
            Parts of a tile's tokens, which different threads sum.
        held : int
            Words of shared memory that are used twice: for key latents, queries and scores, then for sums of latents.
        """
        signal, shared = cuda.shared.array(0, uint32), cuda.shared.array(0, float32)
        thread = int32(cuda.threadIdx.x)
        lane, warp = int32(thread & 31), int32(thread >> 5)
        tile, row = int32(cuda.blockIdx.x), int32(cuda.blockIdx.z)
        first, position = int32(tile * tokens), int32(positions[row])
        if first > position:
            return
        begin, base, last = (
            int32(cuda.blockIdx.y * of_block),
            int32(row * capacity + first),
            int32(capacity - 1 - first),
        )
        heads = int32(kv_heads * group)
        of_keys = int32(min(of_block, int32(kv_heads - begin)))
        of_queries = int32(of_keys * group)
        chunks, value_chunks = int32(width << 2), int32(value_width >> 3)
        held_queries = int32(int32(width >> 1) * pair_words)
        held_scores = int32(held_queries + int32(of_block * group) * size)
        held_weights = int32(held + int32(int32(value_chunks + 7) >> 3) * pair_words)
        held_scales = int32(held_weights + int32(of_block * group) * tokens)
        # angles, signs and scales do not depend on the previous kernel: load them before it ends
        turn, team, own = int32(0), int32(warp // warps_of_head), int32(warp % warps_of_head)
        frequency, mine_first = int32(16 * own + int32(lane >> 2)), int32(first + int32(int32(lane & 3) << 1))
        cosines = load_angles(angle_numbers, (cosine, frequency, mine_first, int32(capacity - 1)))
        sines = load_angles(angle_numbers, (sine, frequency, mine_first, int32(capacity - 1)))
        key_row = int32(int32(begin + min(team, int32(of_keys - 1))) * size + frequency)
        ready = load_signs(words, key_row, width, int32(0))
        ready_first, ready_second = load_scales(row_scales[0], key_row), load_scales(row_scales[1], key_row)
        if early:
            griddep_wait()
            griddep_launch_dependents()
        keys, values, first_chunks = codes[0], codes[1], int32(first_words << 2)
        load_latents(signal, int32(0), keys, base, last, chunks, first_chunks, count_1, count_2, warp, lane)
        load_latents(signal, held, values, base, last, value_chunks, value_chunks, value_width, int32(0), warp, lane)
        if thread < tokens:
            at = uint32(base + min(thread, last))
            cp_async_4(shared, uint32(held_scales + thread), scales[0], at)
            cp_async_4(shared, uint32(held_scales + tokens + thread), scales[1], at)
        place = int32(int32(row * int32(heads + 2 * kv_heads) + int32(begin * group)) * size)
        store_queries(shared, held_queries, projected, cosine, sine, position, place, of_queries, factor, thread)
        cp_async_wait_all()
        if grouped:
            fence_async_proxy()
        cuda.syncthreads()

        # up-project keys, head by head, and multiply each with its queries while it is in registers
        pairs = int32(width >> 1)
        while turn < of_keys:  # the same count for all warps, since four of them may multiply together
            of_first, of_second, sums, pair = ready_first, ready_second, no_keys(), int32(0)
            key = int32(turn + team)
            following = int32(int32(begin + min(int32(key + heads_at_once), int32(of_keys - 1))) * size + frequency)
            ready_first, ready_second = load_scales(row_scales[0], following), load_scales(row_scales[1], following)
            while pair < pairs:
                signs, another = ready, int32(pair + 1)
                ends = another == pairs
                ready = load_signs(words, following if ends else key_row, width, int32(0) if ends else another)
                weights = of_first if int32(2 * pair) < first_words else of_second
                sums = multiply(sums, signs, weights, signal, int32(pair * pair_words), lane)
                pair = another
            head, last_head = int32(key * group), int32(min(int32(key + 1), of_keys) * group)
            while head < last_head:
                target = int32(held_scores + int32(int32(head * warps_of_head) + own) * tokens)
                at_query = int32(held_queries + int32(head * size) + frequency)
                score_keys(shared, uint32(target), sums, cosines, sines, query_entries(shared, at_query), lane)
                head = int32(head + 1)
            turn, key_row = int32(turn + heads_at_once), following
        cuda.syncthreads()

        # softmax weights of the tile, a warp for each query head
        stride, tiles = int32(value_width + SUMMARY), int32(cuda.gridDim.x)
        head = warp
        while head < of_queries:
            top, token = float32(LOWEST), lane
            while token < tokens:
                score = float32(0)
                for piece in range(warps_of_head):
                    score += shared[uint32(held_scores + int32(int32(head * warps_of_head) + piece) * tokens + token)]
                score = score * shared[uint32(held_scales + token)]
                score = score if int32(first + token) <= position else float32(LOWEST)
                shared[uint32(int32(held_weights + int32(head * tokens)) + token)] = score
                top, token = larger(top, score), int32(token + 32)
            top, total, token = warp_reduce_max(top), float32(0), lane
            while token < tokens:
                at = uint32(int32(held_weights + int32(head * tokens)) + token)
                weight = exponential(shared[at] - top) if int32(first + token) <= position else float32(0)
                shared[at] = weight * shared[uint32(held_scales + tokens + token)]
                total, token = float32(total + weight), int32(token + 32)
            total = warp_sum(total)
            if lane == 0:
                at = int32(int32(int32(row * heads + int32(begin * group + head)) * tiles + tile) * stride)
                partials[uint32(at + value_width)], partials[uint32(at + value_width + 1)] = top, total
            head = int32(head + warps)
        cuda.syncthreads()

        # weighted sums of value latents: a thread has eight latents of four query heads
        items, item = int32(value_chunks * int32(int32(of_queries + 3) >> 2)), thread
        seen = min(int32(tokens), int32(position + 1 - first))
        while item < items * parts:
            part, rest = int32(item // items), int32(item % items)
            chunk, four = int32(rest % value_chunks), int32(int32(rest // value_chunks) << 2)
            a, b, c, d, token = zeros8(), zeros8(), zeros8(), zeros8(), part
            final = int32(of_queries - 1)
            two, three, last_one = min(int32(four + 1), final), min(int32(four + 2), final), min(int32(four + 3), final)
            block, within = int32(held + int32(chunk >> 3) * pair_words), int32(chunk & 7)
            while token < seen:
                v, at = (
                    halves_to_floats(load4(signal, uint32(swizzle(block, token, within)))),
                    int32(held_weights + token),
                )
                a = add8(a, scale8(v, shared[uint32(at + int32(four * tokens))]))
                b = add8(b, scale8(v, shared[uint32(at + int32(two * tokens))]))
                c = add8(c, scale8(v, shared[uint32(at + int32(three * tokens))]))
                d = add8(d, scale8(v, shared[uint32(at + int32(last_one * tokens))]))
                token = int32(token + parts)
            at = int32(int32(int32(part * of_queries) * value_width) + int32(chunk << 3))
            store8(shared, int32(at + int32(four * value_width)), a, float32)
            if four + 1 < of_queries:
                store8(shared, int32(at + int32(two * value_width)), b, float32)
            if four + 2 < of_queries:
                store8(shared, int32(at + int32(three * value_width)), c, float32)
            if four + 3 < of_queries:
                store8(shared, int32(at + int32(last_one * value_width)), d, float32)
            item = int32(item + threads)
        cuda.syncthreads()
        head = warp
        while head < of_queries:
            base = int32(int32(int32(row * heads + int32(begin * group + head)) * tiles + tile) * stride)
            column = lane
            while column < value_width:
                total, part, at = float32(0), int32(0), int32(int32(head * value_width) + column)
                while part < parts:
                    total += shared[uint32(at)]
                    part, at = int32(part + 1), int32(at + int32(of_queries * value_width))
                partials[uint32(base + column)] = total
                column = int32(column + 32)
            head = int32(head + warps)

    SIGNATURES[kernel] = types.void(
        ELEMENTS[dtype], PAIR(WORDS), PAIR(SINGLES), WORDS, PAIR(HALVES), SINGLES, SINGLES, INTEGERS, SINGLES,
        *[types.int32] * 11, types.float32,
    )  # fmt: skip
    return kernel


def up_projection_bytes(tiles: int, words: int, value_width: int) -> int:
    """Compute the shared memory in bytes of a block of `up_project_values`."""
    parts = max(1, THREADS // (value_width // 4))
    return 4 * (2 * WARPS + 32 * words + -(-tiles // 4) * 4 + parts * value_width)


@kernel_factory
def up_project_values(dtype: str, size: int, combine: bool, early: bool) -> Any:
    """Make the kernel that combines the tiles of `attend_latents` and up-projects the sums of value latents.

    With `combine`, y is the output of attention, of a dtype in ROUND. Otherwise each block writes the split-KV partial
    of its share of the tiles, which the next kernel combines (`cuda_gemv.SplitKvPartials`).
    """
    rounded, threads_of_row = ROUND[dtype], max(1, THREADS // size)
    row_sum, numbers = warp_reduce_sum(threads_of_row), tuple(range(TILES_IN_FLIGHT))

    @cuda.jit(device=True, forceinline=True)
    def load_tile(number, rest):
        """Load four sums of one of the tiles in flight; the index is clamped to the last tile."""
        partials, column, tile, parts, last, stride = rest
        a, b, c, d = load4(partials, uint32(column + int32(min(int32(tile + int32(number * parts)), last) * stride)))
        return as_float(a), as_float(b), as_float(c), as_float(d)

    load_tiles = map_tuple(load_tile, TILES_IN_FLIGHT)

    @cuda.jit
    def kernel(
        partials, words, row_scales, positions, y, group, tokens, tiles, width, first_words, count_1, count_2
    ):  # fmt: skip
        """Grid (heads, sequences, splits); words : (kv_heads * size, width), signs of U of the value's paths."""
        signal, shared = cuda.shared.array(0, uint32), cuda.shared.array(0, float32)
        thread, head, row = int32(cuda.threadIdx.x), int32(cuda.blockIdx.x), int32(cuda.blockIdx.y)
        count, split, splits = int32(int32(positions[row]) // tokens + 1), int32(cuda.blockIdx.z), int32(cuda.gridDim.z)
        each = int32(int32(int32(count + splits) - 1) // splits)
        first_tile, end = int32(split * each), min(count, int32(int32(split + 1) * each))
        value_width = int32(count_1 + count_2)
        stride = int32(value_width + SUMMARY)
        base = int32(int32(int32(row * int32(cuda.gridDim.x)) + head) * tiles * stride)
        held_mean = int32(2 * WARPS)
        held_factors = int32(held_mean + int32(width << 5))
        held_parts = int32(held_factors + int32(int32(int32(tiles + 3) >> 2) << 2))
        if early:
            griddep_wait()
            griddep_launch_dependents()
        # weights of the tiles, relative to the largest score
        top, tile = float32(LOWEST), int32(first_tile + thread)
        while tile < end:
            top, tile = (
                larger(top, partials[uint32(base + int32(tile * stride) + value_width)]),
                int32(tile + THREADS),
            )
        top, total, tile = block_max(top, shared), float32(0), int32(first_tile + thread)
        while tile < end:
            at = int32(base + int32(tile * stride) + value_width)
            factor = exponential(partials[uint32(at)] - top)
            shared[uint32(held_factors + int32(tile - first_tile))] = factor
            total, tile = float32(total + factor * partials[uint32(at + 1)]), int32(tile + THREADS)
        item = thread
        while item < int32(width << 5):
            shared[uint32(held_mean + item)] = float32(0)
            item = int32(item + THREADS)
        cuda.syncthreads()  # the first numbers of shared memory have been read
        total = block_sum(total, shared, WARPS)

        # weighted sum of the tiles' latents: `parts` threads for each four of them
        fours = int32(value_width >> 2)
        parts, item = max(int32(1), int32(THREADS // fours)), thread
        while item < parts * fours:
            part, four = int32(item // fours), int32(int32(item % fours) << 2)
            sums, tile = (float32(0), float32(0), float32(0), float32(0)), int32(first_tile + part)
            while tile < end:
                read = load_tiles(numbers, (partials, int32(base + four), tile, parts, int32(end - 1), stride))
                for i in range(TILES_IN_FLIGHT):
                    number = int32(tile + int32(i * parts))
                    factor = shared[uint32(held_factors + int32(min(number, int32(end - 1)) - first_tile))]
                    sums = add4(sums, scale4(read[i], factor if number < end else float32(0)))
                tile = int32(tile + int32(TILES_IN_FLIGHT * parts))
            target = int32(held_parts + int32(part * value_width) + four)
            store4(signal, uint32(target), as_bits(sums[0]), as_bits(sums[1]), as_bits(sums[2]), as_bits(sums[3]))
            item = int32(item + THREADS)
        cuda.syncthreads()
        item = thread
        while item < value_width:
            mean, part = float32(0), int32(0)
            while part < parts:
                mean += shared[uint32(held_parts + int32(part * value_width) + item)]
                part = int32(part + 1)
            place = item if item < count_1 else int32(int32(first_words << 5) + int32(item - count_1))
            shared[uint32(held_mean + place)] = mean / total if combine else mean
            item = int32(item + THREADS)
        cuda.syncthreads()

        # up-projection by U: flip the sign bit of each latent where the sign is -1, and sum
        target = int32(int32(row * int32(cuda.gridDim.x) + head) * size)
        if not combine:
            target = int32(int32(int32(row * int32(cuda.gridDim.x) + head) * splits + split) * (size + SUMMARY))
            if thread == 0:
                y[uint32(target + size)], y[uint32(target + size + 1)] = top, total
        entry, number = int32(thread // threads_of_row), int32(thread % threads_of_row)
        while entry < size:  # the same count for all threads of a warp, since they exchange sums
            of_key, first, second = int32(int32(head // group) * size + entry), float32(0), float32(0)
            number = int32(thread % threads_of_row)
            while number < width:
                word, some = uint32(words[uint32(int32(of_key * width) + number)]), float32(0)
                for i in range(8):
                    four = load4(signal, uint32(held_mean + int32(number << 5) + 4 * i))
                    for j in range(4):
                        sign = uint32((word << uint32(31 - 4 * i - j)) & uint32(0x80000000))
                        some += as_float(uint32(four[j] ^ sign))
                if number < first_words:
                    first += some
                else:
                    second += some
                number = int32(number + threads_of_row)
            value = first * half_at(row_scales[0], of_key) + second * half_at(row_scales[1], of_key)
            value = row_sum(value)
            if thread % threads_of_row == 0:
                y[uint32(target + entry)] = rounded(value)
            entry = int32(entry + THREADS // threads_of_row)

    arrays = SINGLES, WORDS, PAIR(HALVES), INTEGERS, ELEMENTS[dtype]
    SIGNATURES[kernel] = types.void(*arrays, *[types.int32] * 7)
    return kernel
