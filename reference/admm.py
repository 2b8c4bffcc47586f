"""Latent-binary ADMM: factors found for their signs, not rounded to them (NanoQuant, arXiv 2602.06694).

After Double Binary Factorisation (arXiv 2505.11076). Dual-SVID finds real factors and then takes signs; here two least
squares problems are solved again and again, each with the other factor already binary.
"""

import numpy as np

from .arrays import at_least_float32
from .dual_svid import balanced_factors, factors_from, svid
from .factors import Factors

ADMM_STEPS = 200
RIDGE = 0.03
REFIT_SWEEPS = 3


def project(matrix: np.ndarray) -> np.ndarray:
    """The SVID approximation as a matrix: sign(X) * (row column^T), the binary set that ADMM projects onto."""
    signs, row, column = svid(matrix)
    return signs * row[:, None] * column


def solve_factor(target: np.ndarray, fixed: np.ndarray, pull: np.ndarray, rho: float) -> np.ndarray:
    """The factor A that fits target ~ A X^T and stays near `pull`: ridge least squares (the update of NanoQuant).

    X is `fixed` with columns of norm 1. A minimises ||target - A X^T||^2 + rho ||A - pull||^2 + RIDGE ||A||^2, that is
    (X^T X + (rho + RIDGE) 1) A^T = X^T target^T + rho pull^T.

    Parameters
    ----------
    target : (m, n) float array
    fixed : (n, rank) float array
    pull : (m, rank) float array
    rho : float

    Returns
    -------
    (m, rank) float array.
    """
    norms = np.sqrt((fixed * fixed).sum(axis=0))  # (rank,)
    x = fixed / np.where(norms == 0, 1, norms)
    system = x.T @ x + (rho + RIDGE) * np.eye(x.shape[1], dtype=x.dtype)  # (rank, rank)
    return np.linalg.solve(system, x.T @ target.T + rho * pull.T).T


def admm(
    weight: np.ndarray, rank: int, sketch: np.ndarray | None = None, steps: int = ADMM_STEPS, sweeps: int = REFIT_SWEEPS
) -> Factors:
    """Factors of a weight by latent-binary ADMM and a least-squares refit of the scales.

    A, B start as in Dual-SVID; Z = project(A), dual L = A - Z, likewise for B. For t = 1..T with rho = (t / T)^3: A is
    solved for with Z_B fixed and pulled towards Z_A - L_A, then Z_A = project(A + L_A) and L_A += A - Z_A; then B in
    the same way. The latents are A + L_A and B + L_B; scales are read off them and refitted.

    The weight is divided by the root of its mean square first, so that rho and the ridge mean the same for any weight.

    Parameters
    ----------
    weight : (d_out, d_in) float array
    rank : int
        1 <= rank <= min(d_out, d_in).
    sketch : (d_in, k) array, optional
        See `svd.truncated_svd`.
    steps : int
        T above; 150 to 400 are usual.
    sweeps : int
        Of the scale refit.

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


def root_mean_square(matrix: np.ndarray) -> np.ndarray:
    """Root of the mean square of all entries, or 1 for a zero matrix, a scalar array."""
    largest = np.abs(matrix).max(initial=0.0)
    unit = matrix / np.where(largest == 0, 1, largest)
    root = np.sqrt((unit * unit).mean()) * largest
    return np.where(root == 0, 1, root).astype(matrix.dtype)


def balance(u: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The factors with one number moved between them, so that their mean squares are equal."""
    ratio = np.sqrt(root_mean_square(u) / root_mean_square(v))
    return u / ratio, v * ratio


def refit_scales(weight: np.ndarray, factors: Factors, sweeps: int = REFIT_SWEEPS) -> Factors:
    """Scales by least squares with the signs fixed: ell, h and g in turn, none of which can increase the error.

    Parameters
    ----------
    weight : (d_out, d_in) float array
    factors : Factors
    sweeps : int
        Times each scale vector is refitted.

    Returns
    -------
    Factors with the same latents.
    """
    weight = at_least_float32("the weight", weight)
    factors = Factors(*(tensor.astype(weight.dtype) for tensor in factors))
    for _ in range(sweeps):
        factors = refit_g(weight, refit_h(weight, refit_ell(weight, factors)))
    return factors


def refit_ell(weight: np.ndarray, factors: Factors) -> Factors:
    """The ell that minimises ||W - W_hat||_F, all else fixed.

    With U = diag(h) U_sign and V = diag(g) V_sign: ((U^T U) * (V^T V)) ell = diag(U^T W V). The system may be singular,
    so a step is taken from the present ell with a small ridge, which cannot increase the error either.
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


def refit_h(weight: np.ndarray, factors: Factors) -> Factors:
    """The h that minimises ||W - W_hat||_F, all else fixed: a ratio of inner products for each row."""
    unscaled = factors._replace(h=np.ones_like(factors.h)).to_dense()  # (d_out, d_in)
    return factors._replace(h=ratio((weight * unscaled).sum(axis=1), (unscaled * unscaled).sum(axis=1), factors.h))


def refit_g(weight: np.ndarray, factors: Factors) -> Factors:
    """The g that minimises ||W - W_hat||_F, all else fixed: a ratio of inner products for each column."""
    unscaled = factors._replace(g=np.ones_like(factors.g)).to_dense()  # (d_out, d_in)
    return factors._replace(g=ratio((weight * unscaled).sum(axis=0), (unscaled * unscaled).sum(axis=0), factors.g))


def ratio(numerator: np.ndarray, denominator: np.ndarray, otherwise: np.ndarray) -> np.ndarray:
    """Entrywise quotient, and `otherwise` where the denominator is zero."""
    zero = denominator == 0
    return np.where(zero, otherwise, numerator / np.where(zero, 1, denominator))


def importance(second_moment: np.ndarray, shrink: float = 0.4) -> np.ndarray:
    """Weights of a layer's input or output channels from the second moments of what passes through them.

    Normalised to mean 1 and shrunk towards it: w <- (1 - shrink) w + shrink (after NanoQuant).

    Parameters
    ----------
    second_moment : (d,) non-negative float array
        Mean of x^2 per input channel, or of (dL/dy)^2 per output channel, over calibration text.
    shrink : float
        From 0 to 1, where all channels weigh the same.

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
        raise ValueError("second moments must be finite and non-negative; look at the calibration text and the model")
    largest = second_moment.max(initial=0.0)
    if largest == 0:
        return np.ones_like(second_moment)
    unit = second_moment / largest
    return (1 - shrink) * unit / unit.mean() + shrink
