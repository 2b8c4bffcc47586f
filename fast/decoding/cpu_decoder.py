"""Run a Llama-like model on a CPU, one call of compiled code for each block of tokens, and generate with it.

The model's sizes and the addresses of its arrays go to kernels/cpu_decode.py as arrays of integers, so that no Python
runs between its layers. Nothing here needs torch: the weights are NumPy arrays, either the memory of a torch model
(torch_weights.py) or a checkpoint's files mapped into memory (mapped_weights.py).
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from ..kernels import cpu, cpu_decode, cpu_threads
from ..models.generation_settings import GenerationConfig, GenerationDefaults
from .architecture import Architecture, rotary_angles
from .sampling import choose_token

BLOCK = 32  # prompt tokens that pass through the model in one call


class Linear(NamedTuple):
    """Hold the arrays of a linear layer: packed paths, or a dense weight.

    Attributes
    ----------
    d_out, d_in : int
    paths : sequence of five arrays each
        u_words (d_out, words) and v_words (rank, words) of 32 bits; h (d_out,), ell (rank,) and g (d_in,) float16. All
        are C-contiguous.
    weight : (d_out, d_in) float16 or float32 array, or None for a packed layer
    bias : (d_out,) float array, or None
    """

    d_out: int
    d_in: int
    paths: Sequence[Sequence[np.ndarray]]
    weight: np.ndarray | None
    bias: np.ndarray | None


class EmbeddingArrays(NamedTuple):
    """Hold the arrays of an embedding or head, in floating point or quantized as in models/embeddings.py.

    Attributes
    ----------
    entries : (vocabulary, hidden) float16 or float32 array, or its codes: int8, or uint8 with two 4-bit codes each
    scale : (vocabulary, groups) float array, or None for floating point
    offset : (vocabulary, groups) float array of a 4-bit table, else None
    """

    entries: np.ndarray
    scale: np.ndarray | None = None
    offset: np.ndarray | None = None


class Weights(NamedTuple):
    """Hold all arrays of a model.

    Attributes
    ----------
    layers : sequence of seven Linear each, in the order of PROJECTIONS
    norms : sequence of (hidden,) float array
        The weights of RMSNorm: NORMS of each layer, then the one before the head.
    embedding, head : EmbeddingArrays
    """

    layers: Sequence[Sequence[Linear]]
    norms: Sequence[np.ndarray]
    embedding: EmbeddingArrays
    head: EmbeddingArrays


class Decodable(NamedTuple):
    """Hold a model in the form that `Decoder` runs: sizes, arrays and settings of generation.

    Attributes
    ----------
    sizes : Architecture
    weights : Weights
    generation : GenerationDefaults
        Its stop tokens, and its sampling unless the caller gives other settings.
    name_or_path : str
        The directory that holds its tokenizer.
    threads : int, optional
        Threads that decoding may use; by default as many as torch may.
    """

    sizes: Architecture
    weights: Weights
    generation: GenerationDefaults = GenerationDefaults()
    name_or_path: str = ""
    threads: int | None = None

    @property
    def stop(self) -> tuple[int, ...]:
        """Return the tokens at which this model's texts end."""
        return tuple(self.generation.config.stop_tokens or ())


class Cache:
    """Hold the keys and values of one sequence.

    Parameters
    ----------
    sizes : Architecture
    capacity : int
        Room: tokens of prompt and answer together. Memory is taken as it fills.

    Attributes
    ----------
    position : int
        Tokens that it holds. A smaller number may be set, to forget the later ones.
    """

    def __init__(self, sizes: Architecture, capacity: int):
        shape = sizes.layers, sizes.kv_heads, capacity, sizes.head_dim
        self.keys, self.values = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
        self.capacity, self.position = capacity, 0

    def copy(self, sizes: Architecture, capacity: int, count: int) -> "Cache":
        """Copy the first `count` tokens into a cache of another capacity."""
        new = Cache(sizes, capacity)
        new.keys[:, :, :count], new.values[:, :, :count] = self.keys[:, :, :count], self.values[:, :, :count]
        new.position = count
        return new


