"""Provide PTX instructions that Numba CUDA lacks as device functions: warp shuffles, wide loads, cp.async, bit tricks.

Each operation is written once, as a plain Python function with the instruction that replaces it. Numba's simulator
(NUMBA_ENABLE_CUDASIM=1) runs the Python; on a GPU the instruction stands inline in the calling kernel.

- `ptx` takes an instruction on registers of fixed types.
- `llvm` takes a function that builds LLVM code, for operations that take arrays or return tuples.

The tensor cores' instructions are in cuda_mma.py.
"""

# pyright: reportAttributeAccessIssue=false, reportCallIssue=false, reportOperatorIssue=false

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from llvmlite import ir
from numba import config, cuda, float32, types, uint16, uint32
from numba.cuda.extending import intrinsic

FLOAT, WORD, LONG = ir.FloatType(), ir.IntType(32), ir.IntType(64)
LLVM_TYPES = {uint16: ir.IntType(16), uint32: WORD, float32: FLOAT, types.void: ir.VoidType()}
REGISTERS = {
    uint16: "h",
    uint32: "r",
    float32: "f",
}  # letters of inline assembly for 16-bit, 32-bit and float registers


def llvm(signature: Callable[..., Any], build: Callable[..., Any]) -> Callable[[Any], Any]:
    """Decorate a plain Python function with the LLVM code that a GPU runs in its place.

    Parameters
    ----------
    signature : callable
        Takes the Numba types of the arguments and returns the signature.
    build : callable
        Takes (context, builder, signature, args) and returns the LLVM value.
    """

    def decorate(function: Any) -> Any:
        if config.ENABLE_CUDASIM:  # the simulator lends `cuda` to a function only if it is a device function
            return cuda.jit(device=True)(function) if "cuda" in function.__code__.co_names else function

        def definition(typingctx, *arguments):
            return signature(*arguments), build

        context = inspect.Parameter("typingctx", inspect.Parameter.POSITIONAL_OR_KEYWORD)
        parameters = [context, *inspect.signature(function).parameters.values()]
        definition.__signature__ = inspect.Signature(parameters)  # which Numba reads
        definition.__name__, definition.__doc__ = function.__name__, function.__doc__
        return intrinsic(definition)

    return decorate


def ptx(text: str, result: Any, *operands: Any, volatile: bool = False) -> Callable[[Any], Any]:
    """Decorate a plain Python function with the one PTX instruction that a GPU runs in its place.

    Parameters
    ----------
    text : str
        The instruction; $0 is the result, the operands follow. Without a result the operands begin at $0.
    result, *operands : Numba types
        uint16, uint32 or float32; the result may be void.
    volatile : bool
        Keep the compiler from moving or merging the instruction, as shuffles need. An instruction without a result is
        always kept in place, relative to accesses of memory.
    """
    nothing = result == types.void
    letters = [*([] if nothing else ["=" + REGISTERS[result]]), *(REGISTERS[each] for each in operands)]
    constraints = ",".join([*letters, "~{memory}"] if nothing else letters)

    def build(context, builder, signature, args):
        function = ir.FunctionType(LLVM_TYPES[result], [LLVM_TYPES[each] for each in operands])
        called = builder.call(ir.InlineAsm(function, text, constraints, side_effect=volatile or nothing), args)
        return None if nothing else called

    return llvm(lambda *arguments: result(*operands), build)


def element_pointer(context: Any, builder: Any, array_type: Any, args: Any) -> Any:
    """Return the LLVM pointer to element args[1] of the array or pointer args[0]."""
    if isinstance(array_type, types.CPointer):  # a kernel's argument, which lies in global memory
        data = builder.addrspacecast(args[0], args[0].type.pointee.as_pointer(1))
    else:
        data = context.make_array(array_type)(context, builder, args[0]).data
    return builder.gep(data, [builder.zext(args[1], LONG)])


def shared_address(context: Any, builder: Any, array_type: Any, args: Any) -> Any:
    """Return the 32-bit address in shared memory of element args[1] of array args[0]."""
    pointer = element_pointer(context, builder, array_type, args)
    return builder.ptrtoint(builder.addrspacecast(pointer, pointer.type.pointee.as_pointer(3)), WORD)


# ---- Bits and numbers


def build_as_float(context: Any, builder: Any, signature: Any, args: Any) -> Any:
    """Build a bit cast to float32."""
    return builder.bitcast(args[0], FLOAT)


def build_as_bits(context: Any, builder: Any, signature: Any, args: Any) -> Any:
    """Build a bit cast to 32 bits."""
    return builder.bitcast(args[0], WORD)


