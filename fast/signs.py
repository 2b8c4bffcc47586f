"""Signs: the one-bit half of every number that LittleBit stores, and the two rules that train them.

The derivative of a sign is zero wherever it exists. To train the latents behind the signs, a rule puts another
derivative in its place: forward is `sign`, backward the derivative of something smoother.
"""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

SHARPNESS = 100.0  # of SmoothSign: the slope at zero
FLAT = 10.0  # SmoothSign's slope here and beyond is zero in every float dtype


def sign(x: Tensor) -> Tensor:
    """Sign of each entry, with sign(0) = +1, so that one bit is enough.

    Parameters
    ----------
    x : (...) float tensor
        -0.0 counts as 0, and so does NaN, which packing refuses.

    Returns
    -------
    (...) tensor of `x`'s dtype, every entry -1 or +1.

    Examples
    --------
    >>> sign(torch.tensor([-2.0, 0.0, 3.0]))
    tensor([-1.,  1.,  1.])
    """
    one = torch.ones((), dtype=x.dtype, device=x.device)
    return torch.where(x < 0, -one, one)


def straight_through(x: Tensor) -> Tensor:
    """`sign`, differentiated by `straight_through_vjp`.

    Examples
    --------
    >>> straight_through(torch.tensor([-2.0, 0.0, 3.0]))
    tensor([-1.,  1.,  1.])
    """
    return cast(Tensor, SignWithRule.apply(x, straight_through_vjp))


def straight_through_vjp(x: Tensor, grad: Tensor) -> Tensor:
    """Gradient of a sign as if it were the identity between -1 and 1 (Bengio et al., arXiv 1308.3432).

    grad * (|x| < 1)

    Parameters
    ----------
    x : (...) float tensor
        Latents.
    grad : (...) float tensor
        Gradient of the loss with respect to the signs.

    Returns
    -------
    (...) tensor, the gradient with respect to the latents.

    Examples
    --------
    >>> straight_through_vjp(torch.tensor([-2.0, -0.5, 0.0]), torch.tensor([1.0, 1.0, 3.0]))
    tensor([0., 1., 3.])
    """
    return grad * (x.abs() < 1)


def smooth_sign(x: Tensor) -> Tensor:
    """`sign`, differentiated by `smooth_sign_vjp`.

    Examples
    --------
    >>> smooth_sign(torch.tensor([-2.0, 0.0, 3.0]))
    tensor([-1.,  1.,  1.])
    """
    return cast(Tensor, SignWithRule.apply(x, smooth_sign_vjp))


def smooth_sign_vjp(x: Tensor, grad: Tensor) -> Tensor:
    """Gradient of a sign as if it were tanh(100 x) (SmoothSign; LittleBit, arXiv 2506.13771).

    grad * 100 (1 - tanh^2(100 x)), computed as grad * 100 * 4 e / (1 + e)^2 with e = exp(-200 |x|): equal, but
    accurate also where the tanh rounds to one. The slope is 100 at zero, 7 at |x| = 0.02 and 0.02 at |x| = 0.05: only
    latents near zero, whose signs are in doubt, are moved.

    Parameters
    ----------
    x : (...) float tensor
        Latents.
    grad : (...) float tensor
        Gradient of the loss with respect to the signs.

    Returns
    -------
    (...) tensor, the gradient with respect to the latents.

    Examples
    --------
    >>> smooth_sign_vjp(torch.tensor([-3e38, 0.0, 0.02]), torch.tensor([1.0, 1.0, 2.0])).round(decimals=2)
    tensor([  0.0000, 100.0000,  14.1300])
    """
    e = torch.exp(-2 * SHARPNESS * x.abs().clamp(max=FLAT))
    return grad * (SHARPNESS * 4 * e / ((1 + e) * (1 + e)))


class SignWithRule(torch.autograd.Function):
    """Forward `sign`, backward the rule's vjp."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, vjp: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """Signs of the latents."""
        ctx.save_for_backward(x)
        ctx.vjp = vjp
        return sign(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        """Gradient with respect to the latents."""
        (x,) = ctx.saved_tensors
        return ctx.vjp(x, grad), None


#: The rules by name.
RULES: dict[str, Callable[[Tensor], Tensor]] = {
    "smooth_sign": smooth_sign,
    "straight_through": straight_through,
}


def named_rule(rule: str) -> Callable[[Tensor], Tensor]:
    """The entry of RULES for a name: here latents -> signs, with the rule's derivative.

    Raises
    ------
    ValueError
        If there is no such rule.
    """
    if rule not in RULES:
        raise ValueError(f"rule must be one of {', '.join(map(repr, RULES))}, not {rule!r}")
    return RULES[rule]
