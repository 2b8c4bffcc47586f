"""Run a packed layer of torch tensors on a CPU: by the GEMV kernel of cpu.py, or as a dense GEMM for large batches.

What this adds to cpu.py and cpu_threads.py: it turns a layer's tensors into addresses once, and chooses the method.
Lookups read each sign word once for four rows of x; their cost grows with the rows. Unpacking reads each word once,
writes 4 bytes for each sign, and then multiplies by torch's BLAS, whose GEMM does more arithmetic a second. So a few
rows use lookups, and large batches are unpacked where that is faster (`CpuPackedLayer.is_quicker_unpacked`).

**Measured** for one row of x: 70 to 131 times faster than torch's bfloat16 layer at 0.1 bits, 22 to 26 times at 0.55
bits, on one core (book/results/cpu_linear.json).
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from ...reference.arrays import Array
from ..packing import PackedFactors, to_half
from . import cpu, cpu_threads
from .cpu_simd import LANES, LEVEL

# Cost model of large batches, in units of one sign addition of `add_nibbles`, fitted to times of layers with ranks of 1
# to 544. NEON was not measured, and is assumed to be like AVX2.
LARGE_BATCH = 32  # rows of x above which unpacking is considered
TABLE_COST = 20  # of one column of x: its share of making the lookup tables
PATH_COST = 60_000  # of one path, for each row of x
PRODUCT_COST = {"avx512": 1.3, "avx2": 0.8, "neon": 0.8, "plain": 0.9}[LEVEL]  # of one multiply-add in torch's BLAS
UNPACK_COST = {"avx512": 30, "avx2": 25, "neon": 25, "plain": 20}[LEVEL]  # of unpacking one sign


class CpuPackedLayer:
    """A packed layer as the addresses that the CPU kernels take, valid while its tensors stay where they are.

    Parameters
    ----------
    tensors : sequence of Tensor
        The five tensors of each path (u_words, v_words, h, ell, g), path after path, on a CPU.
    """

    def __init__(self, tensors: Sequence[Tensor]):
        paths = group_paths(tensors)
        self.table, self.kept = path_table(paths)
        self.d_out, self.d_in = paths[0].h.shape[0], paths[0].g.shape[0]
        self.ranks = [path.rank for path in paths]
        self.work = sum(self.ranks) * (self.d_out + self.d_in)  # sign additions for one row of x
        self.seen = [(tensor.data_ptr(), tensor.dtype, tensor.shape) for tensor in self.kept]

    def fits(self, tensors: Sequence[Tensor]) -> bool:
        """Return whether the kernels read exactly these tensors: same addresses, dtypes and shapes, all contiguous.

        False if a tensor had to be copied, and for tensors on another device, whose addresses differ.
        """
        return self.seen == [
            (tensor.data_ptr(), tensor.dtype, tensor.shape) for tensor in tensors if tensor.is_contiguous()
        ]

    def __call__(self, x: Tensor, kernel: int | None = None) -> Tensor:
        """Compute y = W_hat x for each row of x, on at most `torch.get_num_threads()` threads.

        Several Python threads may call it at once; one of them at a time uses the helper threads (cpu_threads.py).

        Parameters
        ----------
        x : (..., d_in) tensor
        kernel : int, optional
            One of `cpu.KERNELS`. By default the fastest, or torch's BLAS for large batches if that is faster.

        Returns
        -------
        (..., d_out) float32 tensor
        """
        if x.dtype != torch.float32 or not x.is_contiguous():
            x = x.to(torch.float32).contiguous()
        rows = x.numel() // self.d_in
        if kernel is None:
            if rows > LARGE_BATCH and self.is_quicker_unpacked(rows):
                return self.unpacked(x)
            kernel = cpu.BEST
        y = x.new_empty(*x.shape[:-1], self.d_out)
        arguments = kernel, self.table, self.d_out, self.d_in, x.data_ptr(), y.data_ptr(), rows
        if rows * self.work < cpu_threads.PARALLEL_WORK or torch.get_num_threads() == 1:
            cpu_threads.divided_layer(cpu_threads.solo_team(), *arguments)
            return y
        with cpu_threads.Team(None, self.scratch_floats(rows), (self.kept, x, y)) as team:
            cpu_threads.divided_layer(team, *arguments)
        return y

    def scratch_floats(self, rows: int) -> int:
        """Count the float32 that a thread needs for its share of a call: of the outputs or of the first stage's."""
        padded = sum(rank + LANES - 1 & -LANES for rank in self.ranks)
        return max(rows * self.d_out, min(rows, cpu_threads.BATCH_TILE) * padded)

    def is_quicker_unpacked(self, rows: int) -> bool:
        """Estimate whether two dense products take less time than lookups, by the cost model above.

        Lookups work on sixteen rows and 32 columns of signs at a time, so small layers waste some. Unpacking wins for
        many rows of x and small layers or processors without AVX-512.
        """
        lookups = 0
        for rank in self.ranks:
            words = rank + 31 & -32
            lookups += PATH_COST + ((rank + 15 & -LANES) + TABLE_COST) * self.d_in + words * (self.d_out + TABLE_COST)
        return (UNPACK_COST + PRODUCT_COST * rows) * self.work < rows * lookups

    def unpacked(self, x: Tensor) -> Tensor:
        """Compute y = B (A x) with A and B unpacked to float32: R * (d_in + d_out) numbers for a total rank R."""
        a, b = torch.empty(sum(self.ranks), self.d_in), torch.empty(self.d_out, sum(self.ranks))
        cpu.unpack(self.table, self.d_out, self.d_in, a.data_ptr(), b.data_ptr())
        return functional.linear(functional.linear(x, a), b)


def packed_linear(x: Tensor, paths: Sequence[PackedFactors], kernel: int | None = None) -> Tensor:
    """Compute `dispatch.packed_linear` for tensors on the CPU; see `CpuPackedLayer`."""
    return CpuPackedLayer([tensor for path in paths for tensor in path])(x, kernel)


def group_paths(tensors: Sequence[Tensor]) -> list[PackedFactors]:
    """Group the tensors of all paths, laid end to end, into PackedFactors."""
    count = len(PackedFactors._fields)
    return [PackedFactors(*tensors[at : at + count]) for at in range(0, len(tensors), count)]


def path_table(paths: Sequence[PackedFactors]) -> tuple[Array, list[Tensor]]:
    """Make the table of addresses and ranks that the kernels take, and the tensors that it points to.

    Returns
    -------
    table : (paths, 6) int64 array
    kept : list of Tensor
        Must live as long as the table is used. Words are int32 and scales float16; tensors that are not, or are not
        contiguous, are copied.
    """
    numbers: list[list[int]] = []
    kept = []
    for path in paths:
        scales = [to_half(name, getattr(path, name)) for name in ("h", "ell", "g")]  # the user may have cast the model
        tensors = [tensor.contiguous() for tensor in (widen_words(path.u_words), widen_words(path.v_words), *scales)]
        kept += tensors
        numbers.append([*(tensor.data_ptr() for tensor in tensors), path.ell.shape[0]])
    return np.array(numbers, np.int64), kept


def widen_words(words: Tensor) -> Tensor:
    """Convert words to int32, which the kernels read; narrower words get more pad bits, which are zeros."""
    if words.dtype == torch.int32:
        return words
    return words.to(torch.int32) & (1 << 8 * words.itemsize) - 1  # without the int16's sign
