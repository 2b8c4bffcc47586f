"""The packed linear layer on NVIDIA GPUs, in Numba CUDA: two launches, `latent` and then `output`.

Both multiply a matrix of signs with a vector. A row of signs is bits, s = 1 - 2 b, so that

    sum_j s_j v_j = sum_j v_j - 2 sum_j b_j v_j

and tensor cores multiply bits: one instruction counts the ones that 16 rows of 256 bits have in common with 8 columns
of 256 bits. The words of a checkpoint go into it as they are. The vector becomes bits too: a warp takes a slice of 256
of its entries and writes each as an integer,

    v_j = unit q_j,   |q_j| <= 2^21,   with one power of two, `unit`, for the slice

and q_j + 2^22 as 23 bits, the planes: bit p of all 256 entries is a column, and a 24th column of ones takes the 2^22
away again. So three instructions multiply 16 rows of signs with 256 entries,

    sum_j b_j q_j = sum_p 2^p common(b, plane_p) - 2^22 common(b, ones)

Sums of integers are exact; an entry is off by at most 2^-22 of the largest in its slice.

    latent   part[s, b, r] = ell_r sum over the s-th part of d_in of V_sign[r, i] g_i x[b, i]
    output   y[b, o] = sum over paths of h_o sum_r U_sign[o, r] sum_s part[s, b, r]

`latent` divides d_in among blocks too, since the rank is small; `output` adds their parts up. Nothing is added in an
order that depends on time: results are the same each time.

`plain_latent` and `plain_output` are the first step of the ladder: a warp for each row, a sign at a time. Both pairs
are launched by cuda_layer.py, and where the GPU can (`early`) a kernel starts before the one before it has ended: it
fetches its words, and then waits for what they are multiplied with.
"""

# What Numba makes of cuda.threadIdx and its like is not what their Python stand-ins say.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportOperatorIssue=false
# pyright: reportGeneralTypeIssues=false

from functools import cache, partial
from typing import Any, NamedTuple

from numba import cuda, float32, int32, types, uint32

from .cuda_intrinsics import (
    as_bits,
    as_float,
    copied,
    copy4,
    count_common,
    exchange,
    exponential,
    halves,
    larger,
    let_next_start,
    load_words,
    permute,
    reciprocal_root,
    wait,
    warp_max,
    warp_total,
)
from .cuda_plain import (
    AT,
    ELEMENTS,
    HALVES,
    ROUND,
    SIGNATURES,
    SINGLES,
    WORDS,
    half_at,
    kernel_factory,
    single_at,
    warp_sum,
)

SLICE = 256  # entries of a vector that a warp multiplies at once: eight words of signs, two for each lane of a row


ROWS = 16  # of a tile: what a warp multiplies at once


VECTORS = 4  # that are multiplied at once


DIGIT = 64  # words of eight planes of a slice


PLANES = 200  # words of a slice's 24 planes, its unit, its sum, and some to spare


load2, load4 = load_words(2), load_words(4)


@cuda.jit(device=True, forceinline=True)
def half_eight(array, index):
    """Eight elements of an array of float16, from an index divisible by eight, as float32."""
    k, m, n, o = load4(array, uint32(index))
    (a, b), (c, d), (e, f), (g, h) = halves(k), halves(m), halves(n), halves(o)
    return a, b, c, d, e, f, g, h


@cuda.jit(device=True, forceinline=True)
def bfloat_eight(array, index):
    """Eight elements of an array of bfloat16, from an index divisible by eight, as float32."""
    k, m, n, o = load4(array, uint32(index))
    up, upper = uint32(16), uint32(0xFFFF0000)
    return (
        as_float(k << up), as_float(k & upper), as_float(m << up), as_float(m & upper),
        as_float(n << up), as_float(n & upper), as_float(o << up), as_float(o & upper),
    )  # fmt: skip


@cuda.jit(device=True, forceinline=True)
def single_eight(array, index):
    """Eight elements of an array of float32, from an index divisible by four."""
    a, b, c, d = load4(array, uint32(index))
    e, f, g, h = load4(array, uint32(index + 4))
    return (
        as_float(a), as_float(b), as_float(c), as_float(d), as_float(e), as_float(f), as_float(g), as_float(h),
    )  # fmt: skip


EIGHT = {"half": half_eight, "bfloat": bfloat_eight, "single": single_eight}


@cuda.jit(device=True, forceinline=True)
def zeros():
    """Eight float32."""
    return float32(0), float32(0), float32(0), float32(0), float32(0), float32(0), float32(0), float32(0)


@cuda.jit(device=True, forceinline=True)
def times(a, b):
    """Products of eight numbers with eight."""
    return (
        a[0] * b[0], a[1] * b[1], a[2] * b[2], a[3] * b[3], a[4] * b[4], a[5] * b[5], a[6] * b[6], a[7] * b[7],
    )  # fmt: skip


