"""Sixteen lanes for Numba: vectors of sixteen float32 or uint32, written as LLVM vectors.

Numba compiles loops but has no vector type. These intrinsics add one: LLVM maps a vector of sixteen to one AVX-512
register, two AVX2 registers, four NEON or SSE registers, and whatever else a processor has. Only `add_lookups` asks
which processor it is compiled for, because LLVM has no general instruction for it.

An array argument is one-dimensional and contiguous; an index counts its elements and is not checked. What the innermost
loops use takes addresses (int64, in bytes) instead: an array costs seven arguments a call.

LITTLEBIT_CPU=avx512, avx2, neon or plain in the environment, before the first import, makes Numba compile everything
for such a processor instead of this one. Its cache keeps the compiled code of different processors apart.
"""
# pyright: reportCallIssue=false

import math
import os

import numba
from llvmlite import binding, ir
from numba import types
from numba.extending import intrinsic, models, register_model

LANES = 16

# Processors to compile for: a name that LLVM knows and the features that `levels_of` and LLVM may count on.
LEVELS = {
    "avx512": ("skylake-avx512", "+avx512f,+avx512bw,+avx512dq,+avx512vl,+avx2,+fma"),
    "avx2": ("haswell", "+avx2,+fma"),
    "neon": ("generic", "+neon"),
    "plain": ("generic", ""),
}
NEEDED = {"avx512": "+avx512f", "avx2": "+avx2", "neon": "+neon"}  # of a processor's LLVM features


def levels_of(features: str) -> list[str]:
    """Those of LEVELS that a processor with these LLVM features reaches, the best first."""
    names = ["", *features.split(",")]
    return [level for level in LEVELS if NEEDED.get(level, "") in names]


def chosen_level() -> str:
    """The level that is compiled for: the processor's own, or that of LITTLEBIT_CPU, which Numba is then told.

    Raises
    ------
    ValueError
        If LITTLEBIT_CPU is not a level, or one that this processor lacks.
    """
    features = numba.config.CPU_FEATURES or binding.get_host_cpu_features().flatten()  # type: ignore[attr-defined]
    levels = levels_of(features)
    asked = os.environ.get("LITTLEBIT_CPU") or levels[0]
    if asked not in levels:
        raise ValueError(f"LITTLEBIT_CPU must be one of {', '.join(levels)} on this machine, not {asked!r}")
    if os.environ.get("LITTLEBIT_CPU"):
        numba.config.CPU_NAME, numba.config.CPU_FEATURES = LEVELS[asked]  # type: ignore[attr-defined]
    return asked


LEVEL = chosen_level()

I32 = ir.IntType(32)
FLOATS = ir.VectorType(ir.FloatType(), LANES)
WORDS = ir.VectorType(I32, LANES)
MASK = ir.VectorType(ir.IntType(1), LANES)


class Floats(types.Type):
    """Sixteen float32 lanes."""

    def __init__(self):
        super().__init__(name="littlebit_floats16")


class Words(types.Type):
    """Sixteen uint32 lanes."""

    def __init__(self):
        super().__init__(name="littlebit_words16")


floats, words = Floats(), Words()


@register_model(Floats)
class FloatsModel(models.PrimitiveModel):
    """A Floats value is one LLVM vector."""

    def __init__(self, dmm, fe_type):
        super().__init__(dmm, fe_type, FLOATS)


@register_model(Words)
class WordsModel(models.PrimitiveModel):
    """A Words value is one LLVM vector."""

    def __init__(self, dmm, fe_type):
        super().__init__(dmm, fe_type, WORDS)


def element_pointer(context, builder, array_type, array, index):
    """LLVM pointer to array[index], without bounds check or wraparound."""
    data = context.make_array(array_type)(context, builder, array).data
    return builder.gep(data, [index])


