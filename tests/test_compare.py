"""The comparisons themselves: each fails on every kind of wrong input."""

import numpy as np
import pytest
from compare import assert_same, assert_within

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
