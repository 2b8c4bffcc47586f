"""Attention to a latent key-value cache on NVIDIA GPUs, in Numba CUDA: three kernels, and no key or value in memory.

    latents          keeps what a projection knows of a token between its two stages, in float16 or 8 bits
    attend_latents   scores of the tokens of a tile, and the weighted sum of their values' latents
    expand_latents   puts tiles together, and makes values of the sum

The first stages of k_proj and v_proj, t, are what is kept of a token (kv_cache.py). A block of `attend_latents` has a
tile of tokens. Its warps expand their keys on tensor cores, as `cuda_batch.products` does: signs of U become +h or -h
on their way there, and t comes from shared memory. A lane has the same entries of the lower and of the upper half of a
key, for the same tokens, of one head after the other, so the cosines and sines that rotate them stay in its registers;
so do the keys, until all that is left of them is their product with the query. Values are not expanded here: the
weighted sum of t is, once for each head and share of the tiles, by `expand_latents`.

Tiles are put together as blocks of `cuda_decode.attend` are, relative to the largest score of each.
"""

# What Numba makes of cuda.threadIdx and its like is not what their Python stand-ins say.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportOperatorIssue=false
# pyright: reportGeneralTypeIssues=false, reportIndexIssue=false, reportOptionalSubscript=false

from functools import partial
from typing import Any, NamedTuple

from numba import cuda, float32, int32, types, uint8, uint32

from .cuda_decode import BYTES, INTEGERS, LOWEST, block_sum, four_bytes, half_words, nothing, over, put_eight, summed
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

WARPS = 16  # of a block, but for tiles
THREADS = 32 * WARPS
TILE_WARPS = 4  # of a block that has a tile, or those of a head
THREADS_AT_ONCE = 256  # with tiles, of a multiprocessor, which has no more registers
TILES = (64, 32, 16, 8)  # tokens of a block, of which the most are taken that shared memory has room for
AT_ONCE, TILES_AT_ONCE = 4, 8  # latents and queries, and sums of tiles, that a thread has on their way
PAIR_WORDS = 32  # of shared memory for the latents of a pair of words of signs, in float16


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
    cp_async_16(signal, uint32(target), codes, uint32(4 * eighth))
    return uint32(0), uint32(0)


@cuda.jit(device=True, forceinline=True)
def nothing_left(signal, target, words):
    """Eight latents that `copy_halves` copies need nothing else."""


@cuda.jit(device=True, forceinline=True)
def load_bytes(signal, target, codes, eighth):
    """Eight latents that are kept in 8 bits."""
    return load2(codes, uint32(2 * eighth))


