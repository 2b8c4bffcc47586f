"""Register `torch.ops.littlebit.packed_linear`, the packed layer as an operator for torch.compile and torch.export.

The operator adds two things to dispatch.py: an output shape that torch can infer without running a kernel, and a
gradient of x. integrations/plugin.py imports this module together with torch, because a program that torch.export saved
may need the operator before anything else of this package is imported. Imports of kernels are therefore inside the
functions.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

library = torch.library.Library("littlebit", "DEF")
library.define("packed_linear(Tensor x, Tensor[] paths) -> Tensor")


@torch.library.impl(library, "packed_linear", "CPU")
def packed_linear_on_cpu(x: Tensor, tensors: Sequence[Tensor]) -> Tensor:
    """Run the operator on a CPU: x (rows, d_in), and the tensors of all paths, path after path."""
    from .cpu_layer import group_paths, packed_linear

    return packed_linear(x, group_paths(tensors))


@torch.library.impl(library, "packed_linear", "CUDA")
def packed_linear_on_gpu(x: Tensor, tensors: Sequence[Tensor]) -> Tensor:
    """Run the operator on a GPU, on torch's current stream."""
    from .dispatch import packed_linear_on_gpu

    return packed_linear_on_gpu(x, tensors)


@torch.library.register_fake("littlebit::packed_linear", lib=library)
def packed_linear_shape(x: Tensor, tensors: Sequence[Tensor]) -> Tensor:
    """Make an empty tensor of the operator's output shape and dtype."""
    from .cpu_layer import group_paths
    from .unpacked import HALVES

    dtype = x.dtype if x.device.type == "cuda" and x.dtype in HALVES else torch.float32
    return x.new_empty((x.shape[0], group_paths(tensors)[0].h.shape[0]), dtype=dtype)


def save_for_gradient(ctx: Any, inputs: tuple[Tensor, Sequence[Tensor]], output: Tensor) -> None:
    """Save the packed tensors and x's dtype; the gradient needs nothing else."""
    x, tensors = inputs
    ctx.save_for_backward(*tensors)
    ctx.dtype = x.dtype


def packed_linear_gradient(ctx: Any, grad: Tensor) -> tuple[Tensor, list[None]]:
    """Compute the gradient of x, dx = A^T (B^T dy), with signs unpacked during the call; words and scales get None."""
    from .cpu_layer import group_paths
    from .unpacked import unpacked

    tensors = ctx.saved_tensors
    a, b = unpacked(group_paths(tensors))
    return ((grad.float() @ b) @ a).to(ctx.dtype), [None] * len(tensors)


torch.library.register_autograd(
    "littlebit::packed_linear", packed_linear_gradient, setup_context=save_for_gradient, lib=library
)
