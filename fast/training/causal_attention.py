"""Attend causally without a mask, so that CUDA graphs can capture the forward pass."""

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from ..models.build import transformers

CAUSAL = "littlebit_causal"  # the name under which transformers knows `causal`


@contextlib.contextmanager
def causal_attention(model: nn.Module) -> Iterator[None]:
    """Let a transformers model attend causally without a mask, while the context is active.

    transformers reads the positions on the CPU to decide whether it needs a mask, which no CUDA graph can capture. For
    sequences without padding it needs none.
    """
    hf = transformers()
    hf.AttentionInterface.register(CAUSAL, causal)
    before = model.config._attn_implementation  # type: ignore[union-attr]
    model.set_attn_implementation(CAUSAL)  # type: ignore[operator]
    try:
        yield
    finally:
        model.set_attn_implementation(before)  # type: ignore[operator]


def causal(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **unused: Any,
) -> tuple[Tensor, None]:
    """Compute causal attention for transformers: (batch, heads, sequence, d) to (batch, sequence, heads, d)."""
    grouped = query.shape[1] != key.shape[1]
    out = functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=grouped)
    return out.transpose(1, 2).contiguous(), None


def is_plainly_causal(model: nn.Module, length: int) -> bool:
    """Tell whether a model's attention is plain causal attention: no window below `length`, no soft cap."""
    config = model.config  # type: ignore[union-attr]
    window = getattr(config, "sliding_window", None)
    return (window is None or window >= length) and not getattr(config, "attn_logit_softcapping", None)
