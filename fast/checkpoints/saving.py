"""Write packed models as safetensors files with a config.json."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from .._checks import check_number
from ..files.atomic import check_folder, check_room, place_of, written_whole
from ..files.digests import contents, entry_digest
from ..models.embeddings import QuantizedEmbedding, settle_ties
from ..models.generation_settings import FILE as GENERATION
from ..models.layers import ConcatLinear, PackedLinear, stored_half
from ..models.quantize import LayerResult, pack_, packed_layers
from ..models.selection import linear_shape
from ..models.shared import shared_names
from ..models.wrappers import without_adapters
from .format import FORMAT_VERSION, INDEX, WEIGHTS, is_checkpoint, is_official, make_checksums
from .loading import check_state, skeleton

SHARD_BYTES = 5_000_000_000


#: Most tensors in a file: the names and checksums of a model with thousands of experts must fit headers.JSON_BYTES.
SHARD_TENSORS = 1 << 15


#: Names that safetensors has for torch's dtypes.
DTYPE_NAMES = {
    **{torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.bool: "BOOL"},
    **{torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8"},
}


def save(
    model: nn.Module,
    path: str | Path,
    tokenizer: Any = None,
    bits: float | None = None,
    results: Mapping[str, LayerResult] | None = None,
    overwrite: bool = False,
    log: Sequence[Mapping[str, float]] | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> Path:
    """Write a quantised model as a packed checkpoint; complete, or not at all.

    The directory is written under a temporary name beside `path` and renamed at the end. Layers still in training
    form (LittleBitLinear) are packed, in place.

    Parameters
    ----------
    model : transformers model after `quantize_` or `load`
    path : str or Path
        Directory to make.
    tokenizer : transformers tokenizer, optional
        Saved with the model, so that the directory is all that generation needs.
    bits : float, optional
        The target to record; what is stored is counted from the file itself (`info`).
    results : mapping of layer name to LayerResult, optional
        What `quantize_` returned; written to quantization.json for later study.
    overwrite : bool
        Replace an existing checkpoint at `path`.
    log : sequence of mappings, optional
        What `train_` returned; written to training.jsonl.
    shard_bytes : int
        Tensors of more bytes than this are divided over several files.

    Returns
    -------
    The directory.

    Raises
    ------
    ValueError
        If the model has no LittleBit layer, a layer cannot be packed, the model has adapters of PEFT, or `load` could
        not rebuild it, since it is not the causal language model that its configuration describes.
    OSError
        If `path` exists and may not be replaced, or cannot be written.
    """
    path = Path(path)
    check_number("shard_bytes", shard_bytes, low=1, whole=True)
    model = without_adapters(model, "save")
    layers_to_save(model, path, overwrite, bits)
    settle_ties(model)
    config = model.config.to_dict()  # type: ignore[operator, union-attr]
    config["architectures"] = [type(model).__name__]
    config["dtype"] = "float16"
    config["quantization_config"] = section(model, bits)
    tensors = stored_tensors(model)
    check_loadable(type(model).__name__, config, tensors, path)
    check_room(place_of(path), sum(tensor.nbytes for tensor in tensors.values()))
    with written_whole(path, overwrite) as folder:
        (folder / "config.json").write_text(json.dumps(config, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        write_tensors(tensors, folder, shard_bytes, config)
        if results is not None:
            rows = {name: asdict(result) for name, result in results.items()}
            (folder / "quantization.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
        if log is not None:
            (folder / "training.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in log), encoding="utf-8")
        write_generation(model, folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
    return path


def check_loadable(kind: str, config: dict[str, Any], tensors: Mapping[str, Tensor], path: Path) -> None:
    """Raise ValueError unless `load` would rebuild a model of class `kind` from a configuration and tensors."""
    try:
        check_state(
            skeleton(config, config["quantization_config"]["layers"], tensors, torch.float32, path), tensors, path
        )
    except (ImportError, MemoryError):
        raise
    except Exception as error:  # as in `built`
        raise ValueError(
            f"this {kind} cannot be saved so that load can read it, which builds the causal language model that the "
            f"configuration describes ({error}); pack_ it, and use its own save_pretrained or save its state_dict()"
        ) from error


def write_generation(model: Any, folder: Path) -> None:
    """Write a model's generation_config as it is; transformers' own writer refuses some that it reads."""
    if getattr(model, "generation_config", None) is not None:
        (folder / GENERATION).write_text(model.generation_config.to_json_string(), encoding="utf-8")


def layers_to_save(model: nn.Module, path: Path, overwrite: bool, bits: float | None) -> dict[str, PackedLinear]:
    """The layers of a model that is to be written to `path`, packed in place; an error if either cannot be."""
    if bits is not None:
        check_number("bits", bits, above=0)
    check_target(path, overwrite)
    if not hasattr(model, "config"):
        raise ValueError("save writes transformers models; for another module, pack_ it and save its state_dict()")
    layers = packed_layers(pack_(model))
    if not layers:
        raise ValueError("the model has no LittleBit layer; call quantize_ first")
    return layers


def section(model: nn.Module, bits: float | None = None) -> dict[str, Any]:
    """The `quantization_config` that describes a packed model."""
    return {
        "quant_method": "littlebit",
        "format_version": FORMAT_VERSION,
        "bits": bits,
        "layers": {name: describe(layer) for name, layer in packed_layers(model).items()},
    } | (embedding_section(model) | fused_section(model) | shared_section(model))


def fused_section(model: nn.Module) -> dict[str, Any]:
    """What config.json says about split layers: the rows of each part, nothing if no layer was split."""

    def rows(part: Any) -> int:
        return part.d_out if isinstance(part, PackedLinear) else linear_shape(part)[0]

    joined = {name: module for name, module in model.named_modules() if isinstance(module, ConcatLinear)}
    parts = {name: [[key, rows(part)] for key, part in module.named_children()] for name, module in joined.items()}
    return {"fused": parts} if parts else {}


def shared_section(model: nn.Module) -> dict[str, Any]:
    """Say what a model holds in several places, for config.json: nothing, if there is nothing but tied embeddings."""
    names = shared_names(model)
    return {"shared": names} if names else {}


def describe(layer: PackedLinear) -> dict[str, Any]:
    """A layer's entry in config.json."""
    return {"d_out": layer.d_out, "d_in": layer.d_in, "ranks": list(layer.ranks), "bias": layer.bias is not None}


