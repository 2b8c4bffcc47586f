"""Unpacking signs on NVIDIA GPUs: all paths of a layer as one pair of matrices of 16 bits, for two products by cuBLAS.

    A[r, i] = 2^e V_sign[r, i] g_i    B[o, r] = 2^-e h_o U_sign[o, r] ell_r    y = B (A x)

One launch writes both. Since products of float16 scales need not fit float16, e is the least number, from 0, that
brings all h ell below 2^15: powers of two are exact, so y needs no factor. In bfloat16, where they fit, e is 0. Every
block finds e itself, from scales that the second-level cache holds, and so a graph finds those that are there when it
is replayed. A scale that is not finite counts as none, and goes where it belongs.
"""

# What Numba makes of cuda.threadIdx and its like is not what their Python stand-ins say.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportOperatorIssue=false
# pyright: reportGeneralTypeIssues=false

from functools import partial
from typing import Any

from numba import cuda, float32, int32, types, uint32

from .cuda_gemv import eights, half_eight, largest_of
from .cuda_intrinsics import as_bits, as_float, larger, wait, warp_max
from .cuda_mma import SIGNS, store4
from .cuda_plain import HALVES, ROUND, SIGNATURES, WORDS, half_at, kernel_factory

UNPACKING_THREADS = 256  # of a block
UNPACKING_BLOCKS = 4  # for each multiprocessor, at most: each reads all scales
STRIP = 8  # rows of a tile
ACROSS = 32  # eights of columns of a tile, one for each lane
LARGEST = 141  # how the exponent of numbers from 2^14, below 2^15, is stored in float32


