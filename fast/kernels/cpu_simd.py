"""SIMD for Numba: vectors of sixteen float32 or uint32 values, as intrinsics that emit LLVM vector code.

Numba compiles loops but has no vector type. This module adds two, `f32x16` and `u32x16`. LLVM maps a vector of sixteen
32-bit lanes to one AVX-512 register, two AVX2 registers, four NEON or SSE registers, or to scalar code. The kernels in
cpu.py, cpu_dense.py and cpu_decode.py are written with these vectors, so one source serves every processor.

Only `add_lookups` depends on the instruction set, because LLVM has no portable instruction that looks up sixteen
values in a table held by a register. AVX-512 has one (VPERMPS); AVX2 needs six instructions, NEON sixteen, and any
other processor sixteen loads. **Measured**: with AVX-512 one core looks up and adds 104 to 114 billion signs a second
from registers and first-level cache (`peak_sign_adds_per_s` in book/results/cpu_linear.json).

Each intrinsic is a Python function that emits LLVM instructions; the decorator `emits` gives it its Numba types. Array
arguments must be one-dimensional and contiguous. Indices count elements and are not checked. The innermost loops use
addresses (int64, in bytes) instead of arrays, because Numba passes an array as seven arguments.

Set LITTLEBIT_CPU to avx512, avx2, neon or plain before the first import to compile for that instruction set instead of
the best one of this processor. Numba's cache keeps the code of different instruction sets apart.
"""

import inspect
import math
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numba
from llvmlite import binding, ir
from numba import types
from numba.extending import intrinsic, models, register_model

LANES = 16

#: Instruction sets, best first: the LLVM processor name and the features to compile for.
LEVELS = {
    "avx512": ("skylake-avx512", "+avx512f,+avx512bw,+avx512dq,+avx512vl,+avx2,+fma"),
    "avx2": ("haswell", "+avx2,+fma"),
    "neon": ("generic", "+neon"),
    "plain": ("generic", ""),
}
#: The LLVM feature that a processor must have for an instruction set.
REQUIRED_FEATURE = {"avx512": "+avx512f", "avx2": "+avx2", "neon": "+neon"}


def supported_levels(features: str) -> list[str]:
    """List the instruction sets in LEVELS that a processor with these LLVM features supports, best first."""
    names = ["", *features.split(",")]
    return [level for level in LEVELS if REQUIRED_FEATURE.get(level, "") in names]


def choose_level() -> str:
    """Choose the instruction set to compile for: LITTLEBIT_CPU if it is set, else the best that is supported.

    If LITTLEBIT_CPU is set, Numba is configured to compile for that processor.

    Raises
    ------
    ValueError
        If LITTLEBIT_CPU names an instruction set that is unknown or that this processor lacks.
    """
    features = numba.config.CPU_FEATURES or binding.get_host_cpu_features().flatten()  # type: ignore[attr-defined]
    levels = supported_levels(features)
    requested = os.environ.get("LITTLEBIT_CPU") or levels[0]
    if requested not in levels:
        raise ValueError(
            f"LITTLEBIT_CPU must be one of {', '.join(levels)} on this machine, got {requested!r}: "
            "choose one of these or unset it"
        )
    if os.environ.get("LITTLEBIT_CPU"):
        numba.config.CPU_NAME, numba.config.CPU_FEATURES = LEVELS[requested]  # type: ignore[attr-defined]
    return requested


LEVEL = choose_level()

I8, I16, I32, I64, F32 = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType()
F32X16, U32X16, MASK = (ir.VectorType(element, LANES) for element in (F32, I32, ir.IntType(1)))


class SimdType(types.Type):
    """The Numba type of a SIMD vector."""


f32x16, u32x16 = SimdType(name="littlebit_f32x16"), SimdType(name="littlebit_u32x16")


@register_model(SimdType)
class SimdModel(models.PrimitiveModel):
    """Represent a SIMD value as one LLVM vector."""

    def __init__(self, dmm, fe_type):
        super().__init__(dmm, fe_type, F32X16 if fe_type == f32x16 else U32X16)


