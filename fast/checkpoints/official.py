"""Read and write checkpoints of the authors' repository; only their file format is used, none of their code.

A checkpoint is a folder with the model's config.json, safetensors files and littlebit_config.json. A quantized layer
LAYER is stored as

    LAYER.U_packed, LAYER.V_packed   int32 words of 32 signs; bit 1 is -1, least significant bit first, rows padded
    LAYER.U_shape, LAYER.V_shape     two integers (rows, columns): (d_out, rank) and (rank, d_in)
    LAYER.u1, u2, v1, v2             scales: h = u1, ell = u2 * v1, g = v2
    LAYER.bias                       if the layer has one

The residual path has the same tensors with the suffix _R (U_R_packed, u1_R, ...). The unpacked variant has LAYER.U and
LAYER.V instead of words and shapes: latent weights, whose signs are used. Where u1 and u2, or v1 and v2, differ in
length, the length decides which is which.

Ranks are not stored. The authors' loader computes them (`bits.official_rank`) from `eff_bit`, `residual` and
`kv_factor` in littlebit_config.json. `kv_factor`, 1 by default, multiplies the ranks of k_proj and v_proj.

Every commit of their code reads the unpacked variant; not every commit reads packed words. The first one published
(SamsungLabs/LittleBit, bfc6e44) reads the unpacked variant only, and takes the settings from its command line. a071883
reads both, but its unpacker, in a public copy (kimwin2/LittleBit, 7f872f1), shifts words to the left, so that all signs
but one in 32 become +1. Later commits shift to the right and read both.
"""

import json
import math
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .._checks import LittleBitWarning
from ..bits import official_rank, official_rank_before_rounding
from ..files.atomic import atomic_directory
from ..files.untrusted import CheckpointError, read_json
from ..models.embeddings import settle_ties
from ..models.experts import has_experts
from ..models.layers import PackedLinear
from ..models.packed_shapes import Header
from ..models.shared import refuse_shared
from ..models.wrappers import without_adapters
from ..packing import PackedFactors, pack_signs, row_words, to_half, unpack_factors
from .format import NO_CHECKSUMS, OFFICIAL, check_bits, read_headers, weight_files
from .loading import read_tensors
from .saving import prepare_layers, stored_tensors, write_generation, write_tensors

SUFFIXES = ("", "_R")  # primary and residual path
SIGNS = re.compile(r"(.+)\.U(_R)?(_packed(_R)?)?")  # names of a layer's U, packed or not


def read_official(path: Path) -> tuple[dict[str, Any], dict[str, dict[str, Any]], dict[str, Tensor]]:
    """Read a checkpoint of the authors' repository, and convert it to the packed format in memory.

    Returns
    -------
    tuple
        config.json with a `quantization_config`, its `layers`, and all tensors; see format.py.

    Raises
    ------
    CheckpointError
        If a file is missing or corrupt, or a layer's tensors do not fit each other; the message names the layer.
    """
    files = weight_files(path)
    read_headers(files)  # raises CheckpointError for a bad file
    tensors = read_tensors(files)
    layers: dict[str, dict[str, Any]] = {}
    for name in official_layers(tensors):
        try:
            paths = [read_path(name, suffix, tensors) for suffix in SUFFIXES if has_path(name, suffix, tensors)]
            bias = tensors.get(f"{name}.bias")
            bias = None if bias is None else to_half("bias", bias)
            if len({(len(packed.h), len(packed.g)) for packed in paths}) != 1:
                raise ValueError("its paths must have the same d_out and d_in, and one must be the primary path")
        except CheckpointError:
            raise
        except (ValueError, TypeError, RuntimeError) as error:
            raise CheckpointError(f"layer {name}: its tensors are damaged: {error}") from error
        for key in [key for key in tensors if key.rpartition(".")[0] == name]:
            del tensors[key]
        ranks = [packed.rank for packed in paths]
        layers[name] = {"d_out": len(paths[0].h), "d_in": len(paths[0].g), "ranks": ranks, "bias": bias is not None}
        for k, packed in enumerate(paths):
            tensors |= {f"{name}.paths.{k}.{field}": tensor for field, tensor in packed._asdict().items()}
        if bias is not None:
            tensors[f"{name}.bias"] = bias
    config, bits, _ = read_notes(path, layers)
    section = {"quant_method": "littlebit", "format_version": NO_CHECKSUMS, "bits": bits, "layers": layers}
    return config | {"quantization_config": section}, layers, tensors


