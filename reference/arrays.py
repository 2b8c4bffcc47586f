"""Check that arguments are float arrays of NumPy, and convert 16-bit ones to float32 for decompositions."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]  # given in full, since the bare name is of unknown type with NumPy below 2.2

KIND = "numpy.ndarray"


def check_array(name: str, array: Any) -> None:
    """Raise TypeError unless `array` is an array; `name` stands in the message."""
    if not isinstance(array, np.ndarray | np.generic):
        kind = type(array)
        raise TypeError(
            f"{name} must be a {KIND}, got {kind.__module__}.{kind.__name__}: convert it, or use the function of "
            "the same name in the other package (littlebit.reference for NumPy, littlebit.fast for torch)"
        )


def check_floats(name: str, array: Any) -> None:
    """Raise TypeError unless `array` is an array of floating-point numbers; `name` stands in the message."""
    check_array(name, array)
    if not np.issubdtype(array.dtype, np.floating):
        raise TypeError(f"{name} must hold floating-point numbers, got {array.dtype}: convert it first")


def at_least_float32(name: str, array: Array) -> Array:
    """Convert a 16-bit float array to float32, which decompositions need; return any other unchanged.

    Raises
    ------
    TypeError
        If it is not an array of floating-point numbers.
    """
    check_floats(name, array)
    return array.astype(np.float32) if array.dtype == np.float16 else array
