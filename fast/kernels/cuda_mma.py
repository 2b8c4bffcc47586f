"""Multiply on tensor cores: the instructions mma and wgmma, and their fragments in the registers of a warp.

- `and_popc_mma` multiplies bits: it counts the ones that 16 rows of 256 bits have in common with 8 columns. The GEMV
  (cuda_gemv.py) is made of it.
- `warp_mma` multiplies signs, which it turns into float16 in registers, with float16 vectors (mma.m16n8k16). The GEMM
  (cuda_gemm.py) and attention to a latent cache are made of it.
- `warpgroup_mma` does the same for four warps at once (wgmma.m64nNk16, compute capability 9.0). Vectors are read from
  shared memory by the instruction itself, in rows of 128 bytes with the 128-byte swizzle, which avoids bank conflicts.

A warp has `down` times 16 rows of signs and `across` times 8 vectors, so a lane holds 4 * down * across sums, the
accumulators. The layout of a fragment over lanes is that of the PTX manual: lane 4 g + t has rows g and g + 8 and
columns 2 t and 2 t + 1. Functions that take or return this many registers are made for their number.

Each operation is a plain Python function, which the simulator runs, with LLVM code that a GPU runs in its place; see
`cuda_intrinsics.llvm`.
"""

# pyright: reportAttributeAccessIssue=false, reportCallIssue=false, reportOperatorIssue=false

from functools import cache, reduce
from typing import Any

import numpy as np
from llvmlite import ir
from numba import cuda, float32, int32, types, uint32

from ...reference.arrays import Array
from .cuda_intrinsics import FLOAT, LONG, WORD, element_pointer, llvm, ptx, shared_address

SIGN_BITS = 0x80008000  # of two float16 in a word
#: Rows of 128 bytes with the 128-byte swizzle, groups of eight rows 1024 bytes apart: "matrix descriptor" in the PTX
#: manual.
SWIZZLE_128B = 1 << 62 | (1024 >> 4) << 32 | 1 << 16


def unpack_tuple(builder: Any, value: Any) -> list[Any]:
    """Return the LLVM values in a uniform tuple."""
    return [builder.extract_value(value, i) for i in range(value.type.count)]


# ---- Bits


def build_and_popc_mma(context: Any, builder: Any, signature: Any, args: Any) -> Any:
    """Build the binary matrix product, added to zeros."""
    function = ir.FunctionType(ir.LiteralStructType([WORD] * 4), [WORD] * 10)
    text = (
        "mma.sync.aligned.m16n8k256.row.col.s32.b1.b1.s32.and.popc "
        "{$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, {$10, $11, $12, $13};"
    )
    asm = ir.InlineAsm(function, text, "=r,=r,=r,=r,r,r,r,r,r,r,r,r,r,r")
    sums = builder.call(asm, [*args, *[WORD(0)] * 4])
    return context.make_tuple(builder, signature.return_type, [builder.extract_value(sums, i) for i in range(4)])


@llvm(lambda *words: types.UniTuple(int32, 4)(*[uint32] * 6), build_and_popc_mma)
def and_popc_mma(a0, a1, a2, a3, b0, b1):
    """Count the ones that 16 rows of 256 bits have in common with 8 columns: popcount(a AND b).

    A lane gives its words of the rows (a0 to a3) and of the columns (b0, b1), and gets four of the (16, 8) int32.
    """
    lane = cuda.laneid
    group, within = lane >> 2, lane & 3
    sums = [0, 0, 0, 0]
    mine = tuple(int(word) for word in (a0, a1, a2, a3, b0, b1))
    for of in range(4):
        rows = cuda.shfl_sync(0xFFFFFFFF, mine, 4 * group + of)
        columns = [cuda.shfl_sync(0xFFFFFFFF, mine, 4 * (2 * within + i) + of) for i in range(2)]
        for i in range(4):
            sums[i] += (rows[i >> 1] & columns[i & 1][4]).bit_count()
            sums[i] += (rows[2 + (i >> 1)] & columns[i & 1][5]).bit_count()
    return tuple(np.int32(value) for value in sums)


# ---- Fragments


