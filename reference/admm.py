"""Find factors that are binary while they are solved for, by ADMM (after NanoQuant, arXiv 2602.06694).

ADMM is the alternating direction method of multipliers. Dual-SVID finds real factors and then rounds them to signs.
Here two least-squares problems alternate, each with the other factor already binary, as in Double Binary Factorization
(arXiv 2505.11076).

Differences from NanoQuant: the start is the SVD, so the result is deterministic; B is solved for with the new A
(Gauss-Seidel) instead of the old one (Jacobi); and there is a middle scale, ell.
"""

import numpy as np

from .arrays import Array, at_least_float32
from .dual_svid import balanced_factors, factors_from, svid
from .factors import Factors

ADMM_STEPS = 200  # T in `admm`
RIDGE = 0.03  # of every least-squares solve in `solve_factor`
REFIT_SWEEPS = 3  # of `refit_scales`


def project(matrix: Array) -> Array:
    """Project a matrix onto sign matrices with rank-one magnitudes: sign(X) * (row column^T), by SVID.

    ADMM pulls its factors to this set.
    """
    signs, row, column = svid(matrix)
    return signs * row[:, None] * column


def solve_factor(target: Array, fixed: Array, pull: Array, rho: float) -> Array:
    """Solve for the factor A that fits target ~ A X^T and stays near `pull`, by ridge least squares.

    A = argmin ||target - A X^T||^2 + rho ||A - pull||^2 + RIDGE ||A||^2

    X is `fixed` with columns of norm 1. The normal equations are (X^T X + (rho + RIDGE) 1) A^T = X^T target^T + rho
    pull^T (NanoQuant's update). A solve takes 2 m n rank flops and more.

    Parameters
    ----------
    target : (m, n) float array
        The weight, or its transpose.
    fixed : (n, rank) float array
        The other factor, projected.
    pull : (m, rank) float array
        Projection of A minus its dual.
    rho : float
        Penalty.

    Returns
    -------
    (m, rank) float array.
    """
    norms = np.sqrt((fixed * fixed).sum(axis=0))  # (rank,)
    x = fixed / np.where(norms == 0, 1, norms)
    system = x.T @ x + (rho + RIDGE) * np.eye(x.shape[1], dtype=x.dtype)  # (rank, rank)
    return np.linalg.solve(system, x.T @ target.T + rho * pull.T).T


def admm(
    weight: Array, rank: int, sketch: Array | None = None, steps: int = ADMM_STEPS, sweeps: int = REFIT_SWEEPS
) -> Factors:
    """Factorize a weight by latent-binary ADMM, then refit the scales by least squares (after NanoQuant).

    A and B start as in Dual-SVID. Z_A = project(A), the dual is L_A = A - Z_A, and the same for B. At step t of T, with
    the penalty rho = (t / T)^3:

        A <- solve_factor(W, Z_B, Z_A - L_A, rho),  Z_A <- project(A + L_A),  L_A <- L_A + A - Z_A
        B <- solve_factor(W^T, Z_A, Z_B - L_B, rho),  Z_B <- project(B + L_B),  L_B <- L_B + B - Z_B

    The latents are A + L_A and B + L_B. SVID reads their scales off, and `refit_scales` improves them. W is divided by
    its root mean square first, so that penalty and ridge mean the same for any weight. Latents are not bounded by 1:
    the straight-through estimator never moves the ones beyond.

    Parameters
    ----------
    weight : (d_out, d_in) float array
    rank : int
        1 <= rank <= min(d_out, d_in).
    sketch : (d_in, k) array, optional
        Random numbers for a faster, approximate SVD; see `svd.truncated_svd`.
    steps : int
        T; 150 to 400 are usual.
    sweeps : int
        Sweeps of `refit_scales`.

    Returns
    -------
    Factors; scales may have either sign.

    Raises
    ------
    ValueError
        If the weight is not a finite matrix, or the rank is out of range.

    Examples
    --------
    >>> weight = np.random.default_rng(0).standard_normal((24, 24))
    >>> from littlebit.reference import dual_svid
    >>> before, after = (np.abs(weight - f(weight, 12).to_dense()).mean() for f in (dual_svid, admm))
    >>> bool(after < before)
    True
    """
    weight = at_least_float32("the weight", weight)
    a, b = balanced_factors(weight, rank, sketch)  # (d_out, rank), (d_in, rank)
    scale = root_mean_square(weight)
    target = weight / scale
    a, b = a / np.sqrt(scale), b / np.sqrt(scale)
    z_a, z_b = project(a), project(b)
    l_a, l_b = a - z_a, b - z_b
    for t in range(1, steps + 1):
        rho = (t / steps) ** 3
        a = solve_factor(target, z_b, z_a - l_a, rho)
        z_a = project(a + l_a)
        l_a = l_a + a - z_a
        b = solve_factor(target.T, z_a, z_b - l_b, rho)
        z_b = project(b + l_b)
        l_b = l_b + b - z_b
    u, v = balance(a + l_a, b + l_b)
    return refit_scales(weight, factors_from(u * np.sqrt(scale), v * np.sqrt(scale)), sweeps)


