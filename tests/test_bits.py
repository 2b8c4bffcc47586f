"""Counting bits: exact, never above the target, and clear about what cannot be met."""

import littlebit.reference as ref
import pytest
from hypothesis import assume, given, strategies as st
from littlebit.reference.bits import next_ranks

dims = st.integers(1, 300)
shapes = st.dictionaries(st.text("abc", min_size=1, max_size=3), st.tuples(dims, dims), min_size=1, max_size=6)
targets = st.floats(0.05, 6)
paths = st.integers(1, 3)


def test_rank_for_bits_gives_the_papers_ranks():
    assert ref.rank_for_bits(4096, 4096, 0.55, paths=2, word_bits=1) == 546
    assert ref.rank_for_bits(4096, 11008, 0.1, paths=2, word_bits=1) == 133


@given(dims, dims, st.integers(1, 300))
def test_path_bits_counts_what_packing_makes(d_out, d_in, rank):
    words = rank * -(-d_in // 32) + d_out * -(-rank // 32)
    assert ref.path_bits(d_out, d_in, rank) == 32 * words + 16 * (d_out + d_in + rank)
    assert ref.path_bits(d_out, d_in, rank, word_bits=1) == rank * (d_out + d_in) + 16 * (d_out + d_in + rank)


@given(dims, dims, targets, paths)
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


@given(shapes, targets, paths)
def test_allocate_ranks_never_exceeds_and_leaves_less_than_a_step(sizes, bits, count):
    try:
        ranks = ref.allocate_ranks(sizes, bits, count)
    except ValueError:
        assume(False)
    weights = sum(d_out * d_in for d_out, d_in in sizes.values())
    stored = {name: ref.layer_bits(*sizes[name], ranks[name]) for name in sizes}
    assert sum(stored.values()) / weights <= bits
    assert all(1 <= rank <= min(sizes[name]) for name in sizes for rank in ranks[name])
    for name, size in sizes.items():
        after = next_ranks(ranks[name], min(size))
        if after != ranks[name]:
            step = ref.layer_bits(*size, after) - stored[name]
            assert sum(stored.values()) + step > bits * weights


@given(shapes, st.floats(0.001, 1), paths)
def test_allocate_ranks_refuses_only_what_cannot_be_stored(sizes, bits, count):
    weights = sum(d_out * d_in for d_out, d_in in sizes.values())
    smallest = sum(ref.layer_bits(*size, (1,) * count) for size in sizes.values()) / weights
    if smallest <= bits:
        ref.allocate_ranks(sizes, bits, count)
    else:
        with pytest.raises(ValueError, match=f"smallest possible value is {smallest:.3f}"):
            ref.allocate_ranks(sizes, bits, count)


def test_allocate_ranks_is_uniform_over_equal_layers():
    ranks = ref.allocate_ranks({str(layer): (256, 512) for layer in range(7)}, bits=0.7)
    stored = [ref.layer_bits(256, 512, layer) for layer in ranks.values()]
    dearest = 2 * (512 + 16 + 32 * 256)  # one more rank in both paths, where it opens a word in every row of U
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