@cuda.jit(device=True, forceinline=True)
def put_bytes(signal, target, words):
    """Put them into shared memory as float16."""
    (a, b, c, d), (e, f, g, h) = four_bytes(words[0]), four_bytes(words[1])
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
    fetch, put : device functions
        Eight of them into shared memory, where float16 is what is multiplied: the first begins, and the second ends
        with what the first has returned, so that several are on their way.
    """

    rounded: Any
    array: Any
    largest: float
    fetch: Any
    put: Any


#: By the type of the cache.
KEPT = {
    "half": Kept(round_to_half, HALVES, 1.0, copy_halves, nothing_left),
    "byte": Kept(round_to_byte, BYTES, 127.0, load_bytes, put_bytes),
}
PAIR = partial(types.UniTuple, count=2)


@kernel_factory
def latents(kept: str, early: bool) -> Any:
    """Put a token's latents into a cache of a type in KEPT, over their largest magnitude."""
    rounded, array, largest, _, _ = KEPT[kept]

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
            griddep_wait()
            griddep_launch_dependents()
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
    grouped : bool
        Whether warps multiply in groups of four (see cuda_batch.products).
    """

    kind: str
    kept: str
    size: int
    tokens: int
    grouped: bool

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

    def parts(self, heads: int, value_width: int) -> int:
        """Parts of a tile of which each is summed by threads of its own, for so many heads of queries in a block."""
        return max(1, self.threads // (value_width // 8 * -(-heads // 4)))

    def held(self, heads: int, width: int, value_width: int) -> int:
        """Words of shared memory for keys, queries and scores, or later sums, of so many heads of queries in a block.

        `width` is words of signs in a row of U.
        """
        first = self.tokens * (width // 2 * PAIR_WORDS + self.warps_of_head * heads) + heads * self.size
        return max(first, self.parts(heads, value_width) * heads * value_width)

    def shared_bytes(self, heads: int, width: int, value_width: int) -> int:
        """Of a block: what it holds, and then values, weights and scales."""
        later = -(-value_width // 64) * PAIR_WORDS + heads + 2
        return 4 * (self.held(heads, width, value_width) + self.tokens * later)

    def blocks_at_once(self, shared_bytes: int, of_block: int) -> int:
        """Blocks of so many bytes that a multiprocessor runs at the same time."""
        return max(1, min(THREADS_AT_ONCE // self.threads, shared_bytes // of_block))


@kernel_factory
def attend_latents(made: LatentTile, early: bool) -> Any:
    """Scores and weighted sums of latents; see the top of this file."""
    kind, kept, size, tokens, grouped = made
    at_place, begin_to_put, end_to_put = AT[kind], KEPT[kept].fetch, KEPT[kept].put
    half, warps, threads, across, pair_words = size // 2, made.warps, made.threads, tokens // 8, tokens * PAIR_WORDS
    warps_of_head, heads_at_once = made.warps_of_head, made.heads_at_once
    mine, sums_of_half = tokens // 4, 4 * across  # of a lane
    first_half, second_half = (warp_mma(2, across, which, 8 * PAIR_WORDS) for which in range(2))
    both_halves, no_keys, put = warpgroup_mma(across), zero_accumulators(2 * sums_of_half), store_scores(across)
    angle_numbers = tuple(range(2 * mine))
    at_once = min(AT_ONCE, tokens // warps)
    token_numbers, query_numbers = tuple(range(at_once)), tuple(range(AT_ONCE))
    heads_together = threads // half  # whose queries all threads read at once

    @cuda.jit(device=True, forceinline=True)
    def angle(number, rest):
        """A cosine or sine of one of a lane's tokens, for one of its two rows."""
        table, place, first, last = rest
        token = min(int32(first + int32(8 * (number >> 2) + ((number >> 1) & 1))), last)
        return table[uint32(int32(token * half) + int32(place + 8 * (number & 1)))]

    angles = over(angle, 2 * mine)

    @cuda.jit(device=True, forceinline=True)
    def place_of(target, token, chunk):
        """Where eight latents of a token go: chunks of each pair are swapped, so that no banks collide."""
        return int32(int32(target + int32(token * PAIR_WORDS)) + int32(int32(chunk ^ int32(token & 7)) << 2))

    @cuda.jit(device=True, forceinline=True)
    def fetched(number, rest):
        """What fetches eight latents of one of the tokens that are read at once."""
        signal, target, chunk, token, codes, base, last, width, column = rest
        token = int32(token + warps * number)
        eighth = int32(int32(base + min(token, last)) * width + column)
        return number, begin_to_put(signal, place_of(target, token, chunk), codes, eighth)

    @cuda.jit(device=True, forceinline=True)
    def stored(item, rest):
        """Put them where they belong."""
        signal, target, chunk, token = rest
        number, words = item
        end_to_put(signal, place_of(target, int32(token + warps * number), chunk), words)
        return number

    fetch, store = over(fetched, at_once), over(stored, at_once)

    @cuda.jit(device=True, forceinline=True)
    def put_latents(signal, held, codes, base, last, chunks, first_chunks, count_1, count_2, warp, lane):
        """Put a tile's latents into shared memory, those of a pair of words of signs after another's.

        A token's are `chunks` eights, of which `first_chunks` are the first path's; both end with zeros.
        """
        width, item = int32(int32(count_1 + count_2) >> 3), lane
        while item < chunks:
            within = item if item < first_chunks else int32(item - first_chunks)
            limit = count_1 if item < first_chunks else count_2
            column = within if item < first_chunks else int32(within + int32(count_1 >> 3))
            target, chunk, token = int32(held + int32(item >> 3) * pair_words), int32(item & 7), warp
            while token < tokens:
                if int32(within << 3) < limit:
                    read = fetch(token_numbers, (signal, target, chunk, token, codes, base, last, width, column))
                    store(read, (signal, target, chunk, token))
                else:
                    for number in range(at_once):
                        place = uint32(place_of(target, int32(token + warps * number), chunk))
                        store4(signal, place, uint32(0), uint32(0), uint32(0), uint32(0))
                token = int32(token + warps * at_once)
            item = int32(item + 32)

    @cuda.jit(device=True, forceinline=True)
    def query(number, rest):
        """Two entries of one of the queries that are read at once."""
        projected, place, head, last = rest
        at = int32(place + int32(min(int32(head + heads_together * number), last) * size))
        return at_place(projected, at), at_place(projected, int32(at + half))

    queries = over(query, AT_ONCE)

    @cuda.jit(device=True, forceinline=True)
    def put_queries(shared, held, projected, cosine, sine, position, place, heads, factor, thread):
        """Put rotated queries, scaled, into shared memory."""
        entry, head = int32(thread & (half - 1)), int32(thread // half)
        turn = uint32(int32(position * half) + entry)
        c, s = cosine[turn] * factor, sine[turn] * factor
        while head < heads:
            read = queries(query_numbers, (projected, int32(place + entry), head, int32(heads - 1)))
            for number in range(AT_ONCE):
                other = int32(head + heads_together * number)
                if other < heads:
                    at, (low, high) = int32(held + int32(other * size) + entry), read[number]
                    shared[uint32(at)], shared[uint32(at + half)] = low * c - high * s, high * c + low * s
            head = int32(head + heads_together * AT_ONCE)

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
    def by_warps(sums, signs, scales, signal, place, lane):
        """Sums plus products of both halves of a key with a pair's latents; signs and scales are of a lane's rows."""
        row, chunk = int32(lane & 7), int32(lane >> 3)
        sums = first_half(sums, signs, scales, signal, uint32(place_of(place, row, chunk)), lane)
        return second_half(sums, signs, scales, signal, uint32(place_of(place, row, int32(chunk + 4))), lane)

    @cuda.jit(device=True, forceinline=True)
    def by_groups(sums, signs, scales, signal, place, lane):
        """The same, warps in groups of four."""
        low = both_halves(sums[:sums_of_half], signs[:4], scales[:2], signal, uint32(place), lane)
        high = both_halves(sums[sums_of_half:], signs[4:], scales[2:], signal, uint32(place), lane)
        return low + high

    multiply = by_groups if grouped else by_warps

    @cuda.jit(device=True, forceinline=True)
    def query_at(shared, place):
        """What a query has for a lane's four rows."""
        at = uint32(place)
        return shared[at], shared[at + 8], shared[at + half], shared[at + half + 8]

    @cuda.jit
    def kernel(
        projected, codes, scales, words, row_scales, cosine, sine, positions, left,
        kv_heads, group, of_block, width, first_words, count_1, count_2, value_width, capacity, parts, held, factor,
    ):  # fmt: skip
        """Grid (tiles that the capacity has room for, blocks that share the heads of keys, sequences).

        codes : keys' and values' as words, of (sequences, capacity, count_1 + count_2 or value_width) latents; scales :
        (sequences, capacity); words : of U of the keys' paths side by side, (kv_heads * size, width), entries of each
        in the order 0, 2 to 30, 1, 3 to 31, and each path's in pairs; row_scales : h of each path; left : (sequences,
        heads, tiles, value_width + SUMMARY). A block has `of_block` heads of keys, sums a tile in `parts`, and keeps
        until its end what comes after `held` words.
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
        turn, team, own = int32(0), int32(warp // warps_of_head), int32(warp % warps_of_head)
        frequency, mine_first = int32(16 * own + int32(lane >> 2)), int32(first + int32(int32(lane & 3) << 1))
        cosines = angles(angle_numbers, (cosine, frequency, mine_first, int32(capacity - 1)))
        sines = angles(angle_numbers, (sine, frequency, mine_first, int32(capacity - 1)))
        key_row = int32(int32(begin + min(team, int32(of_keys - 1))) * size + frequency)
        ready = signs_of(words, key_row, width, int32(0))
        ready_first, ready_second = scales_of(row_scales[0], key_row), scales_of(row_scales[1], key_row)
        if early:
            griddep_wait()
            griddep_launch_dependents()
        keys, values, first_chunks = codes[0], codes[1], int32(first_words << 2)
        put_latents(signal, int32(0), keys, base, last, chunks, first_chunks, count_1, count_2, warp, lane)
        put_latents(signal, held, values, base, last, value_chunks, value_chunks, value_width, int32(0), warp, lane)
        if thread < tokens:
            at = uint32(base + min(thread, last))
            cp_async_4(shared, uint32(held_scales + thread), scales[0], at)
            cp_async_4(shared, uint32(held_scales + tokens + thread), scales[1], at)
        place = int32(int32(row * int32(heads + 2 * kv_heads) + int32(begin * group)) * size)
        put_queries(shared, held_queries, projected, cosine, sine, position, place, of_queries, factor, thread)
        cp_async_wait_all()
        if grouped:
            fence_async_proxy()
        cuda.syncthreads()

        pairs = int32(width >> 1)
        while turn < of_keys:  # warps of other heads come along, for they may multiply together
            of_first, of_second, sums, pair = ready_first, ready_second, no_keys(), int32(0)
            key = int32(turn + team)
            following = int32(int32(begin + min(int32(key + heads_at_once), int32(of_keys - 1))) * size + frequency)
            ready_first, ready_second = scales_of(row_scales[0], following), scales_of(row_scales[1], following)
            while pair < pairs:
                signs, another = ready, int32(pair + 1)
                ends = another == pairs
                ready = signs_of(words, following if ends else key_row, width, int32(0) if ends else another)
                weights = of_first if int32(2 * pair) < first_words else of_second
                sums = multiply(sums, signs, weights, signal, int32(pair * pair_words), lane)
                pair = another
            head, last_head = int32(key * group), int32(min(int32(key + 1), of_keys) * group)
            while head < last_head:
                target = int32(held_scores + int32(int32(head * warps_of_head) + own) * tokens)
                query = int32(held_queries + int32(head * size) + frequency)
                put(shared, uint32(target), sums, cosines, sines, query_at(shared, query), lane)
                head = int32(head + 1)
            turn, key_row = int32(turn + heads_at_once), following
        cuda.syncthreads()

        across_left, tiles = int32(value_width + SUMMARY), int32(cuda.gridDim.x)
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
            top, total, token = warp_largest(top), float32(0), lane
            while token < tokens:
                at = uint32(int32(held_weights + int32(head * tokens)) + token)
                weight = exponential(shared[at] - top) if int32(first + token) <= position else float32(0)
                shared[at] = weight * shared[uint32(held_scales + tokens + token)]
                total, token = float32(total + weight), int32(token + 32)
            total = warp_sum(total)
            if lane == 0:
                at = int32(int32(int32(row * heads + int32(begin * group + head)) * tiles + tile) * across_left)
                left[uint32(at + value_width)], left[uint32(at + value_width + 1)] = top, total
            head = int32(head + warps)
        cuda.syncthreads()

        items, item = int32(value_chunks * int32(int32(of_queries + 3) >> 2)), thread
        seen = min(int32(tokens), int32(position + 1 - first))
        while item < items * parts:
            part, rest = int32(item // items), int32(item % items)
            chunk, four = int32(rest % value_chunks), int32(int32(rest // value_chunks) << 2)
            a, b, c, d, token = nothing(), nothing(), nothing(), nothing(), part
            final = int32(of_queries - 1)
            two, three, last_one = min(int32(four + 1), final), min(int32(four + 2), final), min(int32(four + 3), final)
            block, within = int32(held + int32(chunk >> 3) * pair_words), int32(chunk & 7)
            while token < seen:
                v, at = (
                    half_words(load4(signal, uint32(place_of(block, token, within)))),
                    int32(held_weights + token),
                )
                a = add8(a, scale8(v, shared[uint32(at + int32(four * tokens))]))
                b = add8(b, scale8(v, shared[uint32(at + int32(two * tokens))]))
                c = add8(c, scale8(v, shared[uint32(at + int32(three * tokens))]))
                d = add8(d, scale8(v, shared[uint32(at + int32(last_one * tokens))]))
                token = int32(token + parts)
            at = int32(int32(int32(part * of_queries) * value_width) + int32(chunk << 3))
            put_eight(shared, int32(at + int32(four * value_width)), a, float32)
            if four + 1 < of_queries:
                put_eight(shared, int32(at + int32(two * value_width)), b, float32)
            if four + 2 < of_queries:
                put_eight(shared, int32(at + int32(three * value_width)), c, float32)
            if four + 3 < of_queries:
                put_eight(shared, int32(at + int32(last_one * value_width)), d, float32)
            item = int32(item + threads)
        cuda.syncthreads()
        head = warp
        while head < of_queries:
            base = int32(int32(int32(row * heads + int32(begin * group + head)) * tiles + tile) * across_left)
            column = lane
            while column < value_width:
                total, part, at = float32(0), int32(0), int32(int32(head * value_width) + column)
                while part < parts:
                    total += shared[uint32(at)]
                    part, at = int32(part + 1), int32(at + int32(of_queries * value_width))
                left[uint32(base + column)] = total
                column = int32(column + 32)
            head = int32(head + warps)

    SIGNATURES[kernel] = types.void(
        ELEMENTS[kind], PAIR(WORDS), PAIR(SINGLES), WORDS, PAIR(HALVES), SINGLES, SINGLES, INTEGERS, SINGLES,
        *[types.int32] * 11, types.float32,
    )  # fmt: skip
    return kernel


def expanding_bytes(tiles: int, words: int, value_width: int) -> int:
    """Shared memory of a block of `expand_latents`."""
    parts = max(1, THREADS // (value_width // 4))
    return 4 * (2 * WARPS + 32 * words + -(-tiles // 4) * 4 + parts * value_width)


@kernel_factory
def expand_latents(kind: str, size: int, whole: bool, early: bool) -> Any:
    """What a head's attention comes to, from the sums of values' latents that `attend_latents` has left.

    If not `whole`, each block makes one of Shares (see cuda.py) of its own share of the tiles.
    """
    rounded, threads_of_row = ROUND[kind], max(1, THREADS // size)
    row_sum, numbers = summed(threads_of_row), tuple(range(TILES_AT_ONCE))

    @cuda.jit(device=True, forceinline=True)
    def fetched(number, rest):
        """Four sums of one of the tiles that are read at once; of another where there is none."""
        left, column, tile, parts, last, stride = rest
        a, b, c, d = load4(left, uint32(column + int32(min(int32(tile + int32(number * parts)), last) * stride)))
        return as_float(a), as_float(b), as_float(c), as_float(d)

    fetch = over(fetched, TILES_AT_ONCE)

    @cuda.jit
    def kernel(
        left, words, row_scales, positions, y, group, tokens, tiles, width, first_words, count_1, count_2
    ):  # fmt: skip
        """Grid (heads, sequences, shares); words : of U of the values' paths side by side, (kv_heads * size, width)."""
        signal, shared = cuda.shared.array(0, uint32), cuda.shared.array(0, float32)
        thread, head, row = int32(cuda.threadIdx.x), int32(cuda.blockIdx.x), int32(cuda.blockIdx.y)
        count, share, shares = int32(int32(positions[row]) // tokens + 1), int32(cuda.blockIdx.z), int32(cuda.gridDim.z)
        each = int32(int32(int32(count + shares) - 1) // shares)
        first_tile, end = int32(share * each), min(count, int32(int32(share + 1) * each))
        value_width = int32(count_1 + count_2)
        stride = int32(value_width + SUMMARY)
        base = int32(int32(int32(row * int32(cuda.gridDim.x)) + head) * tiles * stride)
        held_mean = int32(2 * WARPS)
        held_factors = int32(held_mean + int32(width << 5))
        held_parts = int32(held_factors + int32(int32(int32(tiles + 3) >> 2) << 2))
        if early:
            griddep_wait()
            griddep_launch_dependents()
        top, tile = float32(LOWEST), int32(first_tile + thread)
        while tile < end:
            top, tile = larger(top, left[uint32(base + int32(tile * stride) + value_width)]), int32(tile + THREADS)
        top, total, tile = block_max(top, shared), float32(0), int32(first_tile + thread)
        while tile < end:
            at = int32(base + int32(tile * stride) + value_width)
            factor = exponential(left[uint32(at)] - top)
            shared[uint32(held_factors + int32(tile - first_tile))] = factor
            total, tile = float32(total + factor * left[uint32(at + 1)]), int32(tile + THREADS)
        item = thread
        while item < int32(width << 5):
            shared[uint32(held_mean + item)] = float32(0)
            item = int32(item + THREADS)
        cuda.syncthreads()  # the first numbers of shared memory have been read
        total = block_sum(total, shared, WARPS)

        fours = int32(value_width >> 2)
        parts, item = max(int32(1), int32(THREADS // fours)), thread
        while item < parts * fours:
            part, four = int32(item // fours), int32(int32(item % fours) << 2)
            sums, tile = (float32(0), float32(0), float32(0), float32(0)), int32(first_tile + part)
            while tile < end:
                read = fetch(numbers, (left, int32(base + four), tile, parts, int32(end - 1), stride))
                for i in range(TILES_AT_ONCE):
                    number = int32(tile + int32(i * parts))
                    factor = shared[uint32(held_factors + int32(min(number, int32(end - 1)) - first_tile))]
                    sums = add4(sums, scale4(read[i], factor if number < end else float32(0)))
                tile = int32(tile + int32(TILES_AT_ONCE * parts))
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
            shared[uint32(held_mean + place)] = mean / total if whole else mean
            item = int32(item + THREADS)
        cuda.syncthreads()

        target = int32(int32(row * int32(cuda.gridDim.x) + head) * size)
        if not whole:
            target = int32(int32(int32(row * int32(cuda.gridDim.x) + head) * shares + share) * (size + SUMMARY))
            if thread == 0:
                y[uint32(target + size)], y[uint32(target + size + 1)] = top, total
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
                y[uint32(target + entry)] = rounded(value)
            entry = int32(entry + THREADS // threads_of_row)

    arrays = SINGLES, WORDS, PAIR(HALVES), INTEGERS, ELEMENTS[kind]
    SIGNATURES[kernel] = types.void(*arrays, *[types.int32] * 7)
    return kernel
