"""Attention to a latent key-value cache on NVIDIA GPUs, in Numba CUDA: three kernels, and no key or value in memory.

    latents          keeps what a projection knows of a token between its two stages, in float16 or 8 bits
    attend_latents   scores of the tokens of a tile, and the weighted sum of their values' latents
    expand_latents   puts tiles together, and makes values of the sum

The first stages of k_proj and v_proj, t, are what is kept of a token (kv_cache.py). A block of `attend_latents` has a
tile of tokens. Its warps expand their keys on tensor cores, as `cuda_batch.products` does: signs of U become +h or -h
on their way there, and t comes from shared memory. A lane has the same entries of the lower and of the upper half of a
key, for the same tokens, of one head after the other, so the cosines and sines that rotate them stay in its registers;
so do the keys, until all that is left of them is their product with the query. Values are not expanded here: the
weighted sum of t is, once for each head, by `expand_latents`.

Tiles are put together as blocks of `cuda_decode.attend` are, relative to the largest score of each.
"""

# What Numba makes of cuda.threadIdx and its like is not what their Python stand-ins say.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportOperatorIssue=false
# pyright: reportGeneralTypeIssues=false, reportIndexIssue=false, reportOptionalSubscript=false

from functools import partial
from typing import Any, NamedTuple

from numba import cuda, float32, int32, types, uint8, uint32

from .cuda import (
    AT,
    ELEMENTS,
    HALVES,
    ROUND,
    SIGNATURES,
    SINGLES,
    SUMMARY,
    WORDS,
    eight_times,
    half_at,
    kernel_factory,
    load2,
    load4,
    plus,
    single_eight,
    warp_sum,
)
from .cuda_batch import two_halves
from .cuda_decode import (
    BYTES,
    INTEGERS,
    LOWEST,
    block_sum,
    four_bytes,
    half_words,
    nothing,
    over,
    put_eight,
    summed,
)
from .cuda_lanes import (
    as_bits,
    as_float,
    copied,
    copy4,
    exponential,
    larger,
    let_next_start,
    round_to_half,
    wait,
)
from .cuda_tiles import no_sums, store4, tile_product

WARPS = 8  # of a block, but for tiles
THREADS = 32 * WARPS
TILE_WARPS = 4  # of a block that has a tile, or those of a head: two such blocks have the registers of a multiprocessor
TILES = (64, 32, 16, 8)  # tokens of a block, of which the most are taken that shared memory has room for
TILES_AT_ONCE = 4  # whose sums a thread has on their way
WORDS_AT_ONCE = 8  # a tile has room for multiples of so many words of signs, lest each rank need a kernel of its own


@cuda.jit(device=True, forceinline=True)
def warp_largest(value):
    """The largest of a warp, the same in every lane."""
    for distance in (16, 8, 4, 2, 1):
        value = larger(value, cuda.shfl_xor_sync(0xFFFFFFFF, value, distance))
    return value


@cuda.jit(device=True, forceinline=True)
def block_max(value, shared):
    """The largest of a block, the same in every thread."""
    value, thread = warp_largest(value), int32(cuda.threadIdx.x)
    if thread & 31 == 0:
        shared[uint32(thread >> 5)] = value
    cuda.syncthreads()
    for warp in range(WARPS):
        value = larger(value, shared[uint32(warp)])
    return value


@cuda.jit(device=True, forceinline=True)
def round_to_byte(value):
    """The nearest integer, of which the lowest byte is kept: a float32 between 2^23 and 2^24 has it in its bits."""
    return uint8(as_bits(value + float32(12582912.0)) & uint32(0xFF))  # 1.5 * 2^23


@cuda.jit(device=True, forceinline=True)
def copy_halves(signal, target, codes, eighth):
    """Begin to copy eight latents to shared memory."""
    copy4(signal, uint32(target), codes, uint32(4 * eighth))


@cuda.jit(device=True, forceinline=True)
def put_bytes(signal, target, codes, eighth):
    """Put eight latents that are kept in 8 bits into shared memory as float16."""
    low, high = load2(codes, uint32(2 * eighth))
    (a, b, c, d), (e, f, g, h) = four_bytes(low), four_bytes(high)
    store4(signal, uint32(target), two_halves(a, b), two_halves(c, d), two_halves(e, f), two_halves(g, h))