def vector_at(context, builder, array_type, array, index, vector):
    """`vector`, an LLVM vector type, loaded from array[index] on; array elements may be smaller than its own."""
    pointer = element_pointer(context, builder, array_type, array, index)
    return builder.load(builder.bitcast(pointer, vector.as_pointer()), align=array_type.dtype.bitwidth // 8)


def vector_from(builder, address, vector, offset=0):
    """`vector`, an LLVM vector type, loaded from an address plus a number of bytes; aligned to four bytes at least."""
    place = builder.inttoptr(builder.add(address, ir.Constant(address.type, offset)), vector.as_pointer())
    return builder.load(place, align=4)


def stepped(builder, address, step, count):
    """The addresses address, address + step, ..., `count` of them."""
    return [builder.add(address, builder.mul(step, ir.Constant(step.type, b))) for b in range(count)]


def splat(builder, value, vector):
    """An LLVM vector with `value` in every lane."""
    single = builder.insert_element(ir.Constant(vector, ir.Undefined), value, ir.Constant(I32, 0))
    return builder.shuffle_vector(
        single, ir.Constant(vector, ir.Undefined), ir.Constant(ir.VectorType(I32, vector.count), [0] * vector.count)
    )


def shuffle(builder, first, second, lanes):
    """The given lanes out of two LLVM vectors laid end to end."""
    return builder.shuffle_vector(first, second, ir.Constant(ir.VectorType(I32, len(lanes)), list(lanes)))


@intrinsic
def zeros(typingctx):
    """Sixteen zeros."""

    def codegen(context, builder, signature, args):
        return ir.Constant(FLOATS, [0.0] * LANES)

    return floats(), codegen


@intrinsic
def broadcast(typingctx, value):
    """Sixteen times a float32."""

    def codegen(context, builder, signature, args):
        return splat(builder, args[0], FLOATS)

    return floats(types.float32), codegen


@intrinsic
def load(typingctx, x, index):
    """x[index : index + 16] of a float32 array."""

    def codegen(context, builder, signature, args):
        return vector_at(context, builder, signature.args[0], *args, FLOATS)

    return floats(x, types.intp), codegen


@intrinsic
def load_words(typingctx, array, index):
    """Sixteen uint32 that begin at array[index]."""

    def codegen(context, builder, signature, args):
        return vector_at(context, builder, signature.args[0], *args, WORDS)

    return words(array, types.intp), codegen


def half_bits_to_float(builder, bits, vector):
    """Float32 from the bits of float16 in a vector (or scalar) type of i32, exact for every finite value.

    The exponent's bias differs by 127 - 15 = 112, so the bits moved to their places in a float32 are the value times
    2^-112, denormal numbers included. This needs no instruction for float16, which not every processor has.
    """

    def constant(value):
        if isinstance(vector, ir.VectorType):
            return ir.Constant(vector, [value] * vector.count)
        return ir.Constant(vector, value)

    float_type = FLOATS if isinstance(vector, ir.VectorType) else ir.FloatType()
    magnitude = builder.shl(builder.and_(bits, constant(0x7FFF)), constant(13))
    scale = builder.bitcast(constant((127 + 112) << 23), float_type)
    value = builder.bitcast(builder.fmul(builder.bitcast(magnitude, float_type), scale), vector)
    return builder.bitcast(
        builder.or_(value, builder.shl(builder.and_(bits, constant(0x8000)), constant(16))), float_type
    )


@intrinsic
def load_half(typingctx, bits, index):
    """bits[index : index + 16] of an array of float16 bits (uint16), as float32."""

    def codegen(context, builder, signature, args):
        halves = vector_at(context, builder, signature.args[0], *args, ir.VectorType(ir.IntType(16), LANES))
        return half_bits_to_float(builder, builder.zext(halves, WORDS), WORDS)

    return floats(bits, types.intp), codegen


@intrinsic
def half_to_float(typingctx, bits):
    """The float32 value of a float16 given by its bits (uint16)."""

    def codegen(context, builder, signature, args):
        return half_bits_to_float(builder, builder.zext(args[0], I32), I32)

    return types.float32(types.uint16), codegen


@intrinsic
def store(typingctx, x, index, lanes):
    """x[index : index + 16] = lanes, in a float32 array."""

    def codegen(context, builder, signature, args):
        pointer = element_pointer(context, builder, signature.args[0], args[0], args[1])
        builder.store(args[2], builder.bitcast(pointer, FLOATS.as_pointer()), align=4)
        return context.get_dummy_value()

    return types.void(x, types.intp, floats), codegen


@intrinsic
def add(typingctx, first, second):
    """Lane by lane, first + second."""

    def codegen(context, builder, signature, args):
        return builder.fadd(*args)

    return floats(floats, floats), codegen


@intrinsic
def multiply(typingctx, first, second):
    """Lane by lane, first * second."""

    def codegen(context, builder, signature, args):
        return builder.fmul(*args)

    return floats(floats, floats), codegen


@intrinsic
def multiply_add(typingctx, first, second, third):
    """Lane by lane, first * second + third, rounded once where the processor can."""

    def codegen(context, builder, signature, args):
        return multiply_added(builder, *args)

    return floats(floats, floats, floats), codegen


def multiply_added(builder, first, second, third):
    """LLVM's first * second + third, fused where that is fast."""
    kind = ir.FunctionType(FLOATS, [FLOATS] * 3)
    return builder.call(named_function(builder, "llvm.fmuladd.v16f32", kind), [first, second, third])


@intrinsic
def lane_sum(typingctx, lanes):
    """Sum of the sixteen lanes, pairwise."""

    def codegen(context, builder, signature, args):
        (lanes,) = args
        width = LANES
        while width > 1:
            width //= 2
            low, high = (shuffle(builder, lanes, lanes, range(start, start + width)) for start in (0, width))
            lanes = builder.fadd(low, high)
        return builder.extract_element(lanes, ir.Constant(I32, 0))

    return types.float32(floats), codegen


@intrinsic
def add_where(typingctx, total, halfwords, index, lanes):
    """Add lanes to total in those of the sixteen lanes whose bit is set in halfwords[index] (uint16)."""

    def codegen(context, builder, signature, args):
        pointer = element_pointer(context, builder, signature.args[1], args[1], args[2])
        mask = builder.bitcast(builder.load(pointer), MASK)
        return builder.select(mask, builder.fadd(args[0], args[3]), args[0])

    return floats(floats, halfwords, types.intp, floats), codegen


@intrinsic
def four_tables(typingctx, x, tables):
    """From sixteen float32 at address x, four tables to address `tables`: the sixteen values of +-a +-b +-c +-d each.

    Entry k takes the minus sign where a bit of k is 1, a's the lowest.
    """

    def codegen(context, builder, signature, args):
        signs = [ir.Constant(FLOATS, [-1.0 if entry >> bit & 1 else 1.0 for entry in range(LANES)]) for bit in range(4)]
        x, tables = args
        for table in range(4):
            values = [
                splat(builder, vector_from(builder, x, ir.FloatType(), 16 * table + 4 * bit), FLOATS)
                for bit in range(4)
            ]
            sums = builder.fmul(values[0], signs[0])
            for value, sign in zip(values[1:], signs[1:], strict=True):
                sums = multiply_added(builder, value, sign, sums)
            at = builder.add(tables, ir.Constant(tables.type, 4 * LANES * table))
            builder.store(sums, builder.inttoptr(at, FLOATS.as_pointer()), align=4)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


@intrinsic
def four_columns(typingctx, address, step):
    """The first four words of sixteen rows that lie `step` bytes apart: four vectors, lane i for row i.

    Sixteen loads of four words, then a transposition of each block of four rows within a quarter of a register, which
    takes half the shuffles of one across whole registers.
    """
    four = ir.VectorType(I32, 4)

    def codegen(context, builder, signature, args):
        rows = [vector_from(builder, at, four) for at in stepped(builder, *args, LANES)]
        quarters = []  # quarters[i] holds rows i, i + 4, i + 8, i + 12
        for row in range(4):
            low = shuffle(builder, rows[row], rows[row + 4], range(8))
            high = shuffle(builder, rows[row + 8], rows[row + 12], range(8))
            quarters.append(shuffle(builder, low, high, range(16)))
        low = [lane + offset for lane in range(0, 16, 4) for offset in (0, 16, 1, 17)]
        high = [lane + offset for lane in range(0, 16, 4) for offset in (2, 18, 3, 19)]
        pairs = [
            [shuffle(builder, quarters[first], quarters[first + 1], order) for order in (low, high)] for first in (0, 2)
        ]
        even = [lane + offset for lane in range(0, 16, 4) for offset in (0, 1, 16, 17)]
        odd = [lane + offset for lane in range(0, 16, 4) for offset in (2, 3, 18, 19)]
        columns = [shuffle(builder, pairs[0][half], pairs[1][half], order) for half in (0, 1) for order in (even, odd)]
        return context.make_tuple(builder, signature.return_type, columns)

    return types.UniTuple(words, 4)(types.int64, types.int64), codegen


@intrinsic
def next_nibble(typingctx, lanes):
    """Sixteen words shifted right by four bits."""

    def codegen(context, builder, signature, args):
        return builder.lshr(args[0], ir.Constant(WORDS, [4] * LANES))

    return words(words), codegen


@intrinsic
def each_zeros(typingctx, each):
    """Sixteen zeros for each entry of a tuple: sums that several rows of x share the instructions of."""

    def codegen(context, builder, signature, args):
        return context.make_tuple(builder, signature.return_type, [ir.Constant(FLOATS, [0.0] * LANES)] * each.count)

    return types.UniTuple(floats, each.count)(each), codegen


@intrinsic
def each_load(typingctx, each, address, step):
    """Sixteen float32 from address, from address + step, ...: one vector for each entry of a tuple; step in bytes."""

    def codegen(context, builder, signature, args):
        _, address, step = args
        found = [vector_from(builder, at, FLOATS) for at in stepped(builder, address, step, each.count)]
        return context.make_tuple(builder, signature.return_type, found)

    return types.UniTuple(floats, each.count)(each, types.int64, types.int64), codegen


@intrinsic
def each_store(typingctx, address, step, lanes):
    """Store each entry of a tuple of vectors, the first to address, the next to address + step, ..."""

    def codegen(context, builder, signature, args):
        address, step, values = args
        for b, at in enumerate(stepped(builder, address, step, lanes.count)):
            builder.store(builder.extract_value(values, b), builder.inttoptr(at, FLOATS.as_pointer()), align=4)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, lanes), codegen


