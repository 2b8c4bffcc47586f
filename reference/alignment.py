"""Joint-ITQ: rotate the factors towards signs before their signs are taken (LittleBit-2, arXiv 2603.00042)."""

import numpy as np

from .arrays import at_least_float32, check_floats
from .dual_svid import balanced_factors, factors_from
from .factors import Factors
from .signs import sign
from .svd import orthonormal, svd

ITQ_STEPS = 50


def random_rotation(gaussian: np.ndarray) -> np.ndarray:
    """An orthogonal matrix, uniformly distributed up to column signs if the entries of `gaussian` are normal.

    Parameters
    ----------
    gaussian : (rank, rank) float array

    Returns
    -------
    (rank, rank) orthogonal array.
    """
    return orthonormal(at_least_float32("the start of a rotation", gaussian))


def joint_itq(z: np.ndarray, rotation: np.ndarray, steps: int = ITQ_STEPS) -> np.ndarray:
    """Rotation that brings Z R close to a matrix of signs (Iterative Quantisation, Gong and Lazebnik, 2011).

    Signs and rotation take turns: B = sign(Z R) is the closest sign matrix for a rotation; with the SVD
    B^T Z = P S Q^T, R = Q P^T is the rotation that brings Z closest to B (orthogonal Procrustes). Neither half of a
    step decreases the agreement <B, Z R> = ||Z R||_1.

    Parameters
    ----------
    z : (n, rank) float array
        Both factors, one above the other: one rotation serves both.
    rotation : (rank, rank) orthogonal array
        Where the iteration starts.
    steps : int

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


def itq(
    weight: np.ndarray, rank: int, rotation: np.ndarray, sketch: np.ndarray | None = None, steps: int = ITQ_STEPS
) -> Factors:
    """Factors of a weight by Dual-SVID of rotated factors (LittleBit-2, Joint-ITQ).

    W ~ U' V'^T = (U' R) (V' R)^T: a rotation leaves the product as it is, but factors without a preferred axis lose
    less when only their signs and a rank-one magnitude are kept. Most of the gain comes with any rotation.

    Parameters
    ----------
    weight : (d_out, d_in) float array
    rank : int
        1 <= rank <= min(d_out, d_in).
    rotation : (rank, rank) orthogonal array
        Where the iteration starts; see `random_rotation`.
    sketch : (d_in, k) array, optional
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
