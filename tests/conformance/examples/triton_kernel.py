"""Compute the packed layer in Triton: each program reads one row of words, and never unpacks it to memory.

It needs a GPU, or TRITON_INTERPRET=1.

    pytest --pyargs littlebit.conformance --backend littlebit.conformance.examples.triton_kernel
"""

# pyright: reportMissingImports=false, reportIndexIssue=false

import os

import numpy as np
import torch
import triton
import triton.language as tl

LARGEST = 33  # interpreted programs are slow
DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
SIGNED = {np.dtype(np.uint16): np.int16, np.dtype(np.uint32): np.int32}  # torch cannot shift unsigned words


def to_backend(array: np.ndarray) -> torch.Tensor:
    """Copy an array to the device, words as signed integers."""
    return torch.from_numpy(np.ascontiguousarray(array).view(SIGNED.get(array.dtype, array.dtype))).to(DEVICE)


def from_backend(tensor: torch.Tensor) -> np.ndarray:
    """Copy a tensor to the CPU."""
    return tensor.cpu().numpy()


@triton.jit
def dot_signs(x, words, scale_in, scale_out, y, count, row_words, outputs, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Compute y[n, i] = scale_out[i] * sum_j sign(i, j) scale_in[j] x[n, j], one program for each i and n."""
    i, n = tl.program_id(0), tl.program_id(1)
    j = tl.arange(0, BLOCK)
    inside = j < count
    word = tl.load(words + i * row_words + j // WIDTH, mask=inside, other=0).to(tl.int32)
    bit = (word >> (j % WIDTH)) & 1
    value = tl.load(x + n * count + j, mask=inside, other=0.0) * tl.load(scale_in + j, mask=inside, other=0.0)
    total = tl.sum(tl.where(bit == 1, -value, value), axis=0)
    tl.store(y + n * outputs + i, total * tl.load(scale_out + i))


def multiply(x: torch.Tensor, words: torch.Tensor, scale_in: torch.Tensor, scale_out: torch.Tensor) -> torch.Tensor:
    """Multiply rows x (n, count) by the signs in words (outputs, words), with a scale on each side."""
    (rows, count), outputs = x.shape, len(words)
    y = torch.empty(rows, outputs, device=x.device)
    sizes = {"WIDTH": 8 * words.element_size(), "BLOCK": triton.next_power_of_2(count)}
    if rows:
        dot_signs[outputs, rows](x, words, scale_in, scale_out, y, count, words.shape[1], outputs, **sizes)
    return y


def packed_linear(x: torch.Tensor, paths: list, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Compute the sum over paths of ((((x * g) V) * ell) U^T) * h, plus the bias."""
    if x.shape[-1] != len(paths[0].g):
        raise ValueError(f"the input's last axis must be {len(paths[0].g)}, got {tuple(x.shape)}")
    rows = x.reshape(-1, x.shape[-1]).float().contiguous()
    y = torch.zeros(len(rows), len(paths[0].h), device=x.device)
    for u_words, v_words, *scales in paths:
        h, ell, g = (scale.float() for scale in scales)
        t = multiply(rows, v_words, g, ell)  # (n, rank)
        y += multiply(t, u_words, torch.ones_like(ell), h)
    y = y.reshape(*x.shape[:-1], len(paths[0].h))
    return y if bias is None else y + bias