@intrinsic
def each_add(typingctx, first, second):
    """Lane by lane and entry by entry, first + second."""

    def codegen(context, builder, signature, args):
        sums = [builder.fadd(*(builder.extract_value(value, b) for value in args)) for b in range(first.count)]
        return context.make_tuple(builder, signature.return_type, sums)

    return first(first, second), codegen


@intrinsic
def add_lookups(typingctx, totals, address, step, lanes):
    """totals[b] + table_b[lane & 15] for each lane, table_b the sixteen float32 at address + b * step.

    The lookup is one instruction with AVX-512, six with AVX2, sixteen with NEON, and sixteen loads elsewhere.
    """
    find = {"avx512": lookup_avx512, "avx2": lookup_avx2, "neon": lookup_neon}.get(LEVEL, lookup_in_memory)

    def codegen(context, builder, signature, args):
        values, address, step, lanes = args
        sums = []
        for b, at in enumerate(stepped(builder, address, step, totals.count)):
            table = vector_from(builder, at, FLOATS)
            sums.append(builder.fadd(builder.extract_value(values, b), find(builder, table, lanes)))
        return context.make_tuple(builder, signature.return_type, sums)

    return totals(totals, types.int64, types.int64, words), codegen


def lookup_avx512(builder, table, lanes):
    """table[lane & 15] by VPERMPS, which reads the lowest four bits of each lane."""
    kind = ir.FunctionType(FLOATS, [FLOATS, WORDS])
    return builder.call(named_function(builder, "llvm.x86.avx512.permvar.sf.512", kind), [table, lanes])


