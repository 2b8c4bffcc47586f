"""Latent-binary ADMM: factors found for their signs, not rounded to them (NanoQuant, arXiv 2602.06694).

After Double Binary Factorisation (arXiv 2505.11076). Dual-SVID finds real factors and then takes signs; here two least
squares problems are solved again and again, each with the other factor already binary.
"""

import torch
from torch import Tensor

from .arrays import at_least_float32
from .dual_svid import balanced_factors, factors_from, svid
from .factors import Factors

ADMM_STEPS = 200
RIDGE = 0.03
REFIT_SWEEPS = 3


def project(matrix: Tensor) -> Tensor:
    """The SVID approximation as a matrix: sign(X) * (row column^T), the binary set that ADMM projects onto."""
    signs, row, column = svid(matrix)
    return signs * row[..., :, None] * column[..., None, :]


def solve_factor(target: Tensor, fixed: Tensor, pull: Tensor, rho: float) -> Tensor:
    """The factor A that fits target ~ A X^T and stays near `pull`: ridge least squares (the update of NanoQuant).

    X is `fixed` with columns of norm 1. A minimises ||target - A X^T||^2 + rho ||A - pull||^2 + RIDGE ||A||^2, that is
    (X^T X + (rho + RIDGE) 1) A^T = X^T target^T + rho pull^T.

    Parameters
    ----------
    target : (..., m, n) float tensor
    fixed : (..., n, rank) float tensor
    pull : (..., m, rank) float tensor
    rho : float

    Returns
    -------
    (..., m, rank) float tensor.
    """
    norms = torch.linalg.vector_norm(fixed, dim=-2, keepdim=True)  # (..., 1, rank)
    x = fixed / torch.where(norms == 0, 1, norms)
    system = x.mT @ x + (rho + RIDGE) * torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)  # (..., rank, rank)
    return torch.cholesky_solve(x.mT @ target.mT + rho * pull.mT, torch.linalg.cholesky(system)).mT


def admm(
    weight: Tensor, rank: int, sketch: Tensor | None = None, steps: int = ADMM_STEPS, sweeps: int = REFIT_SWEEPS
) -> Factors:
    """Factors of a weight by latent-binary ADMM and a least-squares refit of the scales.

    A, B start as in Dual-SVID; Z = project(A), dual L = A - Z, likewise for B. For t = 1..T with rho = (t / T)^3: A is
    solved for with Z_B fixed and pulled towards Z_A - L_A, then Z_A = project(A + L_A) and L_A += A - Z_A; then B in
    the same way. The latents are A + L_A and B + L_B; scales are read off them and refitted.

    The weight is divided by the root of its mean square first, so that rho and the ridge mean the same for any weight.

    Parameters
    ----------
    weight : (..., d_out, d_in) float tensor
    rank : int
        1 <= rank <= min(d_out, d_in).
    sketch : (d_in, k) tensor, optional
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
    >>> _ = torch.manual_seed(0)
    >>> weight = torch.randn(24, 24)
    >>> from littlebit.fast import dual_svid
    >>> before, after = ((weight - f(weight, 12).to_dense()).abs().mean() for f in (dual_svid, admm))
    >>> bool(after < before)
    True
    """
    weight = at_least_float32("the weight", weight)
    a, b = balanced_factors(weight, rank, sketch)  # (..., d_out, rank), (..., d_in, rank)
    scale = root_mean_square(weight)[..., None, None]
    target = weight / scale
    a, b = a / scale.sqrt(), b / scale.sqrt()
    z_a, z_b = project(a), project(b)
    l_a, l_b = a - z_a, b - z_b
    for t in range(1, steps + 1):
        rho = (t / steps) ** 3
        a = solve_factor(target, z_b, z_a - l_a, rho)
        z_a = project(a + l_a)
        l_a = l_a + a - z_a
        b = solve_factor(target.mT, z_a, z_b - l_b, rho)
        z_b = project(b + l_b)
        l_b = l_b + b - z_b
    u, v = balance(a + l_a, b + l_b)
    return refit_scales(weight, factors_from(u * scale.sqrt(), v * scale.sqrt()), sweeps)


def root_mean_square(matrix: Tensor) -> Tensor:
    """Root of the mean square of all entries, or 1 for a zero matrix, (...) for (..., m, n) matrices."""
    largest = matrix.abs().amax((-2, -1))
    unit = matrix / torch.where(largest == 0, 1, largest)[..., None, None]
    root = (unit * unit).mean((-2, -1)).sqrt() * largest
    return torch.where(root == 0, 1, root)


