"""Compute what a decoded token needs besides its linear layers on NVIDIA GPUs, in Numba CUDA.

    embed       x = table[token]
    add         x += y
    rms_norm    y_i = weight_i x_i / sqrt(mean(x^2) + eps)
    swiglu      y_i = silu(x_i) x_(n + i)
    attend      RoPE, append key and value to the cache, attention over the cache
    logits      y = table x, for a table of 8 or 4 bits

x is the residual stream, float32. A kernel that writes x also writes one sum of squares per block, so the next RMSNorm
needs no pass over x of its own.

Attention of one query per head over t cached tokens is y = sum_t softmax(q . k_t / sqrt(size)) v_t. Each key and
value that is read serves few queries, so memory bandwidth limits the kernel. Three ideas keep it near that limit:

- Online softmax (Milakov and Gimelshein, arXiv 1805.02867). A running triple (m, s, v) holds the largest score so
  far, the sum of exp(score - m), and the sum of exp(score - m) times the values. A larger score rescales s and v by
  exp(old m - new m). One pass over the tokens suffices, and no score is stored. Two triples combine by the same rule.
- Split-KV, also called flash decoding (Dao and others, 2023). One query per head gives too few blocks to fill a GPU,
  so n blocks share a context: each attends to one n-th of the tokens and leaves its triple, a split-KV partial. Either
  the last block to arrive combines them (`combine`), or the next kernel combines them while it reads its input
  (`cuda_gemv.SplitKvPartials`), which saves a wait. Inside a block, teams of lanes and warps divide the tokens as well.
- Double buffering: each team loads the keys and values of its next tokens into registers before it computes on the
  current ones. The first loads start before the previous kernel ends (programmatic dependent launch), since they read
  only what earlier steps wrote.

The number of splits in use follows from the position, which lies in device memory. So one captured CUDA graph serves
every position that the cache has room for.

Bytes per token: each step reads the whole cache once, 4 * kv_heads * size bytes for each cached token and layer
(float16 keys and values), 16 KiB in Llama-2-7B's shape. Measured there on an H100, one layer, full cache
(book/results/cuda_decode.json for 128 tokens, book/results/cuda_cache.json for the others):

    context                        128      1024     8192     32768
    time, us                       4.9      11.9     47.8     175.9
    bandwidth / copy bandwidth     0.35     0.60     1.16     1.26

Short contexts are bound by latency. Long ones exceed a device-to-device copy, which also has to write.
"""

# The Python stand-ins of cuda.threadIdx and similar names have other types than Numba gives them.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportOperatorIssue=false
# pyright: reportGeneralTypeIssues=false, reportIndexIssue=false, reportRedeclaration=false
# pyright: reportOptionalSubscript=false

from typing import Any, NamedTuple

from numba import config, cuda, float32, int32, types, uint32

from .cuda_elements import (
    ELEMENTS,
    HALVES,
    LOAD8,
    POINTER,
    ROUND,
    SIGNATURES,
    SINGLES,
    add8,
    half_at,
    kernel_factory,
    load2,
    load4,
    mul8,
    scale8,
    silu,
    single_load8,
    warp_sum,
    zeros8,
)
from .cuda_gemv import SUMMARY
from .cuda_intrinsics import (
    as_float,
    byte_permute,
    exponential,
    griddep_launch_dependents,
    griddep_wait,
    halves,
    larger,
    reciprocal_root,
)

WARPS = 4  # warps per block of the element-wise kernels
THREADS = 32 * WARPS  # each thread computes eight neighbouring columns
LOGIT_ROWS = 4  # table rows that a warp multiplies at once
LOWEST = -1e30  # score of a token that does not exist: its weight is 0
INTEGERS = POINTER(types.int64)

if config.ENABLE_CUDASIM:

    @cuda.jit(device=True)
    def count_arrival(array, index):
        """Add 1 to an element of an int32 array atomically; return its old value."""
        return cuda.atomic.add(array, int(index), 1)

else:
    from llvmlite import ir
    from numba.cuda.extending import intrinsic

    from .cuda_intrinsics import WORD, element_pointer

    @intrinsic
    def count_arrival(typingctx, array, index):
        """Add 1 to an element of an int32 array atomically; return its old value."""

        def codegen(context, builder, signature, args):
            place = builder.ptrtoint(element_pointer(context, builder, signature.args[0], args), ir.IntType(64))
            text = "atom.acq_rel.gpu.global.add.u32 $0, [$1], 1;"
            kind = ir.FunctionType(WORD, [ir.IntType(64)])
            return builder.call(ir.InlineAsm(kind, text, "=r,l,~{memory}", side_effect=True), [place])

        return types.int32(array, types.uint32), codegen