def official_layers(names: Mapping[str, Any]) -> list[str]:
    """List the quantized layers by name, from the names of all tensors."""
    found = (SIGNS.fullmatch(name) for name in names)
    return list(dict.fromkeys(match[1] for match in found if match))


def has_path(layer: str, suffix: str, tensors: Mapping[str, Any]) -> bool:
    """Tell whether a layer has its primary path (suffix "") or its residual path ("_R")."""
    return any(key in tensors for key in sign_names(layer, "U", suffix))


def sign_names(layer: str, factor: str, suffix: str) -> tuple[str, ...]:
    """List the names that a factor's signs can have: packed, with the suffix before or after, or unpacked."""
    names = f"{factor}{suffix}_packed", f"{factor}_packed{suffix}", f"{factor}{suffix}"
    return tuple(dict.fromkeys(f"{layer}.{name}" for name in names))


def read_path(layer: str, suffix: str, tensors: Mapping[str, Tensor]) -> PackedFactors:
    """Convert one path of a layer to PackedFactors.

    Raises
    ------
    CheckpointError
        If a tensor is missing, or the tensors do not fit each other.
    """
    try:
        u_words, (d_out, rank) = sign_words(layer, "U", suffix, tensors)
        v_words, (rank_v, d_in) = sign_words(layer, "V", suffix, tensors)
        scales = {name: tensors[f"{layer}.{name}{suffix}"].flatten() for name in ("u1", "u2", "v1", "v2")}
    except KeyError as error:
        raise CheckpointError(f"layer {layer}: tensor {error.args[0]} is missing") from error
    u1, u2 = order_by_length(scales["u1"], scales["u2"], d_out)
    v2, v1 = order_by_length(scales["v2"], scales["v1"], d_in)
    fit = (rank_v, len(u1), len(u2), len(v1), len(v2)) == (rank, d_out, rank, rank, d_in)
    if not fit or not 1 <= rank <= min(d_out, d_in):
        sizes = {name: len(scale) for name, scale in scales.items()}
        raise CheckpointError(
            f"layer {layer}: U (d_out, rank), V (rank, d_in) and the scales{suffix} must fit each other, got U "
            f"({d_out}, {rank}), V ({rank_v}, {d_in}) and scales of {sizes}"
        )
    ell = u2.float() * v1.float()
    return PackedFactors(u_words, v_words, *(to_half(*each) for each in (("h", u1), ("ell", ell), ("g", v2))))