def lookup_avx2(builder, table, lanes):
    """`lookup_avx512` by the VPERMPS of eight lanes, which reads three bits: in both halves of the table; a choice."""
    half_floats, half_words = ir.VectorType(ir.FloatType(), 8), ir.VectorType(I32, 8)
    function = named_function(builder, "llvm.x86.avx2.permps", ir.FunctionType(half_floats, [half_floats, half_words]))
    low, high = (shuffle(builder, table, table, range(start, start + 8)) for start in (0, 8))
    bit = builder.shl(lanes, ir.Constant(WORDS, [28] * LANES))
    upper = builder.icmp_signed("<", bit, ir.Constant(WORDS, [0] * LANES))
    found = []
    for start in (0, 8):
        at = shuffle(builder, lanes, lanes, range(start, start + 8))
        chosen = shuffle(builder, upper, upper, range(start, start + 8))
        found.append(builder.select(chosen, builder.call(function, [high, at]), builder.call(function, [low, at])))
    return shuffle(builder, *found, range(16))


def lookup_neon(builder, table, lanes):
    """`lookup_avx512` by TBL, which finds sixteen bytes in a table of 64, once for each four lanes.

    The bytes of entry k are those at 4 k, 4 k + 1, 4 k + 2 and 4 k + 3.
    """
    some_bytes = ir.VectorType(ir.IntType(8), 16)
    entries = builder.and_(lanes, ir.Constant(WORDS, [15] * LANES))
    places = builder.mul(entries, ir.Constant(WORDS, [0x04040404] * LANES))
    places = builder.add(places, ir.Constant(WORDS, [0x03020100] * LANES))

    def quarters(vector):
        parts = [shuffle(builder, vector, vector, range(start, start + 4)) for start in range(0, LANES, 4)]
        return [builder.bitcast(part, some_bytes) for part in parts]

    kind = ir.FunctionType(some_bytes, [some_bytes] * 5)
    function, parts = named_function(builder, "llvm.aarch64.neon.tbl4.v16i8", kind), quarters(table)
    found = [builder.call(function, [*parts, at]) for at in quarters(places)]
    first, last = (shuffle(builder, *found[start : start + 2], range(32)) for start in (0, 2))
    return builder.bitcast(shuffle(builder, first, last, range(64)), FLOATS)


