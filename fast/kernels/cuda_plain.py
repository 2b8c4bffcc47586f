"""Multiply packed signs with vectors by a naive CUDA GEMV: one warp for each row, one sign at a time.

Read this file first. A path of rank r is W = diag(h) U_sign diag(ell) V_sign^T diag(g) (LittleBit, arXiv 2506.13771).
So the layer is two matrix-vector products (GEMV) with signs, and there is a kernel for each:

    plain_latent   t[b, r] = ell_r sum_i V_sign[r, i] g_i x[b, i]            for each path
    plain_output   y[b, o] = sum over paths of h_o sum_r U_sign[o, r] t[b, r]

A sign is one bit: 0 for +1 and 1 for -1, least significant bit first, 32 to a word, each row filled up to whole words.
The 32 lanes of a warp read 32 neighbouring entries of x (one coalesced transaction) and one common word of signs, of
which each lane looks at its own bit. Shuffles add up the lanes' sums.

Bytes moved per output: d_in / 8 of signs for an entry of t, rank / 8 for an entry of y. The vectors stay in cache. A
layer of 28672 x 8192 at 0.55 bits has 16.2 MB, which the two kernels read in 108 us, at 6 % of the speed of a copy
(computed from book/results/cuda_linear.json, H100). Instructions are the limit: each sign costs a load, a shift, an AND
and a select. The next version, cuda_gemv.py, hands whole words of signs to the tensor cores.
"""

# int32() keeps index arithmetic in 32-bit registers; Numba would widen it to 64 bits. Numba gives cuda.threadIdx and
# integer types other meanings than their Python stand-ins.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportOperatorIssue=false
# pyright: reportGeneralTypeIssues=false

from typing import Any

from numba import cuda, float32, int32, types, uint32

from .cuda_elements import AT, ELEMENTS, HALVES, ROUND, SIGNATURES, SINGLES, WORDS, half_at, kernel_factory, warp_sum


@cuda.jit(device=True, forceinline=True)
def is_minus(words, words_per_row, row, column, lane):
    """Return the bit of the sign at (row, column): 1 for -1, 0 for +1; `lane` is column % 32."""
    word = words[uint32(int32(row * words_per_row) + int32(column >> 5))]
    return uint32(word) >> uint32(lane) & uint32(1)


@kernel_factory
def plain_latent(dtype: str) -> Any:
    """Make the first kernel, for x of a dtype in ELEMENTS: t[b, offset + r], one warp for each r."""
    load = AT[dtype]

    @cuda.jit
    def kernel(x, g, v_words, ell, t, rank, d_in, total_rank, offset):
        """Launch with a grid of (rank / warps of a block, rows of x).

        A row of t has `total_rank` entries, and this path's begin at `offset`.
        """
        lane, row_of_x = int32(cuda.threadIdx.x & 31), int32(cuda.blockIdx.y)
        row = int32(cuda.blockIdx.x * int32(cuda.blockDim.x >> 5) + int32(cuda.threadIdx.x >> 5))
        words_per_row = int32(int32(d_in + 31) >> 5)
        if row < rank:
            total, column = float32(0), lane
            while column < d_in:
                value = load(x, int32(int32(row_of_x * d_in) + column)) * half_at(g, column)
                total += -value if is_minus(v_words, words_per_row, row, column, lane) else value
                column = int32(column + 32)
            total = warp_sum(total)
            if lane == 0:
                t[uint32(int32(row_of_x * total_rank) + int32(offset + row))] = total * half_at(ell, row)

    SIGNATURES[kernel] = types.void(ELEMENTS[dtype], HALVES, WORDS, HALVES, SINGLES, *[types.int32] * 4)
    return kernel


@kernel_factory
def plain_output(dtype: str) -> Any:
    """Make the second kernel, for y of a dtype in ELEMENTS: y[b, o], one warp for each o."""
    rounded = ROUND[dtype]

    @cuda.jit(device=True, forceinline=True)
    def signed_sum(t, begin, u_words, row, rank, lane):
        """Sum a path's latents, from `begin` on, with the signs of a row of U."""
        total, column, words_per_row = float32(0), lane, int32(int32(rank + 31) >> 5)
        while column < rank:
            value = t[uint32(begin + column)]
            total += -value if is_minus(u_words, words_per_row, row, column, lane) else value
            column = int32(column + 32)
        return warp_sum(total)

    @cuda.jit
    def kernel(t, u_1, u_2, h_1, h_2, y, rank_1, rank_2, d_out):
        """Launch with a grid of (d_out / warps of a block, rows of x).

        `rank_2` is 0 for a layer of one path.
        """
        lane, row_of_x = int32(cuda.threadIdx.x & 31), int32(cuda.blockIdx.y)
        row = int32(cuda.blockIdx.x * int32(cuda.blockDim.x >> 5) + int32(cuda.threadIdx.x >> 5))
        if row < d_out:
            begin = int32(row_of_x * int32(rank_1 + rank_2))
            total = signed_sum(t, begin, u_1, row, rank_1, lane) * half_at(h_1, row)
            if rank_2 > 0:
                total += signed_sum(t, int32(begin + rank_1), u_2, row, rank_2, lane) * half_at(h_2, row)
            if lane == 0:
                y[uint32(int32(row_of_x * d_out) + row)] = rounded(total)

    SIGNATURES[kernel] = types.void(SINGLES, WORDS, WORDS, HALVES, HALVES, ELEMENTS[dtype], *[types.int32] * 3)
    return kernel