class Kept(NamedTuple):
    """How a type of cache keeps latents.

    Attributes
    ----------
    rounded : device function
        A latent over its token's scale, as it is kept.
    array : type
    largest : float
        What a token's largest latent becomes.
    put : device function
        Eight of them into shared memory, where float16 is what is multiplied.
    """

    rounded: Any
    array: Any
    largest: float
    put: Any


#: By the type of the cache.
KEPT = {
    "half": Kept(round_to_half, HALVES, 1.0, copy_halves),
    "byte": Kept(round_to_byte, BYTES, 127.0, put_bytes),
}
PAIR = partial(types.UniTuple, count=2)


@kernel_factory
def latents(kept: str, early: bool) -> Any:
    """Put a token's latents into a cache of a type in KEPT, over their largest magnitude."""
    rounded, array, largest, _ = KEPT[kept]

    @cuda.jit(device=True, forceinline=True)
    def latent(part, place, stride, parts, item, begin_1, count_1, begin_2):
        at = int32(place + (int32(begin_1 + item) if item < count_1 else int32(begin_2 + int32(item - count_1))))
        total, number = float32(0), int32(0)
        while number < parts:
            total += part[uint32(at)]
            number, at = int32(number + 1), int32(at + stride)
        return total

    @cuda.jit
    def kernel(part, codes, scales, positions, begins_1, counts_1, begins_2, counts_2, parts, rows, columns, capacity):
        """Grid (sequences, 2): keys and values; a layer's paths are at two places of each row of `part`."""
        shared = cuda.shared.array(WARPS, float32)
        row, which, thread = int32(cuda.blockIdx.x), int32(cuda.blockIdx.y), int32(cuda.threadIdx.x)
        begin_1, count_1, begin_2 = int32(begins_1[which]), int32(counts_1[which]), int32(begins_2[which])
        place, stride, width = int32(row * columns), int32(rows * columns), int32(count_1 + counts_2[which])
        target = int32(int32(row * capacity) + int32(positions[row]))
        if early:
            wait()
            let_next_start()
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
    """What a kernel `attend_latents` is made for.

    Attributes
    ----------
    kind : str
        Of the projections: a key of cuda.AT.
    kept : str
        A key of KEPT.
    size : int
        Of a head: 64, 128 or 256.
    tokens : int
        One of TILES.
    words : int
        Of signs in a row of U, as many as there is room for: a multiple of WORDS_AT_ONCE.
    """

    kind: str
    kept: str
    size: int
    tokens: int
    words: int

    @property
    def warps_of_head(self) -> int:
        """Warps that share a key, each of which has 16 rows of both of its halves."""
        return self.size // 32

    @property
    def heads_at_once(self) -> int:
        """Keys' heads that a block expands at the same time."""
        return self.warps // self.warps_of_head

    @property
    def warps(self) -> int:
        """Of a block."""
        return max(TILE_WARPS, self.warps_of_head)

    @property
    def threads(self) -> int:
        """Of a block."""
        return 32 * self.warps

    @property
    def stride(self) -> int:
        """Words of shared memory from a token to the next: four more than its latents, so that no banks collide."""
        return 16 * self.words + 4

    def parts(self, heads: int, value_width: int) -> int:
        """Parts of a tile of which each is summed by threads of its own, for so many heads of queries in a block."""
        return max(1, self.threads // (value_width // 8 * -(-heads // 4)))

    def shared_bytes(self, heads: int, value_width: int) -> int:
        """Of a block with so many heads of queries: weights, values, and keys, queries and scores, or later sums."""
        first = self.tokens * (self.stride + self.warps_of_head * heads) + heads * self.size
        later = self.parts(heads, value_width) * heads * value_width
        return 4 * (self.tokens * (heads + value_width // 2) + max(first, later))


@kernel_factory
def attend_latents(made: LatentTile, early: bool) -> Any:
    """Scores and weighted sums of latents; see the top of this file."""
    kind, kept, size, tokens, _ = made
    at_place, put_eight_latents = AT[kind], KEPT[kept].put
    half, stride, warps, threads = size // 2, made.stride, made.warps, made.threads
    warps_of_head, heads_at_once = made.warps_of_head, made.heads_at_once
    across = tokens // 8
    mine = tokens // 4  # tokens of a lane
    first_half, second_half = (tile_product(2, across, which, 8 * stride) for which in range(2))
    no_keys = no_sums(8 * across)
    angle_numbers = tuple(range(2 * mine))

    @cuda.jit(device=True, forceinline=True)
    def angle(number, rest):
        """A cosine or sine of one of a lane's tokens, for one of its two rows."""
        table, place, first, last = rest
        token = min(int32(first + int32(8 * (number >> 2) + ((number >> 1) & 1))), last)
        return table[uint32(int32(token * half) + int32(place + 8 * (number & 1)))]

    angles = over(angle, 2 * mine)

    @cuda.jit(device=True, forceinline=True)
    def put_keys(signal, held, codes, base, last, words, first_words, count_1, count_2, thread):
        """Put keys' latents into shared memory: each path's begin at a word of signs, with zeros before the next."""
        chunks, boundary, width = int32(4 * words), int32(4 * first_words), int32(int32(count_1 + count_2) >> 3)
        item = thread
        while item < tokens * chunks:
            token, chunk = int32(item // chunks), int32(item % chunks)
            within = chunk if chunk < boundary else int32(chunk - boundary)
            limit = count_1 if chunk < boundary else count_2
            target = int32(held + int32(token * stride) + int32(4 * chunk))
            if int32(8 * within) < limit:
                column = within if chunk < boundary else int32(within + int32(count_1 >> 3))
                put_eight_latents(signal, target, codes, int32(int32(base + min(token, last)) * width + column))
            else:
                store4(signal, uint32(target), uint32(0), uint32(0), uint32(0), uint32(0))
            item = int32(item + threads)

    @cuda.jit(device=True, forceinline=True)
    def put_values(signal, held, codes, base, last, width, thread):
        """Put values' latents into shared memory, `width` eights of each token."""
        item, most = thread, int32(int32(last + 1) * width)
        while item < min(int32(tokens * width), most):
            put_eight_latents(signal, int32(held + int32(4 * item)), codes, int32(int32(base * width) + item))
            item = int32(item + threads)

    @cuda.jit(device=True, forceinline=True)
    def put_queries(shared, held, projected, cosine, sine, position, place, heads, factor, thread):
        """Put rotated queries, scaled, into shared memory."""
        item = thread
        while item < heads * half:
            head, entry = int32(item // half), int32(item % half)
            at, turn = int32(place + int32(head * size) + entry), uint32(int32(position * half) + entry)
            low, high = at_place(projected, at), at_place(projected, int32(at + half))
            c, s = cosine[turn] * factor, sine[turn] * factor
            at = int32(held + int32(head * size) + entry)
            shared[uint32(at)], shared[uint32(at + half)] = low * c - high * s, high * c + low * s
            item = int32(item + threads)

    @cuda.jit(device=True, forceinline=True)
    def signs_of(words, row, width, pair):
        """Two words of signs of each of a lane's four rows."""
        at = int32(int32(row * width) + int32(2 * pair))
        a, b = load2(words, uint32(at))
        c, d = load2(words, uint32(at + int32(8 * width)))
        e, f = load2(words, uint32(at + int32(half * width)))
        g, h = load2(words, uint32(at + int32((half + 8) * width)))
        return a, b, c, d, e, f, g, h

    @cuda.jit(device=True, forceinline=True)
    def twice(scales, row):
        """The scale of a row, twice in a word."""
        bits = uint32(scales[uint32(row)])
        return uint32(bits | bits << uint32(16))

    @cuda.jit(device=True, forceinline=True)
    def scales_of(scales, row):
        """Those of a lane's four rows."""
        a, b = twice(scales, row), twice(scales, int32(row + 8))
        return a, b, twice(scales, int32(row + half)), twice(scales, int32(row + half + 8))

    @cuda.jit(device=True, forceinline=True)
    def put_scores(shared, target, query, sums, cosines, sines, lane):
        """A query's products with what a warp has of rotated keys, for each token of the tile."""
        low, other_low = shared[uint32(query)], shared[uint32(query + 8)]
        high, other_high = shared[uint32(query + half)], shared[uint32(query + half + 8)]
        for i in range(mine):
            at = 4 * (i >> 1) + (i & 1)
            c, s, other_c, other_s = cosines[2 * i], sines[2 * i], cosines[2 * i + 1], sines[2 * i + 1]
            score = sums[at] * (low * c + high * s) + sums[4 * across + at] * (high * c - low * s)
            score += sums[at + 2] * (other_low * other_c + other_high * other_s)
            score += sums[4 * across + at + 2] * (other_high * other_c - other_low * other_s)
            for distance in (4, 8, 16):
                score += cuda.shfl_xor_sync(0xFFFFFFFF, score, distance)
            if lane < 4:
                shared[uint32(int32(target + int32(2 * lane)) + int32(8 * (i >> 1) + (i & 1)))] = score

    @cuda.jit
    def kernel(
        projected, codes, scales, words, row_scales, cosine, sine, positions, left,
        kv_heads, group, of_block, width, first_words, count_1, count_2, value_width, capacity, parts, factor,
    ):  # fmt: skip
        """Grid (tiles that the capacity has room for, blocks that share the heads of keys, sequences).

        codes : keys' and values' as words, of (sequences, capacity, count_1 + count_2 or value_width) latents; scales :
        (sequences, capacity); words : of U of the keys' paths side by side, (kv_heads * size, width), width even, the
        entries of each 32 in the order 0, 2 to 30, 1, 3 to 31; row_scales : h of each path; left : (sequences, heads,
        tiles, value_width + SUMMARY). A block has `of_block` heads of keys, and sums a tile in `parts`.
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
        of_queries = int32(min(of_block, int32(kv_heads - begin)) * group)
        held_values = int32(int32(of_block * group) * tokens)
        held_tile = int32(held_values + int32(value_width >> 1) * tokens)
        held_queries = int32(held_tile + tokens * stride)
        held_scores = int32(held_queries + int32(of_block * group) * size)
        frequency = int32(16 * int32(warp % warps_of_head) + int32(lane >> 2))
        mine_first = int32(first + int32(int32(lane & 3) << 1))
        place = frequency
        cosines = angles(angle_numbers, (cosine, place, mine_first, int32(capacity - 1)))
        sines = angles(angle_numbers, (sine, place, mine_first, int32(capacity - 1)))
        if early:
            wait()
            let_next_start()
        put_keys(signal, held_tile, codes[0], base, last, width, first_words, count_1, count_2, thread)
        put_values(signal, held_values, codes[1], base, last, int32(value_width >> 3), thread)
        place = int32(int32(row * int32(heads + 2 * kv_heads) + int32(begin * group)) * size)
        put_queries(shared, held_queries, projected, cosine, sine, position, place, of_queries, factor, thread)
        copied()
        cuda.syncthreads()

        at_tile = int32(held_tile + int32(stride * int32(lane & 7)) + int32(int32(lane >> 3) << 2))
        pairs, turn = int32(width >> 1), int32(warp // warps_of_head)
        while turn < of_block and int32(begin + turn) < kv_heads:
            key_row, pair, sums = int32(int32(begin + turn) * size + frequency), int32(0), no_keys()
            ready = signs_of(words, key_row, width, pair)
            of_first, of_second = scales_of(row_scales[0], key_row), scales_of(row_scales[1], key_row)
            while pair < pairs:
                now = ready
                if int32(pair + 1) < pairs:
                    ready = signs_of(words, key_row, width, int32(pair + 1))
                at = int32(at_tile + int32(pair << 5))
                weights = of_first if int32(2 * pair) < first_words else of_second
                sums = first_half(sums, now, weights, signal, uint32(at), lane)
                weights = of_first if int32(2 * pair + 1) < first_words else of_second
                sums = second_half(sums, now, weights, signal, uint32(at + 16), lane)
                pair = int32(pair + 1)
            member = int32(0)
            while member < group:
                head = int32(turn * group + member)
                target = int32(held_scores + int32(int32(head * warps_of_head) + int32(warp % warps_of_head)) * tokens)
                query = int32(held_queries + int32(head * size) + frequency)
                put_scores(shared, target, query, sums, cosines, sines, lane)
                member = int32(member + 1)
            turn = int32(turn + heads_at_once)
        cuda.syncthreads()

        across_left, tiles = int32(value_width + SUMMARY), int32(cuda.gridDim.x)
        head = warp
        while head < of_queries:
            top, token = float32(LOWEST), lane
            while token < tokens:
                score = float32(0)
                for piece in range(warps_of_head):
                    score += shared[uint32(held_scores + int32(int32(head * warps_of_head) + piece) * tokens + token)]
                score = score * scales[0][uint32(base + min(token, last))]
                score = score if int32(first + token) <= position else float32(LOWEST)
                shared[uint32(int32(head * tokens) + token)] = score
                top, token = larger(top, score), int32(token + 32)
            top, total, token = warp_largest(top), float32(0), lane
            while token < tokens:
                at = uint32(int32(head * tokens) + token)
                weight = exponential(shared[at] - top) if int32(first + token) <= position else float32(0)
                shared[at] = weight * scales[1][uint32(base + min(token, last))]
                total, token = float32(total + weight), int32(token + 32)
            total = warp_sum(total)
            if lane == 0:
                at = int32(int32(int32(row * heads + int32(begin * group + head)) * tiles + tile) * across_left)
                left[uint32(at + value_width)], left[uint32(at + value_width + 1)] = top, total
            head = int32(head + warps)
        cuda.syncthreads()

        chunks, item = int32(value_width >> 3), thread
        items = int32(chunks * int32(int32(of_queries + 3) >> 2))
        seen = min(int32(tokens), int32(position + 1 - first))
        while item < items * parts:
            part, rest = int32(item // items), int32(item % items)
            chunk, four = int32(rest % chunks), int32(int32(rest // chunks) << 2)
            a, b, c, d, token = nothing(), nothing(), nothing(), nothing(), part
            final = int32(of_queries - 1)
            two, three, last_one = min(int32(four + 1), final), min(int32(four + 2), final), min(int32(four + 3), final)
            while token < seen:
                at = int32(held_values + int32(token * int32(value_width >> 1)) + int32(chunk << 2))
                v = half_words(load4(signal, uint32(at)))
                a = plus(a, eight_times(v, shared[uint32(int32(four * tokens) + token)]))
                b = plus(b, eight_times(v, shared[uint32(int32(two * tokens) + token)]))
                c = plus(c, eight_times(v, shared[uint32(int32(three * tokens) + token)]))
                d = plus(d, eight_times(v, shared[uint32(int32(last_one * tokens) + token)]))
                token = int32(token + parts)
            at = int32(held_tile + int32(int32(part * of_queries) * value_width) + int32(chunk << 3))
            put_eight(shared, int32(at + int32(four * value_width)), a, float32)
            if four + 1 < of_queries:
                put_eight(shared, int32(at + int32(two * value_width)), b, float32)
            if four + 2 < of_queries:
                put_eight(shared, int32(at + int32(three * value_width)), c, float32)
            if four + 3 < of_queries:
                put_eight(shared, int32(at + int32(last_one * value_width)), d, float32)
            item = int32(item + threads)
        cuda.syncthreads()
        item = thread
        while item < of_queries * value_width:
            total, part, at = float32(0), int32(0), int32(held_tile + item)
            while part < parts:
                total += shared[uint32(at)]
                part, at = int32(part + 1), int32(at + int32(of_queries * value_width))
            head, column = int32(item // value_width), int32(item % value_width)
            at = int32(int32(int32(row * heads + int32(begin * group + head)) * tiles + tile) * across_left)
            left[uint32(at + column)] = total
            item = int32(item + threads)

    SIGNATURES[kernel] = types.void(
        ELEMENTS[kind], PAIR(WORDS), PAIR(SINGLES), WORDS, PAIR(HALVES), SINGLES, SINGLES, INTEGERS, SINGLES,
        *[types.int32] * 10, types.float32,
    )  # fmt: skip
    return kernel


def expanding_bytes(tiles: int, words: int, value_width: int) -> int:
    """Shared memory of a block of `expand_latents`."""
    parts = max(1, THREADS // (value_width // 8))
    return 4 * (2 * WARPS + 32 * words + -(-tiles // 4) * 4 + parts * value_width)


@kernel_factory
def expand_latents(kind: str, size: int, early: bool) -> Any:
    """What a head's attention comes to, from the sums of values' latents that `attend_latents` has left."""
    rounded, threads_of_row = ROUND[kind], max(1, THREADS // size)
    row_sum, numbers = summed(threads_of_row), tuple(range(TILES_AT_ONCE))

    @cuda.jit(device=True, forceinline=True)
    def fetched(number, rest):
        """Eight sums of one of the tiles that are read at once; of another where there is none."""
        left, column, tile, parts, last, stride = rest
        return single_eight(left, int32(column + int32(min(int32(tile + int32(number * parts)), last) * stride)))

    fetch = over(fetched, TILES_AT_ONCE)

    @cuda.jit
    def kernel(
        left, words, row_scales, positions, y, group, tokens, tiles, width, first_words, count_1, count_2
    ):  # fmt: skip
        """Grid (heads, sequences); words : of U of the values' paths side by side, (kv_heads * size, width)."""
        signal, shared = cuda.shared.array(0, uint32), cuda.shared.array(0, float32)
        thread, head, row = int32(cuda.threadIdx.x), int32(cuda.blockIdx.x), int32(cuda.blockIdx.y)
        count, value_width = int32(int32(positions[row]) // tokens + 1), int32(count_1 + count_2)
        stride = int32(value_width + SUMMARY)
        base = int32(int32(int32(row * int32(cuda.gridDim.x)) + head) * tiles * stride)
        held_mean = int32(2 * WARPS)
        held_factors = int32(held_mean + int32(width << 5))
        held_parts = int32(held_factors + int32(int32(int32(tiles + 3) >> 2) << 2))
        if early:
            wait()
            let_next_start()
        top, tile = float32(LOWEST), thread
        while tile < count:
            top, tile = larger(top, left[uint32(base + int32(tile * stride) + value_width)]), int32(tile + THREADS)
        top, total, tile = block_max(top, shared), float32(0), thread
        while tile < count:
            at = int32(base + int32(tile * stride) + value_width)
            factor = exponential(left[uint32(at)] - top)
            shared[uint32(held_factors + tile)] = factor
            total, tile = float32(total + factor * left[uint32(at + 1)]), int32(tile + THREADS)
        item = thread
        while item < int32(width << 5):
            shared[uint32(held_mean + item)] = float32(0)
            item = int32(item + THREADS)
        cuda.syncthreads()  # the first numbers of shared memory have been read
        total = block_sum(total, shared, WARPS)

        chunks = int32(value_width >> 3)
        parts, item = max(int32(1), int32(THREADS // chunks)), thread
        while item < parts * chunks:
            part, chunk = int32(item // chunks), int32(item % chunks)
            sums, tile, column = nothing(), part, int32(base + int32(chunk << 3))
            while tile < count:
                read = fetch(numbers, (left, column, tile, parts, int32(count - 1), stride))
                for i in range(TILES_AT_ONCE):
                    number = int32(tile + int32(i * parts))
                    factor = shared[uint32(held_factors + min(number, int32(count - 1)))]
                    sums = plus(sums, eight_times(read[i], factor if number < count else float32(0)))
                tile = int32(tile + int32(TILES_AT_ONCE * parts))
            put_eight(shared, int32(held_parts + int32(part * value_width) + int32(chunk << 3)), sums, float32)
            item = int32(item + THREADS)
        cuda.syncthreads()
        item = thread
        while item < value_width:
            mean, part = float32(0), int32(0)
            while part < parts:
                mean += shared[uint32(held_parts + int32(part * value_width) + item)]
                part = int32(part + 1)
            place = item if item < count_1 else int32(int32(first_words << 5) + int32(item - count_1))
            shared[uint32(held_mean + place)] = mean / total
            item = int32(item + THREADS)
        cuda.syncthreads()

        entry, number = int32(thread // threads_of_row), int32(thread % threads_of_row)
        while entry < size:  # all threads of a warp alike
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
                y[uint32(int32(int32(row * int32(cuda.gridDim.x)) + head) * size + entry)] = rounded(value)
            entry = int32(entry + THREADS // threads_of_row)

    arrays = SINGLES, WORDS, PAIR(HALVES), INTEGERS, ELEMENTS[kind]
    SIGNATURES[kernel] = types.void(*arrays, *[types.int32] * 7)
    return kernel
