"""What Numba CUDA lacks, as single instructions: products on tensor cores, wide loads, bit tricks, early launches.

Each has a plain twin, which the simulator (NUMBA_ENABLE_CUDASIM=1) runs in its place.
"""

# pyright: reportAttributeAccessIssue=false, reportCallIssue=false, reportOperatorIssue=false, reportRedeclaration=false

from typing import Any

import numpy as np
from numba import config, cuda, types
from numba.cuda.extending import intrinsic

if config.ENABLE_CUDASIM:

    def as_float(bits):
        """The float32 that 32 bits are."""
        return np.uint32(bits).view(np.float32)

    def as_bits(value):
        """The 32 bits of a float32."""
        return np.float32(value).view(np.uint32)

    def halves(bits):
        """Two float16, the lower one first, as float32."""
        low, high = np.array([bits], np.uint32).view(np.float16).astype(np.float32)
        return low, high

    def round_to_bfloat(value):
        """The upper 16 of a float32's bits, after rounding to nearest."""
        bits = int(np.float32(value).view(np.uint32))
        return np.uint16(bits >> 16 if value != value else (bits + 0x7FFF + (bits >> 16 & 1)) >> 16 & 0xFFFF)

    def round_to_half(value):
        """The bits of the float16 nearest to a float32."""
        return np.float16(value).view(np.uint16)

    def larger(one, other):
        """The larger of two float32; NaN if one is."""
        return np.maximum(np.float32(one), np.float32(other))

    def exponential(value):
        """E to a power."""
        return np.exp(np.float32(value))

    def reciprocal_root(value):
        """1 over a square root."""
        return np.float32(1) / np.sqrt(np.float32(value))

    def permute(low, high, selector):
        """Four of the eight bytes of two words; each hexadecimal digit of the selector names one."""
        both = np.array([low, high], np.uint32).view(np.uint8)
        return np.array([both[selector >> 4 * i & 7] for i in range(4)]).view(np.uint32)[0]

    def load_words(count: int) -> Any:
        """A device function: `count` words at an element of an array, aligned to their size together."""

        def load(array, index):
            elements = 4 * count // array.dtype.itemsize
            assert index % elements == 0, "misaligned load"
            raw = np.array([array[int(index) + i] for i in range(elements)], array.dtype)
            return tuple(raw.view(np.uint32))

        return load

    def copy4(array, index, source, place):
        """Begin to copy four words to shared memory, both places divisible by four; `copied` waits for the thread's."""
        assert index % 4 == 0, "misaligned copy"
        assert place % 4 == 0, "misaligned copy"
        for i in range(4):
            array[int(index) + i] = source[int(place) + i]

    def copied():
        """Wait until this thread's copies are there."""

    @cuda.jit(device=True)
    def exchange(value, distance):
        """The word of the lane whose number differs in one bit."""
        return np.uint32(cuda.shfl_xor_sync(0xFFFFFFFF, value, distance))

    @cuda.jit(device=True)
    def warp_max(value):
        """The largest of a warp's unsigned words."""
        for distance in (16, 8, 4, 2, 1):
            value = max(value, cuda.shfl_xor_sync(0xFFFFFFFF, value, distance))
        return value

    @cuda.jit(device=True)
    def count_common(a0, a1, a2, a3, b0, b1):
        """Ones that 16 rows of 256 bits have in common with 8 columns: (16, 8) int32, over lanes as PTX has it."""
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

    @cuda.jit(device=True)
    def warp_total(value):
        """Sum of a warp's words, of their lowest 32 bits."""
        for distance in (16, 8, 4, 2, 1):
            value = np.uint32(int(value) + int(cuda.shfl_xor_sync(0xFFFFFFFF, value, distance)) & 0xFFFFFFFF)
        return value

    def wait():
        """Wait until the kernels before this one have ended and what they wrote can be read."""

    def let_next_start():
        """Let the next kernel's blocks start before this one ends; they `wait` before they read what it writes."""

