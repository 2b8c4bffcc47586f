"""Take signs, and differentiate through them: the straight-through estimator (STE) and SmoothSign.

LittleBit stores the signs of its factors, one bit each. The derivative of a sign is zero wherever it exists, so plain
gradient descent could never flip one. Both rules here take the sign in the forward pass. In the backward pass they put
the derivative of a smoother function in the place of the sign's (a surrogate gradient), which moves the latents: the
real numbers behind the signs.
"""

from collections.abc import Callable

import numpy as np

from .arrays import Array

SHARPNESS = 100.0  # slope of SmoothSign at 0
FLAT = 10.0  # from here on SmoothSign's slope is 0 in every float dtype


def sign(x: Array) -> Array:
    """Take the sign of each entry, with sign(0) = +1, so that one bit is enough.

    Parameters
    ----------
    x : (...) float array
        -0.0 counts as 0. NaN gives +1 here; packing refuses it.

    Returns
    -------
    (...) array of `x`'s dtype, every entry -1 or +1.

    Examples
    --------
    >>> sign(np.array([-2.0, 0.0, 3.0]))
    array([-1.,  1.,  1.])
    """
    return np.where(x < 0, -1, 1).astype(x.dtype)


def straight_through(x: Array) -> Array:
    """Take signs whose gradient is the straight-through estimator's.

    The forward pass is `sign`, the backward pass `straight_through_vjp`.

    Examples
    --------
    >>> straight_through(np.array([-2.0, 0.0, 3.0]))
    array([-1.,  1.,  1.])
    """
    return sign(x)


def straight_through_vjp(x: Array, grad: Array) -> Array:
    """Compute the gradient of a sign as if it were the identity between -1 and 1 (straight-through estimator, STE).

    grad * (|x| < 1)

    The rule is that of Bengio et al. (arXiv 1308.3432), clipped. A latent with |x| >= 1 gets no gradient: it stays
    where it is, and its sign never flips. Factors of `admm` may have many latents there.

    Parameters
    ----------
    x : (...) float array
        Latents.
    grad : (...) float array
        Gradient of the loss with respect to the signs.

    Returns
    -------
    (...) array, the gradient with respect to the latents.

    Examples
    --------
    >>> straight_through_vjp(np.array([-2.0, -0.5, 0.0]), np.array([1.0, 1.0, 3.0]))
    array([0., 1., 3.])
    """
    return grad * (np.abs(x) < 1)


def smooth_sign(x: Array) -> Array:
    """Take signs whose gradient is SmoothSign's.

    The forward pass is `sign`, the backward pass `smooth_sign_vjp`.

    Examples
    --------
    >>> smooth_sign(np.array([-2.0, 0.0, 3.0]))
    array([-1.,  1.,  1.])
    """
    return sign(x)


def smooth_sign_vjp(x: Array, grad: Array) -> Array:
    """Compute the gradient of a sign as if it were tanh(100 x) (SmoothSign; LittleBit, arXiv 2506.13771).

    grad * 100 (1 - tanh^2(100 x))

    The code uses grad * 100 * 4 e / (1 + e)^2 with e = exp(-200 |x|), which is equal, and accurate where tanh rounds to
    1. The slope is 100 at 0, 7 at |x| = 0.02, 1 at 0.03 and 0.02 at 0.05. Plain gradient descent would thus move only
    latents near 0. Adam reaches further: it divides a gradient by the size of past ones, so the slope cancels until
    slope * gradient falls to Adam's eps. With eps = 1e-8 latents up to about |x| = 0.1 move.

    Parameters
    ----------
    x : (...) float array
        Latents.
    grad : (...) float array
        Gradient of the loss with respect to the signs.

    Returns
    -------
    (...) array, the gradient with respect to the latents.

    Examples
    --------
    >>> smooth_sign_vjp(np.array([-3e38, 0.0, 0.02]), np.array([1.0, 1.0, 2.0])).round(2)
    array([  0.  , 100.  ,  14.13])
    """
    e = np.exp(-2 * SHARPNESS * np.minimum(np.abs(x), FLAT))
    return grad * (SHARPNESS * 4 * e / ((1 + e) * (1 + e)))


#: Rules by name: (latents, gradient of the signs) -> gradient of the latents.
RULES: dict[str, Callable[[Array, Array], Array]] = {
    "smooth_sign": smooth_sign_vjp,
    "straight_through": straight_through_vjp,
}


def named_rule(rule: str) -> Callable[[Array, Array], Array]:
    """Look up a rule in RULES by its name.

    The result maps (latents, gradient of the signs) to the gradient of the latents.

    Raises
    ------
    ValueError
        If RULES has no such name.
    """
    if rule not in RULES:
        raise ValueError(f"rule must be one of {', '.join(map(repr, RULES))}, not {rule!r}")
    return RULES[rule]
