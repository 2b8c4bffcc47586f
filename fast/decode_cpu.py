"""Generation on a CPU without Python between the layers: a Llama-like model as numbers for kernels/cpu_decode.py.

Nothing here needs torch. The weights are NumPy arrays: those of a loaded model (decode_loaded.py), or a checkpoint's
files mapped into memory (decode_mapped.py).
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from ._checks import has_sliding_window, position_limit
from .kernels import cpu, cpu_decode, cpu_threads
from .models.generation_settings import GenerationSettings

BLOCK = 32  # tokens of a prompt that pass through the model at once
PROJECTIONS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
PROJECTIONS += ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
NORMS = ("input_layernorm", "post_attention_layernorm")
MODEL_TYPES = ("llama", "mistral", "qwen2")
ORIGINAL_LENGTH = "original_max_position_embeddings"
STATIC_ROPE = ("default", "linear", "llama3")  # kinds whose frequencies do not depend on the length


class NotDecodableError(Exception):
    """Why the compiled decoder cannot run a model, in a few words."""


class Architecture(NamedTuple):
    """The sizes of a Llama-like model, and what else its configuration says of its arithmetic.

    Attributes
    ----------
    hidden, heads, kv_heads, head_dim, intermediate, layers, vocabulary : int
    eps : float
        Added to the mean square in RMSNorm.
    rope : mapping
        The `rope_parameters` of the configuration.
    positions : int
        Tokens of a context at most.
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
        """(d_out, d_in) of each of PROJECTIONS."""
        inner, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        up, down = (self.intermediate, self.hidden), (self.hidden, self.intermediate)
        return [(inner, self.hidden), (keys, self.hidden), (keys, self.hidden), (self.hidden, inner), up, up, down]


class Linear(NamedTuple):
    """A linear layer: paths, or a dense weight.

    Attributes
    ----------
    d_out, d_in : int
    paths : sequence of five arrays each
        u_words (d_out, words) and v_words (rank, words) of 32 bits; h, ell and g float16. All row after row.
    weight : (d_out, d_in) float16 or float32 array, or None
    bias : (d_out,) float array, or None
    """

    d_out: int
    d_in: int
    paths: Sequence[Sequence[np.ndarray]]
    weight: np.ndarray | None
    bias: np.ndarray | None


class Rows(NamedTuple):
    """An embedding or head; see embeddings.Table for rows of integers.

    Attributes
    ----------
    entries : (vocabulary, hidden) float16 or float32 array, or the codes of 8 or 4 bits
    scale, offset : (vocabulary, groups) float array, or None
    """

    entries: np.ndarray
    scale: np.ndarray | None = None
    offset: np.ndarray | None = None


class Weights(NamedTuple):
    """All tensors of a model.

    Attributes
    ----------
    layers : sequence of seven Linear each, in the order of PROJECTIONS
    norms : sequence of (hidden,) float array
        NORMS of each layer, and the last one.
    embedding, head : Rows
    """

    layers: Sequence[Sequence[Linear]]
    norms: Sequence[np.ndarray]
    embedding: Rows
    head: Rows


class Decodable(NamedTuple):
    """A model that `Decoder` runs.

    Attributes
    ----------
    sizes : Architecture
    weights : Weights
    generation : GenerationSettings
        Its stop tokens, and how it samples unless it is told otherwise.
    name_or_path : str
        Where its tokenizer is.
    threads : int, optional
        That it may use; by default as many as torch may.
    """

    sizes: Architecture
    weights: Weights
    generation: GenerationSettings = GenerationSettings()
    name_or_path: str = ""
    threads: int | None = None

    @property
    def stop(self) -> tuple[int, ...]:
        """The tokens after which it says no more."""
        return self.generation.stop


