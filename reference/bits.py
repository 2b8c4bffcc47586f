"""Counting bits honestly: what a layer stores, what a budget buys.

"Bits" are bits per weight that are really stored: signs, the pad bits of the last word of each row, and every scale
at its stored width, divided by d_out * d_in. A target is a ceiling for the whole model.
"""

import heapq
import math
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction

SCALE_BITS = 16  #: Stored width of one scale.
WORD_BITS = 32  #: Width of the widest words that signs are stored in.
NARROWEST_WORD_BITS = 8
SECOND_PATH_SHARE = 0.1

Shape = tuple[int, int]
Ranks = tuple[int, ...]


def path_bits(d_out: int, d_in: int, rank: int, scale_bits: int = SCALE_BITS, word_bits: int = WORD_BITS) -> int:
    """Bits that one path stores (LittleBit, arXiv 2506.13771, Appendix D, plus padding).

    rank * pad(d_in) + d_out * pad(rank) + scale_bits * (d_out + d_in + rank), where pad is `padded`

    Parameters
    ----------
    d_out, d_in, rank : int
    scale_bits : int
        Stored width of one scale.
    word_bits : int
        Width of the widest words, see `word_width`; 1 gives the paper's count, which ignores padding.

    Examples
    --------
    >>> path_bits(64, 64, rank=32)  # 32 * 64 + 64 * 32 + 16 * 160
    6656
    """
    signs = rank * padded(d_in, word_bits) + d_out * padded(rank, word_bits)
    return signs + scale_bits * (d_out + d_in + rank)


def word_width(count: int, word_bits: int = WORD_BITS) -> int:
    """Bits of each word that a row of `count` signs is stored in: the narrowest words that hold it.

    Words are halved, from `word_bits` down to 8, while one half-word still holds the whole row. A row of up to 8
    signs is thus one 8-bit word, a row of up to 16 one 16-bit word, and a longer row whole 32-bit words. The rule is
    the same for U (rows along the rank) and V (rows along d_in), in memory and in files.

    Parameters
    ----------
    count : int
        Signs in the row.
    word_bits : int
        Width of the widest words.

    Examples
    --------
    >>> [word_width(count) for count in (1, 8, 9, 16, 17, 576)]
    [8, 8, 16, 16, 32, 32]
    """
    while word_bits // 2 >= max(count, NARROWEST_WORD_BITS):
        word_bits //= 2
    return word_bits


