"""Pack signs into words of 8, 16 or 32 bits, one bit a sign.

Bit 1 means -1. The least significant bit of a word comes first, and pad bits are 0. V is packed along d_in (one row of
words per latent dimension), U along the rank (one row of words per output). A row takes the narrowest words that hold
it (`bits.word_width`). Rows of more than 16 signs are 32-bit words, as in the authors' checkpoints.

Words of 16 and 32 bits are int16 and int32 tensors here, with the bits of the reference's uint16 and uint32: torch
cannot shift unsigned words on a CPU.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .arrays import check_array
from .bits import SCALE_BITS, word_width
from .factors import Factors
from .signs import sign

WORD_TYPES = {8: torch.uint8, 16: torch.int16, 32: torch.int32}


class PackedFactors(NamedTuple):
    """Hold one path as it is stored: packed signs and float16 scales.

    Attributes
    ----------
    u_words : (..., d_out, words) of rank signs a row, uint8, int16 or int32 by `row_words`
    v_words : (..., rank, words) of d_in signs a row, uint8, int16 or int32 by `row_words`
    h : (..., d_out) float16
    ell : (..., rank) float16
    g : (..., d_in) float16
    """

    u_words: Tensor
    v_words: Tensor
    h: Tensor
    ell: Tensor
    g: Tensor

    @property
    def rank(self) -> int:
        """Return the rank, the number of latent dimensions."""
        return self.ell.shape[-1]


def row_words(count: int) -> tuple[int, torch.dtype]:
    """Give the number and dtype of the words that store a row of `count` signs; see `bits.word_width`.

    Examples
    --------
    >>> row_words(16), row_words(40)
    ((1, torch.int16), (2, torch.int32))
    """
    width = word_width(count)
    return -(-count // width), WORD_TYPES[width]


def pack_signs(signs: Tensor) -> Tensor:
    """Pack the last axis of a sign tensor into the narrowest words that hold it, least significant bit first.

    Parameters
    ----------
    signs : (..., n) tensor
        Negative entries become bit 1, all others bit 0.

    Returns
    -------
    (..., words) uint8 tensor for n <= 8, int16 for n <= 16, else int32; see `row_words`.

    Raises
    ------
    ValueError
        If an entry is NaN.

    Examples
    --------
    >>> pack_signs(torch.tensor([1, -1, 1, -1]))
    tensor([10], dtype=torch.uint8)
    """
    check_array("signs", signs)
    check_not_nan(signs)
    count = signs.shape[-1]
    number, dtype = row_words(count)
    width = 8 * dtype.itemsize
    bits = torch.nn.functional.pad(signs < 0, (0, number * width - count))
    place = 1 << torch.arange(width, dtype=dtype, device=signs.device)
    return (bits.unflatten(-1, (number, width)) * place).sum(-1, dtype=dtype)


def unpack_signs(words: Tensor, count: int) -> Tensor:
    """Unpack the first `count` signs of each row of words: the inverse of `pack_signs`.

    Parameters
    ----------
    words : (..., words) uint8, int16 or int32 tensor
        In the number and dtype that `row_words` gives.
    count : int
        Signs per row.

    Returns
    -------
    (..., count) float32 tensor of -1 and +1.

    Raises
    ------
    ValueError
        If `count` signs need words of another number or dtype, or a pad bit is set.

    Examples
    --------
    >>> unpack_signs(torch.tensor([10], dtype=torch.uint8), 4)
    tensor([ 1., -1.,  1., -1.])
    """
    check_words(words, count)
    bits = row_bits(words)
    if bits[..., count:].any():
        raise ValueError("pad bits must be 0, but one is set: the words are damaged; pack the signs again")
    return 1 - 2 * bits[..., :count].float()


def row_bits(words: Tensor) -> Tensor:
    """Unpack all bits of each row of words, pad bits included: (..., words) to (..., words * width), same dtype."""
    place = torch.arange(8 * words.itemsize, dtype=words.dtype, device=words.device)
    return ((words[..., None] >> place) & 1).flatten(-2)  # & 1 drops the sign bit that >> copies


def check_not_nan(*latents: Tensor) -> None:
    """Raise ValueError if a latent is NaN."""
    if any(each.isnan().any() for each in latents):
        raise ValueError("NaN has no sign and cannot be packed; look for the step that produced it")


def check_words(words: Tensor, count: int) -> None:
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
        h, ell, g = (decode_scale(*encode_scale(scale.abs())) for scale in (h, ell, g))
    return PackedFactors(pack_signs(u), pack_signs(v.mT), h, ell, g)


def encode_scale(scale: Tensor) -> tuple[Tensor, Tensor]:
    """Round each scale of a vector to one of 256 multiples of a 255th of the largest.

    Parameters
    ----------
    scale : (..., n) float16 tensor
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
    >>> encode_scale(torch.tensor([0.25, 1.0, 0.002]).half())
    (tensor([ 64, 255,   1], dtype=torch.uint8), tensor(1., dtype=torch.float16))
    """
    if (scale < 0).any():
        raise ValueError("a scale of 8 bits must not be negative; pack_factors moves signs into U and V")
    peak = scale.amax(-1)
    step = torch.where(peak > 0, peak, 1).float()[..., None] / 255
    return (scale.float() / step).round().to(torch.uint8), peak


def decode_scale(codes: Tensor, peak: Tensor) -> Tensor:
    """Compute the float16 scales that 8-bit codes stand for: code * (peak / 255), in float32 until the last rounding.

    Parameters
    ----------
    codes : (..., n) uint8 tensor
    peak : (...) float16 tensor

    Returns
    -------
    (..., n) float16 tensor

    Examples
    --------
    >>> decode_scale(torch.tensor([128, 255, 0], dtype=torch.uint8), torch.tensor(1.0).half())
    tensor([0.5020, 1.0000, 0.0000], dtype=torch.float16)
    """
    return (codes.float() * (peak.float()[..., None] / 255)).half()


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
    u_sign = unpack_signs(packed.u_words, packed.ell.shape[-1])  # (..., d_out, rank)
    v_sign = unpack_signs(packed.v_words, packed.g.shape[-1]).mT  # (..., d_in, rank)
    return Factors(u_sign, v_sign, packed.h.float(), packed.ell.float(), packed.g.float())


def to_half(name: str, scale: Tensor) -> Tensor:
    """Convert a scale vector to float16; raise ValueError if an entry is not finite then."""
    half = scale.to(torch.float16)
    if not torch.isfinite(half).all():
        raise ValueError(
            f"scale {name} does not fit float16 (largest magnitude {scale.abs().max():.3g}); "
            "divide the weight by a constant before factorizing it"
        )
    return half
