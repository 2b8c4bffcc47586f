"""The packed linear layer on NVIDIA GPUs, in Numba CUDA: two launches, `latent` and then `output`.

Both multiply a matrix of signs with a few vectors. A row of signs is bits, s = 1 - 2 b, so that

    sum_j s_j v_j = sum_j v_j - 2 sum_j b_j v_j

and the second sum is a product of a matrix of zeros and ones, which tensor cores take as bfloat16. To make these costs
one instruction for two signs: a bit that stands alone in the exponent of a bfloat16 *is* a number, 2 to the power
2^k - 127 for bit k of the exponent. So `word & mask` gives two matrix entries, b_j and b_{j+16} times that number,
with no shift and no conversion, and v_j is divided by the number beforehand, once for all rows. A bfloat16 has 8 bits
of precision, a vector two of them, high and low part, in two columns of the second matrix: 16 bits; a tensor core
multiplies eight columns at the same price, so four vectors at once cost what one does. Sums are float32.

    latent   part[s, b, r] = sum over the s-th part of d_in of V_sign[r, i] g_i x[b, i]         (all paths' rows)
    output   y[b, o] = sum over paths of h_o sum_r U_sign[o, r] ell_r sum_s part[s, b, r]

`latent` divides d_in among blocks too, since the rank is small; `output` adds their parts up. Nothing is added in an
order that depends on time: results are the same each time.

`plain_latent` and `plain_output` are the first step of the ladder: a warp for each row, a sign at a time.

`packed_linear` here is their way in from torch; `kernels.packed_linear` does not choose it yet.
"""

# What Numba makes of cuda.threadIdx and its like is not what their Python stand-ins say.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportOperatorIssue=false

from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from numba import config, cuda, float32, int32, uint16, uint32
from torch import Tensor

from ..packing import PackedFactors
from .cuda_lanes import as_float, load4, multiply_add, pack_bfloat16

CHUNK = 4  # words of a row that a step reads: 128 signs, 32 for each of the four lanes of a row
GROUP = 16  # words of a row that are read ahead of their use
ROWS = 16  # of a tile: what a warp multiplies at once
VECTORS = 4  # that are multiplied at once
SHARED_BYTES = 48 << 10  # of shared memory that a block may have without asking
SCALE = float(2.0**56)  # the tensor cores' sums are this much smaller, so that all numbers fit
config.CUDA_LOW_OCCUPANCY_WARNINGS = 0  # a small layer cannot fill a GPU
KINDS = {torch.float16: "half", torch.bfloat16: "bfloat", torch.float32: "single"}


@cuda.jit(device=True, forceinline=True)
def chunk(sums, upper, lower, signal, place, active):
    """Add 128 columns of a tile: `upper` and `lower` are the lane's words of rows g and g + 8.

    Signs 0 to 6 of each half of a word are moved up by eight bits, where the exponent begins; sign 15 down by one.
    Four sums, so that a product need not wait for the one before it.
    """
    c, d, e, f = sums
    up, down = upper << uint32(8), lower << uint32(8)
    m0, m1, m2, m3 = uint32(0x01000100), uint32(0x02000200), uint32(0x04000400), uint32(0x08000800)
    m4, m5, m6, m7 = uint32(0x10001000), uint32(0x20002000), uint32(0x40004000), uint32(0x00800080)
    x0 = x1 = x2 = x3 = y0 = y1 = y2 = y3 = uint32(0)
    if active:
        x0, x1, x2, x3 = load4(signal, uint32(place))
        y0, y1, y2, y3 = load4(signal, uint32(place + 16))
    c = multiply_add(c, up & m0, down & m0, up & m1, down & m1, x0, x1)
    d = multiply_add(d, up & m2, down & m2, up & m3, down & m3, x2, x3)
    e = multiply_add(e, up & m4, down & m4, up & m5, down & m5, y0, y1)
    f = multiply_add(f, up & m6, down & m6, upper & m7, lower & m7, y2, y3)
    if active:
        x0, x1, x2, x3 = load4(signal, uint32(place + 32))
        y0, y1, y2, y3 = load4(signal, uint32(place + 48))
    up, down = upper >> uint32(1), lower >> uint32(1)
    c = multiply_add(c, upper & m0, lower & m0, upper & m1, lower & m1, x0, x1)
    d = multiply_add(d, upper & m2, lower & m2, upper & m3, lower & m3, x2, x3)
    e = multiply_add(e, upper & m4, lower & m4, upper & m5, lower & m5, y0, y1)
    f = multiply_add(f, upper & m6, lower & m6, up & m6, down & m6, y2, y3)
    return c, d, e, f


