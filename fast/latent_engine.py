"""The fused engine with a latent key-value cache (see kv_cache.py): R numbers a token and projection instead of d_kv.

What the first stage of k_proj and v_proj makes of a token is kept. Of the keys a block of tokens at a time is expanded,
by one product with h * U_sign in float16, into a scratch that stays in the second-level cache, from which a kernel
rotates them and multiplies them with the query. The values' latents are summed with their weights first, and the sum is
expanded once. All of the capacity is computed and what lies behind the position masked, so the cache grows by BLOCK
tokens instead of by its size.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from .decode_cpu import NotDecodableError
from .fused_engine import Block, FusedEngine, Model
from .kernels.steps import Spans, kept_width, split_heads, stored_latents
from .kv_cache import Latents, expansion, latent_attention, latents, round_latents
from .latent_cache import LATENT_TYPES
from .layers import PackedLinear

BLOCK = 2048  # tokens whose keys are expanded at once, and that the cache grows by


class LatentEngine(FusedEngine):
    """A model, and latents for a batch of sequences.

    Parameters
    ----------
    model, batch, capacity, device, dtype, kernels
        See FusedEngine.
    kind : str
        "latent" (float16) or "latent-int8".

    Raises
    ------
    NotDecodableError
        If a k_proj or v_proj is not packed, or keys have biases or norms between the latent and the rotation.
    """

    def __init__(
        self,
        model: Model,
        batch: int,
        capacity: int,
        device: torch.device,
        dtype: torch.dtype,
        kernels: bool | None = None,
        kind: str = "latent",
    ):
        for block in model.blocks:
            check_block(block)
        self.type = LATENT_TYPES[kind]
        super().__init__(model, batch, capacity, device, dtype, kernels)
        self.expansions = [[self.expansion_of(each) for each in block.qkv[1:]] for block in model.blocks]

    def expansion_of(self, layer: Any) -> Tensor:
        """The matrix h * U_sign that expands a layer's latents as they are kept, (d_out, kept width)."""
        return stored_latents(expansion(layer.factors()), layer.ranks).to(self.dtype)

    def make_cache(self, capacity: int) -> None:
        """Codes of keys and values, (batch, capacity, kept width), and their scales, of each layer."""
        self.codes, self.scales = [], []
        for block in self.model.blocks:
            widths = [kept_width(each.ranks) for each in block.qkv[1:]]  # type: ignore[arg-type]
            shapes = [(self.batch, capacity, width) for width in widths]
            self.codes.append([torch.zeros(shape, dtype=self.type, device=self.device) for shape in shapes])
            self.scales.append([torch.ones(shape[:2], device=self.device) for shape in shapes])

    @property
    def token_bytes(self) -> int:
        """Bytes that are kept of a token."""
        tensors = [tensor for pair in (*self.codes, *self.scales) for tensor in pair]
        return sum(tensor.nbytes for tensor in tensors) // (self.batch * self.capacity)

    @property
    def larger(self) -> int:
        """The capacity to grow to."""
        return (self.capacity // BLOCK + 1) * BLOCK

    def attend(self, at: int, projected: Tensor) -> Tensor:
        """Attention of one new token of each sequence in layer `at`: (batch, heads * size)."""
        steps, (keys, values), (key_scale, value_scale) = self.steps, self.codes[at], self.scales[at]
        part, spans = self.groups[at][0].latents()  # type: ignore[union-attr]
        for span, codes, scale in zip(spans[1:], self.codes[at], self.scales[at], strict=True):
            steps.keep(part, span, codes, scale, self.positions)
        expand_keys, expand_values = self.expansions[at]
        scores = torch.empty(self.batch, self.heads.heads, self.capacity, device=self.device)
        for start in range(0, self.capacity, BLOCK):
            expanded = keys[:, start : start + BLOCK].to(self.dtype) @ expand_keys.T
            steps.scores(projected, expanded, key_scale, self.angles, self.positions, scores, start)
        weights = (scores.softmax(-1) * value_scale[:, None]).to(self.dtype)
        mean = (weights @ values.to(self.dtype)).unflatten(1, (self.heads.kv_heads, -1))  # (batch, kv, group, width)
        mixed = (mean @ expand_values.unflatten(0, (self.heads.kv_heads, -1)).mT).flatten(1, 2)
        bias: Any = self.model.blocks[at].qkv[2].bias
        if bias is not None:
            mixed = mixed + bias.unflatten(0, (self.heads.kv_heads, -1)).repeat_interleave(self.heads.group, 0)
        return mixed.flatten(1).to(projected.dtype)

    def attend_block(self, at: int, x: Tensor, projected: Tensor, start: int) -> Tensor:
        """Attention of a block of new tokens in layer `at`, whose latents are kept: (batch, tokens, heads * size)."""
        end, layers = start + projected.shape[1], self.model.blocks[at].qkv[1:]
        kept = []
        for layer, codes, scale in zip(layers, self.codes[at], self.scales[at], strict=True):
            new = round_latents(stored_latents(latents(x, layer.factors()), layer.ranks), self.type)  # type: ignore[arg-type, operator]
            codes[:, start:end], scale[:, start:end] = new.codes, new.scale[..., 0]
            kept.append(Latents(codes[:, :end, stored_columns(layer.ranks)], scale[:, :end, None]))  # type: ignore[arg-type]
        cosine, sine = self.angles[:, :end]
        turned = self.angles[:, start:end, None]
        query, _, _ = split_heads(projected, self.heads, None, self.model.sizes.eps, *turned)
        mixed = latent_attention(
            query.transpose(1, 2),
            *kept,
            *(layer.factors() for layer in layers),  # type: ignore[operator]
            cosine,
            sine,
            torch.ones(1, end - start, end, dtype=torch.bool, device=self.device).tril(start),
            value_bias=layers[1].bias,  # type: ignore[arg-type]
        )
        return mixed.transpose(1, 2).flatten(2).to(projected.dtype)

    def grow_cache(self, capacity: int) -> None:
        """Make room for more tokens' latents."""
        more = capacity - self.capacity
        self.codes = [[functional.pad(each, (0, 0, 0, more)) for each in pair] for pair in self.codes]
        self.scales = [[functional.pad(each, (0, more), value=1.0) for each in pair] for pair in self.scales]


def check_block(block: Block) -> None:
    """Raise NotDecodableError unless a block's keys and values can be kept as latents."""
    _, key, value = block.qkv if len(block.qkv) == 3 else (None, None, None)
    if not isinstance(key, PackedLinear) or not isinstance(value, PackedLinear):
        raise NotDecodableError("a latent cache needs k_proj and v_proj as packed layers of their own")
    if key.bias is not None or block.head_norms is not None:
        raise NotDecodableError("its keys get a bias or a norm before they are rotated, which latents are not made for")


def stored_columns(ranks: Sequence[int]) -> list[int]:
    """Which of a token's kept latents are some: each path is filled up."""
    begins = Spans.at(0, ranks).begins
    return [begin + at for begin, rank in zip(begins, ranks, strict=True) for at in range(rank)]
