"""Multiply packed signs with a few vectors by a bit-serial GEMV on tensor cores: two launches for a layer.

    latent   t[s, b, r] = ell_r sum over the s-th K slice of V_sign[r, i] g_i x[b, i]
    output   y[b, o] = sum over paths of h_o sum_r U_sign[o, r] sum_s t[s, b, r]

Versions, simple to fast (time for 28672 x 8192 at 0.55 bits, 16.2 MB, one vector; then bytes per second as a share of a
copy's on the same H100; computed from book/results/cuda_linear.json):

1. `plain`, cuda_plain.py: a warp for each row, one sign at a time. 108 us, 6 % of the copy.
2. `tensor`, here: tensor cores multiply whole words of signs with the bit planes of the vector. 15 us, 45 %.
3. `pdl`, here: the same kernels by programmatic dependent launch. Each starts before the one before it has ended and
   fetches its signs while it waits for its vector. 11.5 us, 59 %.

Bytes moved are the same in all versions: each bit of U and V once, (d_in + d_out) * rank / 8 for a path. Per output
that is d_in / 8 bytes for an entry of t and rank / 8 for an entry of y; the vectors are read from cache. So the
roofline of this layer is memory. Small layers stay below it, for two launches have a fixed cost. For more than a few
vectors see cuda_gemm.py.

Bit-serial multiplication. A sign is a bit, s = 1 - 2 b, so

    sum_j s_j v_j = sum_j v_j - 2 sum_j b_j v_j

The vector becomes bits too. A warp takes a K tile of 256 entries (K is the dimension that is summed over: d_in in
`latent`, the rank in `output`) and writes each as a fixed-point number,

    v_j = unit q_j,   |q_j| <= 2^21,   with one power of two, `unit`, for the tile

Bit p of all 256 numbers q_j + 2^22 is a bit plane: planes 0 to 22 are 23 columns of bits. A 24th column of ones takes
the 2^22 away again:

    sum_j b_j q_j = sum_p 2^p popcount(b AND plane_p) - 2^22 popcount(b AND ones)

One instruction (cuda_mma.and_popc_mma) does this for 16 rows of signs and 8 columns, so three do it for a K tile and a
vector. Sums of integers are exact; an entry is off by at most 2^-22 of the largest in its tile.

Split-K. The rank is small, so rows alone would not fill the GPU. `latent` therefore divides d_in into K slices, each
for other blocks, and `output` adds up their partial sums in its prologue. Warps of a block also divide the K tiles
among themselves. All sums have a fixed order, so results are the same each time.

Shared memory holds the words of signs (by cp.async, which needs no registers on the way) and the bit planes. Rows of
words are four words longer than needed where their number is a multiple of four, so that a fragment's loads touch all
32 banks (no bank conflict). cuda_schedule.py starts about one block for each multiprocessor. Occupancy is low by
intent: a copy in flight holds no registers, so few warps keep memory busy.
"""

# Numba gives cuda.threadIdx, tuples and integer types other meanings than their Python stand-ins.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportOperatorIssue=false
# pyright: reportGeneralTypeIssues=false

from functools import cache, partial
from typing import Any, NamedTuple

from numba import cuda, float32, int32, types, uint32

from .cuda_elements import (
    AT,
    ELEMENTS,
    HALVES,
    LOAD8,
    ROUND,
    SIGNATURES,
    SINGLES,
    WORDS,
    absmax8,
    add4,
    add8,
    half_at,
    half_load8,
    kernel_factory,
    load2,
    load8,
    mul4,
    mul8,
    scale4,
    scale8,
    silu,
    single_at,
    single_load8,
    warp_sum,
    zeros8,
)
from .cuda_intrinsics import (
    as_bits,
    as_float,
    byte_permute,
    cp_async_16,
    cp_async_wait_all,
    exponential,
    griddep_launch_dependents,
    griddep_wait,
    larger,
    reciprocal_root,
    shuffle_xor,
    warp_max,
    warp_sum_words,
)
from .cuda_mma import and_popc_mma

K_TILE = 256  # entries of a vector that a warp multiplies at once: eight words of signs, two for each lane of a row
FRAGMENT_ROWS = 16  # rows of signs that one instruction multiplies
MAX_VECTORS = 4  # vectors that a block multiplies at once
PLANES8_WORDS = 64  # words of eight bit planes of a K tile
PLANES_WORDS = 200  # words of shared memory for a K tile: 24 bit planes, the unit and the sum, and padding


# ---- From float32 to bit planes


@cuda.jit(device=True, forceinline=True)
def to_fixed_point(value, inverse):
    """Return q + 2^22 in the lowest 23 bits, for the integer q nearest to value * inverse.

    A float32 from 2^23 to 2^24 is an integer, and the lowest bits of both are equal. An exponent stands above them.
    """
    return as_bits(value * inverse + float32(12582912.0))  # 1.5 * 2^23


