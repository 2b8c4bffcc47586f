r"""Checkpoints: a directory with config.json, safetensors and the tokenizer's files. No pickle anywhere.

config.json is the model's own configuration plus a section `quantization_config`:

    {"quant_method": "littlebit", "format_version": 3, "bits": 0.55,
     "layers": {"model.layers.0.mlp.up_proj": {"d_out": 1536, "d_in": 576, "ranks": [70, 69], "bias": false}, ...}}

The tensors are in model.safetensors or, where that would be too large a file, in shards that
model.safetensors.index.json lists, as transformers does it. For each of those layers they hold
`LAYER.paths.K.{u_words,v_words,h,ell,g}`, whose shapes and dtypes follow from the layer's sizes and ranks (see
packing.py: rows of signs are U8, I16 or I32 words, the narrowest that hold a row); every other tensor of the model is
there as the model has it, in 16 bits. The section may also hold

    "embeddings": {"bits": 8, "group": 64, "tied": true}

and then the embedding and the head are tables of integers with scales (see embeddings.py), one if they are tied; and

    "fused": {"model.layers.0.self_attn.qkv_proj": [["q_proj", 576], ["k_proj", 192], ["v_proj", 192]], ...}

names the parts of layers that were split, with the rows of each; the parts are layers of their own, packed or dense;

    "shared": {"model.layers.1.mlp": "model.layers.0.mlp", ...}

names modules and parameters that are others', which are stored once, under the other name.

Versions of the format differ in the checksums alone. Files of version 1 have none; transformers writes such files
(`save_pretrained`). From version 2 on, the metadata of each safetensors file hold JSON under the key `checksums`. With
SHA-256 everywhere, and hexadecimal digits in lower case:

    digest(tensor) = hex of SHA-256(dtype + " " + shape + "\n" + the tensor's bytes in the file)
                     dtype as in the safetensors header (I32), shape as [1536, 18]
    json(value)    = JSON with sorted keys, separators ", " and ": ", \u escapes for all but ASCII, and numbers as
                     Python's json module writes them
    config         = hex of SHA-256(json(content of config.json))

Version 2 stores {"tensors": {name: digest, ...}, "config": config} with the digests of the file's own tensors.
Version 3 stores {"config": config, "set": set, "tensors": tags}, where

    set  = hex of SHA-256(json({"config": config, "tensors": {name: digest, ...}})), of all tensors in all files
    tag  = the first 8 bytes of SHA-256(name + " " + digest)
    tags = base64 of the tags of the file's own tensors, in ascending order

Every file thus knows the whole set, so that files of two checkpoints cannot be mixed; and the tags, 11 characters a
tensor, say which tensor changed.

Experts of a mixture (see experts.py) are layers with names such as `model.layers.0.mlp.experts.3.up_proj`. Where only
some projections of a block's experts are packed, the others are stored as `....3.down_proj.matrix` (and `.bias`).
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..models.packed_shapes import Header, layer_type
from ..models.quantize import tell_observers
from .fetch import locate_packed
from .format import (
    INDEX,
    OFFICIAL,
    check_contents,
    check_layers,
    damaged,
    is_official,
    packed_tensors,
    read_checksums,
    read_config,
    read_headers,
    weight_files,
)
from .loading import built, cast_dense, check_values, generation_config, read_tensors


def load(path: str | Path, device: str = "cpu", dtype: torch.dtype = torch.float32, verify: bool = True) -> nn.Module:
    """A model from a packed checkpoint; its quantised layers are PackedLinear, and no dense weight is ever made.

    The files may come from anyone: shapes, dtypes, ranks, words and sizes are checked against each other before
    anything is made of them, and nothing in them runs.

    Parameters
    ----------
    path : str or Path
        Directory that `save` wrote, the name of a shipped checkpoint ("smollm2-0.55bit"), a checkpoint of the authors'
        repository (see official.py), or the id of one of these on the Hugging Face hub.
    device : str
    dtype : torch.dtype
        Of the tensors that are not packed (embeddings, norms, head).
    verify : bool
        Whether the checksums of config.json and of all tensors are compared, where the checkpoint has any; all of the
        files are read for it.

    Returns
    -------
    transformers model in eval mode.

    Raises
    ------
    CheckpointError
        If the directory is not a complete, consistent checkpoint; the file, layer or tensor is named.
    """
    path = locate_packed(path)
    config, layers, tensors = read_checkpoint(path, verify)
    model = built(config, layers, tensors, dtype, path)
    model.name_or_path = str(path)  # type: ignore[assignment]
    model.generation_config = generation_config(path)  # type: ignore[assignment]
    tell_observers(model, config["quantization_config"])
    return cast_dense(model, dtype).to(device)


def verify(path: str | Path) -> dict[str, Any]:
    """Read a whole checkpoint and compare it with the checksums that were saved with it; no model is made.

    Parameters
    ----------
    path : str or Path
        As for `load`.

    Returns
    -------
    dict with `format` (see `info`), `tensors`, `tensor_bytes`, `checksums` (whether there are any; without them only
    headers, sizes and the values of packed layers are checked) and `damaged`, which names what is not as it was saved:
    tensors, config.json, or `headers.SET` if a tensor is missing.

    Raises
    ------
    CheckpointError
        If the directory is not a complete, consistent checkpoint, or its files come from several checkpoints.
    """
    path = locate_packed(path)
    wrong = []
    if is_official(path):
        config, headers, checksums = read_checkpoint(path)[0], read_headers(weight_files(path)), None
    else:
        config, layers = read_config(path)
        files = weight_files(path)
        headers, checksums = read_headers(files), read_checksums(files)
        check_layers(layers, headers)
        wrong = damaged(files, headers, config["quantization_config"]["format_version"], config)
        if not wrong:
            check_values(layers, read_tensors(files))
    return {
        "format": format_name(path, config),
        "tensors": len(headers),
        "tensor_bytes": sum(header.nbytes for header in headers.values()),
        "checksums": checksums is not None,
        "damaged": wrong,
    }


def read_checkpoint(
    path: Path, verify: bool = False
) -> tuple[dict[str, Any], dict[str, dict[str, Any]], dict[str, Tensor]]:
    """Configuration, packed layers and tensors, which fit each other; and are what was saved, if that is asked."""
    from .official import read_official

    if is_official(path):
        return read_official(path)
    config, layers = read_config(path)
    files = weight_files(path)
    headers = read_headers(files)
    check_layers(layers, headers)
    if verify:
        check_contents(files, headers, config["quantization_config"]["format_version"], config)
    tensors = read_tensors(files)
    check_values(layers, tensors)
    return config, layers, tensors


def info(path: str | Path) -> dict[str, Any]:
    """What a checkpoint really stores, counted from the headers of its files.

    Parameters
    ----------
    path : str or Path
        As for `load`.

    Returns
    -------
    dict with `bits_per_weight` (stored bits of the packed layers over their weights), `target_bits`, `weights`,
    `linear_bytes` (packed layers, biases excepted), `file_bytes` (all of the safetensors files), `embedding_bits`
    (16, 8 or 4), `other_bytes` (all tensors but packed layers), `description_bytes` (what describes the tensors: the
    headers of the safetensors files with names and checksums, config.json and the index of shards),
    `described_bits_per_weight` (the same as `bits_per_weight` with those bytes), `file_bits_per_parameter` (whole
    file), `layers`, by kind of layer `kinds`, `format` ("official" for the authors'), `checksums` (whether there
    are any) and, for the authors' format, `kv_factor`.

    Raises
    ------
    CheckpointError
        If the directory is not a complete, consistent checkpoint.
    """
    from .official import official_header

    path = locate_packed(path)
    if is_official(path):
        files = weight_files(path)
        headers = read_headers(files)
        config, layers, owners = official_header(path, headers)
    else:
        config, layers = read_config(path)
        files = weight_files(path)
        headers = read_headers(files)
        check_layers(layers, headers)
        owners = {name: layer for layer, name, _ in packed_tensors(layers)}
    sizes = {name: header.nbytes for name, header in headers.items()}
    file_bytes = sum(file.stat().st_size for file in files)
    beside = sum(file.stat().st_size for file in map(path.joinpath, ("config.json", INDEX, OFFICIAL)) if file.exists())
    description_bytes = file_bytes - sum(sizes.values()) + beside
    kinds: dict[str, dict[str, Any]] = {}
    for name, layer in owners.items():
        kind = kinds.setdefault(layer_type(layer), {"layers": 0, "weights": 0, "linear_bytes": 0})
        kind["linear_bytes"] += sizes[name]
    for layer, entry in layers.items():
        kind = kinds[layer_type(layer)]
        kind["layers"] += 1
        kind["weights"] += entry["d_out"] * entry["d_in"]
    for kind in kinds.values():
        kind["bits_per_weight"] = 8 * kind["linear_bytes"] / kind["weights"]
    described = config["quantization_config"].get("embeddings")
    weights = sum(kind["weights"] for kind in kinds.values())
    linear_bytes = sum(kind["linear_bytes"] for kind in kinds.values())
    return {
        "bits_per_weight": 8 * linear_bytes / weights,
        "target_bits": config["quantization_config"].get("bits"),
        "weights": weights,
        "linear_bytes": linear_bytes,
        "file_bytes": file_bytes,
        "embedding_bits": described["bits"] if isinstance(described, dict) and "bits" in described else 16,
        "other_bytes": sum(sizes.values()) - linear_bytes,
        "description_bytes": description_bytes,
        "described_bits_per_weight": 8 * (linear_bytes + description_bytes) / weights,
        "file_bits_per_parameter": 8 * file_bytes / (weights + other_parameters(headers, owners)),
        "layers": len(layers),
        "kinds": kinds,
        "model_type": config.get("model_type"),
        "format": format_name(path, config),
        "checksums": read_checksums(files) is not None,
        "kv_factor": config["quantization_config"].get("kv_factor"),
    }


def format_name(path: Path, config: Mapping[str, Any]) -> str:
    """The format of a checkpoint, as `info` says it."""
    return "official" if is_official(path) else f"littlebit {config['quantization_config']['format_version']}"


def other_parameters(headers: Mapping[str, Header], owners: Mapping[str, str]) -> int:
    """How many parameters the tensors outside the packed layers stand for."""
    bits = {"I8": 8, "U8": 4}  # codes of an embedding
    return sum(
        8 * math.prod(header.shape) // bits.get(header.dtype, 8)
        for name, header in headers.items()
        if name not in owners and not name.endswith(("table.scale", "table.offset"))
    )
