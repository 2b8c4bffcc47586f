"""Embeddings and output heads of 8 or 4 bits an entry, with a float16 scale for each group of a row.

They are what a sub-1-bit model's file is made of (83 % of Llama-2-7B at 0.1 bits) and, on a CPU, most of a token's
time. Entry j of a row is scale[j // group] * code[j], code an integer of -127 to 127, or -8 to 7.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

GROUPS = {8: 64, 4: 32}  # entries that share a scale, at most
ROWS = 4096  # rows of a head that are dequantised at once
STEPS = 20  # scales that are tried for each group


class Table(nn.Module):
    """Rows of integers with scales: what an embedding and a tied head share.

    Parameters
    ----------
    bits : int
        8 or 4.
    codes : (rows, size) int8 tensor, or (rows, size / 2) uint8 for 4 bits
        With 4 bits each 32 entries are 16 bytes: byte k holds 8 + code k in its low half, 8 + code k + 16 in its other.
    scale : (rows, size / group) float16 tensor
    """

    def __init__(self, bits: int, codes: Tensor, scale: Tensor):
        super().__init__()
        self.bits = bits
        self.codes: Tensor
        self.scale: Tensor
        self.register_buffer("codes", codes)
        self.register_buffer("scale", scale)

    @classmethod
    def empty(cls, bits: int, rows: int, size: int, group: int) -> "Table":
        """A table of tensors without memory, to be filled from a checkpoint."""
        codes = torch.empty(rows, size * bits // 8, dtype=torch.int8 if bits == 8 else torch.uint8, device="meta")
        return cls(bits, codes, torch.empty(rows, size // group, dtype=torch.float16, device="meta"))

    @property
    def group(self) -> int:
        """Entries that share a scale."""
        return self.size // self.scale.shape[1]

    @property
    def size(self) -> int:
        """Entries of a row."""
        return self.codes.shape[1] * 8 // self.bits

    def rows(self, index: Tensor | slice) -> Tensor:
        """Some rows, (..., size) float32."""
        codes, scale = self.codes[index], self.scale[index].float()
        if self.bits == 4:
            pairs = codes.unflatten(-1, (-1, 16))
            codes = torch.stack([pairs & 15, pairs >> 4], -2).flatten(-3).to(torch.int8) - 8
        return (codes.float().unflatten(-1, (scale.shape[-1], -1)) * scale[..., None]).flatten(-2)


class QuantizedEmbedding(nn.Module):
    """An embedding whose rows are a Table's; its output has the given dtype."""

    def __init__(self, table: Table, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.table, self.dtype = table, dtype

    def forward(self, tokens: Tensor) -> Tensor:
        """(...) integers to (..., size)."""
        return self.table.rows(tokens).to(self.dtype)


class QuantizedHead(nn.Module):
    """A linear layer without bias whose weight's rows are a Table's.

    A tied table belongs to the embedding: the head then only refers to it, and a state dict holds it once.
    """

    table: Table

    def __init__(self, table: Table, tied: bool = False):
        super().__init__()
        if tied:
            self.__dict__["table"] = table
        else:
            self.table = table

    def forward(self, x: Tensor) -> Tensor:
        """(..., size) to (..., rows)."""
        starts = range(0, len(self.table.codes), ROWS)
        return torch.cat([functional.linear(x, self.table.rows(slice(at, at + ROWS)).to(x.dtype)) for at in starts], -1)


def quantize_table(weight: Tensor, bits: int) -> Table:
    """A weight rounded to 8 or 4 bits an entry, each group's scale chosen for the smallest squared error.

    Parameters
    ----------
    weight : (rows, size) float tensor, size a multiple of 32
    bits : int
        8 or 4.

    Raises
    ------
    ValueError
        If the size is no multiple of 32, or the bits are neither 8 nor 4.
    """
    if bits not in GROUPS:
        raise ValueError(f"embeddings are kept in 16, 8 or 4 bits, not {bits}")
    if weight.shape[1] % 32:
        raise ValueError(f"embeddings of 8 or 4 bits need a size that is a multiple of 32, not {weight.shape[1]}")
    group = next(each for each in (GROUPS[bits], 32) if weight.shape[1] % each == 0)
    low, high = (-127, 127) if bits == 8 else (-8, 7)
    parts = []
    for rows in weight.detach().float().split(ROWS):
        groups = rows.unflatten(-1, (-1, group))
        # 4 bits reach further below zero than above it, so the sign of the largest entry decides that of the scale
        largest = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))
        best_error, best = torch.full_like(largest, torch.inf), (largest, groups)
        for step in range(STEPS if bits == 4 else 1):
            scale = largest / low if bits == 4 else largest.abs() / high
            scale = (scale * (1 - step * 0.02)).half().float()
            safe = torch.where(scale == 0, 1, scale)
            codes = (groups / safe).round().clamp(low, high)
            error = (codes * scale - groups).square().sum(-1, keepdim=True)
            better = error < best_error
            best = tuple(torch.where(better, new, old) for new, old in zip((scale, codes), best, strict=True))
            best_error = torch.where(better, error, best_error)
        parts.append((best[0][..., 0].half(), best[1].flatten(-2)))
    scale, codes = (torch.cat(each) for each in zip(*parts, strict=True))
    codes = codes.to(torch.int8)
    if bits == 4:
        pairs = (codes + 8).to(torch.uint8).unflatten(-1, (-1, 2, 16))
        codes = (pairs[..., 0, :] | pairs[..., 1, :] << 4).flatten(-2)
    return Table(bits, codes, scale)


def check_embeddings(model: Any, bits: int) -> None:
    """Raise ValueError unless a model's embedding and head can be kept in so many bits."""
    if bits == 16:
        return
    embedding = model.get_input_embeddings()
    if type(embedding) is not nn.Embedding:
        raise ValueError(
            f"this model's {type(embedding).__name__} does more than look rows up, and must be kept in 16 bits"
        )
    quantize_table(embedding.weight[:1], bits)


def quantize_embeddings_(model: Any, bits: int) -> None:
    """Replace a model's input embedding and output head by quantised ones, in place; tied ones share their table.

    Parameters
    ----------
    model : transformers causal language model
    bits : int
        8 or 4; 16 leaves the model as it is.

    Raises
    ------
    ValueError
        If the bits are none of these, or a size is no multiple of 32.
    """
    check_embeddings(model, bits)
    if bits == 16:
        return
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    table = quantize_table(embedding.weight, bits)
    tied = head.weight is embedding.weight
    replace_embeddings(model, table, table if tied else quantize_table(head.weight, bits), embedding.weight.dtype)


def replace_embeddings(model: Any, table: Table, head: Table, dtype: torch.dtype) -> None:
    """Put tables where a model has its embedding and its head."""
    model.set_input_embeddings(QuantizedEmbedding(table, dtype))
    model.set_output_embeddings(QuantizedHead(head, tied=head is table))
    model._tied_weights_keys = model.all_tied_weights_keys = {}  # else transformers looks for weights to tie
