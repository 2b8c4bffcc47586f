"""Build models from the tensors of packed checkpoints, after checking every shape and size."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ..files.untrusted import CheckpointError, readable
from ..models.embeddings import QuantizedEmbedding, Table, replace_embeddings, tie_embeddings
from ..models.experts import is_known, projection_names, split_experts
from ..models.generation_settings import FILE as GENERATION, read_generation_config
from ..models.layers import PackedLinear
from ..models.quantize import replace_module, replace_modules, split
from ..models.selection import is_linear, linear_shape
from ..models.shared import share, share_checked
from ..packing import PackedFactors
from .format import WEIGHTS, check_embeddings, check_path

#: Most experts that a model may have in all its blocks: each becomes several modules.
MOST_EXPERTS = 1 << 16


#: Most bytes that a model may compute at its start, for masks and the frequencies of positions.
BUFFER_BYTES = 1 << 30


def generation_config(path: Path) -> Any:
    """Read the generation_config of a checkpoint for transformers.

    Raises
    ------
    CheckpointError
        If it is damaged.
    """
    from ..models.build import transformers

    said = read_generation_config(path)
    try:
        return transformers().GenerationConfig.from_dict(said)
    except Exception as error:  # transformers raises anything at all on values that make no sense
        raise CheckpointError(f"{path / GENERATION} cannot be used: {error!r}; mend the file") from error


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


def read_tensors(files: Sequence[Path]) -> dict[str, Tensor]:
    """All tensors in some safetensors files, whose headers were read before, mapped into memory."""
    tensors: dict[str, Tensor] = {}
    for file in files:
        with readable(file):
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
    from ..models.build import empty_model

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
