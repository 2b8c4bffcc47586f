"""Initialize a path from a weight: Dual Sign-Value-Independent Decomposition (Dual-SVID; LittleBit, arXiv 2506.13771).

Quantization-aware training starts from the result.
"""

import numpy as np

from .arrays import Array, at_least_float32
from .factors import Factors
from .signs import sign
from .svd import rank_one, truncated_svd


def svid(matrix: Array) -> tuple[Array, Array, Array]:
    """Decompose a matrix into its signs and a rank-one matrix of magnitudes (SVID; OneBit, arXiv 2402.11295).

    matrix ~ sign(matrix) * (row column^T)

    SVID is short for Sign-Value-Independent Decomposition: signs are kept exactly, and row column^T is the best
    rank-one approximation of |matrix| (`svd.rank_one`).

    Parameters
    ----------
    matrix : (m, n) float array

    Returns
    -------
    signs : (m, n) of -1 and +1; row : (m,) and column : (n,), non-negative, of equal norm.

    Examples
    --------
    >>> signs, row, column = svid(np.array([[1.0, -2.0], [-2.0, 4.0]]))
    >>> (signs * np.outer(row, column)).round(6)
    array([[ 1., -2.],
           [-2.,  4.]])
    """
    matrix = at_least_float32("the matrix", matrix)
    row, column = rank_one(np.abs(matrix))
    return sign(matrix), row, column


def dual_svid(weight: Array, rank: int, sketch: Array | None = None) -> Factors:
    """Factorize a weight by a truncated SVD and one SVID of each factor (Dual-SVID; LittleBit, arXiv 2506.13771).

    W ~ U' V'^T,  |U'| ~ h ell_u^T,  |V'| ~ g ell_v^T,  ell = ell_u * ell_v

    The truncated SVD gives U' and V', each with sqrt(S). SVID of U' gives h and ell_u, SVID of V' gives g and ell_v.
    The latents are U' and V' themselves.

    Parameters
    ----------
    weight : (d_out, d_in) float array
    rank : int
        1 <= rank <= min(d_out, d_in).
    sketch : (d_in, k) array, optional
        Random numbers for a faster, approximate SVD; see `svd.truncated_svd`.

    Returns
    -------
    Factors whose scales are non-negative, of the weight's dtype or, if that has 16 bits, float32.

    Raises
    ------
    ValueError
        If the weight is not a finite matrix, or the rank is out of range.

    Examples
    --------
    >>> dual_svid(np.array([[1.0, -2.0], [-2.0, 4.0]]), rank=1).to_dense().round(6)
    array([[ 1., -2.],
           [-2.,  4.]])
    """
    return factors_from(*balanced_factors(weight, rank, sketch))


def balanced_factors(weight: Array, rank: int, sketch: Array | None = None) -> tuple[Array, Array]:
    """Compute the best real factors of a given rank, W ~ U' V'^T, with sqrt(S) in each.

    Returns
    -------
    u : (d_out, rank), v : (d_in, rank).
    """
    left, s, right = truncated_svd(weight, rank, sketch)
    root = np.sqrt(s)  # (rank,)
    return left * root, right * root


def factors_from(u: Array, v: Array) -> Factors:
    """Read the scales off two latent matrices by one SVID each, and return latents and scales.

    |u| ~ h ell_u^T,  |v| ~ g ell_v^T,  ell = ell_u * ell_v

    Parameters
    ----------
    u : (d_out, rank), v : (d_in, rank) float arrays
    """
    u, v = at_least_float32("u", u), at_least_float32("v", v)
    _, h, ell_u = svid(u)
    _, g, ell_v = svid(v)
    return Factors(u, v, h, ell_u * ell_v, g)
