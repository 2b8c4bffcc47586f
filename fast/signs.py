"""Take signs, and differentiate through them: the straight-through estimator (STE) and SmoothSign.

LittleBit stores the signs of its factors, one bit each. The derivative of a sign is zero wherever it exists, so plain
gradient descent could never flip one. Both rules here take the sign in the forward pass. In the backward pass they put
the derivative of a smoother function in the place of the sign's (a surrogate gradient), which moves the latents: the
real numbers behind the signs.
"""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

SHARPNESS = 100.0  # slope of SmoothSign at 0
FLAT = 10.0  # from here on SmoothSign's slope is 0 in every float dtype


def sign(x: Tensor) -> Tensor:
    """Take the sign of each entry, with sign(0) = +1, so that one bit is enough.

    Parameters
    ----------
    x : (...) float tensor
        -0.0 counts as 0. NaN gives +1 here; packing refuses it.

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
    """Take signs whose gradient is the straight-through estimator's.

    The forward pass is `sign`; autograd calls `straight_through_vjp` in the backward pass.

    Examples
    --------
    >>> straight_through(torch.tensor([-2.0, 0.0, 3.0]))
    tensor([-1.,  1.,  1.])
    """
    return cast(Tensor, SignWithRule.apply(x, straight_through_vjp))


def straight_through_vjp(x: Tensor, grad: Tensor) -> Tensor:
    """Compute the gradient of a sign as if it were the identity between -1 and 1 (straight-through estimator, STE).

    grad * (|x| < 1)

    The rule is that of Bengio et al. (arXiv 1308.3432), clipped. A latent with |x| >= 1 gets no gradient: it stays
    where it is, and its sign never flips. Factors of `admm` may have many latents there.

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
    """Take signs whose gradient is SmoothSign's.

    The forward pass is `sign`; autograd calls `smooth_sign_vjp` in the backward pass.

    Examples
    --------
    >>> smooth_sign(torch.tensor([-2.0, 0.0, 3.0]))
    tensor([-1.,  1.,  1.])
    """
    return cast(Tensor, SignWithRule.apply(x, smooth_sign_vjp))


def smooth_sign_vjp(x: Tensor, grad: Tensor) -> Tensor:
    """Compute the gradient of a sign as if it were tanh(100 x) (SmoothSign; LittleBit, arXiv 2506.13771).

    grad * 100 (1 - tanh^2(100 x))

    The code uses grad * 100 * 4 e / (1 + e)^2 with e = exp(-200 |x|), which is equal, and accurate where tanh rounds to
    1. The slope is 100 at 0, 7 at |x| = 0.02, 1 at 0.03 and 0.02 at 0.05. Plain gradient descent would thus move only
    latents near 0. Adam reaches further: it divides a gradient by the size of past ones, so the slope cancels until
    slope * gradient falls to Adam's eps. With eps = 1e-8 latents up to about |x| = 0.1 move.

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
    """Take signs in the forward pass, and apply a rule's vector-Jacobian product (vjp) in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, vjp: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """Return the signs of the latents."""
        ctx.save_for_backward(x)
        ctx.vjp = vjp
        return sign(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        """Return the gradient with respect to the latents."""
        (x,) = ctx.saved_tensors
        return ctx.vjp(x, grad), None


#: Rules by name: latents -> signs with the rule's gradient.
RULES: dict[str, Callable[[Tensor], Tensor]] = {
    "smooth_sign": smooth_sign,
    "straight_through": straight_through,
}


def named_rule(rule: str) -> Callable[[Tensor], Tensor]:
    """Look up a rule in RULES by its name.

    The result maps latents to signs, and has the rule's gradient.

    Raises
    ------
    ValueError
        If RULES has no such name.
    """
    if rule not in RULES:
        raise ValueError(f"rule must be one of {', '.join(map(repr, RULES))}, not {rule!r}")
    return RULES[rule]
