"""Counting bits honestly: what a layer stores, what a budget buys.

"Bits" are bits per weight that are really stored: signs, the pad bits of the last word of each row, and every scale
at its stored width, divided by d_out * d_in. A target is a ceiling for the whole model.
"""

import math
from collections.abc import Mapping, Sequence
from fractions import Fraction

SCALE_BITS = 16
WORD_BITS = 32

Shape = tuple[int, int]
Ranks = tuple[int, ...]


def path_bits(d_out: int, d_in: int, rank: int, scale_bits: int = SCALE_BITS, word_bits: int = WORD_BITS) -> int:
    """Bits that one path stores (LittleBit, arXiv 2506.13771, Appendix D, plus padding).

    rank * pad(d_in) + d_out * pad(rank) + scale_bits * (d_out + d_in + rank), where pad rounds up to whole words

    Parameters
    ----------
    d_out, d_in, rank : int
    scale_bits : int
        Stored width of one scale.
    word_bits : int
        Rows of signs are padded to a multiple of this; 1 gives the paper's count, which ignores padding.

    Examples
    --------
    >>> path_bits(64, 64, rank=32)  # 32 * 64 + 64 * 32 + 16 * 160
    6656
    """
    signs = rank * padded(d_in, word_bits) + d_out * padded(rank, word_bits)
    return signs + scale_bits * (d_out + d_in + rank)


