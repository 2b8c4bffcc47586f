"""Count the bits and bytes that a checkpoint stores, from the headers of its files."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..models.packed_shapes import Header, layer_type
from .checksums import read_checksums
from .format import INDEX, OFFICIAL, is_official


def storage(
    path: Path,
    config: Mapping[str, Any],
    layers: Mapping[str, Mapping[str, Any]],
    owners: Mapping[str, str],
    headers: Mapping[str, Header],
    files: Sequence[Path],
) -> dict[str, Any]:
    """Count a checkpoint's bits and bytes; see `checkpoint.info` for the keys.

    Parameters
    ----------
    path : Path
        The directory.
    config : mapping
        Content of config.json.
    layers : mapping
        `d_out` and `d_in` of each packed layer.
    owners : mapping of str to str
        The layer of each packed tensor, biases excluded.
    headers : mapping of str to Header
        Of all tensors.
    files : sequence of Path
        All safetensors files.
    """
    section = config["quantization_config"]
    kinds = count_kinds(layers, owners, headers)
    weights, linear_bytes = (sum(kind[key] for kind in kinds.values()) for key in ("weights", "linear_bytes"))
    tensor_bytes = sum(header.nbytes for header in headers.values())
    file_bytes = sum(file.stat().st_size for file in files)
    json_files = filter(Path.exists, map(path.joinpath, ("config.json", INDEX, OFFICIAL)))
    description_bytes = file_bytes - tensor_bytes + sum(file.stat().st_size for file in json_files)
    embeddings = section.get("embeddings")
    return {
        "bits_per_weight": 8 * linear_bytes / weights,
        "target_bits": section.get("bits"),
        "weights": weights,
        "linear_bytes": linear_bytes,
        "file_bytes": file_bytes,
        "embedding_bits": embeddings["bits"] if isinstance(embeddings, dict) and "bits" in embeddings else 16,
        "other_bytes": tensor_bytes - linear_bytes,
        "description_bytes": description_bytes,
        "described_bits_per_weight": 8 * (linear_bytes + description_bytes) / weights,
        "file_bits_per_parameter": 8 * file_bytes / (weights + other_parameters(headers, owners)),
        "layers": len(layers),
        "kinds": kinds,
        "model_type": config.get("model_type"),
        "format": format_name(path, config),
        "checksums": read_checksums(files) is not None,
        "kv_factor": section.get("kv_factor"),
    }


def count_kinds(
    layers: Mapping[str, Mapping[str, Any]], owners: Mapping[str, str], headers: Mapping[str, Header]
) -> dict[str, dict[str, Any]]:
    """Count layers, weights, bytes and bits per weight for each kind of layer, such as "q_proj"."""
    kinds: dict[str, dict[str, Any]] = {}
    for name, layer in owners.items():
        kind = kinds.setdefault(layer_type(layer), {"layers": 0, "weights": 0, "linear_bytes": 0})
        kind["linear_bytes"] += headers[name].nbytes
    for layer, entry in layers.items():
        kind = kinds[layer_type(layer)]
        kind["layers"] += 1
        kind["weights"] += entry["d_out"] * entry["d_in"]
    for kind in kinds.values():
        kind["bits_per_weight"] = 8 * kind["linear_bytes"] / kind["weights"]
    return kinds


def other_parameters(headers: Mapping[str, Header], owners: Mapping[str, str]) -> int:
    """Count the parameters outside the packed layers; two 4-bit codes of an embedding share a byte."""
    bits = {"I8": 8, "U8": 4}  # dtypes of an embedding's codes
    return sum(
        8 * math.prod(header.shape) // bits.get(header.dtype, 8)
        for name, header in headers.items()
        if name not in owners and not name.endswith(("table.scale", "table.offset"))
    )


def format_name(path: Path, config: Mapping[str, Any]) -> str:
    """Name a checkpoint's format as `info` does: "official", or "littlebit" and the version."""
    return "official" if is_official(path) else f"littlebit {config['quantization_config']['format_version']}"
