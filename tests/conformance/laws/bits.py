"""Counting bits and choosing ranks, against trying everything at small sizes.

Packages of one project may share this arithmetic, so nothing else compares it with a second statement.
"""

from fractions import Fraction

from hypothesis import assume, strategies as st

from .. import exact
from ..backend import Backend
from ..compare import assert_true
from ..law import Draw, laws_of

LAWS, law = laws_of("bits")
COUNT = "LittleBit (arXiv 2506.13771), Appendix D, plus padding; packed format, section Signs"
CACHE = "LittleBit (arXiv 2506.13771), Table 4"
ALLOCATION = "littlebit.reference.bits.allocate_ranks"
SMALL = st.dictionaries(
    st.sampled_from("abcd"), st.tuples(st.integers(1, 70), st.integers(1, 70)), min_size=1
)  # layer names and (d_out, d_in)

Shape = tuple[int, int]
Ranks = tuple[int, ...]


def row_bits(count: int) -> int:
    """Count the bits of a row of signs with its padding."""
    return -(-count // exact.width_of(count)) * exact.width_of(count)


def stored_bits(shape: Shape, ranks: Ranks, scale_bits: int = 16) -> int:
    """Count the bits of a layer: rows of V and U, and three scale vectors, for each path."""
    d_out, d_in = shape
    return sum(r * row_bits(d_in) + d_out * row_bits(r) + scale_bits * (d_out + d_in + r) for r in ranks)


def total_bits(shapes: dict[str, Shape], ranks: dict[str, Ranks]) -> int:
    """Count the bits of all layers."""
    return sum(stored_bits(shapes[name], ranks[name]) for name in shapes)


def whole_bits(bits: float, weights: int) -> int:
    """Convert bits per weight to the most whole bits whose ratio to the weights, as a float, is within them."""
    near = range(int(bits * weights) - 1, int(bits * weights) + 2)
    return max(whole for whole in near if whole / weights <= bits)


@law("path_bits", source=COUNT)
def path_bits_are_what_packing_stores(backend: Backend, draw: Draw) -> None:
    """A path takes rank * padded(d_in) + d_out * padded(rank) bits of signs and 16 for each entry of h, ell and g."""
    d_out, d_in, rank = (draw(st.integers(1, 20) | st.integers(1, 300)) for _ in range(3))
    found, wanted = backend.path_bits(d_out, d_in, rank), stored_bits((d_out, d_in), (rank,))
    assert_true(found == wanted, f"{found} bits instead of {wanted}")


@law("rank_for_bits", source=COUNT)
def rank_is_the_largest_within_the_bits(backend: Backend, draw: Draw) -> None:
    """The rank is the largest at which a layer stays within its bits per weight; ValueError if even rank 1 does not."""
    shape = draw(st.tuples(st.integers(1, 70), st.integers(1, 70)))
    bits, paths = draw(st.floats(0.05, 6)), draw(st.integers(1, 3))
    weights = shape[0] * shape[1]
    good = [r for r in range(1, min(shape) + 1) if stored_bits(shape, (r,) * paths) / weights <= bits]
    try:
        found = backend.rank_for_bits(*shape, bits, paths)
    except ValueError:
        found = None
    wanted = max(good, default=None)
    assert_true(found == wanted, f"rank {found} instead of {wanted} (None: ValueError)")


def raised(ranks: Ranks, most: int, whole_words: bool) -> Ranks:
    """Raise the first of the smallest ranks: by one, or to what one more is stored in."""
    at = ranks.index(min(ranks))
    after = row_bits(ranks[at] + 1) if whole_words else ranks[at] + 1
    return (*ranks[:at], min(most, after), *ranks[at + 1 :])


def spent(shapes: dict[str, Shape], ranks: dict[str, Ranks], budget: int) -> dict[str, Ranks]:
    """Give what is left, a word and then a rank at a time, to the layer with the fewest sign bits per weight."""
    ranks = dict(ranks)
    for whole_words in (True, False):
        while True:
            rest, steps = budget - total_bits(shapes, ranks), []
            for name, shape in shapes.items():
                after = raised(ranks[name], min(shape), whole_words)
                cost = stored_bits(shape, after) - stored_bits(shape, ranks[name])
                if after != ranks[name] and cost <= rest:
                    level = Fraction(stored_bits(shape, ranks[name], 0), shape[0] * shape[1])
                    steps.append((level, len(steps), name, after))
            if not steps:
                break
            ranks[min(steps)[2]] = min(steps)[3]
    return ranks


def equal_by_trying(shapes: dict[str, Shape], paths: int, bits: float, budget: int) -> dict[str, Ranks]:
    """Find the highest common level of sign bits per weight that fits: try each level at which a rank changes."""

    def at_level(level: Fraction) -> dict[str, Ranks]:
        ranks = {}
        for name, (d_out, d_in) in shapes.items():
            signs = {r: stored_bits((d_out, d_in), (r,) * paths, 0) for r in range(1, min(d_out, d_in) + 1)}
            affordable = [r for r, stored in signs.items() if stored <= level * d_out * d_in]
            full = [r for r in affordable if r <= 8 or row_bits(r) == r]
            ranks[name] = (max(full, default=1),) * paths
        return ranks

    levels = {Fraction(0)}
    for d_out, d_in in shapes.values():
        for rank in range(1, min(d_out, d_in) + 1):
            levels.add(Fraction(stored_bits((d_out, d_in), (rank,) * paths, 0), d_out * d_in))
    good = [each for each in levels if each <= 2 * Fraction(bits) and total_bits(shapes, at_level(each)) <= budget]
    return at_level(max(good))


@law("allocate_ranks", source=ALLOCATION)
def ranks_are_what_trying_every_level_gives(backend: Backend, draw: Draw) -> None:
    """Layers get the highest common level of sign bits per weight with full words of U, then the rest of the budget."""
    shapes, bits, paths = draw(SMALL), draw(st.floats(0.3, 6)), draw(st.integers(1, 2))
    weights = sum(d_out * d_in for d_out, d_in in shapes.values())
    assume(total_bits(shapes, {name: (1,) * paths for name in shapes}) / weights <= bits)
    budget = whole_bits(bits, weights)
    wanted = spent(shapes, equal_by_trying(shapes, paths, bits, budget), budget)
    found = backend.allocate_ranks(shapes, bits, paths)
    assert_true(found == wanted, f"{found} instead of {wanted}")


@law("allocate_ranks", source=ALLOCATION)
def ranks_never_exceed_the_budget(backend: Backend, draw: Draw) -> None:
    """All layers together stay within the bits, or ValueError is raised where rank 1 everywhere exceeds them."""
    shapes, bits, paths = draw(SMALL), draw(st.floats(0.05, 6)), draw(st.integers(1, 2))
    weights = sum(d_out * d_in for d_out, d_in in shapes.values())
    smallest = total_bits(shapes, {name: (1,) * paths for name in shapes}) / weights
    try:
        found = {name: tuple(ranks) for name, ranks in backend.allocate_ranks(shapes, bits, paths).items()}
    except ValueError:
        assert_true(smallest > bits, f"refused, though rank 1 everywhere takes {smallest:.3f} bits")
        return
    stored = total_bits(shapes, found) / weights
    assert_true(stored <= bits, f"{stored:.4f} bits per weight, more than {bits:.4f}")


@law("kv_cache_bytes", source=CACHE)
def cache_bytes_count_every_number(backend: Backend, draw: Draw) -> None:
    """A cache holds the numbers of each projection, and its scale if it has one, for every token."""
    tokens, widths = draw(st.integers(0, 10**6)), draw(st.lists(st.integers(1, 4096), max_size=8))
    element, scale = draw(st.sampled_from([1, 2, 4])), draw(st.integers(0, 4))
    found = backend.kv_cache_bytes(tokens, widths, element, scale)
    wanted = sum(tokens * (width * element + scale) for width in widths)
    assert_true(found == wanted, f"{found} bytes instead of {wanted}")
