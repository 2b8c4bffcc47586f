"""The packed layer for torch: the one place that chooses among the kernels (operators.py makes an operator of it)."""

import warnings
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ..packing import PackedFactors, check_words
from .cpu_layer import Plan, batched, packed_linear as packed_linear_on_cpu
from .unpacked import HALVES, unpacked_linear

MOST_PATHS = 2  # that a launch of the CUDA kernels takes


def packed_linear(x: Tensor, paths: Sequence[PackedFactors]) -> Tensor:
    """Sum of the paths' outputs for each row of x, from packed words: by Numba's kernels, or else by unpacking.

    Parameters
    ----------
    x : (rows, d_in) float tensor
    paths : sequence of PackedFactors on x's device

    Returns
    -------
    (rows, d_out) tensor: float32, or on a GPU x's dtype if it is float16 or bfloat16. Sums are of float32 but for two
    cases, both with x in 16 bits on a GPU: more than four rows are rounded to float16 on the way, after g (but not
    float16 in whole eights) and after ell, each relative to its row's largest entry; and large batches are multiplied
    by signs unpacked to 16 bits.

    Raises
    ------
    ValueError
        If words and x are on different devices, or the words do not fit the scales.
    """
    check_call(x, paths)
    if x.device.type not in ("cpu", "cuda"):
        return unpacked_linear(x, paths)
    tensors = [tensor for path in paths for tensor in path]
    needs_gradient = x.requires_grad and torch.is_grad_enabled()
    if type(x) is Tensor and not needs_gradient and not torch.compiler.is_compiling():
        # the operator's own way there costs ten microseconds
        return packed_linear_on_cpu(x, paths) if x.is_cpu else packed_linear_on_gpu(x, tensors)
    return torch.ops.littlebit.packed_linear(x, tensors)


def packed_linear_on_gpu(x: Tensor, tensors: Sequence[Tensor]) -> Tensor:
    """`packed_linear` for tensors on a GPU: by the CUDA kernels where they can be used."""
    kernels = cuda_kernels(x.device.index)
    paths = batched(tensors)
    if kernels is None or len(paths) > MOST_PATHS:
        return unpacked_linear(x, paths).to(x.dtype if x.dtype in HALVES else torch.float32)
    return kernels.CudaPackedLayer(tensors)(x)


@cache
def cuda_kernels(index: int) -> Any:
    """The module of the CUDA kernels, or None where they cannot be used on a GPU; a warning says why, once."""
    try:
        from . import cuda_driver, cuda_layer

        reason = cuda_driver.unusable(index)
    except Exception as error:  # whatever Numba, the driver or a missing library raises
        reason = f"{type(error).__name__}: {error}"
    if reason is None:
        return cuda_layer
    warnings.warn(
        f"the CUDA kernels for packed signs cannot be used on GPU {index}, so signs are unpacked for each call, which "
        f"is slower: {reason}",
        stacklevel=2,
    )
    return None


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

    None where a plan does not serve: under torch.compile and its like, where there are no kernels for the device, for
    inputs that need a gradient, and on a CPU for words that the kernels do not read as they are.

    Raises
    ------
    ValueError
        If the words are on another device than x or do not fit the scales.
    """
    if type(x) is not Tensor or torch.compiler.is_compiling() or not (x.is_cpu or x.is_cuda):
        return None
    if x.requires_grad and torch.is_grad_enabled():
        return None
    if plan is not None and x.device == tensors[0].device and plan.fits(tensors):
        return plan
    paths = batched(tensors)
    check_call(x, paths)
    if x.is_cuda:
        kernels = cuda_kernels(x.device.index)
        return kernels.CudaPackedLayer(tensors) if kernels and len(paths) <= MOST_PATHS else None
    plan = Plan(tensors)
    return plan if plan.fits(tensors) else None
