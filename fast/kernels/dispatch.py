"""Choose the kernel for a packed layer: CPU kernels, CUDA kernels, or unpacked matrix products.

| input | method | file |
|---|---|---|
| on a CPU, few rows | GEMV by lookup tables | cpu_layer.py, which calls cpu.py |
| on a CPU, many rows | unpack to float32, then two GEMMs by torch's BLAS, if that is faster | cpu_layer.py |
| on an NVIDIA GPU | CUDA GEMV, GEMM, or unpack to 16 bits | cuda_layer.py |
| on any other device, or where CUDA kernels cannot run | unpack, then two matrix products by torch | unpacked.py |

With torch.compile, or where x needs a gradient, the same methods are called through the operator of torch_op.py.
"""

import warnings
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ..packing import PackedFactors, check_words
from .cpu_layer import CpuPackedLayer, group_paths, packed_linear as packed_linear_on_cpu
from .unpacked import HALVES, unpacked_linear

MAX_CUDA_PATHS = 2  # paths that one launch of the CUDA kernels takes


def packed_linear(x: Tensor, paths: Sequence[PackedFactors]) -> Tensor:
    """Compute the sum of the paths' outputs for each row of x, from packed words.

    y = sum over paths of ((((x * g) V_sign) * ell) U_sign^T) * h  (LittleBit, arXiv 2506.13771)

    Parameters
    ----------
    x : (rows, d_in) float tensor
    paths : sequence of PackedFactors
        On x's device.

    Returns
    -------
    (rows, d_out) tensor
        float32; on a GPU x's dtype if it is float16 or bfloat16. Sums are float32, with two exceptions for 16-bit x on
        a GPU. For more than four rows, intermediates are rounded to float16, relative to the largest entry of their
        row: after ell, and after g too (unless x is float16 and its rows are whole multiples of eight). Large batches
        are multiplied by signs unpacked to 16 bits.

    Raises
    ------
    ValueError
        If words and x are on different devices, or the number or dtype of the words does not fit the scales.
    """
    check_call(x, paths)
    if x.device.type not in ("cpu", "cuda"):
        return unpacked_linear(x, paths)
    tensors = [tensor for path in paths for tensor in path]
    needs_gradient = x.requires_grad and torch.is_grad_enabled()
    if type(x) is Tensor and not needs_gradient and not torch.compiler.is_compiling():
        # call the kernels directly: torch's operator would add ten microseconds
        return packed_linear_on_cpu(x, paths) if x.is_cpu else packed_linear_on_gpu(x, tensors)
    return torch.ops.littlebit.packed_linear(x, tensors)


def packed_linear_on_gpu(x: Tensor, tensors: Sequence[Tensor]) -> Tensor:
    """Compute `packed_linear` for tensors on a GPU, by the CUDA kernels where they can be used."""
    kernels = cuda_kernels(x.device.index)
    paths = group_paths(tensors)
    if kernels is None or len(paths) > MAX_CUDA_PATHS:
        return unpacked_linear(x, paths).to(x.dtype if x.dtype in HALVES else torch.float32)
    return kernels.CudaPackedLayer(tensors)(x)


@cache
def cuda_kernels(index: int) -> Any:
    """Import the CUDA kernels (cuda_layer.py), or warn once why a GPU cannot use them and return None."""
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
    """Raise ValueError if the words are on another device than x or do not fit the scales."""
    for path in paths:
        for words, count in (path.u_words, path.rank), (path.v_words, x.shape[-1]):
            if words.device != x.device:
                raise ValueError(
                    f"packed words and input must be on one device, but the words are on {words.device} and the input "
                    f"is on {x.device}: move the model or the input with .to(device)"
                )
            check_words(words, count)


def packed_layer_for(x: Tensor, tensors: Sequence[Tensor], current: Any) -> Any:
    """Prepare a layer's tensors for the kernels, or reuse what an earlier call prepared.

    Checking and preparing cost about as much as computing a small layer, so `PackedLinear` keeps the result.

    Parameters
    ----------
    x : (..., d_in) float tensor
    tensors : sequence of Tensor
        The tensors of all paths, path after path.
    current : CpuPackedLayer, its CUDA counterpart or None
        The result of an earlier call; it is returned if it still fits the tensors.

    Returns
    -------
    CpuPackedLayer, its CUDA counterpart or None
        None if `packed_linear` must be called instead: under torch.compile, for an x that needs a gradient, on a device
        without kernels, and on a CPU for words that the kernels can only read as a copy.

    Raises
    ------
    ValueError
        If the words are on another device than x or do not fit the scales.
    """
    if type(x) is not Tensor or torch.compiler.is_compiling() or not (x.is_cpu or x.is_cuda):
        return None
    if x.requires_grad and torch.is_grad_enabled():
        return None
    if current is not None and x.device == tensors[0].device and current.fits(tensors):
        return current
    paths = group_paths(tensors)
    check_call(x, paths)
    if x.is_cuda:
        kernels = cuda_kernels(x.device.index)
        return kernels.CudaPackedLayer(tensors) if kernels and len(paths) <= MAX_CUDA_PATHS else None
    layer = CpuPackedLayer(tensors)
    return layer if layer.fits(tensors) else None
