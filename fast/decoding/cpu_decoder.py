"""Generation on a CPU without Python between the layers: a Llama-like model as numbers for kernels/cpu_decode.py.

Nothing here needs torch. The weights are NumPy arrays: those of a loaded model (decode_loaded.py), or a checkpoint's
files mapped into memory (decode_mapped.py).
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from ..kernels import cpu, cpu_decode, cpu_threads
from ..models.generation_settings import GenerationSettings
from .architecture import Architecture, rotary_angles

BLOCK = 32  # tokens of a prompt that pass through the model at once


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
    """An embedding or head; see embeddings.EmbeddingTable for rows of integers.

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
        self.paths = np.array(paths, np.int64).reshape(-1, cpu.PATH_FIELDS)
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
        return int(max(sizes[cpu_decode.VOCABULARY], BLOCK * widest, cpu_threads.BATCH_TILE * most))

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
