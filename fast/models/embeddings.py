"""Quantize embeddings and output heads to 8 or 4 bits per entry, with a float16 scale for each group.

In a sub-1-bit model, embedding and head are most of the file (83 % of Llama-2-7B at 0.1 bits) and, on a CPU, most of
the time of a token.

8 bits: entry j of a row = scale[j // group] * code[j], with codes from -127 to 127
4 bits: entry j of a row = offset[j // group] + scale[j // group] * code[j], with codes from 0 to 15

With groups of 32, 4-bit codes take 5 bits per entry in all.

Round-to-nearest at 4 bits raises the perplexity of SmolLM2-135M by 8 %. The head causes nearly all of that, because
more than half of the energy of its input lies in one direction. Given the second moments of the head's input, GPTQ
(Frantar et al., arXiv 2210.17323) lets later columns compensate the rounding error of each column. Then least squares
refits the scales and offsets of each row to its codes. Half of the moments come from a text and half from random
tokens, because a short text does not contain most tokens of the vocabulary.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from .._checks import flat_tokens, window_for
from .wrappers import to_change

GROUPS = {8: 64, 4: 32}  # largest group of entries that share a scale, by bits
LARGEST_CODE = 15  # of 4 bits
DAMPING = 0.03  # added to the diagonal of the second moments, relative to the mean diagonal
CALIBRATION_WINDOW = 512  # tokens of a calibration text to read at once
RANDOM_TOKENS = 8192  # random tokens to read in addition to a calibration text
ROWS_AT_ONCE = 4096  # rows of a head to dequantize at once
RIDGE = 1e-9  # added to the diagonal of a refit's equations, relative to the mean diagonal
REFIT_NUMBERS = 1 << 24  # largest count of float32 numbers in a refit
RANGE_STEPS = 20  # ranges to try for each group


class EmbeddingTable(nn.Module):
    """Hold the rows of an embedding or head as integers with scales; a tied head shares its embedding's table.

    Parameters
    ----------
    bits : int
        8 or 4.
    codes : (rows, size) int8 tensor, or (rows, size / 2) uint8 for 4 bits
        With 4 bits, 16 bytes hold 32 entries: byte k holds code k in its low half and code k + 16 in its high half.
    scale : (rows, size / group) float16 tensor
    offset : (rows, size / group) float16 tensor for 4 bits, else None
    """

    def __init__(self, bits: int, codes: Tensor, scale: Tensor, offset: Tensor | None = None):
        super().__init__()
        self.bits = bits
        self.codes: Tensor
        self.scale: Tensor
        self.offset: Tensor | None
        self.register_buffer("codes", codes)
        self.register_buffer("scale", scale)
        self.register_buffer("offset", offset)

    @classmethod
    def empty(cls, bits: int, rows: int, size: int, group: int) -> "EmbeddingTable":
        """Make a table of tensors on the meta device, to fill from a checkpoint."""
        codes = torch.empty(rows, size * bits // 8, dtype=torch.int8 if bits == 8 else torch.uint8, device="meta")
        scale = torch.empty(rows, size // group, dtype=torch.float16, device="meta")
        return cls(bits, codes, scale, torch.empty_like(scale) if bits == 4 else None)

    @property
    def group(self) -> int:
        """Count the entries that share a scale."""
        return self.size // self.scale.shape[1]

    @property
    def size(self) -> int:
        """Count the entries of a row."""
        return self.codes.shape[1] * 8 // self.bits

    def rows(self, index: Tensor | slice) -> Tensor:
        """Dequantize some rows to (..., size) float32."""
        codes, scale = self.codes[index], self.scale[index].float()
        if self.bits == 4:
            pairs = codes.unflatten(-1, (-1, 16))
            codes = torch.stack([pairs & 15, pairs >> 4], -2).flatten(-3)
        entries = codes.float().unflatten(-1, (scale.shape[-1], -1)) * scale[..., None]
        if self.offset is not None:
            entries += self.offset[index].float()[..., None]
        return entries.flatten(-2)


class WithoutWeight(nn.Module):
    """Refuse access to `weight`, because the module holds a table of integers in its place."""

    def __getattr__(self, name: str) -> Any:
        """Find a parameter, buffer or submodule.

        Raises
        ------
        AttributeError
            If the module has no such attribute. For `weight`, the message gives the alternatives.
        """
        if name == "weight":
            raise AttributeError(no_weight(self))
        return super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute other than `weight`.

        Raises
        ------
        AttributeError
            If the attribute is `weight`.
        """
        if name == "weight":
            raise AttributeError(no_weight(self))
        super().__setattr__(name, value)