@cuda.jit(device=True, forceinline=True)
def transpose_bits(x, y):
    """Transpose a matrix of 8 by 8 bits (Warren, Hacker's Delight, 7-3).

    x has its bytes 0 to 3, y its bytes 4 to 7.
    """
    s = (x ^ (x >> uint32(7))) & uint32(0x00AA00AA)
    t = (y ^ (y >> uint32(7))) & uint32(0x00AA00AA)
    x, y = x ^ s ^ (s << uint32(7)), y ^ t ^ (t << uint32(7))
    s = (x ^ (x >> uint32(14))) & uint32(0x0000CCCC)
    t = (y ^ (y >> uint32(14))) & uint32(0x0000CCCC)
    x, y = x ^ s ^ (s << uint32(14)), y ^ t ^ (t << uint32(14))
    t = (x ^ (y << uint32(4))) & uint32(0xF0F0F0F0)
    return uint32(x ^ t), uint32(y ^ (t >> uint32(4)))


@cuda.jit(device=True, forceinline=True)
def transpose_bytes(lane, a, b, c):
    """Transpose bytes among four lanes: from a byte of each of eight planes to whole words of two planes.

    a, b and c are pairs of words with a byte for each of planes 0 to 7, 8 to 15 and 16 to 23. After two exchanges
    lane i has the words of planes 2 i and 2 i + 1 of each eight.
    """
    odd, high = lane & 1 != 0, lane & 2 != 0
    keep, give = (uint32(0x7632), uint32(0x5410)) if odd else (uint32(0x5410), uint32(0x7632))
    order = uint32(0x2604) if odd else uint32(0x6240)
    if high:
        order = uint32(order >> uint32(8) | order << uint32(8))
        a, b, c = (a[1], a[0]), (b[1], b[0]), (c[1], c[0])
    distance = uint32(2)
    x, y, z = shuffle_xor(a[1], distance), shuffle_xor(b[1], distance), shuffle_xor(c[1], distance)
    a, b, c = (
        (byte_permute(a[0], x, keep), byte_permute(a[0], x, give)),
        (byte_permute(b[0], y, keep), byte_permute(b[0], y, give)),
        (byte_permute(c[0], z, keep), byte_permute(c[0], z, give)),
    )
    distance, following = uint32(1), uint32(order + uint32(0x1111))
    x, y, z = shuffle_xor(a[1], distance), shuffle_xor(b[1], distance), shuffle_xor(c[1], distance)
    return (
        (byte_permute(a[0], x, order), byte_permute(a[0], x, following)),
        (byte_permute(b[0], y, order), byte_permute(b[0], y, following)),
        (byte_permute(c[0], z, order), byte_permute(c[0], z, following)),
    )


@cuda.jit(device=True, forceinline=True)
def store_bit_planes(words, place, lane, v):
    """Store the bit planes, the unit and the sum of a warp's K tile in shared memory.

    v are the lane's eight entries. The unit is NaN if an entry is infinite or NaN, and so are all sums with it.
    """
    exponent = uint32(max(warp_max(as_bits(absmax8(v))) >> uint32(23), uint32(21)))
    inverse = as_float(uint32((uint32(274) - exponent) << uint32(23)))  # 2^20 over the power of two in the largest
    a, b, c, d = (
        to_fixed_point(v[0], inverse), to_fixed_point(v[1], inverse),
        to_fixed_point(v[2], inverse), to_fixed_point(v[3], inverse),
    )  # fmt: skip
    e, f, g, h = (
        to_fixed_point(v[4], inverse), to_fixed_point(v[5], inverse),
        to_fixed_point(v[6], inverse), to_fixed_point(v[7], inverse),
    )  # fmt: skip
    total = uint32(uint32(uint32(a + b) + uint32(c + d)) + uint32(uint32(e + f) + uint32(g + h)))
    word = int32(int32(int32(lane >> 2) & 3) << 1 | lane >> 4)
    summary, place = uint32(place + 192), int32(place + int32(word + int32(lane & 3) * 16))
    low, high = uint32(0x5140), uint32(0x0062)
    m, n = byte_permute(a, b, low), byte_permute(c, d, low)
    o, p = byte_permute(e, f, low), byte_permute(g, h, low)
    a, c = byte_permute(a, b, high), byte_permute(c, d, high)
    e, g = byte_permute(e, f, high), byte_permute(g, h, high)
    low, high = uint32(0x5410), uint32(0x7632)
    x, y = transpose_bits(byte_permute(a, c, low), byte_permute(e, g, low))
    a, b, c = transpose_bytes(
        lane,
        transpose_bits(byte_permute(m, n, low), byte_permute(o, p, low)),
        transpose_bits(byte_permute(m, n, high), byte_permute(o, p, high)),
        (x, uint32(y | uint32(0xFF000000))),
    )
    place = uint32(place)
    words[place], words[place + uint32(8)] = a
    words[place + uint32(PLANES8_WORDS)], words[place + uint32(PLANES8_WORDS + 8)] = b
    words[place + uint32(2 * PLANES8_WORDS)], words[place + uint32(2 * PLANES8_WORDS + 8)] = c
    total = warp_sum_words(uint32(total - uint32(8 * 0x4B400000 & 0xFFFFFFFF)))
    if lane == 0:
        unit = uint32((exponent - uint32(20)) << uint32(23)) if exponent < uint32(255) else uint32(0x7FC00000)
        words[summary], words[summary + uint32(1)] = unit, total


