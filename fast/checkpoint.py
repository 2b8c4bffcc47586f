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

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .checks import check_number
from .digests import contents, entry_digest
from .embeddings import QuantizedEmbedding, Table, replace_embeddings, settle_ties, tie_embeddings
from .experts import is_known, projection_names, split_experts
from .fetch import locate_packed
from .generation_settings import FILE as GENERATION, read_generation
from .headers import (
    FORMAT_VERSION,
    INDEX,
    OFFICIAL,
    WEIGHTS,
    CheckpointError,
    Header,
    check_contents,
    check_embeddings,
    check_layers,
    check_path,
    damaged,
    is_checkpoint,
    is_official,
    layer_kind,
    make_checksums,
    packed_tensors,
    read_checksums,
    read_config,
    read_headers,
    readable,
    weight_files,
)
from .layers import Joined, PackedLinear, stored_half
from .model import LayerResult, pack_, packed_layers, replace_module, replace_modules, split, tell_observers
from .packing import PackedFactors
from .selection import is_linear, linear_shape
from .shared import share, share_checked, shared_names
from .wrappers import without_adapters
from .writing import check_folder, check_room, place_of, written_whole

SHARD_BYTES = 5_000_000_000
#: Most tensors in a file: the names and checksums of a model with thousands of experts must fit headers.JSON_BYTES.
SHARD_TENSORS = 1 << 15
#: Most experts that a model may have in all its blocks: each becomes several modules.
MOST_EXPERTS = 1 << 16
#: Most bytes that a model may compute at its start, for masks and the frequencies of positions.
BUFFER_BYTES = 1 << 30
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


def generation_config(path: Path) -> Any:
    """Read the generation_config of a checkpoint for transformers.

    Raises
    ------
    CheckpointError
        If it is damaged.
    """
    from .hf import transformers

    said = read_generation(path)
    try:
        return transformers().GenerationConfig.from_dict(said)
    except Exception as error:  # transformers raises anything at all on values that make no sense
        raise CheckpointError(f"{path / GENERATION} cannot be used: {error!r}; mend the file") from error


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

    joined = {name: module for name, module in model.named_modules() if isinstance(module, Joined)}
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


def put_embeddings(model: Any, described: Any, dtype: torch.dtype, where: Path | str) -> None:
    """Give an empty model the empty tables that `embeddings` of a section describes, if it describes any."""
    if described is None:
        return
    rows, size = model.get_input_embeddings().weight.shape
    check_embeddings(described, size, where)

    def table() -> Table:
        return Table.empty(described["bits"], rows, size, described["group"])

    first = table()
    replace_embeddings(model, first, first if described.get("tied") else table(), dtype)


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


def read_tensors(files: Sequence[Path]) -> dict[str, Tensor]:
    """All tensors in some safetensors files, whose headers were read before, mapped into memory."""
    tensors: dict[str, Tensor] = {}
    for file in files:
        # transformers may have a default device of "meta", which the first releases of safetensors follow
        with readable(file), torch.device("cpu"):
            tensors |= load_file(file)
    return tensors


def check_values(layers: dict[str, dict[str, Any]], tensors: Mapping[str, Tensor]) -> None:
    """Raise CheckpointError if a scale of a packed layer is not finite, or a pad bit of its words is set."""
    for layer, entry in layers.items():
        for order in range(len(entry["ranks"])):
            place = f"{layer}.paths.{order}"
            check_path(place, {kind: tensors[f"{place}.{kind}"].numpy() for kind in PackedFactors._fields})


def built(
    config: dict[str, Any],
    layers: dict[str, dict[str, Any]],
    tensors: dict[str, Tensor],
    dtype: torch.dtype,
    path: Path,
) -> nn.Module:
    """The model that the files describe; first on the meta device, where whatever does not fit costs no memory."""
    where, described = path / "config.json", config["quantization_config"]
    try:
        check_state(skeleton(config, layers, tensors, dtype, path), tensors, path)
        model = unfilled(config, layers, tensors, dtype, path)
        fill(model, tensors, path, described.get("shared") or {})
    except (CheckpointError, ImportError, MemoryError):
        raise
    except Exception as error:  # model classes raise anything at all on a configuration that makes no sense
        raise CheckpointError(f"{where} does not describe a model: {error}") from error
    return model


def skeleton(
    config: dict[str, Any],
    layers: dict[str, dict[str, Any]],
    tensors: Mapping[str, Tensor],
    dtype: torch.dtype,
    path: Path,
) -> nn.Module:
    """Build the model that the files describe on the meta device."""
    with torch.device("meta"):
        return unfilled(config, layers, tensors, dtype, path)


def unfilled(
    config: dict[str, Any],
    layers: dict[str, dict[str, Any]],
    tensors: Mapping[str, Tensor],
    dtype: torch.dtype,
    path: Path,
) -> nn.Module:
    """Build the model that the files describe, its stored tensors on the meta device, shared and tied."""
    from .hf import empty_model

    where, described = path / "config.json", config["quantization_config"]
    model = empty_model(config, 2 * len(tensors))
    share_checked(model, described.get("shared"), where)
    put_layers(model, layers, described.get("fused"), where)
    put_embeddings(model, described.get("embeddings"), dtype, where)
    untie_own_head(model, tensors)
    tie(model)
    return model