@cuda.jit(device=True, forceinline=True)
def words_of_row(words, start, limit, at, of, wide):
    """The lane's four words of a group that begins with word `at` of a row: side by side if `wide`, else every fourth.

    Words from `limit` on are zero.
    """
    w0 = w1 = w2 = w3 = uint32(0)
    if wide:
        at = int32(at + 4 * of)
        if at < limit:
            w0, w1, w2, w3 = load4(words, uint32(start + at))
    else:
        at = int32(at + of)
        if at < limit:
            w0 = words[uint32(start + at)]
        if at + 4 < limit:
            w1 = words[uint32(start + at + 4)]
        if at + 8 < limit:
            w2 = words[uint32(start + at + 8)]
        if at + 12 < limit:
            w3 = words[uint32(start + at + 12)]
    return w0, w1, w2, w3


@cuda.jit(device=True, forceinline=True)
def words_of_tile(words, first_row, rows, width, group, end, wide):
    """The lane's words of a group of rows g and g + 8 of a tile; zero beyond the matrix and from group `end` on."""
    of, row = int32(cuda.laneid & 3), int32(first_row + ((cuda.laneid & 31) >> 2))
    at, start = int32(GROUP * group), int32(row * width)
    limit = width if group < end else int32(0)
    upper = words_of_row(words, start, limit if row < rows else int32(0), at, of, wide)
    lower = words_of_row(words, int32(start + 8 * width), limit if int32(row + 8) < rows else int32(0), at, of, wide)
    return upper, lower


@cuda.jit(device=True, forceinline=True)
def tile(sums, read, words, first_row, rows, width, begin, end, step, origin, signal, stride, columns, wide):
    """Add the products of 16 rows of signs with the vectors in shared memory: every `step`-th group, `begin` to `end`.

    `read` are the words of the first group; `origin` is the group that the vectors in shared memory begin with,
    `stride` the distance of two columns.
    """
    lane = int32(cuda.laneid & 31)
    active = lane >> 2 < columns
    base = int32((lane >> 2) * stride + 4 * (lane & 3))
    group = begin
    while group < end:
        upper, lower = read
        following = int32(group + step)
        read = words_of_tile(words, first_row, rows, width, following, end, wide)
        left = int32(width - GROUP * group)
        place = int32(base + 256 * (group - origin))
        sums = chunk(sums, upper[0], lower[0], signal, place, active)
        if wide or left > 4:
            sums = chunk(sums, upper[1], lower[1], signal, int32(place + 64), active)
        if wide or left > 8:
            sums = chunk(sums, upper[2], lower[2], signal, int32(place + 128), active)
        if wide or left > 12:
            sums = chunk(sums, upper[3], lower[3], signal, int32(place + 192), active)
        group = following
    return sums


@cuda.jit(device=True, forceinline=True)
def zeros():
    """Four sums of a tile."""
    zero = (float32(0), float32(0), float32(0), float32(0))
    return zero, zero, zero, zero


@cuda.jit(device=True, forceinline=True)
def put(signal, place, stride, factor, first, second):
    """Put two entries of a vector, 16 columns of signs apart, into shared memory: high parts, and low parts."""
    first, second = first * factor, second * factor
    high = pack_bfloat16(second, first)
    signal[uint32(place)] = high
    first -= as_float(high << uint32(16))
    second -= as_float(high & uint32(0xFFFF0000))
    signal[uint32(place + stride)] = pack_bfloat16(second, first)


@cuda.jit(device=True, forceinline=True)
def factor_of(k):
    """What sign k of each 16 asks the vector to be multiplied by: 2^(-56 - exponent), made from its bits."""
    bit = k + 1 if k < 7 else k - 7 if k < 15 else 7  # of the exponent, 0 to 7
    return as_float(uint32((198 - (1 << bit)) << 23))  # -56 - (2^bit - 127), and 127 for the float32's own exponent


