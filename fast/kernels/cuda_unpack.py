"""Unpack signs to 16-bit matrices on a GPU, so that cuBLAS multiplies large batches: the last version of the GEMM.

All paths of a layer become one pair of matrices, for two dense GEMMs:

    A[r, i] = 2^e V_sign[r, i] g_i    B[o, r] = 2^-e h_o U_sign[o, r] ell_r    y = B (A x)

The change over cuda_gemm.py: signs are turned into numbers once for a call, not once for each tile of vectors. That
pays from some hundreds of rows on (cuda_schedule.is_faster_unpacked). With 1024 rows and more a layer of 28672 x 8192
at 0.1 bits is then 5 to 7 times as fast as cuBLAS's dense one, and at 0.55 bits 1.4 to 1.6 times
(book/results/cuda_batches.json, H100).

Bytes moved: the signs are read once, and 2 * R * (d_in + d_out) bytes are written and read again, R the sum of ranks.
Stores are coalesced: a lane writes 16 bytes, eight entries of a row, and its neighbour the next eight.

One launch writes both matrices. Products of float16 scales may exceed float16, so e is the least integer from 0 that
brings all h ell below 2^15. Powers of two are exact, so y needs no further factor. In bfloat16 the products fit, and e
is 0. Every block finds e itself, from scales in the L2 cache; a captured graph therefore reads the scales as they are
when it is replayed. A scale that is not finite does not count for e and is multiplied as usual.
"""

# Numba gives cuda.threadIdx, tuples and integer types other meanings than their Python stand-ins.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportOperatorIssue=false
# pyright: reportGeneralTypeIssues=false, reportOptionalSubscript=false

from functools import partial
from typing import Any

from numba import cuda, float32, int32, types, uint32

from .cuda_elements import HALVES, ROUND, SIGNATURES, WORDS, absmax8, half_at, half_load8, kernel_factory, load8
from .cuda_intrinsics import as_bits, as_float, griddep_wait, larger, store4, warp_max
from .cuda_mma import SIGN_BITS

UNPACK_THREADS = 256  # threads of a block
UNPACK_BLOCKS = 4  # most blocks for each multiprocessor: each block reads all scales
TILE_ROWS = 8
TILE_COLUMNS8 = 32  # groups of eight columns of a tile, one for each lane
LARGEST_EXPONENT = 141  # float32's biased exponent of numbers from 2^14, below 2^15


