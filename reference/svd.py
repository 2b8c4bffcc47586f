"""Decompose matrices from scratch: a singular value decomposition (SVD), a truncated SVD and a rank-one fit.

Dual-SVID needs all three. The SVD is the method of Golub and Reinsch (Numerische Mathematik 14, 1970), as in Golub and
Van Loan, Matrix Computations, Section 8.6. It has two stages. Golub-Kahan bidiagonalization: Householder reflections
from both sides give A = Q B P^T, where B is zero outside its diagonal and superdiagonal. Implicit-shift QR: Givens
rotations chase a bulge down B again and again until the superdiagonal is zero, B = X S Y^T. Together A = (Q X) S (P
Y)^T.
"""

from collections.abc import Sequence

import numpy as np

from .arrays import Array, at_least_float32, check_floats

RANK_ONE_STEPS = 100  # power iterations of `rank_one`, at most
POWER_STEPS = 4  # power iterations of `range_finder`
STEPS_PER_VALUE = 30  # QR steps of `diagonalize`, at most


def svd(matrix: Array) -> tuple[Array, Array, Array]:
    """Compute the thin singular value decomposition (SVD) of a matrix.

    matrix = u diag(s) v^T, u^T u = v^T v = 1

    Golub-Kahan bidiagonalization, then implicit-shift QR: about 8 m n^2 + 13 n^3 flops for m >= n. The error of a
    singular value is a few eps * s[0], so values below that have no correct digit. Where entries come near the largest
    float, s overflows to infinity with a RuntimeWarning.

    Parameters
    ----------
    matrix : (m, n) float array
        A 16-bit matrix is computed, and returned, in float32; any other in its own precision.

    Returns
    -------
    u : (m, k), s : (k,) descending and non-negative, v : (n, k), all of the matrix's dtype, k = min(m, n).

    Raises
    ------
    ValueError
        If the matrix is empty, or holds NaN or infinity.
    TypeError
        If it does not hold floating-point numbers.
    ArithmeticError
        If `diagonalize` does not converge.

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
    scaled = np.ldexp(matrix, -exponent)  # in [-1, 1], so squares do not overflow; exact
    q, d, e, p = bidiagonalize(scaled)
    x, s, y = diagonalize(d, e)
    return q @ x, np.ldexp(s, exponent), p @ y


def bidiagonalize(matrix: Array) -> tuple[Array, Array, Array, Array]:
    """Reduce a matrix to upper bidiagonal form by Householder reflections (Golub and Van Loan, algorithm 5.4.2).

    matrix = q B p^T, with the diagonal d and the superdiagonal e of B

    Reflections from the left and from the right alternate (Golub and Kahan, 1965). One zeroes a column below the
    diagonal, the next zeroes a row right of the superdiagonal.

    Parameters
    ----------
    matrix : (m, n) float array, m >= n

    Returns
    -------
    q : (m, n) and p : (n, n) with orthonormal columns, d : (n,), e : (n - 1,).

    Examples
    --------
    >>> matrix = np.array([[3.0, 1.0, 2.0], [4.0, 0.0, 1.0], [0.0, 2.0, 2.0]])
    >>> q, d, e, p = bidiagonalize(matrix)
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


def reflector(x: Array) -> Array:
    """Find the unit vector w of the Householder reflection that maps x to a multiple of e_0.

    (1 - 2 w w^T) x = -sign(x_0) ||x|| e_0,  w ~ x + sign(x_0) ||x|| e_0  (Householder, 1958)

    With this sign nothing cancels in w_0. A zero vector gives w = 0, which reflects nothing.
    """
    scale = np.abs(x).max(initial=0.0)
    if scale == 0:
        return np.zeros_like(x)
    w = x / scale  # else squares of tiny entries would underflow
    w[0] += np.copysign(np.sqrt(w @ w), w[0])
    return normalized(w)


def reflect(block: Array, w: Array) -> None:
    """Apply the Householder reflection 1 - 2 w w^T to a block in place: a rank-one update."""
    block -= np.outer(2 * w, w @ block)


def product(reflectors: Sequence[Array], q: Array) -> Array:
    """Multiply the reflections H_0 H_1 ... H_last into q in place, where q starts as columns of the identity.

    H_k acts on the last len(w_k) rows. From the last reflection to the first, H_k finds the identity in all rows and
    columns before its own, so only the block after them changes.
    """
    for w in reversed(reflectors):
        first = len(q) - len(w)
        reflect(q[first:, first:], w)
    return q


