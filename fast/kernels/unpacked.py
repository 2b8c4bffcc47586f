"""Multiply by signs that are unpacked to floats, where no packed kernel fits."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from ..packing import PackedFactors, row_bits

HALVES = (torch.float16, torch.bfloat16)


def unpacked_linear(x: Tensor, paths: Sequence[PackedFactors]) -> Tensor:
    """`packed_linear` on any device, by two matrix products with unpacked signs; waits for no device.

    All paths are one pair of factors, y = B (A x), with scales folded in float32 (see `linear.folded`). A, B and A x
    are then rounded to x's dtype if it is float16 or bfloat16, in which torch multiplies. B is divided by its largest
    magnitude first where that exceeds one, since products of float16 scales need not fit float16.

    Parameters
    ----------
    x : (rows, d_in) float tensor
    paths : sequence of PackedFactors on x's device

    Returns
    -------
    (rows, d_out) float32 tensor; A and B take R * (d_in + d_out) elements while the call lasts, for a total rank R.
    """
    dtype = x.dtype if x.dtype in HALVES else torch.float32
    a, b = unpacked(paths)
    largest = b.abs().amax().clamp(min=1)
    t = functional.linear(x.to(dtype), a.to(dtype))  # (rows, R)
    return functional.linear(t, (b / largest).to(dtype)).float() * largest


def unpacked(paths: Sequence[PackedFactors]) -> tuple[Tensor, Tensor]:
    """All paths folded into one pair in float32 (see `linear.folded`): A, (R, d_in), and B, (d_out, R)."""
    a = torch.cat([path.g * signs(path.v_words, len(path.g)) for path in paths])
    b = torch.cat([path.h[:, None] * signs(path.u_words, path.rank) * path.ell for path in paths], dim=1)
    return a, b


def signs(words: Tensor, count: int) -> Tensor:
    """The first `count` signs of each row of words as float32, with no look at the pad bits."""
    return 1 - 2 * row_bits(words)[..., :count].float()
