"""Build torch's own 8-bit and 4-bit CPU linear layers, to compare the packed layer with.

- int8 dynamic: 8-bit weights with a scale for each row. Each call rounds x to 8 bits too, and multiplies integers.
  `torch.ao.quantization.quantize_dynamic` makes this layer of a linear layer.
- int4 weight-only: 4-bit weights with a bfloat16 scale and offset for each GROUP weights of a row; x is bfloat16.
  torchao's int4 weight-only quantization uses this layer.
"""

import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

GROUP = 128  # weights that share a scale and an offset in the int4 layer

Layer = Callable[[Tensor], Tensor]


def int8_dynamic(weight: Tensor, copies: int) -> list[Layer]:
    """Quantize a weight to torch's int8 dynamic layer, in several copies.

    Parameters
    ----------
    weight : (d_out, d_in) float32 tensor
    copies : int
        Number of layers to make, each with its own memory.

    Returns
    -------
    The layers, which take and return float32.
    """
    scale = (weight.abs().amax(1) / 127).clamp(min=torch.finfo(torch.float32).tiny).double()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch deprecated the quantized tensor type, not the kernel
        codes = torch.quantize_per_channel(weight, scale, torch.zeros(len(weight), dtype=torch.long), 0, torch.qint8)
    packed = [torch.ops.quantized.linear_prepack(codes, None) for _ in range(copies)]
    return [lambda x, own=own: torch.ops.quantized.linear_dynamic(x, own, True) for own in packed]


def int4_weight_only(weight: Tensor, copies: int) -> list[Layer]:
    """Quantize a weight to torch's int4 weight-only layer, in several copies, which take and return bfloat16.

    Parameters are the same as for `int8_dynamic`; d_in must be a multiple of GROUP.
    """
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


#: For each layer: its name, bits of a weight, the function that makes it, and the dtype of x.
PEERS: Sequence[tuple[str, int, Callable[[Tensor, int], list[Layer]], torch.dtype]] = (
    ("int8", 8, int8_dynamic, torch.float32),
    ("int4", 4, int4_weight_only, torch.bfloat16),
)
#: Bound on `relative_error`: a layer with a larger error does not compute the same product.
MAX_ERROR = {"int8": 0.05, "int4": 0.2}


def relative_error(layer: Layer, weight: Tensor, x: Tensor) -> float:
    """Compute |layer(x) - x W^T| / |x W^T| in the Frobenius norm, with the exact product in float64."""
    exact = x.double() @ weight.double().T
    return float((layer(x).double() - exact).norm() / exact.norm())
