"""The simple CUDA kernels of the packed layer, one warp a row: read these first."""

# What Numba makes of cuda.threadIdx and its like is not what their Python stand-ins say.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportOperatorIssue=false
# pyright: reportGeneralTypeIssues=false

from functools import cache, wraps
from typing import Any

from numba import cuda, float32, int32, types, uint32

from .cuda_intrinsics import as_float, halves, round_to_bfloat, round_to_half

POINTER = types.CPointer


HALVES, WORDS, SINGLES = POINTER(types.uint16), POINTER(types.uint32), POINTER(types.float32)


ELEMENTS = {"half": HALVES, "bfloat": HALVES, "single": SINGLES}


SIGNATURES: dict[Any, Any] = {}  # types of the arguments of the kernels that were made


RECIPES: dict[Any, str] = {}  # what they were made of


def kernel_factory(function: Any) -> Any:
    """Make each kernel of a function that makes kernels once, and remember what it was made of."""

    @cache
    @wraps(function)
    def made(*args: Any) -> Any:
        kernel = function(*args)
        RECIPES[kernel] = f"{function.__module__}.{function.__name__}{args}"
        return kernel

    return made


@cuda.jit(device=True, forceinline=True)
def half_at(array, index):
    """An element of an array of float16, whose bits are uint16."""
    return halves(uint32(array[uint32(index)]))[0]


@cuda.jit(device=True, forceinline=True)
def bfloat_at(array, index):
    """An element of an array of bfloat16, whose bits are uint16."""
    return as_float(uint32(array[uint32(index)]) << uint32(16))


@cuda.jit(device=True, forceinline=True)
def single_at(array, index):
    """An element of an array of float32."""
    return array[uint32(index)]


@cuda.jit(device=True, forceinline=True)
def same(value):
    """A float32 as it is."""
    return value


AT = {"half": half_at, "bfloat": bfloat_at, "single": single_at}


ROUND = {"half": round_to_half, "bfloat": round_to_bfloat, "single": same}


@cuda.jit(device=True, forceinline=True)
def warp_sum(value):
    """Sum over a warp, the same in every lane."""
    for distance in (16, 8, 4, 2, 1):
        value += cuda.shfl_xor_sync(0xFFFFFFFF, value, distance)
    return value


@kernel_factory
def plain_latent(kind: str) -> Any:
    """The first step of the ladder: part[b, offset + r] by one warp for each r, a sign at a time."""
    at_place = AT[kind]

    @cuda.jit
    def kernel(x, g, words, ell, part, rank, d_in, rows, ranks, offset):
        """Grid (rank / warps of a block, rows); `ranks` is the sum over paths."""
        lane, vector = int32(cuda.threadIdx.x & 31), int32(cuda.blockIdx.y)
        row = int32(cuda.blockIdx.x * int32(cuda.blockDim.x >> 5) + int32(cuda.threadIdx.x >> 5))
        width = int32(int32(d_in + 31) >> 5)
        if row < rank:
            total, column = float32(0), lane
            while column < d_in:
                value = at_place(x, int32(int32(vector * d_in) + column)) * half_at(g, column)
                minus = uint32(words[uint32(int32(row * width) + int32(column >> 5))]) >> uint32(lane) & uint32(1)
                total += -value if minus else value
                column = int32(column + 32)
            total = warp_sum(total)
            if lane == 0:
                part[uint32(int32(vector * ranks) + int32(offset + row))] = total * half_at(ell, row)

    SIGNATURES[kernel] = types.void(ELEMENTS[kind], HALVES, WORDS, HALVES, SINGLES, *[types.int32] * 5)
    return kernel


@kernel_factory
def plain_output(kind: str) -> Any:
    """The other half: y[b, o] by one warp for each o, over all paths."""
    rounded = ROUND[kind]

    @cuda.jit(device=True, forceinline=True)
    def row_sum(part, base, words, row, rank, lane):
        total, column, width = float32(0), lane, int32(int32(rank + 31) >> 5)
        while column < rank:
            value = part[uint32(base + column)]
            minus = uint32(words[uint32(int32(row * width) + int32(column >> 5))]) >> uint32(lane) & uint32(1)
            total += -value if minus else value
            column = int32(column + 32)
        return warp_sum(total)

    @cuda.jit
    def kernel(part, u_1, u_2, h_1, h_2, y, rank_1, rank_2, d_out):
        """Grid (d_out / warps of a block, rows)."""
        lane, vector = int32(cuda.threadIdx.x & 31), int32(cuda.blockIdx.y)
        row = int32(cuda.blockIdx.x * int32(cuda.blockDim.x >> 5) + int32(cuda.threadIdx.x >> 5))
        if row < d_out:
            base = int32(vector * int32(rank_1 + rank_2))
            total = row_sum(part, base, u_1, row, rank_1, lane) * half_at(h_1, row)
            if rank_2 > 0:
                total += row_sum(part, int32(base + rank_1), u_2, row, rank_2, lane) * half_at(h_2, row)
            if lane == 0:
                y[uint32(int32(vector * d_out) + row)] = rounded(total)

    SIGNATURES[kernel] = types.void(SINGLES, WORDS, WORDS, HALVES, HALVES, ELEMENTS[kind], *[types.int32] * 3)
    return kernel