def order_by_length(first: Tensor, second: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Put the scale with `size` entries first; keep the order if both have this size, or neither."""
    return (second, first) if len(second) == size != len(first) else (first, second)


def sign_words(layer: str, factor: str, suffix: str, tensors: Mapping[str, Tensor]) -> tuple[Tensor, tuple[int, int]]:
    """Convert a factor's signs to our packed words; return them and the factor's shape.

    Raises
    ------
    CheckpointError
        If the shape is invalid, or the words do not have it.
    KeyError
        If the factor has no signs; the missing name.
    """
    name = next((name for name in sign_names(layer, factor, suffix) if name in tensors), None)
    if name is None:
        raise KeyError(sign_names(layer, factor, suffix)[0])
    if "_packed" not in name:
        rows, count = tensors[name].shape
        return pack_signs(tensors[name]), (rows, count)
    shape, words = tensors[name.replace("_packed", "_shape")], tensors[name]
    if shape.numel() != 2 or shape.is_floating_point() or min(shape.tolist()) < 1:
        raise CheckpointError(
            f"layer {layer}: {name.replace('_packed', '_shape')} must hold two positive integers (rows, columns), got "
            f"{shape.tolist()[:3]}"
        )
    rows, count = shape.flatten().tolist()
    if words.dtype != torch.int32 or tuple(words.shape) != (rows, -(-count // 32)):
        raise CheckpointError(
            f"layer {layer}: tensor {name} must be {(rows, -(-count // 32))} torch.int32 for {rows} rows of {count} "
            f"signs, got {tuple(words.shape)} {words.dtype}"
        )
    if count % 32:
        words = words.clone()
        words[:, -1] &= (1 << count % 32) - 1  # the authors' pad bits can have any value
    return words.to(row_words(count)[1]), (rows, count)  # a narrower word keeps the low bits


def save_official(
    model: nn.Module,
    path: str | Path,
    tokenizer: Any = None,
    bits: float | None = None,
    overwrite: bool = False,
    packed: bool = True,
) -> Path:
    """Write a quantized model as a checkpoint of the authors' repository, atomically.

    Parameters
    ----------
    model : transformers model after `quantize_`, `train_` or `load`
        Layers in training form are packed in place.
    path, tokenizer, bits, overwrite
        See `save`. Only LittleBit checkpoints are overwritten.
    packed : bool
        Write packed words. If False, write the unpacked variant: signs as float16, 16 times the size, which every
        commit of the authors' code reads (see the head of this module).

    Returns
    -------
    Path
        The directory.

    Warns
    -----
    LittleBitWarning
        If the authors' loader would compute other ranks than a layer has, and so refuse the checkpoint.

    Raises
    ------
    ValueError
        If the model has no LittleBit layer, has experts or quantized embeddings, or a layer has more than two paths.
    OSError
        If `path` exists and may not be replaced, or cannot be written.
    """
    path = Path(path)
    model = without_adapters(model, "save_official")
    if has_experts(model):
        raise ValueError("this model has experts, which the authors' format cannot hold; use save instead")
    layers = prepare_layers(model, path, overwrite, bits)
    refuse_shared(model, "the authors' format")
    settle_ties(model)
    tensors = stored_tensors(model)
    if any(name.endswith(".codes") for name in tensors):
        raise ValueError(
            "the authors' format has no quantized embeddings: quantize the model with embeddings of 16 bits"
        )
    tensors = {name: tensor for name, tensor in tensors.items() if ".paths." not in name}
    for name, layer in layers.items():
        tensors |= official_tensors(name, layer, packed)
    config = model.config.to_dict()  # type: ignore[operator, union-attr]
    config = {key: value for key, value in config.items() if key != "quantization_config"} | {"dtype": "float16"}
    residual = any(len(layer.ranks) == 2 for layer in layers.values())
    factor = kv_factor(layers, bits, 1 + residual)
    note = {"quant_func": "STEBinary", "quant_mod": "LittleBitLinear", "eff_bit": bits, "residual": residual}
    note["kv_factor"] = factor
    other = next((name for name, layer in layers.items() if layer.ranks != expected_ranks(name, layer, note)), None)
    if other is not None:
        warnings.warn(
            f"the authors' program computes ranks from the bits per weight and will not load this checkpoint: layer "
            f"{other} has the ranks {layers[other].ranks}. Quantize with allocation 'official' for one that it loads",
            LittleBitWarning,
            stacklevel=2,
        )
    with atomic_directory(path, overwrite) as folder:
        (folder / "config.json").write_text(json.dumps(config, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        (folder / OFFICIAL).write_text(json.dumps(note, indent=1) + "\n", encoding="utf-8")
        write_tensors(tensors, folder)
        write_generation(model, folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
    return path


def expected_ranks(name: str, layer: PackedLinear, note: Mapping[str, Any]) -> tuple[int, ...]:
    """Compute the ranks that the authors' program gives a layer from littlebit_config.json; () without a target."""
    if note["eff_bit"] is None:
        return ()
    paths, factor = 1 + note["residual"], note["kv_factor"] if is_key_or_value(name) else 1.0
    return (official_rank(layer.d_out, layer.d_in, note["eff_bit"], paths, factor),) * paths


def is_key_or_value(name: str) -> bool:
    """Tell whether the authors' program multiplies the rank of a layer by `kv_factor`."""
    return name.endswith((".k_proj", ".v_proj"))


def kv_factor(layers: Mapping[str, PackedLinear], bits: float | None, paths: int) -> float:
    """Find the `kv_factor` that gives all k_proj and v_proj their ranks by the authors' rule, or 1.

    Factor f gives a layer rank r if r <= f * (rank before rounding) < r + 8; ranks below 8 become 8. Several factors
    can give all ranks. 1 is preferred, then the fraction with the smallest denominator.
    """
    found = [layer for name, layer in layers.items() if is_key_or_value(name)]
    if bits is None or not found:
        return 1.0

    def gives(factor: float) -> bool:
        ranks = [official_rank(layer.d_out, layer.d_in, bits, paths, factor) for layer in found]
        return ranks == [layer.ranks[0] for layer in found]

    low = 0.0
    for layer in found:
        exact, rank = official_rank_before_rounding(layer.d_out, layer.d_in, bits, paths), layer.ranks[0]
        low = max(low, rank / exact if exact > 0 and rank > 8 else 0.0)
    fractions = (max(1, math.ceil(low * below)) / below for below in range(1, 1000))
    return next((factor for factor in (1.0, *fractions) if gives(factor)), 1.0)


def official_tensors(name: str, layer: PackedLinear, packed: bool) -> dict[str, Tensor]:
    """Convert a layer to tensors in the authors' format; v1 holds the latent scale, u2 is 1."""
    if len(layer.ranks) > len(SUFFIXES):
        raise ValueError(f"the authors' format holds two paths at most, but layer {name} has {len(layer.ranks)}")
    tensors = {}
    for suffix, path in zip(SUFFIXES, layer.factors(), strict=False):
        signs = packed_signs(path, suffix) if packed else unpacked_signs(path, suffix)
        scales = {"u1": path.h, "u2": torch.ones_like(path.ell), "v1": path.ell, "v2": path.g}
        scales = {f"{scale}{suffix}": values[None].clone() for scale, values in scales.items()}
        tensors |= {f"{name}.{key}": tensor for key, tensor in (signs | scales).items()}
    return tensors


def packed_signs(path: PackedFactors, suffix: str) -> dict[str, Tensor]:
    """Convert a path's signs to 32-bit words, with the shapes of the factors."""
    tensors = {}
    for factor, words, shape in (
        ("U", path.u_words, (len(path.h), path.rank)),
        ("V", path.v_words, (path.rank, len(path.g))),
    ):
        low = words.to(torch.int32) & ((1 << 8 * words.itemsize) - 1)  # undoes the sign extension of narrow words
        tensors[f"{factor}{suffix}_packed"] = words if words.itemsize == 4 else low
        tensors[f"{factor}{suffix}_shape"] = torch.tensor(shape)
    return tensors


def unpacked_signs(path: PackedFactors, suffix: str) -> dict[str, Tensor]:
    """Convert a path's signs to float16, U (d_out, rank) and V (rank, d_in)."""
    factors = unpack_factors(path)
    return {f"U{suffix}": factors.u.half(), f"V{suffix}": factors.v.mT.half().contiguous()}


def official_header(
    path: Path, headers: Mapping[str, Header]
) -> tuple[dict[str, Any], dict[str, dict[str, Any]], dict]:
    """Read what `info` needs: config.json, `d_out` and `d_in` of each layer, and the layer of each packed tensor."""
    layers, owners = {}, {}
    for name in official_layers(headers):
        own = [key for key in headers if key.rpartition(".")[0] == name and not key.endswith(".bias")]
        lengths = {key.rpartition(".")[2]: math.prod(headers[key].shape) for key in own}
        try:  # a rank is at most d_out and d_in, so the longer scale has the layer's size
            d_out, d_in = max(lengths["u1"], lengths["u2"]), max(lengths["v1"], lengths["v2"])
        except KeyError as error:
            raise CheckpointError(f"layer {name}: tensor {name}.{error.args[0]} is missing") from error
        if not d_out or not d_in:
            raise CheckpointError(f"layer {name}: its scales are empty")
        layers[name] = {"d_out": d_out, "d_in": d_in}
        owners |= dict.fromkeys(own, name)
    config, bits, factor = read_notes(path, layers)
    return config | {"quantization_config": {"bits": bits, "kv_factor": factor}}, layers, owners


def read_notes(path: Path, layers: Mapping[str, Any]) -> tuple[dict[str, Any], float | None, float]:
    """Read config.json, and the target bits and `kv_factor` in littlebit_config.json; `layers` must not be empty."""
    config, note = read_json(path, "config.json"), read_json(path, OFFICIAL)
    bits, factor = note.get("eff_bit"), note.get("kv_factor", 1.0)
    check_bits(bits, "eff_bit", path / OFFICIAL)
    if type(factor) not in (int, float) or not 0 < factor < math.inf:
        raise CheckpointError(f"{path / OFFICIAL}: 'kv_factor' must be a positive number, got {factor!r}")
    if not layers:
        raise CheckpointError(f"{path} must hold a quantized layer, but no tensor is called LAYER.U_packed or LAYER.U")
    return config, bits, factor
