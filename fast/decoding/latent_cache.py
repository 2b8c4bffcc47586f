"""A latent key-value cache for a packed model, and the attention that reads it.

transformers' attention hands its cache keys that are already rotated, without their positions. So attention itself is
exchanged: where it is given a LatentCache it hands over latents and positions, else it is what it was.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .._checks import has_sliding_window, positions_of
from ..kv_cache import LARGEST_CODE, apply_rope, latent_attention, latents
from ..models.layers import PackedLinear
from ..models.quantize import device_of
from ..models.wrappers import with_adapters_inside
from .architecture import MODEL_TYPES, STATIC_ROPE

#: In what the kinds of latent cache in `memory.KV_CACHES` keep a latent.
LATENT_TYPES = {"latent": torch.float16, "latent-int8": torch.int8}


def latent_cache(model: nn.Module, dtype: torch.dtype = torch.float16) -> Any:
    """An empty cache that keeps latents of k_proj and v_proj instead of keys and values.

    Give it to transformers: `model.generate(tokens, **cache_argument(latent_cache(model)))`, or to `model(tokens,
    ...)` in the same way. Batches, left padding, beams and `crop` work as with transformers' own DynamicCache. The
    model's attention layers learn to read it, and treat all other caches as before.

    Parameters
    ----------
    model : packed transformers causal language model
        Of a type in decode_cpu.MODEL_TYPES, without sliding windows, on one device. It may be compiled, or have
        adapters of PEFT beside layers other than k_proj and v_proj.
    dtype : torch.dtype
        Of the stored latents: float32, float16 or int8, the latter two with a float32 scale for each token.

    Returns
    -------
    A transformers Cache; `nbytes` says what it holds.

    Raises
    ------
    ValueError
        If a k_proj or v_proj is not packed (it is named), model or dtype are none of these, or PEFT puts tokens before
        the prompt.

    Examples
    --------
    >>> latent_cache(nn.Linear(2, 2))
    Traceback (most recent call last):
    ...
    ValueError: a latent cache needs a model of type llama, mistral, qwen2, not None
    """
    model = with_adapters_inside(model)
    check_latent(model, dtype)
    from .latent_cache_hf import LatentCache

    inner = model.model  # type: ignore[union-attr]
    for layer in inner.layers:  # type: ignore[union-attr]
        attention: Any = layer.self_attn
        if not isinstance(attention.forward, partial):
            attention.forward = partial(attend, attention, attention.forward)
    return LatentCache(len(inner.layers), dtype, inner.rotary_emb, positions_of(model))  # type: ignore[arg-type, union-attr]


def check_latent(model: Any, dtype: torch.dtype) -> None:
    """Raise ValueError unless the model's keys and values can be kept as latents."""
    config: Any = getattr(model, "config", None)
    kind = getattr(config, "model_type", None)
    if kind not in MODEL_TYPES:
        raise ValueError(f"a latent cache needs a model of type {', '.join(MODEL_TYPES)}, not {kind}")
    if dtype != torch.float32 and dtype not in LARGEST_CODE:
        raise ValueError(f"latents are kept in float32, float16 or int8, not {dtype}")
    if has_sliding_window(config.to_dict()):
        raise ValueError(
            f"the model attends through a sliding window of {config.sliding_window} tokens, and a latent cache keeps "
            "all of them: use the ordinary cache"
        )
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if rope not in STATIC_ROPE:
        raise ValueError(
            f"the model's rotary embedding is of type {rope!r}, whose angles change with the length; a latent cache "
            f"knows {', '.join(STATIC_ROPE)}: use the ordinary cache"
        )
    for name, module in model.named_modules():
        if name.endswith(("self_attn.k_proj", "self_attn.v_proj")) and not isinstance(module, PackedLinear):
            raise ValueError(
                f"layer {name} is a {type(module).__name__}, not packed: quantise it (quantize_) and pack the model "
                "(pack_), or use the ordinary cache"
            )
    device_of(model)


def attend(attention: Any, ordinary: Any, /, *inputs: Any, **named: Any) -> tuple[Tensor, Tensor | None]:
    """Run a model's attention: `ordinary`, its own forward, unless one of the arguments is a LatentCache."""
    cache = next((each for each in (*inputs, *named.values()) if hasattr(each, "put_latents")), None)
    if cache is None:
        return ordinary(*inputs, **named)
    return attend_to_latents(attention, cache, *inputs, **named)


def attend_to_latents(
    attention: Any,
    kept: Any,
    /,
    hidden_states: Tensor,
    position_embeddings: Any = None,
    attention_mask: Tensor | None = None,
    *_: Any,
    position_ids: Tensor,
    **__: Any,
) -> tuple[Tensor, None]:
    """Append the latents of new tokens to a LatentCache, and attend to all that it holds."""
    key, value = attention.k_proj, attention.v_proj
    projected = [latents(hidden_states, each.factors()) for each in (key, value)]
    keys, values = kept.put_latents(attention.layer_idx, *projected, position_ids)
    queries = hidden_states.shape[1]
    query = attention.q_proj(hidden_states).float().unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
    cosine, sine = kept.angles()  # (batch, tokens, size / 2)
    query = apply_rope(query, cosine[:, None, -queries:], sine[:, None, -queries:])
    output = latent_attention(
        query,
        keys,
        values,
        key.factors(),
        value.factors(),
        cosine,
        sine,
        visible(attention_mask, queries, keys.codes.shape[-2], query.device),
        key.bias,
        value.bias,
        attention.scaling,
    )
    output = output.transpose(1, 2).flatten(2).to(hidden_states.dtype)
    return attention.o_proj(output), None


def visible(mask: Tensor | None, queries: int, tokens: int, device: torch.device) -> Tensor:
    """Which tokens a query may see, (batch or 1, queries, tokens) bool, from the mask that transformers made.

    Raises
    ------
    ValueError
        If the mask is none of those that attention "eager" and "sdpa" get.
    """
    if mask is None:  # the newest tokens ask, and each sees all up to itself
        return torch.ones(1, queries, tokens, dtype=torch.bool, device=device).tril(tokens - queries)
    if mask.ndim != 4 or mask.shape[-2:] != (queries, tokens):
        raise ValueError(
            f"a latent cache understands masks of shape (batch, 1, {queries}, {tokens}), not {tuple(mask.shape)}: load "
            "the model with attn_implementation='sdpa' or 'eager'"
        )
    return mask[:, 0] if mask.dtype == torch.bool else mask[:, 0] == 0