def build_halves(context: Any, builder: Any, signature: Any, args: Any) -> Any:
    """Build the conversion of two float16 in a word to float32."""
    pair = builder.bitcast(args[0], ir.VectorType(ir.HalfType(), 2))
    each = [builder.fpext(builder.extract_element(pair, WORD(i)), FLOAT) for i in range(2)]
    return context.make_tuple(builder, signature.return_type, each)


@llvm(lambda bits: float32(uint32), build_as_float)
def as_float(bits):
    """Reinterpret 32 bits as a float32."""
    return np.uint32(bits).view(np.float32)


@llvm(lambda value: uint32(float32), build_as_bits)
def as_bits(value):
    """Reinterpret a float32 as 32 bits."""
    return np.float32(value).view(np.uint32)


@llvm(lambda bits: types.UniTuple(float32, 2)(uint32), build_halves)
def halves(bits):
    """Convert the two float16 in a word to float32, the lower one first."""
    low, high = np.array([bits], np.uint32).view(np.float16).astype(np.float32)
    return low, high


@ptx("cvt.rn.f16.f32 $0, $1;", uint16, float32)
def round_to_half(value):
    """Round a float32 to the nearest float16 and return its bits."""
    return np.float16(value).view(np.uint16)


@ptx("cvt.rn.bf16.f32 $0, $1;", uint16, float32)
def round_to_bfloat(value):
    """Round a float32 to the nearest bfloat16 and return its bits."""
    bits = int(np.float32(value).view(np.uint32))
    return np.uint16(bits >> 16 if value != value else (bits + 0x7FFF + (bits >> 16 & 1)) >> 16 & 0xFFFF)


@ptx("max.NaN.f32 $0, $1, $2;", float32, float32, float32)
def larger(one, other):
    """Return the larger of two float32, or NaN if either is NaN."""
    return np.maximum(np.float32(one), np.float32(other))


@ptx("ex2.approx.f32 $0, $1;", float32, float32)
def exp2(value):
    """Compute 2^value, to about two units in the last place."""
    return np.exp2(np.float32(value))


@cuda.jit(device=True, forceinline=True)
def exponential(value):
    """Compute e^value, to about two units in the last place; infinite where it exceeds float32."""
    return exp2(value * np.float32(1.4426950408889634))


@ptx("rsqrt.approx.f32 $0, $1;", float32, float32)
def reciprocal_root(value):
    """Compute 1 / sqrt(value), to two units in the last place."""
    return np.float32(1) / np.sqrt(np.float32(value))


@ptx("prmt.b32 $0, $1, $2, $3;", uint32, uint32, uint32, uint32)
def byte_permute(low, high, selector):
    """Select four of the eight bytes of two words; each hexadecimal digit of the selector names one (0 to 7)."""
    both = np.array([low, high], np.uint32).view(np.uint8)
    return np.array([both[selector >> 4 * i & 7] for i in range(4)]).view(np.uint32)[0]


# ---- Across a warp


@ptx("shfl.sync.bfly.b32 $0, $1, $2, 0x1f, 0xffffffff;", uint32, uint32, uint32, volatile=True)
def shuffle_xor(value, distance):
    """Return the word of the lane whose number is this lane's XOR `distance`."""
    return np.uint32(cuda.shfl_xor_sync(0xFFFFFFFF, value, distance))


@ptx("redux.sync.max.u32 $0, $1, 0xffffffff;", uint32, uint32, volatile=True)
def warp_max(value):
    """Compute the largest of a warp's unsigned words, the same in every lane."""
    for distance in (16, 8, 4, 2, 1):
        value = max(value, cuda.shfl_xor_sync(0xFFFFFFFF, value, distance))
    return value


@ptx("redux.sync.add.u32 $0, $1, 0xffffffff;", uint32, uint32, volatile=True)
def warp_sum_words(value):
    """Compute the sum of a warp's words modulo 2^32, the same in every lane."""
    for distance in (16, 8, 4, 2, 1):
        value = np.uint32(int(value) + int(cuda.shfl_xor_sync(0xFFFFFFFF, value, distance)) & 0xFFFFFFFF)
    return value


# ---- Wide loads and stores


@cache
def load_words(count: int) -> Any:
    """Make a device function that loads `count` 32-bit words at an element of an array, aligned to their total size."""
    result = types.UniTuple(uint32, count)

    def build(context, builder, signature, args):
        data = element_pointer(context, builder, signature.args[0], args)
        words = builder.load(builder.bitcast(data, ir.VectorType(WORD, count).as_pointer(data.type.addrspace)))
        words.align = 4 * count
        each = [builder.extract_element(words, WORD(i)) for i in range(count)]
        return context.make_tuple(builder, result, each)

    @llvm(lambda array, index: result(array, uint32), build)
    def load(array, index):
        elements = 4 * count // array.dtype.itemsize
        assert index % elements == 0, "misaligned load"
        raw = np.array([array[int(index) + i] for i in range(elements)], array.dtype)
        return tuple(raw.view(np.uint32))

    return load


