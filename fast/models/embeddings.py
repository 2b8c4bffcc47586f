"""Embeddings and output heads of 8 or 4 bits an entry, with float16 scales for each group of a row.

They are what a sub-1-bit model's file is made of (83 % of Llama-2-7B at 0.1 bits) and, on a CPU, most of a token's
time. Entry j of a row is scale[j // group] * code[j], code an integer of -127 to 127, or, with 4 bits,
offset[j // group] + scale[j // group] * code[j], code an integer of 0 to 15: 5 bits in all with groups of 32.

Rounded to the nearest, 4 bits cost SmolLM2-135M 8 % of perplexity, nearly all of it in the head, because more than half
of the energy of its input lies in one direction. So each column's rounding error is made up for by the columns after
it, as in GPTQ (Frantar et al., arXiv 2210.17323), given the second moments of the head's input; then each row's scales
and offsets are those that least squares finds for its codes. Half of the moments are measured on a text, half on random
tokens: a short text leaves much unseen that others hold.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from .._checks import flat_tokens, window_for
from .wrappers import to_change

GROUPS = {8: 64, 4: 32}  # entries that share a scale, at most
LEVELS = 15  # largest code of 4 bits
DAMPING = 0.03  # of the mean diagonal of the second moments, added to it
CALIBRATION_WINDOW = 512  # tokens of a calibration text that are read at once
RANDOM_TOKENS = 8192  # that are read beside a calibration text
ROWS = 4096  # rows of a head that are dequantised at once
RIDGE = 1e-9  # of the mean diagonal of a refit's equations, added to it
REFIT_NUMBERS = 1 << 24  # float32 that a refit may need at once
STEPS = 20  # scales that are tried for each group


class Table(nn.Module):
    """Rows of integers with scales: what an embedding and a tied head share.

    Parameters
    ----------
    bits : int
        8 or 4.
    codes : (rows, size) int8 tensor, or (rows, size / 2) uint8 for 4 bits
        With 4 bits each 32 entries are 16 bytes: byte k holds code k in its low half, code k + 16 in its other.
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
    def empty(cls, bits: int, rows: int, size: int, group: int) -> "Table":
        """A table of tensors without memory, to be filled from a checkpoint."""
        codes = torch.empty(rows, size * bits // 8, dtype=torch.int8 if bits == 8 else torch.uint8, device="meta")
        scale = torch.empty(rows, size // group, dtype=torch.float16, device="meta")
        return cls(bits, codes, scale, torch.empty_like(scale) if bits == 4 else None)

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
            codes = torch.stack([pairs & 15, pairs >> 4], -2).flatten(-3)
        entries = codes.float().unflatten(-1, (scale.shape[-1], -1)) * scale[..., None]
        if self.offset is not None:
            entries += self.offset[index].float()[..., None]
        return entries.flatten(-2)


class WithoutWeight(nn.Module):
    """A module that has rows of integers where others have a weight."""

    def __getattr__(self, name: str) -> Any:
        """Find a parameter, buffer or submodule, as in any module.

        Raises
        ------
        AttributeError
            If there is none; for `weight`, the message says what to do without.
        """
        if name == "weight":
            raise AttributeError(no_weight(self))
        return super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute, but for `weight`.

        Raises
        ------
        AttributeError
            If it is `weight`.
        """
        if name == "weight":
            raise AttributeError(no_weight(self))
        super().__setattr__(name, value)


def no_weight(module: nn.Module) -> str:
    """Say why a quantised embedding or head has no weight, and what to do."""
    return (
        f"a {type(module).__name__} has no weight to read, resize, tie or train: its rows are integers with scales "
        "(table.rows(slice(None)) makes floats of them); do that to the 16-bit model before quantize_embeddings_, or "
        "keep embeddings in 16 bits"
    )


class QuantizedEmbedding(WithoutWeight):
    """An embedding whose rows are a Table's; its output has the given dtype."""

    def __init__(self, table: Table, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.table, self.dtype = table, dtype

    @property
    def num_embeddings(self) -> int:
        """Rows, under the name that they have in torch.nn.Embedding."""
        return len(self.table.codes)

    @property
    def embedding_dim(self) -> int:
        """Entries of a row, under the name that they have in torch.nn.Embedding."""
        return self.table.size

    def forward(self, tokens: Tensor) -> Tensor:
        """(...) integers to (..., size)."""
        return self.table.rows(tokens).to(self.dtype)


class QuantizedHead(WithoutWeight):
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


def quantize_table(weight: Tensor, bits: int, moments: Tensor | None = None) -> Table:
    """A weight rounded to 8 or 4 bits an entry.

    8 bits round to the nearest. 4 bits choose each group's scale and offset for the smallest squared error, and with
    `moments` make up for the errors in what the weight is multiplied with.

    Parameters
    ----------
    weight : (rows, size) float tensor, size a multiple of 32
    bits : int
        8 or 4.
    moments : (size, size) float tensor, optional
        Mean of x x^T over the inputs x of a layer whose weight this is.

    Raises
    ------
    ValueError
        If the size is no multiple of 32, or the bits are neither 8 nor 4.
    """
    if bits not in GROUPS:
        raise ValueError(f"embeddings are kept in 16, 8 or 4 bits, not {bits}")
    if weight.shape[1] % 32:
        raise ValueError(f"embeddings of 8 or 4 bits need a size that is a multiple of 32, not {weight.shape[1]}")
    parts = weight.detach().float().split(ROWS)
    if bits == 8:
        group = next(each for each in (GROUPS[bits], 32) if weight.shape[1] % each == 0)
        codes, scale = (torch.cat(each) for each in zip(*(in_8_bits(rows, group) for rows in parts), strict=True))
        return Table(bits, codes, scale)
    if moments is None:
        found = [in_4_bits(rows, GROUPS[bits]) for rows in parts]
    else:
        moments = damped(moments)
        feedback = feedback_factors(moments)
        found = [refitted(rows, in_4_bits(rows, GROUPS[bits], feedback)[0], GROUPS[bits], moments) for rows in parts]
    codes, scale, offset = (torch.cat(each) for each in zip(*found, strict=True))
    pairs = codes.unflatten(-1, (-1, 2, 16))
    return Table(bits, (pairs[..., 0, :] | pairs[..., 1, :] << 4).flatten(-2), scale, offset)


def in_8_bits(rows: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """Codes (rows, size) int8 and scales (rows, groups) float16."""
    groups = rows.unflatten(-1, (-1, group))
    scale = (groups.abs().amax(-1, keepdim=True) / 127).half()
    codes = (groups / torch.where(scale == 0, 1, scale.float())).round().clamp(-127, 127)
    return codes.flatten(-2).to(torch.int8), scale[..., 0]


def in_4_bits(rows: Tensor, group: int, feedback: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Codes (rows, size) uint8, scales and offsets (rows, groups) float16, one column after the other."""
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
            code = ((columns[:, j : j + 1] - offset) / divisor).round().clamp(0, LEVELS)
            codes[:, at] = code[:, 0].to(torch.uint8)
            if feedback is not None:
                errors[:, j] = (columns[:, j] - (offset + scale * code)[:, 0]) / feedback[at, at]
                columns[:, j + 1 :] -= errors[:, j : j + 1] * feedback[at, at + 1 : first + group]
        if feedback is not None:
            rest[:, first + group :] -= errors @ feedback[first : first + group, first + group :]
    return codes, torch.cat(scales, -1), torch.cat(offsets, -1)


def fitted_range(groups: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and offset (rows, 1) float16 of groups (rows, group), each for the smallest squared error of 0 to 15."""
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    best_error = torch.full_like(low, torch.inf)
    best_scale, best_offset = low.half(), low.half()
    for step in range(STEPS):
        reach = (high - low) * (1 - 0.02 * step)
        scale, offset = (reach / LEVELS).half(), ((low + high - reach) / 2).half()
        codes = ((groups - offset) / torch.where(scale == 0, 1, scale.float())).round().clamp(0, LEVELS)
        error = (codes * scale.float() + offset - groups).square().sum(-1, keepdim=True)
        better = error < best_error
        best_scale, best_offset = torch.where(better, scale, best_scale), torch.where(better, offset, best_offset)
        best_error = torch.minimum(error, best_error)
    return best_scale, best_offset


def damped(moments: Tensor) -> Tensor:
    """Second moments with DAMPING times their mean on the diagonal."""
    return moments + DAMPING * moments.diagonal().mean() * torch.eye(len(moments)).to(moments)


def feedback_factors(moments: Tensor) -> Tensor:
    """Upper triangular U, (size, size) float32, with U^T U the inverse of the second moments.

    An error e of column j is made up for by taking e / U_jj * U_jk from every later column k (GPTQ, section 3).
    """
    return torch.linalg.cholesky(torch.linalg.inv(moments.double()), upper=True).float()


def refitted(rows: Tensor, codes: Tensor, group: int, moments: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Codes as they are, with the scales and offsets of the smallest error d M d^T, for the error d of each row.

    With D the matrix that takes a row's scales and offsets p to its entries, D^T M D p = D^T M w.
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
        diagonal += RIDGE * diagonal.mean(-1, keepdim=True)  # for groups of equal codes, whose scale is any
        found.append(torch.linalg.solve(system, wanted).half())
    scale, offset = torch.cat(found).split(groups, -1)
    return codes, scale, offset


def head_moments(model: Any, tokens: Tensor) -> Tensor:
    """Mean of x x^T over the inputs x of a model's head, (size, size) float32, on a text's tokens (n,)."""
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
    """RANDOM_TOKENS tokens of a vocabulary of `count`, each as likely, always the same, (RANDOM_TOKENS,) int64."""
    return torch.randint(count, (RANDOM_TOKENS,), generator=torch.Generator().manual_seed(0))


def check_embeddings(model: Any, bits: int) -> None:
    """Raise ValueError unless a model's embedding and head can be kept in so many bits."""
    if bits == 16:
        return
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if isinstance(embedding, QuantizedEmbedding):
        raise ValueError(f"this model's embedding is quantised already, to {embedding.table.bits} bits")
    if type(embedding) is not nn.Embedding:
        raise ValueError(
            f"this model's {type(embedding).__name__} does more than look rows up, and must be kept in 16 bits"
        )
    if type(head) is not nn.Linear or head.bias is not None:
        kind = "has no output head" if head is None else f"has a {type(head).__name__} with more than a weight as head"
        raise ValueError(f"this model {kind}; its embedding and head must be kept in 16 bits")
    quantize_table(embedding.weight[:1], bits)


def quantize_embeddings_(model: Any, bits: int, tokens: Tensor | None = None) -> None:
    """Replace a model's input embedding and output head by quantised ones, in place; tied ones share their table.

    Parameters
    ----------
    model : transformers causal language model
    bits : int
        8 or 4; 16 leaves the model as it is.
    tokens : (n,) integer tensor, optional
        A text to measure the head's input on, besides random tokens, which makes 4 bits several times better; 8 bits
        need none.

    Raises
    ------
    ValueError
        If the bits are none of these, a size is no multiple of 32, embedding or head do more than an ordinary one, or
        the model has adapters of PEFT.
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


def replace_embeddings(model: Any, table: Table, head: Table, dtype: torch.dtype) -> None:
    """Put tables where a model has its embedding and, if it has one, its head."""
    model.set_input_embeddings(QuantizedEmbedding(table, dtype))
    if model.get_output_embeddings() is not None:
        model.set_output_embeddings(QuantizedHead(head, tied=head is table))
    model._tied_weights_keys = model.all_tied_weights_keys = {}  # else transformers looks for weights to tie


def settle_ties(model: Any) -> None:
    """Make a model and its configuration agree on whether its head is its embedding.

    transformers loads a head of its own even where the configuration ties it, but whoever ties the weights again, by
    the configuration, would lose it. A head that equals the embedding is tied: its first releases load it twice.
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
    """Let a model's configuration, and its part for text, say whether the head is the embedding."""
    for config in (model.config, model.config.get_text_config()):
        if getattr(config, "tie_word_embeddings", tied) != tied:
            config.tie_word_embeddings = tied
