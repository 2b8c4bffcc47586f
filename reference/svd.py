"""The decompositions that Dual-SVID needs: an SVD from scratch, a truncated SVD and a best rank-one approximation.

The SVD is that of Golub and Reinsch (Numerische Mathematik 14, 1970), as in Golub and Van Loan, Matrix Computations,
Section 8.6. Reflections make the matrix bidiagonal, A = Q B P^T. Rotations then make B diagonal, B = X S Y^T, so that
A = (Q X) S (P Y)^T.
"""

from collections.abc import Sequence

import numpy as np

from .arrays import at_least_float32, check_floats

RANK_ONE_STEPS = 100
POWER_STEPS = 4
STEPS_PER_VALUE = 30


def svd(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Thin singular value decomposition.

    matrix = u diag(s) v^T, u^T u = v^T v = 1

    Parameters
    ----------
    matrix : (m, n) float array
        16 bits are computed, and returned, in float32.
        Its precision is also that of the computation, about 8 m n^2 + 13 n^3 flops for m >= n.

    Returns
    -------
    u : (m, k), s : (k,) descending and non-negative, v : (n, k), all of the matrix's dtype, k = min(m, n).

    Raises
    ------
    ValueError
        If the matrix is empty or not finite.
    TypeError
        If it does not hold floating-point numbers.
    ArithmeticError
        If `diagonalise` does not converge.

    Examples
    --------
    >>> u, s, v = svd(np.array([[3.0, 0.0], [4.0, 5.0]]))
    >>> (s * s).round(6)
    array([45.,  5.])
    >>> (u * s @ v.T).round(6) + 0.0
    array([[3., 0.],
           [4., 5.]])
    """
    matrix = at_least_float32("the weight", matrix)
    check_matrix(matrix, 1)
    if matrix.shape[0] < matrix.shape[1]:
        v, s, u = svd(matrix.T)
        return u, s, v
    _, exponent = np.frexp(np.abs(matrix).max())
    scaled = np.ldexp(matrix, -exponent)  # entries in [-1, 1]: squares do not overflow; a power of two rounds nothing
    q, d, e, p = bidiagonalise(scaled)
    x, s, y = diagonalise(d, e)
    return q @ x, np.ldexp(s, exponent), p @ y


def bidiagonalise(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Orthogonal transformation to upper bidiagonal form (Golub and Van Loan, algorithm 5.4.2).

    matrix = q B p^T, where B has the diagonal d and the superdiagonal e. Reflections from the left and from the right
    take turns: one clears a column below the diagonal, the next clears a row beyond the superdiagonal.

    Parameters
    ----------
    matrix : (m, n) float array, m >= n

    Returns
    -------
    q : (m, n) and p : (n, n) with orthonormal columns, d : (n,), e : (n - 1,).

    Examples
    --------
    >>> matrix = np.array([[3.0, 1.0, 2.0], [4.0, 0.0, 1.0], [0.0, 2.0, 2.0]])
    >>> q, d, e, p = bidiagonalise(matrix)
    >>> (q.T @ matrix @ p - np.diag(d) - np.diag(e, 1)).round(6) + 0.0
    array([[0., 0., 0.],
           [0., 0., 0.],
           [0., 0., 0.]])
    """
    a = np.array(matrix, order="C")
    m, n = a.shape
    from_left, from_right = [], []
    for k in range(n):
        from_left.append(reflector(a[k:, k]))
        reflect(a[k:, k:], from_left[k])
        from_right.append(reflector(a[k, k + 1 :]))
        reflect(a[k:, k + 1 :].T, from_right[k])
    q = product(from_left, np.eye(m, n, dtype=a.dtype))
    p = product(from_right, np.eye(n, dtype=a.dtype))
    return q, a.diagonal().copy(), a.diagonal(1)[: n - 1].copy(), p


def reflector(x: np.ndarray) -> np.ndarray:
    """Unit vector w for which (1 - 2 w w^T) x is a multiple of the first unit vector; zeros for a zero vector.

    w ~ x + sign(x_0) ||x|| e_0 (Householder, 1958), the sign that cancels nothing.
    """
    scale = np.abs(x).max(initial=0.0)
    if scale == 0:
        return np.zeros_like(x)
    w = x / scale  # the squares of tiny entries would vanish
    w[0] += np.copysign(np.sqrt(w @ w), w[0])
    return normalised(w)


def reflect(block: np.ndarray, w: np.ndarray) -> None:
    """Replace a block by (1 - 2 w w^T) block, a rank-one update in place."""
    block -= np.outer(2 * w, w @ block)


def product(reflectors: Sequence[np.ndarray], q: np.ndarray) -> np.ndarray:
    """H_0 H_1 ... H_last q, in place, for columns q of the identity; H_k acts on as many last rows as w_k is long.

    From the last to the first: H_k then finds the identity in all rows and columns before its own.
    """
    for w in reversed(reflectors):
        first = len(q) - len(w)
        reflect(q[first:, first:], w)
    return q


def diagonalise(d: np.ndarray, e: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """SVD of an upper bidiagonal matrix, by implicit-shift QR (Golub and Van Loan, algorithm 8.6.2).

    B = x diag(s) y^T. Entries of e below the rounding of B become zero, which splits B into blocks; the last block
    larger than 1 x 1 takes the next step. A singular value needs about two steps.

    Parameters
    ----------
    d : (n,) float array
        The diagonal.
    e : (n - 1,) float array
        The superdiagonal.

    Returns
    -------
    x : (n, n), s : (n,) descending and non-negative, y : (n, n).

    Raises
    ------
    ArithmeticError
        If 30 steps per singular value are not enough, which no finite matrix is known to need.

    Examples
    --------
    >>> x, s, y = diagonalise(np.array([3.0, 0.0]), np.array([4.0]))
    >>> s
    array([5., 0.])
    """
    d, e = d.copy(), e.copy()
    xt, yt = np.eye(d.size, dtype=d.dtype), np.eye(d.size, dtype=d.dtype)  # rows, as rotations mix contiguous memory
    tiny = np.finfo(d.dtype).eps * (np.abs(d).max() + np.abs(e).max(initial=0.0))
    for _ in range(STEPS_PER_VALUE * d.size + 1):
        e[np.abs(e) <= tiny] = 0
        coupled = np.flatnonzero(e)
        if coupled.size == 0:
            return sort_values(xt, d, yt)
        last = coupled[-1] + 1
        first = np.flatnonzero(e[:last] == 0).max(initial=-1) + 1
        block = slice(first, last + 1)
        step(d[block], e[first:last], xt[block], yt[block], tiny)
    raise ArithmeticError(
        f"the SVD has not converged in {STEPS_PER_VALUE} steps per singular value; report the matrix as a bug"
    )


def sort_values(xt: np.ndarray, d: np.ndarray, yt: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The SVD x diag(s) y^T of a matrix x diag(d) y^T: signs move into y, and s descends."""
    yt[d < 0] *= -1
    order = np.argsort(-np.abs(d), kind="stable")
    return xt[order].T, np.abs(d)[order], yt[order].T


def step(d: np.ndarray, e: np.ndarray, xt: np.ndarray, yt: np.ndarray, tiny: float) -> None:
    """One step, in place, on a block of B whose superdiagonal e has no zeros.

    A zero on the diagonal splits the block. If it is the last one it clears its column instead of its row, which is
    the same thing seen from the other corner: reversing rows and columns of B^T gives an upper bidiagonal matrix.
    """
    zeros = np.flatnonzero(np.abs(d) <= tiny)
    if zeros.size == 0:
        sweep(d, e, xt, yt)
    elif zeros[0] < e.size:
        clear_row(d[zeros[0] :], e[zeros[0] :], xt[zeros[0] :])
    else:
        clear_row(d[::-1], e[::-1], yt[::-1])


def sweep(d: np.ndarray, e: np.ndarray, xt: np.ndarray, yt: np.ndarray) -> None:
    """Golub-Kahan step: a QR step on B^T B - shift that never forms it (Golub and Van Loan, algorithm 8.6.1).

    The first rotation is that of the shifted QR step. It leaves an entry g below the diagonal, which rotations of rows
    and of columns in turn chase down the band and out of the block.
    """
    f, g = d[0] * d[0] - wilkinson_shift(d, e), d[0] * e[0]
    for k in range(e.size):
        c, s, r = rotation(f, g)  # of columns k and k + 1: g is right of the superdiagonal
        if k > 0:
            e[k - 1] = r
        f, e[k] = c * d[k] + s * e[k], c * e[k] - s * d[k]
        g, d[k + 1] = s * d[k + 1], c * d[k + 1]
        rotate(yt[k : k + 2], c, s)
        c, s, d[k] = rotation(f, g)  # of rows k and k + 1: g is below the diagonal
        e[k], d[k + 1] = c * e[k] + s * d[k + 1], c * d[k + 1] - s * e[k]
        rotate(xt[k : k + 2], c, s)
        if k + 1 < e.size:
            f, g, e[k + 1] = e[k], s * e[k + 1], c * e[k + 1]


def wilkinson_shift(d: np.ndarray, e: np.ndarray) -> np.floating:
    """The eigenvalue of the last 2 x 2 block [[a, b], [b, c]] of B^T B that is closer to c (Wilkinson, 1968)."""
    diagonal = d * d
    diagonal[1:] += e * e
    a, c = diagonal[-2:]
    b = d[-2] * e[-1]
    half = (a - c) / 2
    return c - b * (b / (half + np.copysign(np.hypot(half, b), half)))


def clear_row(d: np.ndarray, e: np.ndarray, xt: np.ndarray) -> None:
    """Clear the first row of a block of B whose first diagonal entry counts as zero, in place.

    The row's only entry f = e_0 meets d_1 in a rotation of rows, which moves it right, and so on out of the block.
    """
    f = e[0]
    d[0] = e[0] = 0
    for k in range(1, d.size):
        c, s, d[k] = rotation(d[k], f)
        rotate(xt[k::-k], c, s)  # rows k and 0
        if k < e.size:
            f, e[k] = -s * e[k], c * e[k]


def rotation(f: np.floating, g: np.floating) -> tuple[np.floating, np.floating, np.floating]:
    """Givens rotation c, s, and the length r that it leaves: [[c, s], [-s, c]] [f, g] = [r, 0]; 1, 0, 0 for zeros."""
    r = np.hypot(f, g)
    if r > 0:
        return f / r, g / r, r
    return r + 1, r, r


def rotate(pair: np.ndarray, c: np.floating, s: np.floating) -> None:
    """Replace two rows by [[c, s], [-s, c]] times them, in place."""
    pair[:] = np.array([[c, s], [-s, c]]) @ pair


def truncated_svd(
    matrix: np.ndarray, rank: int, sketch: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Leading singular triplets: the best approximation of a given rank (Eckart and Young, 1936).

    matrix ~ u diag(s) v^T. With a sketch, the randomised range finder of Halko, Martinsson and Tropp (2011,
    algorithms 4.4 and 5.1) finds them approximately, in 10 * m * n * k rather than O(m n min(m, n)) multiplications.

    Parameters
    ----------
    matrix : (m, n) float array
        16 bits are computed, and returned, in float32.
    rank : int
        1 <= rank <= min(m, n).
    sketch : (n, k) float array, optional
        Gaussian test matrix, rank <= k <= min(m, n); a dozen columns more than the rank make the result accurate.

    Returns
    -------
    u : (m, rank), s : (rank,) descending and non-negative, v : (n, rank), all of the matrix's dtype.

    Raises
    ------
    ValueError
        If the matrix is not finite, or the rank is out of range.

    Examples
    --------
    >>> u, s, v = truncated_svd(np.array([[3.0, 0.0], [0.0, 2.0]]), rank=1)
    >>> s
    array([3.])
    """
    matrix = at_least_float32("the weight", matrix)
    check_matrix(matrix, rank)
    if sketch is None:
        u, s, v = svd(matrix)
    else:
        check_floats("the sketch", sketch)
        basis = range_finder(matrix, sketch.astype(matrix.dtype))  # (m, k)
        u, s, v = svd(basis.T @ matrix)
        u = basis @ u
    return u[:, :rank], s[:rank], v[:, :rank]


def range_finder(matrix: np.ndarray, sketch: np.ndarray) -> np.ndarray:
    """Orthonormal basis, (m, k), of nearly the space that the leading k left singular vectors span."""
    basis = orthonormal(matrix @ sketch)  # (m, k)
    for _ in range(POWER_STEPS):
        across = orthonormal(matrix.T @ basis)  # (n, k)
        basis = orthonormal(matrix @ across)  # (m, k)
    return basis


def orthonormal(matrix: np.ndarray) -> np.ndarray:
    """Orthonormal basis, (m, min(m, n)), of the columns' span: Q of Householder QR (Golub and Van Loan, 5.2.1)."""
    a = np.array(matrix, order="C")
    m, n = a.shape
    reflectors = []
    for k in range(min(m, n)):
        reflectors.append(reflector(a[k:, k]))
        reflect(a[k:, k:], reflectors[k])
    return product(reflectors, np.eye(m, min(m, n), dtype=a.dtype))


def rank_one(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Best rank-one approximation of a non-negative matrix, by power iteration.

    matrix ~ left right^T with ||left|| = ||right||. The leading singular vectors of a non-negative matrix are
    non-negative (Perron and Frobenius), so the iteration starts from the row sums, which cannot be orthogonal to
    them. It stops when a step moves the right vector by less than the rounding of the matrix's dtype.

    Parameters
    ----------
    matrix : (m, n) non-negative float array
        16 bits are computed, and returned, in float32.

    Returns
    -------
    left : (m,), right : (n,), non-negative, of the matrix's dtype; zeros for a zero matrix.

    Examples
    --------
    >>> left, right = rank_one(np.array([[1.0, 2.0], [2.0, 4.0]]))
    >>> np.outer(left, right).round(6)
    array([[1., 2.],
           [2., 4.]])
    """
    matrix = at_least_float32("the matrix", matrix)
    scale = matrix.max(initial=0.0)
    if scale == 0:
        return np.zeros_like(matrix[:, 0]), np.zeros_like(matrix[0])
    scaled = matrix / scale  # entries in [0, 1]: squares neither overflow nor vanish
    right = normalised(scaled.T @ scaled.sum(axis=1))  # (n,)
    for _ in range(RANK_ONE_STEPS):
        previous = right
        right = normalised(scaled.T @ (scaled @ right))
        if np.abs(right - previous).max() <= np.finfo(matrix.dtype).eps:
            break
    left = scaled @ right  # (m,), its norm is the singular value
    root = np.sqrt(np.sqrt(left @ left) * scale)
    return normalised(left) * root, right * root


def normalised(vector: np.ndarray) -> np.ndarray:
    """The vector divided by its Euclidean norm."""
    return vector / np.sqrt(vector @ vector)


def check_matrix(matrix: np.ndarray, rank: int) -> None:
    """Raise ValueError unless `matrix` is a finite matrix that has `rank` singular values."""
    if matrix.ndim != 2:
        raise ValueError(f"the weight must be a matrix (d_out, d_in), but its shape is {tuple(matrix.shape)}")
    if not np.isfinite(matrix).all():
        raise ValueError("the weight holds NaN or infinity; repair or re-download the checkpoint that it came from")
    if not 1 <= rank <= min(matrix.shape):
        raise ValueError(
            f"rank {rank} is out of range for a {matrix.shape[0]} x {matrix.shape[1]} matrix; "
            f"choose 1 to {min(matrix.shape)}"
        )