@kernel_factory
def unpack(dtype: str, paths: int, pdl: bool) -> Any:
    """Make the kernel that unpacks the factors of `paths` paths to "half" or "bfloat".

    With `pdl` it may be started before the kernel before it has ended (programmatic dependent launch).
    """
    rounded, load8_padded, pieces = ROUND[dtype], load8(False), 2 * paths

    @cuda.jit(device=True, forceinline=True)
    def eight(scales, column, count):
        """Load eight scales, with zeros beyond the end."""
        if column + 8 <= count:
            return half_load8(scales, column)
        return load8_padded(scales, half_at, half_load8, int32(0), column, count)

    @cuda.jit(device=True, forceinline=True)
    def thread_absmax(scales, count, thread, threads):
        """Find the largest magnitude of the scales that a thread looks at."""
        largest, column = float32(0), int32(thread << 3)
        while column < count:
            largest = larger(largest, absmax8(eight(scales, column, count)))
            column = int32(column + int32(threads << 3))
        return largest

    @cuda.jit(device=True, forceinline=True)
    def power_of_two(scales, hs, rows, columns):
        """Find 2^e; all threads of a block take part."""
        thread, threads = int32(cuda.threadIdx.x), int32(cuda.blockDim.x)
        lane, warp, warps = int32(thread & 31), int32(thread >> 5), int32(threads >> 5)
        shared = cuda.shared.array(0, uint32)
        h = ell = float32(0)
        for path in range(paths):
            h = larger(h, thread_absmax(hs[path], int32(rows[paths + path]), thread, threads))
            ell = larger(ell, thread_absmax(scales[paths + path], int32(columns[paths + path]), thread, threads))
        h_bits, ell_bits = warp_max(as_bits(h)), warp_max(as_bits(ell))
        if lane == 0:
            shared[uint32(warp)], shared[uint32(warps + warp)] = h_bits, ell_bits
        cuda.syncthreads()
        h_bits = warp_max(shared[uint32(lane)] if lane < warps else uint32(0))
        ell_bits = warp_max(shared[uint32(warps + lane)] if lane < warps else uint32(0))
        exponent = uint32(as_bits(as_float(h_bits) * as_float(ell_bits)) >> uint32(23))
        exponent = exponent if exponent < uint32(255) else uint32(0)
        return as_float(
            uint32((max(exponent, uint32(LARGEST_EXPONENT)) - uint32(LARGEST_EXPONENT - 127)) << uint32(23))
        )

    @cuda.jit(device=True, forceinline=True)
    def eight_signs(words, row, last, width, column):
        """Load the signs of a row's eight columns as eight bits."""
        word = uint32(words[uint32(int32(min(row, last) * width) + int32(column >> 5))])
        return uint32(uint32(word >> uint32(column & 31)) & uint32(0xFF))

    @cuda.jit(device=True, forceinline=True)
    def signed_pair(low, high, minus):
        """Round two entries to a word and flip their signs by the two lowest bits of `minus`."""
        word = uint32(uint32(rounded(low)) | uint32(rounded(high)) << uint32(16))
        # The product moves bits 0 and 1 to bits 15 and 31
        return uint32(word ^ uint32(uint32(minus * uint32(0x40008000)) & uint32(SIGN_BITS)))

    @cuda.jit(device=True, forceinline=True)
    def store_signed8(out, place, v, scale, minus):
        """Store eight entries of a row, times a scale and signs."""
        a = signed_pair(v[0] * scale, v[1] * scale, minus)
        b = signed_pair(v[2] * scale, v[3] * scale, minus >> uint32(2))
        c = signed_pair(v[4] * scale, v[5] * scale, minus >> uint32(4))
        d = signed_pair(v[6] * scale, v[7] * scale, minus >> uint32(6))
        store4(out, uint32(place << 2), a, b, c, d)

    @cuda.jit(device=True, forceinline=True)
    def row_scale(h, row, last, unit, of_b):
        """Return the factor of a row's entries: 2^e in A, 2^-e h in B, and 0 in A's padding."""
        if of_b:
            return half_at(h, min(row, last)) * as_float(uint32(uint32(0x7F000000) - as_bits(unit)))
        return unit if row <= last else float32(0)

    @cuda.jit
    def kernel(words, scales, hs, heights, rows, columns, widths, starts, strides, first_tiles, out, tiles):
        """Launch with any grid: warps take the tiles in turn, each of TILE_ROWS rows and 8 * TILE_COLUMNS8 columns.

        A piece is the part of A or B of one path; the pieces of A come first. Tuples have an entry for each piece:
        words of signs, of shape (rows, columns); scales of columns; rows to write, with zeros beyond the signs
        (heights); groups of eight columns to write (widths); where the piece begins in `out` (starts), and the distance
        of its rows (strides), in groups of eight; and its first tile (first_tiles). `hs` has an entry for each path.
        """
        lane, warp, warps = int32(cuda.threadIdx.x & 31), int32(cuda.threadIdx.x >> 5), int32(cuda.blockDim.x >> 5)
        tile = int32(int32(cuda.blockIdx.x * warps) + warp)
        if pdl:
            griddep_wait()
        unit = power_of_two(scales, hs, rows, columns) if dtype == "half" else float32(1)
        while tile < tiles:
            piece = int32(0)
            for following in range(1, pieces):
                piece = int32(following) if tile >= first_tiles[following] else piece
            count, width, height = int32(columns[piece]), int32(widths[piece]), int32(heights[piece])
            across = uint32(uint32(width + TILE_COLUMNS8 - 1) // uint32(TILE_COLUMNS8))
            inner = uint32(tile - first_tiles[piece])
            down = uint32(inner // across)
            row, group = int32(TILE_ROWS * down), int32(TILE_COLUMNS8 * uint32(inner - uint32(down * across)) + lane)
            if group < width:
                column, signs, h = int32(group << 3), words[piece], hs[max(piece - paths, 0)]
                v, of_b = eight(scales[piece], column, count), piece >= paths
                last, of_row, stride = int32(rows[piece] - 1), int32(int32(count + 31) >> 5), int32(strides[piece])
                place = int32(int32(starts[piece] + group) + int32(row * stride))
                for _ in range(TILE_ROWS // 4):  # four loads are in flight at once
                    one, two, three = int32(row + 1), int32(row + 2), int32(row + 3)
                    a, scale_a = eight_signs(signs, row, last, of_row, column), row_scale(h, row, last, unit, of_b)
                    b, scale_b = eight_signs(signs, one, last, of_row, column), row_scale(h, one, last, unit, of_b)
                    c, scale_c = eight_signs(signs, two, last, of_row, column), row_scale(h, two, last, unit, of_b)
                    d, scale_d = eight_signs(signs, three, last, of_row, column), row_scale(h, three, last, unit, of_b)
                    if row < height:
                        store_signed8(out, place, v, scale_a, a)
                    if one < height:
                        store_signed8(out, int32(place + stride), v, scale_b, b)
                    if two < height:
                        store_signed8(out, int32(place + 2 * stride), v, scale_c, c)
                    if three < height:
                        store_signed8(out, int32(place + 3 * stride), v, scale_d, d)
                    row, place = int32(row + 4), int32(place + 4 * stride)
            tile = int32(tile + int32(warps * int32(cuda.gridDim.x)))

    of_paths, of_pieces = partial(types.UniTuple, count=paths), partial(types.UniTuple, count=pieces)
    SIGNATURES[kernel] = types.void(
        of_pieces(WORDS), of_pieces(HALVES), of_paths(HALVES), *[of_pieces(types.int32)] * 7, WORDS, types.int32
    )
    return kernel