def check_state(model: nn.Module, tensors: Mapping[str, Tensor], path: Path) -> None:
    """Raise CheckpointError unless a model on the meta device has places for the tensors, and they fill it.

    A buffer that the files do not hold is computed by the model itself, which may take so many bytes and no more.
    """
    places = model.state_dict(keep_vars=True)
    unexpected = [name for name in tensors if name not in places]
    held = {id(place) for name, place in places.items() if name in tensors}  # tied ones are one
    missing = [name for name, place in model.named_parameters() if id(place) not in held]
    if missing or unexpected:
        raise misfit(path, missing, unexpected)
    for name, tensor in tensors.items():
        place = places[name]
        same = place.dtype == tensor.dtype or (place.is_floating_point() and tensor.is_floating_point())
        if place.shape != tensor.shape or not same:
            raise CheckpointError(
                f"{path / WEIGHTS} does not fit the model in config.json: tensor {name} is {tuple(tensor.shape)} "
                f"{tensor.dtype}, not {tuple(place.shape)} {place.dtype}"
            )
    computed = sum(buffer.nbytes for buffer in model.buffers() if id(buffer) not in held)
    if computed > BUFFER_BYTES:
        raise CheckpointError(f"{path / 'config.json'} asks for buffers of {computed:,} bytes; it is damaged")


def misfit(path: Path, missing: Sequence[str], unexpected: Sequence[str]) -> CheckpointError:
    """The error for tensors that are not those of the model."""
    return CheckpointError(
        f"{path / WEIGHTS} does not fit the model in config.json: missing {missing[:3]}, left over {unexpected[:3]}"
    )


def put_layers(model: nn.Module, layers: dict[str, dict[str, Any]], fused: Any, where: Path | str) -> None:
    """Give a model without memory the packed layers that a section describes, in the places of its linear ones."""
    if not isinstance(fused or {}, dict):
        raise CheckpointError(f"{where}: 'fused' is {fused!r}, which splits no layers")
    for name, parts in (fused or {}).items():
        try:
            layer, sizes = model.get_submodule(name), {key: rows for key, rows in parts}
            fits = is_linear(layer) and sum(sizes.values()) == linear_shape(layer)[0] and len(sizes) == len(parts)
            fits = fits and all(type(rows) is int and rows > 0 and key.isidentifier() for key, rows in sizes.items())
        except (AttributeError, TypeError, ValueError):
            fits = False
        if not fits:
            raise CheckpointError(f"{where}: 'fused' splits {name} into {parts!r}, which does not fit the model")
        replace_module(model, name, split(layer, sizes))
    blocks = {name: module for name, module in model.named_modules() if is_known(module)}
    experts = sum(len(module.down_proj) for module in blocks.values())  # type: ignore[arg-type]
    if experts > MOST_EXPERTS:
        raise CheckpointError(f"{where}: a model may have {MOST_EXPERTS} experts, not {experts}; copy the files again")
    for name, module in blocks.items():
        if any(f"{name}.{part}" in layers for part in projection_names(module)):
            replace_module(model, name, split_experts(module, lambda part, name=name: f"{name}.{part}" in layers))
    for name, entry in layers.items():
        check_module(model, name, entry)
    replace_modules(model, {name: PackedLinear.empty(**entry) for name, entry in layers.items()})


def check_module(model: nn.Module, name: str, entry: dict[str, Any]) -> None:
    """Raise CheckpointError unless the model has a linear layer of this name and shape."""
    try:
        module = model.get_submodule(name)
    except AttributeError as error:
        raise CheckpointError(f"layer {name} is in the quantization_config, but the model has no such layer") from error
    given = entry["d_out"], entry["d_in"]
    if not is_linear(module) or linear_shape(module) != given:
        raise CheckpointError(f"layer {name}: config.json packs {given}, but the model has {module}")


def fill(model: nn.Module, tensors: dict[str, Tensor], path: Path, shared: Mapping[str, str]) -> None:
    """Put the tensors into an empty model, tie what it ties and shares, and check that nothing is missing."""
    model.load_state_dict(tensors, strict=False, assign=True)
    tie(model)
    share(model, shared)
    missing = [name for name, tensor in model.state_dict().items() if tensor.is_meta]
    if missing:
        raise misfit(path, missing, [])


def untie_own_head(model: Any, tensors: Mapping[str, Tensor]) -> None:
    """Let the configuration of an empty model tie no head that the files have apart from the embedding.

    Files are right where they and config.json differ; two equal tensors are tied.
    """
    names = {id(module): f"{name}.weight" for name, module in model.named_modules()}
    pair = [names.get(id(each)) for each in (model.get_input_embeddings(), model.get_output_embeddings())]
    if all(name in tensors for name in pair) and not torch.equal(*(tensors[str(name)] for name in pair)):
        tie_embeddings(model, False)


def tie(model: nn.Module) -> None:
    """Tie what the model's configuration ties; a quantised head refers to its table anyway."""
    if not isinstance(model.get_input_embeddings(), QuantizedEmbedding):  # type: ignore[operator]
        model.tie_weights()  # type: ignore[operator]


def cast_dense(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The model with all floating-point tensors cast, except those of packed layers."""
    for parameter in model.parameters():  # packed tensors are buffers
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    return model


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
        kind = kinds.setdefault(layer_kind(layer), {"layers": 0, "weights": 0, "linear_bytes": 0})
        kind["linear_bytes"] += sizes[name]
    for layer, entry in layers.items():
        kind = kinds[layer_kind(layer)]
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
