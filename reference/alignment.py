"""Rotate real factors before taking their signs: Joint-ITQ (LittleBit-2, arXiv 2603.00042).

ITQ is short for Iterative Quantization (Gong and Lazebnik, 2011). A rotation of both factors leaves their product as it
is, and changes what the signs lose of it.
"""

import numpy as np

from .arrays import Array, at_least_float32, check_floats
from .dual_svid import balanced_factors, factors_from
from .factors import Factors
from .signs import sign
from .svd import orthonormal, svd

ITQ_STEPS = 50


def random_rotation(gaussian: Array) -> Array:
    """Make a random orthogonal matrix from a matrix of normal random numbers.

    Q of its QR decomposition is uniformly (Haar) distributed, up to the signs of its columns.

    Parameters
    ----------
    gaussian : (rank, rank) float array

    Returns
    -------
    (rank, rank) orthogonal array.
    """
    return orthonormal(at_least_float32("the start of a rotation", gaussian))


def joint_itq(z: Array, rotation: Array, steps: int = ITQ_STEPS) -> Array:
    """Find a rotation R that brings Z R close to a matrix of signs (Iterative Quantization, ITQ).

    B = sign(Z R),  then R = Q P^T from the SVD B^T Z = P S Q^T

    Two half-steps alternate (Gong and Lazebnik, 2011). The first finds the closest sign matrix B for a rotation. The
    second finds the rotation that brings Z closest to B, which is the orthogonal Procrustes problem. Neither decreases
    the agreement <B, Z R> = ||Z R||_1. The limit depends on where the iteration starts.

    Parameters
    ----------
    z : (n, rank) float array
        Both factors, one above the other: one rotation serves both.
    rotation : (rank, rank) orthogonal array
        Where the iteration starts.
    steps : int
        Each takes 4 n rank^2 flops and an SVD of a rank x rank matrix.

    Returns
    -------
    (rank, rank) orthogonal array.
    """
    z = at_least_float32("z", z)
    check_floats("the rotation", rotation)
    rotation = rotation.astype(z.dtype)
    for _ in range(steps):
        signs = sign(z @ rotation)  # (n, rank)
        p, _, q = svd(signs.T @ z)
        rotation = q @ p.T  # (rank, rank)
    return rotation


def itq(weight: Array, rank: int, rotation: Array, sketch: Array | None = None, steps: int = ITQ_STEPS) -> Factors:
    """Factorize a weight by Dual-SVID after a rotation of its real factors (Joint-ITQ; LittleBit-2, arXiv 2603.00042).

    W ~ U' V'^T = (U' R) (V' R)^T

    Most of the gain comes with any rotation; ITQ adds the rest. Without a rotation each singular direction gets one
    column of signs, however large the rank, and keeps the error of that column. A rotation spreads every direction over
    all columns, whose errors partly average out. It helps where a few directions dominate. It hardly helps a flat
    spectrum, as in MLPs, and not at all on top of `admm`.

    Parameters
    ----------
    weight : (d_out, d_in) float array
    rank : int
        1 <= rank <= min(d_out, d_in).
    rotation : (rank, rank) orthogonal array
        Where the iteration starts; see `random_rotation`.
    sketch : (d_in, k) array, optional
        Random numbers for a faster, approximate SVD; see `svd.truncated_svd`.
    steps : int
        Steps of `joint_itq`; 0 uses the rotation as it is.

    Returns
    -------
    Factors whose scales are non-negative.

    Raises
    ------
    ValueError
        If the weight is not a finite matrix, or the rank is out of range.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> weight = rng.standard_normal((24, 24))
    >>> start = random_rotation(rng.standard_normal((12, 12)))
    >>> from littlebit.reference import dual_svid
    >>> before, after = (np.abs(weight - f.to_dense()).mean() for f in (dual_svid(weight, 12), itq(weight, 12, start)))
    >>> bool(after < before)
    True
    """
    u, v = balanced_factors(weight, rank, sketch)
    rotation = joint_itq(np.concatenate([u, v]), rotation, steps)
    return factors_from(u @ rotation, v @ rotation)
