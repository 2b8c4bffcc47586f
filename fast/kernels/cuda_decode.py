"""What else a decoded token needs on NVIDIA GPUs, in Numba CUDA: embedding, norms, attention with its cache, the head.

    embed    x = table[token]
    added    x += y
    normed   y_i = weight_i x_i / sqrt(mean(x^2) + eps)
    gated    y_i = activation(x_i) x_(n + i)
    attend   rotates query and key, keeps key and value, and attends to all that is kept
    logits   head of a table of 8 or 4 bits

x is the residual stream, float32. Whatever writes it also writes sums of squares, one for each block, from which the
next kernel has the norm without a pass of its own.

`attend` is flash decoding (Dao and others, 2023): each team of lanes has a token at a time, keeps the sum of values
that it has seen so far relative to its largest score (Milakov and Gimelshein, arXiv 1805.02867), and teams and warps
put their sums together. Blocks that share a context do too, or leave theirs for the kernel that reads them next
(`cuda.Shares`). How many share it is found from the position, which lies in device memory, so that a captured graph
serves all positions that the cache has room for. Keys and values that earlier steps kept are fetched before the kernel
waits for the one before it.
"""

# What Numba makes of cuda.threadIdx and its like is not what their Python stand-ins say.
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

WARPS = 4  # of a block of the element-wise kernels, whose threads have eight entries each
EIGHTS = 32 * WARPS
LOGIT_ROWS = 4  # of a table, that a warp multiplies at once
LOWEST = -1e30  # score of what is not there
INTEGERS = POINTER(types.int64)

if config.ENABLE_CUDASIM:

    @cuda.jit(device=True)
    def ticket(array, index):
        """How many were there before, of those that count one up at an element of an array of int32."""
        return cuda.atomic.add(array, int(index), 1)

else:
    from llvmlite import ir
    from numba.cuda.extending import intrinsic

    from .cuda_intrinsics import WORD, element_pointer

    @intrinsic
    def ticket(typingctx, array, index):
        """How many were there before, of those that count one up at an element of an array of int32."""

        def codegen(context, builder, signature, args):
            place = builder.ptrtoint(element_pointer(context, builder, signature.args[0], args), ir.IntType(64))
            text = "atom.acq_rel.gpu.global.add.u32 $0, [$1], 1;"
            kind = ir.FunctionType(WORD, [ir.IntType(64)])
            return builder.call(ir.InlineAsm(kind, text, "=r,l,~{memory}", side_effect=True), [place])

        return types.int32(array, types.uint32), codegen


def over(function: Any, count: int) -> Any:
    """A device function: what `function` makes of each of `count` items of a tuple, and of `rest`, as a tuple."""
    if count == 1:

        @cuda.jit(device=True, forceinline=True)
        def only(items, rest):
            return (function(items[0], rest),)

        return only
    others = over(function, count - 1)

    @cuda.jit(device=True, forceinline=True)
    def every(items, rest):
        return (function(items[0], rest), *others(items[1:], rest))

    return every


def folded(function: Any, count: int) -> Any:
    """A device function: `function` of an item of a tuple and what it made of those before, at first `start`."""
    if count == 1:

        @cuda.jit(device=True, forceinline=True)
        def only(items, start):
            return function(items[0], start)

        return only
    others = folded(function, count - 1)

    @cuda.jit(device=True, forceinline=True)
    def every(items, start):
        return others(items[1:], function(items[0], start))

    return every


