"""What the kernels for batches need beside cuda_lanes.py: tiles of a product in the registers of a warp.

A warp has `down` times 16 rows of signs and `across` times 8 vectors: 4 * down * across sums for each lane, as one
instruction of the tensor cores has them. Functions that take or give so many registers are made for their numbers.
Each has a plain twin, which the simulator (NUMBA_ENABLE_CUDASIM=1) runs in its place.
"""

# pyright: reportAttributeAccessIssue=false, reportCallIssue=false, reportRedeclaration=false

from functools import cache, reduce
from typing import Any

import numpy as np
from numba import config, cuda, types
from numba.cuda.extending import intrinsic

SIGNS = 0x80008000  # of two float16
#: Rows of 128 bytes with swapped chunks, eights of them 1024 bytes apart: see "matrix descriptor" in the PTX manual.
SWAPPED_CHUNKS = 1 << 62 | (1024 >> 4) << 32 | 1 << 16

if config.ENABLE_CUDASIM:

    def copy1(array, index, source, place):
        """Begin to copy a word to shared memory."""
        array[int(index)] = source[int(place)]

    def copy_chunk(array, index, source, place, size):
        """Begin to copy `size` bytes, 16 or none, to shared memory, and zeros to the rest of 16; both are aligned."""
        assert index % 4 == 0, "misaligned copy"
        assert size == 0 or place % (16 // source.dtype.itemsize) == 0, "misaligned copy"
        here = range(int(place), int(place) + int(size) // source.dtype.itemsize)
        words = np.array([source[i] for i in here], source.dtype).view(np.uint32)
        for i in range(4):
            array[int(index) + i] = words[i] if size else 0

    def commit():
        """What this thread began to copy since the last time is a group."""

    @cache
    def landed(pending: int) -> Any:
        """A device function that waits until all but the last `pending` groups of this thread's copies are there."""
        return lambda: None

    @cache
    def load_spaced(count: int, width: int, stride: int) -> Any:
        """A device function: `width` words at an element of shared memory, and at the next ones `stride` apart."""

        def load(array, index):
            places = [int(index) + stride * i + j for i in range(count) for j in range(width)]
            return tuple(array[place] for place in places)

        return load

    def store4(array, index, a, b, c, d):
        """Store four words at an element of an array that is divisible by four."""
        assert index % 4 == 0, "misaligned store"
        for i, word in enumerate((a, b, c, d)):
            array[int(index) + i] = word

    @cache
    def no_sums(count: int) -> Any:
        """A device function: so many sums of nothing."""
        return lambda: (np.float32(0),) * count

    def signed(word, scales, row, at, direct):
        """The two signs of a row that word `at` of 64 entries' is multiplied with, times scales; `word` has them."""
        bits = (at % 16 * 2, at % 16 * 2 + 1) if direct else (at % 16, at % 16 + 16)
        scale = scales[at // 4] if direct else scales[row]
        pair = sum((word >> bit & 1) << place for bit, place in zip(bits, (15, 31), strict=True)) ^ int(scale)
        return np.array([pair], np.uint32).view(np.float16).astype(np.float32)

    @cache
    def tile_product(down: int, across: int, half: int, stride: int, direct: bool = False) -> Any:
        """A device function: sums of a warp's tile plus products of 32 signs of each row with a vector's 32 entries.

        It takes the sums; two words of each of the lane's 2 * down rows, of which `half` says the one; the rows'
        scales, each as two equal float16; shared memory, and the element of it where the lane's four words of a matrix
        begin (8 rows of 8 float16, a vector's eight in each; four matrices side by side are 8 vectors' 32 entries, and
        lanes 8 i to 8 i + 7 have the rows of the i-th; the next 8 vectors are `stride` words further); and the lane.
        Entries i and i + 16 of a vector's 32 are a word.

        If `direct`, entries 2 i and 2 i + 1 are a word, and scales are of entries, 64 for both halves: words
        lane % 4, lane % 4 + 4 and so on.
        """

        @cuda.jit(device=True)
        def product(sums, words, scales, array, index, lane):
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
                        rows[row].append(signed(word, theirs[1], row, 16 * half + 4 * chunk + quad, direct))
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

        return product

    @cache
    def group_product(across: int, direct: bool = False) -> Any:
        """A device function: sums of four warps' tile of 64 rows plus products of 64 signs of each with vectors.

        It takes what `tile_product` takes, but two words for each of the lane's two rows, and the element of shared
        memory where the first vector begins; vectors are 32 words apart, and their chunks of four words are swapped:
        chunk c of vector v is at c ^ v % 8. Needs compute capability 9.0 and a multiple of 1024 bytes there.
        """

        @cuda.jit(device=True)
        def product(sums, words, scales, array, index, lane):
            found = list(sums)
            for quad in range(4):
                theirs = cuda.shfl_sync(0xFFFFFFFF, (tuple(words), tuple(scales)), (lane & 28) + quad)
                for row in range(2):
                    for chunk in range(8):
                        word = int(theirs[0][2 * row + (chunk >> 2)])
                        pair = signed(word, theirs[1], row, 4 * chunk + quad, direct)
                        for n in range(across):
                            for which in range(2):
                                vector = 8 * n + 2 * (lane & 3) + which
                                entry = array[int(index) + 32 * vector + 4 * (chunk ^ (vector & 7)) + quad]
                                both = np.array([entry], np.uint32).view(np.float16).astype(np.float32)
                                found[4 * n + 2 * row + which] += both @ pair
            return tuple(found)

        return product

    def let_group_read():
        """What this thread copied to shared memory can be read by `group_product`, once all have come to a barrier."""

    @cache
    def put_tile(down: int, across: int, stride: int) -> Any:
        """A device function: puts a warp's sums into shared memory, rows side by side and vectors `stride` apart.

        It takes the element where the lane's first sum goes.
        """

        def put(array, index, sums):
            for m in range(down):
                for n in range(across):
                    for i in range(4):
                        place = int(index) + stride * (8 * n + (i & 1)) + 16 * m + 8 * (i >> 1)
                        array[place] = sums[4 * (m * across + n) + i]

        return put

    @cache
    def put_scores(across: int) -> Any:
        """A device function: puts products of a query with rotated keys into shared memory, token after token.

        The keys are the sums of a warp's two tiles, of 16 rows of both halves of a key; a lane's tokens are the vectors
        2 * (lane % 4), the next one, and those 8, 16 and so on further. It takes the element where the first token's
        score goes; the sums; cosines and sines, each of a lane's two rows for each of its tokens; what the query has
        there: for both rows of the lower half, then of the upper; and the lane.
        """

        @cuda.jit(device=True)
        def put(array, index, sums, cosines, sines, query, lane):
            scores = []
            for i in range(2 * across):
                score = np.float32(0)
                for row in range(2):
                    at = 4 * (i >> 1) + 2 * row + (i & 1)
                    low, high, c, s = sums[at], sums[4 * across + at], cosines[2 * i + row], sines[2 * i + row]
                    score += (low * c - high * s) * query[row] + (high * c + low * s) * query[2 + row]
                scores.append(score)
            for distance in (4, 8, 16):
                others = cuda.shfl_xor_sync(0xFFFFFFFF, tuple(scores), distance)
                scores = [one + other for one, other in zip(scores, others, strict=True)]
            if lane < 4:
                for i, score in enumerate(scores):
                    array[int(index) + 8 * (i >> 1) + 2 * lane + (i & 1)] = score

        return put

else:
    from llvmlite import ir

    from .cuda_intrinsics import FLOAT, WORD, instruction, place_of

    LONG = ir.IntType(64)

    def shared_address(context: Any, builder: Any, kind: Any, args: Any) -> Any:
        """Address in shared memory, 32 bits, of element args[1] of array args[0]."""
        place = place_of(context, builder, kind, args)
        return builder.ptrtoint(builder.addrspacecast(place, place.type.pointee.as_pointer(3)), WORD)

    @intrinsic
    def copy1(typingctx, array, index, source, place):
        """Begin to copy a word to shared memory."""

        def codegen(context, builder, signature, args):
            target = shared_address(context, builder, signature.args[0], args[:2])
            begin = builder.ptrtoint(place_of(context, builder, signature.args[2], args[2:]), LONG)
            kind = ir.FunctionType(ir.VoidType(), [WORD, LONG])
            text = "cp.async.ca.shared.global [$0], [$1], 4;"
            builder.call(ir.InlineAsm(kind, text, "r,l,~{memory}", side_effect=True), [target, begin])

        return types.void(array, types.uint32, source, types.uint32), codegen

    @intrinsic
    def copy_chunk(typingctx, array, index, source, place, size):
        """Begin to copy `size` bytes, 16 or none, to shared memory, and zeros to the rest of 16; both are aligned."""

        def codegen(context, builder, signature, args):
            target = shared_address(context, builder, signature.args[0], args[:2])
            begin = builder.ptrtoint(place_of(context, builder, signature.args[2], args[2:4]), LONG)
            kind = ir.FunctionType(ir.VoidType(), [WORD, LONG, WORD])
            text = "cp.async.cg.shared.global [$0], [$1], 16, $2;"
            builder.call(ir.InlineAsm(kind, text, "r,l,r,~{memory}", side_effect=True), [target, begin, args[4]])

        return types.void(array, types.uint32, source, types.uint32, types.uint32), codegen

    @intrinsic
    def commit(typingctx):
        """What this thread began to copy since the last time is a group."""
        return types.void(), instruction(types.void, (), "cp.async.commit_group;", "~{memory}", True)

    @cache
    def landed(pending: int) -> Any:
        """A device function that waits until all but the last `pending` groups of this thread's copies are there."""

        @intrinsic
        def wait_for(typingctx):
            return types.void(), instruction(types.void, (), f"cp.async.wait_group {pending};", "~{memory}", True)

        return wait_for

    @cache
    def load_spaced(count: int, width: int, stride: int) -> Any:
        """A device function: `width` words at an element of shared memory, and at the next ones `stride` apart."""

        @intrinsic
        def load(typingctx, array, index):
            result = types.UniTuple(types.uint32, count * width)

            def codegen(context, builder, signature, args):
                begin, found = place_of(context, builder, signature.args[0], args), []
                pointer = ir.VectorType(WORD, width).as_pointer(begin.type.addrspace)
                for i in range(count):
                    place = builder.gep(begin, [LONG(stride * i)])
                    words = builder.load(builder.bitcast(place, pointer))
                    words.align = 4 * width
                    found += [builder.extract_element(words, WORD(j)) for j in range(width)]
                return context.make_tuple(builder, result, found)

            return result(array, types.uint32), codegen

        return load

    @intrinsic
    def store4(typingctx, array, index, a, b, c, d):
        """Store four words at an element of an array that is divisible by four."""

        def codegen(context, builder, signature, args):
            words = ir.Constant(ir.VectorType(WORD, 4), ir.Undefined)
            for i in range(4):
                words = builder.insert_element(words, args[2 + i], WORD(i))
            place = place_of(context, builder, signature.args[0], args[:2])
            builder.store(words, builder.bitcast(place, words.type.as_pointer(place.type.addrspace)), align=16)

        return types.void(array, *[types.uint32] * 5), codegen

    @cache
    def no_sums(count: int) -> Any:
        """A device function: so many sums of nothing."""
        result = types.UniTuple(types.float32, count)

        @intrinsic
        def nothing(typingctx):
            def codegen(context, builder, signature, args):
                return context.make_tuple(builder, result, [FLOAT(0.0)] * count)

            return result(), codegen

        return nothing

    def signs_of(builder: Any, word: Any, lane: Any, direct: bool) -> list[Any]:
        """Words 4 i + lane % 4 of 32 signs' words, those of two each: their highest bits; the others are anything."""
        within = builder.and_(lane, WORD(3))
        if not direct:
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

    @cache
    def tile_product(down: int, across: int, half: int, stride: int, direct: bool = False) -> Any:
        """A device function: sums of a warp's tile plus products of 32 signs of each row with a vector's 32 entries.

        It takes the sums; two words of each of the lane's 2 * down rows, of which `half` says the one; the rows'
        scales, each as two equal float16; shared memory, and the element of it where the lane's four words of a matrix
        begin (8 rows of 8 float16, a vector's eight in each; four matrices side by side are 8 vectors' 32 entries, and
        lanes 8 i to 8 i + 7 have the rows of the i-th; the next 8 vectors are `stride` words further); and the lane.
        Entries i and i + 16 of a vector's 32 are a word.

        If `direct`, entries 2 i and 2 i + 1 are a word, and scales are of entries, 64 for both halves: words
        lane % 4, lane % 4 + 4 and so on.
        """
        text = (
            "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
            "{$0, $1, $2, $3}, {$8, $9, $10, $11}, {$12, $13}, {$4, $5, $6, $7};"
        )

        @intrinsic
        def product(typingctx, sums, words, scales, array, index, lane):
            multiply = ir.FunctionType(ir.LiteralStructType([FLOAT] * 4), [FLOAT] * 4 + [WORD] * 6)
            multiply = ir.InlineAsm(multiply, text, "=f,=f,=f,=f,f,f,f,f,r,r,r,r,r,r")

            def load(builder, begin, n):
                kind = ir.FunctionType(ir.LiteralStructType([WORD] * 4), [WORD])
                words = f"ldmatrix.sync.aligned.m8n8.x4.shared.b16 {{$0, $1, $2, $3}}, [$4 + {4 * stride * n}];"
                loaded = builder.call(ir.InlineAsm(kind, words, "=r,=r,=r,=r,r,~{memory}", side_effect=True), [begin])
                return [builder.extract_value(loaded, i) for i in range(4)]

            def codegen(context, builder, signature, args):
                found, words, scales = (
                    [builder.extract_value(each, i) for i in range(each.type.count)] for each in args[:3]
                )
                begin = shared_address(context, builder, signature.args[3], args[3:5])
                pairs = []  # of each row, four
                for row in range(2 * down):
                    each = signs_of(builder, words[2 * row + half], args[5], direct)
                    weights = scales[4 * half : 4 * half + 4] if direct else [scales[row]] * 4
                    each = zip(each, weights, strict=True)
                    pairs.append([builder.xor(builder.and_(bits, WORD(SIGNS)), scale) for bits, scale in each])
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
                return context.make_tuple(builder, sums, found)

            return sums(sums, words, scales, array, types.uint32, types.int32), codegen

        return product

    @cache
    def group_product(across: int, direct: bool = False) -> Any:
        """A device function: sums of four warps' tile of 64 rows plus products of 64 signs of each with vectors.

        It takes what `tile_product` takes, but two words for each of the lane's two rows, and the element of shared
        memory where the first vector begins; vectors are 32 words apart, and their chunks of four words are swapped:
        chunk c of vector v is at c ^ v % 8. Needs compute capability 9.0 and a multiple of 1024 bytes there.
        """
        text = (
            "{ .reg .pred p; .reg .b64 d; setp.eq.u32 p, 1, 1; mov.b64 d, $DESCRIPTOR; wgmma.fence.sync.aligned; "
            + "add.s64 d, d, 2; ".join(
                f"wgmma.mma_async.sync.aligned.m64n{8 * across}k16.f32.f16.f16 "
                f"{{$SUMS}}, {{$WORDS{i}}}, d, p, 1, 1, 0; "
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

        @intrinsic
        def product(typingctx, sums, words, scales, array, index, lane):
            kind = ir.FunctionType(ir.LiteralStructType([FLOAT] * count), [FLOAT] * count + [WORD] * 16 + [LONG])
            multiply = ir.InlineAsm(kind, text, ",".join(constraints), side_effect=True)

            def codegen(context, builder, signature, args):
                old, words, scales = (
                    [builder.extract_value(each, i) for i in range(each.type.count)] for each in args[:3]
                )
                begin = builder.lshr(shared_address(context, builder, signature.args[3], args[3:5]), WORD(4))
                place = builder.or_(builder.zext(begin, LONG), LONG(SWAPPED_CHUNKS))
                pairs = []
                for half in range(2):
                    rows = [signs_of(builder, words[2 * row + half], args[5], direct) for row in range(2)]
                    for chunk in range(4):
                        for row in range(2):
                            scale = scales[4 * half + chunk if direct else row]
                            pairs.append(builder.xor(builder.and_(rows[row][chunk], WORD(SIGNS)), scale))
                new = builder.call(multiply, [*old, *pairs, place])
                return context.make_tuple(builder, sums, [builder.extract_value(new, i) for i in range(count)])

            return sums(sums, words, scales, array, types.uint32, types.int32), codegen

        return product

    @intrinsic
    def let_group_read(typingctx):
        """What this thread copied to shared memory can be read by `group_product`, once all have come to a barrier."""
        return types.void(), instruction(types.void, (), "fence.proxy.async.shared::cta;", "~{memory}", True)

    @cache
    def put_tile(down: int, across: int, stride: int) -> Any:
        """A device function: puts a warp's sums into shared memory, rows side by side and vectors `stride` apart.

        It takes the element where the lane's first sum goes.
        """

        @intrinsic
        def put(typingctx, array, index, sums):
            def codegen(context, builder, signature, args):
                begin = place_of(context, builder, signature.args[0], args[:2])
                for m in range(down):
                    for n in range(across):
                        for i in range(4):
                            offset = stride * (8 * n + (i & 1)) + 16 * m + 8 * (i >> 1)
                            value = builder.extract_value(args[2], 4 * (m * across + n) + i)
                            builder.store(value, builder.gep(begin, [LONG(offset)]))

            return types.void(array, types.uint32, sums), codegen

        return put

    @cache
    def put_scores(across: int) -> Any:
        """A device function: puts products of a query with rotated keys into shared memory, token after token.

        The keys are the sums of a warp's two tiles, of 16 rows of both halves of a key; a lane's tokens are the vectors
        2 * (lane % 4), the next one, and those 8, 16 and so on further. It takes the element where the first token's
        score goes; the sums; cosines and sines, each of a lane's two rows for each of its tokens; what the query has
        there: for both rows of the lower half, then of the upper; and the lane.

        Eight lanes have parts of the same tokens' scores. Each hands half of them to the lane that sums those, and then
        half of what it has left.
        """
        count = 2 * across

        @intrinsic
        def put(typingctx, array, index, sums, cosines, sines, query, lane):
            def codegen(context, builder, signature, args):
                sums, cosines, sines, query = (
                    [builder.extract_value(each, i) for i in range(each.type.count)] for each in args[2:6]
                )
                exchange = ir.FunctionType(FLOAT, [FLOAT])
                lane, scores = args[6], []
                for i in range(count):
                    terms = []
                    for row in range(2):
                        at = 4 * (i >> 1) + 2 * row + (i & 1)
                        low, high, c, s = sums[at], sums[2 * count + at], cosines[2 * i + row], sines[2 * i + row]
                        turned_low = builder.fsub(builder.fmul(low, c), builder.fmul(high, s))
                        turned_high = builder.fadd(builder.fmul(high, c), builder.fmul(low, s))
                        terms += [builder.fmul(turned_low, query[row]), builder.fmul(turned_high, query[2 + row])]
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
                place = place_of(context, builder, signature.args[0], [args[0], builder.add(args[1], token)])
                several = WORD(4 * max(1, 8 // count) - 4)  # lanes that have the same
                with builder.if_then(builder.icmp_signed("==", builder.and_(lane, several), WORD(0))):
                    for i, score in enumerate(scores):
                        builder.store(score, builder.gep(place, [LONG(i)]))

            return types.void(array, types.uint32, sums, cosines, sines, query, types.int32), codegen

        return put