def emits(returns: Any, *takes: Any) -> Callable[[Callable], Any]:
    """Turn a function that emits LLVM instructions into a Numba intrinsic, which compiled code calls like a function.

    Parameters
    ----------
    returns : Numba type, or a function from the argument types to one
    takes : Numba types of the arguments
        None accepts any type: an array, which the function receives as a pointer to its first element, or a tuple.

    Returns
    -------
    A decorator for `function(builder, *values)`, whose values are LLVM values. It returns an LLVM value, a list of them
    (a tuple in compiled code), or None (nothing in compiled code).
    """

    def decorate(function: Callable) -> Any:
        def definition(typingctx, *given):
            result = returns if isinstance(returns, types.Type) else returns(*given)
            accepted = [own if wanted is None else wanted for own, wanted in zip(given, takes, strict=True)]
            return result(*accepted), codegen

        def codegen(context, builder, signature, args):
            values = [
                context.make_array(own)(context, builder, value).data if isinstance(own, types.Array) else value
                for own, value in zip(signature.args, args, strict=True)
            ]
            emitted = function(builder, *values)
            if isinstance(emitted, list):
                return context.make_tuple(builder, signature.return_type, emitted)
            return context.get_dummy_value() if emitted is None else emitted

        definition.__name__, definition.__qualname__ = function.__name__, function.__qualname__
        definition.__module__, definition.__doc__ = function.__module__, function.__doc__
        # Numba takes the names and number of arguments from here, and skips the first
        definition.__signature__ = inspect.signature(function)  # type: ignore[attr-defined]
        return intrinsic(definition)

    return decorate


# Pieces of LLVM code that the intrinsics below share


def declare(builder, name: str, result, arguments: Sequence) -> ir.Function:
    """Declare an LLVM intrinsic in the module under construction, or find its declaration."""
    known = builder.module.globals.get(name)
    return known if known is not None else ir.Function(builder.module, ir.FunctionType(result, arguments), name)


def constant(vector, value):
    """Make an LLVM constant with `value` in every lane of a vector type, or of a scalar type."""
    return ir.Constant(vector, [value] * vector.count if isinstance(vector, ir.VectorType) else value)


def as_pointer(builder, address, element):
    """Convert an address (int64) to an LLVM pointer to a type."""
    return builder.inttoptr(address, element.as_pointer())


def load_from(builder, address, vector, offset=0):
    """Load an LLVM type from an address plus a number of bytes, aligned to four bytes."""
    return builder.load(as_pointer(builder, builder.add(address, ir.Constant(I64, offset)), vector), align=4)


def load_bytes(builder, address, element):
    """Load sixteen integers of an LLVM type from an address, aligned to one byte."""
    return builder.load(as_pointer(builder, address, ir.VectorType(element, LANES)), align=1)


def load_element(builder, data, index, vector, align):
    """Load an LLVM vector that begins at data[index]."""
    return builder.load(builder.bitcast(builder.gep(data, [index]), vector.as_pointer()), align=align)


def strided_addresses(builder, address, stride, count: int) -> list:
    """Compute the addresses address, address + stride, ..., `count` of them."""
    return [builder.add(address, builder.mul(stride, ir.Constant(I64, b))) for b in range(count)]


def entries(builder, values) -> Iterator:
    """Extract the entries of an LLVM tuple, one at a time."""
    return (builder.extract_value(values, b) for b in range(len(values.type)))


def splat(builder, value, vector):
    """Copy an LLVM scalar to every lane of a vector."""
    undefined = ir.Constant(vector, ir.Undefined)
    single = builder.insert_element(undefined, value, ir.Constant(I32, 0))
    return builder.shuffle_vector(single, undefined, constant(ir.VectorType(I32, vector.count), 0))


def shuffle(builder, first, second, lanes: Sequence[int]):
    """Select lanes out of two LLVM vectors laid end to end."""
    return builder.shuffle_vector(first, second, ir.Constant(ir.VectorType(I32, len(lanes)), list(lanes)))


def fused_multiply_add(builder, first, second, third):
    """Compute first * second + third, by one FMA instruction where the processor has it."""
    return builder.call(declare(builder, "llvm.fmuladd.v16f32", F32X16, [F32X16] * 3), [first, second, third])