@cache
def load_strided(count: int, width: int, stride: int) -> Any:
    """Make a device function that loads `count` times `width` words of shared memory, the groups `stride` apart."""
    result = types.UniTuple(uint32, count * width)

    def build(context, builder, signature, args):
        begin, found = element_pointer(context, builder, signature.args[0], args), []
        pointer = ir.VectorType(WORD, width).as_pointer(begin.type.addrspace)
        for i in range(count):
            place = builder.gep(begin, [LONG(stride * i)])
            words = builder.load(builder.bitcast(place, pointer))
            words.align = 4 * width
            found += [builder.extract_element(words, WORD(j)) for j in range(width)]
        return context.make_tuple(builder, result, found)

    @llvm(lambda array, index: result(array, uint32), build)
    def load(array, index):
        places = [int(index) + stride * i + j for i in range(count) for j in range(width)]
        return tuple(array[place] for place in places)

    return load


@cache
def zero_accumulators(count: int) -> Any:
    """Make a device function that returns `count` float32 zeros."""
    result = types.UniTuple(float32, count)

    def build(context, builder, signature, args):
        return context.make_tuple(builder, result, [FLOAT(0.0)] * count)

    @llvm(lambda: result(), build)
    def zeros():
        return (np.float32(0),) * count

    return zeros


@cache
def store_accumulators(down: int, across: int, stride: int) -> Any:
    """Make a device function that stores a warp's accumulators in shared memory, vectors `stride` elements apart.

    It takes the array, the element of the lane's first sum, and the sums.
    """
    offsets = [
        stride * (8 * n + (i & 1)) + 16 * m + 8 * (i >> 1) for m in range(down) for n in range(across) for i in range(4)
    ]

    def build(context, builder, signature, args):
        begin = element_pointer(context, builder, signature.args[0], args[:2])
        for i, offset in enumerate(offsets):
            builder.store(builder.extract_value(args[2], i), builder.gep(begin, [LONG(offset)]))

    @llvm(lambda array, index, sums: types.void(array, uint32, sums), build)
    def store(array, index, sums):
        for value, offset in zip(sums, offsets, strict=True):
            array[int(index) + offset] = value

    return store


# ---- Signs times float16


def build_signs(builder: Any, word: Any, lane: Any, paired: bool) -> list[Any]:
    """Build four words whose sign bits (15 and 31) are the signs that this lane multiplies; other bits are arbitrary.

    `word` holds a row's 32 signs. See `warp_mma` for the order of signs, which `paired` changes.
    """
    within = builder.and_(lane, WORD(3))
    if not paired:
        word = builder.shl(word, builder.sub(WORD(3), within))
        return [builder.shl(word, WORD(12 - 4 * i)) for i in range(4)]
    left = builder.sub(WORD(6), builder.shl(within, WORD(1)))  # the second sign of a byte becomes its highest bit
    second = builder.shl(word, left)
    permute = ir.InlineAsm(ir.FunctionType(WORD, [WORD] * 3), "prmt.b32 $0, $1, $2, $3;", "=r,r,r,r")
    first, found = builder.shl(second, WORD(1)), []
    for bytes_of_both in (0x5410, 0x7632):
        both = builder.call(permute, [first, second, WORD(bytes_of_both)])
        found += [builder.shl(both, WORD(8)), both]
    return found


def build_signed(builder: Any, bits: Any, scale: Any) -> Any:
    """Build two float16, +scale or -scale, from two sign bits: an AND and an XOR."""
    return builder.xor(builder.and_(bits, WORD(SIGN_BITS)), scale)