@cuda.jit(device=True, forceinline=True)
def plus(a, b):
    """Sums of eight numbers and eight."""
    return (
        a[0] + b[0], a[1] + b[1], a[2] + b[2], a[3] + b[3], a[4] + b[4], a[5] + b[5], a[6] + b[6], a[7] + b[7],
    )  # fmt: skip


@cuda.jit(device=True, forceinline=True)
def eight_times(a, factor):
    """Eight numbers times a factor."""
    return (
        a[0] * factor, a[1] * factor, a[2] * factor, a[3] * factor,
        a[4] * factor, a[5] * factor, a[6] * factor, a[7] * factor,
    )  # fmt: skip


@cuda.jit(device=True, forceinline=True)
def plus_four(a, b):
    """Sums of four numbers and four."""
    return a[0] + b[0], a[1] + b[1], a[2] + b[2], a[3] + b[3]


@cuda.jit(device=True, forceinline=True)
def scaled(a, factor):
    """Four numbers times a factor."""
    return a[0] * factor, a[1] * factor, a[2] * factor, a[3] * factor


@cuda.jit(device=True, forceinline=True)
def times_four(a, b):
    """Products of four numbers with four."""
    return a[0] * b[0], a[1] * b[1], a[2] * b[2], a[3] * b[3]


@cuda.jit(device=True, forceinline=True)
def largest_of(v):
    """The largest magnitude of eight numbers."""
    one = larger(larger(abs(v[0]), abs(v[1])), larger(abs(v[2]), abs(v[3])))
    return larger(one, larger(larger(abs(v[4]), abs(v[5])), larger(abs(v[6]), abs(v[7]))))


@cuda.jit(device=True, forceinline=True)
def whole(value, inverse):
    """Q + 2^22 in the lowest 23 bits, for the integer q nearest to value * inverse; above them, the number's exponent.

    A float32 between 2^23 and 2^24 is an integer, and its lowest bits are that integer's.
    """
    return as_bits(value * inverse + float32(12582912.0))  # 1.5 * 2^23


@cuda.jit(device=True, forceinline=True)
def turned(x, y):
    """Transpose 8 by 8 bits: bytes 0 to 3 are x's, 4 to 7 are y's (Warren, Hacker's Delight, 7-3)."""
    s = (x ^ (x >> uint32(7))) & uint32(0x00AA00AA)
    t = (y ^ (y >> uint32(7))) & uint32(0x00AA00AA)
    x, y = x ^ s ^ (s << uint32(7)), y ^ t ^ (t << uint32(7))
    s = (x ^ (x >> uint32(14))) & uint32(0x0000CCCC)
    t = (y ^ (y >> uint32(14))) & uint32(0x0000CCCC)
    x, y = x ^ s ^ (s << uint32(14)), y ^ t ^ (t << uint32(14))
    t = (x ^ (y << uint32(4))) & uint32(0xF0F0F0F0)
    return uint32(x ^ t), uint32(y ^ (t >> uint32(4)))


@cuda.jit(device=True, forceinline=True)
def gathered(lane, a, b, c):
    """Bring together what four lanes have of eight planes of a word, three times: two planes for each lane.

    A lane has an octet of the word of each plane: bytes of x for planes 0 to 3, of y for planes 4 to 7, where a is
    (x, y), and b and c likewise. Lanes exchange octets, until that of octet o has the words of planes 2 o and 2 o + 1.
    """
    odd, high = lane & 1 != 0, lane & 2 != 0
    keep, give = (uint32(0x7632), uint32(0x5410)) if odd else (uint32(0x5410), uint32(0x7632))
    order = uint32(0x2604) if odd else uint32(0x6240)
    if high:
        order = uint32(order >> uint32(8) | order << uint32(8))
        a, b, c = (a[1], a[0]), (b[1], b[0]), (c[1], c[0])
    distance = uint32(2)
    x, y, z = exchange(a[1], distance), exchange(b[1], distance), exchange(c[1], distance)
    a, b, c = (
        (permute(a[0], x, keep), permute(a[0], x, give)),
        (permute(b[0], y, keep), permute(b[0], y, give)),
        (permute(c[0], z, keep), permute(c[0], z, give)),
    )
    distance, following = uint32(1), uint32(order + uint32(0x1111))
    x, y, z = exchange(a[1], distance), exchange(b[1], distance), exchange(c[1], distance)
    return (
        (permute(a[0], x, order), permute(a[0], x, following)),
        (permute(b[0], y, order), permute(b[0], y, following)),
        (permute(c[0], z, order), permute(c[0], z, following)),
    )