def no_weight(module: nn.Module) -> str:
    """Explain why a quantized embedding or head has no weight, and what to do."""
    return (
        f"a {type(module).__name__} has no weight to read, resize, tie or train: its rows are integers with scales "
        "(table.rows(slice(None)) dequantizes them); change the 16-bit model before quantize_embeddings_, or keep "
        "embeddings in 16 bits"
    )


class QuantizedEmbedding(WithoutWeight):
    """Look up rows of a quantized table; the output has the given dtype."""

    def __init__(self, table: EmbeddingTable, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.table, self.dtype = table, dtype

    @property
    def num_embeddings(self) -> int:
        """Count the rows, under the name in torch.nn.Embedding."""
        return len(self.table.codes)

    @property
    def embedding_dim(self) -> int:
        """Count the entries of a row, under the name in torch.nn.Embedding."""
        return self.table.size

    def forward(self, tokens: Tensor) -> Tensor:
        """Map (...) integer tokens to (..., size)."""
        return self.table.rows(tokens).to(self.dtype)


class QuantizedHead(WithoutWeight):
    """Compute logits by a linear layer without bias, whose weight is a quantized table.

    A tied table belongs to the embedding. The head only refers to it, so a state dict holds it once.
    """

    table: EmbeddingTable

    def __init__(self, table: EmbeddingTable, tied: bool = False):
        super().__init__()
        if tied:
            self.__dict__["table"] = table
        else:
            self.table = table

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., size) to (..., rows)."""
        starts = range(0, len(self.table.codes), ROWS_AT_ONCE)
        return torch.cat(
            [functional.linear(x, self.table.rows(slice(at, at + ROWS_AT_ONCE)).to(x.dtype)) for at in starts], -1
        )


def quantize_table(weight: Tensor, bits: int, moments: Tensor | None = None) -> EmbeddingTable:
    """Quantize a weight to 8 or 4 bits per entry.

    8 bits round to nearest. 4 bits choose each group's scale and offset for the smallest squared error. With `moments`,
    4 bits minimize the squared error of the layer's output instead (GPTQ).

    Parameters
    ----------
    weight : (rows, size) float tensor, size a multiple of 32
    bits : int
        8 or 4.
    moments : (size, size) float tensor, optional
        Mean of x x^T over the inputs x of the layer.

    Raises
    ------
    ValueError
        If the size is not a multiple of 32, or the bits are neither 8 nor 4.
    """
    if bits not in GROUPS:
        raise ValueError(f"embeddings must be kept in 16, 8 or 4 bits, got {bits}")
    if weight.shape[1] % 32:
        raise ValueError(
            f"embeddings of 8 or 4 bits need a size that is a multiple of 32, got {weight.shape[1]}: keep 16 bits"
        )
    parts = weight.detach().float().split(ROWS_AT_ONCE)
    if bits == 8:
        group = next(each for each in (GROUPS[bits], 32) if weight.shape[1] % each == 0)
        codes, scale = (torch.cat(each) for each in zip(*(round_8_bits(rows, group) for rows in parts), strict=True))
        return EmbeddingTable(bits, codes, scale)
    if moments is None:
        found = [round_4_bits(rows, GROUPS[bits]) for rows in parts]
    else:
        moments = damped(moments)
        feedback = feedback_factors(moments)
        found = [
            refit_ranges(rows, round_4_bits(rows, GROUPS[bits], feedback)[0], GROUPS[bits], moments) for rows in parts
        ]
    codes, scale, offset = (torch.cat(each) for each in zip(*found, strict=True))
    pairs = codes.unflatten(-1, (-1, 2, 16))
    return EmbeddingTable(bits, (pairs[..., 0, :] | pairs[..., 1, :] << 4).flatten(-2), scale, offset)


def round_8_bits(rows: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """Round rows to codes, (rows, size) int8, with scales, (rows, groups) float16."""
    groups = rows.unflatten(-1, (-1, group))
    scale = (groups.abs().amax(-1, keepdim=True) / 127).half()
    codes = (groups / torch.where(scale == 0, 1, scale.float())).round().clamp(-127, 127)
    return codes.flatten(-2).to(torch.int8), scale[..., 0]


def round_4_bits(rows: Tensor, group: int, feedback: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Round rows to codes, (rows, size) uint8, with scales and offsets, (rows, groups) float16, column by column.

    With `feedback` (see `feedback_factors`), later columns compensate the rounding error of each column.
    """
    rest, size = rows.clone(), rows.shape[1]
    codes, scales, offsets = torch.empty_like(rows, dtype=torch.uint8), [], []
    for first in range(0, size, group):
        columns, errors = rest[:, first : first + group], torch.zeros_like(rest[:, first : first + group])
        scale, offset = fitted_range(columns)
        scales.append(scale)
        offsets.append(offset)
        scale, offset = scale.float(), offset.float()
        divisor = torch.where(scale == 0, 1, scale)
        for j in range(group):
            at = first + j
            code = ((columns[:, j : j + 1] - offset) / divisor).round().clamp(0, LARGEST_CODE)
            codes[:, at] = code[:, 0].to(torch.uint8)
            if feedback is not None:
                errors[:, j] = (columns[:, j] - (offset + scale * code)[:, 0]) / feedback[at, at]
                columns[:, j + 1 :] -= errors[:, j : j + 1] * feedback[at, at + 1 : first + group]
        if feedback is not None:
            rest[:, first + group :] -= errors @ feedback[first : first + group, first + group :]
    return codes, torch.cat(scales, -1), torch.cat(offsets, -1)