def half_bits_to_float(builder, bits, integers):
    """Convert the bits of float16 values, in an LLVM vector or scalar of i32, to float32; exact for finite values.

    Exponents of float16 and float32 are biased by 15 and 127. Bits moved to their places in a float32 are therefore
    the value times 2^(15 - 127), for denormal numbers too, and one multiplication by 2^112 corrects that. This needs no
    float16 instruction, which not every processor has.
    """
    floats = F32X16 if isinstance(integers, ir.VectorType) else F32
    magnitude = builder.shl(builder.and_(bits, constant(integers, 0x7FFF)), constant(integers, 13))
    scale = builder.bitcast(constant(integers, (127 + 112) << 23), floats)
    value = builder.bitcast(builder.fmul(builder.bitcast(magnitude, floats), scale), integers)
    sign = builder.shl(builder.and_(bits, constant(integers, 0x8000)), constant(integers, 16))
    return builder.bitcast(builder.or_(value, sign), floats)


# Arithmetic on vectors


@emits(f32x16)
def zeros(builder):
    """Make a vector of sixteen zeros."""
    return constant(F32X16, 0.0)


@emits(f32x16, types.float32)
def broadcast(builder, value):
    """Copy a float32 to all sixteen lanes."""
    return splat(builder, value, F32X16)


@emits(f32x16, f32x16, f32x16)
def add(builder, first, second):
    """Add two vectors, lane by lane."""
    return builder.fadd(first, second)


@emits(f32x16, f32x16, f32x16)
def subtract(builder, first, second):
    """Subtract the second vector from the first, lane by lane."""
    return builder.fsub(first, second)


@emits(f32x16, f32x16, f32x16)
def multiply(builder, first, second):
    """Multiply two vectors, lane by lane."""
    return builder.fmul(first, second)


@emits(f32x16, f32x16, f32x16)
def divide(builder, first, second):
    """Divide the first vector by the second, lane by lane."""
    return builder.fdiv(first, second)


@emits(f32x16, f32x16, f32x16, f32x16)
def multiply_add(builder, first, second, third):
    """Compute first * second + third lane by lane, rounded once where the processor has FMA."""
    return fused_multiply_add(builder, first, second, third)


@emits(types.float32, f32x16)
def horizontal_sum(builder, lanes):
    """Add the sixteen lanes of a vector, in pairs."""
    width = LANES
    while width > 1:
        width //= 2
        low, high = (shuffle(builder, lanes, lanes, range(start, start + width)) for start in (0, width))
        lanes = builder.fadd(low, high)
    return builder.extract_element(lanes, ir.Constant(I32, 0))


@emits(f32x16, f32x16, None, types.intp, f32x16)
def masked_add(builder, total, halfwords, index, lanes):
    """Add lanes to total where the lane's bit of halfwords[index] (uint16) is set; keep the other lanes."""
    mask = builder.bitcast(builder.load(builder.gep(halfwords, [index])), MASK)
    return builder.select(mask, builder.fadd(total, lanes), total)


@emits(f32x16, f32x16)
def exponential(builder, x):
    """Compute e^x lane by lane, with a relative error below 2e-7; x is clamped to [-87, 88].

    e^x = 2^n e^r, with n the integer nearest to x / ln 2 and |r| <= ln 2 / 2. e^r is its Taylor polynomial of degree 7,
    whose remainder is below r^8 / 8! < 6e-9. Adding n to the bits of the exponent multiplies by 2^n.
    """

    def clamp(x, limit, comparison):
        limit = constant(F32X16, limit)
        return builder.select(builder.fcmp_ordered(comparison, x, limit), limit, x)

    x = clamp(clamp(x, -87.0, "<"), 88.0, ">")
    magic = constant(F32X16, 1.5 * 2.0**23)  # adding it leaves the nearest integer in the lowest bits
    shifted = fused_multiply_add(builder, x, constant(F32X16, 1 / math.log(2)), magic)
    n = builder.fsub(shifted, magic)
    high = 0.693359375  # the leading bits of ln 2: few enough that n * high is exact
    low = constant(F32X16, high - math.log(2))
    r = fused_multiply_add(builder, n, low, fused_multiply_add(builder, n, constant(F32X16, -high), x))
    power = constant(F32X16, 1 / math.factorial(7))
    for degree in range(6, -1, -1):
        power = fused_multiply_add(builder, power, r, constant(F32X16, 1 / math.factorial(degree)))
    exponent = builder.shl(builder.bitcast(shifted, U32X16), constant(U32X16, 23))
    return builder.bitcast(builder.add(builder.bitcast(power, U32X16), exponent), F32X16)


# Loads and stores by array and index


