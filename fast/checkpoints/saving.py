"""Turn a packed model into a config.json section, tensors and safetensors files; `checkpoint.save` uses them."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from .._checks import check_number
from ..bits import SCALE_BITS
from ..files.atomic import check_folder, resolve_output
from ..files.digests import tensor_bytes, tensor_digest
from ..models.embeddings import QuantizedEmbedding
from ..models.generation_settings import FILE as GENERATION
from ..models.layers import ConcatLinear, PackedLinear, stored_half
from ..models.quantize import pack_, packed_layers
from ..models.selection import linear_shape
from ..models.shared import shared_names
from .checksums import make_checksums
from .format import FORMAT_VERSION, INDEX, WEIGHTS, is_checkpoint, is_official, order_metadata
from .loading import check_state, meta_model

SHARD_BYTES = 5_000_000_000

#: Most tensors in a file: with thousands of experts, names and checksums must still fit untrusted.JSON_BYTES.
SHARD_TENSORS = 1 << 15

#: torch's dtypes -> their names in safetensors.
DTYPE_NAMES = {
    **{torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.bool: "BOOL"},
    **{torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8"},
}


def check_loadable(class_name: str, config: dict[str, Any], tensors: Mapping[str, Tensor], path: Path) -> None:
    """Raise ValueError unless `load` can rebuild a model of this class from its configuration and tensors."""
    try:
        check_state(
            meta_model(config, config["quantization_config"]["layers"], tensors, torch.float32, path), tensors, path
        )
    except (ImportError, MemoryError):
        raise
    except Exception as error:  # model classes raise anything on a configuration that they cannot use
        raise ValueError(
            f"this {class_name} cannot be saved so that load can read it: load builds the causal language model that "
            f"the configuration describes ({error}); pack_ it, and use its save_pretrained or save its state_dict()"
        ) from error


def write_generation(model: Any, folder: Path) -> None:
    """Write a model's generation_config unchanged; transformers' writer refuses some that its reader accepts."""
    if getattr(model, "generation_config", None) is not None:
        (folder / GENERATION).write_text(model.generation_config.to_json_string(), encoding="utf-8")


def prepare_layers(model: nn.Module, path: Path, overwrite: bool, bits: float | None) -> dict[str, PackedLinear]:
    """Pack the layers of a model in place and return them, after checking that `path` can be written."""
    if bits is not None:
        check_number("bits", bits, above=0)
    check_target(path, overwrite)
    if not hasattr(model, "config"):
        raise ValueError("save writes transformers models; for another module, pack_ it and save its state_dict()")
    layers = packed_layers(pack_(model))
    if not layers:
        raise ValueError("the model has no LittleBit layer; call quantize_ first")
    return layers


def quantization_section(model: nn.Module, bits: float | None = None) -> dict[str, Any]:
    """Make the `quantization_config` section that describes a packed model; format.py specifies it."""
    return {
        "quant_method": "littlebit",
        "format_version": FORMAT_VERSION,
        "bits": bits,
        "layers": {name: layer_entry(layer) for name, layer in packed_layers(model).items()},
    } | (embedding_section(model) | fused_section(model) | shared_section(model))


def fused_section(model: nn.Module) -> dict[str, Any]:
    """Describe the layers that were split, for the key "fused"; return {} if there are none."""

    def rows(part: Any) -> int:
        return part.d_out if isinstance(part, PackedLinear) else linear_shape(part)[0]

    joined = {name: module for name, module in model.named_modules() if isinstance(module, ConcatLinear)}
    parts = {name: [[key, rows(part)] for key, part in module.named_children()] for name, module in joined.items()}
    return {"fused": parts} if parts else {}


def shared_section(model: nn.Module) -> dict[str, Any]:
    """Describe modules and parameters under several names, for the key "shared"; tied embeddings do not count."""
    names = shared_names(model)
    return {"shared": names} if names else {}


def layer_entry(layer: PackedLinear) -> dict[str, Any]:
    """Describe a packed layer, for the key "layers"."""
    entry = {"d_out": layer.d_out, "d_in": layer.d_in, "ranks": list(layer.ranks), "bias": layer.bias is not None}
    return entry | ({} if layer.scale_bits == SCALE_BITS else {"scale_bits": layer.scale_bits})


def embedding_section(model: Any) -> dict[str, Any]:
    """Describe quantized embeddings, for the key "embeddings"; return {} if they are not quantized."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if not isinstance(embedding, QuantizedEmbedding):
        return {}
    table = embedding.table
    tied = head is None or head.table is table
    return {"embeddings": {"bits": table.bits, "group": table.group, "tied": tied}}


def stored_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the state dict as it is stored: floats as float16, and shared tensors once, under their first name.

    A tied head is stored under the name of the embedding, from which transformers ties it.
    """
    seen, tensors = set(), {}
    for name, tensor in model.state_dict().items():
        memory = tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()
        if memory in seen and tensor.numel():
            continue
        seen.add(memory)
        tensors[name] = stored_half(name, tensor).contiguous()
    return tensors


def write_tensors(
    tensors: Mapping[str, Tensor],
    folder: Path,
    shard_bytes: int = SHARD_BYTES,
    config: Mapping[str, Any] | None = None,
) -> None:
    """Write tensors as model.safetensors, or as shards with an index if one file is not enough.

    Parameters
    ----------
    tensors : mapping of str to tensor
    folder : Path
    shard_bytes : int
        Largest number of bytes in one file.
    config : mapping, optional
        Content of config.json; with it each file gets the checksums of FORMAT_VERSION.
    """
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and (size + tensor.nbytes > shard_bytes or len(shards[-1]) >= SHARD_TENSORS):
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    names = [WEIGHTS]
    if len(shards) > 1:
        names = [f"model-{at:05d}-of-{len(shards):05d}.safetensors" for at in range(1, len(shards) + 1)]
        index = {
            "metadata": {"total_size": sum(tensor.nbytes for tensor in tensors.values())},
            "weight_map": {key: name for name, shard in zip(names, shards, strict=True) for key in shard},
        }
        (folder / INDEX).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
    checksums: list[dict[str, str]] = [{} for _ in shards]
    if config is not None:
        checksums = make_checksums([tensor_digests(shard) for shard in shards], config)
    for name, shard, own in zip(names, shards, checksums, strict=True):
        save_file(shard, folder / name, metadata={"format": "pt"} | own)
        order_metadata(folder / name)
        (folder / name).chmod(0o644)  # safetensors makes it readable for its owner only


def tensor_digests(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Compute the `tensor_digest` of each tensor; `checksums.file_digests` computes the same from a file."""
    return {
        name: tensor_digest(DTYPE_NAMES[tensor.dtype], tensor.shape, [tensor_bytes(tensor)])
        for name, tensor in tensors.items()
    }


def check_target(path: Path, overwrite: bool) -> None:
    """Raise OSError unless a checkpoint can be written to `path`; call it before hours of work.

    `path` may be new, an empty directory, a checkpoint if `overwrite` is set, or a link to one of these.
    """
    place = resolve_output(path)
    if os.path.exists(path) and not (path.is_dir() and not any(path.iterdir())):
        if not path.is_dir() or not (is_checkpoint(path) or is_official(path)):
            raise FileExistsError(f"{path} exists and is not a LittleBit checkpoint; choose another output")
        if not overwrite:
            raise FileExistsError(f"{path} already holds a checkpoint; pass overwrite=True (--overwrite) to replace it")
    check_folder(place)