def fitted_range(groups: Tensor) -> tuple[Tensor, Tensor]:
    """Find the scale and offset, (rows, 1) float16, with the smallest squared error of groups (rows, group)."""
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    best_error = torch.full_like(low, torch.inf)
    best_scale, best_offset = low.half(), low.half()
    for step in range(RANGE_STEPS):
        reach = (high - low) * (1 - 0.02 * step)
        scale, offset = (reach / LARGEST_CODE).half(), ((low + high - reach) / 2).half()
        codes = ((groups - offset) / torch.where(scale == 0, 1, scale.float())).round().clamp(0, LARGEST_CODE)
        error = (codes * scale.float() + offset - groups).square().sum(-1, keepdim=True)
        better = error < best_error
        best_scale, best_offset = torch.where(better, scale, best_scale), torch.where(better, offset, best_offset)
        best_error = torch.minimum(error, best_error)
    return best_scale, best_offset


def damped(moments: Tensor) -> Tensor:
    """Add DAMPING times the mean diagonal to the diagonal of second moments."""
    return moments + DAMPING * moments.diagonal().mean() * torch.eye(len(moments)).to(moments)


def feedback_factors(moments: Tensor) -> Tensor:
    """Compute the upper triangular U, (size, size) float32, for which U^T U is the inverse of the second moments.

    An error e of column j is compensated by subtracting e / U_jj * U_jk from every later column k (GPTQ, section 3).
    """
    return torch.linalg.cholesky(torch.linalg.inv(moments.double()), upper=True).float()


