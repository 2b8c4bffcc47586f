"""Keep latents instead of keys and values: the latent key-value cache (LittleBit, arXiv 2506.13771).

DeepSeek calls such a cache multi-head latent attention (MLA, arXiv 2405.04434), with V as down-projection and U as
up-projection. A model factorized by LittleBit has it without further training, because k_proj and v_proj compute the
latents t = ell * (V_sign^T (g * x)) anyway, and keys and values are linear in them:

    k = h * (U_sign t) + bias,

summed over paths. A token is kept as its t: R numbers for a total rank R, instead of d_kv.

Keys must be up-projected and rotated at every read, because the rotary embedding (RoPE) lies between U_sign and the
product with the query; this goes through a block of tokens at a time. Values need it once: attention is a weighted
mean, so the up-projection is applied to the mean of the latents (MLA calls this absorbing the matrix),

    sum_s p_s v_s = h * (U_sign (sum_s p_s t_s)) + bias,    as sum_s p_s = 1.

Values are cheap, not free: each head averages R_v latents of every token, a full cache only the head's own numbers.

A step thus reads R_k + R_v numbers per past token instead of 2 d_kv. It spends d_kv * R_k multiply-adds on the token's
key and heads * R_v on its value. decoding/latent_cache_hf.py is the cache that transformers uses.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .kernels.unpacked import signs
from .packing import PackedFactors

BLOCK = 256  # tokens whose keys are up-projected at once, at most
SCORES = 1 << 22  # scores in memory at once, at most, but for a block of one token
LARGEST_CODE = {torch.float16: 1.0, torch.int8: 127.0}  # dtype -> code of a token's largest latent


class Latents(NamedTuple):
    """Hold the latents of tokens as a cache stores them: t = codes * scale.

    Attributes
    ----------
    codes : (..., tokens, R) float32, float16 or int8
    scale : (..., tokens, 1) float32
    """

    codes: Tensor
    scale: Tensor

    def values(self) -> Tensor:
        """Return the latents in float32, codes * scale."""
        return self.codes.float() * self.scale

    def tokens(self, part: slice) -> "Latents":
        """Select the latents of some of the tokens."""
        return Latents(self.codes[..., part, :], self.scale[..., part, :])


def latents(x: Tensor, paths: Sequence[PackedFactors]) -> Tensor:
    """Compute the latents of a layer's input, its down-projection by V, all paths side by side.

    t = ell * (V_sign^T (g * x))

    Parameters
    ----------
    x : (..., d_in) float tensor
    paths : sequence of PackedFactors

    Returns
    -------
    (..., R) float32 tensor, R the sum of the ranks.
    """
    x = x.float()
    return torch.cat([(x * path.g) @ signs(path.v_words, x.shape[-1]).mT * path.ell for path in paths], dim=-1)


def up_projection(paths: Sequence[PackedFactors]) -> Tensor:
    """Build the up-projection matrix of a layer: [h * U_sign] of all paths side by side.

    Keys or values are latents @ up_projection(paths).T + bias.

    Parameters
    ----------
    paths : sequence of PackedFactors

    Returns
    -------
    (d_out, R) float32 tensor, R the sum of the ranks.
    """
    return torch.cat([path.h[:, None] * signs(path.u_words, path.rank) for path in paths], dim=-1)


def round_latents(latent: Tensor, dtype: torch.dtype) -> Latents:
    """Round latents to the dtype in which a cache stores them, with one scale for each token.

    The largest magnitude of a token becomes 1 in float16, which then cannot overflow, and 127 in int8, which then uses
    its whole range. float32 latents stay as they are. The error of an entry t is at most scale (|t / scale| 2^-11 +
    2^-25) in float16 and scale / 2 in int8, apart from float32's rounding.

    Parameters
    ----------
    latent : (..., R) float tensor
    dtype : dtype
        float32, float16 or int8.

    Raises
    ------
    ValueError
        If it is another dtype.

    Examples
    --------
    >>> round_latents(torch.tensor([[0.5, -2.0]]), torch.int8).codes
    tensor([[  32, -127]], dtype=torch.int8)
    """
    latent = latent.float()
    if dtype == torch.float32:
        return Latents(latent, torch.ones_like(latent[..., :1]))
    if dtype not in LARGEST_CODE:
        raise ValueError(f"latents must be stored as float32, float16 or int8, not {dtype}")
    scale = latent.abs().amax(dim=-1, keepdim=True) / LARGEST_CODE[dtype]
    scale = torch.where(scale == 0, 1, scale)
    codes = latent / scale
    return Latents((codes.round() if dtype == torch.int8 else codes).to(dtype), scale)


def apply_rope(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Apply the rotary position embedding (RoPE) to vectors (Su et al., arXiv 2104.09864).

    Entries i and i + size / 2 of a vector are a pair, turned by the i-th angle of the token's position: the layout of
    Llama in transformers.

    Parameters
    ----------
    x : (..., size) float tensor
    cosine, sine : (..., size / 2) float tensor
        Of the angles.

    Returns
    -------
    (..., size) tensor.
    """
    turned = torch.empty_like(x)
    (low, high), (into_low, into_high) = x.chunk(2, dim=-1), turned.chunk(2, dim=-1)
    torch.mul(low, cosine, out=into_low).addcmul_(high, sine, value=-1)  # in place, in half the time of torch.cat
    torch.mul(high, cosine, out=into_high).addcmul_(low, sine)
    return turned