def balance(u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """The factors with one number moved between them, so that their mean squares are equal."""
    ratio = (root_mean_square(u) / root_mean_square(v)).sqrt()[..., None, None]
    return u / ratio, v * ratio


def refit_scales(weight: Tensor, factors: Factors, sweeps: int = REFIT_SWEEPS) -> Factors:
    """Scales by least squares with the signs fixed: ell, h and g in turn, none of which can increase the error.

    Parameters
    ----------
    weight : (..., d_out, d_in) float tensor
    factors : Factors
    sweeps : int
        Times each scale vector is refitted.

    Returns
    -------
    Factors with the same latents.
    """
    weight = at_least_float32("the weight", weight)
    factors = Factors(*(tensor.to(weight.dtype) for tensor in factors))
    for _ in range(sweeps):
        factors = refit_g(weight, refit_h(weight, refit_ell(weight, factors)))
    return factors


def refit_ell(weight: Tensor, factors: Factors) -> Factors:
    """The ell that minimises ||W - W_hat||_F, all else fixed.

    With U = diag(h) U_sign and V = diag(g) V_sign: ((U^T U) * (V^T V)) ell = diag(U^T W V). The system may be singular,
    so a step is taken from the present ell with a small ridge, which cannot increase the error either.
    """
    u = factors.h[..., :, None] * factors.u_sign  # (..., d_out, rank)
    v = factors.g[..., :, None] * factors.v_sign  # (..., d_in, rank)
    system = (u.mT @ u) * (v.mT @ v)  # (..., rank, rank)
    missing = ((u.mT @ weight) * v.mT).sum(-1) - (system @ factors.ell[..., None]).squeeze(-1)  # (..., rank)
    size = system.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None]  # (..., 1)
    size = torch.where(size == 0, 1, size)
    rank = system.shape[-1]
    ridge = 16 * torch.finfo(weight.dtype).eps * rank * torch.eye(rank, dtype=weight.dtype, device=weight.device)
    step = torch.linalg.solve(system / size[..., None] + ridge, missing / size)
    return factors._replace(ell=factors.ell + step)


def refit_h(weight: Tensor, factors: Factors) -> Factors:
    """The h that minimises ||W - W_hat||_F, all else fixed: a ratio of inner products for each row."""
    unscaled = factors._replace(h=torch.ones_like(factors.h)).to_dense()  # (..., d_out, d_in)
    return factors._replace(h=ratio((weight * unscaled).sum(-1), (unscaled * unscaled).sum(-1), factors.h))


def refit_g(weight: Tensor, factors: Factors) -> Factors:
    """The g that minimises ||W - W_hat||_F, all else fixed: a ratio of inner products for each column."""
    unscaled = factors._replace(g=torch.ones_like(factors.g)).to_dense()  # (..., d_out, d_in)
    return factors._replace(g=ratio((weight * unscaled).sum(-2), (unscaled * unscaled).sum(-2), factors.g))


def ratio(numerator: Tensor, denominator: Tensor, otherwise: Tensor) -> Tensor:
    """Entrywise quotient, and `otherwise` where the denominator is zero."""
    zero = denominator == 0
    return torch.where(zero, otherwise, numerator / torch.where(zero, 1, denominator))


def importance(second_moment: Tensor, shrink: float = 0.4) -> Tensor:
    """Weights of a layer's input or output channels from the second moments of what passes through them.

    Normalised to mean 1 and shrunk towards it: w <- (1 - shrink) w + shrink (after NanoQuant).

    Parameters
    ----------
    second_moment : (..., d) non-negative float tensor
        Mean of x^2 per input channel, or of (dL/dy)^2 per output channel, over calibration text.
    shrink : float
        From 0 to 1, where all channels weigh the same.

    Returns
    -------
    (..., d) positive tensor of mean 1; ones if all moments are zero.

    Raises
    ------
    ValueError
        If a moment is negative or not finite, or shrink is out of range.

    Examples
    --------
    >>> importance(torch.tensor([1.0, 3.0]), shrink=0.5)
    tensor([0.7500, 1.2500])
    """
    second_moment = at_least_float32("second moments", second_moment)
    if not 0 <= shrink <= 1:
        raise ValueError(f"shrink must be between 0 and 1, not {shrink}")
    if not (torch.isfinite(second_moment).all() and (second_moment >= 0).all()):
        raise ValueError("second moments must be finite and non-negative; look at the calibration text and the model")
    largest = second_moment.amax(-1, keepdim=True)
    unit = second_moment / torch.where(largest == 0, 1, largest)
    mean = torch.where(largest == 0, 1, unit.mean(-1, keepdim=True))
    return torch.where(largest == 0, 1, (1 - shrink) * unit / mean + shrink)