def refit_ranges(rows: Tensor, codes: Tensor, group: int, moments: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Refit the scales and offsets of each row to its codes by weighted least squares.

    The error is d M d^T, where d is a row's rounding error and M the second moments. Let D be the matrix that maps a
    row's scales and offsets p to its entries. Then D^T M D p = D^T M w.
    """
    groups = codes.shape[1] // group
    blocks = moments.unflatten(1, (groups, group)).unflatten(0, (groups, group))  # (groups, group, groups, group)
    ones = blocks.sum((1, 3))
    found = []
    step = max(1, REFIT_NUMBERS // groups // rows.shape[1])
    for weight, code in zip(rows.split(step), codes.float().split(step), strict=True):
        code = code.unflatten(-1, (groups, group))
        moved = torch.einsum("rai,aibj->rabj", code, blocks)
        scales, mixed = (moved * code[:, None]).sum(-1), moved.sum(-1)
        top, bottom = torch.cat([scales, mixed], -1), torch.cat([mixed.mT, ones.expand_as(mixed)], -1)
        system = torch.cat([top, bottom], -2).double()  # (rows, 2 * groups, 2 * groups)
        seen = (weight @ moments).unflatten(-1, (groups, group))
        wanted = torch.cat([(code * seen).sum(-1), seen.sum(-1)], -1).double()
        diagonal = system.diagonal(dim1=-2, dim2=-1)
        diagonal += RIDGE * diagonal.mean(-1, keepdim=True)  # A group of equal codes determines no scale.
        found.append(torch.linalg.solve(system, wanted).half())
    scale, offset = torch.cat(found).split(groups, -1)
    return codes, scale, offset


def head_moments(model: Any, tokens: Tensor) -> Tensor:
    """Measure the mean of x x^T, (size, size) float32, over the inputs x of a model's head, on (n,) tokens."""
    head, device = model.get_output_embeddings(), next(model.parameters()).device
    total = torch.zeros(head.weight.shape[1], head.weight.shape[1], device=device)

    def add(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        rows = inputs[0].detach().flatten(0, -2).float()
        total.addmm_(rows.T, rows)

    hook = head.register_forward_pre_hook(add)
    try:
        with torch.inference_mode():
            for part in tokens.split(window_for(model, None, CALIBRATION_WINDOW)):
                model(part[None].to(device), use_cache=False)
    finally:
        hook.remove()
    return total / len(tokens)


def random_tokens(count: int) -> Tensor:
    """Draw RANDOM_TOKENS tokens uniformly from a vocabulary of `count`, (RANDOM_TOKENS,) int64, always the same."""
    return torch.randint(count, (RANDOM_TOKENS,), generator=torch.Generator().manual_seed(0))


def check_embeddings(model: Any, bits: int) -> None:
    """Raise ValueError unless a model's embedding and head can be quantized to these bits."""
    if bits == 16:
        return
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if isinstance(embedding, QuantizedEmbedding):
        raise ValueError(f"this model's embedding is quantized already, to {embedding.table.bits} bits")
    if type(embedding) is not nn.Embedding:
        raise ValueError(
            f"this model's {type(embedding).__name__} does more than look up rows, and must be kept in 16 bits"
        )
    if type(head) is not nn.Linear or head.bias is not None:
        kind = "has no output head" if head is None else f"has a {type(head).__name__} with more than a weight as head"
        raise ValueError(f"this model {kind}; its embedding and head must be kept in 16 bits")
    quantize_table(embedding.weight[:1], bits)


def quantize_embeddings_(model: Any, bits: int, tokens: Tensor | None = None) -> None:
    """Replace a model's input embedding and output head by quantized ones, in place; tied ones share a table.

    Parameters
    ----------
    model : transformers causal language model
    bits : int
        8 or 4; 16 leaves the model as it is.
    tokens : (n,) integer tensor, optional
        Text to measure the head's input on, in addition to random tokens. It makes the loss of 4 bits several times
        smaller; 8 bits do not use it.

    Raises
    ------
    ValueError
        If the bits are not 16, 8 or 4, a size is not a multiple of 32, the embedding or head is not a plain one, or the
        model has PEFT adapters.
    """
    model = to_change(model, "quantize_embeddings_")
    check_embeddings(model, bits)
    if bits == 16:
        return
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    moments = None
    if bits == 4 and tokens is not None:
        texts = flat_tokens(tokens, model), random_tokens(embedding.num_embeddings)
        moments = torch.stack([head_moments(model, each) for each in texts]).mean(0)
    table = quantize_table(head.weight, bits, moments)
    tied = head.weight is embedding.weight
    replace_embeddings(model, table if tied else quantize_table(embedding.weight, bits), table, embedding.weight.dtype)


def replace_embeddings(model: Any, table: EmbeddingTable, head: EmbeddingTable, dtype: torch.dtype) -> None:
    """Replace a model's embedding and, if it has one, its head by quantized ones with these tables."""
    model.set_input_embeddings(QuantizedEmbedding(table, dtype))
    if model.get_output_embeddings() is not None:
        model.set_output_embeddings(QuantizedHead(head, tied=head is table))
    model._tied_weights_keys = model.all_tied_weights_keys = {}  # else transformers looks for weights to tie


def settle_ties(model: Any) -> None:
    """Make a model's tie_word_embeddings say whether its head and embedding are one weight.

    transformers loads a separate head even where the configuration ties it. A later tie_weights() would then overwrite
    the head. A head that equals the embedding is tied: the first releases of transformers 5 load it twice.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    table, rows = getattr(embedding, "weight", None), getattr(head, "weight", None)
    if not isinstance(table, nn.Parameter) or not isinstance(rows, nn.Parameter) or table is rows:
        return
    configured = getattr(model.config.get_text_config(), "tie_word_embeddings", False)
    if configured and table.shape == rows.shape and torch.equal(table, rows):
        head.weight = table
    else:
        tie_embeddings(model, False)


def tie_embeddings(model: Any, tied: bool) -> None:
    """Set tie_word_embeddings in a model's configuration and in its text configuration."""
    for config in (model.config, model.config.get_text_config()):
        if getattr(config, "tie_word_embeddings", tied) != tied:
            config.tie_word_embeddings = tied
