"""The packed layer for torch: the one place that chooses among the kernels (operators.py makes an operator of it)."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from .. import operators as operators
from ..packing import PackedFactors, check_words, row_bits
from .plan import Plan, batched, packed_linear as packed_linear_on_cpu


def packed_linear(x: Tensor, paths: Sequence[PackedFactors]) -> Tensor:
    """Sum of the paths' outputs for each row of x, from packed words: on a CPU in Numba, elsewhere by unpacking.

    Parameters
    ----------
    x : (rows, d_in) float tensor
    paths : sequence of PackedFactors on x's device

    Returns
    -------
    (rows, d_out) float32 tensor.

    Raises
    ------
    ValueError
        If words and x are on different devices, or the words do not fit the scales.
    """
    check_call(x, paths)
    if x.device.type != "cpu":
        return unpacked_linear(x, paths)
    needs_gradient = x.requires_grad and torch.is_grad_enabled()
    if type(x) is Tensor and not needs_gradient and not torch.compiler.is_compiling():
        return packed_linear_on_cpu(x, paths)  # the operator's own way there costs ten microseconds
    return torch.ops.littlebit.packed_linear(x, [tensor for path in paths for tensor in path])


def check_call(x: Tensor, paths: Sequence[PackedFactors]) -> None:
    """Raise ValueError if the words are on another device or do not fit the scales."""
    for path in paths:
        for words, count in (path.u_words, path.rank), (path.v_words, x.shape[-1]):
            if words.device != x.device:
                raise ValueError(
                    f"packed words and input must be on one device, but the words are on {words.device} and the input "
                    f"is on {x.device}: move the model or the input with .to(device)"
                )
            check_words(words, count)


def plan_for(x: Tensor, tensors: Sequence[Tensor], plan: Plan | None) -> Plan | None:
    """A checked plan for the tensors of a layer's paths: the given one if it still fits them, or a new one.

    None where a plan does not serve: under torch.compile and its like, on other devices, for inputs that need a
    gradient, and for words that the kernels do not read as they are.

    Raises
    ------
    ValueError
        If the words are on another device than x or do not fit the scales.
    """
    if type(x) is not Tensor or torch.compiler.is_compiling() or not x.is_cpu:
        return None
    if x.requires_grad and torch.is_grad_enabled():
        return None
    if plan is not None and plan.fits(tensors):
        return plan
    check_call(x, batched(tensors))
    plan = Plan(tensors)
    return plan if plan.fits(tensors) else None


def unpacked_linear(x: Tensor, paths: Sequence[PackedFactors]) -> Tensor:
    """`packed_linear` on any device, by two matrix products with unpacked signs; waits for no device.

    All paths are one pair of factors, y = B (A x), with scales folded in float32 (see `linear.folded`). A, B and A x
    are then rounded to x's dtype if it is float16 or bfloat16, in which torch multiplies. B is divided by its largest
    magnitude first where that exceeds one, since products of float16 scales need not fit float16.

    Parameters
    ----------
    x : (rows, d_in) float tensor
    paths : sequence of PackedFactors on x's device

    Returns
    -------
    (rows, d_out) float32 tensor; A and B take R * (d_in + d_out) elements while the call lasts, for a total rank R.
    """
    dtype = x.dtype if x.dtype in (torch.float16, torch.bfloat16) else torch.float32
    a, b = unpacked(paths)
    largest = b.abs().amax().clamp(min=1)
    t = functional.linear(x.to(dtype), a.to(dtype))  # (rows, R)
    return functional.linear(t, (b / largest).to(dtype)).float() * largest


def unpacked(paths: Sequence[PackedFactors]) -> tuple[Tensor, Tensor]:
    """All paths folded into one pair in float32 (see `linear.folded`): A, (R, d_in), and B, (d_out, R)."""
    a = torch.cat([path.g * signs(path.v_words, len(path.g)) for path in paths])
    b = torch.cat([path.h[:, None] * signs(path.u_words, path.rank) * path.ell for path in paths], dim=1)
    return a, b


def signs(words: Tensor, count: int) -> Tensor:
    """The first `count` signs of each row of words as float32, with no look at the pad bits."""
    return 1 - 2 * row_bits(words)[..., :count].float()