def latent_attention(
    query: Tensor,
    keys: Latents,
    values: Latents,
    key_paths: Sequence[PackedFactors],
    value_paths: Sequence[PackedFactors],
    cosine: Tensor,
    sine: Tensor,
    mask: Tensor,
    key_bias: Tensor | None = None,
    value_bias: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Compute attention over a latent cache: up-project and rotate each key, up-project the mean of the values.

    o = h_v * (U_v (sum_s p_s t_s)) + b_v,  p = softmax(scale * q^T RoPE(h_k * (U_k t_s) + b_k))

    Up-projecting keys takes d_out * R_k multiply-adds a token, which queries share. Averaging latents takes heads * R_v
    a token and query, where a full cache takes heads * size. Up-projecting the mean takes heads * size * R_v a query.

    Softmax is computed online (Milakov and Gimelshein, arXiv 1805.02867), as in FlashAttention: tokens are taken in
    blocks, and earlier sums are scaled down whenever a larger score appears. So keys and scores are in memory for one
    block alone.

    Parameters
    ----------
    query : (..., heads, queries, size) float tensor
        With RoPE applied.
    keys, values : Latents
        Of all tokens, (..., tokens, R).
    key_paths, value_paths : sequence of PackedFactors
        Of k_proj and v_proj. Their d_out is size times the number of key heads, which divides the number of heads.
    cosine, sine : (..., tokens, size / 2) float tensor
        Of each token's position.
    mask : (..., queries, tokens) bool tensor
        Whether a query may see a token. A query that may see no token gets the mean of all.
    key_bias, value_bias : (d_out) float tensor, optional
    scale : float, optional
        By default 1 / sqrt(size).

    Returns
    -------
    (..., heads, queries, size) float32 tensor.
    """
    *batch, heads, queries, size = query.shape
    tokens = keys.codes.shape[-2]
    b = up_projection(key_paths)  # (d_out, R_k)
    kv_heads = b.shape[0] // size
    asked = query.float().unflatten(-3, (kv_heads, -1)).flatten(-3, -2)  # (..., kv_heads, group * queries, size)
    asked = asked * (1 / math.sqrt(size) if scale is None else scale)
    lowest = torch.finfo(torch.float32).min
    largest = torch.full((*batch, heads, queries, 1), lowest, device=query.device)
    total = torch.zeros_like(largest)
    mean = torch.zeros(*batch, heads, queries, values.codes.shape[-1], device=query.device)
    step = max(1, min(BLOCK, SCORES // max(1, largest.numel())))
    for start in range(0, tokens, step):
        part = slice(start, min(start + step, tokens))
        expanded = keys.tokens(part).values() @ b.mT  # (..., block, d_out)
        if key_bias is not None:
            expanded += key_bias
        expanded = expanded.unflatten(-1, (kv_heads, size))  # (..., block, kv_heads, size)
        expanded = apply_rope(expanded, cosine[..., part, None, :], sine[..., part, None, :]).transpose(-3, -2)
        scores = (asked @ expanded.mT).unflatten(-2, (-1, queries)).flatten(-4, -3)  # (..., heads, queries, block)
        scores = scores.masked_fill(~mask[..., None, :, part], lowest)
        before, largest = largest, torch.maximum(largest, scores.amax(dim=-1, keepdim=True))
        weights, shrink = (scores - largest).exp_(), (before - largest).exp_()
        total = total * shrink + weights.sum(dim=-1, keepdim=True)
        seen = weights.flatten(-3, -2) @ values.tokens(part).values()  # (..., heads * queries, R_v)
        mean = mean * shrink + seen.unflatten(-2, (heads, queries))
    mean = (mean / total).unflatten(-3, (kv_heads, -1)).flatten(-3, -2)  # (..., kv_heads, group * queries, R_v)
    output = mean @ up_projection(value_paths).unflatten(0, (kv_heads, size)).mT
    if value_bias is not None:
        output = output + value_bias.unflatten(0, (kv_heads, 1, size))
    return output.unflatten(-2, (-1, queries)).flatten(-4, -3)