else:
    from llvmlite import ir

    FLOAT, WORD = ir.FloatType(), ir.IntType(32)

    def instruction(result: Any, operands: Any, text: str, constraints: str, effects: bool = False) -> Any:
        """An intrinsic that is one PTX instruction."""
        lowered = {
            types.uint16: ir.IntType(16), types.uint32: WORD, types.float32: FLOAT, types.void: ir.VoidType()
        }  # fmt: skip

        def codegen(context, builder, signature, args):
            kind = ir.FunctionType(lowered[result], [lowered[each] for each in operands])
            call = builder.call(ir.InlineAsm(kind, text, constraints, side_effect=effects), args)
            return None if result == types.void else call

        return codegen

    @intrinsic
    def as_float(typingctx, bits):
        """The float32 that 32 bits are."""
        return types.float32(types.uint32), lambda context, builder, signature, args: builder.bitcast(args[0], FLOAT)

    @intrinsic
    def as_bits(typingctx, value):
        """The 32 bits of a float32."""
        return types.uint32(types.float32), lambda context, builder, signature, args: builder.bitcast(args[0], WORD)

    @intrinsic
    def halves(typingctx, bits):
        """Two float16, the lower one first, as float32."""

        def codegen(context, builder, signature, args):
            pair = builder.bitcast(args[0], ir.VectorType(ir.HalfType(), 2))
            each = [builder.fpext(builder.extract_element(pair, WORD(i)), FLOAT) for i in range(2)]
            return context.make_tuple(builder, signature.return_type, each)

        return types.UniTuple(types.float32, 2)(types.uint32), codegen

    @intrinsic
    def round_to_half(typingctx, value):
        """The bits of the float16 nearest to a float32."""
        return types.uint16(types.float32), instruction(
            types.uint16, (types.float32,), "cvt.rn.f16.f32 $0, $1;", "=h,f"
        )

    @intrinsic
    def round_to_bfloat(typingctx, value):
        """The upper 16 of a float32's bits, after rounding to nearest."""
        text = "cvt.rn.bf16.f32 $0, $1;"
        return types.uint16(types.float32), instruction(types.uint16, (types.float32,), text, "=h,f")

    @intrinsic
    def larger(typingctx, one, other):
        """The larger of two float32; NaN if one is."""
        operands = (types.float32, types.float32)
        return types.float32(*operands), instruction(types.float32, operands, "max.NaN.f32 $0, $1, $2;", "=f,f,f")

    @cuda.jit(device=True, forceinline=True)
    def exponential(value):
        """E to a power, to about two units in the last place; infinite where it exceeds float32."""
        return power_of_two(value * np.float32(1.4426950408889634))

    @intrinsic
    def power_of_two(typingctx, value):
        """Two to a power."""
        return types.float32(types.float32), instruction(
            types.float32, (types.float32,), "ex2.approx.f32 $0, $1;", "=f,f"
        )

    @intrinsic
    def reciprocal_root(typingctx, value):
        """1 over a square root, to two units in the last place."""
        return types.float32(types.float32), instruction(
            types.float32, (types.float32,), "rsqrt.approx.f32 $0, $1;", "=f,f"
        )

    @intrinsic
    def permute(typingctx, low, high, selector):
        """Four of the eight bytes of two words; each hexadecimal digit of the selector names one."""
        operands = (types.uint32,) * 3
        return types.uint32(*operands), instruction(types.uint32, operands, "prmt.b32 $0, $1, $2, $3;", "=r,r,r,r")

    def load_words(count: int) -> Any:
        """A device function: `count` words at an element of an array, aligned to their size together."""

        @intrinsic
        def load(typingctx, array, index):
            result = types.UniTuple(types.uint32, count)

            def codegen(context, builder, signature, args):
                data = place_of(context, builder, signature.args[0], args)
                words = builder.load(builder.bitcast(data, ir.VectorType(WORD, count).as_pointer(data.type.addrspace)))
                words.align = 4 * count
                each = [builder.extract_element(words, WORD(i)) for i in range(count)]
                return context.make_tuple(builder, result, each)

            return result(array, types.uint32), codegen

        return load

    def place_of(context: Any, builder: Any, kind: Any, args: Any) -> Any:
        """Pointer to element args[1] of the array or pointer args[0]."""
        if isinstance(kind, types.CPointer):  # to global memory, which a kernel's argument need not say
            data = builder.addrspacecast(args[0], args[0].type.pointee.as_pointer(1))
        else:
            data = context.make_array(kind)(context, builder, args[0]).data
        return builder.gep(data, [builder.zext(args[1], ir.IntType(64))])

    @intrinsic
    def copy4(typingctx, array, index, source, place):
        """Begin to copy four words to shared memory, both places divisible by four; `copied` waits for the thread's."""

        def codegen(context, builder, signature, args):
            target = place_of(context, builder, signature.args[0], args[:2])
            target = builder.ptrtoint(builder.addrspacecast(target, target.type.pointee.as_pointer(3)), WORD)
            begin = builder.ptrtoint(place_of(context, builder, signature.args[2], args[2:]), ir.IntType(64))
            kind = ir.FunctionType(ir.VoidType(), [WORD, ir.IntType(64)])
            text = "cp.async.cg.shared.global [$0], [$1], 16;"
            builder.call(ir.InlineAsm(kind, text, "r,l,~{memory}", side_effect=True), [target, begin])

        return types.void(array, types.uint32, source, types.uint32), codegen

    @intrinsic
    def copied(typingctx):
        """Wait until this thread's copies are there."""
        return types.void(), instruction(types.void, (), "cp.async.wait_all;", "~{memory}", True)

    @intrinsic
    def exchange(typingctx, value, distance):
        """The word of the lane whose number differs in one bit."""
        operands, text = (types.uint32, types.uint32), "shfl.sync.bfly.b32 $0, $1, $2, 0x1f, 0xffffffff;"
        return types.uint32(*operands), instruction(types.uint32, operands, text, "=r,r,r", True)

    @intrinsic
    def warp_max(typingctx, value):
        """The largest of a warp's unsigned words."""
        text, constraints = "redux.sync.max.u32 $0, $1, 0xffffffff;", "=r,r"
        return types.uint32(types.uint32), instruction(types.uint32, (types.uint32,), text, constraints, True)

    @intrinsic
    def warp_total(typingctx, value):
        """Sum of a warp's words, of their lowest 32 bits."""
        text, constraints = "redux.sync.add.u32 $0, $1, 0xffffffff;", "=r,r"
        return types.uint32(types.uint32), instruction(types.uint32, (types.uint32,), text, constraints, True)

    @intrinsic
    def count_common(typingctx, a0, a1, a2, a3, b0, b1):
        """Ones that 16 rows of 256 bits have in common with 8 columns: (16, 8) int32, over lanes as PTX has it."""
        four = types.UniTuple(types.int32, 4)

        def codegen(context, builder, signature, args):
            kind = ir.FunctionType(ir.LiteralStructType([WORD] * 4), [WORD] * 10)
            text = (
                "mma.sync.aligned.m16n8k256.row.col.s32.b1.b1.s32.and.popc "
                "{$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, {$10, $11, $12, $13};"
            )
            asm = ir.InlineAsm(kind, text, "=r,=r,=r,=r,r,r,r,r,r,r,r,r,r,r")
            sums = builder.call(asm, [*args, *[WORD(0)] * 4])
            each = [builder.extract_value(sums, i) for i in range(4)]
            return context.make_tuple(builder, four, each)

        return four(*[types.uint32] * 6), codegen

    @intrinsic
    def wait(typingctx):
        """Wait until the kernels before this one have ended and what they wrote can be read."""
        return types.void(), instruction(types.void, (), "griddepcontrol.wait;", "~{memory}", True)

    @intrinsic
    def let_next_start(typingctx):
        """Let the next kernel's blocks start before this one ends; they `wait` before they read what it writes."""
        return types.void(), instruction(types.void, (), "griddepcontrol.launch_dependents;", "~{memory}", True)
