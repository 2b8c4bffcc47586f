"""A checkpoint's files for the compiled decoder, mapped into memory: no torch, no transformers, next to no copies.

A process that imports torch takes 240 MB before it has read a weight. Here NumPy maps the safetensors files, and the
kernels read packed words, scales and tables where they lie in the map, so that pages that are never read, such as an
untied embedding's rows of other tokens, are never in memory. Copied are norms, biases and the scales of tables, which
the kernels want in float32, narrow words, and tensors of bfloat16.

What is read is checked as `load` checks it. Whatever is not understood to the last name and number is left to `load`,
which either can read it or says what is wrong: nothing is guessed.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..checkpoints.checksums import check_contents
from ..checkpoints.format import (
    byte_ranges,
    check_embeddings,
    check_layers,
    check_path,
    is_checkpoint,
    is_official,
    read_config,
    read_headers,
    weight_files,
)
from ..files.untrusted import CheckpointError, open_errors, read_json
from ..models.generation_settings import generation_settings, read_generation
from ..models.packed_shapes import packed_headers
from .architecture import NORMS, PROJECTIONS, Architecture, NotDecodableError, architecture
from .cpu_decoder import Decodable, Linear, Rows, Weights

# How NumPy sees the dtypes of safetensors; BF16 are the upper halves of float32, which `take` makes of them
DTYPES = {"F32": "<f4", "F16": "<f2", "BF16": "<u2", "I32": "<i4", "I16": "<i2", "I8": "i1", "U8": "u1"}


def map_model(path: Path, threads: int | None = None, verify: bool = True) -> Decodable:
    """A model, packed or dense, whose weights are its files.

    The files must stay as they are while it is used: a process that reads behind the end of a mapped file is killed.

    Parameters
    ----------
    path : Path
        Directory with config.json and safetensors files.
    threads : int, optional
        That decoding may use; by default OMP_NUM_THREADS, or all.
    verify : bool
        Whether a packed checkpoint's checksums are compared, for which everything is read once.

    Raises
    ------
    NotDecodableError
        If this is a model that only `load` or `load_model` can read, or nobody.
    CheckpointError
        If a packed checkpoint or its generation_config.json is damaged, as from `load`.
    """
    if is_official(path) or not (path / "config.json").is_file():
        raise NotDecodableError("it is not a directory of this project's, or transformers', format")
    config, layers = read_config(path) if is_checkpoint(path) else (read_dense_config(path), {})
    section = config.get("quantization_config") or {}
    if section.get("fused") or section.get("shared"):
        raise NotDecodableError("it has layers that were split or are shared")
    sizes, generation = architecture(config), generation_settings(read_generation(path))
    if generation.beyond:
        raise NotDecodableError(f"its generation_config sets {generation.beyond}")
    try:
        files = weight_files(path)
        tensors = Tensors(files)
    except CheckpointError:
        if not layers:
            raise NotDecodableError("its files are not complete safetensors files") from None
        raise
    check_layers(layers, tensors.headers)
    if layers and verify:
        check_contents(files, tensors.headers, section["format_version"], config)
    weights = Reader(sizes, config, layers, tensors).weights(section.get("embeddings"), path / "config.json")
    if left := tensors.headers.keys() - tensors.taken:
        raise NotDecodableError(f"it has a tensor {min(left)}")
    return Decodable(sizes, weights, generation, str(path), threads)


def read_dense_config(path: Path) -> dict[str, Any]:
    """config.json of an ordinary model."""
    try:
        config = read_json(path, "config.json")
    except CheckpointError as error:
        raise NotDecodableError("its config.json is damaged") from error
    if config.get("quantization_config"):
        raise NotDecodableError("it is quantised in some other way")
    return config


class Tensors:
    """The tensors of safetensors files, mapped into memory.

    Parameters
    ----------
    files : list of Path

    Raises
    ------
    CheckpointError
        If a file is missing, damaged or incomplete.
    """

    def __init__(self, files: list[Path]):
        self.headers = read_headers(files)  # which checks that every tensor lies within its file
        self.taken: set[str] = set()
        self.bytes: dict[str, np.ndarray] = {}
        for file in files:
            with open_errors(file):
                data = np.memmap(file, np.uint8, mode="r")
                for name, (first, last) in byte_ranges(file).items():
                    self.bytes[name] = np.asarray(data[first:last])
                    if len(self.bytes[name]) != self.headers[name].nbytes:
                        raise ValueError(f"tensor {name} is in two places")

    def take(self, name: str, shape: tuple[int, ...], *dtypes: str) -> np.ndarray:
        """A tensor as it lies in the map; bfloat16 as float32, and whatever is not aligned, copied.

        Raises
        ------
        NotDecodableError
            If there is none of this name, shape and one of these dtypes (by default floating-point ones).
        """
        header = self.headers.get(name)
        if header is None or header.shape != shape or header.dtype not in (dtypes or ("F16", "BF16", "F32")):
            raise NotDecodableError(f"it has no tensor {name} of shape {shape}")
        self.taken.add(name)
        array = self.bytes[name].view(DTYPES[header.dtype]).reshape(shape)
        if header.dtype == "BF16":
            bits = array.astype(np.uint32)
            bits <<= 16
            return bits.view(np.float32)
        return np.require(array, None, ["C", "ALIGNED"])


class Reader:
    """Brings a model's tensors into the decoder's order.

    Parameters
    ----------
    sizes : Architecture
    config : mapping
        config.json.
    layers : mapping
        Its entries for the packed layers.
    tensors : Tensors
    """

    def __init__(
        self, sizes: Architecture, config: Mapping[str, Any], layers: Mapping[str, dict[str, Any]], tensors: Tensors
    ):
        self.sizes, self.config, self.layers, self.tensors = sizes, config, layers, tensors

    def weights(self, embeddings: Any, where: Path) -> Weights:
        """All tensors, each of just the name and shape that the configuration asks for.

        embeddings : what the section of the configuration in the file `where` says of them, or None.
        """
        sizes, shapes = self.sizes, self.sizes.linear_shapes()
        if sizes.layers > len(self.tensors.headers):
            raise NotDecodableError(f"it has no {sizes.layers} layers")
        places = [f"model.layers.{at}." for at in range(sizes.layers)]
        known = {place + name for place in places for name in PROJECTIONS}
        if strange := self.layers.keys() - known:
            raise NotDecodableError(f"its layer {min(strange)} is packed")
        linears = [
            [self.linear(place + name, *shape) for name, shape in zip(PROJECTIONS, shapes, strict=True)]
            for place in places
        ]
        names = [place + name for place in places for name in NORMS] + ["model.norm"]
        norms = [self.tensors.take(f"{name}.weight", (sizes.hidden,)) for name in names]
        if embeddings is not None:
            check_embeddings(embeddings, sizes.hidden, where)
        embedding = self.rows("model.embed_tokens", embeddings)
        tied = self.config.get("tie_word_embeddings") if embeddings is None else embeddings.get("tied")
        if embeddings is None and "lm_head.weight" in self.tensors.headers:
            tied = False  # the head in the file is the head, whatever the configuration says
        if not isinstance(tied, bool):
            raise NotDecodableError("its configuration does not say whether embedding and head are tied")
        return Weights(linears, norms, embedding, embedding if tied else self.rows("lm_head", embeddings))

    def linear(self, name: str, d_out: int, d_in: int) -> Linear:
        """A linear layer, packed or dense."""
        entry, tensors = self.layers.get(name), self.tensors
        if entry is None:
            bias = tensors.take(f"{name}.bias", (d_out,)) if self.has_bias(name) else None
            return Linear(d_out, d_in, [], tensors.take(f"{name}.weight", (d_out, d_in)), bias)
        if (entry["d_out"], entry["d_in"]) != (d_out, d_in):
            raise NotDecodableError(f"its layer {name} has other sizes")
        paths = []
        for order, rank in enumerate(entry["ranks"]):
            wanted = packed_headers(d_out, d_in, rank)
            arrays = [tensors.take(f"{name}.paths.{order}.{key}", *header) for key, header in wanted.items()]
            check_path(f"{name}.paths.{order}", dict(zip(wanted, arrays, strict=True)))
            paths.append([*map(widened, arrays[:2]), *arrays[2:]])
        return Linear(d_out, d_in, paths, None, tensors.take(f"{name}.bias", (d_out,)) if entry["bias"] else None)

    def has_bias(self, name: str) -> bool:
        """Whether the configuration gives a linear layer a bias."""
        kind, attention = self.config["model_type"], ".self_attn." in name
        if kind == "qwen2":
            return name.endswith(("q_proj", "k_proj", "v_proj"))
        return kind == "llama" and self.config.get("attention_bias" if attention else "mlp_bias") is True

    def rows(self, name: str, embeddings: Mapping[str, Any] | None) -> Rows:
        """An embedding or head."""
        rows, size, take = self.sizes.vocabulary, self.sizes.hidden, self.tensors.take
        if embeddings is None:
            return Rows(take(f"{name}.weight", (rows, size)))
        bits, groups = embeddings["bits"], size // embeddings["group"]
        codes = take(f"{name}.table.codes", (rows, size * bits // 8), "I8" if bits == 8 else "U8")
        offset = take(f"{name}.table.offset", (rows, groups), "F16") if bits == 4 else None
        return Rows(codes, take(f"{name}.table.scale", (rows, groups), "F16"), offset)


def widened(words: np.ndarray) -> np.ndarray:
    """Words of 32 bits, which is all that the kernels read, with zeros for the bits that narrow ones lack."""
    return words.view(np.uint32) if words.itemsize == 4 else words.view(f"u{words.itemsize}").astype(np.uint32)
