"""`torch.ops.littlebit.packed_linear`: the packed layer as an operator that torch.compile can put into its graphs.

plugin.py imports this module when torch is imported, because a program that torch.export saved may ask for the
operator before anything else of this package is used. So what it calls is imported when it is called.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

library = torch.library.Library("littlebit", "DEF")
library.define("packed_linear(Tensor x, Tensor[] paths) -> Tensor")


@torch.library.impl(library, "packed_linear", "CPU")
def packed_linear_on_cpu(x: Tensor, tensors: Sequence[Tensor]) -> Tensor:
    """The operator: x (rows, d_in), and the tensors of all paths one after the other."""
    from .cpu_layer import batched, packed_linear

    return packed_linear(x, batched(tensors))


@torch.library.impl(library, "packed_linear", "CUDA")
def packed_linear_on_gpu(x: Tensor, tensors: Sequence[Tensor]) -> Tensor:
    """The operator on a GPU, on torch's current stream."""
    from .dispatch import packed_linear_on_gpu

    return packed_linear_on_gpu(x, tensors)


@torch.library.register_fake("littlebit::packed_linear", lib=library)
def packed_linear_shape(x: Tensor, tensors: Sequence[Tensor]) -> Tensor:
    """An empty tensor of the operator's output shape and dtype."""
    from .cpu_layer import batched
    from .unpacked import HALVES

    dtype = x.dtype if x.device.type == "cuda" and x.dtype in HALVES else torch.float32
    return x.new_empty((x.shape[0], batched(tensors)[0].h.shape[0]), dtype=dtype)


def keep_for_gradient(ctx: Any, inputs: tuple[Tensor, Sequence[Tensor]], output: Tensor) -> None:
    """Keep the packed tensors, which are all that the gradient needs, and x's dtype."""
    x, tensors = inputs
    ctx.save_for_backward(*tensors)
    ctx.dtype = x.dtype


def packed_linear_gradient(ctx: Any, grad: Tensor) -> tuple[Tensor, list[None]]:
    """Gradient of x, dx = A^T (B^T dy), with signs unpacked while this lasts; words and scales have none."""
    from .cpu_layer import batched
    from .unpacked import unpacked

    tensors = ctx.saved_tensors
    a, b = unpacked(batched(tensors))
    return ((grad.float() @ b) @ a).to(ctx.dtype), [None] * len(tensors)


torch.library.register_autograd(
    "littlebit::packed_linear", packed_linear_gradient, setup_context=keep_for_gradient, lib=library
)
