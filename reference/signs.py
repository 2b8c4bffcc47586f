"""Signs: the one-bit half of every number that LittleBit stores, and the two rules that train them.

The derivative of a sign is zero wherever it exists. To train the latents behind the signs, a rule puts another
derivative in its place: forward is `sign`, backward the derivative of something smoother.
"""

from collections.abc import Callable

import numpy as np

SHARPNESS = 100.0  # of SmoothSign: the slope at zero
FLAT = 10.0  # SmoothSign's slope here and beyond is zero in every float dtype


def sign(x: np.ndarray) -> np.ndarray:
    """Sign of each entry, with sign(0) = +1, so that one bit is enough.

    Parameters
    ----------
    x : (...) float array
        -0.0 counts as 0, and so does NaN, which packing refuses.

    Returns
    -------
    (...) array of `x`'s dtype, every entry -1 or +1.

    Examples
    --------
    >>> sign(np.array([-2.0, 0.0, 3.0]))
    array([-1.,  1.,  1.])
    """
    return np.where(x < 0, -1, 1).astype(x.dtype)


def straight_through(x: np.ndarray) -> np.ndarray:
    """`sign`, to be differentiated by `straight_through_vjp`.

    Examples
    --------
    >>> straight_through(np.array([-2.0, 0.0, 3.0]))
    array([-1.,  1.,  1.])
    """
    return sign(x)


def straight_through_vjp(x: np.ndarray, grad: np.ndarray) -> np.ndarray:
    """Gradient of a sign as if it were the identity between -1 and 1 (Bengio et al., arXiv 1308.3432).

    grad * (|x| < 1)

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


def smooth_sign(x: np.ndarray) -> np.ndarray:
    """`sign`, to be differentiated by `smooth_sign_vjp`.

    Examples
    --------
    >>> smooth_sign(np.array([-2.0, 0.0, 3.0]))
    array([-1.,  1.,  1.])
    """
    return sign(x)


def smooth_sign_vjp(x: np.ndarray, grad: np.ndarray) -> np.ndarray:
    """Gradient of a sign as if it were tanh(100 x) (SmoothSign; LittleBit, arXiv 2506.13771).

    grad * 100 (1 - tanh^2(100 x)), computed as grad * 100 * 4 e / (1 + e)^2 with e = exp(-200 |x|): equal, but
    accurate also where the tanh rounds to one. The slope is 100 at zero, 7 at |x| = 0.02 and 0.02 at |x| = 0.05: only
    latents near zero, whose signs are in doubt, are moved.

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


#: The rules by name.
RULES: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "smooth_sign": smooth_sign_vjp,
    "straight_through": straight_through_vjp,
}


def named_rule(rule: str) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """The entry of RULES for a name: here (latents, gradient of the signs) -> gradient of the latents.

    Raises
    ------
    ValueError
        If there is no such rule.
    """
    if rule not in RULES:
        raise ValueError(f"rule must be one of {', '.join(map(repr, RULES))}, not {rule!r}")
    return RULES[rule]
