"""Store one low-rank path of a weight matrix as five arrays: two binary factors and three scale vectors."""

from typing import NamedTuple

import numpy as np

from .arrays import Array
from .signs import sign


class Factors(NamedTuple):
    """Hold one path of a LittleBit layer: two binary factors and three scale vectors (LittleBit, arXiv 2506.13771).

    W ~ diag(h) U_sign diag(ell) V_sign^T diag(g),  U_sign = sign(u),  V_sign = sign(v)

    `u` and `v` are the latents: real matrices that training moves. Inference uses their signs alone, so a path that was
    read from packed bits has -1 and +1 for latents.

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

    u: Array
    v: Array
    h: Array
    ell: Array
    g: Array

    @property
    def u_sign(self) -> Array:
        """Return the signs of `u`, a (d_out, rank) array of -1 and +1."""
        return sign(self.u)

    @property
    def v_sign(self) -> Array:
        """Return the signs of `v`, a (d_in, rank) array of -1 and +1."""
        return sign(self.v)

    @property
    def rank(self) -> int:
        """Return the rank, the number of latent dimensions."""
        return self.ell.shape[-1]

    def to_dense(self) -> Array:
        """Multiply the factors out to the dense weight, (d_out, d_in), in 2 * d_out * d_in * rank flops."""
        left = self.h[..., :, None] * self.u_sign * self.ell[..., None, :]  # (d_out, rank)
        right = self.g[..., :, None] * self.v_sign  # (d_in, rank)
        return left @ np.swapaxes(right, -1, -2)  # (d_out, d_in)