def lookup_in_memory(builder, table, lanes):
    """`lookup_avx512` by loads, for any processor."""
    with builder.goto_entry_block():
        place = builder.alloca(FLOATS)
    builder.store(table, place)
    base = builder.bitcast(place, ir.FloatType().as_pointer())
    found = ir.Constant(FLOATS, ir.Undefined)
    for lane in range(LANES):
        at = builder.and_(builder.extract_element(lanes, ir.Constant(I32, lane)), ir.Constant(I32, 15))
        found = builder.insert_element(found, builder.load(builder.gep(base, [at])), ir.Constant(I32, lane))
    return found


def named_function(builder, name, kind):
    """A function of the module under construction, declared on first use."""
    known = builder.module.globals.get(name)
    return known if known is not None else ir.Function(builder.module, kind, name)


@intrinsic
def prefetch(typingctx, address):
    """Ask for the cache line at an address; any address is allowed."""

    def codegen(context, builder, signature, args):
        byte = ir.IntType(8).as_pointer()
        kind = ir.FunctionType(ir.VoidType(), [byte, I32, I32, I32])
        read, keep, data = (ir.Constant(I32, value) for value in (0, 3, 1))
        builder.call(
            named_function(builder, "llvm.prefetch.p0", kind), [builder.inttoptr(args[0], byte), read, keep, data]
        )
        return context.get_dummy_value()

    return types.void(types.int64), codegen


def atomic_word(builder, address):
    """LLVM pointer to the int64 at an address."""
    return builder.inttoptr(address, ir.IntType(64).as_pointer())


@intrinsic
def atomic_load(typingctx, address):
    """The int64 at an address, read anew each time.

    A thread that reads a value also sees everything that the thread which stored it wrote before.
    """

    def codegen(context, builder, signature, args):
        return builder.load_atomic(atomic_word(builder, args[0]), "seq_cst", 8)

    return types.int64(types.int64), codegen


@intrinsic
def atomic_store(typingctx, address, value):
    """Store an int64 to an address; see `atomic_load`."""

    def codegen(context, builder, signature, args):
        builder.store_atomic(args[1], atomic_word(builder, args[0]), "seq_cst", 8)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


@intrinsic
def compare_and_swap(typingctx, address, expected, value):
    """Store an int64 to an address if the expected one is there, in one step for all threads; whether it was."""

    def codegen(context, builder, signature, args):
        place = atomic_word(builder, args[0])
        return builder.extract_value(builder.cmpxchg(place, args[1], args[2], "seq_cst", "seq_cst"), 1)

    return types.boolean(types.int64, types.int64, types.int64), codegen


@intrinsic
def call(typingctx, function, first, second):
    """Call the function at an address with two int64; it gives nothing back."""

    def codegen(context, builder, signature, args):
        integer = ir.IntType(64)
        kind = ir.FunctionType(ir.VoidType(), [integer, integer])
        builder.call(builder.inttoptr(args[0], kind.as_pointer()), args[1:])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), codegen


@intrinsic
def pause(typingctx):
    """Tell the processor that this thread waits for another one's write."""

    def codegen(context, builder, signature, args):
        if LEVEL in ("avx512", "avx2"):
            kind = ir.FunctionType(ir.VoidType(), [])
            builder.call(named_function(builder, "llvm.x86.sse2.pause", kind), [])
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def address_of(typingctx, array):
    """The address of an array's first entry, as int64.

    That of array.ctypes.data is unsigned, and Numba adds an unsigned number and a signed one in float64.
    """

    def codegen(context, builder, signature, args):
        return builder.ptrtoint(context.make_array(signature.args[0])(context, builder, args[0]).data, ir.IntType(64))

    return types.int64(array), codegen


@intrinsic
def pointer(typingctx, address):
    """An address (int64) as a pointer, for numba.carray."""

    def codegen(context, builder, signature, args):
        return builder.inttoptr(args[0], context.get_value_type(signature.return_type))

    return types.voidptr(types.int64), codegen


