"""Signs: the one-bit half of every number that LittleBit stores."""

import torch
from torch import Tensor


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