def map_tuple(function: Any, count: int) -> Any:
    """Make a device function (items, rest) -> tuple of function(item, rest), unrolled over `count` items."""
    if count == 1:

        @cuda.jit(device=True, forceinline=True)
        def only(items, rest):
            return (function(items[0], rest),)

        return only
    others = map_tuple(function, count - 1)

    @cuda.jit(device=True, forceinline=True)
    def every(items, rest):
        return (function(items[0], rest), *others(items[1:], rest))

    return every


def reduce_tuple(function: Any, count: int) -> Any:
    """Make a device function (items, start) that folds items from the left by function(item, result so far)."""
    if count == 1:

        @cuda.jit(device=True, forceinline=True)
        def only(items, start):
            return function(items[0], start)

        return only
    others = reduce_tuple(function, count - 1)

    @cuda.jit(device=True, forceinline=True)
    def every(items, start):
        return others(items[1:], function(items[0], start))

    return every


def warp_reduce_sum(lanes: int) -> Any:
    """Make a device function that sums a value over groups of `lanes` neighbouring lanes, a power of two.

    Every lane gets the sum of its group (butterfly reduction by shuffles).
    """
    if lanes == 1:

        @cuda.jit(device=True, forceinline=True)
        def alone(value):
            return value

        return alone
    half, distance = warp_reduce_sum(lanes // 2), lanes // 2

    @cuda.jit(device=True, forceinline=True)
    def both(value):
        return half(value + cuda.shfl_xor_sync(0xFFFFFFFF, value, distance))

    return both


@cuda.jit(device=True, forceinline=True)
def dot(a, b):
    """Compute the dot product of two tuples of eight numbers."""
    one = a[0] * b[0] + a[1] * b[1] + (a[2] * b[2] + a[3] * b[3])
    return one + (a[4] * b[4] + a[5] * b[5] + (a[6] * b[6] + a[7] * b[7]))


@cuda.jit(device=True, forceinline=True)
def store8(array, at, v, rounded):
    """Round eight numbers and store them in neighbouring elements of an array."""
    array[uint32(at)], array[uint32(at + 1)] = rounded(v[0]), rounded(v[1])
    array[uint32(at + 2)], array[uint32(at + 3)] = rounded(v[2]), rounded(v[3])
    array[uint32(at + 4)], array[uint32(at + 5)] = rounded(v[4]), rounded(v[5])
    array[uint32(at + 6)], array[uint32(at + 7)] = rounded(v[6]), rounded(v[7])


@cuda.jit(device=True, forceinline=True)
def block_sum(value, shared, warps):
    """Sum a value over a block; every thread gets the sum. `shared` holds one float32 per warp."""
    value, thread = warp_sum(value), int32(cuda.threadIdx.x)
    if thread & 31 == 0:
        shared[uint32(thread >> 5)] = value
    cuda.syncthreads()
    total = float32(0)
    for warp in range(warps):
        total += shared[uint32(warp)]
    return total


@cuda.jit(device=True, forceinline=True)
def store_squares(squares, v, shared):
    """Store the sum of squares of a block's entries in squares[row, block]."""
    total = block_sum(dot(v, v), shared, WARPS)
    if cuda.threadIdx.x == 0:
        squares[uint32(cuda.blockIdx.y * cuda.gridDim.x + cuda.blockIdx.x)] = total


@cuda.jit(device=True, forceinline=True)
def first_column():
    """Compute the first of a thread's eight columns."""
    return int32(8 * int32(int32(cuda.blockIdx.x * THREADS) + int32(cuda.threadIdx.x)))


@cuda.jit(device=True, forceinline=True)
def bytes_to_floats(word):
    """Convert the four signed bytes of a word to float32, without integer conversions.

    The float32 with exponent bits 0x4B and a byte as its lowest mantissa bits is 2^23 + byte. Flipping the sign bit of
    a signed byte adds 128, so subtracting 2^23 + 128 leaves the signed value.
    """
    flipped, ones = uint32(word ^ uint32(0x80808080)), uint32(0x4B000000)
    middle = float32(8388736.0)  # 2^23 + 128
    return (
        as_float(byte_permute(flipped, ones, uint32(0x7440))) - middle,
        as_float(byte_permute(flipped, ones, uint32(0x7441))) - middle,
        as_float(byte_permute(flipped, ones, uint32(0x7442))) - middle,
        as_float(byte_permute(flipped, ones, uint32(0x7443))) - middle,
    )


@cuda.jit(device=True, forceinline=True)
def load8_int8(codes, scale, offset, row, column, size, group):
    """Load and dequantize eight entries of a row of an 8-bit table."""
    low, high = load2(codes, uint32(row * size + column))
    both = (*bytes_to_floats(low), *bytes_to_floats(high))
    return scale8(both, half_at(scale, row * (size // group) + column // group))


@cuda.jit(device=True, forceinline=True)
def load8_int4(codes, scale, offset, row, column, size, group):
    """Load and dequantize eight entries of a row of a 4-bit table.

    A group is 32 entries in 16 bytes: entries 0 to 15 are the low nibbles, 16 to 31 the high ones.
    """
    place, within = row * (size // 2) + (column // 32) * 16, column % 32
    low, high = load2(codes, uint32(place + within % 16))
    shift, mask = uint32(4 if within >= 16 else 0), uint32(0x0F0F0F0F)
    low, high = uint32((low >> shift) & mask), uint32((high >> shift) & mask)
    both = (*bytes_to_floats(low), *bytes_to_floats(high))
    at = row * (size // group) + column // group
    factor, first = half_at(scale, at), half_at(offset, at)
    both = scale8(both, factor)
    return add8(both, (first, first, first, first, first, first, first, first))


def load8_dense(dtype: str) -> Any:
    """Make a device function that loads eight entries of a row of a float16, bfloat16 or float32 table."""
    eight_at = LOAD8[dtype]

    @cuda.jit(device=True, forceinline=True)
    def load8(entries, scale, offset, row, column, size, group):
        return eight_at(entries, row * size + column)

    return load8


BYTES = POINTER(types.uint8)
#: Table type -> (device function that loads eight entries of a row, type of the array).
TABLES = {
    **{dtype: (load8_dense(dtype), ELEMENTS[dtype]) for dtype in LOAD8},
    "8": (load8_int8, BYTES),
    "4": (load8_int4, BYTES),
}


@kernel_factory
def embed(table: str) -> Any:
    """Make the kernel x[b] = table[tokens[b]], for a table type in TABLES."""
    load8, entries = TABLES[table]

    @cuda.jit
    def kernel(tokens, codes, scale, offset, x, squares, size, group):
        """Grid (columns / (8 THREADS), rows); tables that are not quantized ignore scale, offset and group."""
        shared = cuda.shared.array(WARPS, float32)
        column, row, v = first_column(), int32(cuda.blockIdx.y), zeros8()
        if column < size:
            v = load8(codes, scale, offset, tokens[row], column, size, group)
            store8(x, row * size + column, v, float32)
        store_squares(squares, v, shared)

    SIGNATURES[kernel] = types.void(INTEGERS, entries, HALVES, HALVES, SINGLES, SINGLES, types.int32, types.int32)
    return kernel


@kernel_factory
def add(dtype: str) -> Any:
    """Make the kernel x += y, for y of a dtype in LOAD8."""
    eight_at = LOAD8[dtype]

    @cuda.jit
    def kernel(y, x, squares, size):
        """Grid as for `embed`."""
        shared = cuda.shared.array(WARPS, float32)
        column, row, v = first_column(), int32(cuda.blockIdx.y), zeros8()
        if column < size:
            at = int32(row * size + column)
            v = add8(single_load8(x, at), eight_at(y, at))
            store8(x, at, v, float32)
        store_squares(squares, v, shared)

    SIGNATURES[kernel] = types.void(ELEMENTS[dtype], SINGLES, SINGLES, types.int32)
    return kernel


@kernel_factory
def rms_norm(dtype: str) -> Any:
    """Make the kernel y_i = weight_i x_i / sqrt(sum(squares) / size + eps), for y of a dtype in LOAD8."""
    rounded = ROUND[dtype]

    @cuda.jit
    def kernel(x, weight, squares, y, size, count, eps):
        """Grid as for `embed`; each row has `count` partial sums of squares."""
        shared = cuda.shared.array(WARPS, float32)
        column, row, mine, at = first_column(), int32(cuda.blockIdx.y), float32(0), int32(cuda.threadIdx.x)
        while at < count:
            mine += squares[uint32(row * count + at)]
            at = int32(at + THREADS)
        factor = reciprocal_root(block_sum(mine, shared, WARPS) / float32(size) + eps)
        if column < size:
            place = int32(row * size + column)
            v = mul8(scale8(single_load8(x, place), factor), single_load8(weight, column))
            store8(y, place, v, rounded)

    arrays = (SINGLES, SINGLES, SINGLES, ELEMENTS[dtype])
    SIGNATURES[kernel] = types.void(*arrays, types.int32, types.int32, types.float32)
    return kernel


@kernel_factory
def swiglu(dtype: str) -> Any:
    """Make the kernel y_i = silu(x_i) x_(size + i), for x and y of a dtype in LOAD8."""
    eight_at, rounded = LOAD8[dtype], ROUND[dtype]

    @cuda.jit
    def kernel(x, y, size):
        """Grid as for `embed`."""
        column, row = first_column(), int32(cuda.blockIdx.y)
        if column < size:
            place = int32(2 * row * size + column)
            a = eight_at(x, place)
            a = silu(a[0]), silu(a[1]), silu(a[2]), silu(a[3]), silu(a[4]), silu(a[5]), silu(a[6]), silu(a[7])
            store8(y, row * size + column, mul8(a, eight_at(x, int32(place + size))), rounded)

    SIGNATURES[kernel] = types.void(ELEMENTS[dtype], ELEMENTS[dtype], types.int32)
    return kernel


@kernel_factory
def logits(dtype: str, table: str, vectors: int) -> Any:
    """Make the kernel y[b, r] = table[r] . x[b], for x of a dtype in LOAD8 and a table of "8" or "4" bits.

    A warp computes LOGIT_ROWS rows for 1, 2 or 4 `vectors` of x, and a lane loads eight neighbouring entries of each.
    So each entry of x that is read serves several rows, and each entry of the table several vectors.
    """
    eight_at = LOAD8[dtype]
    load8, entries = TABLES[table]

    @cuda.jit(device=True, forceinline=True)
    def multiply(item, rest):
        """Add eight more products to each of a row's sums."""
        number, sums = item
        codes, scale, offset, first, last, column, size, group, x = rest
        v = load8(codes, scale, offset, min(int32(first + number), last), column, size, group)
        a, b, c, d = sums
        a += dot(v, x[0])
        if vectors > 1:
            b += dot(v, x[1])
        if vectors > 2:
            c += dot(v, x[2])
            d += dot(v, x[3])
        return number, (a, b, c, d)

    @cuda.jit(device=True, forceinline=True)
    def store(item, rest):
        """Reduce a row's sums over the warp and store its logits."""
        number, sums = item
        y, first, last, vector, rows, count, lane = rest
        row = int32(first + number)
        a = warp_sum(sums[0])
        if lane == 0 and row <= last:
            y[uint32(vector * count + row)] = a
        if vectors > 1:
            b = warp_sum(sums[1])
            if lane == 0 and row <= last and int32(vector + 1) < rows:
                y[uint32(int32(vector + 1) * count + row)] = b
        if vectors > 2:
            c, d = warp_sum(sums[2]), warp_sum(sums[3])
            if lane == 0 and row <= last and int32(vector + 2) < rows:
                y[uint32(int32(vector + 2) * count + row)] = c
            if lane == 0 and row <= last and int32(vector + 3) < rows:
                y[uint32(int32(vector + 3) * count + row)] = d
        return number

    @cuda.jit(device=True, forceinline=True)
    def fresh(number, rest):
        """Start a row: its number and four sums of zero."""
        return int32(number), (float32(0), float32(0), float32(0), float32(0))

    numbers = tuple(range(LOGIT_ROWS))
    start_rows, multiply_rows, store_rows = (map_tuple(each, LOGIT_ROWS) for each in (fresh, multiply, store))

    @cuda.jit
    def kernel(x, codes, scale, offset, y, rows, count, size, group):
        """Grid (count / (WARPS * LOGIT_ROWS), rows / vectors): `count` rows of the table, `rows` vectors of x."""
        lane, warp = int32(cuda.threadIdx.x & 31), int32(cuda.threadIdx.x >> 5)
        first = int32(int32(int32(cuda.blockIdx.x * WARPS) + warp) * LOGIT_ROWS)
        vector, last, column = int32(vectors * cuda.blockIdx.y), int32(count - 1), int32(8 * lane)
        items = start_rows(numbers, 0)
        while column < size:
            a = eight_at(x, int32(vector * size + column))
            b = c = d = a
            if vectors > 1:
                b = eight_at(x, int32(min(int32(vector + 1), int32(rows - 1)) * size + column))
            if vectors > 2:
                c = eight_at(x, int32(min(int32(vector + 2), int32(rows - 1)) * size + column))
                d = eight_at(x, int32(min(int32(vector + 3), int32(rows - 1)) * size + column))
            items = multiply_rows(items, (codes, scale, offset, first, last, column, size, group, (a, b, c, d)))
            column = int32(column + 256)
        store_rows(items, (y, first, last, vector, rows, count, lane))

    arrays = (ELEMENTS[dtype], entries, HALVES, HALVES, SINGLES)
    SIGNATURES[kernel] = types.void(*arrays, *[types.int32] * 4)
    return kernel


@cuda.jit(device=True, forceinline=True)
def halves_to_floats(words):
    """Convert eight float16 in four words to float32."""
    (a, b), (c, d), (e, f), (g, h) = halves(words[0]), halves(words[1]), halves(words[2]), halves(words[3])
    return a, b, c, d, e, f, g, h


@cuda.jit(device=True, forceinline=True)
def half_to_float(bits):
    """Convert the bits of a float16 to float32."""
    return halves(uint32(bits))[0]


class AttentionConfig(NamedTuple):
    """Parameters that an `attend` kernel is compiled for; the cache is float16.

    Attributes
    ----------
    dtype : str
        Type of projections and output: a key of LOAD8.
    size : int
        Entries of a head: 64, 128 or 256.
    group : int
        Query heads of a block, 1 to 8, which share one key-value head.
    warps : int
        Warps of a block.
    qk_norm : bool
        Whether queries and keys pass an RMSNorm before RoPE (Qwen3).
    combine : bool
        Whether the last block to arrive combines the split-KV partials of a context. Otherwise the kernel leaves the
        partials, and the next kernel combines them (`cuda_gemv.SplitKvPartials`).
    """

    dtype: str
    size: int
    group: int
    warps: int
    qk_norm: bool
    combine: bool = True

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return 32 * self.warps

    @property
    def shared_bytes(self) -> int:
        """Shared memory of a block, bytes: (largest score, sum of weights, weighted values) per warp and head."""
        return 4 * self.warps * self.group * (self.size + 2)

    @property
    def partial(self) -> int:
        """Size of the partials that a block leaves, in float32."""
        return self.group * (self.size + SUMMARY)

    def unroll(self, early: bool) -> int:
        """Choose how many tokens a team of lanes holds in registers at once."""
        return 4 if early and self.group <= 4 else 2

    def tokens_in_flight(self, early: bool) -> int:
        """Count the tokens whose keys and values a block loads at once, before the previous kernel ends."""
        return self.unroll(early) * self.warps * 256 // self.size


@kernel_factory
def attend(config: AttentionConfig, early: bool) -> Any:
    """Make the kernel for attention of one new token of each sequence; the top of this file explains it."""
    dtype, size, group, warps, qk_norm, combine = config
    eight_at, rounded, round_to_half = LOAD8[dtype], ROUND[dtype], ROUND["half"]
    lanes = size // 8  # lanes of a team, which share one token: eight entries each
    unroll = config.unroll(early)
    teams, half = 32 // lanes, size // 2  # teams of a warp
    team_sum = warp_reduce_sum(lanes)
    warp_stride, stride = size + 2, size + SUMMARY  # float32 per head of a warp's triple, and of a block's partial
    threads = 32 * warps
    heads, tokens = tuple(range(group)), tuple(range(unroll))

    @cuda.jit(device=True, forceinline=True)
    def load_key_value(number, rest):
        """Load the words of a token's key and value, and whether the token exists.

        The address of a token that does not exist is clamped to one that does, so that no load depends on a branch.
        """
        keys, values, base, token, step, last = rest
        at = uint32(base + max(min(int32(token + int32(number * step)), last), int32(0)) * size)
        return load4(keys, at), load4(values, at), int32(token + int32(number * step)) <= last

    @cuda.jit(device=True, forceinline=True)
    def to_floats(item, rest):
        """Convert a loaded key and value to float32."""
        return halves_to_floats(item[0]), halves_to_floats(item[1]), item[2]

    @cuda.jit(device=True, forceinline=True)
    def score_token(item, query):
        """Compute q . k of a token over its team of lanes; return it with the value."""
        score = team_sum(dot(item[0], query))
        return (score if item[2] else float32(LOWEST)), item[1]

    @cuda.jit(device=True, forceinline=True)
    def running_max(item, score):
        """Return the larger of an item's score and the largest so far."""
        return larger(item[0], score)

    @cuda.jit(device=True, forceinline=True)
    def accumulate(item, sums):
        """Add a token to the triple (m, s, v).

        s += w and v += w * value, with w = exp(score - m).
        """
        weight = exponential(item[0] - sums[0]) if item[0] > float32(LOWEST) else float32(0)
        return sums[0], sums[1] + weight, add8(sums[2], scale8(item[1], weight))

    @cuda.jit(device=True, forceinline=True)
    def rescale(sums, top):
        """Make a triple relative to a larger score `top`."""
        factor = exponential(sums[0] - top)
        return top, sums[1] * factor, scale8(sums[2], factor)

    def attend_to(count: int) -> Any:
        """Make a device function that updates each head's triple by `count` tokens: online softmax."""
        score, largest = map_tuple(score_token, count), reduce_tuple(running_max, count)
        add_all = reduce_tuple(accumulate, count)

        @cuda.jit(device=True, forceinline=True)
        def update(item, ready):
            query, sums = item
            scores = score(ready, query)
            return query, add_all(scores, rescale(sums, largest(scores, sums[0])))

        return map_tuple(update, group)

    @cuda.jit(device=True, forceinline=True)
    def exchange(value, distance):
        """Return the value of the lane whose number differs in one bit."""
        return cuda.shfl_xor_sync(0xFFFFFFFF, value, distance)

    @cuda.jit(device=True, forceinline=True)
    def combine_teams(item, distance):
        """Combine a head's triple with the one of the team `distance` lanes away."""
        query, sums = item
        v = sums[2]
        other = exchange(sums[0], distance), exchange(sums[1], distance), (
            exchange(v[0], distance), exchange(v[1], distance), exchange(v[2], distance), exchange(v[3], distance),
            exchange(v[4], distance), exchange(v[5], distance), exchange(v[6], distance), exchange(v[7], distance),
        )  # fmt: skip
        top = larger(sums[0], other[0])
        sums, other = rescale(sums, top), rescale(other, top)
        return query, (top, sums[1] + other[1], add8(sums[2], other[2]))

    def combine_warp(distance: int) -> Any:
        """Make a device function that combines the triples of all teams of a warp, from `distance` lanes on."""
        if distance == 32:

            @cuda.jit(device=True, forceinline=True)
            def alone(items):
                return items

            return alone
        rest, once = combine_warp(2 * distance), map_tuple(combine_teams, group)

        @cuda.jit(device=True, forceinline=True)
        def further(items):
            return rest(once(items, distance))

        return further

    @cuda.jit(device=True, forceinline=True)
    def apply_rope(array, place, column, cosine, sine, weight):
        """Load eight entries of a query or key, and apply QK-norm, if any, and RoPE.

        RoPE rotates entry i with entry i + half.
        """
        partner = int32(column + half) if column < half else int32(column - half)
        own, other = eight_at(array, int32(place + column)), eight_at(array, int32(place + partner))
        if qk_norm:
            factor = reciprocal_root(team_sum(dot(own, own)) / float32(size) + weight[1])
            own = mul8(scale8(own, factor), single_load8(weight[0], column))
            other = mul8(scale8(other, factor), single_load8(weight[0], partner))
        sign = float32(-1) if column < half else float32(1)
        return add8(mul8(own, cosine), scale8(mul8(other, sine), sign))

    @cuda.jit(device=True, forceinline=True)
    def load_query(head, rest):
        """Load a head's query, scaled, with an empty triple."""
        array, place, column, cosine, sine, weight, scale = rest
        query = apply_rope(array, int32(place + int32(head * size)), column, cosine, sine, weight)
        return scale8(query, scale), (float32(LOWEST), float32(0), zeros8())

    @cuda.jit(device=True, forceinline=True)
    def round_to_cache(v):
        """Round eight numbers to float16 and back, as a later step reads them from the cache."""
        return (
            half_to_float(round_to_half(v[0])), half_to_float(round_to_half(v[1])),
            half_to_float(round_to_half(v[2])), half_to_float(round_to_half(v[3])),
            half_to_float(round_to_half(v[4])), half_to_float(round_to_half(v[5])),
            half_to_float(round_to_half(v[6])), half_to_float(round_to_half(v[7])),
        )  # fmt: skip

    @cuda.jit(device=True, forceinline=True)
    def store_partial(head, rest):
        """Store a warp's triple of a head in shared memory.

        A lane's eight values lie `lanes` apart, so that a store has no bank conflicts.
        """
        shared, items, warp, part = rest
        place = int32(int32(head * warps + warp) * warp_stride)
        sums = items[head][1]
        v = sums[2]
        for i in range(8):
            shared[uint32(place + i * lanes + part)] = v[i]
        if part == 0:
            shared[uint32(place + size)], shared[uint32(place + size + 1)] = sums[0], sums[1]
        return head

    @cuda.jit(device=True, forceinline=True)
    def combine_partials(array, place, stride, count, column):
        """Combine the partials of `count` warps or blocks: largest score, sum of weights, one entry of the values."""
        top, number, at = float32(LOWEST), int32(0), place
        while number < count:
            top = larger(top, array[uint32(at + size)])
            number, at = int32(number + 1), int32(at + stride)
        total, value, number, at = float32(0), float32(0), int32(0), place
        while number < count:
            factor = exponential(array[uint32(at + size)] - top)
            total += factor * array[uint32(at + size + 1)]
            value += factor * array[uint32(at + column)]
            number, at = int32(number + 1), int32(at + stride)
        return top, total, value

    @cuda.jit(device=True, forceinline=True)
    def store_empty_partial(partial, first, splits, thread):
        """Store the partials of a block without tokens; `first` is the index of its first head's partial."""
        item = thread
        while item < group * size:
            head, entry = int32(item // size), int32(item % size)
            at = int32(int32(first + int32(head * splits)) * stride)
            partial[uint32(at + entry)] = float32(0)
            if entry == 0:
                partial[uint32(at + size)], partial[uint32(at + size + 1)] = float32(LOWEST), float32(0)
            item = int32(item + threads)

    load_tokens, all_to_floats = map_tuple(load_key_value, unroll), map_tuple(to_floats, unroll)
    load_queries, store_partials = map_tuple(load_query, group), map_tuple(store_partial, group)
    attend_many, attend_one, combine_all_teams = attend_to(unroll), attend_to(1), combine_warp(lanes)

    @cuda.jit
    def kernel(
        projected, keys, values, cosine, sine, query_weight, key_weight, positions, y, partial, arrivals,
        kv_heads, chunks, capacity, shortest, scale, eps,
    ):  # fmt: skip
        """Grid (splits of a context, chunks of query heads, sequences); kv_heads * chunks chunks of `group` heads.

        projected : (sequences, heads + 2 kv_heads, size)
            Query, key and value of the new tokens, before RoPE.
        keys, values : (sequences, kv_heads, capacity, size) float16
            The first positions[sequence] tokens are filled. The kernel writes the next one.
        cosine, sine : (capacity, size / 2) float32
        y : (sequences, heads, size), written if `combine`
        partial : (sequences, heads, splits, size + SUMMARY) float32
        arrivals : (sequences * kv_heads * chunks,) int32
            Arrival counters, 0 before and after.
        shortest : int
            Fewest tokens of a split, unless the context is shorter.
        """
        shared = cuda.shared.array(0, float32)
        thread = int32(cuda.threadIdx.x)
        lane, warp = int32(thread & 31), int32(thread >> 5)
        part, team = int32(lane & int32(lanes - 1)), int32(int32(warp * teams) + lane // lanes)
        split, chunk, row = int32(cuda.blockIdx.x), int32(cuda.blockIdx.y), int32(cuda.blockIdx.z)
        key_head, splits = int32(chunk // chunks), int32(cuda.gridDim.x)
        block = int32(int32(row * int32(cuda.gridDim.y)) + chunk)
        position, column = int32(positions[row]), int32(8 * part)
        # splits in use: as many as leave each `shortest` tokens
        count = max(min(int32((position + shortest - 1) // shortest), splits), int32(1))
        if split >= count:
            if not combine:
                if early:
                    griddep_wait()
                store_empty_partial(partial, int32(int32(int32(block * group) * splits) + split), splits, thread)
            return
        width = int32((position + count - 1) // count)
        begin = int32(split * width)
        end = min(int32(begin + width), position)
        base = int32(int32(int32(row * kv_heads + key_head) * capacity) * size + column)
        # load the first tokens and the angles before the kernel that writes `projected` ends
        step, at = int32(teams * warps), int32(begin + team)
        ready = load_tokens(tokens, (keys, values, base, at, step, int32(end - 1)))
        angle = int32(position * half + column % half)
        cosines, sines = single_load8(cosine, angle), single_load8(sine, angle)
        if early:
            griddep_wait()
            griddep_launch_dependents()

        # the queries, and the new token: its team of split 0 attends to it, and one block stores it in the cache
        heads_total = int32(int32(cuda.gridDim.y) * group)
        row_size = int32(int32(heads_total + int32(2 * kv_heads)) * size)
        place = int32(int32(row * row_size) + int32(chunk * int32(group * size)))
        items = load_queries(heads, (projected, place, column, cosines, sines, (query_weight, eps), scale))
        place = int32(int32(row * row_size) + int32(int32(heads_total + key_head) * size))
        key = round_to_cache(apply_rope(projected, place, column, cosines, sines, (key_weight, eps)))
        value = round_to_cache(eight_at(projected, int32(place + int32(kv_heads * size) + column)))
        mine = split == 0 and team == 0
        items = attend_one(items, ((key, value, mine),))
        if mine and chunk % chunks == 0:
            store8(keys, int32(base + position * size), key, round_to_half)
            store8(values, int32(base + position * size), value, round_to_half)

        # online softmax over the cached tokens, double buffered in registers
        now = begin
        while now < end:
            words = ready
            now, at = int32(now + unroll * step), int32(at + unroll * step)
            if now < end:
                ready = load_tokens(tokens, (keys, values, base, at, step, int32(end - 1)))
            items = attend_many(items, all_to_floats(words, 0))
        items = combine_all_teams(items)
        if lane < lanes:
            store_partials(heads, (shared, items, warp, part))
        cuda.syncthreads()

        # combine the warps of the block
        item = thread
        while item < group * size:
            head, entry = int32(item // size), int32(item % size)
            stored = int32(int32(entry % 8) * lanes + entry // 8)
            top, total, sum_ = combine_partials(
                shared, int32(head * int32(warps * warp_stride)), warp_stride, int32(warps), stored
            )
            if combine and count == 1:
                y[uint32(int32(block * int32(group * size)) + item)] = rounded(sum_ / total)
            else:
                at = int32(int32(int32(int32(int32(block * group) + head) * splits) + split) * stride)
                partial[uint32(at + entry)] = sum_
                if entry == 0:
                    partial[uint32(at + size)], partial[uint32(at + size + 1)] = top, total
            item = int32(item + threads)
        if combine and count > 1:  # the last block to arrive combines the splits
            cuda.threadfence()
            cuda.syncthreads()
            if thread == 0:
                shared[uint32(0)] = float32(count_arrival(arrivals, uint32(block)))
            cuda.syncthreads()
            if shared[uint32(0)] == float32(count - 1):
                cuda.threadfence()
                item = thread
                while item < group * size:
                    head, entry = int32(item // size), int32(item % size)
                    at = int32(int32(int32(int32(block * group) + head) * splits) * stride)
                    top, total, sum_ = combine_partials(partial, at, int32(stride), count, entry)
                    y[uint32(int32(block * int32(group * size)) + item)] = rounded(sum_ / total)
                    item = int32(item + threads)
                if thread == 0:
                    arrivals[uint32(block)] = 0

    arrays = (ELEMENTS[dtype], HALVES, HALVES, *[SINGLES] * 4, INTEGERS, ELEMENTS[dtype], SINGLES, POINTER(types.int32))
    SIGNATURES[kernel] = types.void(*arrays, *[types.int32] * 4, types.float32, types.float32)
    return kernel