def padded(count: int, word_bits: int = WORD_BITS) -> int:
    """Bits that a row of `count` signs is stored in: `count` rounded up to whole words of its `word_width`.

    Examples
    --------
    >>> [padded(count) for count in (1, 8, 9, 16, 17, 33)]
    [8, 8, 16, 16, 32, 64]
    """
    width = word_width(count, word_bits)
    return -(-count // width) * width


def filled(rank: int, word_bits: int = WORD_BITS) -> int:
    """The largest rank up to `rank` whose words of U are full; ranks below the narrowest word are left as they are.

    The first rank of a new word costs the whole word, in every row of U; the others of that word cost V alone.

    Examples
    --------
    >>> [filled(rank) for rank in (5, 8, 15, 31, 63, 64)]
    [5, 8, 8, 16, 32, 64]
    """
    while rank > NARROWEST_WORD_BITS and padded(rank, word_bits) != rank:
        rank -= 1
    return rank


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
    The paper's count for a 4096 x 4096 layer at 0.55 bits, and what fits with padding to words:

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


def official_rank(d_out: int, d_in: int, bits: float, paths: int = 2, factor: float = 1.0) -> int:
    """The rank of each path that the authors' program gives a layer: a multiple of 8, at least 8, by their count.

    They count paths * (rank (d_out + d_in + 16) + 16 (d_out + d_in)) bits, no padding, and do not lower other layers'
    ranks for small ones that exceed the target. Their loader builds its layers by this rule, so a checkpoint for it
    must follow it.

    Parameters
    ----------
    d_out, d_in : int
    bits : float
        Target in bits per weight.
    paths : int
        1, or 2 for primary and residual.
    factor : float
        What the rank is multiplied by before it is rounded down (k_proj and v_proj of grouped queries).

    Examples
    --------
    >>> official_rank(4096, 4096, 0.55), official_rank(64, 64, 0.1)
    (544, 8)
    """
    check_bits(bits, paths)
    rank = (d_out * d_in * bits - 16 * paths * (d_out + d_in)) / (paths * (d_out + d_in + 16)) * factor
    return max(8, int(rank) // 8 * 8)


def paths_for_bits(d_out: int, d_in: int, bits: float, scale_bits: int = SCALE_BITS) -> int:
    """1 or 2 paths for a layer, by what the second path's scales would cost.

    A residual path helps while its own scales are a small part of the budget, and hurts when they are not: in the
    paper at 0.1 bits (OPT-1.3B: perplexity 48.5 without it, 60.0 with it; scales of a second path are 15 % of a
    2048 x 2048 layer's budget there, and 5 % at 0.3 bits, where it helps). The line is drawn at a tenth.

    Parameters
    ----------
    d_out, d_in : int
    bits : float
        The layer's bits per weight.
    scale_bits : int
        See `path_bits`.

    Examples
    --------
    >>> paths_for_bits(4096, 4096, 0.55), paths_for_bits(2048, 2048, 0.1)
    (2, 1)
    """
    return 2 if scale_bits * (d_out + d_in) <= SECOND_PATH_SHARE * bits * d_out * d_in else 1


def allocate_ranks(
    shapes: Mapping[str, Shape],
    bits: float,
    paths: int | None = 2,
    gains: Mapping[str, Sequence[float]] | None = None,
    scale_bits: int = SCALE_BITS,
    word_bits: int = WORD_BITS,
    shares: Mapping[str, float] | None = None,
) -> dict[str, Ranks]:
    """Ranks for every layer of a model under one budget.

    Without gains the layers are as equal in sign bits per weight as full words of U allow: every layer gets the ranks
    of the highest common level that the budget affords, but at least rank 1, so that a layer whose scales alone are
    too much for the target borrows from the others. With gains the budget goes to the layer that gains most per bit.
    Ranks rise to 8, 16, 32, 64, 96 and so on, because a word costs the same full or not. In both cases what is left
    goes to the layer that has the fewest sign bits per weight, a word and then one rank at a time, until the cheapest
    step no longer fits.

    Parameters
    ----------
    shapes : mapping of layer name to (d_out, d_in)
    bits : float
        Ceiling in bits per weight for all layers together.
    paths : int, optional
        Paths in each layer; None chooses 1 or 2 for each layer by `paths_for_bits`.
    gains : mapping of layer name to a sequence of float, optional
        gains[name][k] is the loss that the layer's rank k + 1 saves, counted over all its paths; missing ones save
        nothing.
    scale_bits, word_bits : int
        See `path_bits`.
    shares : mapping of layer name to float, optional
        How many times the sign bits per weight of other layers these layers get, without gains.

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
    {'square': (32, 32), 'small': (32, 32)}
    """
    check_bits(bits, 1 if paths is None else paths)
    shares = {name: (shares or {}).get(name, 1.0) for name in shapes}
    counts = {
        name: paths_for_bits(*shape, bits, scale_bits) if paths is None else paths for name, shape in shapes.items()
    }
    weights = sum(d_out * d_in for d_out, d_in in shapes.values())
    budget = bits_budget(bits, weights)
    smallest = {name: (1,) * count for name, count in counts.items()}
    stored = model_bits(shapes, smallest, scale_bits, word_bits)
    if stored > budget:
        raise ValueError(
            f"the model cannot be stored in {bits:g} bits per weight with {paths or 'the fewest possible'} path(s) a "
            f"layer; the smallest possible value is {stored / weights:.3f} (rank 1 everywhere). Raise bits, use fewer "
            "paths, or exclude the smallest layers"
        )
    if gains is None:
        ranks = equal_ranks(shapes, counts, shares, bits, budget, scale_bits, word_bits)
    else:
        ranks = best_ranks(shapes, smallest, gains, budget - stored, scale_bits, word_bits)
    for step_bits in (word_bits, 1):
        rest = budget - model_bits(shapes, ranks, scale_bits, word_bits)
        spend_rest(shapes, ranks, shares, rest, step_bits, scale_bits, word_bits)
    return ranks


def model_bits(
    shapes: Mapping[str, Shape], ranks: Mapping[str, Ranks], scale_bits: int = SCALE_BITS, word_bits: int = WORD_BITS
) -> int:
    """Bits that all layers of a model store; see `path_bits`.

    Examples
    --------
    >>> model_bits({"a": (64, 64), "b": (64, 64)}, {"a": (32,), "b": (32, 32)}) == 3 * path_bits(64, 64, 32)
    True
    """
    return sum(layer_bits(*shapes[name], ranks[name], scale_bits, word_bits) for name in shapes)


def equal_ranks(
    shapes: Mapping[str, Shape],
    counts: Mapping[str, int],
    shares: Mapping[str, float],
    bits: float,
    budget: int,
    scale_bits: int,
    word_bits: int,
) -> dict[str, Ranks]:
    """The ranks of the highest common level of sign bits per weight that `budget` bits afford, found by bisection."""

    def at_level(level: float) -> dict[str, Ranks]:
        kinds = {}
        for shape, count, share in {(shapes[name], counts[name], shares[name]) for name in shapes}:
            most = largest_rank(shape, bits_budget(level * share, math.prod(shape)), count, 0, word_bits)
            kinds[shape, count, share] = (max(1, filled(most, word_bits)),) * count
        return {name: kinds[shapes[name], counts[name], shares[name]] for name in shapes}

    low, high = 0.0, 2.0 * bits / min(shares.values(), default=1.0)
    while high - low > 1e-6 * bits:
        level = (low + high) / 2
        fits = model_bits(shapes, at_level(level), scale_bits, word_bits) <= budget
        low, high = (level, high) if fits else (low, level)
    return at_level(low)


def best_ranks(
    shapes: Mapping[str, Shape],
    ranks: Mapping[str, Ranks],
    gains: Mapping[str, Sequence[float]],
    rest: int,
    scale_bits: int,
    word_bits: int,
) -> dict[str, Ranks]:
    """Ranks raised from `ranks`, by full words of U, where they gain most per bit, as long as `rest` bits allow.

    Gains that fall with the rank make this greedy choice the best one, up to what no longer fits at the end.
    """
    ranks = dict(ranks)

    def offer(name: str) -> tuple[float, str, Ranks, int] | None:
        after = next_ranks(ranks[name], min(shapes[name]), word_bits)
        if after == ranks[name]:
            return None
        cost = sum(
            sign * layer_bits(*shapes[name], each, scale_bits, word_bits)
            for sign, each in ((1, after), (-1, ranks[name]))
        )
        return -sum(gains[name][sum(ranks[name]) : sum(after)]) / cost, name, after, cost

    spend(offer, ranks, rest)
    return ranks


def spend(offer: Callable[[str], tuple | None], ranks: dict[str, Ranks], rest: int) -> None:
    """Raise `ranks` in place by the first of the layers' offers, again and again, as long as `rest` bits allow.

    An offer is what it is ordered by, the layer's name, its ranks after that, and what they cost. What is too dear once
    stays so, as the rest falls.
    """
    offers = [made for name in ranks if (made := offer(name))]
    heapq.heapify(offers)
    while offers:
        *_, name, after, cost = heapq.heappop(offers)
        if cost <= rest:
            ranks[name] = after
            rest -= cost
            if made := offer(name):
                heapq.heappush(offers, made)


def spend_rest(
    shapes: Mapping[str, Shape],
    ranks: dict[str, Ranks],
    shares: Mapping[str, float],
    rest: int,
    step_bits: int,
    scale_bits: int,
    word_bits: int,
) -> None:
    """Raise `ranks` in place until no step costs at most the `rest` of the budget, in bits.

    A step is one rank (`step_bits` 1) or what fills the words of U.
    """
    widths = scale_bits, word_bits
    order = {name: at for at, name in enumerate(shapes)}

    def step(name: str) -> tuple[float, int, str, Ranks, int] | None:
        (d_out, d_in), before = shapes[name], ranks[name]
        after = next_ranks(before, min(d_out, d_in), step_bits)
        if after == before:
            return None
        cost = layer_bits(d_out, d_in, after, *widths) - layer_bits(d_out, d_in, before, *widths)
        signs = layer_bits(d_out, d_in, before, 0, word_bits)
        return signs / (d_out * d_in * shares[name]), order[name], name, after, cost

    spend(step, ranks, rest)


def next_ranks(ranks: Ranks, largest: int, word_bits: int = 1) -> Ranks:
    """`ranks` with the first of the smallest ones raised to what one rank more is padded to, at most to `largest`."""
    smallest = min(ranks)
    at = ranks.index(smallest)
    return (*ranks[:at], min(largest, padded(smallest + 1, word_bits)), *ranks[at + 1 :])


def largest_rank(shape: Shape, budget: int, paths: int, scale_bits: int, word_bits: int) -> int:
    """Largest common rank of `paths` paths that stays within `budget` bits, 0 if there is none."""
    low, high = 0, min(shape)
    while low < high:  # invariant: rank `low` fits (0 by definition), every rank above `high` does not
        middle = (low + high + 1) // 2
        fits = layer_bits(*shape, (middle,) * paths, scale_bits, word_bits) <= budget
        low, high = (middle, high) if fits else (low, middle - 1)
    return low


def bits_budget(bits: float, weights: int) -> int:
    """Whole bits that `weights` weights may use: the most whose ratio, as a float, is within `bits`."""
    exact = math.floor(Fraction(bits) * weights)
    # A float below the decimal that was typed, as 1.2 is, does not cost the bit with which the ratio is 1.2 again.
    return exact + ((exact + 1) / weights <= bits)


def check_bits(bits: float, paths: int) -> None:
    """Raise ValueError unless `bits` is a positive finite number and `paths` a positive whole one."""
    if not (math.isfinite(bits) and bits > 0):
        raise ValueError(f"bits must be a positive number of bits per weight, not {bits}")
    if paths < 1:
        raise ValueError(f"paths must be 1 (primary) or 2 (primary and residual), not {paths}")


def kv_cache_bytes(tokens: int, widths: Sequence[int], element_bytes: int = 2, scale_bytes: int = 0) -> int:
    """Bytes of a key-value cache (LittleBit, arXiv 2506.13771, Table 4).

    tokens * (sum(widths) * element_bytes + len(widths) * scale_bytes)

    Parameters
    ----------
    tokens : int
        Context length times batch size.
    widths : sequence of int
        Numbers kept per token by each k_proj and v_proj: d_kv of an ordinary cache, or the layer's total rank when
        the latents t = ell * (V_sign^T (g * x)) are kept instead.
    element_bytes : int
        2 for float16.
    scale_bytes : int
        Of a scale for each token and projection, if there is one.

    Examples
    --------
    Llama-2-7B at a context of 4096, and with the latents of a rank of 192:

    >>> ordinary = kv_cache_bytes(4096, [4096] * 64)
    >>> ordinary, round(ordinary / kv_cache_bytes(4096, [192] * 64), 1)
    (2147483648, 21.3)
    """
    return tokens * (sum(widths) * element_bytes + len(widths) * scale_bytes)
