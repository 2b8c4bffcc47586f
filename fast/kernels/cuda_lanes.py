"""What Numba CUDA lacks: the tensor cores' product, conversions of bits, and 16-byte loads, as single instructions.

Each has a plain twin, which the simulator (NUMBA_ENABLE_CUDASIM=1) runs in its place.
"""

# pyright: reportAttributeAccessIssue=false, reportCallIssue=false, reportOperatorIssue=false, reportRedeclaration=false

import numpy as np
from numba import config, cuda, types
from numba.cuda.extending import intrinsic

if config.ENABLE_CUDASIM:

    def as_float(bits):
        """The float32 that 32 bits are."""
        return np.uint32(bits).view(np.float32)

    def pack_bfloat16(high, low):
        """Two float32 rounded to bfloat16, side by side in 32 bits."""

        def rounded(value):
            bits = int(np.float32(value).view(np.uint32))
            return (bits + 0x7FFF + (bits >> 16 & 1)) >> 16 & 0xFFFF

        return np.uint32(rounded(high) << 16 | rounded(low))

    def load4(array, index):
        """Four words that begin at an index divisible by four."""
        return tuple(array[index + i] for i in range(4))

    @cuda.jit(device=True)
    def multiply_add(c, a0, a1, a2, a3, b0, b1):
        """C + A B of a warp, A (16, 16) and B (16, 8) bfloat16, C (16, 8) float32, spread over lanes as PTX has it."""
        lane = cuda.laneid
        group, within = lane >> 2, lane & 3
        mine = (a0, a1, a2, a3, b0, b1)
        sums = [np.float64(each) for each in c]
        for of in range(4):
            rows = cuda.shfl_sync(0xFFFFFFFF, mine, 4 * group + of)
            columns = [cuda.shfl_sync(0xFFFFFFFF, mine, 4 * (2 * within + i) + of) for i in range(2)]
            for i in range(4):
                for a, b in ((rows[i >> 1], columns[i & 1][4]), (rows[2 + (i >> 1)], columns[i & 1][5])):
                    for shift in (0, 16):
                        one, other = (as_float((int(word) >> shift & 0xFFFF) << 16) for word in (a, b))
                        sums[i] += np.float64(one) * np.float64(other)
        return tuple(np.float32(value) for value in sums)

else:
    from llvmlite import ir

    FLOAT, WORD = ir.FloatType(), ir.IntType(32)

    @intrinsic
    def as_float(typingctx, bits):
        """The float32 that 32 bits are."""

        def codegen(context, builder, signature, args):
            return builder.bitcast(args[0], FLOAT)

        return types.float32(types.uint32), codegen

    @intrinsic
    def pack_bfloat16(typingctx, high, low):
        """Two float32 rounded to bfloat16, side by side in 32 bits."""

        def codegen(context, builder, signature, args):
            kind = ir.FunctionType(WORD, [FLOAT, FLOAT])
            return builder.call(ir.InlineAsm(kind, "cvt.rn.bf16x2.f32 $0, $1, $2;", "=r,f,f"), args)

        return types.uint32(types.float32, types.float32), codegen

    @intrinsic
    def load4(typingctx, array, index):
        """Four words that begin at an index divisible by four."""
        signature = types.UniTuple(types.uint32, 4)(array, types.uint32)

        def codegen(context, builder, signature, args):
            data = context.make_array(signature.args[0])(context, builder, args[0]).data
            at = builder.zext(args[1], ir.IntType(64))
            place = builder.bitcast(builder.gep(data, [at]), ir.VectorType(WORD, 4).as_pointer())
            words = builder.load(place)
            words.align = 16
            each = [builder.extract_element(words, WORD(i)) for i in range(4)]
            return context.make_tuple(builder, signature.return_type, each)

        return signature, codegen

    @intrinsic
    def multiply_add(typingctx, c, a0, a1, a2, a3, b0, b1):
        """C + A B of a warp, A (16, 16) and B (16, 8) bfloat16, C (16, 8) float32, spread over lanes as PTX has it."""
        four = types.UniTuple(types.float32, 4)

        def codegen(context, builder, signature, args):
            kind = ir.FunctionType(ir.LiteralStructType([FLOAT] * 4), [WORD] * 6 + [FLOAT] * 4)
            instruction = (
                "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
                "{$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, {$10, $11, $12, $13};"
            )
            asm = ir.InlineAsm(kind, instruction, "=f,=f,=f,=f,r,r,r,r,r,r,f,f,f,f")
            before = [builder.extract_value(args[0], i) for i in range(4)]
            sums = builder.call(asm, [*args[1:], *before])
            each = [builder.extract_value(sums, i) for i in range(4)]
            return context.make_tuple(builder, four, each)

        return four(four, *[types.uint32] * 6), codegen