def padded(count: int, word_bits: int) -> int:
    """`count` rounded up to a multiple of `word_bits`."""
    return -(-count // word_bits) * word_bits


def layer_bits(
    d_out: int, d_in: int, ranks: Sequence[int], scale_bits: int = SCALE_BITS, word_bits: int = WORD_BITS
) -> int:
    """Bits that a layer with one path per rank stores; see `path_bits`.

    Examples
    --------
    >>> layer_bits(64, 64, ranks=(32, 32)) == 2 * path_bits(64, 64, 32)
    True
    """
    return sum(path_bits(d_out, d_in, rank, scale_bits, word_bits) for rank in ranks)


def rank_for_bits(
    d_out: int, d_in: int, bits: float, paths: int = 2, scale_bits: int = SCALE_BITS, word_bits: int = WORD_BITS
) -> int:
    """Largest rank, the same for each path, at which a layer stays within its bits per weight.

    Parameters
    ----------
    d_out, d_in : int
    bits : float
        Ceiling in bits per weight.
    paths : int
        1, or 2 for primary and residual.
    scale_bits, word_bits : int
        See `path_bits`.

    Raises
    ------
    ValueError
        If even rank 1 exceeds the ceiling; the message says what the smallest possible value is.

    Examples
    --------
    The paper's count for a 4096 x 4096 layer at 0.55 bits, and what fits with padding to whole words:

    >>> rank_for_bits(4096, 4096, 0.55, word_bits=1), rank_for_bits(4096, 4096, 0.55)
    (546, 544)
    """
    check_bits(bits, paths)
    budget = bits_budget(bits, d_out * d_in)
    rank = largest_rank((d_out, d_in), budget, paths, scale_bits, word_bits)
    if rank == 0:
        smallest = layer_bits(d_out, d_in, (1,) * paths, scale_bits, word_bits) / (d_out * d_in)
        raise ValueError(
            f"a {d_out} x {d_in} layer with {paths} path(s) cannot be stored in {bits:g} bits per weight; the smallest "
            f"possible value is {smallest:.3f} (rank 1). Raise bits, use fewer paths, or leave the layer as it is"
        )
    return rank


def allocate_ranks(
    shapes: Mapping[str, Shape],
    bits: float,
    paths: int = 2,
    scale_bits: int = SCALE_BITS,
    word_bits: int = WORD_BITS,
) -> dict[str, Ranks]:
    """Ranks for every layer of a model under one budget, as equal in bits per weight as whole ranks allow.

    Every layer gets the ranks of the highest common level of bits per weight that the budget affords, but at least
    rank 1, so that a layer too small for the target borrows from the others. What is left is spent one rank at a
    time on the layer that has the fewest bits per weight, until the cheapest step no longer fits.

    Parameters
    ----------
    shapes : mapping of layer name to (d_out, d_in)
    bits : float
        Ceiling in bits per weight for all layers together.
    paths, scale_bits, word_bits : int
        See `rank_for_bits`.

    Returns
    -------
    dict of layer name to one rank per path.

    Raises
    ------
    ValueError
        If even rank 1 everywhere exceeds the budget; the message says what the smallest possible value is.

    Examples
    --------
    >>> allocate_ranks({"square": (256, 256), "small": (64, 256)}, bits=1.0)
    {'square': (33, 32), 'small': (16, 16)}
    """
    check_bits(bits, paths)
    weights = sum(d_out * d_in for d_out, d_in in shapes.values())
    budget = bits_budget(bits, weights)
    widths = scale_bits, word_bits

    def stored(ranks: Mapping[str, Ranks]) -> int:
        return sum(layer_bits(*shapes[name], ranks[name], *widths) for name in shapes)

    def at_level(level: float) -> dict[str, Ranks]:
        by_shape = {
            shape: max(1, largest_rank(shape, bits_budget(level, math.prod(shape)), paths, *widths))
            for shape in set(shapes.values())
        }
        return {name: (by_shape[shape],) * paths for name, shape in shapes.items()}

    ranks = at_level(0.0)
    if stored(ranks) > budget:
        raise ValueError(
            f"the model cannot be stored in {bits:g} bits per weight with {paths} path(s) a layer; the smallest "
            f"possible value is {stored(ranks) / weights:.3f} (rank 1 everywhere). Raise bits, use fewer paths, or "
            "exclude the smallest layers"
        )
    low, high = 0.0, 2.0 * bits
    while high - low > 1e-6 * bits:
        level = (low + high) / 2
        low, high = (level, high) if stored(at_level(level)) <= budget else (low, level)
    ranks = at_level(low)
    spend_rest(shapes, ranks, budget - stored(ranks), *widths)
    return ranks


def spend_rest(shapes: Mapping[str, Shape], ranks: dict[str, Ranks], rest: int, scale_bits: int, word_bits: int):
    """Raise `ranks` in place, one rank at a time, until no step costs at most the `rest` of the budget, in bits."""
    widths = scale_bits, word_bits
    while True:
        steps = []
        for order, (name, (d_out, d_in)) in enumerate(shapes.items()):
            before = ranks[name]
            after = next_ranks(before, min(d_out, d_in))
            now = layer_bits(d_out, d_in, before, *widths)
            cost = layer_bits(d_out, d_in, after, *widths) - now
            if after != before and cost <= rest:
                steps.append((now / (d_out * d_in), order, name, after, cost))
        if not steps:
            return
        *_, name, after, cost = min(steps)
        ranks[name] = after
        rest -= cost


def next_ranks(ranks: Ranks, largest: int) -> Ranks:
    """`ranks` with the first of the smallest ones raised by one, or unchanged if all are at the largest."""
    smallest = min(ranks)
    if smallest == largest:
        return ranks
    at = ranks.index(smallest)
    return (*ranks[:at], smallest + 1, *ranks[at + 1 :])


def largest_rank(shape: Shape, budget: int, paths: int, scale_bits: int, word_bits: int) -> int:
    """Largest common rank of `paths` paths that stays within `budget` bits, 0 if there is none."""
    low, high = 0, min(shape)
    while low < high:  # invariant: rank `low` fits (0 by definition), every rank above `high` does not
        middle = (low + high + 1) // 2
        fits = layer_bits(*shape, (middle,) * paths, scale_bits, word_bits) <= budget
        low, high = (middle, high) if fits else (low, middle - 1)
    return low


def bits_budget(bits: float, weights: int) -> int:
    """Whole bits that `weights` weights may use; exact, so that the ratio never exceeds the target by rounding."""
    return math.floor(Fraction(bits) * weights)


def check_bits(bits: float, paths: int) -> None:
    """Raise ValueError unless `bits` is a positive finite number and `paths` a positive whole one."""
    if not (math.isfinite(bits) and bits > 0):
        raise ValueError(f"bits must be a positive number of bits per weight, not {bits}")
    if paths < 1:
        raise ValueError(f"paths must be 1 (primary) or 2 (primary and residual), not {paths}")
