"""Count the bits that layers really store, and find the ranks that a bit budget allows.

"Bits" are stored bits per weight: signs, the pad bits of the last word of each row, and every scale at its stored
width, divided by d_out * d_in. A budget is a ceiling for the whole model. The paper's count (LittleBit, arXiv
2506.13771, Appendix D) leaves padding out; `word_bits=1` gives it.
"""

import heapq
import math
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction

SCALE_BITS = 16  #: Stored width of a scale (float16); 8-bit codes take half (`packing.encode_scale`).
PEAK_BITS = 16  # stored width of the largest scale of each vector, beside codes of 8 bits
WORD_BITS = 32  #: Width of the widest words that store signs.
NARROWEST_WORD_BITS = 8  # width of the narrowest words that store signs
SECOND_PATH_SHARE = 0.1  # largest share of a budget that scales of a second path may take

Shape = tuple[int, int]
Ranks = tuple[int, ...]


def path_bits(d_out: int, d_in: int, rank: int, scale_bits: int = SCALE_BITS, word_bits: int = WORD_BITS) -> int:
    """Count the bits that one path stores (LittleBit, arXiv 2506.13771, Appendix D, plus padding).

    rank * padded(d_in) + d_out * padded(rank) + scale_bits * (d_out + d_in + rank)

    Scales of 8 bits are codes, and each of the three vectors stores its largest scale in PEAK_BITS more.

    Parameters
    ----------
    d_out, d_in, rank : int
    scale_bits : int
        Stored width of a scale: 16 or 8; 0 leaves the scales out.
    word_bits : int
        Width of the widest words, see `word_width`; 1 gives the paper's count, without padding.

    Examples
    --------
    >>> path_bits(64, 64, rank=32)  # 32 * 64 + 64 * 32 + 16 * 160
    6656
    """
    signs = rank * padded(d_in, word_bits) + d_out * padded(rank, word_bits)
    return signs + scale_bits * (d_out + d_in + rank) + (3 * PEAK_BITS if scale_bits == 8 else 0)


def word_width(count: int, word_bits: int = WORD_BITS) -> int:
    """Find the width in bits of the words that store a row of signs.

    Words are halved, from `word_bits` down to 8, while half a word still holds the whole row. So a row of up to 8 signs
    is one 8-bit word, a row of up to 16 one 16-bit word, and a longer row whole 32-bit words. The rule is the same for
    U (rows along the rank) and V (rows along d_in), in memory and in files.

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
    """Count the bits of a row of `count` signs with its padding: whole words of its `word_width`.

    Examples
    --------
    >>> [padded(count) for count in (1, 8, 9, 16, 17, 33)]
    [8, 8, 16, 16, 32, 64]
    """
    width = word_width(count, word_bits)
    return -(-count // width) * width


def filled(rank: int, word_bits: int = WORD_BITS) -> int:
    """Round a rank down to where the words of U are full; leave ranks up to 8 as they are.

    The first rank of a new word costs a whole word in every row of U. The other ranks of that word cost bits of V
    alone.

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
    """Count the bits that a layer with one path per rank stores; see `path_bits`.

    Examples
    --------
    >>> layer_bits(64, 64, ranks=(32, 32)) == 2 * path_bits(64, 64, 32)
    True
    """
    return sum(path_bits(d_out, d_in, rank, scale_bits, word_bits) for rank in ranks)