@cuda.jit(device=True, forceinline=True)
def place_of(word, k, wide):
    """Where the entries of a word's signs k and k + 16 stand in shared memory, counted from a column's begin."""
    of, step = int32(word & 3), int32(word >> 2 & 3)
    if wide:
        of, step = step, of
    return int32((word >> 4) * 256 + step * 64 + (k >> 2) * 16 + of * 4 + (k & 3))


@cuda.jit(device=True, forceinline=True)
def warp_sum(value):
    """Sum over a warp, the same in every lane."""
    for distance in (16, 8, 4, 2, 1):
        value += cuda.shfl_xor_sync(0xFFFFFFFF, value, distance)
    return value


@cuda.jit(device=True, forceinline=True)
def add_lot(shared, place, lot, first):
    """Put a number into shared memory, or add it to what is there."""
    shared[place] = lot if first else shared[place] + lot


@cuda.jit(device=True, forceinline=True)
def keep(shared, place, warp, vectors, sums):
    """Put a warp's 16 sums for each vector into shared memory; high and low parts are neighbours in a lane."""
    lane = int32(cuda.laneid & 31)
    of, row = int32(lane & 3), int32(lane >> 2)
    c, d, e, f = sums
    if of < vectors:
        place = uint32(place + (warp * ROWS + row) * VECTORS + of)
        shared[place] = (c[0] + d[0]) + (e[0] + f[0]) + ((c[1] + d[1]) + (e[1] + f[1]))
        shared[uint32(place + 8 * VECTORS)] = (c[2] + d[2]) + (e[2] + f[2]) + ((c[3] + d[3]) + (e[3] + f[3]))


@cuda.jit(device=True, forceinline=True)
def total_of(shared, kept, lots, warps, first_warp, sharing, row, vector):
    """The signed sum of a row: sum of the vector, less twice that of the bits, over the warps that have parts of it."""
    lot = total = float32(0)
    for warp in range(warps):
        lot += shared[uint32(lots + warp * VECTORS + vector)]
    for warp in range(sharing):
        total += shared[uint32(kept + ((first_warp + warp) * ROWS + row) * VECTORS + vector)]
    return lot - float32(2 * SCALE) * total


def single_of(kind: str) -> Any:
    """The device function that makes a float32 of an element of a kind; bfloat16 comes as its bits."""
    if kind == "bfloat":
        return cuda.jit(device=True, forceinline=True)(lambda value: as_float(uint32(value) << uint32(16)))
    return cuda.jit(device=True, forceinline=True)(lambda value: float32(value))


def of_single(kind: str) -> Any:
    """The device function that rounds a float32 to an element of a kind; bfloat16 as its bits."""
    if kind == "bfloat":
        return cuda.jit(device=True, forceinline=True)(lambda value: uint16(pack_bfloat16(float32(0), value)))
    if kind == "half":
        return cuda.jit(device=True, forceinline=True)(lambda value: np.float16(value))
    return cuda.jit(device=True, forceinline=True)(lambda value: value)


@cuda.jit(device=True, forceinline=True)
def block_of(logs, rows):
    """What both kernels know of their block: thread, threads, warp, first vector, vectors, rows of words, sharing."""
    thread = int32(cuda.threadIdx.x)
    first = int32(VECTORS * cuda.blockIdx.z)
    vectors = min(int32(VECTORS), int32(rows - first))
    return (
        thread,
        int32(cuda.blockDim.x),
        int32(thread >> 5),
        first,
        vectors,
        int32(ROWS << logs[1]),
        int32(1 << logs[2]),
    )