def architecture(config: Mapping[str, Any], kinds: Sequence[str] = MODEL_TYPES) -> Architecture:
    """What a model's configuration, as config.json holds it, says; nothing is taken for granted.

    Raises
    ------
    NotDecodableError
        If the decoder cannot run such a model, or the configuration leaves something out.
    """
    kind = config.get("model_type")
    if kind not in kinds:
        raise NotDecodableError(f"model type {kind!r} is not one of {', '.join(kinds)}")
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
    """Raise NotDecodableError unless `inverse_frequencies` knows such rope_parameters."""
    kind = rope.get("rope_type") if isinstance(rope, dict) else None
    if kind not in STATIC_ROPE or rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise NotDecodableError(f"its rotary embedding is of type {kind!r}")
    needed = {"default": [], "linear": ["factor"], "llama3": ["factor", "low_freq_factor", "high_freq_factor"]}[kind]
    needed += ["rope_theta"] + [ORIGINAL_LENGTH] * (kind == "llama3")
    if not all(isinstance(rope.get(name), int | float) and rope[name] > 0 for name in needed):
        raise NotDecodableError(f"its rope_parameters do not say {', '.join(needed)}")


def inverse_frequencies(rope: Mapping[str, Any], head_dim: int) -> np.ndarray:
    """Angle between neighbouring positions for each pair of a head's entries, (head_dim / 2,) float32.

    theta^(-2 i / head_dim), in kind "linear" over the factor. Kind "llama3" (Llama 3.1) divides by the factor where the
    wavelength exceeds original_max_position_embeddings / low_freq_factor, leaves it where that is below
    original_max_position_embeddings / high_freq_factor, and goes over from the one to the other in between.

    Powers are rounded to float32 once, which is what torch's are but for one in a hundred, an ulp off.
    """
    exponent = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    found = np.float32(1) / (float(rope["rope_theta"]) ** exponent.astype(np.float64)).astype(np.float32)
    if rope["rope_type"] == "default":
        return found
    slow = found / np.float32(rope["factor"])
    if rope["rope_type"] == "linear":
        return slow
    low, high, length = (rope[name] for name in ("low_freq_factor", "high_freq_factor", ORIGINAL_LENGTH))
    turns = np.float32(length) / (np.float32(2 * np.pi) / found)  # of each pair within the original length
    share = np.clip((turns - np.float32(low)) / np.float32(high - low), 0, 1)
    return (1 - share) * slow + share * found


def rotary_angles(rope: Mapping[str, Any], head_dim: int, capacity: int) -> np.ndarray:
    """Cosines and sines of each position, (2, capacity, head_dim / 2) float32, of angles in float32."""
    angles = np.arange(capacity, dtype=np.float32)[:, None] * inverse_frequencies(rope, head_dim)
    return np.stack([np.cos(angles, dtype=np.float64), np.sin(angles, dtype=np.float64)]).astype(np.float32)


