"""The decompositions that Dual-SVID needs, over batches of matrices of equal shape."""

import torch
from torch import Tensor

from .arrays import at_least_float32, check_floats

RANK_ONE_STEPS = 100
POWER_STEPS = 4


def svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Thin singular value decomposition.

    matrix = u diag(s) v^T, u^T u = v^T v = 1

    Parameters
    ----------
    matrix : (..., m, n) float tensor
        16 bits are computed, and returned, in float32.
        Its precision is also that of the computation, which LAPACK or cuSOLVER does.

    Returns
    -------
    u : (..., m, k), s : (..., k) descending and non-negative, v : (..., n, k), all of the matrix's dtype,
    k = min(m, n).

    Raises
    ------
    ValueError
        If the matrix is empty or not finite.
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
    """Leading singular triplets: the best approximation of a given rank (Eckart and Young, 1936).

    matrix ~ u diag(s) v^T. With a sketch, the randomised range finder of Halko, Martinsson and Tropp (2011,
    algorithms 4.4 and 5.1) finds them approximately, in 10 * m * n * k rather than O(m n min(m, n)) multiplications.

    Parameters
    ----------
    matrix : (..., m, n) float tensor
        16 bits are computed, and returned, in float32.
    rank : int
        1 <= rank <= min(m, n).
    sketch : (n, k) float tensor, optional
        Gaussian test matrix, rank <= k <= min(m, n); a dozen columns more than the rank make the result accurate.

    Returns
    -------
    u : (..., m, rank), s : (..., rank) descending and non-negative, v : (..., n, rank), all of the matrix's dtype.

    Raises
    ------
    ValueError
        If the matrix is not finite, or the rank is out of range.

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
    """Orthonormal basis, (..., m, k), of nearly the space that the leading k left singular vectors span."""
    basis = orthonormal(matrix @ sketch)  # (..., m, k)
    for _ in range(POWER_STEPS):
        across = orthonormal(matrix.mT @ basis)  # (..., n, k)
        basis = orthonormal(matrix @ across)  # (..., m, k)
    return basis


def orthonormal(matrix: Tensor) -> Tensor:
    """Orthonormal basis, (..., m, min(m, n)), of the columns' span: Q of Householder QR (Golub and Van Loan, 5.2.1)."""
    return torch.linalg.qr(matrix)[0]


def rank_one(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Best rank-one approximation of a non-negative matrix, by power iteration.

    matrix ~ left right^T with ||left|| = ||right||. The leading singular vectors of a non-negative matrix are
    non-negative (Perron and Frobenius), so the iteration starts from the row sums, which cannot be orthogonal to
    them. It stops when a step moves no right vector by more than the rounding of the matrix's dtype.

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
    scaled = matrix / torch.where(zero, 1, scale)  # entries in [0, 1]: squares neither overflow nor vanish
    right = normalised(scaled.mT @ scaled.sum(-1, keepdim=True))  # (..., n, 1)
    for _ in range(RANK_ONE_STEPS):
        previous = right
        right = normalised(scaled.mT @ (scaled @ right))
        if (right - previous).abs().max() <= torch.finfo(matrix.dtype).eps:
            break
    left = scaled @ right  # (..., m, 1), its norm is the singular value
    root = (torch.linalg.vector_norm(left, dim=-2, keepdim=True) * scale).sqrt()
    return (normalised(left) * root).squeeze(-1), (right * root).squeeze(-1)


def normalised(vector: Tensor) -> Tensor:
    """Each column (..., n, 1) divided by its Euclidean norm; zero columns stay zero."""
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
