"""Compare arrays exactly, or within a bound that is derived from the arithmetic."""

import numpy as np
from numpy.typing import ArrayLike

WORDS = ({np.dtype(np.int16), np.dtype(np.uint16)}, {np.dtype(np.int32), np.dtype(np.uint32)})


def assert_same(actual: ArrayLike, expected: ArrayLike) -> None:
    """Require equal shape, dtype and value of every entry; a NaN is never equal.

    Words of 16 and 32 bits compare by their bits, whether they are signed or not.
    """
    actual, expected = np.asarray(actual), np.asarray(expected)
    if actual.shape != expected.shape:
        raise AssertionError(f"shape {actual.shape} instead of {expected.shape}")
    if {actual.dtype, expected.dtype} in WORDS:
        actual, expected = (words.view(f"u{words.itemsize}") for words in (actual, expected))
    if actual.dtype != expected.dtype:
        raise AssertionError(f"dtype {actual.dtype} instead of {expected.dtype}")
    wrong = np.argwhere(~(actual == expected))
    if len(wrong):
        at = tuple(map(int, wrong[0]))
        raise AssertionError(
            f"{len(wrong)} of {actual.size} entries differ, the first at {at}: {actual[at]} instead of {expected[at]}"
        )


def assert_within(
    actual: ArrayLike,
    expected: ArrayLike,
    magnitude: ArrayLike,
    terms: float,
    factor: float = 2.0,
    slack: ArrayLike = 0.0,
) -> None:
    """Require |actual - expected| <= factor * terms * eps * magnitude + slack, with eps of `actual`'s dtype.

    Parameters
    ----------
    actual, expected : arrays of one shape
    magnitude : array
        The same computation on absolute values.
    terms : float
        Number of roundings that an entry has seen: the standard bound for sums of products in any order.
    factor : float
    slack : array
        What else may differ, such as a few roundings to a coarser dtype. Smallest normal numbers are allowed for, NaN
        is not.
    """
    actual, expected, magnitude = np.asarray(actual), np.asarray(expected), np.asarray(magnitude)
    if actual.shape != expected.shape:
        raise AssertionError(f"shape {actual.shape} instead of {expected.shape}")
    if not np.issubdtype(actual.dtype, np.floating):
        raise AssertionError(f"dtype {actual.dtype} is not a float")
    limits = np.finfo(actual.dtype)
    bound = factor * terms * (limits.eps * magnitude.astype(np.float64) + limits.tiny) + np.asarray(slack)
    error = np.abs(actual.astype(np.float64) - expected.astype(np.float64))
    wrong = np.argwhere(~(error <= bound))
    if len(wrong):
        at = tuple(map(int, wrong[0]))
        raise AssertionError(
            f"{len(wrong)} of {actual.size} entries are off, the first at {at}: {actual[at]} instead of "
            f"{expected[at]}, error {error[at]:.3g} > {np.broadcast_to(bound, error.shape)[at]:.3g}"
        )


def assert_true(holds: object, message: str) -> None:
    """Raise AssertionError with a message unless a condition holds."""
    if not holds:
        raise AssertionError(message)
