"""The comparisons themselves: each fails on every kind of wrong input."""

import numpy as np
import pytest
import torch
from compare import assert_same, assert_within, roundings
from hypothesis import given, strategies as st

GOOD = np.array([[1.0, 2.0], [3.0, 4.0]], np.float32)


def off_by_one():
    wrong = GOOD.copy()
    wrong[1, 0] += 1e-3
    return wrong


def with_nan():
    wrong = GOOD.copy()
    wrong[0, 1] = np.nan
    return wrong


WRONG = {"one element off": off_by_one(), "NaN": with_nan(), "shape": GOOD[:1], "dtype": GOOD.astype(np.float64)}


def test_assert_same_accepts_equal_arrays():
    assert_same(GOOD, GOOD.copy())


@pytest.mark.parametrize(("signed", "unsigned"), [(np.int16, np.uint16), (np.int32, np.uint32)])
def test_assert_same_compares_the_bits_of_words(signed, unsigned):
    words = np.array([0, 1, -1], signed)
    assert_same(words, words.view(unsigned))
    for wrong in (words.view(unsigned) ^ 1, words.astype(np.uint64), words.astype(np.uint8)):
        with pytest.raises(AssertionError):
            assert_same(words, wrong)


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
def test_assert_same_fails_on_wrong_input(wrong):
    with pytest.raises(AssertionError):
        assert_same(wrong, GOOD)


def test_assert_same_fails_on_nan_on_both_sides():
    with pytest.raises(AssertionError):
        assert_same(with_nan(), with_nan())


def test_assert_within_accepts_rounding():
    assert_within(GOOD * np.float32(1 + 1e-7), GOOD, np.abs(GOOD), terms=2)


@pytest.mark.parametrize(
    "wrong",
    [WRONG["one element off"], WRONG["NaN"], WRONG["shape"], GOOD.astype(np.int32)],
    ids=["off", "NaN", "shape", "dtype"],
)
def test_assert_within_fails_on_wrong_input(wrong):
    with pytest.raises(AssertionError):
        assert_within(wrong, GOOD, np.abs(GOOD), terms=2)


@pytest.mark.parametrize(("dtype", "change"), [(torch.bfloat16, 0.05), (torch.float16, 0.005)])
@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 2**31))
def test_assert_within_with_roundings_of_16_bits_notices_what_is_wrong(dtype, change, rank, d_in, seed):
    """Zeros, the opposite sign, and a few times the error of the roundings, where sums do not cancel."""
    rng = np.random.default_rng(seed)
    exact = (rng.uniform(0.1, 1, (5, rank)) @ rng.uniform(0.1, 1, (rank, d_in))).sum(axis=1)
    actual = torch.from_numpy(exact).to(dtype).float().numpy()
    slack = roundings(4, dtype) * exact
    assert_within(actual, exact, exact, terms=8 + rank + d_in, slack=slack)
    for wrong in (0 * actual, -actual, actual * (1 + change), actual * (1 - change)):
        with pytest.raises(AssertionError):
            assert_within(wrong.astype(np.float32), exact, exact, terms=8 + rank + d_in, slack=slack)


def test_roundings_is_the_largest_error_of_several():
    assert roundings(1, torch.bfloat16) == 2.0**-8
    assert roundings(2, torch.float16) == 2 * 2.0**-11 + 2.0**-22