# ---- Products of signs with bit planes


@cuda.jit(device=True, forceinline=True)
def load_fragment(words, at, stride):
    """Load the lane's words of rows g and g + 8 of a fragment; `at` is in row g."""
    below = int32(at + int32(8 * stride))
    return words[uint32(at)], words[uint32(below)], words[uint32(at + 4)], words[uint32(below + 4)]


@cuda.jit(device=True, forceinline=True)
def masked_sum(words, place, lane, signs):
    """Sum q_j where a row of bits has ones, over a K tile.

    The row is g of the fragment in even lanes, and g + 8 in odd ones.
    """
    at, of = int32(place + int32(lane << 1)), int32(lane & 3)
    b0, b1 = load2(words, uint32(at))
    c = and_popc_mma(signs[0], signs[1], signs[2], signs[3], b0, b1)
    b0, b1 = load2(words, uint32(at + PLANES8_WORDS))
    d = and_popc_mma(signs[0], signs[1], signs[2], signs[3], b0, b1)
    b0, b1 = load2(words, uint32(at + 2 * PLANES8_WORDS))
    e = and_popc_mma(signs[0], signs[1], signs[2], signs[3], b0, b1)
    last = int32(-1) if of == 3 else int32(2)  # the 24th plane counts as -2^22
    upper = int32(int32(c[0] + int32(c[1] << 1)) + int32(int32(d[0] + int32(d[1] << 1)) << 8))
    lower = int32(int32(c[2] + int32(c[3] << 1)) + int32(int32(d[2] + int32(d[3] << 1)) << 8))
    upper = int32(int32(upper + int32(int32(e[0] + int32(e[1] * last)) << 16)) << int32(of << 1))
    lower = int32(int32(lower + int32(int32(e[2] + int32(e[3] * last)) << 16)) << int32(of << 1))
    mine, other = (lower, upper) if lane & 1 != 0 else (upper, lower)
    mine = int32(mine + cuda.shfl_xor_sync(0xFFFFFFFF, other, 1))
    return int32(mine + cuda.shfl_xor_sync(0xFFFFFFFF, mine, 2))


@cuda.jit(device=True, forceinline=True)
def signed_sum(words, place, lane, signs):
    """Sum s_j v_j over a K tile, for the row of `masked_sum`."""
    masked = masked_sum(words, place, lane, signs)
    unit, total = load2(words, uint32(place + 192))
    return float32(int32(int32(total) - int32(masked << 1))) * as_float(unit)


@cuda.jit(device=True, forceinline=True)
def signed_sums(words, place, lane, signs, vectors):
    """Compute `signed_sum` for each of `vectors` vectors (1, 2 or 4)."""
    a = signed_sum(words, place, lane, signs)
    b = c = d = float32(0)
    if vectors > 1:
        b = signed_sum(words, int32(place + PLANES_WORDS), lane, signs)
    if vectors > 2:
        c = signed_sum(words, int32(place + 2 * PLANES_WORDS), lane, signs)
        d = signed_sum(words, int32(place + 3 * PLANES_WORDS), lane, signs)
    return a, b, c, d


@cuda.jit(device=True, forceinline=True)
def store_sums(shared, at, sums, vectors):
    """Store a row's sums in shared memory, one for each vector."""
    shared[uint32(at)] = sums[0]
    if vectors > 1:
        shared[uint32(at + 1)] = sums[1]
    if vectors > 2:
        shared[uint32(at + 2)] = sums[2]
        shared[uint32(at + 3)] = sums[3]


@cuda.jit(device=True, forceinline=True)
def sum_over_warps(shared, at, stride, count):
    """Sum the partial sums that `count` warps stored `stride` apart: the split-K reduction within a block."""
    total = float32(0)
    while count > 0:
        total += shared[uint32(at)]
        at, count = int32(at + stride), int32(count - 1)
    return total


