"""Decompose batches of matrices of equal shape: SVD, truncated SVD and rank-one fit.

Dual-SVID needs all three. The SVD itself is LAPACK's or cuSOLVER's; `littlebit.reference.svd` writes it out.
"""

import torch
from torch import Tensor

from .arrays import at_least_float32, check_floats

RANK_ONE_STEPS = 100  # power iterations of `rank_one`, at most
POWER_STEPS = 4  # power iterations of `range_finder`


def svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the thin singular value decomposition (SVD) of a matrix.

    matrix = u diag(s) v^T, u^T u = v^T v = 1

    LAPACK computes it on a CPU, cuSOLVER on a GPU. The error of a singular value is a few eps * s[0], so values below
    that have no correct digit.

    Parameters
    ----------
    matrix : (..., m, n) float tensor
        A 16-bit matrix is computed, and returned, in float32; any other in its own precision.

    Returns
    -------
    u : (..., m, k), s : (..., k) descending and non-negative, v : (..., n, k), all of the matrix's dtype,
    k = min(m, n).

    Raises
    ------
    ValueError
        If the matrix is empty, or holds NaN or infinity.
    TypeError
        If it does not hold floating-point numbers.

    Examples
    --------
    >>> u, s, v = svd(torch.tensor([[3.0, 0.0], [4.0, 5.0]]))
    >>> (s * s).round(decimals=4)
    tensor([45.,  5.])
    >>> (u * s @ v.mT).round(decimals=4) + 0.0
    tensor([[3., 0.],
            [4., 5.]])
    """
    matrix = at_least_float32("the weight", matrix)
    check_matrix(matrix, 1)
    u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
    return u, s, vt.mT


def truncated_svd(matrix: Tensor, rank: int, sketch: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the leading singular triplets: the best low-rank approximation of a matrix (Eckart and Young, 1936).

    matrix ~ u diag(s) v^T

    Without a sketch the result is exact and takes O(m n min(m, n)) flops. With one it is approximate and takes about 10
    m n k multiplications: the randomized range finder of Halko, Martinsson and Tropp (2011, algorithms 4.4 and 5.1).

    Parameters
    ----------
    matrix : (..., m, n) float tensor
        16 bits are computed, and returned, in float32.
    rank : int
        1 <= rank <= min(m, n).
    sketch : (n, k) tensor of the matrix's dtype, optional
        Gaussian random numbers, rank <= k <= min(m, n). A k of rank + 12 or more makes the result accurate.

    Returns
    -------
    u : (..., m, rank), s : (..., rank) descending and non-negative, v : (..., n, rank), all of the matrix's dtype.

    Raises
    ------
    ValueError
        If the matrix holds NaN or infinity, or the rank is out of range.

    Examples
    --------
    >>> u, s, v = truncated_svd(torch.tensor([[3.0, 0.0], [0.0, 2.0]]), rank=1)
    >>> s
    tensor([3.])
    """
    matrix = at_least_float32("the weight", matrix)
    check_matrix(matrix, rank)
    if sketch is None:
        u, s, v = svd(matrix)
    else:
        check_floats("the sketch", sketch)
        basis = range_finder(matrix, sketch.to(matrix.dtype))  # (..., m, k)
        u, s, v = svd(basis.mT @ matrix)
        u = basis @ u
    return u[..., :rank], s[..., :rank], v[..., :rank]


def range_finder(matrix: Tensor, sketch: Tensor) -> Tensor:
    """Find an orthonormal basis of nearly the space that the leading k left singular vectors span.

    Randomized subspace iteration (Halko, Martinsson and Tropp, 2011, algorithm 4.4): the sketch is multiplied by the
    matrix and its transpose in turn, and made orthonormal after each product. Returns (..., m, k).
    """
    basis = orthonormal(matrix @ sketch)  # (..., m, k)
    for _ in range(POWER_STEPS):
        across = orthonormal(matrix.mT @ basis)  # (..., n, k)
        basis = orthonormal(matrix @ across)  # (..., m, k)
    return basis


def orthonormal(matrix: Tensor) -> Tensor:
    """Compute an orthonormal basis of the columns' span: Q of the QR decomposition.

    Returns (..., m, min(m, n)).
    """
    return torch.linalg.qr(matrix)[0]


def rank_one(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the best rank-one approximation of a non-negative matrix by power iteration.

    matrix ~ left right^T,  ||left|| = ||right||

    The leading singular vectors of a non-negative matrix are non-negative (Perron and Frobenius). So the row sums,
    where the iteration starts, are not orthogonal to them. It stops when a step changes no entry of `right` by more
    than eps, or after 100 steps (RANK_ONE_STEPS). If the two largest singular values nearly agree, 100 steps may end
    short of the best.

    Parameters
    ----------
    matrix : (..., m, n) non-negative float tensor
        16 bits are computed, and returned, in float32.

    Returns
    -------
    left : (..., m), right : (..., n), non-negative, of the matrix's dtype; zeros for a zero matrix.

    Examples
    --------
    >>> left, right = rank_one(torch.tensor([[1.0, 2.0], [2.0, 4.0]]))
    >>> torch.outer(left, right).round(decimals=4)
    tensor([[1., 2.],
            [2., 4.]])
    """
    matrix = at_least_float32("the matrix", matrix)
    scale = matrix.amax((-2, -1), keepdim=True)  # (..., 1, 1)
    zero = scale == 0
    scaled = matrix / torch.where(zero, 1, scale)  # in [0, 1], so squares do not overflow
    right = normalized(scaled.mT @ scaled.sum(-1, keepdim=True))  # (..., n, 1)
    for _ in range(RANK_ONE_STEPS):
        previous = right
        right = normalized(scaled.mT @ (scaled @ right))
        if (right - previous).abs().max() <= torch.finfo(matrix.dtype).eps:
            break
    left = scaled @ right  # (..., m, 1), its norm is the singular value of `scaled`
    norm = torch.linalg.vector_norm(left, dim=-2, keepdim=True)
    root = norm.sqrt() * scale.sqrt()  # two roots: their product's square may overflow
    return (normalized(left) * root).squeeze(-1), (right * root).squeeze(-1)


def normalized(vector: Tensor) -> Tensor:
    """Divide each column (..., n, 1) by its Euclidean norm; zero columns stay zero."""
    norm = torch.linalg.vector_norm(vector, dim=-2, keepdim=True)
    return vector / torch.where(norm == 0, 1, norm)


def check_matrix(matrix: Tensor, rank: int) -> None:
    """Raise ValueError unless `matrix` holds finite matrices that have `rank` singular values."""
    if matrix.ndim < 2:
        raise ValueError(f"the weight must be a matrix (d_out, d_in), but its shape is {tuple(matrix.shape)}")
    if not torch.isfinite(matrix).all():
        raise ValueError("the weight holds NaN or infinity; repair or re-download the checkpoint that it came from")
    if not 1 <= rank <= min(matrix.shape[-2:]):
        raise ValueError(
            f"rank {rank} is out of range for a {matrix.shape[-2]} x {matrix.shape[-1]} matrix; "
            f"choose 1 to {min(matrix.shape[-2:])}"
        )
