"""Keep latents instead of keys and values: the latent key-value cache (LittleBit, arXiv 2506.13771).

DeepSeek calls such a cache multi-head latent attention (MLA, arXiv 2405.04434), with V as down-projection and U as
up-projection. A model factorized by LittleBit has it without further training, because k_proj and v_proj compute the
latents t = ell * (V_sign^T (g * x)) anyway, and keys and values are linear in them:

    k = h * (U_sign t) + bias,

summed over paths. A token is kept as its t: R numbers for a total rank R, instead of d_kv.

Keys must be up-projected and rotated at every read, because the rotary embedding (RoPE) lies between U_sign and the
product with the query. Values need it once: attention is a weighted mean, so the up-projection is applied to the mean
of the latents (MLA calls this absorbing the matrix),

    sum_s p_s v_s = h * (U_sign (sum_s p_s t_s)) + bias,    as sum_s p_s = 1.

Values are cheap, not free: each head averages R_v latents of every token, a full cache only the head's own numbers.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import DTypeLike, NDArray

from .arrays import Array
from .packing import PackedFactors, unpack_factors

LARGEST_CODE = {"float16": 1.0, "int8": 127.0}  # dtype -> code of a token's largest latent


class Latents(NamedTuple):
    """Hold the latents of tokens as a cache stores them: t = codes * scale.

    Attributes
    ----------
    codes : (..., tokens, R) float32, float16 or int8
    scale : (..., tokens, 1) float32
    """

    codes: Array
    scale: Array

    def values(self) -> Array:
        """Return the latents in float32, codes * scale."""
        return self.codes.astype(np.float32) * self.scale


def latents(x: Array, paths: Sequence[PackedFactors]) -> Array:
    """Compute the latents of a layer's input, its down-projection by V, all paths side by side.

    t = ell * (V_sign^T (g * x))

    Parameters
    ----------
    x : (..., d_in) float array
    paths : sequence of PackedFactors

    Returns
    -------
    (..., R) float32 array, R the sum of the ranks.
    """
    parts = []
    for path in map(unpack_factors, paths):
        parts.append((x.astype(np.float32) * path.g) @ path.v * path.ell)
    return np.concatenate(parts, axis=-1)


def up_projection(paths: Sequence[PackedFactors]) -> Array:
    """Build the up-projection matrix of a layer: [h * U_sign] of all paths side by side.

    Keys or values are latents @ up_projection(paths).T + bias.

    Parameters
    ----------
    paths : sequence of PackedFactors

    Returns
    -------
    (d_out, R) float32 array, R the sum of the ranks.
    """
    return np.concatenate([path.h[:, None] * path.u for path in map(unpack_factors, paths)], axis=-1)


def round_latents(latent: Array, dtype: DTypeLike) -> Latents:
    """Round latents to the dtype in which a cache stores them, with one scale for each token.

    The largest magnitude of a token becomes 1 in float16, which then cannot overflow, and 127 in int8, which then uses
    its whole range. float32 latents stay as they are. The error of an entry t is at most scale (|t / scale| 2^-11 +
    2^-25) in float16 and scale / 2 in int8, apart from float32's rounding.

    Parameters
    ----------
    latent : (..., R) float array
    dtype : dtype
        float32, float16 or int8.

    Raises
    ------
    ValueError
        If it is another dtype.

    Examples
    --------
    >>> round_latents(np.array([[0.5, -2.0]], np.float32), np.int8).codes
    array([[  32, -127]], dtype=int8)
    """
    latent, name = latent.astype(np.float32), np.dtype(dtype).name
    if name == "float32":
        return Latents(latent, np.ones((*latent.shape[:-1], 1), np.float32))
    if name not in LARGEST_CODE:
        raise ValueError(f"latents must be stored as float32, float16 or int8, not {name}")
    scale = np.abs(latent).max(axis=-1, keepdims=True) / np.float32(LARGEST_CODE[name])
    scale = np.where(scale == 0, np.float32(1), scale)
    codes = latent / scale
    return Latents((np.rint(codes) if name == "int8" else codes).astype(dtype), scale)


def apply_rope(x: Array, cosine: Array, sine: Array) -> Array:
    """Apply the rotary position embedding (RoPE) to vectors (Su et al., arXiv 2104.09864).

    Entries i and i + size / 2 of a vector are a pair, turned by the i-th angle of the token's position: the layout of
    Llama in transformers.

    Parameters
    ----------
    x : (..., size) float array
    cosine, sine : (..., size / 2) float array
        Of the angles.

    Returns
    -------
    (..., size) array.
    """
    low, high = np.split(x, 2, axis=-1)
    return np.concatenate([low * cosine - high * sine, high * cosine + low * sine], axis=-1)


def latent_attention(
    query: Array,
    keys: Latents,
    values: Latents,
    key_paths: Sequence[PackedFactors],
    value_paths: Sequence[PackedFactors],
    cosine: Array,
    sine: Array,
    mask: NDArray[np.bool_],
    key_bias: Array | None = None,
    value_bias: Array | None = None,
    scale: float | None = None,
) -> Array:
    """Compute attention over a latent cache: up-project and rotate each key, up-project the mean of the values.

    o = h_v * (U_v (sum_s p_s t_s)) + b_v,  p = softmax(scale * q^T RoPE(h_k * (U_k t_s) + b_k))

    Up-projecting keys takes d_out * R_k multiply-adds a token, which queries share. Averaging latents takes heads * R_v
    a token and query, where a full cache takes heads * size. Up-projecting the mean takes heads * size * R_v a query.

    Parameters
    ----------
    query : (heads, queries, size) float array
        With RoPE applied.
    keys, values : Latents
        Of all tokens, (tokens, R).
    key_paths, value_paths : sequence of PackedFactors
        Of k_proj and v_proj. Their d_out is size times the number of key heads, which divides the number of heads.
    cosine, sine : (tokens, size / 2) float array
        Of each token's position.
    mask : (queries, tokens) bool array
        Whether a query may see a token. A query that may see no token gets the mean of all.
    key_bias, value_bias : (d_out) float array, optional
    scale : float, optional
        By default 1 / sqrt(size).

    Returns
    -------
    (heads, queries, size) float32 array.
    """
    heads, _, size = query.shape
    scale = 1 / math.sqrt(size) if scale is None else scale
    expanded = keys.values() @ up_projection(key_paths).T + (0 if key_bias is None else key_bias)  # (tokens, d_out)
    value_rows = np.split(up_projection(value_paths), expanded.shape[-1] // size)  # (size, R_v) for each key head
    biases = np.zeros(expanded.shape[-1], np.float32) if value_bias is None else value_bias
    output = []
    for head in range(heads):
        at = head // (heads // len(value_rows))  # each group of query heads shares a key head (GQA)
        mine = slice(at * size, (at + 1) * size)
        scores = scale * query[head] @ apply_rope(expanded[:, mine], cosine, sine).T
        scores = np.where(mask, scores, np.finfo(np.float32).min)
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        weights /= weights.sum(axis=-1, keepdims=True)  # (queries, tokens)
        output.append(weights @ values.values() @ value_rows[at].T + biases[mine])
    return np.stack(output).astype(np.float32)
