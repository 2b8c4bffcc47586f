"""Map a checkpoint's files into memory for the compiled CPU decoder, without torch, transformers or copies.

Importing torch takes 240 MB before any weight is read. Here NumPy maps the safetensors files, and the kernels read
packed words, scales and tables directly in the map. Pages that are never read, such as the embedding's rows of other
tokens, never occupy memory. Only norms, biases and scales of tables (which the kernels want in float32), narrow words
and bfloat16 tensors are copied.

Files are checked as `load` checks them. A file with any name or number that this module does not know is left to
`load`, which can read it or explain the error: nothing is guessed.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ...reference.packing import decode_scale
from ..checkpoints.checksums import check_contents
from ..checkpoints.format import (
    byte_ranges,
    check_embeddings,
    check_layers,
    check_path,
    is_checkpoint,
    is_official,
    path_headers,
    read_config,
    read_headers,
    weight_files,
)
from ..files.untrusted import CheckpointError, open_errors, read_json
from ..models.generation_settings import parse_generation_config, read_generation_config
from ..models.packed_shapes import SCALES
from .architecture import NORMS, PROJECTIONS, Architecture, NotDecodableError, architecture
from .cpu_decoder import Decodable, EmbeddingArrays, Linear, Weights

#: safetensors dtype -> NumPy dtype; a bfloat16 number is the upper half of a float32 one.
DTYPES = {"F32": "<f4", "F16": "<f2", "BF16": "<u2", "I32": "<i4", "I16": "<i2", "I8": "i1", "U8": "u1"}


def map_model(path: Path, threads: int | None = None, verify: bool = True) -> Decodable:
    """Map a packed or dense model's files into memory, in the form that the compiled decoder runs.

    The files must not change while the model is in use: a process that reads past the end of a mapped file is killed.

    Parameters
    ----------
    path : Path
        Directory with config.json and safetensors files.
    threads : int, optional
        Threads that decoding may use; by default OMP_NUM_THREADS, or all cores.
    verify : bool
        Compare a packed checkpoint's checksums, which reads all files once.

    Raises
    ------
    NotDecodableError
        If the torch-free decoder does not support this model.
    CheckpointError
        If a packed checkpoint or its generation_config.json is corrupt; the message is the same as from `load`.
    """
    if is_official(path) or not (path / "config.json").is_file():
        raise NotDecodableError("it is not a directory of this project's, or transformers', format")
    config, layers = read_config(path) if is_checkpoint(path) else (read_dense_config(path), {})
    section = config.get("quantization_config") or {}
    if section.get("fused") or section.get("shared"):
        raise NotDecodableError("it has layers that were split or are shared")
    sizes, generation = architecture(config), parse_generation_config(read_generation_config(path))
    if generation.unsupported:
        raise NotDecodableError(f"its generation_config sets {generation.unsupported}")
    try:
        files = weight_files(path)
        tensors = MappedTensors(files)
    except CheckpointError:
        if not layers:
            raise NotDecodableError("its files are not complete safetensors files") from None
        raise
    check_layers(layers, tensors.headers)
    if layers and verify:
        check_contents(files, tensors.headers, section["format_version"], config)
    weights = WeightReader(sizes, config, layers, tensors).weights(section.get("embeddings"), path / "config.json")
    if left := tensors.headers.keys() - tensors.used:
        raise NotDecodableError(f"it has a tensor {min(left)}, which the decoder does not use")
    return Decodable(sizes, weights, generation, str(path), threads)


def read_dense_config(path: Path) -> dict[str, Any]:
    """Read the config.json of a model that is not quantized."""
    try:
        config = read_json(path, "config.json")
    except CheckpointError as error:
        raise NotDecodableError("its config.json is not readable JSON") from error
    if config.get("quantization_config"):
        raise NotDecodableError("it is quantized by another method")
    return config


class MappedTensors:
    """Map the tensors of safetensors files into memory.

    Parameters
    ----------
    files : list of Path

    Raises
    ------
    CheckpointError
        If a file is missing, corrupt or incomplete.
    """

    def __init__(self, files: list[Path]):
        self.headers = read_headers(files)  # checks that every tensor lies within its file
        self.used: set[str] = set()
        self.bytes: dict[str, np.ndarray] = {}
        for file in files:
            with open_errors(file):
                data = np.memmap(file, np.uint8, mode="r")
                for name, (first, last) in byte_ranges(file).items():
                    self.bytes[name] = np.asarray(data[first:last])
                    if len(self.bytes[name]) != self.headers[name].nbytes:
                        raise ValueError(
                            f"tensor {name} must have the length of its header: it is in two places of the file"
                        )

    def read(self, name: str, shape: tuple[int, ...], *dtypes: str) -> np.ndarray:
        """Return a tensor as a view of the map; copy it if it is bfloat16 (to float32) or not aligned.

        Parameters
        ----------
        name : str
        shape : tuple of int
        dtypes : str
            safetensors dtypes to accept; by default the floating-point ones.

        Raises
        ------
        NotDecodableError
            If no tensor has this name, shape and dtype.
        """
        header = self.headers.get(name)
        if header is None or header.shape != shape or header.dtype not in (dtypes or ("F16", "BF16", "F32")):
            raise NotDecodableError(f"it has no tensor {name} of shape {shape}")
        self.used.add(name)
        array = self.bytes[name].view(DTYPES[header.dtype]).reshape(shape)
        if header.dtype == "BF16":
            bits = array.astype(np.uint32)
            bits <<= 16
            return bits.view(np.float32)
        return np.require(array, None, ["C", "ALIGNED"])


class WeightReader:
    """Read a model's tensors in the order that the decoder needs.

    Parameters
    ----------
    sizes : Architecture
    config : mapping
        config.json.
    layers : mapping
        Layer name -> its entry in config.json, for each packed layer.
    tensors : MappedTensors
    """

    def __init__(
        self,
        sizes: Architecture,
        config: Mapping[str, Any],
        layers: Mapping[str, dict[str, Any]],
        tensors: MappedTensors,
    ):
        self.sizes, self.config, self.layers, self.tensors = sizes, config, layers, tensors

    def weights(self, embeddings: Any, where: Path) -> Weights:
        """Read all tensors, each with the name and shape that the configuration requires.

        Parameters
        ----------
        embeddings : mapping, optional
            The configuration's description of a quantized embedding and head.
        where : Path
            The configuration's file, for error messages.
        """
        sizes, shapes = self.sizes, self.sizes.linear_shapes()
        if sizes.layers > len(self.tensors.headers):
            raise NotDecodableError(f"it has fewer tensors than the {sizes.layers} layers of its configuration")
        prefixes = [f"model.layers.{layer}." for layer in range(sizes.layers)]
        known = {prefix + name for prefix in prefixes for name in PROJECTIONS}
        if unknown := self.layers.keys() - known:
            raise NotDecodableError(f"its layer {min(unknown)} is packed, and the decoder has no packed layer there")
        linears = [
            [self.linear(prefix + name, *shape) for name, shape in zip(PROJECTIONS, shapes, strict=True)]
            for prefix in prefixes
        ]
        names = [prefix + name for prefix in prefixes for name in NORMS] + ["model.norm"]
        norms = [self.tensors.read(f"{name}.weight", (sizes.hidden,)) for name in names]
        if embeddings is not None:
            check_embeddings(embeddings, sizes.hidden, where)
        embedding = self.table("model.embed_tokens", embeddings)
        tied = self.config.get("tie_word_embeddings") if embeddings is None else embeddings.get("tied")
        if embeddings is None and "lm_head.weight" in self.tensors.headers:
            tied = False  # transformers also prefers a head in the file to what the configuration says
        if not isinstance(tied, bool):
            raise NotDecodableError("its configuration does not say whether embedding and head are tied")
        return Weights(linears, norms, embedding, embedding if tied else self.table("lm_head", embeddings))

    def linear(self, name: str, d_out: int, d_in: int) -> Linear:
        """Read a linear layer, packed or dense."""
        entry, tensors = self.layers.get(name), self.tensors
        if entry is None:
            bias = tensors.read(f"{name}.bias", (d_out,)) if self.has_bias(name) else None
            return Linear(d_out, d_in, [], tensors.read(f"{name}.weight", (d_out, d_in)), bias)
        if (entry["d_out"], entry["d_in"]) != (d_out, d_in):
            raise NotDecodableError(
                f"its layer {name} must have shape ({d_out}, {d_in}), not ({entry['d_out']}, {entry['d_in']})"
            )
        paths = []
        for order in range(len(entry["ranks"])):
            wanted = path_headers(entry, order)
            arrays = {key: tensors.read(f"{name}.paths.{order}.{key}", *header) for key, header in wanted.items()}
            check_path(f"{name}.paths.{order}", arrays)
            scales = [arrays[key] for key in SCALES]
            if "peaks" in arrays:
                scales = list(map(decode_scale, scales, arrays["peaks"]))
            paths.append([widen_words(arrays["u_words"]), widen_words(arrays["v_words"]), *scales])
        return Linear(d_out, d_in, paths, None, tensors.read(f"{name}.bias", (d_out,)) if entry["bias"] else None)

    def has_bias(self, name: str) -> bool:
        """Decide from the configuration whether a dense linear layer has a bias."""
        model_type, attention = self.config["model_type"], ".self_attn." in name
        if model_type == "qwen2":
            return name.endswith(("q_proj", "k_proj", "v_proj"))
        return model_type == "llama" and self.config.get("attention_bias" if attention else "mlp_bias") is True

    def table(self, name: str, embeddings: Mapping[str, Any] | None) -> EmbeddingArrays:
        """Read an embedding or head, quantized where the configuration describes it."""
        rows, size, read = self.sizes.vocabulary, self.sizes.hidden, self.tensors.read
        if embeddings is None:
            return EmbeddingArrays(read(f"{name}.weight", (rows, size)))
        bits, groups = embeddings["bits"], size // embeddings["group"]
        codes = read(f"{name}.table.codes", (rows, size * bits // 8), "I8" if bits == 8 else "U8")
        offset = read(f"{name}.table.offset", (rows, groups), "F16") if bits == 4 else None
        return EmbeddingArrays(codes, read(f"{name}.table.scale", (rows, groups), "F16"), offset)


def widen_words(words: np.ndarray) -> np.ndarray:
    """Convert packed words of 8 or 16 bits to 32 bits, the width that the kernels read; the new bits are 0."""
    return words.view(np.uint32) if words.itemsize == 4 else words.view(f"u{words.itemsize}").astype(np.uint32)
