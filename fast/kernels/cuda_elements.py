"""Load, convert and combine vector elements on a GPU: float16, bfloat16 and float32, one or eight at a time.

Kernels get arrays as bare pointers: uint16 for float16 and bfloat16, uint32 for packed signs. Eight neighbouring 16-bit
elements are one 16-byte load, the widest there is; a warp's loads of this width are coalesced. All arithmetic is in
float32.

Also here: `kernel_factory`, which remembers the types of a kernel's arguments for the compiler (cuda_driver.py).
"""

# Numba gives cuda.threadIdx, tuples and integer types other meanings than their Python stand-ins.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportOperatorIssue=false
# pyright: reportGeneralTypeIssues=false

from functools import cache, wraps
from typing import Any

from numba import cuda, float32, int32, types, uint32

from .cuda_intrinsics import as_float, exponential, halves, larger, load_words, round_to_bfloat, round_to_half

POINTER = types.CPointer
HALVES, WORDS, SINGLES = POINTER(types.uint16), POINTER(types.uint32), POINTER(types.float32)
ELEMENTS = {"half": HALVES, "bfloat": HALVES, "single": SINGLES}  # by the name of a dtype: cuda_schedule.DTYPE_NAMES

SIGNATURES: dict[Any, Any] = {}  # types of each kernel's arguments
RECIPES: dict[Any, str] = {}  # the factory call that made each kernel, which names its PTX in the cache


def kernel_factory(function: Any) -> Any:
    """Decorate a function that makes kernels: make each kernel once, and record the call in RECIPES."""

    @cache
    @wraps(function)
    def factory(*args: Any) -> Any:
        kernel = function(*args)
        RECIPES[kernel] = f"{function.__module__}.{function.__name__}{args}"
        return kernel

    return factory


# ---- One element


@cuda.jit(device=True, forceinline=True)
def half_at(array, index):
    """Load a float16, stored as uint16, as float32."""
    return halves(uint32(array[uint32(index)]))[0]


@cuda.jit(device=True, forceinline=True)
def bfloat_at(array, index):
    """Load a bfloat16, stored as uint16, as float32."""
    return as_float(uint32(array[uint32(index)]) << uint32(16))


@cuda.jit(device=True, forceinline=True)
def single_at(array, index):
    """Load a float32."""
    return array[uint32(index)]


@cuda.jit(device=True, forceinline=True)
def identity(value):
    """Return a float32 unchanged."""
    return value


@cuda.jit(device=True, forceinline=True)
def silu(value):
    """Compute the sigmoid linear unit: value * sigmoid(value)."""
    return value / (float32(1) + exponential(-value))


AT = {"half": half_at, "bfloat": bfloat_at, "single": single_at}
ROUND = {"half": round_to_half, "bfloat": round_to_bfloat, "single": identity}


@cuda.jit(device=True, forceinline=True)
def warp_sum(value):
    """Sum a float32 over a warp by a butterfly of shuffles; every lane gets the total."""
    for distance in (16, 8, 4, 2, 1):
        value += cuda.shfl_xor_sync(0xFFFFFFFF, value, distance)
    return value


# ---- Eight elements


load2, load4 = load_words(2), load_words(4)


@cuda.jit(device=True, forceinline=True)
def half_load8(array, index):
    """Load eight float16 as float32; `index` must be divisible by eight."""
    k, m, n, o = load4(array, uint32(index))
    (a, b), (c, d), (e, f), (g, h) = halves(k), halves(m), halves(n), halves(o)
    return a, b, c, d, e, f, g, h


@cuda.jit(device=True, forceinline=True)
def bfloat_load8(array, index):
    """Load eight bfloat16 as float32; `index` must be divisible by eight."""
    k, m, n, o = load4(array, uint32(index))
    up, upper = uint32(16), uint32(0xFFFF0000)
    return (
        as_float(k << up), as_float(k & upper), as_float(m << up), as_float(m & upper),
        as_float(n << up), as_float(n & upper), as_float(o << up), as_float(o & upper),
    )  # fmt: skip


@cuda.jit(device=True, forceinline=True)
def single_load8(array, index):
    """Load eight float32; `index` must be divisible by four."""
    a, b, c, d = load4(array, uint32(index))
    e, f, g, h = load4(array, uint32(index + 4))
    return (
        as_float(a), as_float(b), as_float(c), as_float(d), as_float(e), as_float(f), as_float(g), as_float(h),
    )  # fmt: skip


LOAD8 = {"half": half_load8, "bfloat": bfloat_load8, "single": single_load8}


@cache
def load8(aligned: bool) -> Any:
    """Make a device function that loads eight entries of a vector, with zeros beyond its end.

    It takes the array, the functions of AT and LOAD8 for its dtype, the index where the vector begins, the column, and
    the number of columns. `aligned` says that vectors have a multiple of eight entries, so that one wide load serves.
    """

    @cuda.jit(device=True, forceinline=True)
    def one(array, at, base, column, count):
        return at(array, int32(base + column)) if column < count else float32(0)

    @cuda.jit(device=True, forceinline=True)
    def load(array, at, at_once, base, column, count):
        if aligned:
            return at_once(array, int32(base + column)) if column < count else zeros8()
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

    return load


@cuda.jit(device=True, forceinline=True)
def zeros8():
    """Return eight float32 zeros."""
    return float32(0), float32(0), float32(0), float32(0), float32(0), float32(0), float32(0), float32(0)


@cuda.jit(device=True, forceinline=True)
def mul8(a, b):
    """Multiply eight numbers element by element."""
    return (
        a[0] * b[0], a[1] * b[1], a[2] * b[2], a[3] * b[3], a[4] * b[4], a[5] * b[5], a[6] * b[6], a[7] * b[7],
    )  # fmt: skip


@cuda.jit(device=True, forceinline=True)
def add8(a, b):
    """Add eight numbers element by element."""
    return (
        a[0] + b[0], a[1] + b[1], a[2] + b[2], a[3] + b[3], a[4] + b[4], a[5] + b[5], a[6] + b[6], a[7] + b[7],
    )  # fmt: skip


@cuda.jit(device=True, forceinline=True)
def scale8(a, factor):
    """Multiply eight numbers by a factor."""
    return (
        a[0] * factor, a[1] * factor, a[2] * factor, a[3] * factor,
        a[4] * factor, a[5] * factor, a[6] * factor, a[7] * factor,
    )  # fmt: skip


@cuda.jit(device=True, forceinline=True)
def absmax8(v):
    """Return the largest magnitude of eight numbers, or NaN if one is NaN."""
    one = larger(larger(abs(v[0]), abs(v[1])), larger(abs(v[2]), abs(v[3])))
    return larger(one, larger(larger(abs(v[4]), abs(v[5])), larger(abs(v[6]), abs(v[7]))))


# ---- Four numbers


@cuda.jit(device=True, forceinline=True)
def mul4(a, b):
    """Multiply four numbers element by element."""
    return a[0] * b[0], a[1] * b[1], a[2] * b[2], a[3] * b[3]


@cuda.jit(device=True, forceinline=True)
def add4(a, b):
    """Add four numbers element by element."""
    return a[0] + b[0], a[1] + b[1], a[2] + b[2], a[3] + b[3]


@cuda.jit(device=True, forceinline=True)
def scale4(a, factor):
    """Multiply four numbers by a factor."""
    return a[0] * factor, a[1] * factor, a[2] * factor, a[3] * factor
