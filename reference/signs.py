"""Signs: the one-bit half of every number that LittleBit stores."""

import numpy as np


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
