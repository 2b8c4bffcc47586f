"""A packed layer of tensors as the numbers that the kernels of cpu.py take, and the choice between them and BLAS."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from ..packing import PackedFactors, to_half
from . import cpu, cpu_threads
from .cpu_simd import LANES, LEVEL

# What large batches cost, in the time of a sign addition of `nibbles`, as measured with 1 to 544 signs a row; not
# measured with NEON, which is taken to be like AVX2
LARGE_BATCH = 32  # rows of x above which unpacking is thought of
TABLE_COST = 20  # of a column of x: its share of making the tables
PATH_COST = 60_000  # of a path, for each row of x
# of a multiplication and addition in torch's BLAS
PRODUCT_COST = {"avx512": 1.3, "avx2": 0.8, "neon": 0.8, "plain": 0.9}[LEVEL]
UNPACK_COST = {"avx512": 30, "avx2": 25, "neon": 25, "plain": 20}[LEVEL]  # of unpacking one sign


class Plan:
    """A layer's paths as the numbers that the kernels take, for as long as its tensors stay what they are.

    Parameters
    ----------
    tensors : the tensors of all paths one after the other, on a CPU, of fitting shapes and dtypes
    """

    def __init__(self, tensors: Sequence[Tensor]):
        paths = batched(tensors)
        self.numbers, self.kept = layer_plan(paths)
        self.d_out, self.d_in = paths[0].h.shape[0], paths[0].g.shape[0]
        self.ranks = [path.rank for path in paths]
        self.work = sum(self.ranks) * (self.d_out + self.d_in)  # sign additions for a row of x
        self.seen = [(tensor.data_ptr(), tensor.dtype, tensor.shape) for tensor in self.kept]

    def fits(self, tensors: Sequence[Tensor]) -> bool:
        """Whether the plan reads just these tensors: the same memory, of the same shapes and dtypes, row after row.

        Never for tensors that it had to copy. No other device has an address of this one's memory.
        """
        return self.seen == [
            (tensor.data_ptr(), tensor.dtype, tensor.shape) for tensor in tensors if tensor.is_contiguous()
        ]

    def __call__(self, x: Tensor, kernel: int | None = None) -> Tensor:
        """(..., d_out) float32 from (..., d_in), on at most torch.get_num_threads() threads.

        `kernel` is one of cpu.KERNELS; by default the best, or for large batches torch's BLAS if that is quicker.
        Several Python threads may call it at once; one of them at a time uses the helpers (cpu_threads.py).
        """
        if x.dtype != torch.float32 or not x.is_contiguous():
            x = x.to(torch.float32).contiguous()
        rows = x.numel() // self.d_in
        if kernel is None:
            if rows > LARGE_BATCH and self.is_quicker_unpacked(rows):
                return self.unpacked(x)
            kernel = cpu.BEST
        y = x.new_empty(*x.shape[:-1], self.d_out)
        arguments = kernel, self.numbers, self.d_out, self.d_in, x.data_ptr(), y.data_ptr(), rows
        if rows * self.work < cpu_threads.PARALLEL_WORK or torch.get_num_threads() == 1:
            cpu_threads.layer(cpu_threads.row_alone(), *arguments)
            return y
        with cpu_threads.Team(None, self.floats(rows), (self.kept, x, y)) as team:
            cpu_threads.layer(team, *arguments)
        return y

    def floats(self, rows: int) -> int:
        """Space that a thread needs for its part of a call: of the outputs, or of what the first stage leaves."""
        padded = sum(rank + LANES - 1 & -LANES for rank in self.ranks)
        return max(rows * self.d_out, min(rows, cpu_threads.FOUR) * padded)

    def is_quicker_unpacked(self, rows: int) -> bool:
        """Whether two dense products take less time than lookups, which work on sixteen rows and 32 columns of signs.

        They do for small layers, for a processor without AVX-512, and for neither when there are few rows of x.
        """
        lookups = 0
        for rank in self.ranks:
            words = rank + 31 & -32
            lookups += PATH_COST + ((rank + 15 & -LANES) + TABLE_COST) * self.d_in + words * (self.d_out + TABLE_COST)
        return (UNPACK_COST + PRODUCT_COST * rows) * self.work < rows * lookups

    def unpacked(self, x: Tensor) -> Tensor:
        """The same by unpacking to float32, R * (d_in + d_out) numbers for a total rank R, and two dense products."""
        a, b = torch.empty(sum(self.ranks), self.d_in), torch.empty(self.d_out, sum(self.ranks))
        cpu.unpack(self.numbers, self.d_out, self.d_in, a.data_ptr(), b.data_ptr())
        return functional.linear(functional.linear(x, a), b)


def packed_linear(x: Tensor, paths: Sequence[PackedFactors], kernel: int | None = None) -> Tensor:
    """`dispatch.packed_linear` for tensors on the CPU; see `Plan`."""
    return Plan([tensor for path in paths for tensor in path])(x, kernel)


def batched(tensors: Sequence[Tensor]) -> list[PackedFactors]:
    """The paths, from their tensors one after the other."""
    count = len(PackedFactors._fields)
    return [PackedFactors(*tensors[at : at + count]) for at in range(0, len(tensors), count)]


def layer_plan(paths: Sequence[PackedFactors]) -> tuple[np.ndarray, list[Tensor]]:
    """Six numbers for each path, (paths * 6,) int64, and the tensors that must live as long as they are used."""
    numbers: list[int] = []
    kept = []
    for path in paths:
        scales = [to_half(name, getattr(path, name)) for name in ("h", "ell", "g")]  # a model's dtype may be another
        for tensor in (widened(path.u_words), widened(path.v_words), *scales):
            kept.append(tensor if tensor.is_contiguous() else tensor.contiguous())
            numbers.append(kept[-1].data_ptr())
        numbers.append(path.ell.shape[0])
    return np.array(numbers, np.int64), kept


def widened(words: Tensor) -> Tensor:
    """Words as int32, which is all that the kernels read; narrow ones get further pad bits, zeros as all are."""
    if words.dtype == torch.int32:
        return words
    return words.to(torch.int32) & (1 << 8 * words.itemsize) - 1  # without the int16's sign