def rank_for_bits(
    d_out: int, d_in: int, bits: float, paths: int = 2, scale_bits: int = SCALE_BITS, word_bits: int = WORD_BITS
) -> int:
    """Find the largest rank, the same for each path, at which a layer stays within its bits per weight.

    Without padding it is r = (b d_out d_in - 16 P (d_out + d_in)) / (P (d_out + d_in + 16)), rounded down, for b bits
    per weight and P paths (LittleBit, Appendix D).

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
        If even rank 1 exceeds the ceiling. The message gives the smallest possible value.

    Examples
    --------
    The paper's count for a 4096 x 4096 layer at 0.55 bits, then what fits with padding:

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
    """Compute the rank that the authors' program gives each path of a layer: a multiple of 8, at least 8.

    It counts paths * (rank (d_out + d_in + 16) + 16 (d_out + d_in)) bits, without padding. A small layer may exceed the
    target, and no other layer makes up for it. The authors' loader builds layers by this rule, so a checkpoint for it
    must follow it.

    Parameters
    ----------
    d_out, d_in : int
    bits : float
        Target in bits per weight.
    paths : int
        1, or 2 for primary and residual.
    factor : float
        Multiplies the rank before rounding. The paper uses 4 for k_proj and v_proj of grouped-query attention (GQA).

    Examples
    --------
    >>> official_rank(4096, 4096, 0.55), official_rank(64, 64, 0.1)
    (544, 8)
    """
    return max(8, int(official_rank_before_rounding(d_out, d_in, bits, paths) * factor) // 8 * 8)


def official_rank_before_rounding(d_out: int, d_in: int, bits: float, paths: int = 2) -> float:
    """Find the rank at which the authors' count of a layer's bits meets the target; see `official_rank`.

    Examples
    --------
    >>> official_rank_before_rounding(64, 64, 0.78125, paths=1)  # 3200 bits less 2048 of scales, and 144 for each rank
    8.0
    """
    check_bits(bits, paths)
    return (d_out * d_in * bits - 16 * paths * (d_out + d_in)) / (paths * (d_out + d_in + 16))


def paths_for_bits(d_out: int, d_in: int, bits: float, scale_bits: int = SCALE_BITS) -> int:
    """Choose 1 or 2 paths for a layer by what the scales of a second path would cost.

    A second path helps while its scales are a small part of the budget, and hurts otherwise. In the paper at 0.1 bits
    OPT-1.3B has perplexity 48.5 without it and 60.0 with it. There, the scales of a second path take 16 % of the budget
    of a 2048 x 2048 layer; at 0.3 bits, where it helps, they take 5 %. The limit here is a tenth.

    Parameters
    ----------
    d_out, d_in : int
    bits : float
        Budget of the layer in bits per weight.
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
    """Choose the ranks of every layer of a model under one bit budget.

    Without gains, all layers get the same sign bits per weight, as nearly as full words of U allow: the ranks of the
    highest common level that the budget affords. Each gets at least rank 1, so a layer whose scales alone exceed the
    target borrows from the others. With gains, the budget goes to the layer that gains most per bit. Ranks rise to 8,
    16, 32, 64, 96 and so on, because a word costs the same full or not. In both cases the layer with the fewest sign
    bits per weight gets what is left, a word and then one rank at a time, until the cheapest step no longer fits.

    Parameters
    ----------
    shapes : mapping of layer name to (d_out, d_in)
    bits : float
        Ceiling in bits per weight for all layers together.
    paths : int, optional
        Paths in each layer; None chooses 1 or 2 for each layer by `paths_for_bits`.
    gains : mapping of layer name to a sequence of float, optional
        gains[name][k] is the loss that rank k + 1 of the layer saves, counted over all its paths. Missing ones save
        nothing.
    scale_bits, word_bits : int
        See `path_bits`.
    shares : mapping of layer name to float, optional
        Without gains: sign bits per weight of a layer as a multiple of the common level; 1 for layers that are missing.

    Returns
    -------
    dict of layer name to one rank per path.

    Raises
    ------
    ValueError
        If even rank 1 everywhere exceeds the budget. The message gives the smallest possible value.

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
    """Count the bits that all layers of a model store; see `path_bits`.

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
    """Find the ranks of the highest common level of sign bits per weight within `budget` bits, by bisection."""

    def at_level(level: float) -> dict[str, Ranks]:
        by_type = {}
        for shape, count, share in {(shapes[name], counts[name], shares[name]) for name in shapes}:
            most = largest_rank(shape, bits_budget(level * share, math.prod(shape)), count, 0, word_bits)
            by_type[shape, count, share] = (max(1, filled(most, word_bits)),) * count
        return {name: by_type[shapes[name], counts[name], shares[name]] for name in shapes}

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
    """Raise ranks by full words of U where they gain most per bit, until `rest` bits are spent.

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
    """Raise `ranks` in place until no step fits the `rest` of the budget, in bits.

    A step is one rank (`step_bits` 1), or as many as fill the words of U. It goes to the layer with the fewest sign
    bits per weight, divided by its share.
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
    """Raise the smallest rank of a layer to what one rank more is padded to, at most to `largest`.

    Of equal ranks the first is raised.
    """
    smallest = min(ranks)
    at = ranks.index(smallest)
    return (*ranks[:at], min(largest, padded(smallest + 1, word_bits)), *ranks[at + 1 :])


def largest_rank(shape: Shape, budget: int, paths: int, scale_bits: int, word_bits: int) -> int:
    """Find the largest common rank of `paths` paths within `budget` bits; 0 if not even rank 1 fits."""
    low, high = 0, min(shape)
    while low < high:  # invariant: rank `low` fits (0 by definition), every rank above `high` does not
        middle = (low + high + 1) // 2
        fits = layer_bits(*shape, (middle,) * paths, scale_bits, word_bits) <= budget
        low, high = (middle, high) if fits else (low, middle - 1)
    return low


def bits_budget(bits: float, weights: int) -> int:
    """Convert bits per weight to whole bits: the most whose ratio to `weights`, as a float, is within `bits`."""
    exact = math.floor(Fraction(bits) * weights)
    # 1.2 as a float lies below 1.2, so the floor may miss one bit with which the ratio is the float 1.2 again.
    return exact + ((exact + 1) / weights <= bits)


def check_bits(bits: float, paths: int) -> None:
    """Raise ValueError unless `bits` is positive and finite, and `paths` at least 1."""
    if not (math.isfinite(bits) and bits > 0):
        raise ValueError(f"bits must be a positive number of bits per weight, not {bits}")
    if paths < 1:
        raise ValueError(f"paths must be 1 (primary) or 2 (primary and residual), not {paths}")


def kv_cache_bytes(tokens: int, widths: Sequence[int], element_bytes: int = 2, scale_bytes: int = 0) -> int:
    """Count the bytes of a key-value cache (LittleBit, arXiv 2506.13771, Table 4).

    tokens * (sum(widths) * element_bytes + len(widths) * scale_bytes)

    Parameters
    ----------
    tokens : int
        Context length times batch size.
    widths : sequence of int
        Numbers kept per token by each k_proj and v_proj: d_kv in a full cache, the layer's total rank in a latent
        cache, which keeps t = ell * (V_sign^T (g * x)), as multi-head latent attention (MLA) does.
    element_bytes : int
        2 for float16.
    scale_bytes : int
        Bytes of the scale of each token and projection; 0 for a cache without scales.

    Examples
    --------
    Llama-2-7B at a context of 4096, in full and with latents of rank 192:

    >>> full = kv_cache_bytes(4096, [4096] * 64)
    >>> full, round(full / kv_cache_bytes(4096, [192] * 64), 1)
    (2147483648, 21.3)
    """
    return tokens * (sum(widths) * element_bytes + len(widths) * scale_bytes)