def build_store4(context: Any, builder: Any, signature: Any, args: Any) -> None:
    """Build a store of 16 bytes."""
    words = ir.Constant(ir.VectorType(WORD, 4), ir.Undefined)
    for i in range(4):
        words = builder.insert_element(words, args[2 + i], WORD(i))
    place = element_pointer(context, builder, signature.args[0], args[:2])
    builder.store(words, builder.bitcast(place, words.type.as_pointer(place.type.addrspace)), align=16)


@llvm(lambda array, index, *words: types.void(array, *[uint32] * 5), build_store4)
def store4(array, index, a, b, c, d):
    """Store four words with one instruction; `index` must be divisible by four."""
    assert index % 4 == 0, "misaligned store"
    for i, word in enumerate((a, b, c, d)):
        array[int(index) + i] = word


# ---- cp.async: copies from global to shared memory that go on in the background (Ampere and later)


def build_cp_async(text: str) -> Callable[..., None]:
    """Return a builder of an asynchronous copy from element args[3] of args[2] to element args[1] of args[0]."""

    def build(context, builder, signature, args):
        target = shared_address(context, builder, signature.args[0], args[:2])
        source = builder.ptrtoint(element_pointer(context, builder, signature.args[2], args[2:4]), LONG)
        size = args[4:]
        function = ir.FunctionType(ir.VoidType(), [WORD, LONG, *[WORD] * len(size)])
        constraints = ",".join(["r", "l", *"r" * len(size), "~{memory}"])
        builder.call(ir.InlineAsm(function, text, constraints, side_effect=True), [target, source, *size])

    return build


def copy_signature(array: Any, index: Any, source: Any, place: Any, *size: Any) -> Any:
    """Return the signature of an asynchronous copy."""
    return types.void(array, uint32, source, uint32, *[uint32] * len(size))


@llvm(copy_signature, build_cp_async("cp.async.ca.shared.global [$0], [$1], 4;"))
def cp_async_4(array, index, source, place):
    """Begin to copy 4 bytes to shared memory: array[index] = source[place], for words."""
    array[int(index)] = source[int(place)]


@llvm(copy_signature, build_cp_async("cp.async.cg.shared.global [$0], [$1], 16;"))
def cp_async_16(array, index, source, place):
    """Begin to copy 16 bytes to shared memory; `index` and `place` count words and must be divisible by four."""
    assert index % 4 == 0, "misaligned copy"
    assert place % 4 == 0, "misaligned copy"
    for i in range(4):
        array[int(index) + i] = source[int(place) + i]


@llvm(copy_signature, build_cp_async("cp.async.cg.shared.global [$0], [$1], 16, $2;"))
def cp_async_16_zero_fill(array, index, source, place, size):
    """Begin to copy `size` bytes (16 or 0) to shared memory, and zeros up to 16.

    Both sides must be aligned to 16 bytes.
    """
    assert index % 4 == 0, "misaligned copy"
    assert size == 0 or place % (16 // source.dtype.itemsize) == 0, "misaligned copy"
    here = range(int(place), int(place) + int(size) // source.dtype.itemsize)
    words = np.array([source[i] for i in here], source.dtype).view(np.uint32)
    for i in range(4):
        array[int(index) + i] = words[i] if size else 0


@ptx("cp.async.wait_all;", types.void)
def cp_async_wait_all():
    """Wait until all asynchronous copies of this thread have arrived."""


@ptx("cp.async.commit_group;", types.void)
def cp_async_commit():
    """Close a group: all copies that this thread began since the last group."""


@cache
def cp_async_wait_group(pending: int) -> Any:
    """Make a device function that waits until all but this thread's last `pending` groups of copies have arrived."""

    @ptx(f"cp.async.wait_group {pending};", types.void)
    def wait_group():
        pass

    return wait_group


# ---- Programmatic dependent launch: a kernel starts before the one before it has ended (Hopper and later)


@ptx("griddepcontrol.wait;", types.void)
def griddep_wait():
    """Wait until all kernels before this one have ended and their writes can be read."""


@ptx("griddepcontrol.launch_dependents;", types.void)
def griddep_launch_dependents():
    """Let the next kernel's blocks start now; they must call `griddep_wait` before they read what this one writes."""