def diagonalize(d: Array, e: Array) -> tuple[Array, Array, Array]:
    """Compute the SVD of an upper bidiagonal matrix by implicit-shift QR (Golub and Van Loan, algorithm 8.6.2).

    B = x diag(s) y^T

    Entries of e up to eps (max |d| + max |e|) count as zero and split B into blocks; the last block larger than 1 x 1
    takes the next step. A singular value needs about two steps. The threshold is absolute, so singular values far below
    the largest have no relative accuracy (the zero-shift QR of Demmel and Kahan, 1990, would give it).

    Parameters
    ----------
    d : (n,) float array
        Diagonal.
    e : (n - 1,) float array
        Superdiagonal.

    Returns
    -------
    x : (n, n), s : (n,) descending and non-negative, y : (n, n).

    Raises
    ------
    ArithmeticError
        If 30 steps per singular value are not enough. No finite matrix is known to need them.

    Examples
    --------
    >>> x, s, y = diagonalize(np.array([3.0, 0.0]), np.array([4.0]))
    >>> s
    array([5., 0.])
    """
    d, e = d.copy(), e.copy()
    xt, yt = np.eye(d.size, dtype=d.dtype), np.eye(d.size, dtype=d.dtype)  # x^T, y^T: rotations mix contiguous rows
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
        f"the SVD must converge in {STEPS_PER_VALUE} steps per singular value, but did not; report the matrix as a bug"
    )


def sort_values(xt: Array, d: Array, yt: Array) -> tuple[Array, Array, Array]:
    """Turn x diag(d) y^T into an SVD: move negative signs into y and sort in descending order.

    Arguments are x^T, d and y^T; results are x, s and y.
    """
    yt[d < 0] *= -1
    order = np.argsort(-np.abs(d), kind="stable")
    return xt[order].T, np.abs(d)[order], yt[order].T


def step(d: Array, e: Array, xt: Array, yt: Array, tiny: float) -> None:
    """Run one QR step in place on a block of B whose superdiagonal e has no zeros.

    A zero on the diagonal splits the block: `clear_row` chases its superdiagonal entry out of the block. If the zero is
    the last diagonal entry, its column is cleared instead. Reversing the rows and columns of B^T gives an upper
    bidiagonal matrix, so the same function does it.
    """
    zeros = np.flatnonzero(np.abs(d) <= tiny)
    if zeros.size == 0:
        sweep(d, e, xt, yt)
    elif zeros[0] < e.size:
        clear_row(d[zeros[0] :], e[zeros[0] :], xt[zeros[0] :])
    else:
        clear_row(d[::-1], e[::-1], yt[::-1])


def sweep(d: Array, e: Array, xt: Array, yt: Array) -> None:
    """Chase the bulge: run one implicit-shift QR step on B^T B without forming it.

    This is the Golub-Kahan step (Golub and Van Loan, algorithm 8.6.1). The first Givens rotation is the one that an
    explicit QR step on B^T B - shift would start with. It creates an entry g below the diagonal, the bulge. Rotations
    of rows and of columns in turn chase it down the band and out of the block.
    """
    f, g = d[0] * d[0] - wilkinson_shift(d, e), d[0] * e[0]
    for k in range(e.size):
        c, s, r = givens(f, g)  # mixes columns k and k + 1; g is right of the superdiagonal
        if k > 0:
            e[k - 1] = r
        f, e[k] = c * d[k] + s * e[k], c * e[k] - s * d[k]
        g, d[k + 1] = s * d[k + 1], c * d[k + 1]
        apply_givens(yt[k : k + 2], c, s)
        c, s, d[k] = givens(f, g)  # mixes rows k and k + 1; g is below the diagonal
        e[k], d[k + 1] = c * e[k] + s * d[k + 1], c * d[k + 1] - s * e[k]
        apply_givens(xt[k : k + 2], c, s)
        if k + 1 < e.size:
            f, g, e[k + 1] = e[k], s * e[k + 1], c * e[k + 1]


def wilkinson_shift(d: Array, e: Array) -> np.floating:
    """Compute the eigenvalue of the last 2 x 2 block of B^T B that is closer to its last entry.

    For the block [[a, b], [b, c]] that is the one closer to c. As the shift of a QR step (Wilkinson, 1968) it makes the
    last entry of e converge fast, usually cubically.
    """
    diagonal = d * d
    diagonal[1:] += e * e
    a, c = diagonal[-2:]
    b = d[-2] * e[-1]
    half = (a - c) / 2
    return c - b * (b / (half + np.copysign(np.hypot(half, b), half)))


