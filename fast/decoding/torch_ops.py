"""Run `DecoderOps` in torch: on CPUs, in the prefill of a prompt, and as the reference of the CUDA kernels."""

# ruff: noqa: D102 (`DecoderOps` documents the methods)

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..kv_cache import Latents, apply_rope, latent_attention, round_latents
from ..models.layers import PackedLinear
from .ops import DecoderOps, HeadNorms, Heads, ResidualStream, Spans, unpad_latents


class TorchOps(DecoderOps):
    """Implement `DecoderOps` in torch, on any device.

    Parameters
    ----------
    heads, dtype, eps
        See `DecoderOps`.
    """

    def __init__(self, heads: Heads, dtype: torch.dtype, eps: float):
        self.heads, self.dtype, self.eps = heads, dtype, eps

    def embed(self, tokens: Tensor, embedding: nn.Module) -> ResidualStream:
        x = embedding(tokens).float()
        return ResidualStream(x, sum_of_squares(x))

    def add(self, y: Tensor, stream: ResidualStream) -> None:
        stream.x = stream.x + y
        stream.squares = sum_of_squares(stream.x)

    def rms_norm(self, stream: ResidualStream, weight: Tensor) -> Tensor:
        mean = stream.squares.sum(-1, keepdim=True) / stream.x.shape[-1]
        return (stream.x * torch.rsqrt(mean + self.eps) * weight).to(self.dtype)

    def swiglu(self, x: Tensor) -> Tensor:
        gate, up = x.float().chunk(2, -1)
        return (functional.silu(gate) * up).to(x.dtype)

    def logits(self, x: Tensor, head: nn.Module) -> Tensor:
        return head(x)

    def attend(
        self,
        projected: Tensor,
        keys: Tensor,
        values: Tensor,
        positions: Tensor,
        angles: Tensor,
        norms: HeadNorms | None,
        combine: bool = True,
    ) -> Tensor:
        rows = torch.arange(len(projected), device=projected.device)
        query, key, value = split_heads(projected, self.heads, norms, self.eps, *angles[:, positions, None])
        keys[rows, :, positions], values[rows, :, positions] = key.to(keys.dtype), value.to(values.dtype)
        seen = torch.arange(keys.shape[2], device=keys.device) <= positions[:, None]
        mixed = functional.scaled_dot_product_attention(
            query[:, :, None].to(keys.dtype), keys, values, attn_mask=seen[:, None, None], enable_gqa=True
        )
        return mixed.flatten(1).to(projected.dtype)

    def up_projections(self, pair: Sequence[PackedLinear]) -> Sequence[PackedLinear]:
        return pair

    def attend_latents(
        self,
        projected: Tensor,
        part: Tensor,
        spans: Sequence[Spans],
        cache: Sequence[Latents],
        up: Sequence[PackedLinear],
        positions: Tensor,
        angles: Tensor,
        combine: bool = True,
    ) -> Tensor:
        heads, rows = self.heads, torch.arange(len(projected), device=projected.device)
        for layer_spans, (codes, scale) in zip(spans, cache, strict=True):
            paths = [part[..., at : at + count] for at, count in zip(*layer_spans, strict=True)]
            new = round_latents(torch.cat(paths, -1).sum(0), codes.dtype)
            codes[rows, positions], scale[rows, positions] = new
        query, _, _ = split_heads(projected, heads, None, self.eps, *angles[:, positions, None])
        (key, value), capacity = up, cache[0].codes.shape[1]
        keys, values = (unpad_latents(each, layer.ranks) for each, layer in zip(cache, up, strict=True))
        seen = torch.arange(capacity, device=projected.device) <= positions[:, None]
        factors, (cosine, sine) = (key.factors(), value.factors()), angles[:, :capacity]
        query = query[:, :, None]
        mixed = latent_attention(query, keys, values, *factors, cosine, sine, seen[:, None], value_bias=value.bias)
        return mixed.flatten(1).to(projected.dtype)


def sum_of_squares(x: Tensor) -> Tensor:
    """Sum the squares of each row, (..., n) to (..., 1)."""
    return x.square().sum(-1, keepdim=True)


def split_heads(
    projected: Tensor, heads: Heads, norms: HeadNorms | None, eps: float, cosine: Tensor, sine: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Split a projection into query, key and value, with QK-norm and RoPE applied.

    Parameters
    ----------
    projected : (..., (heads + 2 kv_heads) * size) tensor
    heads, norms, eps
        See `DecoderOps`.
    cosine, sine : (..., 1, size / 2) float32 tensor

    Returns
    -------
    query, key, value : (..., heads or kv_heads, size) float32 tensor
    """
    parts = projected.float().unflatten(-1, (-1, heads.size))
    query, key, value = parts.split([heads.heads, heads.kv_heads, heads.kv_heads], -2)
    if norms:
        query, key = (rms_normalize(x, weight, eps) for x, weight in zip((query, key), norms, strict=True))
    return apply_rope(query, cosine, sine), apply_rope(key, cosine, sine), value


def rms_normalize(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Divide each row by its root mean square and multiply by a weight, in float32."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight
