"""Give a packed model a latent key-value cache (DeepSeek: multi-head latent attention, MLA), and attention over it.

transformers' attention applies RoPE to the keys before it gives them to its cache, and gives it no positions. A latent
cache needs both as they were. So `latent_cache` replaces the attention layers' `forward`: with a LatentCache they store
latents and positions; with any other cache they do what they did before.
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

#: kv_cache -> dtype of the stored latents, for each latent cache in `memory.KV_CACHES`.
LATENT_TYPES = {"latent": torch.float16, "latent-int8": torch.int8}


def latent_cache(model: nn.Module, dtype: torch.dtype = torch.float16) -> Any:
    """Make an empty key-value cache that stores latents of k_proj and v_proj instead of keys and values.

    Pass it to transformers: `model.generate(tokens, **cache_argument(latent_cache(model)))`, or to `model(tokens, ...)`
    in the same way. Batches, left padding, beam search and `crop` work as with transformers' DynamicCache. The model's
    attention layers are changed to read it; other caches work as before.

    Parameters
    ----------
    model : packed transformers causal language model
        Llama, Mistral or Qwen2 without sliding windows, on one device. It may be compiled, or have adapters of PEFT on
        layers other than k_proj and v_proj.
    dtype : torch.dtype
        dtype of the stored latents: float32, float16 or int8, the latter two with a float32 scale for each token.

    Returns
    -------
    A transformers Cache; its `nbytes` is the memory of the stored tokens.

    Raises
    ------
    ValueError
        If the model or the dtype is another one, a k_proj or v_proj is not packed, or PEFT adds virtual tokens to the
        prompt.

    Examples
    --------
    >>> latent_cache(nn.Linear(2, 2))
    Traceback (most recent call last):
    ...
    ValueError: a latent cache needs a model of type llama, mistral, qwen2, got None: use the full cache
    """
    model = with_adapters_inside(model)
    check_latent(model, dtype)
    from .latent_cache_hf import LatentCache

    inner = model.model  # type: ignore[union-attr]
    for layer in inner.layers:  # type: ignore[union-attr]
        attention: Any = layer.self_attn
        if not isinstance(attention.forward, partial):
            attention.forward = partial(choose_attention, attention, attention.forward)
    return LatentCache(len(inner.layers), dtype, inner.rotary_emb, positions_of(model))  # type: ignore[arg-type, union-attr]


def check_latent(model: Any, dtype: torch.dtype) -> None:
    """Raise ValueError unless the model's keys and values can be stored as latents."""
    config: Any = getattr(model, "config", None)
    model_type = getattr(config, "model_type", None)
    if model_type not in MODEL_TYPES:
        raise ValueError(
            f"a latent cache needs a model of type {', '.join(MODEL_TYPES)}, got {model_type}: use the full cache"
        )
    if dtype != torch.float32 and dtype not in LARGEST_CODE:
        raise ValueError(f"latents must be stored as float32, float16 or int8, not {dtype}")
    if has_sliding_window(config.to_dict()):
        raise ValueError(
            f"a latent cache needs attention to all tokens, but this model has a sliding window of "
            f"{config.sliding_window} tokens: use the full cache"
        )
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if rope not in STATIC_ROPE:
        raise ValueError(
            f"a latent cache needs a rotary embedding of type {', '.join(STATIC_ROPE)}, got {rope!r}, whose angles "
            "change with the length: use the full cache"
        )
    for name, module in model.named_modules():
        if name.endswith(("self_attn.k_proj", "self_attn.v_proj")) and not isinstance(module, PackedLinear):
            raise ValueError(
                f"layer {name} must be packed, but is a {type(module).__name__}: quantize it (quantize_) and pack the "
                "model (pack_), or use the full cache"
            )
    device_of(model)


def choose_attention(attention: Any, forward: Any, /, *inputs: Any, **named: Any) -> tuple[Tensor, Tensor | None]:
    """Run attention over latents if an argument is a LatentCache, else the layer's own `forward`."""
    cache = next((each for each in (*inputs, *named.values()) if hasattr(each, "append_latents")), None)
    if cache is None:
        return forward(*inputs, **named)
    return attend_to_latents(attention, cache, *inputs, **named)


def attend_to_latents(
    attention: Any,
    cache: Any,
    /,
    hidden_states: Tensor,
    position_embeddings: Any = None,
    attention_mask: Tensor | None = None,
    *_: Any,
    position_ids: Tensor,
    **__: Any,
) -> tuple[Tensor, None]:
    """Append the latents of new tokens to a LatentCache, and attend to all tokens in it.

    transformers' attention layers take the arguments after /; hidden_states is (batch, tokens, hidden).
    """
    key, value = attention.k_proj, attention.v_proj
    projected = [latents(hidden_states, each.factors()) for each in (key, value)]
    keys, values = cache.append_latents(attention.layer_idx, *projected, position_ids)
    queries = hidden_states.shape[1]
    query = attention.q_proj(hidden_states).float().unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
    cosine, sine = cache.angles()  # (batch, tokens, size / 2)
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
    """Convert transformers' attention mask to booleans: whether each query may see each token.

    Parameters
    ----------
    mask : (batch, 1, queries, tokens) bool or float tensor, or None for causal attention
    queries, tokens : int
        The queries belong to the last of the tokens.

    Returns
    -------
    (batch or 1, queries, tokens) bool tensor.

    Raises
    ------
    ValueError
        If the mask has another shape, as with attention other than "eager" and "sdpa".
    """
    if mask is None:  # each query sees the tokens up to its own
        return torch.ones(1, queries, tokens, dtype=torch.bool, device=device).tril(tokens - queries)
    if mask.ndim != 4 or mask.shape[-2:] != (queries, tokens):
        raise ValueError(
            f"with a latent cache the attention mask must have shape (batch, 1, {queries}, {tokens}), got "
            f"{tuple(mask.shape)}: load the model with attn_implementation='sdpa' or 'eager'"
        )
    return mask[:, 0] if mask.dtype == torch.bool else mask[:, 0] == 0