class Compiled:
    """Turn a model into the arrays of integers that the compiled step takes, and run steps.

    Parameters
    ----------
    model : Decodable
        Its arrays are not copied, except biases, norms and scales of tables that are not float32.
    positions : int
        Most tokens of a sequence.
    """

    def __init__(self, model: Decodable, positions: int):
        sizes, weights = model.sizes, model.weights
        self.arrays: list[np.ndarray] = []  # keeps alive what the addresses point to
        self.threads, self.architecture, self.positions = model.threads, sizes, positions
        self.sizes = np.array(sizes[: cpu_decode.VOCABULARY + 1])
        self.eps = np.float32(sizes.eps)
        paths: list[list[int]] = []
        self.linears = np.array([[self.linear(each, paths) for each in layer] for layer in weights.layers])
        self.paths = np.array(paths, np.int64).reshape(-1, cpu.PATH_FIELDS)
        self.norms = np.array([self.address(norm, np.float32) for norm in weights.norms])
        self.embedding, self.head = self.table(weights.embedding), self.table(weights.head)
        self.angles = rotary_angles(sizes.rope, sizes.head_dim, positions)
        self.scratch = cpu_threads.aligned_zeros(BLOCK * cpu_decode.block_floats(self.sizes), np.float32)
        self.thread_floats = self.count_thread_floats()

    def address(self, array: np.ndarray | None, dtype: Any = None) -> int:
        """Return the address of an array in C order, copied if its dtype or layout is another one; 0 for None."""
        if array is None:
            return 0
        self.arrays.append(np.require(array, dtype, ["C", "ALIGNED"]))
        return self.arrays[-1].ctypes.data

    def linear(self, layer: Linear, paths: list[list[int]]) -> list[int]:
        """Describe a linear layer in the order of cpu_decode.FIRST_PATH; append a packed layer's paths to `paths`."""
        first = len(paths)
        for path in layer.paths:
            paths.append([*(self.address(array) for array in path), len(path[cpu.ELL])])
        bits = 0 if layer.weight is None else 8 * layer.weight.itemsize
        bias, weight = self.address(layer.bias, np.float32), self.address(layer.weight)
        return [first, len(paths) - first, layer.d_out, layer.d_in, bias, weight, bits]

    def count_thread_floats(self) -> int:
        """Count the floats of scratch memory that a thread needs: for logits, outputs of a block, or latents."""
        sizes, padded = self.sizes, self.paths[:, cpu.RANK] + cpu.LANES
        inner = sizes[cpu_decode.HEADS] * sizes[cpu_decode.HEAD_DIM]
        widest = max(sizes[cpu_decode.INTERMEDIATE], sizes[cpu_decode.HIDDEN], inner)
        layers = self.linears[:, :, [cpu_decode.FIRST_PATH, cpu_decode.PATHS]].reshape(-1, 2)
        most = max(padded[first : first + count].sum() for first, count in layers)
        return int(max(sizes[cpu_decode.VOCABULARY], BLOCK * widest, cpu_threads.BATCH_TILE * most))

    def table(self, arrays: EmbeddingArrays) -> np.ndarray:
        """Describe an embedding or head: bits of an entry, addresses of entries and scales, group size, offsets."""
        entries = self.address(arrays.entries)
        if arrays.scale is None:
            return np.array([8 * arrays.entries.itemsize, entries, 0, 0, 0])
        size, bits = int(self.sizes[cpu_decode.HIDDEN]), 8 if arrays.offset is None else 4
        scale, offset = self.address(arrays.scale, np.float32), self.address(arrays.offset, np.float32)
        return np.array([bits, entries, scale, size // arrays.scale.shape[1], offset])

    def step(self, parts: Sequence[tuple[Cache, Sequence[int] | np.ndarray, np.ndarray | None]]) -> None:
        """Append tokens to each of several sequences, in one pass through the model.

        Parameters
        ----------
        parts : sequence of (cache, tokens, logits)
            A sequence's cache, its next tokens, and the (vocabulary,) float32 array to fill with the logits after the
            last of them, or None. At most BLOCK tokens in all.

        Raises
        ------
        ValueError
            If the tokens exceed a cache's capacity or the block, or have no row in the embedding.
        """
        tokens = np.concatenate([np.asarray(part[1], np.int64) for part in parts])
        vocabulary = self.architecture.vocabulary
        if not all(len(part[1]) for part in parts) or tokens.min() < 0 or tokens.max() >= vocabulary:
            raise ValueError(f"tokens must be one or more numbers from 0 to {vocabulary - 1}, got {tokens}")
        if len(tokens) > BLOCK:
            raise ValueError(f"a step takes at most {BLOCK} tokens, got {len(tokens)}: divide them")
        for cache, new, _ in parts:
            capacity, needed = min(cache.capacity, self.positions), cache.position + len(new)
            if needed > capacity:
                raise ValueError(f"the decoder holds {capacity} tokens, got {needed}: make it with a larger capacity")
        sequences = np.array([self.describe(*part) for part in parts])
        with cpu_threads.Team(self.threads, self.thread_floats, (self, parts)) as team:
            cpu_decode.step(
                self.sizes,
                self.eps,
                self.linears,
                self.paths,
                self.norms,
                self.embedding,
                self.head,
                self.angles,
                sequences,
                tokens,
                self.scratch,
                team,
            )
        for cache, new, _ in parts:
            cache.position += len(new)

    @staticmethod
    def describe(cache: Cache, tokens: Sequence[int] | np.ndarray, logits: np.ndarray | None) -> list[int]:
        """Describe a part of a step in the order of cpu_decode.COUNT."""
        keys, values = cache.keys.ctypes.data, cache.values.ctypes.data
        return [len(tokens), cache.position, cache.capacity, keys, values, 0 if logits is None else logits.ctypes.data]


class Decoder:
    """Run a model on one sequence of tokens, and keep their keys and values for the tokens that follow.

    Parameters
    ----------
    model : Decodable
    capacity : int
        Room in the cache: tokens of prompt and answer together.
    """

    def __init__(self, model: Decodable, capacity: int):
        self.compiled, self.cache = Compiled(model, capacity), Cache(model.sizes, capacity)
        self.logits = np.empty(model.sizes.vocabulary, np.float32)

    def __call__(self, tokens: np.ndarray) -> np.ndarray:
        """Read more tokens and compute the logits after the last one.

        Parameters
        ----------
        tokens : (n,) int64 array

        Returns
        -------
        (vocabulary,) float32 array, which the next call overwrites.

        Raises
        ------
        ValueError
            If the tokens exceed the capacity, or have no row in the embedding.
        """
        for start in range(0, max(len(tokens), 1), BLOCK):
            block = tokens[start : start + BLOCK]
            self.compiled.step([(self.cache, block, self.logits if start + BLOCK >= len(tokens) else None)])
        return self.logits


def decode(model: Decodable, tokens: Sequence[int], config: GenerationConfig) -> Iterator[int]:
    """Generate the tokens that follow a prompt of tokens, and yield them one by one, a stop token included.

    Parameters
    ----------
    model : Decodable
    tokens : sequence of int
    config : GenerationConfig
        Settings that are None have the model's own values.
    """
    config = config.with_defaults(model.generation.config)
    decoder = Decoder(model, len(tokens) + config.max_new_tokens)
    generator = np.random.default_rng(config.seed)
    seen = np.zeros(model.sizes.vocabulary, bool)
    seen[list(tokens)] = True
    logits = decoder(np.array(tokens, np.int64))
    for left in range(config.max_new_tokens - 1, -1, -1):
        token = choose_token(logits, config, seen, generator)
        yield token
        if token in (config.stop_tokens or ()) or not left:
            return
        logits = decoder(np.array([token]))