def summed(lanes: int) -> Any:
    """A device function: the sum over so many neighbouring lanes, a power of two, the same in each of them."""
    if lanes == 1:

        @cuda.jit(device=True, forceinline=True)
        def alone(value):
            return value

        return alone
    half, distance = summed(lanes // 2), lanes // 2

    @cuda.jit(device=True, forceinline=True)
    def both(value):
        return half(value + cuda.shfl_xor_sync(0xFFFFFFFF, value, distance))

    return both


@cuda.jit(device=True, forceinline=True)
def dot(a, b):
    """Product of eight numbers and eight."""
    one = a[0] * b[0] + a[1] * b[1] + (a[2] * b[2] + a[3] * b[3])
    return one + (a[4] * b[4] + a[5] * b[5] + (a[6] * b[6] + a[7] * b[7]))


@cuda.jit(device=True, forceinline=True)
def put_eight(array, at, v, rounded):
    """Eight numbers into neighbouring elements of an array."""
    array[uint32(at)], array[uint32(at + 1)] = rounded(v[0]), rounded(v[1])
    array[uint32(at + 2)], array[uint32(at + 3)] = rounded(v[2]), rounded(v[3])
    array[uint32(at + 4)], array[uint32(at + 5)] = rounded(v[4]), rounded(v[5])
    array[uint32(at + 6)], array[uint32(at + 7)] = rounded(v[6]), rounded(v[7])


@cuda.jit(device=True, forceinline=True)
def block_sum(value, shared, warps):
    """Sum over a block, the same in every thread."""
    value, thread = warp_sum(value), int32(cuda.threadIdx.x)
    if thread & 31 == 0:
        shared[uint32(thread >> 5)] = value
    cuda.syncthreads()
    total = float32(0)
    for warp in range(warps):
        total += shared[uint32(warp)]
    return total


@cuda.jit(device=True, forceinline=True)
def put_squares(squares, v, shared):
    """The sum of squares of a block's entries, as one of those of its row."""
    total = block_sum(dot(v, v), shared, WARPS)
    if cuda.threadIdx.x == 0:
        squares[uint32(cuda.blockIdx.y * cuda.gridDim.x + cuda.blockIdx.x)] = total


@cuda.jit(device=True, forceinline=True)
def my_column():
    """The first of a thread's eight columns."""
    return int32(8 * int32(int32(cuda.blockIdx.x * EIGHTS) + int32(cuda.threadIdx.x)))


@cuda.jit(device=True, forceinline=True)
def nothing():
    """Eight zeros."""
    return float32(0), float32(0), float32(0), float32(0), float32(0), float32(0), float32(0), float32(0)


@cuda.jit(device=True, forceinline=True)
def four_bytes(word):
    """Four signed bytes as float32: a byte put below the bits of 2^23 is added to it."""
    flipped, ones = uint32(word ^ uint32(0x80808080)), uint32(0x4B000000)
    middle = float32(8388736.0)  # 2^23 + 128
    return (
        as_float(byte_permute(flipped, ones, uint32(0x7440))) - middle,
        as_float(byte_permute(flipped, ones, uint32(0x7441))) - middle,
        as_float(byte_permute(flipped, ones, uint32(0x7442))) - middle,
        as_float(byte_permute(flipped, ones, uint32(0x7443))) - middle,
    )


@cuda.jit(device=True, forceinline=True)
def bytes_eight(codes, scale, offset, row, column, size, group):
    """Eight entries of a row of a table of 8 bits."""
    low, high = load2(codes, uint32(row * size + column))
    both = (*four_bytes(low), *four_bytes(high))
    return scale8(both, half_at(scale, row * (size // group) + column // group))


@cuda.jit(device=True, forceinline=True)
def nibbles_eight(codes, scale, offset, row, column, size, group):
    """Eight entries of a row of a table of 4 bits: the low or the high halves of eight of the 16 bytes of a group."""
    place, within = row * (size // 2) + (column // 32) * 16, column % 32
    low, high = load2(codes, uint32(place + within % 16))
    shift, mask = uint32(4 if within >= 16 else 0), uint32(0x0F0F0F0F)
    low, high = uint32((low >> shift) & mask), uint32((high >> shift) & mask)
    both = (*four_bytes(low), *four_bytes(high))
    at = row * (size // group) + column // group
    factor, first = half_at(scale, at), half_at(offset, at)
    both = scale8(both, factor)
    return add8(both, (first, first, first, first, first, first, first, first))


def dense_eight(kind: str) -> Any:
    """Likewise of a table of float16, bfloat16 or float32."""
    eight_at = LOAD8[kind]

    @cuda.jit(device=True, forceinline=True)
    def eight(entries, scale, offset, row, column, size, group):
        return eight_at(entries, row * size + column)

    return eight


BYTES = POINTER(types.uint8)
#: How eight entries of a row of a table are read, and of what type its array is, by the table's kind.
TABLES = {
    **{kind: (dense_eight(kind), ELEMENTS[kind]) for kind in LOAD8},
    "8": (bytes_eight, BYTES),
    "4": (nibbles_eight, BYTES),
}


@kernel_factory
def embed(kind: str) -> Any:
    """x[b] = table[tokens[b]], for a table of a kind in TABLES."""
    eight, entries = TABLES[kind]

    @cuda.jit
    def kernel(tokens, table, scale, offset, x, squares, size, group):
        """Grid (blocks of eight columns a thread, rows)."""
        shared = cuda.shared.array(WARPS, float32)
        column, row, v = my_column(), int32(cuda.blockIdx.y), nothing()
        if column < size:
            v = eight(table, scale, offset, tokens[row], column, size, group)
            put_eight(x, row * size + column, v, float32)
        put_squares(squares, v, shared)

    SIGNATURES[kernel] = types.void(INTEGERS, entries, HALVES, HALVES, SINGLES, SINGLES, types.int32, types.int32)
    return kernel


@kernel_factory
def added(kind: str) -> Any:
    """Add to x: x += y, for y of a kind in LOAD8."""
    eight_at = LOAD8[kind]

    @cuda.jit
    def kernel(y, x, squares, size):
        """Grid as of `embed`."""
        shared = cuda.shared.array(WARPS, float32)
        column, row, v = my_column(), int32(cuda.blockIdx.y), nothing()
        if column < size:
            at = int32(row * size + column)
            v = add8(single_load8(x, at), eight_at(y, at))
            put_eight(x, at, v, float32)
        put_squares(squares, v, shared)

    SIGNATURES[kernel] = types.void(ELEMENTS[kind], SINGLES, SINGLES, types.int32)
    return kernel


@kernel_factory
def normed(kind: str) -> Any:
    """y_i = weight_i x_i / sqrt(sum(squares) / size + eps), y of a kind in LOAD8."""
    rounded = ROUND[kind]

    @cuda.jit
    def kernel(x, weight, squares, y, size, count, eps):
        """Grid as of `embed`; `count` squares for each row."""
        shared = cuda.shared.array(WARPS, float32)
        column, row, mine, at = my_column(), int32(cuda.blockIdx.y), float32(0), int32(cuda.threadIdx.x)
        while at < count:
            mine += squares[uint32(row * count + at)]
            at = int32(at + EIGHTS)
        factor = reciprocal_root(block_sum(mine, shared, WARPS) / float32(size) + eps)
        if column < size:
            place = int32(row * size + column)
            v = mul8(scale8(single_load8(x, place), factor), single_load8(weight, column))
            put_eight(y, place, v, rounded)

    arrays = (SINGLES, SINGLES, SINGLES, ELEMENTS[kind])
    SIGNATURES[kernel] = types.void(*arrays, types.int32, types.int32, types.float32)
    return kernel


@kernel_factory
def gated(kind: str, activation: str) -> Any:
    """y_i = activation(x_i) x_(size + i), both of a kind in LOAD8."""
    eight_at, rounded, curve = LOAD8[kind], ROUND[kind], {"silu": silu}[activation]

    @cuda.jit
    def kernel(x, y, size):
        """Grid as of `embed`."""
        column, row = my_column(), int32(cuda.blockIdx.y)
        if column < size:
            place = int32(2 * row * size + column)
            a = eight_at(x, place)
            a = curve(a[0]), curve(a[1]), curve(a[2]), curve(a[3]), curve(a[4]), curve(a[5]), curve(a[6]), curve(a[7])
            put_eight(y, row * size + column, mul8(a, eight_at(x, int32(place + size))), rounded)

    SIGNATURES[kernel] = types.void(ELEMENTS[kind], ELEMENTS[kind], types.int32)
    return kernel


@kernel_factory
def logits(kind: str, table: str, vectors: int) -> Any:
    """y[b, r] = table[r] . x[b], for x of a kind in LOAD8, a table of 8 or 4 bits, and 1, 2 or 4 vectors at once.

    A warp has LOGIT_ROWS rows at once, and a lane eight neighbouring entries of each, so that what is read of x serves
    several rows and what is read of the table several vectors.
    """
    eight_at = LOAD8[kind]
    eight, entries = TABLES[table]

    @cuda.jit(device=True, forceinline=True)
    def further(item, rest):
        """A row's number and its sums, with eight more entries."""
        number, sums = item
        codes, scale, offset, first, last, column, size, group, x = rest
        v = eight(codes, scale, offset, min(int32(first + number), last), column, size, group)
        a, b, c, d = sums
        a += dot(v, x[0])
        if vectors > 1:
            b += dot(v, x[1])
        if vectors > 2:
            c += dot(v, x[2])
            d += dot(v, x[3])
        return number, (a, b, c, d)

    @cuda.jit(device=True, forceinline=True)
    def put(item, rest):
        """Put a row's logits."""
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
        """A row that has no sums yet."""
        return int32(number), (float32(0), float32(0), float32(0), float32(0))

    numbers = tuple(range(LOGIT_ROWS))
    begin, step, leave = over(fresh, LOGIT_ROWS), over(further, LOGIT_ROWS), over(put, LOGIT_ROWS)

    @cuda.jit
    def kernel(x, codes, scale, offset, y, rows, count, size, group):
        """Grid (blocks of WARPS * LOGIT_ROWS rows of the table, vectors / `vectors`)."""
        lane, warp = int32(cuda.threadIdx.x & 31), int32(cuda.threadIdx.x >> 5)
        first = int32(int32(int32(cuda.blockIdx.x * WARPS) + warp) * LOGIT_ROWS)
        vector, last, column = int32(vectors * cuda.blockIdx.y), int32(count - 1), int32(8 * lane)
        items = begin(numbers, 0)
        while column < size:
            a = eight_at(x, int32(vector * size + column))
            b = c = d = a
            if vectors > 1:
                b = eight_at(x, int32(min(int32(vector + 1), int32(rows - 1)) * size + column))
            if vectors > 2:
                c = eight_at(x, int32(min(int32(vector + 2), int32(rows - 1)) * size + column))
                d = eight_at(x, int32(min(int32(vector + 3), int32(rows - 1)) * size + column))
            items = step(items, (codes, scale, offset, first, last, column, size, group, (a, b, c, d)))
            column = int32(column + 256)
        leave(items, (y, first, last, vector, rows, count, lane))

    arrays = (ELEMENTS[kind], entries, HALVES, HALVES, SINGLES)
    SIGNATURES[kernel] = types.void(*arrays, *[types.int32] * 4)
    return kernel


@cuda.jit(device=True, forceinline=True)
def half_words(words):
    """Eight float16 in four words."""
    (a, b), (c, d), (e, f), (g, h) = halves(words[0]), halves(words[1]), halves(words[2]), halves(words[3])
    return a, b, c, d, e, f, g, h


@cuda.jit(device=True, forceinline=True)
def bfloat_words(words):
    """Eight bfloat16 in four words."""
    up, upper = uint32(16), uint32(0xFFFF0000)
    return (
        as_float(words[0] << up), as_float(words[0] & upper), as_float(words[1] << up), as_float(words[1] & upper),
        as_float(words[2] << up), as_float(words[2] & upper), as_float(words[3] << up), as_float(words[3] & upper),
    )  # fmt: skip


@cuda.jit(device=True, forceinline=True)
def half_again(bits):
    """A float16's bits as float32."""
    return halves(uint32(bits))[0]


@cuda.jit(device=True, forceinline=True)
def bfloat_again(bits):
    """A bfloat16's bits as float32."""
    return as_float(uint32(bits) << uint32(16))


EIGHT_WORDS = {"half": half_words, "bfloat": bfloat_words}
AGAIN = {"half": half_again, "bfloat": bfloat_again}


class Attention(NamedTuple):
    """What a kernel `attend` is made for.

    Attributes
    ----------
    kind : str
        Of the projections and of the output: a key of LOAD8.
    kept : str
        Of the cache: a key of EIGHT_WORDS.
    size : int
        Of a head: 64, 128 or 256.
    group : int
        Heads of a block, which have the same key and value: 1 to 8.
    warps : int
        Of a block.
    normed : bool
        Whether query and key get an RMSNorm each before they are rotated (Qwen3).
    whole : bool
        Whether blocks that share a context put together what they have seen, the last of them what all have left; else
        the kernel that comes next does, as `cuda.Shares`.
    """

    kind: str
    kept: str
    size: int
    group: int
    warps: int
    normed: bool
    whole: bool = True

    @property
    def threads(self) -> int:
        """Of a block."""
        return 32 * self.warps

    @property
    def shared_bytes(self) -> int:
        """Of a block: each warp's largest score, sum of weights and weighted values, for each head."""
        return 4 * self.warps * self.group * (self.size + 2)

    @property
    def partial(self) -> int:
        """Numbers that a block leaves of what it has seen."""
        return self.group * (self.size + SUMMARY)

    def unroll(self, early: bool) -> int:
        """Tokens that a team of lanes looks at at once, for which registers suffice."""
        return 4 if early and self.group <= 4 else 2

    def at_once(self, early: bool) -> int:
        """Tokens that a block looks at at once, and fetches before the kernel before it has ended."""
        return self.unroll(early) * self.warps * 256 // self.size


@kernel_factory
def attend(made: Attention, early: bool) -> Any:
    """Attention of one new token of each sequence; see the top of this file."""
    kind, kept, size, group, warps, is_normed, whole = made
    eight_at, rounded, round_kept = LOAD8[kind], ROUND[kind], ROUND[kept]
    decoded, again = EIGHT_WORDS[kept], AGAIN[kept]
    lanes = size // 8  # that share a token
    unroll = made.unroll(early)
    teams, half = 32 // lanes, size // 2
    team_sum = summed(lanes)
    stretch, stride = size + 2, size + SUMMARY  # numbers of a warp, and of a block, for a head
    merged_once = 32 * warps
    heads, tokens = tuple(range(group)), tuple(range(unroll))

    @cuda.jit(device=True, forceinline=True)
    def fetched(number, rest):
        """Key and value of one of the tokens that a team looks at, as they lie; of another where it has none."""
        keys, values, base, token, step, last = rest
        at = uint32(base + max(min(int32(token + int32(number * step)), last), int32(0)) * size)
        return load4(keys, at), load4(values, at), int32(token + int32(number * step)) <= last

    @cuda.jit(device=True, forceinline=True)
    def read(item, rest):
        """The same as numbers."""
        return decoded(item[0]), decoded(item[1]), item[2]

    @cuda.jit(device=True, forceinline=True)
    def scored(item, query):
        """A token's score and value."""
        score = team_sum(dot(item[0], query))
        return (score if item[2] else float32(LOWEST)), item[1]

    @cuda.jit(device=True, forceinline=True)
    def higher(item, score):
        """The larger score."""
        return larger(item[0], score)

    @cuda.jit(device=True, forceinline=True)
    def weighed(item, sums):
        """A score, to which all is relative, a sum of weights and one of values, with one more token."""
        weight = exponential(item[0] - sums[0]) if item[0] > float32(LOWEST) else float32(0)
        return sums[0], sums[1] + weight, add8(sums[2], scale8(item[1], weight))

    @cuda.jit(device=True, forceinline=True)
    def lowered(sums, top):
        """Sums relative to a larger score."""
        factor = exponential(sums[0] - top)
        return top, sums[1] * factor, scale8(sums[2], factor)

    def seen(count: int) -> Any:
        """A device function: a head that has seen so many more tokens."""
        score, highest, weigh = over(scored, count), folded(higher, count), folded(weighed, count)

        @cuda.jit(device=True, forceinline=True)
        def see(item, ready):
            query, sums = item
            scores = score(ready, query)
            return query, weigh(scores, lowered(sums, highest(scores, sums[0])))

        return over(see, group)

    @cuda.jit(device=True, forceinline=True)
    def across(value, distance):
        """That of the lane whose number differs in one bit."""
        return cuda.shfl_xor_sync(0xFFFFFFFF, value, distance)

    @cuda.jit(device=True, forceinline=True)
    def united(item, distance):
        """A head with what another team of the warp has seen."""
        query, sums = item
        v = sums[2]
        other = across(sums[0], distance), across(sums[1], distance), (
            across(v[0], distance), across(v[1], distance), across(v[2], distance), across(v[3], distance),
            across(v[4], distance), across(v[5], distance), across(v[6], distance), across(v[7], distance),
        )  # fmt: skip
        top = larger(sums[0], other[0])
        sums, other = lowered(sums, top), lowered(other, top)
        return query, (top, sums[1] + other[1], add8(sums[2], other[2]))

    def all_united(distance: int) -> Any:
        """A device function: heads with what all teams of the warp have seen."""
        if distance == 32:

            @cuda.jit(device=True, forceinline=True)
            def alone(items):
                return items

            return alone
        rest, once = all_united(2 * distance), over(united, group)

        @cuda.jit(device=True, forceinline=True)
        def further(items):
            return rest(once(items, distance))

        return further

    @cuda.jit(device=True, forceinline=True)
    def turned(array, place, column, cosine, sine, weight):
        """Eight entries of a query or key, normed and rotated."""
        partner = int32(column + half) if column < half else int32(column - half)
        own, other = eight_at(array, int32(place + column)), eight_at(array, int32(place + partner))
        if is_normed:
            factor = reciprocal_root(team_sum(dot(own, own)) / float32(size) + weight[1])
            own = mul8(scale8(own, factor), single_load8(weight[0], column))
            other = mul8(scale8(other, factor), single_load8(weight[0], partner))
        sign = float32(-1) if column < half else float32(1)
        return add8(mul8(own, cosine), scale8(mul8(other, sine), sign))

    @cuda.jit(device=True, forceinline=True)
    def asked(head, rest):
        """A head's query, scaled, which has seen nothing yet."""
        array, place, column, cosine, sine, weight, scale = rest
        query = turned(array, int32(place + int32(head * size)), column, cosine, sine, weight)
        return scale8(query, scale), (float32(LOWEST), float32(0), nothing())

    @cuda.jit(device=True, forceinline=True)
    def as_kept(v):
        """Eight numbers as the cache has them."""
        return (
            again(round_kept(v[0])), again(round_kept(v[1])), again(round_kept(v[2])), again(round_kept(v[3])),
            again(round_kept(v[4])), again(round_kept(v[5])), again(round_kept(v[6])), again(round_kept(v[7])),
        )  # fmt: skip

    @cuda.jit(device=True, forceinline=True)
    def left(head, rest):
        """Put what a warp has seen for a head into shared memory; a lane's eight values `lanes` apart."""
        shared, items, warp, part = rest
        place = int32(int32(head * warps + warp) * stretch)
        sums = items[head][1]
        v = sums[2]
        for i in range(8):
            shared[uint32(place + i * lanes + part)] = v[i]
        if part == 0:
            shared[uint32(place + size)], shared[uint32(place + size + 1)] = sums[0], sums[1]
        return head

    @cuda.jit(device=True, forceinline=True)
    def gathered(array, place, stride, count, column):
        """Largest score, sum of weights and a weighted value, over what `count` warps or blocks have seen."""
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
    def leave_nothing(partial, share, splits, thread):
        """What a block without tokens has seen; `share` is that of its first head."""
        item = thread
        while item < group * size:
            head, entry = int32(item // size), int32(item % size)
            at = int32(int32(share + int32(head * splits)) * stride)
            partial[uint32(at + entry)] = float32(0)
            if entry == 0:
                partial[uint32(at + size)], partial[uint32(at + size + 1)] = float32(LOWEST), float32(0)
            item = int32(item + merged_once)

    fetch, read_all, ask, leave = over(fetched, unroll), over(read, unroll), over(asked, group), over(left, group)
    see_many, see_one, unite = seen(unroll), seen(1), all_united(lanes)

    @cuda.jit
    def kernel(
        projected, keys, values, cosine, sine, query_weight, key_weight, positions, y, partial, tickets,
        kv_heads, chunks, capacity, shortest, scale, eps,
    ):  # fmt: skip
        """Grid (blocks that may share a context, chunks of the heads of each key, sequences).

        projected : (sequences, heads + 2 kv_heads, size), query, key and value; keys, values : (sequences, kv_heads,
        capacity, size), of which positions[sequence] are there; cosine, sine : (positions, size / 2); partial :
        (sequences, heads, blocks that may share a context, size + SUMMARY). A block takes `shortest` tokens or more, if
        they are there.
        """
        shared = cuda.shared.array(0, float32)
        thread = int32(cuda.threadIdx.x)
        lane, warp = int32(thread & 31), int32(thread >> 5)
        part, team = int32(lane & int32(lanes - 1)), int32(int32(warp * teams) + lane // lanes)
        split, chunk, row = int32(cuda.blockIdx.x), int32(cuda.blockIdx.y), int32(cuda.blockIdx.z)
        key_head, splits = int32(chunk // chunks), int32(cuda.gridDim.x)
        block = int32(int32(row * int32(cuda.gridDim.y)) + chunk)
        position, column = int32(positions[row]), int32(8 * part)
        count = max(min(int32((position + shortest - 1) // shortest), splits), int32(1))
        if split >= count:
            if not whole:
                if early:
                    griddep_wait()
                leave_nothing(partial, int32(int32(int32(block * group) * splits) + split), splits, thread)
            return
        width = int32((position + count - 1) // count)
        begin = int32(split * width)
        end = min(int32(begin + width), position)
        base = int32(int32(int32(row * kv_heads + key_head) * capacity) * size + column)
        step, at = int32(teams * warps), int32(begin + team)
        ready = fetch(tokens, (keys, values, base, at, step, int32(end - 1)))
        angle = int32(position * half + column % half)
        cosines, sines = single_load8(cosine, angle), single_load8(sine, angle)
        if early:
            griddep_wait()
            griddep_launch_dependents()

        count_heads = int32(int32(cuda.gridDim.y) * group)
        across_row = int32(int32(count_heads + int32(2 * kv_heads)) * size)
        place = int32(int32(row * across_row) + int32(chunk * int32(group * size)))
        items = ask(heads, (projected, place, column, cosines, sines, (query_weight, eps), scale))
        place = int32(int32(row * across_row) + int32(int32(count_heads + key_head) * size))
        key = as_kept(turned(projected, place, column, cosines, sines, (key_weight, eps)))
        value = as_kept(eight_at(projected, int32(place + int32(kv_heads * size) + column)))
        mine = split == 0 and team == 0
        items = see_one(items, ((key, value, mine),))
        if mine and chunk % chunks == 0:
            put_eight(keys, int32(base + position * size), key, round_kept)
            put_eight(values, int32(base + position * size), value, round_kept)

        now = begin
        while now < end:
            words = ready
            now, at = int32(now + unroll * step), int32(at + unroll * step)
            if now < end:
                ready = fetch(tokens, (keys, values, base, at, step, int32(end - 1)))
            items = see_many(items, read_all(words, 0))
        items = unite(items)
        if lane < lanes:
            leave(heads, (shared, items, warp, part))
        cuda.syncthreads()

        item = thread
        while item < group * size:
            head, entry = int32(item // size), int32(item % size)
            stored = int32(int32(entry % 8) * lanes + entry // 8)
            top, total, sum_ = gathered(shared, int32(head * int32(warps * stretch)), stretch, int32(warps), stored)
            if whole and count == 1:
                y[uint32(int32(block * int32(group * size)) + item)] = rounded(sum_ / total)
            else:
                at = int32(int32(int32(int32(int32(block * group) + head) * splits) + split) * stride)
                partial[uint32(at + entry)] = sum_
                if entry == 0:
                    partial[uint32(at + size)], partial[uint32(at + size + 1)] = top, total
            item = int32(item + merged_once)
        if whole and count > 1:
            cuda.threadfence()
            cuda.syncthreads()
            if thread == 0:
                shared[uint32(0)] = float32(ticket(tickets, uint32(block)))
            cuda.syncthreads()
            if shared[uint32(0)] == float32(count - 1):
                cuda.threadfence()
                item = thread
                while item < group * size:
                    head, entry = int32(item // size), int32(item % size)
                    at = int32(int32(int32(int32(block * group) + head) * splits) * stride)
                    top, total, sum_ = gathered(partial, at, int32(stride), count, entry)
                    y[uint32(int32(block * int32(group * size)) + item)] = rounded(sum_ / total)
                    item = int32(item + merged_once)
                if thread == 0:
                    tickets[uint32(block)] = 0

    arrays = (ELEMENTS[kind], HALVES, HALVES, *[SINGLES] * 4, INTEGERS, ELEMENTS[kind], SINGLES, POINTER(types.int32))
    SIGNATURES[kernel] = types.void(*arrays, *[types.int32] * 4, types.float32, types.float32)
    return kernel
