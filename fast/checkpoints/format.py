r"""Specify the packed checkpoint format; read its config.json and file headers, and check them against each other.

This header is the specification: it suffices to write another reader. `load`, `info`, `verify`, the transformers
plug-in and the torch-free decoder all read checkpoints through this module, which does not import torch.

**Files.** A checkpoint is a directory:

    config.json                    the model's transformers configuration, plus the section `quantization_config`
    model.safetensors              the tensors; or, if they are too large for one file,
    model-00001-of-0000N.safetensors, ... and model.safetensors.index.json, as transformers writes them
    generation_config.json, tokenizer files, quantization.json, training.jsonl (all optional; not part of the format)

safetensors stores tensors row-major and little-endian, after a JSON header with the dtype and shape of each.

**Section.** `quantization_config` of config.json:

    {"quant_method": "littlebit",
     "format_version": 3,
     "bits": 0.55,                    target bits per weight, or null; what is stored may be less
     "layers": {"model.layers.0.mlp.up_proj": {"d_out": 1536, "d_in": 576, "ranks": [70, 69], "bias": false}, ...},
     "embeddings": {"bits": 8, "group": 64, "tied": true},                                                (optional)
     "fused": {"model.layers.0.self_attn.qkv_proj": [["q_proj", 576], ["k_proj", 192], ["v_proj", 192]]}, (optional)
     "shared": {"model.layers.1.mlp": "model.layers.0.mlp"}}                                              (optional)

**Packed layers.** `layers` names each quantized linear layer. Its dense weight is not stored. `ranks` has one entry for
each path, the primary one first, and 1 <= rank <= min(d_out, d_in). The weight that path k stands for is

    W_k = diag(h) U diag(ell) V^T diag(g)         W = sum of W_k        (LittleBit, arXiv 2506.13771)

with U (d_out, rank) and V (d_in, rank) of entries -1 and +1. Path k of layer LAYER is stored as

    LAYER.paths.k.u_words    (d_out, ceil(rank / w))    row i packs the `rank` signs of row i of U
    LAYER.paths.k.v_words    (rank, ceil(d_in / w))     row i packs the `d_in` signs of column i of V
    LAYER.paths.k.h          (d_out,)   F16
    LAYER.paths.k.ell        (rank,)    F16
    LAYER.paths.k.g          (d_in,)    F16
    LAYER.bias               (d_out,)   F16, if "bias" is true

**8-bit scales.** If the entry of a layer has "scale_bits": 8, its scales are not negative, and each is a multiple of a
255th of the largest scale of its vector:

    LAYER.paths.k.h, .ell, .g   U8     codes
    LAYER.paths.k.peaks         (3,)   F16, the largest scale of h, of ell and of g

    scale = float16(code * (peak / 255)), in float32 until the last rounding

**Signs.** A row of n signs is packed into words of w bits: w = 8 if n <= 8, w = 16 if n <= 16, else w = 32. Sign j is
bit j % w, the least significant bit being bit 0, of word j // w. Bit 1 means -1, bit 0 means +1. The bits after sign
n - 1, the pad bits, are 0. The dtype in the file is U8, I16 or I32; signed words hold the bits of the unsigned ones.

**Quantized embeddings.** With "embeddings", the input embedding EMBED and the output head HEAD are stored as integers,
in `EMBED.table` and `HEAD.table`, or in `EMBED.table` alone if "tied" is true. `group`, 32 or 64, entries of a row of
`size` entries share a scale:

    8 bits:  .codes (rows, size) I8, .scale (rows, size / group) F16         entry = scale code, codes -127 to 127
    4 bits:  .codes (rows, size / 2) U8, .scale and .offset (rows, size / group) F16
             entry = offset + scale code, codes 0 to 15. Of each 32 entries, byte b of 16 holds entry b in its low four
             bits and entry b + 16 in its high four bits.

**Fused and shared layers.** "fused" lists linear layers of the model that were split before quantization: the names of
the parts, in order, and the output rows of each. The parts are layers LAYER.PART, packed or dense. "shared" maps a
module or parameter to another that it is identical to; only the latter is stored.

**All other tensors** (norms, biases, dense embeddings, excluded layers) have the names of the transformers model.
`save` writes floats as F16; readers accept other float dtypes. The experts of a mixture are layers such as
`model.layers.0.mlp.experts.3.up_proj`. If only some projections of a block's experts are packed, the others are stored
as `....3.down_proj.matrix` and `.bias`.

**Versions** differ in their checksums alone: version 1 has none, checksums.py specifies versions 2 and 3. transformers'
own `save_pretrained` writes version 1. `save` writes FORMAT_VERSION. Readers of littlebit 0.1 refuse 8-bit scales.

**Untrusted files.** Nothing in a checkpoint runs, there is no pickle, and nothing is believed before it is checked.
Only ordinary files inside the directory are opened. JSON and headers are bounded in size; tensors are memory-mapped,
never larger than their file. Every error is a CheckpointError that names the file, layer or tensor.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open

from ..bits import SCALE_BITS
from ..files.untrusted import JSON_BYTES, CheckpointError, open_errors, read_json, resolve_inside
from ..models.packed_shapes import ITEM_BYTES, Header, packed_headers

#: The version that `save` writes; checksums.py specifies how the versions differ.
FORMAT_VERSION = 3
NO_CHECKSUMS = 1
PER_TENSOR_CHECKSUMS = 2
FORMATS = (NO_CHECKSUMS, PER_TENSOR_CHECKSUMS, FORMAT_VERSION)

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
OFFICIAL = "littlebit_config.json"  # only checkpoints of the authors' repository have it

#: Most entries of a tensor; a dimension of size 0 counts as 1.
MOST_ENTRIES = 1 << 48


def is_checkpoint(path: Path) -> bool:
    """Tell whether a directory is a packed LittleBit checkpoint, by its config.json."""
    try:
        return read_json(path, "config.json")["quantization_config"]["quant_method"] == "littlebit"
    except (ValueError, KeyError, TypeError):
        return False


def is_official(path: Path) -> bool:
    """Tell whether a directory is a checkpoint of the authors' repository (see official.py)."""
    return (path / OFFICIAL).is_file()


