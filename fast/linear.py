"""The layer itself: y = W_hat x + b, without ever forming W_hat (LittleBit, arXiv 2506.13771, equation 5)."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from . import kernels
from .factors import Factors
from .packing import PackedFactors


def linear(x: Tensor, paths: Sequence[Factors], bias: Tensor | None = None) -> Tensor:
    """Sum of the paths' outputs.

    y = sum over paths of ((((x * g) V_sign) * ell) U_sign^T) * h, plus the bias. All paths are folded into one pair
    of factors, y = B (A x), so that the scales cost nothing per row of x.

    Parameters
    ----------
    x : (..., d_in) float tensor
    paths : sequence of Factors
    bias : (d_out,) float tensor, optional

    Returns
    -------
    (..., d_out) tensor of x's dtype; 2 * rank * (d_in + d_out) additions per row of x and path.

    Raises
    ------
    ValueError
        If x's last axis is not d_in.

    Examples
    --------
    >>> from littlebit.fast import dual_svid
    >>> path = dual_svid(torch.tensor([[1.0, -2.0], [-2.0, 4.0]]), rank=1)
    >>> linear(torch.tensor([1.0, 1.0]), [path]).round(decimals=4)
    tensor([-1.,  2.])
    """
    check_input(x, paths)
    a, b = folded(paths)
    bias = None if bias is None else bias.to(x.dtype)
    return functional.linear(functional.linear(x, a.to(x.dtype)), b.to(x.dtype), bias)


def folded(paths: Sequence[Factors]) -> tuple[Tensor, Tensor]:
    """All paths as one pair: A = [V_sign * g]^T stacked, (R, d_in), and B = [h * U_sign * ell] in a row, (d_out, R)."""
    a = torch.cat([(path.g[..., :, None] * path.v_sign).mT for path in paths], dim=-2)
    b = torch.cat([path.h[..., :, None] * path.u_sign * path.ell[..., None, :] for path in paths], dim=-1)
    return a, b


def packed_linear(x: Tensor, paths: Sequence[PackedFactors], bias: Tensor | None = None) -> Tensor:
    """`linear` from packed words, accumulated in float32; nothing is unpacked to a dense matrix.

    Parameters
    ----------
    x : (..., d_in) float tensor
    paths : sequence of PackedFactors
    bias : (d_out,) float tensor, optional

    Returns
    -------
    (..., d_out) tensor of x's dtype.

    Raises
    ------
    ValueError
        If x's last axis is not d_in, or the words do not fit the scales.
    """
    check_input(x, paths)
    y = kernels.packed_linear(x.reshape(-1, x.shape[-1]), paths)  # (rows, d_out) float32
    if bias is not None:
        y += bias
    return y.to(x.dtype).reshape(*x.shape[:-1], y.shape[-1])


def check_input(x: Tensor, paths: Sequence[Factors] | Sequence[PackedFactors]) -> None:
    """Raise ValueError unless x's last axis is d_in."""
    d_in = paths[0].g.shape[-1]
    if x.shape[-1] != d_in:
        raise ValueError(f"the input's last axis must be d_in = {d_in}, but its shape is {tuple(x.shape)}")