@cuda.jit(device=True, forceinline=True)
def prefetch_rows(shared, target, stride, words, row, rows, width, first, count, wide):
    """Begin to copy a block's rows of signs to shared memory (cp.async): `count` words of each row from `first` on.

    With `wide`, rows are multiples of four words (16 bytes) and lie `stride` words apart in shared memory. Without it,
    all `width` words of the rows are copied as one piece. Words beyond a row's end hold anything; they meet zeros.
    """
    thread, threads = int32(cuda.threadIdx.x), int32(cuda.blockDim.x)
    rows = max(rows, int32(0))  # a block may lie beyond the last row
    if wide:
        row_of, rows_at_once = int32(thread >> 4), int32(threads >> 4)
        last = min(count, int32(width - first))
        while row_of < rows:
            at = int32(int32(thread & 15) << 2)
            source, place = int32(int32(row + row_of) * width + first), int32(target + int32(row_of * stride))
            while at < last:
                cp_async_16(shared, uint32(place + at), words, uint32(source + at))
                at = int32(at + 64)
            row_of = int32(row_of + rows_at_once)
    else:
        at, begin, last = int32(thread << 2), int32(row * width), int32(int32(rows * width) & -4)
        while at < last:
            cp_async_16(shared, uint32(target + at), words, uint32(begin + at))
            at = int32(at + int32(threads << 2))
        if thread < int32(int32(rows * width) & 3):
            at = int32(last + thread)
            shared[uint32(target + at)] = words[uint32(begin + at)]


# ---- Prologues of `latent`


SUMMARY = 8  # floats after a split's values: its largest score, its sum of weights, and padding


class SplitKvPartials(NamedTuple):
    """An input that is attention with split KV: each block of `cuda_decode.attend` has seen a part of the context.

    For each vector, head and split the input holds `head_dim` values, weighted by exp(score - largest score of the
    split), and SUMMARY floats. `latent` combines the splits in its prologue, as flash decoding does.

    Attributes
    ----------
    splits : int
        Parts of a context. An empty part has a largest score so low that its weight is zero.
    head_dim : int
        A multiple of eight.
    """

    splits: int
    head_dim: int

    @property
    def stride(self) -> int:
        """Floats of a split."""
        return self.head_dim + SUMMARY


