"""Multiply by unpacked signs: the simplest method, on any device, where no packed kernel can be used.

It reads n / 8 bytes of packed signs, then writes and reads a dense factor of 2 or 4 bytes for each sign, at every call.
So it saves memory but not time: use it for large batches, for gradients, and on devices without a kernel.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from ..packing import PackedFactors, row_bits

HALVES = (torch.float16, torch.bfloat16)


def unpacked_linear(x: Tensor, paths: Sequence[PackedFactors]) -> Tensor:
    """Compute `packed_linear` by two matrix products with unpacked signs, y = B (A x), on any device.

    The scales are folded into A and B in float32 (see `unpacked`). If x is float16 or bfloat16, A, B and A x are then
    rounded to its dtype, in which torch multiplies. Products of float16 scales can overflow float16, so B is divided by
    its largest magnitude first if that exceeds one. The call does not wait for the device.

    Parameters
    ----------
    x : (rows, d_in) float tensor
    paths : sequence of PackedFactors
        On x's device.

    Returns
    -------
    (rows, d_out) float32 tensor. A and B take R * (d_in + d_out) elements during the call, for a total rank R.
    """
    dtype = x.dtype if x.dtype in HALVES else torch.float32
    a, b = unpacked(paths)
    largest = b.abs().amax().clamp(min=1)
    t = functional.linear(x.to(dtype), a.to(dtype))  # (rows, R)
    return functional.linear(t, (b / largest).to(dtype)).float() * largest


def unpacked(paths: Sequence[PackedFactors]) -> tuple[Tensor, Tensor]:
    """Unpack all paths to one pair of float32 factors with W_hat = B A.

    A, (R, d_in), stacks g * V_sign^T of the paths. B, (d_out, R), has h * U_sign * ell side by side.
    """
    a = torch.cat([path.g * signs(path.v_words, len(path.g)) for path in paths])
    b = torch.cat([path.h[:, None] * signs(path.u_words, path.rank) * path.ell for path in paths], dim=1)
    return a, b


def signs(words: Tensor, count: int) -> Tensor:
    """Unpack the first `count` signs of each row of words to float32 values of -1 and +1, without checking pad bits."""
    return 1 - 2 * row_bits(words)[..., :count].float()