def signed_pair(word: int, scales: Any, row: int, at: int, paired: bool) -> Array:
    """Return the two signed scales that word `at` of a step's 32 words of float16 is multiplied with.

    `word` holds the signs. This is what `build_signs` and `build_signed` compute, for the simulator.
    """
    bits = (at % 16 * 2, at % 16 * 2 + 1) if paired else (at % 16, at % 16 + 16)
    scale = scales[at // 4] if paired else scales[row]
    pair = sum((word >> bit & 1) << place for bit, place in zip(bits, (15, 31), strict=True)) ^ int(scale)
    return np.array([pair], np.uint32).view(np.float16).astype(np.float32)


@cache
def warp_mma(down: int, across: int, half: int, stride: int, paired: bool = False) -> Any:
    """Make a device function that multiplies 32 signs of each row with 32 entries of each vector (mma).

    The products are added to the accumulators.

    The device function takes

    - the accumulators;
    - two words of signs for each of the lane's 2 * down rows, of which `half` (0 or 1) selects one;
    - the rows' scales, each as two equal float16 in a word;
    - shared memory, and the element where this lane's row for ldmatrix begins. A matrix is 8 vectors by 8 float16. Four
      matrices side by side are 8 vectors by 32 entries, and lanes 8 i to 8 i + 7 address the rows of matrix i. The next
      8 vectors are `stride` words further;
    - the lane.

    A word of a vector holds entries i and i + 16 of its 32, an order in which signs need no permutation. If `paired`,
    it holds entries 2 i and 2 i + 1 as usual, and scales belong to entries, not rows: words lane % 4, lane % 4 + 4 and
    so on of the 64 entries of both halves.
    """
    text = (
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{$0, $1, $2, $3}, {$8, $9, $10, $11}, {$12, $13}, {$4, $5, $6, $7};"
    )

    def load(builder, begin, n):
        function = ir.FunctionType(ir.LiteralStructType([WORD] * 4), [WORD])
        words = f"ldmatrix.sync.aligned.m8n8.x4.shared.b16 {{$0, $1, $2, $3}}, [$4 + {4 * stride * n}];"
        loaded = builder.call(ir.InlineAsm(function, words, "=r,=r,=r,=r,r,~{memory}", side_effect=True), [begin])
        return [builder.extract_value(loaded, i) for i in range(4)]

    def build(context, builder, signature, args):
        multiply = ir.FunctionType(ir.LiteralStructType([FLOAT] * 4), [FLOAT] * 4 + [WORD] * 6)
        multiply = ir.InlineAsm(multiply, text, "=f,=f,=f,=f,f,f,f,f,r,r,r,r,r,r")
        found, words, scales = (unpack_tuple(builder, each) for each in args[:3])
        begin = shared_address(context, builder, signature.args[3], args[3:5])
        pairs = []  # four words of each row
        for row in range(2 * down):
            signs = build_signs(builder, words[2 * row + half], args[5], paired)
            weights = scales[4 * half : 4 * half + 4] if paired else [scales[row]] * 4
            pairs.append([build_signed(builder, *each) for each in zip(signs, weights, strict=True)])
        following = load(builder, begin, 0)
        for n in range(across):
            b = following
            if n + 1 < across:
                following = load(builder, begin, n + 1)
            for step in range(2):
                for m in range(down):
                    at = 4 * (m * across + n)
                    a = [pairs[2 * m + i][2 * step + j] for j in range(2) for i in range(2)]
                    new = builder.call(multiply, [*found[at : at + 4], *a, *b[2 * step : 2 * step + 2]])
                    found[at : at + 4] = [builder.extract_value(new, i) for i in range(4)]
        return context.make_tuple(builder, signature.return_type, found)

    @llvm(mma_signature, build)
    def multiply(sums, words, scales, array, index, lane):
        entries = []
        for n in range(across):
            for matrix in range(4):
                row = int(cuda.shfl_sync(0xFFFFFFFF, int(index), 8 * matrix + (lane >> 2)))
                entries.append(array[row + stride * n + (lane & 3)])
        rows = [[] for _ in range(2 * down)]
        columns = [[[] for _ in range(2)] for _ in range(across)]
        for quad in range(4):
            theirs = cuda.shfl_sync(0xFFFFFFFF, (tuple(words), tuple(scales)), (lane & 28) + quad)
            for row in range(2 * down):
                word = int(theirs[0][2 * row + half])
                for chunk in range(4):
                    rows[row].append(signed_pair(word, theirs[1], row, 16 * half + 4 * chunk + quad, paired))
            for which in range(2):
                theirs = cuda.shfl_sync(0xFFFFFFFF, tuple(entries), 4 * (2 * (lane & 3) + which) + quad)
                for n in range(across):
                    for chunk in range(4):
                        pair = np.array([theirs[4 * n + chunk]], np.uint32).view(np.float16)
                        columns[n][which].append(pair.astype(np.float32))
        found = list(sums)
        for m in range(down):
            for n in range(across):
                for i in range(4):
                    a, b = np.concatenate(rows[2 * m + (i >> 1)]), np.concatenate(columns[n][i & 1])
                    found[4 * (m * across + n) + i] += np.float32(a @ b)
        return tuple(found)

    return multiply


def mma_signature(sums: Any, words: Any, scales: Any, array: Any, index: Any, lane: Any) -> Any:
    """Return the signature of `warp_mma` and `warpgroup_mma`."""
    return sums(sums, words, scales, array, uint32, int32)


@cache
def warpgroup_mma(across: int, paired: bool = False) -> Any:
    """Make a device function that multiplies 64 signs of 64 rows with vectors, by four warps together (wgmma).

    It takes the arguments of `warp_mma`, with two words of signs for each of the lane's two rows, and the element of
    shared memory where the first vector begins. A vector takes 32 words, in chunks of four that are swizzled: chunk c
    of vector v lies at c XOR v % 8. Needs compute capability 9.0 and an address divisible by 1024 bytes.
    """
    text, constraints = wgmma_text(across)
    count = 4 * across

    def build(context, builder, signature, args):
        function = ir.FunctionType(ir.LiteralStructType([FLOAT] * count), [FLOAT] * count + [WORD] * 16 + [LONG])
        multiply = ir.InlineAsm(function, text, constraints, side_effect=True)
        old, words, scales = (unpack_tuple(builder, each) for each in args[:3])
        begin = builder.lshr(shared_address(context, builder, signature.args[3], args[3:5]), WORD(4))
        descriptor = builder.or_(builder.zext(begin, LONG), LONG(SWIZZLE_128B))
        pairs = []
        for half in range(2):
            rows = [build_signs(builder, words[2 * row + half], args[5], paired) for row in range(2)]
            for chunk in range(4):
                for row in range(2):
                    scale = scales[4 * half + chunk if paired else row]
                    pairs.append(build_signed(builder, rows[row][chunk], scale))
        new = builder.call(multiply, [*old, *pairs, descriptor])
        return context.make_tuple(builder, signature.return_type, [builder.extract_value(new, i) for i in range(count)])

    @llvm(mma_signature, build)
    def multiply(sums, words, scales, array, index, lane):
        found = list(sums)
        for quad in range(4):
            theirs = cuda.shfl_sync(0xFFFFFFFF, (tuple(words), tuple(scales)), (lane & 28) + quad)
            for row in range(2):
                for chunk in range(8):
                    word = int(theirs[0][2 * row + (chunk >> 2)])
                    pair = signed_pair(word, theirs[1], row, 4 * chunk + quad, paired)
                    for n in range(across):
                        for which in range(2):
                            vector = 8 * n + 2 * (lane & 3) + which
                            entry = array[int(index) + 32 * vector + 4 * (chunk ^ (vector & 7)) + quad]
                            both = np.array([entry], np.uint32).view(np.float16).astype(np.float32)
                            found[4 * n + 2 * row + which] += both @ pair
        return tuple(found)

    return multiply


def wgmma_text(across: int) -> tuple[str, str]:
    """Return the PTX of four wgmma instructions for 8 * across vectors, 64 entries deep, and its constraints."""
    text = (
        "{ .reg .pred p; .reg .b64 d; setp.eq.u32 p, 1, 1; mov.b64 d, $DESCRIPTOR; wgmma.fence.sync.aligned; "
        + "add.s64 d, d, 2; ".join(
            f"wgmma.mma_async.sync.aligned.m64n{8 * across}k16.f32.f16.f16 {{$SUMS}}, {{$WORDS{i}}}, d, p, 1, 1, 0; "
            for i in range(4)
        )
        + "wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0; }"
    )
    count = 4 * across
    named = {"$DESCRIPTOR": f"${2 * count + 16}", "$SUMS": ", ".join(f"${i}" for i in range(count))}
    named |= {f"$WORDS{i}": ", ".join(f"${2 * count + 4 * i + j}" for j in range(4)) for i in range(4)}
    for name, operands in named.items():
        text = text.replace(name, operands)
    constraints = ["=f"] * count + [str(i) for i in range(count)] + ["r"] * 16 + ["l", "~{memory}"]
    return text, ",".join(constraints)


@ptx("fence.proxy.async.shared::cta;", types.void)
def fence_async_proxy():
    """Make this thread's copies to shared memory visible to `warpgroup_mma`, after a barrier of the block."""


# ---- Attention to a latent cache


@cache
def store_scores(across: int) -> Any:
    """Make a device function that stores the products of a query with rotated keys in shared memory, by token.

    Keys are the accumulators of two tiles of 16 rows, one in the lower and one in the upper half of a head. A lane's
    tokens are the vectors 2 * (lane % 4), the next one, and those 8, 16, ... further. The device function takes

    - shared memory, and the element of the first token's score;
    - the sums;
    - cosines and sines: of each of the lane's two rows, for each of its tokens;
    - the query's entries: of both rows of the lower half, then of the upper half;
    - the lane.

    Eight lanes have terms of the same tokens' scores. On a GPU a lane exchanges half of its scores in each round, so
    that each is summed by one lane (a butterfly reduce-scatter).
    """
    count = 2 * across

    def build(context, builder, signature, args):
        sums, cosines, sines, query = (unpack_tuple(builder, each) for each in args[2:6])
        exchange = ir.FunctionType(FLOAT, [FLOAT])
        lane, scores = args[6], []
        for i in range(count):
            terms = []
            for row in range(2):
                at = 4 * (i >> 1) + 2 * row + (i & 1)
                low, high, c, s = sums[at], sums[2 * count + at], cosines[2 * i + row], sines[2 * i + row]
                rotated_low = builder.fsub(builder.fmul(low, c), builder.fmul(high, s))
                rotated_high = builder.fadd(builder.fmul(high, c), builder.fmul(low, s))
                terms += [builder.fmul(rotated_low, query[row]), builder.fmul(rotated_high, query[2 + row])]
            scores.append(reduce(builder.fadd, terms))
        for distance in (16, 8, 4):
            text = f"shfl.sync.bfly.b32 $0, $1, {distance}, 0x1f, 0xffffffff;"
            other = ir.InlineAsm(exchange, text, "=f,f", side_effect=True)
            if len(scores) > 1:
                middle = len(scores) // 2
                upper = builder.icmp_signed("!=", builder.and_(lane, WORD(distance)), WORD(0))
                halves = list(zip(scores[:middle], scores[middle:], strict=True))
                given = [builder.select(upper, a, b) for a, b in halves]
                scores = [builder.select(upper, b, a) for a, b in halves]
            else:
                given = scores
            scores = [builder.fadd(a, builder.call(other, [b])) for a, b in zip(scores, given, strict=True)]
        number = builder.lshr(builder.mul(builder.lshr(lane, WORD(2)), WORD(count)), WORD(3))
        token = builder.add(builder.shl(builder.lshr(number, WORD(1)), WORD(3)), builder.and_(number, WORD(1)))
        token = builder.add(token, builder.shl(builder.and_(lane, WORD(3)), WORD(1)))
        place = element_pointer(context, builder, signature.args[0], [args[0], builder.add(args[1], token)])
        duplicates = WORD(4 * max(1, 8 // count) - 4)  # bits of the lane that do not change the score
        with builder.if_then(builder.icmp_signed("==", builder.and_(lane, duplicates), WORD(0))):
            for i, score in enumerate(scores):
                builder.store(score, builder.gep(place, [LONG(i)]))

    def signature(array, index, sums, cosines, sines, query, lane):
        return types.void(array, uint32, sums, cosines, sines, query, int32)

    @llvm(signature, build)
    def store(array, index, sums, cosines, sines, query, lane):
        scores = []
        for i in range(count):
            score = np.float32(0)
            for row in range(2):
                at = 4 * (i >> 1) + 2 * row + (i & 1)
                low, high, c, s = sums[at], sums[2 * count + at], cosines[2 * i + row], sines[2 * i + row]
                score += (low * c - high * s) * query[row] + (high * c + low * s) * query[2 + row]
            scores.append(score)
        for distance in (4, 8, 16):
            others = cuda.shfl_xor_sync(0xFFFFFFFF, tuple(scores), distance)
            scores = [one + other for one, other in zip(scores, others, strict=True)]
        if lane < 4:
            for i, score in enumerate(scores):
                array[int(index) + 8 * (i >> 1) + 2 * lane + (i & 1)] = score

    return store
