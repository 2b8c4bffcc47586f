"""Factors: the five arrays that stand for one low-rank path of a weight matrix."""

from typing import NamedTuple

import numpy as np

from .signs import sign


class Factors(NamedTuple):
    """One path of a LittleBit layer (LittleBit, arXiv 2506.13771).

    W ~ diag(h) U_sign diag(ell) V_sign^T diag(g)

    `u` and `v` are the latents: real matrices whose signs are what is stored. Training moves the latents; inference
    reads their signs alone, so for a path read from packed bits they are simply -1 and +1.

    Attributes
    ----------
    u : (d_out, rank) latents of U_sign
    v : (d_in, rank) latents of V_sign
    h : (d_out,) row scales
    ell : (rank,) latent scales
    g : (d_in,) column scales

    Examples
    --------
    >>> one = np.ones(1)
    >>> Factors(u=np.array([[-0.3]]), v=np.array([[0.7]]), h=2 * one, ell=3 * one, g=one).to_dense()
    array([[-6.]])
    """

    u: np.ndarray
    v: np.ndarray
    h: np.ndarray
    ell: np.ndarray
    g: np.ndarray

    @property
    def u_sign(self) -> np.ndarray:
        """(d_out, rank) array of -1 and +1."""
        return sign(self.u)

    @property
    def v_sign(self) -> np.ndarray:
        """(d_in, rank) array of -1 and +1."""
        return sign(self.v)

    @property
    def rank(self) -> int:
        """Number of latent dimensions."""
        return self.ell.shape[-1]

    def to_dense(self) -> np.ndarray:
        """The weight that this path stands for, (d_out, d_in); 2 * d_out * d_in * rank flops."""
        left = self.h[..., :, None] * self.u_sign * self.ell[..., None, :]  # (d_out, rank)
        right = self.g[..., :, None] * self.v_sign  # (d_in, rank)
        return left @ np.swapaxes(right, -1, -2)  # (d_out, d_in)