@kernel_factory
def unpacking(kind: str, paths: int, early: bool) -> Any:
    """The kernel for float16 or bfloat16; with `early` it may be started before the kernel before it has ended."""
    rounded, some, pieces = ROUND[kind], eights(False), 2 * paths

    @cuda.jit(device=True, forceinline=True)
    def eight(scales, column, count):
        if column + 8 <= count:
            return half_eight(scales, column)
        return some(scales, half_at, half_eight, int32(0), column, count)

    @cuda.jit(device=True, forceinline=True)
    def largest_in(scales, count, thread, threads):
        largest, column = float32(0), int32(thread << 3)
        while column < count:
            largest = larger(largest, largest_of(eight(scales, column, count)))
            column = int32(column + int32(threads << 3))
        return largest

    @cuda.jit(device=True, forceinline=True)
    def unit_of(scales, hs, rows, columns):
        """Two to the power of e, which all threads of a block find together."""
        thread, threads = int32(cuda.threadIdx.x), int32(cuda.blockDim.x)
        lane, warp, warps = int32(thread & 31), int32(thread >> 5), int32(threads >> 5)
        shared = cuda.shared.array(0, uint32)
        h = ell = float32(0)
        for path in range(paths):
            h = larger(h, largest_in(hs[path], int32(rows[paths + path]), thread, threads))
            ell = larger(ell, largest_in(scales[paths + path], int32(columns[paths + path]), thread, threads))
        h_bits, ell_bits = warp_max(as_bits(h)), warp_max(as_bits(ell))
        if lane == 0:
            shared[uint32(warp)], shared[uint32(warps + warp)] = h_bits, ell_bits
        cuda.syncthreads()
        h_bits = warp_max(shared[uint32(lane)] if lane < warps else uint32(0))
        ell_bits = warp_max(shared[uint32(warps + lane)] if lane < warps else uint32(0))
        exponent = uint32(as_bits(as_float(h_bits) * as_float(ell_bits)) >> uint32(23))
        exponent = exponent if exponent < uint32(255) else uint32(0)
        return as_float(uint32((max(exponent, uint32(LARGEST)) - uint32(LARGEST - 127)) << uint32(23)))

    @cuda.jit(device=True, forceinline=True)
    def minus_at(words, row, last, width, column):
        """The signs of a row's eight columns, as bits."""
        word = uint32(words[uint32(int32(min(row, last) * width) + int32(column >> 5))])
        return uint32(uint32(word >> uint32(column & 31)) & uint32(0xFF))

    @cuda.jit(device=True, forceinline=True)
    def pair(low, high, minus):
        """Two entries, whose signs are the lowest bits of `minus`, as a word."""
        word = uint32(uint32(rounded(low)) | uint32(rounded(high)) << uint32(16))
        return uint32(word ^ uint32(uint32(minus * uint32(0x40008000)) & uint32(SIGNS)))  # bits 0 and 1 to 15 and 31

    @cuda.jit(device=True, forceinline=True)
    def put(out, place, v, scale, minus):
        a, b = pair(v[0] * scale, v[1] * scale, minus), pair(v[2] * scale, v[3] * scale, minus >> uint32(2))
        c = pair(v[4] * scale, v[5] * scale, minus >> uint32(4))
        store4(out, uint32(place << 2), a, b, c, pair(v[6] * scale, v[7] * scale, minus >> uint32(6)))

    @cuda.jit(device=True, forceinline=True)
    def scale_of(h, row, last, unit, second):
        """What a row's entries are multiplied with."""
        if second:
            return half_at(h, min(row, last)) * as_float(uint32(uint32(0x7F000000) - as_bits(unit)))
        return unit if row <= last else float32(0)

    @cuda.jit
    def kernel(words, scales, hs, heights, rows, columns, widths, starts, strides, begins, out, tiles):
        """Any grid: warps take tiles by turns, each of STRIP rows and as many eights of columns as there are lanes.

        A piece is what A or B has of a path, first those of A. Of each: words of signs, which are (rows, columns),
        scales of columns, rows to be written, those beyond the signs as zeros (heights), eights of columns to be
        written, likewise (widths), where in `out`, in eights, it begins (starts), and its next row (strides), and its
        first tile (begins). `hs` is of each path.
        """
        lane, warp, warps = int32(cuda.threadIdx.x & 31), int32(cuda.threadIdx.x >> 5), int32(cuda.blockDim.x >> 5)
        tile = int32(int32(cuda.blockIdx.x * warps) + warp)
        if early:
            wait()
        unit = unit_of(scales, hs, rows, columns) if kind == "half" else float32(1)
        while tile < tiles:
            piece = int32(0)
            for following in range(1, pieces):
                piece = int32(following) if tile >= begins[following] else piece
            count, width, height = int32(columns[piece]), int32(widths[piece]), int32(heights[piece])
            across, inner = uint32(uint32(width + ACROSS - 1) // uint32(ACROSS)), uint32(tile - begins[piece])
            down = uint32(inner // across)
            row, eighth = int32(STRIP * down), int32(ACROSS * uint32(inner - uint32(down * across)) + lane)
            if eighth < width:
                column, signs, h = int32(eighth << 3), words[piece], hs[max(piece - paths, 0)]
                v, second = eight(scales[piece], column, count), piece >= paths
                last, of_row, stride = int32(rows[piece] - 1), int32(int32(count + 31) >> 5), int32(strides[piece])
                place = int32(int32(starts[piece] + eighth) + int32(row * stride))
                for _ in range(STRIP // 4):
                    one, two, three = int32(row + 1), int32(row + 2), int32(row + 3)
                    a, scale_a = minus_at(signs, row, last, of_row, column), scale_of(h, row, last, unit, second)
                    b, scale_b = minus_at(signs, one, last, of_row, column), scale_of(h, one, last, unit, second)
                    c, scale_c = minus_at(signs, two, last, of_row, column), scale_of(h, two, last, unit, second)
                    d, scale_d = minus_at(signs, three, last, of_row, column), scale_of(h, three, last, unit, second)
                    if row < height:
                        put(out, place, v, scale_a, a)
                    if one < height:
                        put(out, int32(place + stride), v, scale_b, b)
                    if two < height:
                        put(out, int32(place + 2 * stride), v, scale_c, c)
                    if three < height:
                        put(out, int32(place + 3 * stride), v, scale_d, d)
                    row, place = int32(row + 4), int32(place + 4 * stride)
            tile = int32(tile + int32(warps * int32(cuda.gridDim.x)))

    of_paths, of_pieces = partial(types.UniTuple, count=paths), partial(types.UniTuple, count=pieces)
    SIGNATURES[kernel] = types.void(
        of_pieces(WORDS), of_pieces(HALVES), of_paths(HALVES), *[of_pieces(types.int32)] * 7, WORDS, types.int32
    )
    return kernel