def read_config(path: Path) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Read and check config.json; return it and its `layers`.

    Raises
    ------
    CheckpointError
        If it does not describe a packed checkpoint of a known version.
    """
    config = read_json(path, "config.json")
    return config, read_layers(config.get("quantization_config"), path / "config.json")


def read_layers(described: Any, where: Path | str) -> dict[str, dict[str, Any]]:
    """Check a `quantization_config`, and return its `layers`; `where` names it in errors."""
    if described is None:
        raise CheckpointError(
            f"{where} describes a dense model, not a packed checkpoint: make one with littlebit quantize MODEL OUT"
        )
    try:
        if described["quant_method"] != "littlebit":
            raise CheckpointError(
                f"{where}: quant_method must be 'littlebit', got {described['quant_method']!r}: load this model with "
                "the library that quantized it"
            )
        version, layers = described["format_version"], described["layers"]
    except (KeyError, TypeError) as error:
        raise CheckpointError(
            f"{where}: 'quantization_config' must have 'quant_method', 'format_version' and 'layers' ({error!r}); "
            "copy or download it again"
        ) from error
    if type(version) is not int or version not in FORMATS:
        known = ", ".join(map(str, FORMATS))
        raise CheckpointError(f"{where}: format_version must be one of {known}, got {version!r}; update littlebit")
    check_bits(described.get("bits"), "bits", where)
    if not isinstance(layers, dict) or not layers:
        raise CheckpointError(f"{where}: 'layers' must name at least one layer")
    for name, entry in layers.items():
        check_entry(where, name, entry)
    return layers


def check_bits(bits: Any, name: str, where: Path | str) -> None:
    """Raise CheckpointError unless target bits per weight are null or a positive, finite number."""
    if bits is not None and (type(bits) not in (int, float) or not 0 < bits < math.inf):
        raise CheckpointError(f"{where}: {name!r} must be a positive number of bits or null, got {bits!r}")


def check_entry(file: Path | str, name: str, entry: Any) -> None:
    """Raise CheckpointError unless an entry of `layers` has positive sizes, feasible ranks and a flag for the bias."""

    def positive(value: Any, most: float = float("inf")) -> bool:
        return type(value) is int and 1 <= value <= most

    good = isinstance(entry, dict) and set(entry) - {"scale_bits"} == {"d_out", "d_in", "ranks", "bias"}
    good = good and entry.get("scale_bits", SCALE_BITS) in (8, 16)
    good = good and positive(entry["d_out"]) and positive(entry["d_in"]) and isinstance(entry["bias"], bool)
    good = good and isinstance(entry["ranks"], list) and len(entry["ranks"]) > 0
    if not good or not all(positive(rank, min(entry["d_out"], entry["d_in"])) for rank in entry["ranks"]):
        raise CheckpointError(
            f"{file}: layer {name} must have 'd_out' and 'd_in' of at least 1, 'ranks' from 1 to the smaller of them, "
            f"'bias', true or false, and 'scale_bits', 16 or 8 or left out; got {entry!r}"
        )


def weight_files(path: Path) -> list[Path]:
    """List the safetensors files of a checkpoint: model.safetensors, or the shards that its index names.

    Raises
    ------
    CheckpointError
        If a file is missing, or is not inside the directory.
    """
    if not (path / INDEX).exists():
        return [resolve_inside(path, WEIGHTS)]
    try:
        names = sorted(set(read_json(path, INDEX)["weight_map"].values()))
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path / INDEX} is damaged ({error!r}); copy or download it again") from error
    if not names or not all(isinstance(name, str) for name in names):
        raise CheckpointError(f"{path / INDEX} must name files beside it, got {names[:3]}; download it again")
    return [resolve_inside(path, name) for name in names]


def read_headers(files: Sequence[Path]) -> dict[str, Header]:
    """Read the shape and dtype of every tensor in safetensors files, without reading the tensors.

    Raises
    ------
    CheckpointError
        If a file is corrupt, or two files hold a tensor of the same name.
    """
    headers: dict[str, Header] = {}
    for file in files:
        with open_errors(file):
            check_size(file)
            with safe_open(file, framework="numpy") as opened:
                for name in opened.keys():  # noqa: SIM118 (not a dict)
                    tensor = opened.get_slice(name)
                    header = Header(tuple(tensor.get_shape()), tensor.get_dtype())
                    check_header(name, header, headers)
                    headers[name] = header
    return headers


def check_size(file: Path) -> None:
    """Raise ValueError if a safetensors file claims a header of more than JSON_BYTES."""
    with file.open("rb") as opened:
        claimed = int.from_bytes(opened.read(8), "little")
    if claimed > JSON_BYTES:
        raise ValueError(f"it claims a header of {claimed:,} bytes, more than {JSON_BYTES:,}")


def check_header(name: str, header: Header, seen: Mapping[str, Header]) -> None:
    """Raise ValueError unless a tensor's dtype is supported, its shape is plausible, and its name is new.

    A tensor with a dimension of 0 takes no bytes, so its other dimensions can be anything; torch would overflow.
    """
    if header.dtype not in ITEM_BYTES:
        raise ValueError(f"the dtype of tensor {name} must be one of {', '.join(ITEM_BYTES)}, got {header.dtype}")
    if math.prod(max(size, 1) for size in header.shape) > MOST_ENTRIES:
        raise ValueError(f"tensor {name} claims the shape {list(header.shape)[:4]}")
    if name in seen:
        raise ValueError(f"another file holds a tensor {name} too")


def byte_ranges(file: Path) -> dict[str, tuple[int, int]]:
    """Return the first byte and the end of each tensor in a safetensors file, by name.

    `read_headers` must have checked the file before.
    """
    with file.open("rb") as opened:
        size = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(size))
    header.pop("__metadata__", None)
    return {name: tuple(8 + size + at for at in entry["data_offsets"]) for name, entry in header.items()}


def order_metadata(file: Path) -> None:
    """Sort the metadata in a safetensors file's header, whose order would differ between processes."""
    with file.open("r+b") as opened:
        size = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        opened.seek(8)
        opened.write(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8").ljust(size))


def check_layers(layers: Mapping[str, dict[str, Any]], headers: Mapping[str, Header]) -> None:
    """Raise CheckpointError unless the files hold every tensor of the packed layers, with its shape and dtype."""
    for layer, name, wanted in packed_tensors(layers):
        if name not in headers:
            raise CheckpointError(f"layer {layer}: tensor {name} is missing from the checkpoint")
        found = headers[name]
        if found != wanted:
            raise CheckpointError(
                f"layer {layer}: tensor {name} is {found.shape} {found.dtype}, but config.json asks for "
                f"{wanted.shape} {wanted.dtype}; it is damaged, or another version of littlebit wrote it: quantize the "
                "model again"
            )


def packed_tensors(layers: Mapping[str, dict[str, Any]]) -> Iterator[tuple[str, str, Header]]:
    """Yield (layer, tensor name, header) for every tensor of the packed layers, except biases."""
    for layer, entry in layers.items():
        for k in range(len(entry["ranks"])):
            for field, header in path_headers(entry, k).items():
                yield layer, f"{layer}.paths.{k}.{field}", header


def path_headers(entry: Mapping[str, Any], k: int) -> dict[str, Header]:
    """Return the header of each tensor of path `k` of a packed layer, by its field, from the layer's entry."""
    return packed_headers(entry["d_out"], entry["d_in"], entry["ranks"][k], entry.get("scale_bits", SCALE_BITS))


def check_path(prefix: str, arrays: Mapping[str, np.ndarray]) -> None:
    """Raise CheckpointError unless the scales of a packed path are finite and its pad bits are 0.

    Parameters
    ----------
    prefix : str
        LAYER.paths.k, with which the names of its tensors begin.
    arrays : mapping of str to array
        Its tensors, with the shapes and dtypes of `packed_headers`.
    """
    signs = {"u_words": len(arrays["ell"]), "v_words": len(arrays["g"])}
    for field, array in arrays.items():
        wrong = None
        if field in signs:
            wrong = "a pad bit is set" if has_pad_bits(array, signs[field]) else None
        elif not np.isfinite(array).all():
            wrong = "it holds NaN or infinity"
        if wrong:
            raise CheckpointError(f"tensor {prefix}.{field} is damaged ({wrong}); copy the file again")


def has_pad_bits(words: np.ndarray, count: int) -> bool:
    """Tell whether any pad bit is set in rows of packed words that hold `count` signs each."""
    width = 8 * words.itemsize
    used = count - (words.shape[-1] - 1) * width  # bits of the last word
    last = words.view(f"u{words.itemsize}")[..., -1]
    return used < width and bool((last >> last.dtype.type(used)).any())


def check_embeddings(described: Any, size: int, where: Path | str) -> None:
    """Raise CheckpointError unless 'embeddings' describes a quantized embedding with rows of `size` entries."""
    if not isinstance(described, dict) or described.get("bits") not in (8, 4) or described.get("group") not in (32, 64):
        raise CheckpointError(f"{where}: 'embeddings' must have 'bits' 8 or 4 and 'group' 32 or 64, got {described!r}")
    if size % described["group"]:
        raise CheckpointError(
            f"{where}: the 'group' of 'embeddings' must divide the row size {size}, got {described['group']}"
        )
