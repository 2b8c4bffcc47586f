"""Read from a model's configuration the sizes and RoPE parameters that the decoders need."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from ...reference.arrays import Array
from .._checks import has_sliding_window, position_limit
from ..kernels import cpu

#: Linear layers of a block, in the order in which they run.
PROJECTIONS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
PROJECTIONS += ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
NORMS = ("input_layernorm", "post_attention_layernorm")
#: Model types of transformers that all decoders run.
MODEL_TYPES = ("llama", "mistral", "qwen2")
ORIGINAL_LENGTH = "original_max_position_embeddings"
STATIC_ROPE = ("default", "linear", "llama3")  # types of RoPE whose frequencies do not depend on the context's length


class NotDecodableError(Exception):
    """Report that a decoder cannot run a model; the message says why, so that the caller can choose another decoder."""


class Architecture(NamedTuple):
    """The sizes and constants of a Llama-like model.

    Attributes
    ----------
    hidden, heads, kv_heads, head_dim, intermediate, layers, vocabulary : int
    eps : float
        Added to the mean square in RMSNorm.
    rope : mapping
        The configuration's `rope_parameters`.
    positions : int
        Most tokens of a context.
    """

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    layers: int
    vocabulary: int
    eps: float
    rope: Mapping[str, Any]
    positions: int

    def linear_shapes(self) -> list[tuple[int, int]]:
        """Return (d_out, d_in) of each of PROJECTIONS."""
        inner, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        up, down = (self.intermediate, self.hidden), (self.hidden, self.intermediate)
        return [(inner, self.hidden), (keys, self.hidden), (keys, self.hidden), (self.hidden, inner), up, up, down]


def architecture(config: Mapping[str, Any], model_types: Sequence[str] = MODEL_TYPES) -> Architecture:
    """Read the architecture from a model's configuration, and check everything that the decoders rely on.

    Parameters
    ----------
    config : mapping
        Contents of config.json.
    model_types : sequence of str
        Values of `model_type` that the decoder runs.

    Raises
    ------
    NotDecodableError
        If the decoder cannot run such a model, or the configuration is incomplete.
    """
    model_type = config.get("model_type")
    if model_type not in model_types:
        raise NotDecodableError(f"model type {model_type!r} is not one of {', '.join(model_types)}")
    if config.get("hidden_act") != "silu":
        raise NotDecodableError(f"its activation is {config.get('hidden_act')}, not silu")
    if has_sliding_window(config):
        raise NotDecodableError("it attends through a sliding window")
    rope: Any = config.get("rope_parameters")
    if config.get("rope_scaling") or config.get("partial_rotary_factor") not in (None, 1.0):
        raise NotDecodableError("its rotary embedding is described outside rope_parameters")
    check_rope(rope)
    names = ["hidden_size", "num_attention_heads", "num_key_value_heads", "intermediate_size", "num_hidden_layers"]
    names.append("max_position_embeddings")
    sizes: list[Any] = [config.get(name) for name in [*names, "vocab_size"]]
    if not all(isinstance(size, int) and not isinstance(size, bool) and size > 0 for size in sizes):
        raise NotDecodableError(f"its configuration does not say {', '.join(names)} and vocab_size as whole numbers")
    hidden, heads, kv_heads, intermediate, layers, positions, vocabulary = sizes
    head_dim, eps = config.get("head_dim") or hidden // heads, config.get("rms_norm_eps")
    if not isinstance(eps, int | float) or not isinstance(head_dim, int) or heads % kv_heads:
        raise NotDecodableError("its configuration does not say head_dim, rms_norm_eps or groups of queries")
    if head_dim % cpu.LANES or hidden % cpu.LANES or intermediate % cpu.LANES:
        raise NotDecodableError("its sizes are not multiples of sixteen")
    limit = position_limit(positions, rope) or positions
    return Architecture(hidden, heads, kv_heads, head_dim, intermediate, layers, vocabulary, float(eps), rope, limit)


def check_rope(rope: Any) -> None:
    """Raise NotDecodableError unless `inverse_frequencies` can compute with these rope_parameters."""
    rope_type = rope.get("rope_type") if isinstance(rope, dict) else None
    if rope_type not in STATIC_ROPE or rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise NotDecodableError(f"its rotary embedding is of type {rope_type!r}")
    needed = {"default": [], "linear": ["factor"], "llama3": ["factor", "low_freq_factor", "high_freq_factor"]}[
        rope_type
    ]
    needed += ["rope_theta"] + [ORIGINAL_LENGTH] * (rope_type == "llama3")
    if not all(isinstance(rope.get(name), int | float) and rope[name] > 0 for name in needed):
        raise NotDecodableError(f"its rope_parameters do not say {', '.join(needed)}")


def inverse_frequencies(rope: Mapping[str, Any], head_dim: int) -> Array:
    """Compute RoPE's angle per position for each pair of a head's entries, (head_dim / 2,) float32.

    theta^(-2 i / head_dim), divided by the factor in type "linear". Type "llama3" (Llama 3.1) divides by the factor
    where the wavelength exceeds original_max_position_embeddings / low_freq_factor, keeps the angle where it is below
    original_max_position_embeddings / high_freq_factor, and interpolates between the two.

    Powers are rounded to float32 once. torch's differ by one ulp in about one of a hundred.
    """
    exponent = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    found = np.float32(1) / (float(rope["rope_theta"]) ** exponent.astype(np.float64)).astype(np.float32)
    if rope["rope_type"] == "default":
        return found
    slow = found / np.float32(rope["factor"])
    if rope["rope_type"] == "linear":
        return slow
    low, high, length = (rope[name] for name in ("low_freq_factor", "high_freq_factor", ORIGINAL_LENGTH))
    turns = np.float32(length) / (np.float32(2 * np.pi) / found)  # turns of each pair within the original length
    share = np.clip((turns - np.float32(low)) / np.float32(high - low), 0, 1)
    return (1 - share) * slow + share * found


def rotary_angles(rope: Mapping[str, Any], head_dim: int, capacity: int) -> Array:
    """Compute RoPE's cosines and sines at each position, (2, capacity, head_dim / 2) float32, of float32 angles."""
    angles = np.arange(capacity, dtype=np.float32)[:, None] * inverse_frequencies(rope, head_dim)
    return np.stack([np.cos(angles, dtype=np.float64), np.sin(angles, dtype=np.float64)]).astype(np.float32)
