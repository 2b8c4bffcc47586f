"""Kernels that compute with packed signs, and the one place that chooses among them."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..packing import PackedFactors
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
        If x needs a gradient, or there is no kernel for its device.
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
    return cpu.packed_linear(x, paths)
