"""Pack signs into words of 8, 16 or 32 bits, one bit a sign.

Bit 1 means -1. The least significant bit of a word comes first, and pad bits are 0. V is packed along d_in (one row of
words per latent dimension), U along the rank (one row of words per output). A row takes the narrowest words that hold
it (`bits.word_width`). Rows of more than 16 signs are 32-bit words, as in the authors' checkpoints.
"""

from typing import NamedTuple

import numpy as np

from .bits import SCALE_BITS, word_width
from .factors import Factors
from .signs import sign

WORD_TYPES = {width: np.dtype(f"uint{width}") for width in (8, 16, 32)}


class PackedFactors(NamedTuple):
    """Hold one path as it is stored: packed signs and float16 scales.

    Attributes
    ----------
    u_words : (d_out, words) of rank signs a row, uint8, uint16 or uint32 by `row_words`
    v_words : (rank, words) of d_in signs a row, uint8, uint16 or uint32 by `row_words`
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
        """Return the rank, the number of latent dimensions."""
        return self.ell.shape[-1]


def row_words(count: int) -> tuple[int, np.dtype]:
    """Give the number and dtype of the words that store a row of `count` signs; see `bits.word_width`.

    Examples
    --------
    >>> row_words(16), row_words(40)
    ((1, dtype('uint16')), (2, dtype('uint32')))
    """
    width = word_width(count)
    return -(-count // width), WORD_TYPES[width]


def pack_signs(signs: np.ndarray) -> np.ndarray:
    """Pack the last axis of a sign array into the narrowest words that hold it, least significant bit first.

    Parameters
    ----------
    signs : (..., n) array
        Negative entries become bit 1, all others bit 0.

    Returns
    -------
    (..., words) uint8 array for n <= 8, uint16 for n <= 16, else uint32; see `row_words`.

    Raises
    ------
    ValueError
        If an entry is NaN.

    Examples
    --------
    >>> pack_signs(np.array([1, -1, 1, -1]))
    array([10], dtype=uint8)
    """
    signs = np.asarray(signs)
    check_not_nan(signs)
    count = signs.shape[-1]
    number, dtype = row_words(count)
    pad = 8 * dtype.itemsize * number - count
    bits = np.pad(signs < 0, [(0, 0)] * (signs.ndim - 1) + [(0, pad)])  # (..., words * width)
    octets = np.ascontiguousarray(np.packbits(bits, axis=-1, bitorder="little"))  # (..., words * width / 8)
    return octets.view(dtype.newbyteorder("<")).astype(dtype, copy=False)


def unpack_signs(words: np.ndarray, count: int) -> np.ndarray:
    """Unpack the first `count` signs of each row of words: the inverse of `pack_signs`.

    Parameters
    ----------
    words : (..., words) uint8, uint16 or uint32 array
        In the number and dtype that `row_words` gives.
    count : int
        Signs per row.

    Returns
    -------
    (..., count) float32 array of -1 and +1.

    Raises
    ------
    ValueError
        If `count` signs need words of another number or dtype, or a pad bit is set.

    Examples
    --------
    >>> unpack_signs(np.array([10], dtype=np.uint8), 4)
    array([ 1., -1.,  1., -1.], dtype=float32)
    """
    check_words(words, count)
    bits = row_bits(words)
    if bits[..., count:].any():
        raise ValueError("pad bits must be 0, but one is set: the words are damaged; pack the signs again")
    return 1 - 2 * bits[..., :count].astype(np.float32)


def row_bits(words: np.ndarray) -> np.ndarray:
    """Unpack all bits of each row of words, pad bits included: (..., words) to (..., words * width) uint8."""
    octets = np.ascontiguousarray(words, dtype=words.dtype.newbyteorder("<")).view(np.uint8)
    return np.unpackbits(octets, axis=-1, bitorder="little")


def check_not_nan(*latents: np.ndarray) -> None:
    """Raise ValueError if a latent is NaN."""
    if any(np.isnan(each).any() for each in latents):
        raise ValueError("NaN has no sign and cannot be packed; look for the step that produced it")


def check_words(words: np.ndarray, count: int) -> None:
    """Raise ValueError unless each row of words has the number and dtype that `count` signs need."""
    number, dtype = row_words(count)
    if words.shape[-1] != number or words.dtype != dtype:
        raise ValueError(
            f"{count} signs need {number} word(s) of {dtype} a row, but there are {words.shape[-1]} of {words.dtype}; "
            "pack the signs again if another version of littlebit packed them"
        )


def pack_factors(factors: Factors, scale_bits: int = SCALE_BITS) -> PackedFactors:
    """Round a path to what is stored: the signs of its latents, and its scales.

    Parameters
    ----------
    factors : Factors
    scale_bits : int
        16: scales are rounded to float16. 8: signs of negative scales move into U and V, and the scales are rounded to
        the values of 8-bit codes (`encode_scale`), held as float16.

    Raises
    ------
    ValueError
        If `scale_bits` is neither, a latent is NaN, or a scale is not finite in float16.
    """
    check_scale_bits(scale_bits)
    u, v = factors.u, factors.v
    h, ell, g = (to_half(name, getattr(factors, name)) for name in ("h", "ell", "g"))
    check_not_nan(u, v)
    if scale_bits == 8:
        u = sign(u) * sign(h)[..., :, None]
        v = sign(v) * sign(g)[..., :, None] * sign(ell)[..., None, :]
        h, ell, g = (decode_scale(*encode_scale(np.abs(scale))) for scale in (h, ell, g))
    return PackedFactors(pack_signs(u), pack_signs(np.swapaxes(v, -1, -2)), h, ell, g)


def encode_scale(scale: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Round each scale of a vector to one of 256 multiples of a 255th of the largest.

    Parameters
    ----------
    scale : (..., n) float16 array
        None is negative.

    Returns
    -------
    codes : (..., n) uint8
    peak : (...) float16
        The largest scale. `decode_scale` gives the rounded scales; encoding these again gives the same codes and peak.

    Raises
    ------
    ValueError
        If a scale is negative.

    Examples
    --------
    >>> encode_scale(np.array([0.25, 1.0, 0.002], np.float16))
    (array([ 64, 255,   1], dtype=uint8), np.float16(1.0))
    """
    if (scale < 0).any():
        raise ValueError("a scale of 8 bits must not be negative; pack_factors moves signs into U and V")
    peak = scale.max(-1)
    step = np.where(peak > 0, peak, np.float16(1)).astype(np.float32)[..., None] / np.float32(255)
    return np.rint(scale.astype(np.float32) / step).astype(np.uint8), peak


