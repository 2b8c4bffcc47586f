"""Count the bytes of a whole model from its shape: weights, embeddings, key-value cache and activations.

`model_memory` gives Tables 3 and 4 of LittleBit (arXiv 2506.13771) for any shape, budget, context and embedding. It
counts everything as it is stored. 1 GB is 10^9 bytes, as in the paper.
"""

from functools import cache
from typing import NamedTuple

from ._renamed import renamed_value
from .bits import WORD_BITS, Ranks, Shape, allocate_ranks, kv_cache_bytes, model_bits

HALF_BYTES = 2
LATENT_BYTES = {"latent": 2, "latent-int8": 1}  # cache type -> bytes of one latent
KV_CACHES = ("full", *LATENT_BYTES)
LATENT_SCALE_BYTES = 4  # float32 scale of each token and projection, see kv_cache.py
POSITION_BYTES = 4  # position of a token: its key gets RoPE at every read
EMBEDDING_GROUPS = {8: 64, 4: 32}  # bits -> most entries of an embedding row that share a scale


class ModelShape(NamedTuple):
    """Describe the sizes of a decoder-only transformer, as its configuration gives them.

    Attributes
    ----------
    source : str
        Where the sizes were published.
    hidden, intermediate, layers, heads, kv_heads, head_size, vocabulary : int
    context : int
        Longest sequence in training, in tokens.
    tied : bool
        Whether the output head is the embedding.
    biases : str
        "none", "qkv", or "all" for linear layers and norms with biases.
    gated : bool
        Whether the MLP has gate_proj, up_proj and down_proj, or two layers.
    fused : bool
        Whether q_proj, k_proj and v_proj are one layer, and gate_proj and up_proj another.
    positions : int
        Rows of a learned position embedding.
    """

    source: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    vocabulary: int
    context: int
    tied: bool = False
    biases: str = "none"
    gated: bool = True
    fused: bool = False
    positions: int = 0


#: Models of the paper's tables, and the one that `littlebit demo` quantizes, from their configurations on the hub.
MODEL_SHAPES = {
    "opt-1.3b": ModelShape(
        "OPT, arXiv 2205.01068, Table 1; facebook/opt-1.3b",
        *(2048, 8192, 24, 32, 32, 64, 50272, 2048),
        tied=True,
        biases="all",
        gated=False,
        positions=2050,
    ),
    "llama-7b": ModelShape(
        "LLaMA, arXiv 2302.13971, Table 2; huggyllama/llama-7b", 4096, 11008, 32, 32, 32, 128, 32000, 2048
    ),
    "llama2-7b": ModelShape(
        "Llama 2, arXiv 2307.09288; meta-llama/Llama-2-7b-hf", 4096, 11008, 32, 32, 32, 128, 32000, 4096
    ),
    "llama2-13b": ModelShape(
        "Llama 2, arXiv 2307.09288; meta-llama/Llama-2-13b-hf", 5120, 13824, 40, 40, 40, 128, 32000, 4096
    ),
    "llama2-70b": ModelShape(
        "Llama 2, arXiv 2307.09288; meta-llama/Llama-2-70b-hf", 8192, 28672, 80, 64, 8, 128, 32000, 4096
    ),
    "llama3-8b": ModelShape(
        "Llama 3, arXiv 2407.21783, Table 3; meta-llama/Meta-Llama-3-8B", 4096, 14336, 32, 32, 8, 128, 128256, 8192
    ),
    "phi4-14b": ModelShape(
        "Phi-4, arXiv 2412.08905; microsoft/phi-4", 5120, 17920, 40, 40, 10, 128, 100352, 16384, fused=True
    ),
    "qwq-32b": ModelShape("Qwen/QwQ-32B", 5120, 27648, 64, 40, 8, 128, 152064, 40960, biases="qkv"),
    "smollm2-135m": ModelShape(
        "SmolLM2, arXiv 2502.02737; HuggingFaceTB/SmolLM2-135M", 576, 1536, 30, 9, 3, 64, 49152, 8192, tied=True
    ),
}