@cache
def latent(kind: str, wide: bool, paths: int) -> Any:
    """The first kernel: for an input of a kind, words that are read 16 bytes at a time or not, and one or two paths."""
    to_single = single_of(kind)

    @cuda.jit(device=True, forceinline=True)
    def entry(x, g, base, at, last):
        return to_single(x[uint32(base + at)]) * float32(g[uint32(at)]) if at < last else float32(0)

    @cuda.jit
    def kernel(x, g_1, g_2, v_1, v_2, rank_1, rank_2, d_in, rows, part, segment, logs):
        """Grid (tiles of both paths / tiles of a block, parts of d_in, vectors / 4).

        `logs`: binary logarithms of the parts, of the tiles of a block, and of the warps that share one.
        """
        thread, threads, warp, first, vectors, tile_rows, sharing = block_of(logs, rows)
        blocks_1 = int32((rank_1 + tile_rows - 1) >> (4 + logs[1]))
        block = int32(cuda.blockIdx.x)
        second = paths == 2 and block >= blocks_1
        g, words = (g_2, v_2) if second else (g_1, v_1)
        rank = int32(rank_2) if second else int32(rank_1)
        first_row = int32(tile_rows * (int32(block - blocks_1) if second else block))
        row = int32(first_row + ROWS * (warp >> logs[2]))
        width = int32((d_in + 31) >> 5)
        groups = (width + GROUP - 1) >> 4
        begin = int32(groups * cuda.blockIdx.y >> logs[0])
        end = int32(groups * (cuda.blockIdx.y + 1) >> logs[0])
        stride = int32(256 * segment + 16)
        signal = cuda.shared.array(0, uint32)
        shared = cuda.shared.array(0, float32)
        kept = int32(2 * min(VECTORS, rows) * stride)  # where in shared memory the warps' sums begin
        warps = int32(threads >> 5)
        lots = int32(kept + warps * ROWS * VECTORS)
        k, factor = int32(thread & 15), factor_of(int32(thread & 15))
        sums = zeros()
        origin = begin
        while origin < end:
            stop = min(int32(origin + segment), end)
            mine = int32(origin + (warp & (sharing - 1)))
            read = words_of_tile(words, row, rank, width, mine, stop, wide)
            if origin > begin:
                cuda.syncthreads()
            count = int32(256 * (stop - origin))
            last = min(int32(32 * GROUP * stop), int32(d_in))
            for vector in range(vectors):
                lot = float32(0)
                base = uint32((first + vector) * d_in)
                place = int32(2 * vector * stride)
                item = thread
                while item < count:
                    at, following = int32(32 * (GROUP * origin + (item >> 4)) + k), int32(item + threads)
                    ahead = int32(at + 2 * threads)
                    a, b = entry(x, g, base, at, last), entry(x, g, base, int32(at + 16), last)
                    c, d = entry(x, g, base, ahead, last), entry(x, g, base, int32(ahead + 16), last)
                    lot += (a + b) + (c + d)
                    put(signal, int32(place + place_of(item >> 4, k, wide)), stride, factor, a, b)
                    if following < count:
                        put(signal, int32(place + place_of(following >> 4, k, wide)), stride, factor, c, d)
                    item = int32(following + threads)
                lot = warp_sum(lot)
                if cuda.laneid & 31 == 0:
                    add_lot(shared, uint32(lots + warp * VECTORS + vector), lot, origin == begin)
            cuda.syncthreads()
            sums = tile(
                sums, read, words, row, rank, width, mine, stop, sharing, origin, signal, stride, 2 * vectors, wide
            )  # fmt: skip
            origin = stop
        keep(shared, kept, warp, vectors, sums)
        cuda.syncthreads()
        item = thread
        while item < tile_rows * vectors:
            of, vector = int32(item & (tile_rows - 1)), int32(item >> (4 + logs[1]))
            if first_row + of < rank:
                total = total_of(shared, kept, lots, warps, int32(of >> 4 << logs[2]), sharing, of & 15, vector)
                place = (cuda.blockIdx.y * rows + first + vector) * (rank_1 + rank_2)
                place += first_row + of + (rank_1 if second else 0)
                part[uint32(place)] = total
            item = int32(item + threads)

    return kernel


@cache
def output(kind: str, wide: bool, paths: int, parts: int) -> Any:
    """The second kernel, likewise, and for so many parts."""
    from_single = of_single(kind)

    @cuda.jit(device=True, forceinline=True)
    def entry(part, ell, base, distance, at, last):
        value = float32(0)
        if at < last:
            for split in range(parts):  # known to the compiler, so that no load waits for another
                value += part[uint32(base + split * distance + at)]
            value *= float32(ell[uint32(at)])
        return value

    @cuda.jit
    def kernel(part, ell_1, ell_2, u_1, u_2, h_1, h_2, rank_1, rank_2, d_out, rows, y, segment, logs):
        """Grid (tiles / tiles of a block, 1, vectors / 4); `logs` as for `latent`."""
        thread, threads, warp, first, vectors, tile_rows, sharing = block_of(logs, rows)
        first_row = int32(tile_rows * cuda.blockIdx.x)
        row = int32(first_row + ROWS * (warp >> logs[2]))
        stride = int32(256 * segment + 16)
        signal = cuda.shared.array(0, uint32)
        shared = cuda.shared.array(0, float32)
        kept = int32(2 * min(VECTORS, rows) * stride)  # where in shared memory the warps' sums begin
        warps = int32(threads >> 5)
        lots = int32(kept + warps * ROWS * VECTORS)
        totals = int32(lots + warps * VECTORS)
        k, factor = int32(thread & 15), factor_of(int32(thread & 15))
        distance = int32(rows * (rank_1 + rank_2))
        for path in range(paths):
            ell, words, h = (ell_2, u_2, h_2) if path else (ell_1, u_1, h_1)
            rank = int32(rank_2) if path else int32(rank_1)
            mine = int32(first_row + (thread & (tile_rows - 1)))
            scale = float32(h[uint32(mine)]) if mine < d_out else float32(0)
            width = int32((rank + 31) >> 5)
            groups = int32((width + GROUP - 1) >> 4)
            sums = zeros()
            origin = int32(0)
            while origin < groups:
                stop = min(int32(origin + segment), groups)
                begin = int32(origin + (warp & (sharing - 1)))
                read = words_of_tile(words, row, int32(d_out), width, begin, stop, wide)
                if origin or path:
                    cuda.syncthreads()
                whole = int32((width - GROUP * origin + 3) >> 2 << 2)  # words of whole chunks
                count = int32(16 * min(int32(GROUP * (stop - origin)), whole))
                last = min(int32(32 * GROUP * stop), rank)
                for vector in range(vectors):
                    lot = float32(0)
                    base = int32((first + vector) * (rank_1 + rank_2) + (rank_1 if path else 0))
                    place = int32(2 * vector * stride)
                    item = thread
                    while item < count:
                        at, following = int32(32 * (GROUP * origin + (item >> 4)) + k), int32(item + threads)
                        ahead = int32(at + 2 * threads)
                        a = entry(part, ell, base, distance, at, last)
                        b = entry(part, ell, base, distance, int32(at + 16), last)
                        c = entry(part, ell, base, distance, ahead, last)
                        d = entry(part, ell, base, distance, int32(ahead + 16), last)
                        lot += (a + b) + (c + d)
                        put(signal, int32(place + place_of(item >> 4, k, wide)), stride, factor, a, b)
                        if following < count:
                            put(signal, int32(place + place_of(following >> 4, k, wide)), stride, factor, c, d)
                        item = int32(following + threads)
                    lot = warp_sum(lot)
                    if cuda.laneid & 31 == 0:
                        add_lot(shared, uint32(lots + warp * VECTORS + vector), lot, origin == 0)
                cuda.syncthreads()
                sums = tile(
                    sums, read, words, row, int32(d_out), width, begin, stop, sharing, origin, signal, stride,
                    2 * vectors, wide,
                )  # fmt: skip
                origin = stop
            keep(shared, kept, warp, vectors, sums)
            cuda.syncthreads()
            item = thread
            while item < tile_rows * vectors:
                of, vector = int32(item & (tile_rows - 1)), int32(item >> (4 + logs[1]))
                at = int32(first_row + of)
                if at < d_out:
                    value = total_of(shared, kept, lots, warps, int32(of >> 4 << logs[2]), sharing, of & 15, vector)
                    value *= scale if item == thread else float32(h[uint32(at)])
                    if path:
                        value += shared[uint32(totals + item)]
                    if path == paths - 1:
                        y[uint32((first + vector) * d_out + at)] = from_single(value)
                    else:
                        shared[uint32(totals + item)] = value
                item = int32(item + threads)

    return kernel


