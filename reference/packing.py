"""Packing: one sign, one bit, in 32-bit words.

Bit 1 means -1. The least significant bit of a word comes first, and pad bits are 0. V is packed along d_in (one row
of words per latent dimension), U along the rank (one row of words per output). These are the words that the authors'
checkpoints hold.
"""

from typing import NamedTuple

import numpy as np

from .bits import WORD_BITS
from .factors import Factors


class PackedFactors(NamedTuple):
    """One path as it is stored: sign words and float16 scales.

    Attributes
    ----------
    u_words : (d_out, ceil(rank / 32)) uint32
    v_words : (rank, ceil(d_in / 32)) uint32
    h : (d_out,) float16
    ell : (rank,) float16
    g : (d_in,) float16
    """

    u_words: np.ndarray
    v_words: np.ndarray
    h: np.ndarray
    ell: np.ndarray
    g: np.ndarray

    @property
    def rank(self) -> int:
        """Number of latent dimensions."""
        return self.ell.shape[-1]


def pack_signs(signs: np.ndarray) -> np.ndarray:
    """Pack the last axis of a sign array into little-endian 32-bit words.

    Parameters
    ----------
    signs : (..., n) array
        Negative entries become bit 1, all others bit 0.

    Returns
    -------
    (..., ceil(n / 32)) uint32 array.

    Raises
    ------
    ValueError
        If an entry is NaN.

    Examples
    --------
    >>> pack_signs(np.array([1, -1, 1, -1]))
    array([10], dtype=uint32)
    """
    signs = np.asarray(signs)
    if np.isnan(signs).any():
        raise ValueError("NaN has no sign and cannot be packed; look for the step that produced it")
    pad = -signs.shape[-1] % WORD_BITS
    bits = np.pad(signs < 0, [(0, 0)] * (signs.ndim - 1) + [(0, pad)])  # (..., words * 32)
    octets = np.ascontiguousarray(np.packbits(bits, axis=-1, bitorder="little"))  # (..., words * 4)
    return octets.view("<u4").astype(np.uint32, copy=False)


def unpack_signs(words: np.ndarray, count: int) -> np.ndarray:
    """The first `count` signs of each row of words: the inverse of `pack_signs`.

    Parameters
    ----------
    words : (..., ceil(count / 32)) uint32 array
    count : int
        Signs per row.

    Returns
    -------
    (..., count) float32 array of -1 and +1.

    Raises
    ------
    ValueError
        If the rows do not hold exactly the words that `count` signs need, or a pad bit is set.

    Examples
    --------
    >>> unpack_signs(np.array([10], dtype=np.uint32), 4)
    array([ 1., -1.,  1., -1.], dtype=float32)
    """
    expected = -(-count // WORD_BITS)
    if words.shape[-1] != expected:
        raise ValueError(f"{count} signs need {expected} words a row, but there are {words.shape[-1]}")
    octets = np.ascontiguousarray(words, dtype="<u4").view(np.uint8)
    bits = np.unpackbits(octets, axis=-1, bitorder="little")  # (..., words * 32)
    if bits[..., count:].any():
        raise ValueError("a pad bit is set: the words are damaged, or were packed with another bit order")
    return 1 - 2 * bits[..., :count].astype(np.float32)


def pack_factors(factors: Factors) -> PackedFactors:
    """Round a path to what is stored: the signs of its latents, its scales as float16.

    Raises
    ------
    ValueError
        If a latent is NaN, or a scale is not finite in float16.
    """
    v_by_rank = np.swapaxes(factors.v, -1, -2)  # (rank, d_in)
    return PackedFactors(
        pack_signs(factors.u),
        pack_signs(v_by_rank),
        *(to_half(name, getattr(factors, name)) for name in ("h", "ell", "g")),
    )


def unpack_factors(packed: PackedFactors) -> Factors:
    """The float32 path that a packed one stands for; its latents are the signs.

    Raises
    ------
    ValueError
        If the words do not fit the scales' lengths, or a pad bit is set.
    """
    u_sign = unpack_signs(packed.u_words, packed.ell.shape[-1])  # (d_out, rank)
    v_sign = np.swapaxes(unpack_signs(packed.v_words, packed.g.shape[-1]), -1, -2)  # (d_in, rank)
    h, ell, g = (scale.astype(np.float32) for scale in (packed.h, packed.ell, packed.g))
    return Factors(u_sign, v_sign, h, ell, g)


def to_half(name: str, scale: np.ndarray) -> np.ndarray:
    """`scale` as float16, or a ValueError if that is not finite."""
    with np.errstate(over="ignore"):
        half = scale.astype(np.float16)
    if not np.isfinite(half).all():
        raise ValueError(
            f"scale {name} does not fit float16 (largest magnitude {np.abs(scale).max():.3g}); "
            "divide the weight by a constant before factorising it"
        )
    return half
