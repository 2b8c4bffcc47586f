"""Residual compensation: two low-rank paths out of one bit budget (LittleBit, arXiv 2506.13771)."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .arrays import at_least_float32
from .dual_svid import dual_svid
from .factors import Factors


def compensate(
    weight: Tensor, ranks: Sequence[int], factorise: Callable[[Tensor, int], Factors] = dual_svid
) -> list[Factors]:
    """Factorise a weight, then what is left of it, once per rank.

    The first path is the primary one, the second the residual one: factorise(W - W_primary), and so on. Each path's
    ell is multiplied by the step that minimises the Frobenius error along that path. The step is within 2 % of 1 on
    the weights of language models; it is there so that a further path never increases the error, whatever the weight.

    Parameters
    ----------
    weight : (..., d_out, d_in) float tensor
    ranks : sequence of int
        One rank per path; `bits.rank_for_bits` gives those that a budget allows.
    factorise : callable
        (matrix, rank) -> Factors.

    Returns
    -------
    One Factors per rank; their dense forms add up to the approximation.

    Examples
    --------
    >>> weight = torch.tensor([[3.0, 1.0], [1.0, 2.0]])
    >>> primary, residual = compensate(weight, ranks=[1, 1])
    >>> bool((weight - primary.to_dense() - residual.to_dense()).abs().max() < 1e-5)
    True
    """
    paths = []
    rest = at_least_float32("the weight", weight)
    for rank in ranks:
        factors = factorise(rest, rank)
        factors = factors._replace(ell=factors.ell * best_step(rest, factors.to_dense())[..., None])
        paths.append(factors)
        rest = rest - factors.to_dense()
    return paths


def compensate_weighted(
    weight: Tensor,
    ranks: Sequence[int],
    row: Tensor,
    column: Tensor,
    factorise: Callable[[Tensor, int], Factors] = dual_svid,
) -> list[Factors]:
    """`compensate` for the error sum_ij row_i column_j (W - W_hat)_ij^2, which counts important channels more.

    With R = diag(sqrt(row)) and C = diag(sqrt(column)), R W C is factorised, and the paths of W are those of R W C with
    rows divided by R and columns by C. Signs do not change: all weights are positive.

    Parameters
    ----------
    weight : (..., d_out, d_in) float tensor
    ranks : sequence of int
    row : (..., d_out) positive float tensor
    column : (..., d_in) positive float tensor
        See `admm.importance`.
    factorise : callable

    Returns
    -------
    One Factors per rank.

    Raises
    ------
    ValueError
        If a weight is not positive.
    """
    weight = at_least_float32("the weight", weight)
    row, column = at_least_float32("row weights", row), at_least_float32("column weights", column)
    if not ((row > 0).all() and (column > 0).all()):
        raise ValueError("importance weights must be positive; shrink them towards their mean first")
    r, c = row.sqrt(), column.sqrt()
    paths = compensate(r[..., :, None] * weight * c[..., None, :], ranks, factorise)
    return [Factors(p.u / r[..., None], p.v / c[..., None], p.h / r, p.ell, p.g / c) for p in paths]


def best_step(target: Tensor, direction: Tensor) -> Tensor:
    """The step t >= 0 that minimises ||target - t direction||_F, (...) for (..., m, n) matrices.

    t = max(0, <target, direction> / <direction, direction>), and 0 for a zero direction.
    """
    tiny = torch.finfo(target.dtype).tiny
    scale = direction.abs().amax((-2, -1), keepdim=True).clamp(min=tiny)  # keeps tiny and huge squares in range
    unit = direction / scale
    step = (target / scale * unit).sum((-2, -1)) / (unit * unit).sum((-2, -1)).clamp(min=tiny)
    return step.clamp(min=0)