@cuda.jit
def plain_latent(x, g, words, d_in, rows, part, ranks, offset):
    """The first step of the ladder: part[b, offset + r] by one warp for each r, a sign at a time; x is float32.

    Grid (rank / warps of a block, rows); `ranks` is the sum over paths.
    """
    lane, rank = cuda.laneid & 31, words.shape[0]
    row, vector = cuda.blockIdx.x * (cuda.blockDim.x >> 5) + (cuda.threadIdx.x >> 5), cuda.blockIdx.y
    if row < rank:
        total = float32(0)
        for i in range(lane, d_in, 32):
            value = x[vector, i] * float32(g[i])
            total += -value if words[row, i >> 5] >> uint32(i & 31) & uint32(1) else value
        total = warp_sum(total)
        if lane == 0:
            part[uint32(vector * ranks + offset + row)] = total


@cuda.jit
def plain_output(part, ell, words, h, d_out, rows, ranks, offset, y):
    """The other half: y[b, o] by one warp for each o, added to what is there if `offset` is not 0; y is float32."""
    lane, rank = cuda.laneid & 31, ell.shape[0]
    row, vector = cuda.blockIdx.x * (cuda.blockDim.x >> 5) + (cuda.threadIdx.x >> 5), cuda.blockIdx.y
    if row < d_out:
        total = float32(0)
        for i in range(lane, rank, 32):
            value = part[uint32(vector * ranks + offset + i)] * float32(ell[i])
            total += -value if words[row, i >> 5] >> uint32(i & 31) & uint32(1) else value
        total = warp_sum(total) * float32(h[row])
        if lane == 0:
            y[vector, row] = total if offset == 0 else y[vector, row] + total


class Plan(NamedTuple):
    """How the two kernels are launched.

    Attributes
    ----------
    parts : int
        That d_in is divided into: 1, 2, 4 or 8.
    latent_warps, latent_sharing : int
        Warps in a block, and how many of them share a tile of 16 rows.
    output_warps, output_sharing : int
    """

    parts: int
    latent_warps: int
    latent_sharing: int
    output_warps: int
    output_sharing: int


