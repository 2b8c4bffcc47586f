"""Torch's own linear layers of 8 and 4 bits on a CPU, which need no further package: what a benchmark compares with.

- int8 dynamic: weights of 8 bits with a scale for each row; each call rounds x to 8 bits too, and multiplies integers.
  It is what `torch.ao.quantization.quantize_dynamic` makes of a linear layer.
- int4 weight-only: weights of 4 bits with a bfloat16 scale and offset for each GROUP of a row, and x in bfloat16. It is
  the layer under torchao's int4 weight-only quantisation.
"""

import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

GROUP = 128  # weights that share a scale and an offset in the int4 layer

Layer = Callable[[Tensor], Tensor]


def int8_dynamic(weight: Tensor, copies: int) -> list[Layer]:
    """Make copies of torch's int8 dynamic layer.

    Parameters
    ----------
    weight : (d_out, d_in) float32 tensor
    copies : int
        Layers to make, each with its own memory.

    Returns
    -------
    The layers, which take and return float32.
    """
    scale = (weight.abs().amax(1) / 127).clamp(min=torch.finfo(torch.float32).tiny).double()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch deprecates the tensors, not the kernel
        codes = torch.quantize_per_channel(weight, scale, torch.zeros(len(weight), dtype=torch.long), 0, torch.qint8)
    packed = [torch.ops.quantized.linear_prepack(codes, None) for _ in range(copies)]
    return [lambda x, own=own: torch.ops.quantized.linear_dynamic(x, own, True) for own in packed]


def int4_weight_only(weight: Tensor, copies: int) -> list[Layer]:
    """Make copies of torch's int4 weight-only layer; see `int8_dynamic`. The layers take and return bfloat16."""
    groups = weight.unflatten(1, (-1, GROUP))
    low, high = groups.amin(-1), groups.amax(-1)
    scale = ((high - low) / 15).clamp(min=torch.finfo(torch.float32).tiny)
    codes = ((groups - low[..., None]) / scale[..., None]).round().clamp(0, 15).to(torch.int32).flatten(1)
    words = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    # the kernel computes (code - 8) * scale + offset
    pairs = torch.stack([scale, low + 8 * scale], -1).transpose(0, 1).contiguous().bfloat16()
    packed = [(words.clone(), pairs.clone()) for _ in range(copies)]
    return [
        lambda x, own=own, beside=beside: torch.ops.aten._weight_int4pack_mm_for_cpu(x, own, GROUP, beside)
        for own, beside in packed
    ]


#: Name, bits of a weight, what makes the layers, and the dtype of x.
PEERS: Sequence[tuple[str, int, Callable[[Tensor, int], list[Layer]], torch.dtype]] = (
    ("int8", 8, int8_dynamic, torch.float32),
    ("int4", 4, int4_weight_only, torch.bfloat16),
)
#: Most root mean square error of a peer's output over the exact output's: a kernel that is further off is wrong.
MOST_ERROR = {"int8": 0.05, "int4": 0.2}


def relative_error(layer: Layer, weight: Tensor, x: Tensor) -> float:
    """Compute the root mean square error of a layer's output, relative to that of the weight in float64."""
    exact = x.double() @ weight.double().T
    return float((layer(x).double() - exact).norm() / exact.norm())