@intrinsic
def subtract(typingctx, first, second):
    """Lane by lane, first - second."""

    def codegen(context, builder, signature, args):
        return builder.fsub(*args)

    return floats(floats, floats), codegen


@intrinsic
def divide(typingctx, first, second):
    """Lane by lane, first / second."""

    def codegen(context, builder, signature, args):
        return builder.fdiv(*args)

    return floats(floats, floats), codegen


@intrinsic
def load_at(typingctx, address):
    """Sixteen float32 at an address."""

    def codegen(context, builder, signature, args):
        return vector_from(builder, args[0], FLOATS)

    return floats(types.int64), codegen


@intrinsic
def store_at(typingctx, address, lanes):
    """Store sixteen float32 to an address."""

    def codegen(context, builder, signature, args):
        builder.store(args[1], builder.inttoptr(args[0], FLOATS.as_pointer()), align=4)
        return context.get_dummy_value()

    return types.void(types.int64, floats), codegen


@intrinsic
def broadcast_at(typingctx, address):
    """Sixteen times the float32 at an address."""

    def codegen(context, builder, signature, args):
        return splat(builder, vector_from(builder, args[0], ir.FloatType()), FLOATS)

    return floats(types.int64), codegen


def bytes_from(builder, address, integer_type):
    """Sixteen numbers of an LLVM integer type at an address, aligned to a byte."""
    vector = ir.VectorType(integer_type, LANES)
    return builder.load(builder.inttoptr(address, vector.as_pointer()), align=1)


@intrinsic
def load_half_at(typingctx, address):
    """Sixteen float16 at an address, as float32."""

    def codegen(context, builder, signature, args):
        halves = bytes_from(builder, args[0], ir.IntType(16))
        return half_bits_to_float(builder, builder.zext(halves, WORDS), WORDS)

    return floats(types.int64), codegen


@intrinsic
def load_int8_at(typingctx, address):
    """Sixteen int8 at an address, as float32."""

    def codegen(context, builder, signature, args):
        return builder.sitofp(bytes_from(builder, args[0], ir.IntType(8)), FLOATS)

    return floats(types.int64), codegen


@intrinsic
def load_int4_at(typingctx, address):
    """Sixteen bytes at an address as 32 numbers of 0 to 15 in float32: first the low nibbles, then the high."""

    def codegen(context, builder, signature, args):
        codes = builder.zext(bytes_from(builder, args[0], ir.IntType(8)), WORDS)
        fifteen, four = (ir.Constant(WORDS, [value] * LANES) for value in (15, 4))
        halves = builder.and_(codes, fifteen), builder.lshr(codes, four)
        numbers = [builder.sitofp(half, FLOATS) for half in halves]
        return context.make_tuple(builder, signature.return_type, numbers)

    return types.UniTuple(floats, 2)(types.int64), codegen


@intrinsic
def exponential(typingctx, lanes):
    """The power of e by each lane, with a relative error below 2e-7; lanes beyond -87 and 88 count as these.

    e^x = 2^n e^r with n the integer nearest to x / ln 2 and |r| <= ln 2 / 2; e^r by its Taylor polynomial of degree 7,
    whose remainder is below r^8 / 8! < 6e-9; 2^n by adding n to the exponent's bits.
    """

    def codegen(context, builder, signature, args):
        def constant(value):
            return ir.Constant(FLOATS, [value] * LANES)

        def clamped(x, limit, comparison):
            return builder.select(builder.fcmp_ordered(comparison, x, constant(limit)), constant(limit), x)

        x = clamped(clamped(args[0], -87.0, "<"), 88.0, ">")
        magic = constant(1.5 * 2.0**23)  # adding it leaves the nearest integer in the lowest bits
        shifted = multiply_added(builder, x, constant(1 / math.log(2)), magic)
        n = builder.fsub(shifted, magic)
        high = 0.693359375  # of ln 2, in so few bits that n times it is exact
        r = multiply_added(builder, n, constant(high - math.log(2)), multiply_added(builder, n, constant(-high), x))
        power = constant(1 / math.factorial(7))
        for degree in range(6, -1, -1):
            power = multiply_added(builder, power, r, constant(1 / math.factorial(degree)))
        bits = builder.shl(builder.bitcast(shifted, WORDS), ir.Constant(WORDS, [23] * LANES))
        return builder.bitcast(builder.add(builder.bitcast(power, WORDS), bits), FLOATS)

    return floats(floats), codegen
