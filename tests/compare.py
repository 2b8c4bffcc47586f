"""The only two comparisons that the tests use: exact, and within a bound derived from the arithmetic."""

import numpy as np
import torch

WORDS = ({np.dtype(np.int16), np.dtype(np.uint16)}, {np.dtype(np.int32), np.dtype(np.uint32)})


def as_array(values) -> np.ndarray:
    return values.detach().cpu().numpy() if isinstance(values, torch.Tensor) else np.asarray(values)


def assert_same(actual, expected) -> None:
    """Equal shape, dtype and every bit of value; a NaN is never equal. Words compare as unsigned across backends."""
    actual, expected = as_array(actual), as_array(expected)
    assert actual.shape == expected.shape, f"shape {actual.shape} instead of {expected.shape}"
    if {actual.dtype, expected.dtype} in WORDS:
        actual, expected = (words.view(f"u{words.itemsize}") for words in (actual, expected))
    assert actual.dtype == expected.dtype, f"dtype {actual.dtype} instead of {expected.dtype}"
    wrong = np.argwhere(~(actual == expected))
    assert not len(wrong), f"{len(wrong)} entries differ, the first at {wrong[0]}"


def assert_within(actual, expected, magnitude, terms: float, factor: float = 2.0, slack=0.0) -> None:
    """|actual - expected| <= factor * terms * eps * magnitude + slack, with eps of actual's dtype.

    `magnitude` is the same computation on absolute values, `terms` the number of roundings that a result entry has
    seen: the standard bound for sums of products in any order. `slack` is what else may differ, such as a few roundings
    to a coarser dtype (`roundings`). Smallest normal numbers are allowed for, NaN is not.
    """
    actual, expected, magnitude = as_array(actual), as_array(expected), as_array(magnitude)
    assert actual.shape == expected.shape, f"shape {actual.shape} instead of {expected.shape}"
    assert np.issubdtype(actual.dtype, np.floating), f"dtype {actual.dtype} is not a float"
    limits = np.finfo(actual.dtype)
    bound = factor * terms * (limits.eps * magnitude.astype(np.float64) + limits.tiny) + as_array(slack)
    error = np.abs(actual.astype(np.float64) - expected.astype(np.float64))
    wrong = np.argwhere(~(error <= bound))
    if len(wrong):
        at = tuple(wrong[0])
        raise AssertionError(
            f"{len(wrong)} entries are off, the first at {at}: {actual[at]} instead of {expected[at]}, "
            f"error {error[at]:.3g} > {np.broadcast_to(bound, error.shape)[at]:.3g}"
        )


def roundings(count: int, dtype: torch.dtype) -> float:
    """Largest relative error of `count` roundings to the nearest in a row: (1 + eps / 2)^count - 1."""
    return (1 + torch.finfo(dtype).eps / 2) ** count - 1