def decode_scale(codes: np.ndarray, peak: np.ndarray) -> np.ndarray:
    """Compute the float16 scales that 8-bit codes stand for: code * (peak / 255), in float32 until the last rounding.

    Parameters
    ----------
    codes : (..., n) uint8 array
    peak : (...) float16 array

    Returns
    -------
    (..., n) float16 array

    Examples
    --------
    >>> decode_scale(np.array([128, 255, 0], np.uint8), np.float16(1.0))
    array([0.502, 1.   , 0.   ], dtype=float16)
    """
    step = np.asarray(peak, np.float32)[..., None] / np.float32(255)
    return (codes.astype(np.float32) * step).astype(np.float16)


def check_scale_bits(scale_bits: int) -> None:
    """Raise ValueError unless scales can be stored in this many bits."""
    if scale_bits not in (8, 16):
        raise ValueError(f"scale_bits must be 16 (float16) or 8 (codes), got {scale_bits!r}")


def unpack_factors(packed: PackedFactors) -> Factors:
    """Unpack a stored path to float32 factors, whose latents are the signs.

    Raises
    ------
    ValueError
        If words and scales do not fit together, or a pad bit is set.
    """
    u_sign = unpack_signs(packed.u_words, packed.ell.shape[-1])  # (d_out, rank)
    v_sign = np.swapaxes(unpack_signs(packed.v_words, packed.g.shape[-1]), -1, -2)  # (d_in, rank)
    h, ell, g = (scale.astype(np.float32) for scale in (packed.h, packed.ell, packed.g))
    return Factors(u_sign, v_sign, h, ell, g)


def to_half(name: str, scale: np.ndarray) -> np.ndarray:
    """Convert a scale vector to float16; raise ValueError if an entry is not finite then."""
    with np.errstate(over="ignore"):
        half = scale.astype(np.float16)
    if not np.isfinite(half).all():
        raise ValueError(
            f"scale {name} does not fit float16 (largest magnitude {np.abs(scale).max():.3g}); "
            "divide the weight by a constant before factorizing it"
        )
    return half