@emits(f32x16, None, types.intp)
def load(builder, x, index):
    """Load x[index : index + 16] of a float32 array."""
    return load_element(builder, x, index, F32X16, 4)


@emits(u32x16, None, types.intp)
def load_words(builder, words, index):
    """Load words[index : index + 16] of a uint32 array."""
    return load_element(builder, words, index, U32X16, 4)


@emits(f32x16, None, types.intp)
def load_half(builder, bits, index):
    """Load bits[index : index + 16] of an array of float16 bits (uint16), and convert to float32."""
    halves = load_element(builder, bits, index, ir.VectorType(I16, LANES), 2)
    return half_bits_to_float(builder, builder.zext(halves, U32X16), U32X16)


@emits(types.float32, types.uint16)
def half_to_float(builder, bits):
    """Convert the bits of one float16 (uint16) to float32."""
    return half_bits_to_float(builder, builder.zext(bits, I32), I32)


@emits(types.void, None, types.intp, f32x16)
def store(builder, x, index, lanes):
    """Store a vector to x[index : index + 16] of a float32 array."""
    builder.store(lanes, builder.bitcast(builder.gep(x, [index]), F32X16.as_pointer()), align=4)


# Loads and stores by address


@emits(types.int64, None)
def address_of(builder, array):
    """Compute the address of an array's first element, as int64.

    Use this instead of `array.ctypes.data`, which is unsigned: Numba adds unsigned and signed integers in float64.
    """
    return builder.ptrtoint(array, I64)


@emits(types.voidptr, types.int64)
def pointer(builder, address):
    """Convert an address (int64) to a pointer, for numba.carray."""
    return as_pointer(builder, address, I8)


@emits(f32x16, types.int64)
def load_at(builder, address):
    """Load sixteen float32 values from an address."""
    return load_from(builder, address, F32X16)


@emits(f32x16, types.int64)
def broadcast_at(builder, address):
    """Copy the float32 at an address to all sixteen lanes."""
    return splat(builder, load_from(builder, address, F32), F32X16)


@emits(f32x16, types.int64)
def load_half_at(builder, address):
    """Load sixteen float16 values from an address, and convert to float32."""
    return half_bits_to_float(builder, builder.zext(load_bytes(builder, address, I16), U32X16), U32X16)


@emits(f32x16, types.int64)
def load_int8_at(builder, address):
    """Load sixteen int8 values from an address, and convert to float32."""
    return builder.sitofp(load_bytes(builder, address, I8), F32X16)


@emits(types.UniTuple(f32x16, 2), types.int64)
def load_int4_at(builder, address):
    """Load 32 unsigned 4-bit values from an address as two float32 vectors: the low nibbles, then the high ones."""
    codes = builder.zext(load_bytes(builder, address, I8), U32X16)
    halves = builder.and_(codes, constant(U32X16, 15)), builder.lshr(codes, constant(U32X16, 4))
    return [builder.sitofp(half, F32X16) for half in halves]


@emits(types.void, types.int64, f32x16)
def store_at(builder, address, lanes):
    """Store sixteen float32 values to an address."""
    builder.store(lanes, as_pointer(builder, address, F32X16), align=4)


@emits(types.void, types.int64)
def prefetch(builder, address):
    """Prefetch the cache line at an address, for reading; any address is allowed."""
    function = declare(builder, "llvm.prefetch.p0", ir.VoidType(), [I8.as_pointer(), I32, I32, I32])
    read, keep, data = (ir.Constant(I32, value) for value in (0, 3, 1))
    builder.call(function, [as_pointer(builder, address, I8), read, keep, data])


# Lookup tables. A row of x is one entry of a tuple, whose length is the batch size, known when the code is compiled.


@emits(types.void, types.int64, types.int64)
def store_lookup_tables(builder, x, tables):
    """Store four lookup tables to address `tables`, one for each four of the sixteen float32 values at address x.

    The table of (a, b, c, d) has the sixteen sums +-a +-b +-c +-d. In entry k, bit 0 of k chooses the sign of a, bit 1
    that of b, and so on: 1 means minus.
    """
    signs = [ir.Constant(F32X16, [-1.0 if entry >> bit & 1 else 1.0 for entry in range(LANES)]) for bit in range(4)]
    for table in range(4):
        values = [splat(builder, load_from(builder, x, F32, 16 * table + 4 * bit), F32X16) for bit in range(4)]
        sums = builder.fmul(values[0], signs[0])
        for value, sign in zip(values[1:], signs[1:], strict=True):
            sums = fused_multiply_add(builder, value, sign, sums)
        address = builder.add(tables, ir.Constant(I64, 4 * LANES * table))
        builder.store(sums, as_pointer(builder, address, F32X16), align=4)


