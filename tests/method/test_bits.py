"""Test the bit counts: exact, never above the budget, with clear errors where a budget cannot be met."""

from fractions import Fraction
from itertools import product

import littlebit.fast as fast
import littlebit.reference as ref
import numpy as np
import pytest
import torch
from hypothesis import assume, example, given, strategies as st
from littlebit.conformance.laws.bits import raised, row_bits, stored_bits, total_bits
from littlebit.reference.bits import best_ranks, next_ranks, padded, word_width

dims = st.integers(1, 300)
shapes = st.dictionaries(st.text("abc", min_size=1, max_size=3), st.tuples(dims, dims), min_size=1, max_size=6)
targets = st.floats(0.05, 6)
paths = st.one_of(st.none(), st.integers(1, 3))


def test_rank_for_bits_gives_the_papers_ranks():
    assert ref.rank_for_bits(4096, 4096, 0.55, paths=2, word_bits=1) == 546
    assert ref.rank_for_bits(4096, 11008, 0.1, paths=2, word_bits=1) == 133


@given(st.integers(1, 300))
def test_word_width_is_the_narrowest_that_holds_the_row(count):
    assert word_width(count) == (8 if count <= 8 else 16 if count <= 16 else 32)
    assert padded(count) == (word_width(count) if count <= 32 else -(-count // 32) * 32)


@given(st.integers(1, 300), st.sampled_from([1, 2, 4, 8, 16, 32, 64]))
def test_padded_is_whole_words_and_never_wider_than_asked(count, word_bits):
    width = word_width(count, word_bits)
    assert width <= word_bits
    assert padded(count, word_bits) % width == 0
    assert 0 <= padded(count, word_bits) - count < width
    assert padded(count, word_bits) <= padded(count + 1, word_bits)
    if word_bits <= 8:
        assert width == word_bits


@given(st.one_of(dims, st.integers(1, 20)), st.one_of(dims, st.integers(1, 20)), st.one_of(dims, st.integers(1, 40)))
def test_path_bits_counts_what_packing_stores(d_out, d_in, rank):
    shapes = ((d_out, rank), (d_in, rank), (d_out,), (rank,), (d_in,))
    packed = ref.pack_factors(ref.Factors(*map(np.ones, shapes)))
    assert ref.path_bits(d_out, d_in, rank) == 8 * sum(array.nbytes for array in packed)
    packed = fast.pack_factors(fast.Factors(*map(torch.ones, shapes)))
    assert ref.path_bits(d_out, d_in, rank) == 8 * sum(tensor.nbytes for tensor in packed)
    assert ref.path_bits(d_out, d_in, rank, word_bits=1) == rank * (d_out + d_in) + 16 * (d_out + d_in + rank)


@given(dims, dims, st.integers(2, 300))
def test_rank_for_bits_never_rounds_the_ceiling_up(d_out, d_in, rank):
    rank = min(rank, d_out, d_in)
    assume(rank > 1)
    stored = ref.layer_bits(d_out, d_in, (rank, rank))
    weights = d_out * d_in
    assert ref.rank_for_bits(d_out, d_in, (stored + 0.5) / weights) >= rank
    assert ref.rank_for_bits(d_out, d_in, (stored - 0.5) / weights) == rank - 1


@given(dims, dims, targets, st.integers(1, 3))
@example(220, 220, 1.2, 2)  # exactly 1.2 bits at rank 33, while the float 1.2 is a little less
def test_rank_for_bits_is_the_largest_within_the_ceiling(d_out, d_in, bits, count):
    smallest = ref.layer_bits(d_out, d_in, (1,) * count) / (d_out * d_in)
    if smallest > bits:
        with pytest.raises(ValueError, match=f"smallest possible value is {smallest:.3f}"):
            ref.rank_for_bits(d_out, d_in, bits, count)
        return
    rank = ref.rank_for_bits(d_out, d_in, bits, count)
    assert ref.layer_bits(d_out, d_in, (rank,) * count) / (d_out * d_in) <= bits
    if rank < min(d_out, d_in):
        assert ref.layer_bits(d_out, d_in, (rank + 1,) * count) / (d_out * d_in) > bits


def smallest_bits(sizes, bits, count):
    """Compute the stored bits per weight with rank 1 everywhere."""
    counts = {name: count or ref.paths_for_bits(*size, bits) for name, size in sizes.items()}
    stored = sum(ref.layer_bits(*size, (1,) * counts[name]) for name, size in sizes.items())
    return stored / sum(d_out * d_in for d_out, d_in in sizes.values())


@st.composite
def gains_for(draw, sizes):
    """Draw None, or falling gains for each layer, as far apart as in a model."""
    if draw(st.booleans()):
        return None
    levels = {name: draw(st.floats(0, 1e6)) for name in sizes}
    decay = draw(st.floats(0.5, 1))
    return {name: [levels[name] * decay**rank for rank in range(min(size))] for name, size in sizes.items()}


@given(st.data(), shapes, targets, paths)
def test_allocate_ranks_never_exceeds_and_leaves_less_than_a_step(data, sizes, bits, count):
    assume(smallest_bits(sizes, bits, count) <= bits)
    ranks = ref.allocate_ranks(sizes, bits, count, data.draw(gains_for(sizes)))
    weights = sum(d_out * d_in for d_out, d_in in sizes.values())
    stored = {name: ref.layer_bits(*sizes[name], ranks[name]) for name in sizes}
    assert sum(stored.values()) == ref.model_bits(sizes, ranks)
    assert sum(stored.values()) / weights <= bits
    for name, size in sizes.items():
        assert len(ranks[name]) == (count or ref.paths_for_bits(*size, bits))
        assert all(1 <= rank <= min(size) for rank in ranks[name])
        after = next_ranks(ranks[name], min(size))
        if after != ranks[name]:
            step = ref.layer_bits(*size, after) - stored[name]
            assert sum(stored.values()) + step > bits * weights


@given(shapes, st.floats(0.001, 1), paths)
def test_allocate_ranks_refuses_only_what_cannot_be_stored(sizes, bits, count):
    smallest = smallest_bits(sizes, bits, count)
    if smallest <= bits:
        ref.allocate_ranks(sizes, bits, count)
    else:
        with pytest.raises(ValueError, match=f"smallest possible value is {smallest:.3f}"):
            ref.allocate_ranks(sizes, bits, count)


@given(shapes, st.sampled_from([0.6, 1.0, 3.0]), st.sampled_from([1, 2, None]), st.sampled_from([0.5, 1.0, 2.0, 4.0]))
def test_allocate_ranks_by_shares_stays_within_the_budget(sizes, bits, count, share):
    assume(smallest_bits(sizes, bits, count) <= bits)
    weights = sum(d_out * d_in for d_out, d_in in sizes.values())
    shares = {next(iter(sizes)): share}
    ranks = ref.allocate_ranks(sizes, bits, count, shares=shares)
    assert ref.model_bits(sizes, ranks) <= bits * weights
    if share == 1:
        assert ranks == ref.allocate_ranks(sizes, bits, count)


@pytest.mark.parametrize("share", [0.25, 2.0, 4.0])
def test_allocate_ranks_gives_a_layer_its_share(share):
    sizes = {name: (2048, 2048) for name in "abcdefgh"}
    ranks = ref.allocate_ranks(sizes, 0.5, 1, shares={"a": share})
    (rank,), others = ranks["a"], [ranks[name][0] for name in "bcdefgh"]
    assert max(others) - min(others) <= 32
    assert abs(rank - share * sum(others) / 7) <= 32 * max(share, 1)  # U has full words


def test_allocate_ranks_follows_the_gains():
    sizes = {"first": (256, 256), "second": (256, 256)}
    gains = {"first": [1.0] * 256, "second": [1e-6] * 256}
    ranks = ref.allocate_ranks(sizes, 1.0, 1, gains)
    assert ranks["first"][0] > 3 * ranks["second"][0]
    equal = ref.allocate_ranks(sizes, 1.0, 1, {name: gains["first"] for name in sizes})
    assert equal == ref.allocate_ranks(sizes, 1.0, 1, {name: gains["second"] for name in sizes})


def test_next_ranks_fills_the_words():
    def filled(ranks):
        while ranks[-1] != next_ranks(ranks[-1:], 100, 32)[0]:
            ranks += next_ranks(ranks[-1:], 100, 32)
        return ranks

    assert filled([1]) == [1, 8, 16, 32, 64, 96, 100]
    assert next_ranks((16, 9), 100, 32) == (16, 16)
    assert next_ranks((16, 16), 100, 32) == (32, 16)
    assert next_ranks((16, 16), 100) == (17, 16)


@given(st.data(), shapes, st.integers(0, 10**5), st.integers(1, 2))
def test_best_ranks_stop_where_words_are_full(data, sizes, rest, count):
    start = {name: (1,) * count for name in sizes}
    gains = {name: data.draw(st.lists(st.floats(0, 1e6), max_size=40)) for name in sizes}
    ranks = best_ranks(sizes, start, gains, rest, 16, 32)
    assert ref.model_bits(sizes, ranks) - ref.model_bits(sizes, start) <= rest
    for name, size in sizes.items():
        assert all(rank in (1, padded(rank), min(size)) for rank in ranks[name])


def test_allocate_ranks_by_gains_saves_at_least_what_equal_ranks_save():
    sizes = {str(at): (128, 256) for at in range(6)}
    gains = {name: [(1 + int(name)) ** 2 * 0.95**rank for rank in range(128)] for name in sizes}

    def saved(ranks):
        return sum(sum(gains[name][: sum(ranks[name])]) for name in sizes)

    for bits in (0.6, 0.8, 1.2):
        assert saved(ref.allocate_ranks(sizes, bits, 1, gains)) >= saved(ref.allocate_ranks(sizes, bits, 1))


@given(dims, dims, targets)
def test_paths_for_bits_follows_the_share_of_the_second_paths_scales(d_out, d_in, bits):
    """A tenth of the layer's bits, by a count of its own; exactly there is covered below."""
    assume(abs(Fraction(bits) * d_out * d_in - 160 * (d_out + d_in)) > Fraction(1, 10**6))
    assert ref.paths_for_bits(d_out, d_in, bits) == (2 if 160 * (d_out + d_in) <= bits * d_out * d_in else 1)


@pytest.mark.parametrize(("d_out", "d_in"), [(320, 320), (4096, 4096), (64, 960)])
def test_paths_for_bits_draws_the_line_at_a_tenth(d_out, d_in):
    line = 160 * (d_out + d_in) / (d_out * d_in)  # 1, 0.078125 and 2.6666...
    assert [ref.paths_for_bits(d_out, d_in, line * factor) for factor in (0.9, 0.999, 1.001, 1.1)] == [1, 1, 2, 2]
    if line in (1.0, 0.078125):
        assert ref.paths_for_bits(d_out, d_in, line) == 2


# --- allocation against a second statement: the rules of `allocate_ranks` word by word, by trying everything


def spent(sizes, ranks, shares, budget):
    """What is left goes, a word and then a rank at a time, to the layer with the fewest sign bits per weight."""
    ranks = dict(ranks)
    for whole_words in (True, False):
        while True:
            rest, steps = budget - total_bits(sizes, ranks), []
            for name, size in sizes.items():
                after = raised(ranks[name], min(size), whole_words)
                cost = stored_bits(size, after) - stored_bits(size, ranks[name])
                if after != ranks[name] and cost <= rest:
                    level = Fraction(stored_bits(size, ranks[name], 0), size[0] * size[1]) / Fraction(shares[name])
                    steps.append((level, len(steps), name, after))
            if not steps:
                break
            ranks[min(steps)[2]] = min(steps)[3]
    return ranks


def equal_by_trying(sizes, counts, shares, bits, budget):
    """The highest common level of sign bits per weight that fits: each level at which a rank changes is tried."""

    def at_level(level):
        ranks = {}
        for name, (d_out, d_in) in sizes.items():
            affordable = [
                rank
                for rank in range(1, min(d_out, d_in) + 1)
                if stored_bits((d_out, d_in), (rank,) * counts[name], 0)
                <= level * Fraction(shares[name]) * d_out * d_in
            ]
            full = [rank for rank in affordable if rank <= 8 or row_bits(rank) == rank]
            ranks[name] = (max(full, default=1),) * counts[name]
        return ranks

    levels = {Fraction(0)}
    for name, (d_out, d_in) in sizes.items():
        for rank in range(1, min(d_out, d_in) + 1):
            signs = stored_bits((d_out, d_in), (rank,) * counts[name], 0)
            levels.add(Fraction(signs, d_out * d_in) / Fraction(shares[name]))
    highest = 2 * Fraction(bits) / min(map(Fraction, shares.values()))
    return max(
        (level, at_level(level))
        for level in levels
        if level <= highest and total_bits(sizes, at_level(level)) <= budget
    )[1]


small = st.dictionaries(st.sampled_from("abcd"), st.tuples(st.integers(1, 70), st.integers(1, 70)), min_size=1)


@given(small, st.floats(0.3, 6), st.sampled_from([1, 2, None]), st.sampled_from([1.0, 0.5, 2.0, 4.0]))
def test_allocate_ranks_gives_equal_layers_what_trying_every_level_gives(sizes, bits, count, share):
    assume(smallest_bits(sizes, bits, count) <= bits)
    shares = dict.fromkeys(sizes, 1.0) | {min(sizes): share}
    counts = {name: count or ref.paths_for_bits(*size, bits) for name, size in sizes.items()}
    weights = sum(d_out * d_in for d_out, d_in in sizes.values())
    budget = max(whole for whole in range(int(bits * weights) - 1, int(bits * weights) + 2) if whole / weights <= bits)
    expected = spent(sizes, equal_by_trying(sizes, counts, shares, bits, budget), shares, budget)
    assert ref.allocate_ranks(sizes, bits, count, shares={min(sizes): share}) == expected


def greedy(sizes, ranks, gains, rest):
    """Full words of U for the layer that gains most per bit, the first by name if equal, until none fits."""
    ranks, open_ = dict(ranks), set(sizes)
    while open_:
        offers = []
        for name in open_:
            after = raised(ranks[name], min(sizes[name]), True)
            cost = stored_bits(sizes[name], after) - stored_bits(sizes[name], ranks[name])
            gain = sum(gains[name][sum(ranks[name]) : sum(after)])
            offers.append((-gain / cost if cost else 0.0, name, after, cost))
        _, name, after, cost = min(offers)
        if after == ranks[name] or cost > rest:
            open_.remove(name)
            continue
        ranks[name], rest = after, rest - cost
    return ranks


@given(st.data(), small, st.integers(1, 2))
def test_best_ranks_are_those_of_a_greedy_choice_to_the_last_bit(data, sizes, count):
    """Budgets that are used up exactly, or miss the last step by one bit."""
    start = {name: (1,) * count for name in sizes}
    gains = {name: data.draw(st.lists(st.integers(0, 1000).map(float), min_size=140, max_size=140)) for name in sizes}
    rest = data.draw(st.integers(0, 40_000))
    used = total_bits(sizes, greedy(sizes, start, gains, rest)) - total_bits(sizes, start)
    for budget in (rest, used, used - 1):
        assert best_ranks(sizes, start, gains, budget, 16, 32) == greedy(sizes, start, gains, budget)
    assert best_ranks(sizes, start, gains, used, 16, 32) == greedy(sizes, start, gains, used)


@given(st.data(), st.dictionaries(st.sampled_from("abc"), st.tuples(*[st.integers(8, 40)] * 2), min_size=2, max_size=3))
def test_best_ranks_lose_to_no_other_ranks(data, sizes):
    """Against all combinations of full words, where gains per bit fall from step to step and the budget is used up."""
    levels, gains, steps = {}, {}, []
    for name, size in sizes.items():
        levels[name] = [1]
        while (after := raised((levels[name][-1],), min(size), True)[0]) != levels[name][-1]:
            levels[name].append(after)
        rates = data.draw(st.lists(st.integers(1, 10**6), min_size=8, max_size=8, unique=True))
        gains[name] = [Fraction(0)]
        for rate, low, high in zip(sorted(rates, reverse=True), levels[name], levels[name][1:], strict=False):
            cost = stored_bits(size, (high,)) - stored_bits(size, (low,))
            gains[name] += [Fraction(rate * cost, high - low)] * (high - low)
            steps.append((-rate, name, cost))
    start = {name: (1,) for name in sizes}
    budget = sum(cost for *_, cost in sorted(steps)[: data.draw(st.integers(0, len(steps)))])
    found = best_ranks(sizes, start, gains, budget, 16, 32)
    assert total_bits(sizes, found) - total_bits(sizes, start) == budget

    def saved(ranks):
        return sum(sum(gains[name][:rank]) for name, (rank,) in ranks.items())

    others = ({name: (rank,) for name, rank in zip(sizes, each, strict=True)} for each in product(*levels.values()))
    assert saved(found) == max(
        saved(each) for each in others if total_bits(sizes, each) - total_bits(sizes, start) <= budget
    )


def test_allocate_ranks_is_uniform_over_equal_layers():
    ranks = ref.allocate_ranks({str(layer): (256, 512) for layer in range(7)}, bits=0.7)
    stored = [ref.layer_bits(256, 512, layer) for layer in ranks.values()]
    dearest = 32 * (512 + 16 + 256)  # one more word of U in one of the paths
    assert max(stored) - min(stored) <= dearest


@pytest.mark.parametrize("bits", [0, -1, float("nan"), float("inf")])
def test_bits_must_be_positive_and_finite(bits):
    with pytest.raises(ValueError, match="positive number of bits"):
        ref.rank_for_bits(64, 64, bits)
    with pytest.raises(ValueError, match="positive number of bits"):
        ref.allocate_ranks({"layer": (64, 64)}, bits)


def test_paths_must_be_positive():
    with pytest.raises(ValueError, match="paths must be"):
        ref.rank_for_bits(64, 64, 1.0, paths=0)


@given(st.integers(1, 4000), st.integers(1, 4000), st.floats(0.05, 4), st.sampled_from([1, 2]))
def test_official_rank_is_the_largest_multiple_of_eight_that_their_count_affords(d_out, d_in, bits, paths):
    def cost(rank):
        return paths * (rank * (d_out + d_in + 16) + 16 * (d_out + d_in))

    rank = ref.official_rank(d_out, d_in, bits, paths)
    budget = bits * d_out * d_in
    assert rank % 8 == 0
    assert cost(rank) <= budget * (1 + 1e-12) or rank == 8
    assert cost(rank + 8) > budget * (1 - 1e-12)