def embedding_section(model: Any) -> dict[str, Any]:
    """What config.json says about quantised embeddings: nothing, if they are not."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if not isinstance(embedding, QuantizedEmbedding):
        return {}
    table = embedding.table
    tied = head is None or head.table is table
    return {"embeddings": {"bits": table.bits, "group": table.group, "tied": tied}}


def stored_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The state dict as it is stored: floats in 16 bits, shared tensors once, under the first of their names.

    The first name of a tied head is that of its embedding, which is the one that transformers ties from.
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
    """Write tensors as model.safetensors or, if they are too many or take too many bytes, as shards with an index.

    With what is in config.json, each file gets the checksums of the newest format.
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
        (folder / name).chmod(0o644)  # safetensors makes it readable by its owner alone


def order_metadata(file: Path) -> None:
    """Sort the metadata of a safetensors file, which are else in another order in every process."""
    with file.open("r+b") as opened:
        size = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        opened.seek(8)
        opened.write(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8").ljust(size))


def tensor_digests(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """`entry_digest` of each tensor, as `headers.file_digests` finds it in the file."""
    return {
        name: entry_digest(DTYPE_NAMES[tensor.dtype], tensor.shape, [contents(tensor)])
        for name, tensor in tensors.items()
    }


def check_target(path: Path, overwrite: bool) -> None:
    """Raise OSError unless `path` can be written: before hours of work, not after them.

    It may be new, an empty directory, or a checkpoint that may be overwritten; or a link to such a place.
    """
    place = place_of(path)
    if os.path.exists(path) and not (path.is_dir() and not any(path.iterdir())):
        if not path.is_dir() or not (is_checkpoint(path) or is_official(path)):
            raise FileExistsError(f"{path} exists and is not a LittleBit checkpoint; choose another output")
        if not overwrite:
            raise FileExistsError(f"{path} already holds a checkpoint; pass overwrite=True (--overwrite) to replace it")
    check_folder(place)