class Decoder:
    """A model's numbers, its keys and values, and the place where the next token goes.

    Parameters
    ----------
    model : Decodable
        Its arrays are used where they lie; biases, norms and scales of tables are copied if they are not float32.
    capacity : int
        Tokens that it must hold at most, the prompt's included.
    """

    def __init__(self, model: Decodable, capacity: int):
        sizes, weights = model.sizes, model.weights
        self.kept: list[np.ndarray] = []  # what the addresses point to
        self.threads = model.threads
        self.sizes = np.array([*sizes[: cpu_decode.CAPACITY], capacity])
        self.eps = np.float32(sizes.eps)
        paths: list[list[int]] = []
        self.linears = np.array([[self.linear(each, paths) for each in layer] for layer in weights.layers])
        self.paths = np.array(paths, np.int64).reshape(-1, cpu.PATH_NUMBERS)
        self.norms = np.array([self.address(norm, np.float32) for norm in weights.norms])
        self.embedding, self.head = self.rows(weights.embedding), self.rows(weights.head)
        self.angles = rotary_angles(sizes.rope, sizes.head_dim, capacity)
        shape = sizes.layers, sizes.kv_heads, capacity, sizes.head_dim
        self.keys, self.values = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
        self.space = cpu_threads.aligned_zeros(BLOCK * cpu_decode.block_floats(self.sizes), np.float32)
        self.floats = self.part_floats()
        self.position = 0
        self.logits = np.empty(sizes.vocabulary, np.float32)

    def address(self, array: np.ndarray | None, dtype: Any = None) -> int:
        """Address of an array's values, row after row, as the given dtype; 0 for none."""
        if array is None:
            return 0
        self.kept.append(np.require(array, dtype, ["C", "ALIGNED"]))
        return self.kept[-1].ctypes.data

    def linear(self, layer: Linear, paths: list[list[int]]) -> list[int]:
        """The numbers of a linear layer; a packed one's paths are appended to `paths`."""
        first = len(paths)
        for path in layer.paths:
            paths.append([*(self.address(array) for array in path), len(path[cpu.ELL])])
        bits = 0 if layer.weight is None else 8 * layer.weight.itemsize
        bias, weight = self.address(layer.bias, np.float32), self.address(layer.weight)
        return [first, len(paths) - first, layer.d_out, layer.d_in, bias, weight, bits]

    def part_floats(self) -> int:
        """Space that a thread needs for its part of a step: of the logits, of a block's outputs, or of ranks."""
        sizes, padded = self.sizes, self.paths[:, cpu.RANK] + cpu.LANES
        inner = sizes[cpu_decode.HEADS] * sizes[cpu_decode.HEAD_DIM]
        widest = max(sizes[cpu_decode.INTERMEDIATE], sizes[cpu_decode.HIDDEN], inner)
        layers = self.linears[:, :, [cpu_decode.FIRST_PATH, cpu_decode.PATHS]].reshape(-1, 2)
        most = max(padded[first : first + count].sum() for first, count in layers)
        return int(max(sizes[cpu_decode.VOCABULARY], BLOCK * widest, cpu_threads.FOUR * most))

    def rows(self, rows: Rows) -> np.ndarray:
        """The numbers of an embedding or head."""
        place = self.address(rows.entries)
        if rows.scale is None:
            return np.array([8 * rows.entries.itemsize, place, 0, 0, 0])
        size, bits = int(self.sizes[cpu_decode.HIDDEN]), 8 if rows.offset is None else 4
        scale, offset = self.address(rows.scale, np.float32), self.address(rows.offset, np.float32)
        return np.array([bits, place, scale, size // rows.scale.shape[1], offset])

    def __call__(self, tokens: np.ndarray) -> np.ndarray:
        """Logits (vocabulary,) after some more tokens, (n,) int64; the next call overwrites them.

        Raises
        ------
        ValueError
            If the tokens exceed the capacity, or are not the model's.
        """
        capacity, vocabulary = self.sizes[cpu_decode.CAPACITY], self.sizes[cpu_decode.VOCABULARY]
        if self.position + len(tokens) > capacity:
            raise ValueError(f"the decoder holds {capacity} tokens, not {self.position + len(tokens)}")
        if len(tokens) == 0 or tokens.min() < 0 or tokens.max() >= vocabulary:
            raise ValueError(f"tokens must be one or more numbers from 0 to {vocabulary - 1}, not {tokens}")
        with cpu_threads.Team(self.threads, self.floats, self) as team:
            for start in range(0, len(tokens), BLOCK):
                block = np.ascontiguousarray(tokens[start : start + BLOCK], np.int64)
                cpu_decode.step(
                    self.sizes,
                    self.eps,
                    self.linears,
                    self.paths,
                    self.norms,
                    self.embedding,
                    self.head,
                    self.angles,
                    self.keys,
                    self.values,
                    block,
                    self.position,
                    self.logits,
                    self.space,
                    team,
                )
                self.position += len(block)
        return self.logits


def decode(
    model: Decodable,
    tokens: Sequence[int],
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
) -> Iterator[int]:
    """New tokens after the prompt `tokens`, one by one; the last may be one of `model.stop`."""
    decoder = Decoder(model, len(tokens) + max_new_tokens)
    generator = np.random.default_rng(seed)
    logits = decoder(np.array(tokens, np.int64))
    for left in range(max_new_tokens - 1, -1, -1):
        token = int(logits.argmax()) if temperature == 0 else sample(logits, temperature, top_k, top_p, generator)
        yield token
        if token in model.stop or not left:
            return
        logits = decoder(np.array([token]))


def sample(
    logits: np.ndarray, temperature: float, top_k: int | None, top_p: float | None, generator: np.random.Generator
) -> int:
    """A token drawn at a temperature from the k likeliest, or from the likeliest that hold probability p, or both."""
    order = np.argsort(-logits, kind="stable")[: top_k or None]
    scores = logits[order].astype(np.float64) / temperature
    chances = np.exp(scores - scores[0])
    chances /= chances.sum()
    if top_p is not None:
        before = chances.cumsum() - chances  # of the tokens that are likelier
        chances = chances[: max(1, int((before < top_p).sum()))]
    return int(order[generator.choice(len(chances), p=chances / chances.sum())])
