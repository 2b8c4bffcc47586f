"""Joint-ITQ: rotate the factors towards signs before their signs are taken (LittleBit-2, arXiv 2603.00042)."""

import torch
from torch import Tensor

from .arrays import at_least_float32, check_floats
from .dual_svid import balanced_factors, factors_from
from .factors import Factors
from .signs import sign
from .svd import orthonormal, svd

ITQ_STEPS = 50


def random_rotation(gaussian: Tensor) -> Tensor:
    """An orthogonal matrix, uniformly distributed up to column signs if the entries of `gaussian` are normal.

    Parameters
    ----------
    gaussian : (rank, rank) float tensor

    Returns
    -------
    (rank, rank) orthogonal tensor.
    """
    return orthonormal(at_least_float32("the start of a rotation", gaussian))


def joint_itq(z: Tensor, rotation: Tensor, steps: int = ITQ_STEPS) -> Tensor:
    """Rotation that brings Z R close to a matrix of signs (Iterative Quantisation, Gong and Lazebnik, 2011).

    Signs and rotation take turns: B = sign(Z R) is the closest sign matrix for a rotation; with the SVD
    B^T Z = P S Q^T, R = Q P^T is the rotation that brings Z closest to B (orthogonal Procrustes). Neither half of a
    step decreases the agreement <B, Z R> = ||Z R||_1.

    Parameters
    ----------
    z : (..., n, rank) float tensor
        Both factors, one above the other: one rotation serves both.
    rotation : (rank, rank) or (..., rank, rank) orthogonal tensor
        Where the iteration starts.
    steps : int

    Returns
    -------
    (..., rank, rank) orthogonal tensor.
    """
    z = at_least_float32("z", z)
    check_floats("the rotation", rotation)
    rotation = rotation.to(z.dtype)
    for _ in range(steps):
        signs = sign(z @ rotation)  # (..., n, rank)
        p, _, q = svd(signs.mT @ z)
        rotation = q @ p.mT  # (..., rank, rank)
    return rotation


def itq(weight: Tensor, rank: int, rotation: Tensor, sketch: Tensor | None = None, steps: int = ITQ_STEPS) -> Factors:
    """Factors of a weight by Dual-SVID of rotated factors (LittleBit-2, Joint-ITQ).

    W ~ U' V'^T = (U' R) (V' R)^T: a rotation leaves the product as it is, but factors without a preferred axis lose
    less when only their signs and a rank-one magnitude are kept. Most of the gain comes with any rotation.

    Parameters
    ----------
    weight : (..., d_out, d_in) float tensor
    rank : int
        1 <= rank <= min(d_out, d_in).
    rotation : (rank, rank) orthogonal tensor
        Where the iteration starts; see `random_rotation`.
    sketch : (d_in, k) tensor, optional
        See `svd.truncated_svd`.
    steps : int
        0 keeps the rotation that is given.

    Returns
    -------
    Factors whose scales are non-negative.

    Raises
    ------
    ValueError
        If the weight is not a finite matrix, or the rank is out of range.

    Examples
    --------
    >>> _ = torch.manual_seed(0)
    >>> weight = torch.randn(24, 24)
    >>> start = random_rotation(torch.randn(12, 12))
    >>> from littlebit.fast import dual_svid
    >>> before, after = ((weight - f.to_dense()).abs().mean() for f in (dual_svid(weight, 12), itq(weight, 12, start)))
    >>> bool(after < before)
    True
    """
    u, v = balanced_factors(weight, rank, sketch)
    rotation = joint_itq(torch.cat([u, v], dim=-2), rotation, steps)
    return factors_from(u @ rotation, v @ rotation)