@cache
def combine_partials(partials: SplitKvPartials) -> Any:
    """Make a device function that combines split-KV partials into eight entries of attention; zeros beyond the end.

    All splits are loaded at once, which takes as long as loading one, and no block waits for another.
    """
    splits, head_dim, stride = partials.splits, partials.head_dim, partials.stride

    @cuda.jit(device=True, forceinline=True)
    def entries(x, vector, column, d_in):
        if column >= d_in:
            return zeros8()
        head, entry = int32(column // head_dim), int32(column % head_dim)
        base = int32(int32(int32(vector * int32(d_in // head_dim)) + head) * int32(splits * stride))
        top = single_at(x, int32(base + head_dim))
        for split in range(1, splits):
            top = larger(top, single_at(x, int32(base + int32(split * stride + head_dim))))
        total, sums = float32(0), zeros8()
        for split in range(splits):
            place = int32(base + split * stride)
            factor = exponential(single_at(x, int32(place + head_dim)) - top)
            total += factor * single_at(x, int32(place + int32(head_dim + 1)))
            sums = add8(sums, scale8(single_load8(x, int32(place + entry)), factor))
        return scale8(sums, float32(1) / total)

    return entries


# ---- The two kernels


@kernel_factory
def latent(
    dtype: str,
    wide: bool,
    aligned: bool,
    vectors: int,
    pdl: bool,
    paths: int = 2,
    prologue: str | SplitKvPartials = "plain",
) -> Any:
    """Make the first kernel: t = ell * (V_sign^T (g * x)) for all paths, in split-K partial sums.

    Parameters
    ----------
    dtype : str
        Of x: a key of ELEMENTS.
    wide : bool
        Whether rows of V have a multiple of four words (d_in a multiple of 128).
    aligned : bool
        Whether vectors have a multiple of eight entries.
    vectors : int
        Vectors that a block multiplies: 1, 2 or 4.
    pdl : bool
        Programmatic dependent launch: the kernel starts before the one before it has ended (compute capability 9.0).
    paths : int
        Paths of all layers: one layer, or fused projections, which share their input.
    prologue : str or SplitKvPartials
        How the kernel makes its input v from x while it reads it:

        - "plain": v = x;
        - "norm": RMSNorm, v_i = weight_i x_i / sqrt(sum(squares) / d_in + eps), from `squares_count` sums of squares;
        - "silu": v_i = silu(x_i) x_(d_in + i), for vectors of 2 d_in entries;
        - SplitKvPartials: attention, combined from its splits.
    """
    at_place, at_once, eight = AT[dtype], LOAD8[dtype], load8(aligned)
    norm, gated = prologue == "norm", prologue == "silu"

    @cuda.jit(device=True, forceinline=True)
    def weights_of(g, weight, column, d_in):
        """Load the factors of eight entries: g, times the norm's weight."""
        scales = eight(g, half_at, half_load8, int32(0), column, d_in)
        return mul8(scales, eight(weight, single_at, single_load8, int32(0), column, d_in)) if norm else scales

    @cuda.jit(device=True, forceinline=True)
    def entries_of(x, vector, column, d_in):
        """Load eight entries of a vector, gated if the prologue says so."""
        if not gated:
            return eight(x, at_place, at_once, int32(vector * d_in), column, d_in)
        base = int32(vector * int32(2 * d_in))
        a, b, c, d, e, f, g, h = eight(x, at_place, at_once, base, column, d_in)
        active = (
            silu(a), silu(b), silu(c), silu(d), silu(e), silu(f), silu(g), silu(h),
        )  # fmt: skip
        return mul8(active, eight(x, at_place, at_once, int32(base + d_in), column, d_in))

    entries = combine_partials(prologue) if isinstance(prologue, SplitKvPartials) else entries_of

    @cuda.jit(device=True, forceinline=True)
    def inverse_rms(squares, vector, lane, count, d_in, eps):
        """Compute 1 / sqrt(mean square + eps) of a vector from its `count` sums of squares."""
        total, at = float32(0), lane
        while at < count:
            total += squares[uint32(int32(vector * count) + at)]
            at = int32(at + 32)
        return reciprocal_root(warp_sum(total) / float32(d_in) + eps)

    @cuda.jit(device=True, forceinline=True)
    def factors_of(squares, first, rows, lane, count, d_in, eps):
        """Compute the norm's factor of each vector of the block, or ones without a norm."""
        a = b = c = d = float32(1)
        if norm:
            last = int32(rows - 1)
            a = inverse_rms(squares, first, lane, count, d_in, eps)
            if vectors > 1:
                b = inverse_rms(squares, min(int32(first + 1), last), lane, count, d_in, eps)
            if vectors > 2:
                c = inverse_rms(squares, min(int32(first + 2), last), lane, count, d_in, eps)
                d = inverse_rms(squares, min(int32(first + 3), last), lane, count, d_in, eps)
        return a, b, c, d

    @cuda.jit(device=True, forceinline=True)
    def store(t, target, columns, row, rank, limit, left, sums):
        """Store a row's sums, or zeros in the padding between `rank` and `limit`."""
        if row < limit:
            inside = row < rank
            t[uint32(target + row)] = sums[0] if inside else float32(0)
            if vectors > 1 and left > 1:
                t[uint32(target + columns + row)] = sums[1] if inside else float32(0)
            if vectors > 2 and left > 2:
                t[uint32(target + 2 * columns + row)] = sums[2] if inside else float32(0)
            if vectors > 2 and left > 3:
                t[uint32(target + 3 * columns + row)] = sums[3] if inside else float32(0)

    @cuda.jit
    def kernel(
        x, gs, signs, ells, ranks, first_blocks, offsets, t, weight, squares,
        d_in, rows, columns, k_tiles, row_tiles, k_warps, log_row_warps, squares_count, eps,
    ):  # fmt: skip
        """Launch with a grid of (blocks of all paths, K slices, rows / `vectors`).

        Tuples have an entry for each path: its first block (first_blocks), and where it begins in the `columns` columns
        of t (offsets). `k_tiles` is the number of K tiles in a K slice. `row_tiles`, `k_warps` and
        `log_row_warps` are the fields of cuda_schedule.Tiling.
        """
        thread, threads = int32(cuda.threadIdx.x), int32(cuda.blockDim.x)
        lane, warp, warps = int32(thread & 31), int32(thread >> 5), int32(threads >> 5)
        k_warp, row_warp = int32(warp >> log_row_warps), int32(warp & int32(int32(1 << log_row_warps) - 1))
        step = int32(FRAGMENT_ROWS << log_row_warps)
        block_rows = int32(int32(FRAGMENT_ROWS * row_tiles) << log_row_warps)
        block, path = int32(cuda.blockIdx.x), int32(0)
        for following_path in range(1, paths):
            path = int32(following_path) if block >= first_blocks[following_path] else path
        g, words, ell, rank = gs[path], signs[path], ells[path], int32(ranks[path])
        block_row = int32(block_rows * int32(block - first_blocks[path]))
        width = int32(int32(d_in + 31) >> 5)
        first = int32(vectors * cuda.blockIdx.z)
        begin = int32(k_tiles * cuda.blockIdx.y)
        count = min(int32(k_tiles), int32(int32(int32(width + 7) >> 3) - begin))
        # The same shared memory as words and as floats: bit planes, then the warps' sums, then words of signs
        shared_words = cuda.shared.array(0, uint32)
        shared = cuda.shared.array(0, float32)
        sums_at, sums_count = int32(vectors * PLANES_WORDS * k_tiles), int32(block_rows * vectors)
        signs_at = int32(sums_at + int32(k_warps * sums_count))
        stride = int32(int32(8 * k_tiles) + 4) if wide else width
        prefetch_rows(
            shared_words, signs_at, stride, words, block_row, min(block_rows, int32(rank - block_row)), width,
            int32(8 * begin), int32(8 * count), wide,
        )  # fmt: skip
        lane_row = int32(int32(int32(FRAGMENT_ROWS * row_warp) + int32(lane >> 2)) + int32(8 * int32(lane & 1)))
        scale = half_at(ell, min(int32(block_row + lane_row), int32(rank - 1)))
        column = int32(int32(K_TILE * int32(begin + warp)) + int32(lane << 3))
        weights = weights_of(g, weight, column, d_in)
        if pdl:
            griddep_wait()
            griddep_launch_dependents()
        factors = factors_of(squares, first, rows, lane, squares_count, d_in, eps)
        tile = warp
        while tile < count:
            for vector in range(vectors):
                v = entries(x, min(int32(first + vector), int32(rows - 1)), column, d_in)
                place = int32(PLANES_WORDS * int32(vectors * tile + vector))
                store_bit_planes(shared_words, place, lane, mul8(v, weights))
            tile, column = int32(tile + warps), int32(column + int32(K_TILE * warps))
            if tile < count:
                weights = weights_of(g, weight, column, d_in)
        cp_async_wait_all()
        cuda.syncthreads()

        limit = int32(int32(rank + 31) & -32)
        target = int32(int32(int32(int32(cuda.blockIdx.y) * rows + first) * columns) + offsets[path])
        row, row_tile = lane_row, int32(0)
        fragment_row = int32(int32(FRAGMENT_ROWS * row_warp) + int32(lane >> 2))
        at = int32(signs_at + int32(fragment_row * stride) + int32(lane & 3))
        while row_tile < row_tiles:
            following = scale  # the next row's scale is on its way during this one's products
            if int32(row_tile + 1) < row_tiles:
                following = half_at(ell, min(int32(block_row + int32(row + step)), int32(rank - 1)))
            sums = (float32(0), float32(0), float32(0), float32(0))
            tile = k_warp
            while tile < count:
                fragment = load_fragment(shared_words, int32(at + int32(8 * tile)), stride)
                more = signed_sums(shared_words, int32(PLANES_WORDS * vectors * tile), lane, fragment, vectors)
                sums = add4(sums, more)
                tile = int32(tile + k_warps)
            sums = mul4(scale4(sums, scale), factors) if norm else scale4(sums, scale)
            if lane & 2 == 0 and k_warps > 1:
                store_sums(shared, int32(sums_at + int32(k_warp * sums_count) + vectors * row), sums, vectors)
            elif lane & 2 == 0:
                store(t, target, columns, int32(block_row + row), rank, limit, int32(rows - first), sums)
            scale, row = following, int32(row + step)
            row_tile, at = int32(row_tile + 1), int32(at + int32(step * stride))
        if k_warps > 1:
            cuda.syncthreads()
            item = thread
            while item < sums_count:
                row, vector = int32(block_row + item // vectors), int32(item % vectors)
                if row < limit and vector < rows - first:
                    total = sum_over_warps(shared, int32(sums_at + item), sums_count, min(k_warps, count))
                    t[uint32(target + int32(vector * columns) + row)] = total if row < rank else float32(0)
                item = int32(item + threads)

    several, numbers = partial(types.UniTuple, count=paths), partial(types.UniTuple, types.int32, paths)
    arrays = (several(HALVES), several(WORDS), several(HALVES), numbers(), numbers(), numbers())
    SIGNATURES[kernel] = types.void(
        ELEMENTS[dtype], *arrays, SINGLES, SINGLES, SINGLES, *[types.int32] * 8, types.float32
    )
    return kernel


@kernel_factory
def output(
    dtype: str, wide: bool, vectors: int, split_k: int, pdl: bool, layers: int = 1, epilogue: str = "plain"
) -> Any:
    """Make the second kernel: y = sum over paths of h * (U_sign t), with t summed over K slices.

    Parameters
    ----------
    dtype : str
        Of y: a key of ELEMENTS.
    wide, vectors, pdl
        See `latent`; `wide` is about rows of U.
    split_k : int
        Partial sums that `latent` left, one for each K slice.
    layers : int
        One layer, or fused projections. Each has two paths here; a missing one has rank 0.
    epilogue : str
        What the kernel does with its outputs:

        - "plain": store y[b, o], layers side by side;
        - "bias": add bias[o] first;
        - "add": add to the float32 y of the only layer (the residual stream), and store the sum of squares of each
          block's new entries in squares[b, block], for the next RMSNorm.
    """
    rounded = ROUND[dtype]
    add, biased = epilogue == "add", epilogue == "bias"

    @cuda.jit(device=True, forceinline=True)
    def entries_of(t, base, distance, inside):
        """Load eight entries of t, summed over the split-K partial sums."""
        if not inside:
            return zeros8()
        entries = single_load8(t, base)
        for split in range(1, split_k):  # unrolled, so that no load waits for another
            entries = add8(entries, single_load8(t, int32(base + split * distance)))
        return entries

    @cuda.jit(device=True, forceinline=True)
    def store(y, target, columns, row, d_out, left, sums):
        """Store a row's outputs, one for each vector."""
        if row < d_out:
            y[uint32(target + row)] = rounded(sums[0])
            if vectors > 1 and left > 1:
                y[uint32(target + columns + row)] = rounded(sums[1])
            if vectors > 2 and left > 2:
                y[uint32(target + 2 * columns + row)] = rounded(sums[2])
            if vectors > 2 and left > 3:
                y[uint32(target + 3 * columns + row)] = rounded(sums[3])

    @cuda.jit(device=True, forceinline=True)
    def store_squares(shared, squares, first, rows, lane, warp, warps, total):
        """Sum a block's squares for each vector and store them; a thread's belong to vector thread % vectors."""
        for distance in (16, 8, 4, 2, 1):
            if distance >= vectors:
                total += cuda.shfl_xor_sync(0xFFFFFFFF, total, distance)
        if lane < vectors:
            shared[uint32(vectors * warp + lane)] = total
        cuda.syncthreads()
        vector = int32(first + lane)
        if warp == 0 and lane < vectors and vector < rows:
            block_total = sum_over_warps(shared, lane, int32(vectors), warps)
            squares[uint32(int32(vector * int32(cuda.gridDim.x)) + int32(cuda.blockIdx.x))] = block_total

    @cuda.jit
    def kernel(
        t, signs, scales, ranks, offsets, d_outs, first_blocks, starts, bias, y, squares,
        rows, columns, y_columns, row_tiles, k_warps, log_row_warps,
    ):  # fmt: skip
        """Launch with a grid of (blocks of all layers, 1, rows / `vectors`).

        Warps share the K tiles of both paths. Tuples with an entry for each path: signs, scales, ranks, and first
        columns in t (offsets). Tuples with an entry for each layer: d_outs, first blocks, and first columns in y
        (starts), which has `y_columns` columns. The rest is as in `latent`.
        """
        thread, threads = int32(cuda.threadIdx.x), int32(cuda.blockDim.x)
        lane, warp, warps = int32(thread & 31), int32(thread >> 5), int32(threads >> 5)
        k_warp, row_warp = int32(warp >> log_row_warps), int32(warp & int32(int32(1 << log_row_warps) - 1))
        step = int32(FRAGMENT_ROWS << log_row_warps)
        block_rows = int32(int32(FRAGMENT_ROWS * row_tiles) << log_row_warps)
        block, layer = int32(cuda.blockIdx.x), int32(0)
        for following_layer in range(1, layers):
            layer = int32(following_layer) if block >= first_blocks[following_layer] else layer
        block_row = int32(block_rows * int32(block - first_blocks[layer]))
        d_out, start = int32(d_outs[layer]), int32(starts[layer])
        one, other = int32(2 * layer), int32(int32(2 * layer) + 1)
        u_1, u_2, h_1, h_2 = signs[one], signs[other], scales[one], scales[other]
        width_1, width_2 = int32(int32(ranks[one] + 31) >> 5), int32(int32(ranks[other] + 31) >> 5)
        tiles_1 = int32(int32(width_1 + 7) >> 3)
        count = int32(tiles_1 + int32(int32(width_2 + 7) >> 3))
        first = int32(vectors * cuda.blockIdx.z)
        # The same shared memory as words and as floats: bit planes, the warps' sums, words of both paths' signs
        shared_words = cuda.shared.array(0, uint32)
        shared = cuda.shared.array(0, float32)
        sums_at, sums_count = int32(vectors * PLANES_WORDS * count), int32(block_rows * vectors)
        stride_1 = int32(int32(8 * tiles_1) + 4) if wide else width_1
        stride_2 = int32(int32(8 * int32(count - tiles_1)) + 4) if wide else width_2
        signs_1 = int32(sums_at + int32(k_warps * sums_count))
        signs_2 = int32(int32(signs_1 + int32(block_rows * stride_1) + 3) & -4)
        distance = int32(rows * columns)
        here = min(block_rows, int32(d_out - block_row))
        prefetch_rows(shared_words, signs_1, stride_1, u_1, block_row, here, width_1, int32(0), width_1, wide)
        if width_2 > 0:
            prefetch_rows(shared_words, signs_2, stride_2, u_2, block_row, here, width_2, int32(0), width_2, wide)
        lane_row = int32(int32(int32(FRAGMENT_ROWS * row_warp) + int32(lane >> 2)) + int32(8 * int32(lane & 1)))
        now = min(int32(block_row + lane_row), int32(d_out - 1))
        scale_1, scale_2 = half_at(h_1, now), half_at(h_2, now)
        column_1, column_2 = int32(offsets[one]), int32(offsets[other])
        if pdl:
            griddep_wait()
            griddep_launch_dependents()
        tile = warp
        while tile < count:
            second = tile >= tiles_1
            word = int32(8 * (int32(tile - tiles_1) if second else tile) + int32(lane >> 2))
            inside = word < (width_2 if second else width_1)
            column = int32(int32(32 * word) + int32(8 * int32(lane & 3)))
            column = int32(column + (column_2 if second else column_1))
            for vector in range(vectors):
                base = int32(int32(min(int32(first + vector), int32(rows - 1)) * columns) + column)
                entries = entries_of(t, base, distance, inside)
                store_bit_planes(shared_words, int32(PLANES_WORDS * int32(vectors * tile + vector)), lane, entries)
            tile = int32(tile + warps)
        cp_async_wait_all()
        cuda.syncthreads()

        row, row_tile = lane_row, int32(0)
        fragment_row = int32(int32(FRAGMENT_ROWS * row_warp) + int32(lane >> 2))
        at_1 = int32(signs_1 + int32(fragment_row * stride_1) + int32(lane & 3))
        at_2 = int32(signs_2 + int32(fragment_row * stride_2) + int32(lane & 3)) - int32(8 * tiles_1)
        while row_tile < row_tiles:
            following_1, following_2 = scale_1, scale_2
            now = min(int32(block_row + row), int32(d_out - 1))
            constant = bias[uint32(start + now)] if biased else float32(0)
            if int32(row_tile + 1) < row_tiles:
                now = min(int32(block_row + int32(row + step)), int32(d_out - 1))
                following_1, following_2 = half_at(h_1, now), half_at(h_2, now)
            constant = constant if k_warp == 0 else float32(0)
            sums = (constant, constant, constant, constant)
            tile = k_warp
            while tile < count:
                second = tile >= tiles_1
                at, stride = (at_2, stride_2) if second else (at_1, stride_1)
                fragment = load_fragment(shared_words, int32(at + int32(8 * tile)), stride)
                more = signed_sums(shared_words, int32(PLANES_WORDS * vectors * tile), lane, fragment, vectors)
                sums = add4(sums, scale4(more, scale_2 if second else scale_1))
                tile = int32(tile + k_warps)
            if lane & 2 == 0 and (add or k_warps > 1):
                store_sums(shared, int32(sums_at + int32(k_warp * sums_count) + vectors * row), sums, vectors)
            elif lane & 2 == 0:
                target = int32(int32(first * y_columns) + start)
                store(y, target, y_columns, int32(block_row + row), d_out, int32(rows - first), sums)
            scale_1, scale_2, row, row_tile = following_1, following_2, int32(row + step), int32(row_tile + 1)
            at_1, at_2 = int32(at_1 + int32(step * stride_1)), int32(at_2 + int32(step * stride_2))
        if add or k_warps > 1:
            cuda.syncthreads()
            item, square = thread, float32(0)
            while item < sums_count:
                row, vector = int32(block_row + item // vectors), int32(first + item % vectors)
                if row < d_out and vector < rows:
                    total = sum_over_warps(shared, int32(sums_at + item), sums_count, min(k_warps, count))
                    place = uint32(int32(int32(vector * y_columns) + start) + row)
                    if add:
                        total += y[place]
                        square += total * total
                    y[place] = rounded(total)
                item = int32(item + threads)
            if add:
                store_squares(shared, squares, first, rows, lane, warp, warps, square)

    several, numbers = partial(types.UniTuple, count=2 * layers), partial(types.UniTuple, types.int32)
    arrays = (several(WORDS), several(HALVES), numbers(2 * layers), numbers(2 * layers), *[numbers(layers)] * 3)
    SIGNATURES[kernel] = types.void(SINGLES, *arrays, SINGLES, ELEMENTS[dtype], SINGLES, *[types.int32] * 6)
    return kernel