class ModelMemory(NamedTuple):
    """Hold the bytes of each part of a model, and the ranks of its layers.

    Attributes
    ----------
    linear : int
        Weights of the linear layers: packed, or two bytes each.
    embeddings : int
        Token embedding and output head; once, if they are tied.
    other : int
        Norms, biases and learned positions, two bytes each.
    kv_cache, activations : int
        At the given context.
    ranks : dict of layer name to Ranks
        Empty for a dense model.
    """

    linear: int
    embeddings: int
    other: int
    kv_cache: int
    activations: int
    ranks: dict[str, Ranks]

    @property
    def weights(self) -> int:
        """Return the bytes of all parameters: the size of a file (LittleBit, Table 3)."""
        return self.linear + self.embeddings + self.other

    @property
    def total(self) -> int:
        """Return the bytes of everything that is in memory while the model runs."""
        return self.weights + self.kv_cache + self.activations


def model_memory(
    shape: ModelShape,
    bits: float | None = None,
    paths: int | None = 2,
    embedding_bits: int = 16,
    context: int = 0,
    kv_cache: str = "full",
    word_bits: int = WORD_BITS,
) -> ModelMemory:
    """Count the bytes that a model of a given shape takes (LittleBit, arXiv 2506.13771, Tables 3 and 4).

    Linear layers inside the blocks are quantized, as in the paper. Embedding and head take `embedding_bits` an entry,
    norms and biases 16. `allocate_ranks` chooses the ranks for the whole model.

    Parameters
    ----------
    shape : ModelShape
    bits : float, optional
        Ceiling in bits per weight of the linear layers; None for the dense float16 model.
    paths : int, optional
        See `allocate_ranks`.
    embedding_bits : int
        16, 8 or 4, see `embedding_bytes`.
    context : int
        Tokens in the key-value cache, batch size times length. Activations are counted for one more token.
    kv_cache : str
        "full" (keys and values, float16), "latent" (float16) or "latent-int8". A latent cache, as in multi-head latent
        attention (MLA), keeps R numbers for each token and projection; see kv_cache.py.
    word_bits : int
        1 gives the paper's count, without padding; see `path_bits`.

    Raises
    ------
    ValueError
        If the bits cannot be met, the model is dense and the cache latent, or a setting is out of range.

    Examples
    --------
    Llama-2-7B in GB: float16, then 0.1 bits with an embedding and a head of 16, 8 and 4 bits (the paper has 13.49 and
    0.63 for the first two):

    >>> llama = MODEL_SHAPES["llama2-7b"]
    >>> settings = {}, {"bits": 0.1}, {"bits": 0.1, "embedding_bits": 8}, {"bits": 0.1, "embedding_bits": 4}
    >>> [round(model_memory(llama, **each).weights / 1e9, 3) for each in settings]
    [13.477, 0.606, 0.352, 0.245]
    """
    kv_cache = renamed_value("kv_cache", kv_cache)
    if kv_cache not in KV_CACHES:
        raise ValueError(f"kv_cache must be one of {', '.join(KV_CACHES)}, not {kv_cache!r}")
    if kv_cache != "full" and bits is None:
        raise ValueError("a dense model has no latents to cache; give bits, or choose kv_cache='full'")
    if context < 0:
        raise ValueError(f"context must be a number of tokens, 0 or more, not {context}")
    shapes = linear_shapes(shape)
    if bits is None:
        ranks, linear_bits = {}, 16 * sum(d_out * d_in for d_out, d_in in shapes.values())
    else:
        ranks = dict(layer_ranks(shape, bits, paths, word_bits))
        linear_bits = model_bits(shapes, ranks, word_bits=word_bits)
    tables = 1 if shape.tied else 2
    if kv_cache == "full":
        cached = kv_cache_bytes(context, [shape.kv_heads * shape.head_size] * (2 * shape.layers))
    else:
        cached = kv_cache_bytes(context, latent_widths(ranks), LATENT_BYTES[kv_cache], LATENT_SCALE_BYTES)
        cached += context * POSITION_BYTES
    return ModelMemory(
        linear=-(-linear_bits // 8),
        embeddings=tables * embedding_bytes(shape.vocabulary, shape.hidden, embedding_bits),
        other=HALF_BYTES * other_parameters(shape),
        kv_cache=cached,
        activations=HALF_BYTES * activation_numbers(shape) if context else 0,
        ranks=ranks,
    )


def linear_shapes(shape: ModelShape) -> dict[str, Shape]:
    """List the shape (d_out, d_in) of every linear layer in the blocks, by name.

    Examples
    --------
    >>> shapes = linear_shapes(MODEL_SHAPES["llama2-70b"])
    >>> len(shapes), shapes["0.k_proj"], shapes["79.down_proj"]
    (560, (1024, 8192), (8192, 28672))
    """
    query, key = shape.heads * shape.head_size, shape.kv_heads * shape.head_size
    if shape.fused:
        block = {"qkv_proj": (query + 2 * key, shape.hidden)}
    else:
        block = {
            "q_proj": (query, shape.hidden),
            "k_proj": (key, shape.hidden),
            "v_proj": (key, shape.hidden),
        }
    block["o_proj"] = shape.hidden, query
    if shape.fused:
        block["gate_up_proj"] = 2 * shape.intermediate, shape.hidden
    else:
        if shape.gated:
            block["gate_proj"] = shape.intermediate, shape.hidden
        block["up_proj"] = shape.intermediate, shape.hidden
    block["down_proj"] = shape.hidden, shape.intermediate
    return {f"{layer}.{name}": size for layer in range(shape.layers) for name, size in block.items()}


@cache
def layer_ranks(shape: ModelShape, bits: float, paths: int | None, word_bits: int) -> dict[str, Ranks]:
    """Allocate the ranks of a model's layers once, and remember them: hundreds of layers take seconds."""
    return allocate_ranks(linear_shapes(shape), bits, paths, word_bits=word_bits)


def latent_widths(ranks: dict[str, Ranks]) -> list[int]:
    """List the latents that each projection to keys and values leaves per token: its total rank.

    A fused projection leaves them once.

    Examples
    --------
    >>> latent_widths({"0.q_proj": (8, 8), "0.k_proj": (4, 3), "0.v_proj": (5,)})
    [7, 5]
    """
    return [sum(each) for name, each in ranks.items() if name.split(".")[-1] in ("k_proj", "v_proj", "qkv_proj")]


def embedding_bytes(rows: int, size: int, bits: int = 16) -> int:
    """Count the bytes of an embedding or output head of `rows` rows.

    16 bits: float16. 8 or 4 bits: codes, with a float16 scale (and an offset, with 4 bits) for each group of entries.

    Examples
    --------
    >>> [embedding_bytes(32000, 4096, bits) for bits in (16, 8, 4)]
    [262144000, 135168000, 81920000]
    """
    if bits == 16:
        return rows * size * HALF_BYTES
    if bits not in EMBEDDING_GROUPS:
        raise ValueError(f"embeddings must have 16, 8 or 4 bits, not {bits}")
    if size % 32:
        raise ValueError(f"with 8 or 4 bits the embedding size must be a multiple of 32, not {size}; choose 16 bits")
    group = next(each for each in (EMBEDDING_GROUPS[bits], 32) if size % each == 0)
    numbers = 2 if bits == 4 else 1  # a scale; with 4 bits also an offset
    return rows * (size * bits // 8 + size // group * numbers * HALF_BYTES)


def other_parameters(shape: ModelShape) -> int:
    """Count the parameters outside linear weights, embedding and head: norms, biases, learned positions."""
    query, key = shape.heads * shape.head_size, shape.kv_heads * shape.head_size
    norm = shape.hidden * (2 if shape.biases == "all" else 1)
    biases = {"none": 0, "qkv": query + 2 * key, "all": query + 2 * key + 2 * shape.hidden + shape.intermediate}
    block = 2 * norm + biases[shape.biases]
    return shape.layers * block + norm + shape.positions * shape.hidden


def activation_numbers(shape: ModelShape) -> int:
    """Count the numbers in memory at once while one token passes through the model, without the cache.

    They are the residual stream and the widest set beside it: in attention the normed input, query, key, value, their
    weighted mean and the output; in the MLP the normed input, one or two intermediate vectors, their product and the
    output; at the end the normed input and the logits. Attention scores are left out: attention goes through the cache
    in blocks and keeps few of them.
    """
    query, key = shape.heads * shape.head_size, shape.kv_heads * shape.head_size
    attention = 2 * shape.hidden + 2 * query + 2 * key
    mlp = 2 * shape.hidden + (3 if shape.gated else 2) * shape.intermediate
    return shape.hidden + max(attention, mlp, shape.hidden + shape.vocabulary)
