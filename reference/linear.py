"""The layer itself: y = W_hat x + b, without ever forming W_hat (LittleBit, arXiv 2506.13771, equation 5)."""

from collections.abc import Sequence

import numpy as np

from .factors import Factors
from .packing import PackedFactors, unpack_factors


def linear(x: np.ndarray, paths: Sequence[Factors], bias: np.ndarray | None = None) -> np.ndarray:
    """Sum of the paths' outputs.

    y = sum over paths of ((((x * g) V_sign) * ell) U_sign^T) * h, plus the bias

    Parameters
    ----------
    x : (..., d_in) float array
    paths : sequence of Factors
    bias : (d_out,) float array, optional

    Returns
    -------
    (..., d_out) float array; 2 * rank * (d_in + d_out) additions per row of x and path.

    Raises
    ------
    ValueError
        If x's last axis is not d_in.

    Examples
    --------
    >>> from littlebit.reference import dual_svid
    >>> path = dual_svid(np.array([[1.0, -2.0], [-2.0, 4.0]]), rank=1)
    >>> linear(np.array([1.0, 1.0]), [path]).round(6)
    array([-1.,  2.])
    """
    d_in = paths[0].g.shape[-1]
    if x.shape[-1] != d_in:
        raise ValueError(f"the input's last axis must be d_in = {d_in}, but its shape is {tuple(x.shape)}")
    y = path_linear(x, paths[0])
    for path in paths[1:]:
        y = y + path_linear(x, path)
    return y if bias is None else y + bias


def path_linear(x: np.ndarray, path: Factors) -> np.ndarray:
    """One path's output: ((((x * g) V_sign) * ell) U_sign^T) * h."""
    t = (x * path.g) @ path.v_sign  # (..., rank)
    return (t * path.ell) @ path.u_sign.T * path.h  # (..., d_out)


def packed_linear(x: np.ndarray, paths: Sequence[PackedFactors], bias: np.ndarray | None = None) -> np.ndarray:
    """`linear` from packed words, in float32.

    Parameters
    ----------
    x : (..., d_in) float array
    paths : sequence of PackedFactors
    bias : (d_out,) float array, optional

    Returns
    -------
    (..., d_out) float32 array.

    Raises
    ------
    ValueError
        If x's last axis is not d_in, or the words do not fit the scales.
    """
    y = linear(x.astype(np.float32), [unpack_factors(path) for path in paths])
    return y if bias is None else y + bias.astype(np.float32)