@cuda.jit(device=True, forceinline=True)
def put_slice(signal, place, lane, v):
    """Put the planes, the unit and the sum of a warp's slice into shared memory; a lane has eight entries of a word.

    The unit is NaN if an entry is infinite or NaN.
    """
    exponent = uint32(max(warp_max(as_bits(largest_of(v))) >> uint32(23), uint32(21)))
    inverse = as_float(uint32((uint32(274) - exponent) << uint32(23)))  # 2^20 over the power of two in the largest
    a, b, c, d = whole(v[0], inverse), whole(v[1], inverse), whole(v[2], inverse), whole(v[3], inverse)
    e, f, g, h = whole(v[4], inverse), whole(v[5], inverse), whole(v[6], inverse), whole(v[7], inverse)
    lot = uint32(uint32(uint32(a + b) + uint32(c + d)) + uint32(uint32(e + f) + uint32(g + h)))
    word = int32(int32(int32(lane >> 2) & 3) << 1 | lane >> 4)
    summary, place = uint32(place + 192), int32(place + int32(word + int32(lane & 3) * 16))
    low, high = uint32(0x5140), uint32(0x0062)
    m, n, o, p = permute(a, b, low), permute(c, d, low), permute(e, f, low), permute(g, h, low)
    a, c, e, g = permute(a, b, high), permute(c, d, high), permute(e, f, high), permute(g, h, high)
    low, high = uint32(0x5410), uint32(0x7632)
    x, y = turned(permute(a, c, low), permute(e, g, low))
    a, b, c = gathered(
        lane,
        turned(permute(m, n, low), permute(o, p, low)),
        turned(permute(m, n, high), permute(o, p, high)),
        (x, uint32(y | uint32(0xFF000000))),
    )
    place = uint32(place)
    signal[place], signal[place + uint32(8)] = a
    signal[place + uint32(DIGIT)], signal[place + uint32(DIGIT + 8)] = b
    signal[place + uint32(2 * DIGIT)], signal[place + uint32(2 * DIGIT + 8)] = c
    lot = warp_total(uint32(lot - uint32(8 * 0x4B400000 & 0xFFFFFFFF)))
    if lane == 0:
        unit = uint32((exponent - uint32(20)) << uint32(23)) if exponent < uint32(255) else uint32(0x7FC00000)
        signal[summary], signal[summary + uint32(1)] = unit, lot


@cuda.jit(device=True, forceinline=True)
def product(signal, place, lane, words):
    """Sum of a slice's entries, in units, where bits are ones: those of row g of a tile, or g + 8 in odd lanes."""
    at, of = int32(place + int32(lane << 1)), int32(lane & 3)
    b0, b1 = load2(signal, uint32(at))
    c = count_common(words[0], words[1], words[2], words[3], b0, b1)
    b0, b1 = load2(signal, uint32(at + DIGIT))
    d = count_common(words[0], words[1], words[2], words[3], b0, b1)
    b0, b1 = load2(signal, uint32(at + 2 * DIGIT))
    e = count_common(words[0], words[1], words[2], words[3], b0, b1)
    last = int32(-1) if of == 3 else int32(2)  # the 24th plane counts as -2^22
    upper = int32(int32(c[0] + int32(c[1] << 1)) + int32(int32(d[0] + int32(d[1] << 1)) << 8))
    lower = int32(int32(c[2] + int32(c[3] << 1)) + int32(int32(d[2] + int32(d[3] << 1)) << 8))
    upper = int32(int32(upper + int32(int32(e[0] + int32(e[1] * last)) << 16)) << int32(of << 1))
    lower = int32(int32(lower + int32(int32(e[2] + int32(e[3] * last)) << 16)) << int32(of << 1))
    mine, other = (lower, upper) if lane & 1 != 0 else (upper, lower)
    mine = int32(mine + cuda.shfl_xor_sync(0xFFFFFFFF, other, 1))
    return int32(mine + cuda.shfl_xor_sync(0xFFFFFFFF, mine, 2))


@cuda.jit(device=True, forceinline=True)
def part_of_sum(signal, place, lane, words):
    """What a slice adds to the sum of row g of a tile, or g + 8 in odd lanes."""
    bits = product(signal, place, lane, words)
    unit, lot = load2(signal, uint32(place + 192))
    return float32(int32(int32(lot) - int32(bits << 1))) * as_float(unit)


@cuda.jit(device=True, forceinline=True)
def sums_of(signal, place, lane, words, vectors):
    """`part_of_sum` for each of `vectors` vectors."""
    a = part_of_sum(signal, place, lane, words)
    b = c = d = float32(0)
    if vectors > 1:
        b = part_of_sum(signal, int32(place + PLANES), lane, words)
    if vectors > 2:
        c = part_of_sum(signal, int32(place + 2 * PLANES), lane, words)
        d = part_of_sum(signal, int32(place + 3 * PLANES), lane, words)
    return a, b, c, d