def root_mean_square(matrix: Array) -> Array:
    """Compute the root mean square of all entries of a matrix; 1 for a zero matrix."""
    largest = np.abs(matrix).max(initial=0.0)
    unit = matrix / np.where(largest == 0, 1, largest)
    root = np.sqrt((unit * unit).mean()) * largest
    return np.where(root == 0, 1, root).astype(matrix.dtype)


def balance(u: Array, v: Array) -> tuple[Array, Array]:
    """Move one scalar between two factors, so that their mean squares are equal and their product is unchanged."""
    ratio = np.sqrt(root_mean_square(u) / root_mean_square(v))
    return u / ratio, v * ratio


def refit_scales(weight: Array, factors: Factors, sweeps: int = REFIT_SWEEPS) -> Factors:
    """Refit ell, h and g in turn by least squares, with the signs fixed.

    Each refit minimizes ||W - W_hat||_F over one scale vector, so no refit increases the error.

    Parameters
    ----------
    weight : (d_out, d_in) float array
    factors : Factors
    sweeps : int
        How often each scale vector is refitted.

    Returns
    -------
    Factors with the same latents.
    """
    weight = at_least_float32("the weight", weight)
    factors = Factors(*(tensor.astype(weight.dtype) for tensor in factors))
    for _ in range(sweeps):
        factors = refit_g(weight, refit_h(weight, refit_ell(weight, factors)))
    return factors


def refit_ell(weight: Array, factors: Factors) -> Factors:
    """Find the ell that minimizes ||W - W_hat||_F, with signs, h and g fixed.

    ((U^T U) * (V^T V)) ell = diag(U^T W V),  U = diag(h) U_sign,  V = diag(g) V_sign

    The system may be singular. So the code solves for a change of the present ell, with a small ridge, which cannot
    increase the error either.
    """
    u = factors.h[:, None] * factors.u_sign  # (d_out, rank)
    v = factors.g[:, None] * factors.v_sign  # (d_in, rank)
    system = (u.T @ u) * (v.T @ v)  # (rank, rank)
    missing = ((u.T @ weight) * v.T).sum(axis=1) - system @ factors.ell  # (rank,)
    size = np.diagonal(system).mean()
    if size == 0:
        return factors
    ridge = 16 * np.finfo(weight.dtype).eps * len(system)
    step = np.linalg.solve(system / size + ridge * np.eye(len(system), dtype=weight.dtype), missing / size)
    return factors._replace(ell=factors.ell + step)


def refit_h(weight: Array, factors: Factors) -> Factors:
    """Find the h that minimizes ||W - W_hat||_F, with signs, ell and g fixed.

    h_i = <W_i, M_i> / <M_i, M_i> for the rows of W and of M, which is W_hat without h
    """
    unscaled = factors._replace(h=np.ones_like(factors.h)).to_dense()  # (d_out, d_in)
    return factors._replace(h=ratio((weight * unscaled).sum(axis=1), (unscaled * unscaled).sum(axis=1), factors.h))


def refit_g(weight: Array, factors: Factors) -> Factors:
    """Find the g that minimizes ||W - W_hat||_F, with signs, h and ell fixed.

    g_j = <W_j, M_j> / <M_j, M_j> for the columns of W and of M, which is W_hat without g
    """
    unscaled = factors._replace(g=np.ones_like(factors.g)).to_dense()  # (d_out, d_in)
    return factors._replace(g=ratio((weight * unscaled).sum(axis=0), (unscaled * unscaled).sum(axis=0), factors.g))


def ratio(numerator: Array, denominator: Array, otherwise: Array) -> Array:
    """Divide entry by entry, and return `otherwise` where the denominator is zero."""
    zero = denominator == 0
    return np.where(zero, otherwise, numerator / np.where(zero, 1, denominator))


def importance(second_moment: Array, shrink: float = 0.4) -> Array:
    """Turn second moments of channels into positive importance weights of mean 1 (after NanoQuant).

    w <- (1 - shrink) w / mean(w) + shrink

    Parameters
    ----------
    second_moment : (d,) non-negative float array
        Mean over calibration text of x^2 for each input channel, or of (dL/dy)^2 for each output channel.
    shrink : float
        How far weights move to their mean: 0 keeps their ratios, 1 makes all equal.

    Returns
    -------
    (d,) positive array of mean 1; ones if all moments are zero.

    Raises
    ------
    ValueError
        If a moment is negative or not finite, or shrink is out of range.

    Examples
    --------
    >>> importance(np.array([1.0, 3.0]), shrink=0.5)
    array([0.75, 1.25])
    """
    second_moment = at_least_float32("second moments", second_moment)
    if not 0 <= shrink <= 1:
        raise ValueError(f"shrink must be between 0 and 1, not {shrink}")
    if not (np.isfinite(second_moment).all() and (second_moment >= 0).all()):
        raise ValueError("second moments must be finite and non-negative; check the calibration text and the model")
    largest = second_moment.max(initial=0.0)
    if largest == 0:
        return np.ones_like(second_moment)
    unit = second_moment / largest
    return (1 - shrink) * unit / unit.mean() + shrink