@emits(types.UniTuple(u32x16, 4), types.int64, types.int64)
def load_transposed(builder, address, stride):
    """Load the first four words of sixteen rows that are `stride` bytes apart: vector k holds word k, lane i row i.

    Loads four words of each row, then transposes the 4 x 4 blocks inside each quarter of a register, which takes half
    the shuffles of a transposition across whole registers.
    """
    four = ir.VectorType(I32, 4)
    rows = [load_from(builder, row, four) for row in strided_addresses(builder, address, stride, LANES)]
    quarters = []  # quarters[i] holds rows i, i + 4, i + 8, i + 12
    for row in range(4):
        low = shuffle(builder, rows[row], rows[row + 4], range(8))
        high = shuffle(builder, rows[row + 8], rows[row + 12], range(8))
        quarters.append(shuffle(builder, low, high, range(16)))
    low = [lane + offset for lane in range(0, 16, 4) for offset in (0, 16, 1, 17)]
    high = [lane + offset for lane in range(0, 16, 4) for offset in (2, 18, 3, 19)]
    pairs = [[shuffle(builder, quarters[at], quarters[at + 1], order) for order in (low, high)] for at in (0, 2)]
    even = [lane + offset for lane in range(0, 16, 4) for offset in (0, 1, 16, 17)]
    odd = [lane + offset for lane in range(0, 16, 4) for offset in (2, 3, 18, 19)]
    return [shuffle(builder, pairs[0][half], pairs[1][half], order) for half in (0, 1) for order in (even, odd)]


@emits(u32x16, u32x16)
def shift_right_nibble(builder, words):
    """Shift sixteen words right by four bits."""
    return builder.lshr(words, constant(U32X16, 4))


@emits(lambda batch: types.UniTuple(f32x16, batch.count), None)
def batch_zeros(builder, batch):
    """Make a tuple of zero vectors, one for each entry of a tuple."""
    return [constant(F32X16, 0.0)] * len(batch.type)


@emits(lambda batch, *_: types.UniTuple(f32x16, batch.count), None, types.int64, types.int64)
def batch_load(builder, batch, address, stride):
    """Load a vector for each entry of a tuple, from address, address + stride, ...; the stride is in bytes."""
    return [load_from(builder, at, F32X16) for at in strided_addresses(builder, address, stride, len(batch.type))]


@emits(types.void, types.int64, types.int64, None)
def batch_store(builder, address, stride, vectors):
    """Store a tuple of vectors to address, address + stride, ...; the stride is in bytes."""
    addresses = strided_addresses(builder, address, stride, len(vectors.type))
    for at, vector in zip(addresses, entries(builder, vectors), strict=True):
        builder.store(vector, as_pointer(builder, at, F32X16), align=4)


@emits(lambda first, _: first, None, None)
def batch_add(builder, first, second):
    """Add two tuples of vectors, entry by entry."""
    return [builder.fadd(*pair) for pair in zip(entries(builder, first), entries(builder, second), strict=True)]


@emits(lambda totals, *_: totals, None, types.int64, types.int64, u32x16)
def add_lookups(builder, totals, address, stride, indices):
    """Add table_b[index & 15] to each lane of totals[b]; table_b has sixteen float32 at address + b * stride.

    The lookup is one instruction with AVX-512, six with AVX2, sixteen with NEON, and sixteen loads elsewhere.
    """
    look_up = {"avx512": lookup_avx512, "avx2": lookup_avx2, "neon": lookup_neon}.get(LEVEL, lookup_in_memory)
    addresses = strided_addresses(builder, address, stride, len(totals.type))
    tables = (load_from(builder, at, F32X16) for at in addresses)
    pairs = zip(tables, entries(builder, totals), strict=True)
    return [builder.fadd(total, look_up(builder, table, indices)) for table, total in pairs]


def lookup_avx512(builder, table, indices):
    """Look up table[index & 15] by VPERMPS, which reads the lowest four bits of each lane."""
    function = declare(builder, "llvm.x86.avx512.permvar.sf.512", F32X16, [F32X16, U32X16])
    return builder.call(function, [table, indices])


