"""Read and write the packed layers of a checkpoint with NumPy and the standard library.

The page "The packed format" of the book specifies what stands here.
"""

import base64
import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from littlebit.reference import PackedFactors

from . import exact

Layers = dict[str, tuple[list[PackedFactors], np.ndarray | None]]  # name -> paths and bias

VERSIONS = (1, 2, 3)
TYPES = {
    **{"F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "|i1", "U8": "|u1"},
    **{"BOOL": "|b1"},
}
NAMES = {np.dtype(dtype): name for name, dtype in TYPES.items()} | {np.dtype("<u2"): "I16", np.dtype("<u4"): "I32"}


def read_layers(folder: Path) -> Layers:
    """Read the packed layers of a checkpoint.

    Parameters
    ----------
    folder : Path
        Holds config.json and safetensors files.

    Returns
    -------
    dict of layer name to (list of PackedFactors, bias or None); words are unsigned.

    Raises
    ------
    ValueError
        If the version is unknown, a checksum differs, or a tensor does not have the shape and dtype that config.json
        asks for.
    """
    folder = Path(folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    section = config["quantization_config"]
    if section["quant_method"] != "littlebit" or section["format_version"] not in VERSIONS:
        raise ValueError(f"{folder}: format_version must be one of {VERSIONS}, got {section['format_version']!r}")
    files = [folder / "model.safetensors"]
    if (folder / "model.safetensors.index.json").exists():
        index = json.loads((folder / "model.safetensors.index.json").read_text(encoding="utf-8"))
        files = [folder / name for name in sorted(set(index["weight_map"].values()))]
    parts = [read_safetensors(file) for file in files]
    check_sums(section["format_version"], config, parts)
    tensors = {name: array for part, _ in parts for name, array in part.items()}
    layers: Layers = {}
    for name, entry in section["layers"].items():
        if not all(1 <= rank <= min(entry["d_out"], entry["d_in"]) for rank in entry["ranks"]):
            raise ValueError(f"layer {name}: ranks must be from 1 to min(d_out, d_in), got {entry}")
        paths = [read_path(tensors, f"{name}.paths.{k}", entry, rank) for k, rank in enumerate(entry["ranks"])]
        layers[name] = paths, tensors[f"{name}.bias"] if entry["bias"] else None
    return layers


def read_path(tensors: Mapping[str, np.ndarray], prefix: str, entry: Mapping[str, Any], rank: int) -> PackedFactors:
    """Return one path, after checking shapes, dtypes and pad bits."""
    sizes, coded = {"h": entry["d_out"], "ell": rank, "g": entry["d_in"]}, entry.get("scale_bits", 16) == 8
    wanted = {
        "u_words": exact.pack(np.ones((entry["d_out"], rank))),
        "v_words": exact.pack(np.ones((rank, entry["d_in"]))),
        **{name: np.zeros(size, np.uint8 if coded else np.float16) for name, size in sizes.items()},
        **({"peaks": np.zeros(3, np.float16)} if coded else {}),
    }
    found = {}
    for field, like in wanted.items():
        if f"{prefix}.{field}" not in tensors:
            raise ValueError(f"tensor {prefix}.{field} is missing")
        array = tensors[f"{prefix}.{field}"]
        array = array.view(like.dtype) if like.dtype.kind == "u" and array.itemsize == like.itemsize else array
        if (array.shape, array.dtype) != (like.shape, like.dtype):
            raise ValueError(
                f"tensor {prefix}.{field} must be {like.shape} {like.dtype}, got {array.shape} {array.dtype}"
            )
        found[field] = array
    for field, count in (("u_words", rank), ("v_words", entry["d_in"])):
        if (exact.pack(exact.unpack(found[field], count)) != found[field]).any():
            raise ValueError(f"tensor {prefix}.{field}: a pad bit is set")
    if coded:
        for name, peak in zip(sizes, found.pop("peaks"), strict=True):
            found[name] = (found[name] * (np.float32(peak) / np.float32(255))).astype(np.float16)
    return PackedFactors(**found)


def read_safetensors(file: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Read a safetensors file: its tensors, BF16 left out, and its metadata."""
    data = file.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    metadata, tensors = header.pop("__metadata__", {}), {}
    for name, entry in header.items():
        if entry["dtype"] in TYPES:
            first, end = (8 + size + at for at in entry["data_offsets"])
            tensors[name] = np.frombuffer(data[first:end], TYPES[entry["dtype"]]).reshape(entry["shape"])
    return tensors, metadata


def write_safetensors(file: Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    body = b""
    for name, array in tensors.items():
        octets = array.tobytes()
        entry = {"dtype": NAMES[array.dtype], "shape": list(array.shape)}
        header[name] = entry | {"data_offsets": [len(body), len(body) + len(octets)]}
        body += octets
    text = json.dumps(header, separators=(",", ":")).encode()
    text = text.ljust(-(-len(text) // 8) * 8)
    file.write_bytes(len(text).to_bytes(8, "little") + text + body)


def write_layers(folder: Path, layers: Layers, version: int = VERSIONS[-1], sharded: bool = False) -> None:
    """Write packed layers as a checkpoint, in any version of the format.

    Parameters
    ----------
    folder : Path
        Made if it does not exist.
    layers : dict of layer name to (list of PackedFactors, bias or None)
    version : int
    sharded : bool
        Write two files and their index instead of one file.
    """
    folder = Path(folder)
    folder.mkdir(exist_ok=True)
    entries, tensors = {}, {}
    for name, (paths, bias) in layers.items():
        for k, path in enumerate(paths):
            tensors |= {f"{name}.paths.{k}.{field}": array for field, array in path._asdict().items()}
        if bias is not None:
            tensors[f"{name}.bias"] = bias
        ranks, d_out, d_in = [path.rank for path in paths], len(paths[0].h), len(paths[0].g)
        entries[name] = {"d_out": d_out, "d_in": d_in, "ranks": ranks, "bias": bias is not None}
    section = {"quant_method": "littlebit", "format_version": version, "bits": 8, "layers": entries}
    config = {"quantization_config": section}
    (folder / "config.json").write_text(json.dumps(config, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    parts = [tensors]
    files = ["model.safetensors"]
    if sharded:
        names = list(tensors)
        parts = [
            {name: tensors[name] for name in each} for each in (names[: len(names) // 2], names[len(names) // 2 :])
        ]
        files = [f"model-{at}-of-00002.safetensors" for at in ("00001", "00002")]
        places = {name: file for file, part in zip(files, parts, strict=True) for name in part}
        index = {"metadata": {"total_size": sum(each.nbytes for each in tensors.values())}, "weight_map": places}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
    sums = [{} for _ in parts] if version == 1 else checksums(version, config, tensors, parts)
    for file, part, own in zip(files, parts, sums, strict=True):
        metadata = {"format": "pt"} | ({"checksums": json.dumps(own, sort_keys=True)} if own else {})
        write_safetensors(folder / file, part, metadata)


def copy_damaged(source: Path, target: Path, file: str, at: int, bit: int) -> None:
    """Copy a checkpoint and flip one bit of a file, counted from the end of the file."""
    shutil.copytree(source, target)
    data = bytearray((target / file).read_bytes())
    data[-1 - at] ^= 1 << bit
    (target / file).write_bytes(data)


def json_digest(value: Any) -> str:
    """Compute the SHA-256 of a value as JSON with sorted keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def tensor_digest(array: np.ndarray) -> str:
    """Compute the SHA-256 of a tensor's dtype, shape and bytes."""
    return hashlib.sha256(f"{NAMES[array.dtype]} {list(array.shape)}\n".encode() + array.tobytes()).hexdigest()


def checksums(
    version: int, config: Any, tensors: Mapping[str, np.ndarray], parts: Sequence[Mapping[str, np.ndarray]]
) -> list[dict[str, Any]]:
    """Compute what each file of a checkpoint stores about itself, in version 2 or 3."""
    digests = {name: tensor_digest(array) for name, array in tensors.items()}
    whole = json_digest(config)
    found = []
    for part in parts:
        if version == 2:
            found.append({"config": whole, "tensors": {name: digests[name] for name in part}})
            continue
        tags = sorted(hashlib.sha256(f"{name} {digests[name]}".encode()).digest()[:8] for name in part)
        total = json_digest({"config": whole, "tensors": digests})
        found.append({"config": whole, "set": total, "tensors": base64.b64encode(b"".join(tags)).decode()})
    return found


def check_sums(version: int, config: Any, parts: list[tuple[dict[str, np.ndarray], dict[str, str]]]) -> None:
    """Raise ValueError unless each file has the checksums that it stores; version 1 stores no checksum."""
    if version == 1:
        return
    tensors = {name: array for part, _ in parts for name, array in part.items()}
    wanted = checksums(version, config, tensors, [part for part, _ in parts])
    for (_, metadata), expected in zip(parts, wanted, strict=True):
        stored = json.loads(metadata.get("checksums", "{}"))
        wrong = [name for name, value in expected.items() if stored.get(name) != value]
        if wrong:
            raise ValueError(f"checksums differ ({', '.join(wrong)}): the checkpoint is damaged; copy it again")