@cuda.jit(device=True, forceinline=True)
def keep(shared, at, sums, vectors):
    """Put a row's sums into shared memory."""
    shared[uint32(at)] = sums[0]
    if vectors > 1:
        shared[uint32(at + 1)] = sums[1]
    if vectors > 2:
        shared[uint32(at + 2)] = sums[2]
        shared[uint32(at + 3)] = sums[3]


@cuda.jit(device=True, forceinline=True)
def words_at(signal, at, stride):
    """The lane's words of rows g and g + 8 of a tile, as tensor cores have them; `at` is that of row g."""
    below = int32(at + int32(8 * stride))
    return signal[uint32(at)], signal[uint32(below)], signal[uint32(at + 4)], signal[uint32(below + 4)]


@cuda.jit(device=True, forceinline=True)
def fetch_rows(signal, held, stride, words, row, rows, width, first, count, wide):
    """Begin to copy words of a block's rows into shared memory: `count` of each, from word `first` on, `wide` or not.

    Wide rows are whole fours of words and come `stride` apart; others come as they are, all of their words. What lies
    beyond a row's last word may be anything: it is multiplied with zero.
    """
    thread, threads = int32(cuda.threadIdx.x), int32(cuda.blockDim.x)
    rows = max(rows, int32(0))  # a block may be beyond the last row
    if wide:
        row_of, rows_at_once = int32(thread >> 4), int32(threads >> 4)
        last = min(count, int32(width - first))
        while row_of < rows:
            at = int32(int32(thread & 15) << 2)
            source, target = int32(int32(row + row_of) * width + first), int32(held + int32(row_of * stride))
            while at < last:
                copy4(signal, uint32(target + at), words, uint32(source + at))
                at = int32(at + 64)
            row_of = int32(row_of + rows_at_once)
    else:
        at, begin, last = int32(thread << 2), int32(row * width), int32(int32(rows * width) & -4)
        while at < last:
            copy4(signal, uint32(held + at), words, uint32(begin + at))
            at = int32(at + int32(threads << 2))
        if thread < int32(int32(rows * width) & 3):
            at = int32(last + thread)
            signal[uint32(held + at)] = words[uint32(begin + at)]


@cuda.jit(device=True, forceinline=True)
def total_of(shared, kept, stride, count):
    """Sum of what `count` warps kept."""
    total = float32(0)
    while count > 0:
        total += shared[uint32(kept)]
        kept, count = int32(kept + stride), int32(count - 1)
    return total


@cuda.jit(device=True, forceinline=True)
def silu(value):
    """Sigmoid linear unit: value * sigmoid(value)."""
    return value / (float32(1) + exponential(-value))


@cuda.jit(device=True, forceinline=True)
def gelu_tanh(value):
    """Gaussian error linear unit by tanh: value * sigmoid(2 sqrt(2 / pi) (value + 0.044715 value^3))."""
    inner = value * (float32(1.5957691216057308) + float32(0.07135481282) * value * value)
    return value / (float32(1) + exponential(-inner))


ACTIVATIONS = {"silu": silu, "gelu_tanh": gelu_tanh}


ENTRIES = ("plain", "norm", *ACTIVATIONS)  # and Shares


EXITS = ("plain", "bias", "add")


SUMMARY = 8  # numbers after a share's values: its largest score, its sum of weights, and some to spare


class Shares(NamedTuple):
    """An input that is attention, of which several blocks have seen a share of the context each (`cuda_decode.attend`).

    For each vector, head and share: `size` values weighted by exp(score - largest score), and SUMMARY numbers.

    Attributes
    ----------
    count : int
        Shares of a context; one that is empty has a largest score of which no weight is left.
    size : int
        Of a head, a multiple of eight.
    """

    count: int
    size: int

    @property
    def stride(self) -> int:
        """Numbers of a share."""
        return self.size + SUMMARY


