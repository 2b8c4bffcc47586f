"""Kernels that compute with packed signs, and the one place that chooses among them."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..packing import PackedFactors, check_words
from . import cpu


def packed_linear(x: Tensor, paths: Sequence[PackedFactors]) -> Tensor:
    """Sum of the paths' outputs for each row of x, from packed words.

    Parameters
    ----------
    x : (rows, d_in) float tensor
    paths : sequence of PackedFactors on x's device

    Returns
    -------
    (rows, d_out) float32 tensor.

    Raises
    ------
    ValueError
        If x needs a gradient, there is no kernel for its device, or the words do not fit the scales.
    """
    if x.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            "packed signs have no gradient: call the layer under torch.no_grad() or torch.inference_mode(), or train "
            "the LittleBitLinear that it was packed from"
        )
    if x.device.type != "cpu":
        raise ValueError(
            f"packed layers compute on the CPU, but the input is on {x.device}: move model and input there"
        )
    for path in paths:
        check_words(path.u_words, path.rank)
        check_words(path.v_words, x.shape[-1])
    wide = [path._replace(u_words=widened(path.u_words), v_words=widened(path.v_words)) for path in paths]
    return cpu.packed_linear(x, wide)


def widened(words: Tensor) -> Tensor:
    """Words as int32, which is all that the CPU kernels read; narrow ones get further pad bits, zeros as all are."""
    if words.dtype == torch.int32:
        return words
    return words.to(torch.int32) & (1 << 8 * words.itemsize) - 1  # without the int16's sign
