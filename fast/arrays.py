"""Check that arguments are float tensors of torch, and convert 16-bit ones to float32 for decompositions."""

from typing import Any

import torch
from torch import Tensor

KIND = "torch.Tensor"
HALVES = (torch.float16, torch.bfloat16)


def check_array(name: str, array: Any) -> None:
    """Raise TypeError unless `array` is a tensor; `name` stands in the message."""
    if not isinstance(array, Tensor):
        kind = type(array)
        raise TypeError(
            f"{name} must be a {KIND}, got {kind.__module__}.{kind.__name__}: convert it, or use the function of "
            "the same name in the other package (littlebit.reference for NumPy, littlebit.fast for torch)"
        )


def check_floats(name: str, array: Any) -> None:
    """Raise TypeError unless `array` is a tensor of floating-point numbers; `name` stands in the message."""
    check_array(name, array)
    if not array.is_floating_point():
        raise TypeError(f"{name} must hold floating-point numbers, got {array.dtype}: convert it first")


def at_least_float32(name: str, array: Tensor) -> Tensor:
    """Convert a 16-bit float tensor to float32, which decompositions need; return any other unchanged.

    Raises
    ------
    TypeError
        If it is not a tensor of floating-point numbers.
    """
    check_floats(name, array)
    return array.float() if array.dtype in HALVES else array