@cache
def united(shares: Shares) -> Any:
    """A device function: eight entries of such an input, from their column on; zeros beyond its end.

    All shares are loaded at once, which takes no longer than loading one, and nothing waits for another block.
    """
    count, size, stride = shares.count, shares.size, shares.stride

    @cuda.jit(device=True, forceinline=True)
    def eight(x, vector, column, d_in):
        if column >= d_in:
            return zeros()
        head, entry = int32(column // size), int32(column % size)
        base = int32(int32(int32(vector * int32(d_in // size)) + head) * int32(count * stride))
        top = single_at(x, int32(base + size))
        for share in range(1, count):
            top = larger(top, single_at(x, int32(base + int32(share * stride + size))))
        total, sums = float32(0), zeros()
        for share in range(count):
            place = int32(base + share * stride)
            factor = exponential(single_at(x, int32(place + size)) - top)
            total += factor * single_at(x, int32(place + int32(size + 1)))
            sums = plus(sums, eight_times(single_eight(x, int32(place + entry)), factor))
        return eight_times(sums, float32(1) / total)

    return eight


@cache
def eights(aligned: bool) -> Any:
    """A device function: eight entries of a vector, zeros beyond its end; `aligned` if vectors are whole eights.

    It takes the array, how it is read (of AT, and of EIGHT), where the vector begins, the column, and the last column.
    """

    @cuda.jit(device=True, forceinline=True)
    def one(array, at, base, column, count):
        return at(array, int32(base + column)) if column < count else float32(0)

    @cuda.jit(device=True, forceinline=True)
    def eight(array, at, at_once, base, column, count):
        if aligned:
            return at_once(array, int32(base + column)) if column < count else zeros()
        return (
            one(array, at, base, column, count),
            one(array, at, base, int32(column + 1), count),
            one(array, at, base, int32(column + 2), count),
            one(array, at, base, int32(column + 3), count),
            one(array, at, base, int32(column + 4), count),
            one(array, at, base, int32(column + 5), count),
            one(array, at, base, int32(column + 6), count),
            one(array, at, base, int32(column + 7), count),
        )

    return eight


@kernel_factory
def latent(
    kind: str, wide: bool, aligned: bool, vectors: int, early: bool, paths: int = 2, entry: str | Shares = "plain"
) -> Any:
    """The first kernel: for an input of a kind, rows of whole fours of words or not, one, two or four vectors.

    `aligned` if vectors are whole eights of entries. `early` lets it start before the kernel before it has ended, which
    GPUs of compute capability 9.0 and later can. `paths` is the number of paths, of one layer or of several that share
    their input. What `entry` makes of the input before it is multiplied:

    - "plain": nothing;
    - "norm": RMSNorm, v_i = weight_i x_i / sqrt(sum(squares) / d_in + eps), from `count` numbers for each vector;
    - an activation: v_i = activation(x_i) x_(d_in + i), of vectors of 2 d_in entries;
    - Shares: attention is put together.
    """
    at_place, eight_at, eight = AT[kind], EIGHT[kind], eights(aligned)
    norm, gated = entry == "norm", entry in ACTIVATIONS
    activation = ACTIVATIONS.get(entry, silu) if isinstance(entry, str) else silu

    @cuda.jit(device=True, forceinline=True)
    def weights_of(g, weight, column, d_in):
        """What x is multiplied with."""
        scales = eight(g, half_at, half_eight, int32(0), column, d_in)
        return times(scales, eight(weight, single_at, single_eight, int32(0), column, d_in)) if norm else scales

    @cuda.jit(device=True, forceinline=True)
    def entries_of(x, vector, column, d_in):
        if not gated:
            return eight(x, at_place, eight_at, int32(vector * d_in), column, d_in)
        base = int32(vector * int32(2 * d_in))
        a, b, c, d, e, f, g, h = eight(x, at_place, eight_at, base, column, d_in)
        active = (
            activation(a), activation(b), activation(c), activation(d),
            activation(e), activation(f), activation(g), activation(h),
        )  # fmt: skip
        return times(active, eight(x, at_place, eight_at, int32(base + d_in), column, d_in))

    entries = united(entry) if isinstance(entry, Shares) else entries_of

    @cuda.jit(device=True, forceinline=True)
    def inverse_root(squares, vector, lane, count, d_in, eps):
        """1 / sqrt(mean square + eps) of a vector."""
        total, at = float32(0), lane
        while at < count:
            total += squares[uint32(int32(vector * count) + at)]
            at = int32(at + 32)
        return reciprocal_root(warp_sum(total) / float32(d_in) + eps)

    @cuda.jit(device=True, forceinline=True)
    def factors_of(squares, first, rows, lane, count, d_in, eps):
        a = b = c = d = float32(1)
        if norm:
            last = int32(rows - 1)
            a = inverse_root(squares, first, lane, count, d_in, eps)
            if vectors > 1:
                b = inverse_root(squares, min(int32(first + 1), last), lane, count, d_in, eps)
            if vectors > 2:
                c = inverse_root(squares, min(int32(first + 2), last), lane, count, d_in, eps)
                d = inverse_root(squares, min(int32(first + 3), last), lane, count, d_in, eps)
        return a, b, c, d

    @cuda.jit(device=True, forceinline=True)
    def put(part, target, across, row, rank, limit, left, sums):
        if row < limit:
            inside = row < rank
            part[uint32(target + row)] = sums[0] if inside else float32(0)
            if vectors > 1 and left > 1:
                part[uint32(target + across + row)] = sums[1] if inside else float32(0)
            if vectors > 2 and left > 2:
                part[uint32(target + 2 * across + row)] = sums[2] if inside else float32(0)
            if vectors > 2 and left > 3:
                part[uint32(target + 3 * across + row)] = sums[3] if inside else float32(0)

    @cuda.jit
    def kernel(
        x, gs, signs, ells, ranks, begins, offsets, part, weight, squares,
        d_in, rows, across, slices, tiles, sharing, log, count_squares, eps,
    ):  # fmt: skip
        """Grid (blocks of all paths, parts of d_in, vectors / `vectors`).

        begins: the first block of each path; offsets: where it begins in the `across` columns of `part`; slices: of a
        part; tiles: of a warp; sharing: warps of a block that have the same rows and other slices; 2^log: warps that
        have other rows.
        """
        thread, threads = int32(cuda.threadIdx.x), int32(cuda.blockDim.x)
        lane, warp, warps = int32(thread & 31), int32(thread >> 5), int32(threads >> 5)
        mine, group = int32(warp >> log), int32(warp & int32(int32(1 << log) - 1))
        step, span = int32(ROWS << log), int32(int32(ROWS * tiles) << log)
        block, path = int32(cuda.blockIdx.x), int32(0)
        for following_path in range(1, paths):
            path = int32(following_path) if block >= begins[following_path] else path
        g, words, ell, rank = gs[path], signs[path], ells[path], int32(ranks[path])
        block_row = int32(span * int32(block - begins[path]))
        width = int32(int32(d_in + 31) >> 5)
        first = int32(vectors * cuda.blockIdx.z)
        begin = int32(slices * cuda.blockIdx.y)
        count = min(int32(slices), int32(int32(int32(width + 7) >> 3) - begin))
        signal = cuda.shared.array(0, uint32)
        shared = cuda.shared.array(0, float32)
        kept, span_kept = int32(vectors * PLANES * slices), int32(span * vectors)
        held = int32(kept + int32(sharing * span_kept))  # where the words begin
        stride = int32(int32(8 * slices) + 4) if wide else width
        fetch_rows(
            signal, held, stride, words, block_row, min(span, int32(rank - block_row)), width, int32(8 * begin),
            int32(8 * count), wide,
        )  # fmt: skip
        own = int32(
            int32(int32(ROWS * group) + int32(lane >> 2)) + int32(8 * int32(lane & 1))
        )  # the lane's row of a tile
        scale = half_at(ell, min(int32(block_row + own), int32(rank - 1)))
        column = int32(int32(SLICE * int32(begin + warp)) + int32(lane << 3))
        weights = weights_of(g, weight, column, d_in)
        if early:
            wait()
            let_next_start()
        factors = factors_of(squares, first, rows, lane, count_squares, d_in, eps)
        slice = warp
        while slice < count:
            for vector in range(vectors):
                v = entries(x, min(int32(first + vector), int32(rows - 1)), column, d_in)
                place = int32(PLANES * int32(vectors * slice + vector))
                put_slice(signal, place, lane, times(v, weights))
            slice, column = int32(slice + warps), int32(column + int32(SLICE * warps))
            if slice < count:
                weights = weights_of(g, weight, column, d_in)
        copied()
        cuda.syncthreads()

        limit = int32(int32(rank + 31) & -32)
        target = int32(int32(int32(int32(cuda.blockIdx.y) * rows + first) * across) + offsets[path])
        row, tile = own, int32(0)
        at = int32(held + int32(int32(int32(ROWS * group) + int32(lane >> 2)) * stride) + int32(lane & 3))
        while tile < tiles:
            following = scale
            if int32(tile + 1) < tiles:
                following = half_at(ell, min(int32(block_row + int32(row + step)), int32(rank - 1)))
            sums = (float32(0), float32(0), float32(0), float32(0))
            piece = mine
            while piece < count:
                ready = words_at(signal, int32(at + int32(8 * piece)), stride)
                sums = plus_four(sums, sums_of(signal, int32(PLANES * vectors * piece), lane, ready, vectors))
                piece = int32(piece + sharing)
            sums = times_four(scaled(sums, scale), factors) if norm else scaled(sums, scale)
            if lane & 2 == 0 and sharing > 1:
                keep(shared, int32(kept + int32(mine * span_kept) + vectors * row), sums, vectors)
            elif lane & 2 == 0:
                put(part, target, across, int32(block_row + row), rank, limit, int32(rows - first), sums)
            scale, row, tile, at = following, int32(row + step), int32(tile + 1), int32(at + int32(step * stride))
        if sharing > 1:
            cuda.syncthreads()
            item = thread
            while item < span_kept:
                row, vector = int32(block_row + item // vectors), int32(item % vectors)
                if row < limit and vector < rows - first:
                    total = total_of(shared, int32(kept + item), span_kept, min(sharing, count))
                    part[uint32(target + int32(vector * across) + row)] = total if row < rank else float32(0)
                item = int32(item + threads)

    several, numbers = partial(types.UniTuple, count=paths), partial(types.UniTuple, types.int32, paths)
    arrays = (several(HALVES), several(WORDS), several(HALVES), numbers(), numbers(), numbers())
    SIGNATURES[kernel] = types.void(
        ELEMENTS[kind], *arrays, SINGLES, SINGLES, SINGLES, *[types.int32] * 8, types.float32
    )
    return kernel


@kernel_factory
def output(kind: str, wide: bool, vectors: int, parts: int, early: bool, layers: int = 1, leave: str = "plain") -> Any:
    """The second kernel, likewise, for so many parts, and one layer or several, each of two paths.

    A layer of one path has a second one of rank 0. What becomes of the outputs, by `leave`:

    - "plain": y[b, o], layers one after the other;
    - "bias": the same with bias[o] added;
    - "add": added to y, of float32 and one layer, and a sum of squares of each block's new entries of a vector goes to
      squares[b, block], for the norm that comes next.
    """
    rounded = ROUND[kind]
    add, biased = leave == "add", leave == "bias"

    @cuda.jit(device=True, forceinline=True)
    def eight(part, base, distance, inside):
        if not inside:
            return zeros()
        entries = single_eight(part, base)
        for split in range(1, parts):  # known to the compiler, so that no load waits for another
            entries = plus(entries, single_eight(part, int32(base + split * distance)))
        return entries

    @cuda.jit(device=True, forceinline=True)
    def put(y, target, across, row, d_out, left, sums):
        if row < d_out:
            y[uint32(target + row)] = rounded(sums[0])
            if vectors > 1 and left > 1:
                y[uint32(target + across + row)] = rounded(sums[1])
            if vectors > 2 and left > 2:
                y[uint32(target + 2 * across + row)] = rounded(sums[2])
            if vectors > 2 and left > 3:
                y[uint32(target + 3 * across + row)] = rounded(sums[3])

    @cuda.jit(device=True, forceinline=True)
    def put_squares(shared, squares, first, rows, lane, warp, warps, total):
        """Add a block's squares up; a thread's are of vector thread % vectors."""
        for distance in (16, 8, 4, 2, 1):
            if distance >= vectors:
                total += cuda.shfl_xor_sync(0xFFFFFFFF, total, distance)
        if lane < vectors:
            shared[uint32(vectors * warp + lane)] = total
        cuda.syncthreads()
        vector = int32(first + lane)
        if warp == 0 and lane < vectors and vector < rows:
            sum_of_warps = total_of(shared, lane, int32(vectors), warps)
            squares[uint32(int32(vector * int32(cuda.gridDim.x)) + int32(cuda.blockIdx.x))] = sum_of_warps

    @cuda.jit
    def kernel(
        part, signs, scales, ranks, offsets, sizes, begins, starts, bias, y, squares,
        rows, across, across_y, tiles, sharing, log,
    ):  # fmt: skip
        """Grid (blocks of all layers, 1, vectors / `vectors`); warps share the slices of a layer's two paths.

        signs, scales, ranks and offsets (columns of `part`) are of all paths; sizes (d_out), begins (the first block)
        and starts (columns of y, of which there are `across_y`) of all layers.
        """
        thread, threads = int32(cuda.threadIdx.x), int32(cuda.blockDim.x)
        lane, warp, warps = int32(thread & 31), int32(thread >> 5), int32(threads >> 5)
        mine, group = int32(warp >> log), int32(warp & int32(int32(1 << log) - 1))
        step, span = int32(ROWS << log), int32(int32(ROWS * tiles) << log)
        block, layer = int32(cuda.blockIdx.x), int32(0)
        for following_layer in range(1, layers):
            layer = int32(following_layer) if block >= begins[following_layer] else layer
        block_row, d_out, start = int32(span * int32(block - begins[layer])), int32(sizes[layer]), int32(starts[layer])
        one, other = int32(2 * layer), int32(int32(2 * layer) + 1)
        u_1, u_2, h_1, h_2 = signs[one], signs[other], scales[one], scales[other]
        width_1, width_2 = int32(int32(ranks[one] + 31) >> 5), int32(int32(ranks[other] + 31) >> 5)
        slices_1 = int32(int32(width_1 + 7) >> 3)
        count = int32(slices_1 + int32(int32(width_2 + 7) >> 3))
        first = int32(vectors * cuda.blockIdx.z)
        signal = cuda.shared.array(0, uint32)
        shared = cuda.shared.array(0, float32)
        kept, span_kept = int32(vectors * PLANES * count), int32(span * vectors)
        stride_1 = int32(int32(8 * slices_1) + 4) if wide else width_1
        stride_2 = int32(int32(8 * int32(count - slices_1)) + 4) if wide else width_2
        held_1 = int32(kept + int32(sharing * span_kept))  # where the words begin
        held_2 = int32(int32(held_1 + int32(span * stride_1) + 3) & -4)
        distance = int32(rows * across)
        here = min(span, int32(d_out - block_row))
        fetch_rows(signal, held_1, stride_1, u_1, block_row, here, width_1, int32(0), width_1, wide)
        if width_2 > 0:
            fetch_rows(signal, held_2, stride_2, u_2, block_row, here, width_2, int32(0), width_2, wide)
        own = int32(
            int32(int32(ROWS * group) + int32(lane >> 2)) + int32(8 * int32(lane & 1))
        )  # the lane's row of a tile
        now = min(int32(block_row + own), int32(d_out - 1))
        scale_1, scale_2 = half_at(h_1, now), half_at(h_2, now)
        column_1, column_2 = int32(offsets[one]), int32(offsets[other])
        if early:
            wait()
            let_next_start()
        slice = warp
        while slice < count:
            second = slice >= slices_1
            word = int32(8 * (int32(slice - slices_1) if second else slice) + int32(lane >> 2))
            inside = word < (width_2 if second else width_1)
            column = int32(int32(32 * word) + int32(8 * int32(lane & 3)))
            column = int32(column + (column_2 if second else column_1))
            for vector in range(vectors):
                base = int32(int32(min(int32(first + vector), int32(rows - 1)) * across) + column)
                entries = eight(part, base, distance, inside)
                put_slice(signal, int32(PLANES * int32(vectors * slice + vector)), lane, entries)
            slice = int32(slice + warps)
        copied()
        cuda.syncthreads()

        row, tile = own, int32(0)
        high = int32(int32(ROWS * group) + int32(lane >> 2))
        at_1 = int32(held_1 + int32(high * stride_1) + int32(lane & 3))
        at_2 = int32(held_2 + int32(high * stride_2) + int32(lane & 3)) - int32(8 * slices_1)
        while tile < tiles:
            following_1, following_2 = scale_1, scale_2
            now = min(int32(block_row + row), int32(d_out - 1))
            constant = bias[uint32(start + now)] if biased else float32(0)
            if int32(tile + 1) < tiles:
                now = min(int32(block_row + int32(row + step)), int32(d_out - 1))
                following_1, following_2 = half_at(h_1, now), half_at(h_2, now)
            constant = constant if mine == 0 else float32(0)
            sums = (constant, constant, constant, constant)
            piece = mine
            while piece < count:
                second = piece >= slices_1
                at, stride = (at_2, stride_2) if second else (at_1, stride_1)
                ready = words_at(signal, int32(at + int32(8 * piece)), stride)
                more = sums_of(signal, int32(PLANES * vectors * piece), lane, ready, vectors)
                sums = plus_four(sums, scaled(more, scale_2 if second else scale_1))
                piece = int32(piece + sharing)
            if lane & 2 == 0 and (add or sharing > 1):
                keep(shared, int32(kept + int32(mine * span_kept) + vectors * row), sums, vectors)
            elif lane & 2 == 0:
                target = int32(int32(first * across_y) + start)
                put(y, target, across_y, int32(block_row + row), d_out, int32(rows - first), sums)
            scale_1, scale_2, row, tile = following_1, following_2, int32(row + step), int32(tile + 1)
            at_1, at_2 = int32(at_1 + int32(step * stride_1)), int32(at_2 + int32(step * stride_2))
        if add or sharing > 1:
            cuda.syncthreads()
            item, square = thread, float32(0)
            while item < span_kept:
                row, vector = int32(block_row + item // vectors), int32(first + item % vectors)
                if row < d_out and vector < rows:
                    total = total_of(shared, int32(kept + item), span_kept, min(sharing, count))
                    place = uint32(int32(int32(vector * across_y) + start) + row)
                    if add:
                        total += y[place]
                        square += total * total
                    y[place] = rounded(total)
                item = int32(item + threads)
            if add:
                put_squares(shared, squares, first, rows, lane, warp, warps, square)

    several, numbers = partial(types.UniTuple, count=2 * layers), partial(types.UniTuple, types.int32)
    arrays = (several(WORDS), several(HALVES), numbers(2 * layers), numbers(2 * layers), *[numbers(layers)] * 3)
    SIGNATURES[kernel] = types.void(SINGLES, *arrays, SINGLES, ELEMENTS[kind], SINGLES, *[types.int32] * 6)
    return kernel
