"""What a checkpoint says of itself, without torch: config.json and the headers of its safetensors files, checked.

checkpoint.py says what they hold. Everything that reads a checkpoint reads them here: `load` and `info`, transformers'
plug-in, and the decoder that maps the tensors into memory.
"""

import contextlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open

from .bits import word_width

FORMAT_VERSION = 1
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
OFFICIAL = "littlebit_config.json"  # what only a checkpoint of the authors' repository has

#: Bytes of an element, by the name of its dtype in a safetensors header; other dtypes are not read.
ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "BOOL": 1, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1}
WORD_TYPES = {8: "U8", 16: "I16", 32: "I32"}  # of packed words, by their bits


class CheckpointError(ValueError):
    """A checkpoint that cannot be read as what it claims to be."""


class Header(NamedTuple):
    """What a file says about a tensor before the tensor is read.

    Attributes
    ----------
    shape : tuple of int
    dtype : str
        The name that it has in the file, one of `ITEM_BYTES`.
    """

    shape: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        """Bytes that the tensor takes."""
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


def is_checkpoint(path: Path) -> bool:
    """Whether a directory's config.json says that it is a LittleBit checkpoint."""
    try:
        return json.loads((path / "config.json").read_text())["quantization_config"]["quant_method"] == "littlebit"
    except (OSError, ValueError, KeyError, TypeError):
        return False


def is_official(path: Path) -> bool:
    """Whether a folder holds a checkpoint of the authors' repository (see official.py)."""
    return (path / OFFICIAL).is_file()


def read_config(path: Path) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """config.json and its entries for the packed layers, checked."""
    file = path / "config.json"
    try:
        config = json.loads(file.read_text())
        described = config["quantization_config"]
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is not a checkpoint: there is no config.json") from error
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{file} is not the configuration of a LittleBit checkpoint: {error!r}") from error
    return config, read_layers(described, file)


def read_layers(described: Any, where: Path | str) -> dict[str, dict[str, Any]]:
    """The packed layers that a `quantization_config` describes, checked."""
    try:
        method, version, layers = (described[key] for key in ("quant_method", "format_version", "layers"))
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{where} is not the configuration of a LittleBit checkpoint: {error!r}") from error
    if method != "littlebit":
        raise CheckpointError(f"{where}: quant_method is {method!r}, not 'littlebit'")
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{where}: format_version is {version!r}, but this version of littlebit reads {FORMAT_VERSION}; update it"
        )
    if not isinstance(layers, dict) or not layers:
        raise CheckpointError(f"{where}: 'layers' must name at least one layer")
    for name, entry in layers.items():
        check_entry(where, name, entry)
    return layers


def check_entry(file: Path | str, name: str, entry: Any) -> None:
    """Raise CheckpointError unless a layer's entry holds positive sizes, feasible ranks and a flag for the bias."""

    def whole(value: Any, most: float = float("inf")) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= most

    good = isinstance(entry, dict) and set(entry) == {"d_out", "d_in", "ranks", "bias"}
    good = good and whole(entry["d_out"]) and whole(entry["d_in"]) and isinstance(entry["bias"], bool)
    good = good and isinstance(entry["ranks"], list) and len(entry["ranks"]) > 0
    if not good or not all(whole(rank, min(entry["d_out"], entry["d_in"])) for rank in entry["ranks"]):
        raise CheckpointError(f"{file}: layer {name} has the entry {entry!r}, which describes no layer")


def read_headers(files: Sequence[Path]) -> dict[str, Header]:
    """Shape and dtype of every tensor in some safetensors files; the tensors themselves are not read."""
    headers = {}
    for file in files:
        with readable(file), safe_open(file, framework="numpy") as opened:
            for name in opened.keys():  # noqa: SIM118 (not a dict)
                part = opened.get_slice(name)
                header = Header(tuple(part.get_shape()), part.get_dtype())
                if header.dtype not in ITEM_BYTES:
                    raise ValueError(f"tensor {name} has the dtype {header.dtype}, which is not read here")
                headers[name] = header
    return headers


def weight_files(path: Path) -> list[Path]:
    """The safetensors files of a checkpoint: one, or the shards that its index lists."""
    if not (path / INDEX).exists():
        return [path / WEIGHTS]
    try:
        names = sorted(set(json.loads((path / INDEX).read_text())["weight_map"].values()))
        files = [path / name for name in names]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path / INDEX} is damaged ({error!r}); copy or download it again") from error
    if not files or any(file.parent != path for file in files):
        raise CheckpointError(f"{path / INDEX} must name files beside it, not {names}")
    return files


@contextlib.contextmanager
def readable(file: Path) -> Iterator[None]:
    """Turns what goes wrong when a safetensors file is read into a CheckpointError that names it."""
    try:
        yield
    except FileNotFoundError as error:
        raise CheckpointError(f"{file.parent} is not a checkpoint: there is no {file.name}") from error
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{file} is damaged or incomplete ({error}); copy or download it again") from error


def check_layers(layers: Mapping[str, dict[str, Any]], headers: Mapping[str, Header]) -> None:
    """Raise CheckpointError unless every packed layer has its tensors, in the right shapes and dtypes."""
    for layer, name, wanted in packed_tensors(layers):
        if name not in headers:
            raise CheckpointError(f"layer {layer}: tensor {name} is missing from the checkpoint")
        found = headers[name]
        if found != wanted:
            raise CheckpointError(
                f"layer {layer}: tensor {name} is {found.shape} {found.dtype}, but config.json asks for "
                f"{wanted.shape} {wanted.dtype}; it is damaged, or another version of littlebit wrote it: quantise the "
                "model again"
            )


def packed_tensors(layers: Mapping[str, dict[str, Any]]) -> Iterator[tuple[str, str, Header]]:
    """(layer, tensor name, shape and dtype) of every tensor that the packed layers store, biases excepted."""
    for layer, entry in layers.items():
        for order, rank in enumerate(entry["ranks"]):
            for kind, header in packed_headers(entry["d_out"], entry["d_in"], rank).items():
                yield layer, f"{layer}.paths.{order}.{kind}", header


def packed_headers(d_out: int, d_in: int, rank: int) -> dict[str, Header]:
    """Shape and dtype of each tensor of a packed path, by its name in PackedFactors.

    Examples
    --------
    >>> packed_headers(64, 96, 16)["u_words"], packed_headers(64, 96, 16)["v_words"]
    (Header(shape=(64, 1), dtype='I16'), Header(shape=(16, 3), dtype='I32'))
    """

    def words(rows: int, count: int) -> Header:
        width = word_width(count)
        return Header((rows, -(-count // width)), WORD_TYPES[width])

    scales = {"h": d_out, "ell": rank, "g": d_in}
    return {
        "u_words": words(d_out, rank),
        "v_words": words(rank, d_in),
        **{name: Header((size,), "F16") for name, size in scales.items()},
    }


def check_embeddings(described: Any, size: int, where: Path | str) -> None:
    """Raise CheckpointError unless `embeddings` of a section describes tables with rows of `size` entries."""
    if not isinstance(described, dict) or described.get("bits") not in (8, 4) or described.get("group") not in (32, 64):
        raise CheckpointError(f"{where}: 'embeddings' is {described!r}, which describes no embedding")
    if size % described["group"]:
        raise CheckpointError(f"{where}: groups of {described['group']} do not divide rows of {size}")