def lookup_avx2(builder, table, indices):
    """Look up like `lookup_avx512` by the VPERMPS of eight lanes: in both halves of the table, then select by bit 3."""
    floats, words = ir.VectorType(F32, 8), ir.VectorType(I32, 8)
    function = declare(builder, "llvm.x86.avx2.permps", floats, [floats, words])
    low, high = (shuffle(builder, table, table, range(start, start + 8)) for start in (0, 8))
    bit = builder.shl(indices, constant(U32X16, 28))
    upper = builder.icmp_signed("<", bit, constant(U32X16, 0))
    found = []
    for start in (0, 8):
        at = shuffle(builder, indices, indices, range(start, start + 8))
        chosen = shuffle(builder, upper, upper, range(start, start + 8))
        found.append(builder.select(chosen, builder.call(function, [high, at]), builder.call(function, [low, at])))
    return shuffle(builder, found[0], found[1], range(16))


def lookup_neon(builder, table, indices):
    """Look up like `lookup_avx512` by TBL, which finds sixteen bytes in a table of 64: once for each four lanes.

    Entry k of the table has the bytes 4 k, 4 k + 1, 4 k + 2 and 4 k + 3.
    """
    bytes16 = ir.VectorType(I8, 16)
    rows = builder.and_(indices, constant(U32X16, 15))
    byte_indices = builder.mul(rows, constant(U32X16, 0x04040404))
    byte_indices = builder.add(byte_indices, constant(U32X16, 0x03020100))

    def quarters(vector):
        parts = [shuffle(builder, vector, vector, range(start, start + 4)) for start in range(0, LANES, 4)]
        return [builder.bitcast(part, bytes16) for part in parts]

    function = declare(builder, "llvm.aarch64.neon.tbl4.v16i8", bytes16, [bytes16] * 5)
    parts = quarters(table)
    found = [builder.call(function, [*parts, at]) for at in quarters(byte_indices)]
    first, last = (shuffle(builder, found[start], found[start + 1], range(32)) for start in (0, 2))
    return builder.bitcast(shuffle(builder, first, last, range(64)), F32X16)


def lookup_in_memory(builder, table, indices):
    """Look up like `lookup_avx512` by sixteen loads, for any processor."""
    with builder.goto_entry_block():
        space = builder.alloca(F32X16)
    builder.store(table, space)
    base = builder.bitcast(space, F32.as_pointer())
    found = ir.Constant(F32X16, ir.Undefined)
    for lane in range(LANES):
        at = builder.and_(builder.extract_element(indices, ir.Constant(I32, lane)), ir.Constant(I32, 15))
        found = builder.insert_element(found, builder.load(builder.gep(base, [at])), ir.Constant(I32, lane))
    return found


# Threads: what cpu_threads.py needs


@emits(types.int64, types.int64)
def atomic_load(builder, address):
    """Load the int64 at an address from memory, sequentially consistent.

    A thread that loads a value also sees everything that the storing thread wrote before it.
    """
    return builder.load_atomic(as_pointer(builder, address, I64), "seq_cst", 8)


@emits(types.void, types.int64, types.int64)
def atomic_store(builder, address, value):
    """Store an int64 to an address, sequentially consistent; see `atomic_load`."""
    builder.store_atomic(value, as_pointer(builder, address, I64), "seq_cst", 8)


@emits(types.boolean, types.int64, types.int64, types.int64)
def compare_and_swap(builder, address, expected, value):
    """Store an int64 to an address if it holds the expected one, atomically; return whether it did."""
    word = as_pointer(builder, address, I64)
    return builder.extract_value(builder.cmpxchg(word, expected, value, "seq_cst", "seq_cst"), 1)


@emits(types.void, types.int64, types.int64, types.int64)
def call_address(builder, function, first, second):
    """Call the function at an address with two int64 arguments; it returns nothing."""
    builder.call(as_pointer(builder, function, ir.FunctionType(ir.VoidType(), [I64, I64])), [first, second])


@emits(types.void)
def pause(builder):
    """Tell an x86 processor that this thread spins while it waits for another one; do nothing elsewhere."""
    if LEVEL in ("avx512", "avx2"):
        builder.call(declare(builder, "llvm.x86.sse2.pause", ir.VoidType(), []), [])