def clear_row(d: Array, e: Array, xt: Array) -> None:
    """Zero the first row of a block of B, whose first diagonal entry counts as zero, in place.

    The only other entry of the row, f = e_0, is rotated against d_1. That moves it one column to the right, and so on
    until it leaves the block.
    """
    f = e[0]
    d[0] = e[0] = 0
    for k in range(1, d.size):
        c, s, d[k] = givens(d[k], f)
        apply_givens(xt[k::-k], c, s)  # rows k and 0
        if k < e.size:
            f, e[k] = -s * e[k], c * e[k]


def givens(f: np.floating, g: np.floating) -> tuple[np.floating, np.floating, np.floating]:
    """Compute the Givens rotation (c, s) that maps (f, g) to (r, 0), and r.

    [[c, s], [-s, c]] [f, g] = [r, 0],  r = sqrt(f^2 + g^2)

    For f = g = 0 the result is c, s, r = 1, 0, 0.
    """
    r = np.hypot(f, g)
    if r > 0:
        return f / r, g / r, r
    return r + 1, r, r


def apply_givens(pair: Array, c: np.floating, s: np.floating) -> None:
    """Apply the Givens rotation [[c, s], [-s, c]] to a pair of rows in place."""
    pair[:] = np.array([[c, s], [-s, c]]) @ pair


def truncated_svd(matrix: Array, rank: int, sketch: Array | None = None) -> tuple[Array, Array, Array]:
    """Compute the leading singular triplets: the best low-rank approximation of a matrix (Eckart and Young, 1936).

    matrix ~ u diag(s) v^T

    Without a sketch the result is exact and takes O(m n min(m, n)) flops. With one it is approximate and takes about 10
    m n k multiplications: the randomized range finder of Halko, Martinsson and Tropp (2011, algorithms 4.4 and 5.1).

    Parameters
    ----------
    matrix : (m, n) float array
        16 bits are computed, and returned, in float32.
    rank : int
        1 <= rank <= min(m, n).
    sketch : (n, k) array of the matrix's dtype, optional
        Gaussian random numbers, rank <= k <= min(m, n). A k of rank + 12 or more makes the result accurate.

    Returns
    -------
    u : (m, rank), s : (rank,) descending and non-negative, v : (n, rank), all of the matrix's dtype.

    Raises
    ------
    ValueError
        If the matrix holds NaN or infinity, or the rank is out of range.

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


def range_finder(matrix: Array, sketch: Array) -> Array:
    """Find an orthonormal basis of nearly the space that the leading k left singular vectors span.

    Randomized subspace iteration (Halko, Martinsson and Tropp, 2011, algorithm 4.4): the sketch is multiplied by the
    matrix and its transpose in turn, and made orthonormal after each product. Returns (m, k).
    """
    basis = orthonormal(matrix @ sketch)  # (m, k)
    for _ in range(POWER_STEPS):
        across = orthonormal(matrix.T @ basis)  # (n, k)
        basis = orthonormal(matrix @ across)  # (m, k)
    return basis


def orthonormal(matrix: Array) -> Array:
    """Compute an orthonormal basis of the columns' span: Q of the QR decomposition.

    By Householder reflections (Golub and Van Loan, algorithm 5.2.1). Returns (m, min(m, n)).
    """
    a = np.array(matrix, order="C")
    m, n = a.shape
    reflectors = []
    for k in range(min(m, n)):
        reflectors.append(reflector(a[k:, k]))
        reflect(a[k:, k:], reflectors[k])
    return product(reflectors, np.eye(m, min(m, n), dtype=a.dtype))


def rank_one(matrix: Array) -> tuple[Array, Array]:
    """Compute the best rank-one approximation of a non-negative matrix by power iteration.

    matrix ~ left right^T,  ||left|| = ||right||

    The leading singular vectors of a non-negative matrix are non-negative (Perron and Frobenius). So the row sums,
    where the iteration starts, are not orthogonal to them. It stops when a step changes no entry of `right` by more
    than eps, or after 100 steps (RANK_ONE_STEPS). If the two largest singular values nearly agree, 100 steps may end
    short of the best.

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
    scaled = matrix / scale  # in [0, 1], so squares do not overflow
    right = normalized(scaled.T @ scaled.sum(axis=1))  # (n,)
    for _ in range(RANK_ONE_STEPS):
        previous = right
        right = normalized(scaled.T @ (scaled @ right))
        if np.abs(right - previous).max() <= np.finfo(matrix.dtype).eps:
            break
    left = scaled @ right  # (m,), its norm is the singular value of `scaled`
    root = np.sqrt(np.sqrt(left @ left)) * np.sqrt(scale)  # two roots: their product's square may overflow
    return normalized(left) * root, right * root


def normalized(vector: Array) -> Array:
    """Divide a vector by its Euclidean norm."""
    return vector / np.sqrt(vector @ vector)


def check_matrix(matrix: Array, rank: int) -> None:
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