def plan_for(d_out: int, d_in: int, ranks: Sequence[int], multiprocessors: int) -> Plan:
    """A plan from sizes alone: two blocks of eight warps for every multiprocessor, if there is work for them."""
    tiles, groups = sum(-(-rank // ROWS) for rank in ranks), -(-d_in // (32 * GROUP))
    parts = min(power_of_two(max(1, 2 * multiprocessors // tiles)), power_of_two(groups), 8)
    tiles_of_block = min(4, power_of_two(max(1, tiles * parts // (2 * multiprocessors))))
    tiles, groups = -(-d_out // ROWS), -(-max(ranks) // (32 * GROUP))
    sharing = min(8, power_of_two(groups), power_of_two(max(1, 16 * multiprocessors // tiles)))
    return Plan(parts, 8, 8 // tiles_of_block, 8, sharing)


def power_of_two(number: int) -> int:
    """The largest power of two that is at most `number`."""
    return 1 << (number.bit_length() - 1)


def logs(*numbers: int) -> tuple[int, ...]:
    """Binary logarithms of powers of two: a GPU shifts in a cycle and divides in a hundred."""
    return tuple(number.bit_length() - 1 for number in numbers)


def segment_of(columns: int, groups: int, floats: int) -> int:
    """Groups whose vectors are in shared memory at once, with so many other numbers beside them."""
    return min(groups, ((SHARED_BYTES // 4 - floats) // columns - 16) // 256)


def launch(x: Any, kind: str, rows: int, paths: Sequence[Any], y: Any, part: Any, plan: Plan, stream: Any = 0) -> None:
    """Start both kernels, on flat device arrays.

    Parameters
    ----------
    x : (rows * d_in,) array; bfloat16 as uint16
    kind : str
        A value of KINDS, of x and y.
    rows : int
        Vectors.
    paths : one or two PackedFactors of arrays, words as uint32
    y : (rows * d_out,) array to be written
    part : float32 array of at least plan.parts * rows * sum of ranks elements, overwritten
    plan : Plan
    stream : numba stream
    """
    first, second = paths[0], paths[-1]
    d_in, d_out = first.g.shape[0], first.h.shape[0]
    rank_1, rank_2 = first.ell.shape[0], second.ell.shape[0] if len(paths) > 1 else 0
    batches, columns = -(-rows // VECTORS), 2 * min(VECTORS, rows)
    tiles = plan.latent_warps // plan.latent_sharing
    floats = plan.latent_warps * (ROWS + 1) * VECTORS
    groups = -(-d_in // (32 * GROUP))
    if plan.parts > groups:
        raise ValueError(f"{d_in} columns cannot be divided into {plan.parts} parts: at most {groups} (Plan.parts)")
    segment = segment_of(columns, -(-groups // plan.parts), floats)
    blocks = sum(-(-rank // (ROWS * tiles)) for rank in (rank_1, rank_2))
    size = 4 * (columns * (256 * segment + 16) + floats)
    latent(kind, -(-d_in // 32) % GROUP == 0, len(paths))[
        (blocks, plan.parts, batches), 32 * plan.latent_warps, stream, size
    ](
        x, first.g, second.g, first.v_words, second.v_words, rank_1, rank_2, d_in, rows, part, segment,
        logs(plan.parts, tiles, plan.latent_sharing),
    )  # fmt: skip
    tiles = plan.output_warps // plan.output_sharing
    floats = (plan.output_warps * (ROWS + 1) + tiles * ROWS) * VECTORS
    segment = segment_of(columns, -(-max(rank_1, rank_2) // (32 * GROUP)), floats)
    size = 4 * (columns * (256 * segment + 16) + floats)
    wide = all(-(-rank // 32) % GROUP == 0 for rank in (rank_1, rank_2))
    blocks = -(-d_out // (ROWS * tiles))
    output(kind, wide, len(paths), plan.parts)[(blocks, 1, batches), 32 * plan.output_warps, stream, size](
        part, first.ell, second.ell, first.u_words, second.u_words, first.h, second.h,
        rank_1, rank_2, d_out, rows, y, segment, logs(plan.parts, tiles, plan.output_sharing),
    )  # fmt: skip


def takes(paths: Sequence[PackedFactors]) -> bool:
    """Whether the kernels can compute with these paths: one or two, of 32-bit words."""
    words = [words for path in paths for words in (path.u_words, path.v_words)]
    return len(paths) <= 2 and all(each.dtype == torch.int32 for each in words)


def packed_linear(x: Tensor, paths: Sequence[PackedFactors], plan: Plan | None = None) -> Tensor:
    """Sum of the paths' outputs for each row of x, on torch's current stream; nothing waits for the device.

    Parameters
    ----------
    x : (rows, d_in) float16, bfloat16 or float32 CUDA tensor
    paths : sequence of PackedFactors on the same device, as `takes` asks for
    plan : Plan, optional

    Returns
    -------
    (rows, d_out) tensor of x's dtype.
    """
    rows, d_in = x.shape
    d_out, ranks = paths[0].h.shape[0], [path.rank for path in paths]
    y = torch.empty(rows, d_out, dtype=x.dtype, device=x.device)
    if rows == 0 or d_out == 0:
        return y
    with torch.cuda.device(x.device):
        plan = plan or plan_for(d_out, d_in, ranks, torch.cuda.get_device_properties(x.device).multi_processor_count)
        part = torch.empty(plan.parts * rows * sum(ranks), device=x.device)
        stream = cuda.external_stream(torch.cuda.current_stream().cuda_stream)
        arrays = [PackedFactors(*(array(tensor) for tensor in path)) for path in paths]
        launch(array(x), KINDS[x.dtype], rows, arrays, array(y), array(part), plan, stream)
    return y


def array(tensor: Tensor) -> Any:
    """A flat device array of a tensor, aligned for 16-byte loads; words as uint32, bfloat16 as uint16."""
    flat = tensor.detach().contiguous().flatten()
    if flat.data_ptr() % 16:
        flat = flat.clone()
    views = {torch.int32: torch.uint32, torch.bfloat16: torch.uint16}
    return cuda.as_cuda_array(flat.view(views[flat.dtype]) if flat.dtype in views else flat)
