"""Packing: one sign, one bit, in 32-bit words.

Bit 1 means -1. The least significant bit of a word comes first, and pad bits are 0. V is packed along d_in (one row
of words per latent dimension), U along the rank (one row of words per output). These are the words that the authors'
checkpoints hold. They are kept as int32, whose bits are those of the reference's uint32: torch cannot shift uint32
on a CPU.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .bits import WORD_BITS
from .factors import Factors


class PackedFactors(NamedTuple):
    """One path as it is stored: sign words and float16 scales.

    Attributes
    ----------
    u_words : (..., d_out, ceil(rank / 32)) int32
    v_words : (..., rank, ceil(d_in / 32)) int32
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
        """Number of latent dimensions."""
        return self.ell.shape[-1]


def pack_signs(signs: Tensor) -> Tensor:
    """Pack the last axis of a sign tensor into 32-bit words, least significant bit first.

    Parameters
    ----------
    signs : (..., n) tensor
        Negative entries become bit 1, all others bit 0.

    Returns
    -------
    (..., ceil(n / 32)) int32 tensor.

    Raises
    ------
    ValueError
        If an entry is NaN.

    Examples
    --------
    >>> pack_signs(torch.tensor([1, -1, 1, -1]))
    tensor([10], dtype=torch.int32)
    """
    if signs.isnan().any():
        raise ValueError("NaN has no sign and cannot be packed; look for the step that produced it")
    pad = -signs.shape[-1] % WORD_BITS
    bits = torch.nn.functional.pad(signs < 0, (0, pad)).unflatten(-1, (-1, WORD_BITS))  # (..., words, 32)
    place = torch.ones((), dtype=torch.int32, device=signs.device) << torch.arange(WORD_BITS, device=signs.device)
    return (bits * place.to(torch.int32)).sum(-1, dtype=torch.int32)


def unpack_signs(words: Tensor, count: int) -> Tensor:
    """The first `count` signs of each row of words: the inverse of `pack_signs`.

    Parameters
    ----------
    words : (..., ceil(count / 32)) int32 tensor
    count : int
        Signs per row.

    Returns
    -------
    (..., count) float32 tensor of -1 and +1.

    Raises
    ------
    ValueError
        If the rows do not hold exactly the words that `count` signs need, or a pad bit is set.

    Examples
    --------
    >>> unpack_signs(torch.tensor([10], dtype=torch.int32), 4)
    tensor([ 1., -1.,  1., -1.])
    """
    expected = -(-count // WORD_BITS)
    if words.shape[-1] != expected:
        raise ValueError(f"{count} signs need {expected} words a row, but there are {words.shape[-1]}")
    place = torch.arange(WORD_BITS, dtype=torch.int32, device=words.device)
    bits = ((words[..., None] >> place) & 1).flatten(-2)  # (..., words * 32)
    if bits[..., count:].any():
        raise ValueError("a pad bit is set: the words are damaged, or were packed with another bit order")
    return 1 - 2 * bits[..., :count].float()


def pack_factors(factors: Factors) -> PackedFactors:
    """Round a path to what is stored: the signs of its latents, its scales as float16.

    Raises
    ------
    ValueError
        If a latent is NaN, or a scale is not finite in float16.
    """
    v_by_rank = factors.v.mT  # (..., rank, d_in)
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
    u_sign = unpack_signs(packed.u_words, packed.ell.shape[-1])  # (..., d_out, rank)
    v_sign = unpack_signs(packed.v_words, packed.g.shape[-1]).mT  # (..., d_in, rank)
    return Factors(u_sign, v_sign, packed.h.float(), packed.ell.float(), packed.g.float())


def to_half(name: str, scale: Tensor) -> Tensor:
    """`scale` as float16, or a ValueError if that is not finite."""
    half = scale.to(torch.float16)
    if not torch.isfinite(half).all():
        raise ValueError(
            f"scale {name} does not fit float16 (largest magnitude {scale.abs().max():.3g}); "
            "divide the weight by a constant before factorising it"
        )
    return half
