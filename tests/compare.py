"""The comparisons of `littlebit.conformance`, for torch tensors too."""

import numpy as np
import torch
from littlebit.conformance import compare


def as_array(values) -> np.ndarray:
    return values.detach().cpu().numpy() if isinstance(values, torch.Tensor) else np.asarray(values)


def assert_same(actual, expected) -> None:
    """Require equal shape, dtype and every bit of value."""
    compare.assert_same(as_array(actual), as_array(expected))


def assert_within(actual, expected, magnitude, terms: float, factor: float = 2.0, slack=0.0) -> None:
    """Require |actual - expected| <= factor * terms * eps * magnitude + slack."""
    arrays = map(as_array, (actual, expected, magnitude))
    compare.assert_within(*arrays, terms, factor, as_array(slack))


def roundings(count: int, dtype: torch.dtype) -> float:
    """Largest relative error of `count` roundings to the nearest in a row: (1 + eps / 2)^count - 1."""
    return (1 + torch.finfo(dtype).eps / 2) ** count - 1
