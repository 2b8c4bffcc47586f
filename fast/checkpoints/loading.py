"""Build a model from the config.json and tensors of a packed checkpoint, after checking that they fit.

The model is built twice. The first time all of it is on the meta device, where nothing takes memory, and every name,
shape and dtype is compared with the files. The second time the stored tensors are put into it.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ..files.untrusted import CheckpointError, open_errors
from ..models.embeddings import EmbeddingTable, QuantizedEmbedding, replace_embeddings, tie_embeddings
from ..models.experts import is_known, projection_names, split_experts
from ..models.generation_settings import FILE as GENERATION, read_generation_config
from ..models.layers import PackedLinear
from ..models.quantize import packed_layers, replace_module, replace_modules, split
from ..models.selection import is_linear, linear_shape
from ..models.shared import share, share_checked
from .format import WEIGHTS, check_embeddings, check_path, path_headers

#: Most experts of a model, in all blocks together: each becomes several modules.
MOST_EXPERTS = 1 << 16

#: Most bytes of buffers that a model computes when it is built: masks and rotary frequencies.
BUFFER_BYTES = 1 << 30


def generation_config(path: Path) -> Any:
    """Read a checkpoint's generation_config.json as a transformers GenerationConfig.

    Raises
    ------
    CheckpointError
        If it is not JSON, or transformers refuses it.
    """
    from ..models.build import transformers

    values = read_generation_config(path)
    try:
        return transformers().GenerationConfig.from_dict(values)
    except Exception as error:  # transformers raises anything on invalid values
        raise CheckpointError(f"{path / GENERATION} cannot be used: {error!r}; mend the file") from error


def install_embeddings(model: Any, described: Any, dtype: torch.dtype, where: Path | str) -> None:
    """Replace the embedding and head of an empty model by empty quantized ones, if 'embeddings' describes them."""
    if described is None:
        return
    rows, size = model.get_input_embeddings().weight.shape
    check_embeddings(described, size, where)

    def table() -> EmbeddingTable:
        return EmbeddingTable.empty(described["bits"], rows, size, described["group"])

    first = table()
    replace_embeddings(model, first, first if described.get("tied") else table(), dtype)


def read_tensors(files: Sequence[Path]) -> dict[str, Tensor]:
    """Memory-map all tensors of safetensors files; `read_headers` must have checked the files before."""
    tensors: dict[str, Tensor] = {}
    for file in files:
        # transformers may set the default device "meta", which the first releases of safetensors follow
        with open_errors(file), torch.device("cpu"):
            tensors |= load_file(file)
    return tensors


def check_values(layers: dict[str, dict[str, Any]], tensors: Mapping[str, Tensor]) -> None:
    """Raise CheckpointError unless the scales of all packed layers are finite and their pad bits are 0."""
    for layer, entry in layers.items():
        for k in range(len(entry["ranks"])):
            prefix = f"{layer}.paths.{k}"
            check_path(prefix, {field: tensors[f"{prefix}.{field}"].numpy() for field in path_headers(entry, k)})


def build_model(
    config: dict[str, Any],
    layers: dict[str, dict[str, Any]],
    tensors: dict[str, Tensor],
    dtype: torch.dtype,
    path: Path,
) -> nn.Module:
    """Build the model that a checkpoint describes and put its tensors into it.

    Parameters
    ----------
    config : dict
        Content of config.json.
    layers : dict
        The entries of its packed layers.
    tensors : dict of str to tensor
        All stored tensors.
    dtype : torch.dtype
        In which a quantized embedding returns its rows.
    path : Path
        The checkpoint, for errors.

    Raises
    ------
    CheckpointError
        If the files do not fit the model, or config.json does not describe one.
    """
    where, described = path / "config.json", config["quantization_config"]
    try:
        check_state(meta_model(config, layers, tensors, dtype, path), tensors, path)
        model = empty_packed_model(config, layers, tensors, dtype, path)
        fill(model, tensors, path, described.get("shared") or {})
    except (CheckpointError, ImportError, MemoryError):
        raise
    except Exception as error:  # model classes raise anything on a configuration that they cannot use
        raise CheckpointError(f"{where} does not describe a model: {error}") from error
    return model


def meta_model(
    config: dict[str, Any],
    layers: dict[str, dict[str, Any]],
    tensors: Mapping[str, Tensor],
    dtype: torch.dtype,
    path: Path,
) -> nn.Module:
    """Build the model that a checkpoint describes on the meta device; parameters as for `build_model`."""
    with torch.device("meta"):
        return empty_packed_model(config, layers, tensors, dtype, path)


def empty_packed_model(
    config: dict[str, Any],
    layers: dict[str, dict[str, Any]],
    tensors: Mapping[str, Tensor],
    dtype: torch.dtype,
    path: Path,
) -> nn.Module:
    """Build the model that a checkpoint describes, without its stored tensors; parameters as for `build_model`."""
    from ..models.build import empty_model

    where, described = path / "config.json", config["quantization_config"]
    model = empty_model(config, 2 * len(tensors))
    share_checked(model, described.get("shared"), where)
    install_packed_layers(model, layers, described.get("fused"), where)
    install_embeddings(model, described.get("embeddings"), dtype, where)
    untie_separate_head(model, tensors)
    tie(model)
    return model


def check_state(model: nn.Module, tensors: Mapping[str, Tensor], path: Path) -> None:
    """Raise CheckpointError unless the stored tensors are exactly what a model on the meta device needs.

    Buffers that the files do not hold are computed by the model. They may take BUFFER_BYTES at most.
    """
    expected = model.state_dict(keep_vars=True)
    unexpected = [name for name in tensors if name not in expected]
    held = {id(tensor) for name, tensor in expected.items() if name in tensors}  # tied tensors are the same object
    missing = [name for name, parameter in model.named_parameters() if id(parameter) not in held]
    if missing or unexpected:
        raise mismatch_error(path, missing, unexpected)
    for name, tensor in tensors.items():
        wanted = expected[name]
        same = wanted.dtype == tensor.dtype or (wanted.is_floating_point() and tensor.is_floating_point())
        if wanted.shape != tensor.shape or not same:
            raise CheckpointError(
                f"{path / WEIGHTS} does not fit the model in config.json: tensor {name} must be {tuple(wanted.shape)} "
                f"{wanted.dtype}, got {tuple(tensor.shape)} {tensor.dtype}; copy or download all files again"
            )
    computed = sum(buffer.nbytes for buffer in model.buffers() if id(buffer) not in held)
    if computed > BUFFER_BYTES:
        raise CheckpointError(
            f"{path / 'config.json'} asks for buffers of {computed:,} bytes, more than {BUFFER_BYTES:,}; it is damaged"
        )


def mismatch_error(path: Path, missing: Sequence[str], unexpected: Sequence[str]) -> CheckpointError:
    """Make the error for tensors that the model needs and the files lack, or the reverse."""
    return CheckpointError(
        f"{path / WEIGHTS} does not fit the model in config.json: missing {missing[:3]}, left over {unexpected[:3]}; "
        "copy or download all files again"
    )


def install_packed_layers(model: nn.Module, layers: dict[str, dict[str, Any]], fused: Any, where: Path | str) -> None:
    """Replace linear layers of an empty model by empty packed layers, as `layers` and 'fused' describe them."""
    split_fused_layers(model, fused, where)
    split_packed_experts(model, layers, where)
    for name, entry in layers.items():
        check_module(model, name, entry)
    replace_modules(model, {name: PackedLinear.empty(**entry) for name, entry in layers.items()})


def split_fused_layers(model: nn.Module, fused: Any, where: Path | str) -> None:
    """Split the linear layers of a model that 'fused' names into their parts."""
    if not isinstance(fused or {}, dict):
        raise CheckpointError(f"{where}: 'fused' must map layers to lists of [part, rows], got {fused!r}")
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


def split_packed_experts(model: nn.Module, layers: Mapping[str, Any], where: Path | str) -> None:
    """Split the mixture-of-experts blocks of a model of which at least one projection is packed."""
    blocks = {name: module for name, module in model.named_modules() if is_known(module)}
    experts = sum(len(module.down_proj) for module in blocks.values())  # type: ignore[arg-type]
    if experts > MOST_EXPERTS:
        raise CheckpointError(f"{where}: a model may have {MOST_EXPERTS} experts, not {experts}; copy the files again")
    for name, module in blocks.items():
        if any(f"{name}.{part}" in layers for part in projection_names(module)):
            replace_module(model, name, split_experts(module, lambda part, name=name: f"{name}.{part}" in layers))


def check_module(model: nn.Module, name: str, entry: dict[str, Any]) -> None:
    """Raise CheckpointError unless the model has a linear layer of this name, d_out and d_in."""
    try:
        module = model.get_submodule(name)
    except AttributeError as error:
        raise CheckpointError(f"layer {name} is in the quantization_config, but the model has no such layer") from error
    given = entry["d_out"], entry["d_in"]
    if not is_linear(module) or linear_shape(module) != given:
        raise CheckpointError(f"layer {name}: config.json packs {given}, but the model has {module}; copy it again")


def fill(model: nn.Module, tensors: dict[str, Tensor], path: Path, shared: Mapping[str, str]) -> None:
    """Put the stored tensors into an empty model, tie and share weights, and check that none is missing."""
    model.load_state_dict(tensors, strict=False, assign=True)
    tie(model)
    share(model, shared)
    missing = [name for name, tensor in model.state_dict().items() if tensor.is_meta]
    if missing:
        raise mismatch_error(path, missing, [])
    for layer in packed_layers(model).values():
        layer.decode_scales()


def untie_separate_head(model: Any, tensors: Mapping[str, Tensor]) -> None:
    """Untie the head of an empty model if the files hold a head that differs from the embedding.

    The files are right where config.json says otherwise. A head equal to the embedding stays tied.
    """
    names = {id(module): f"{name}.weight" for name, module in model.named_modules()}
    pair = [names.get(id(each)) for each in (model.get_input_embeddings(), model.get_output_embeddings())]
    if all(name in tensors for name in pair) and not torch.equal(*(tensors[str(name)] for name in pair)):
        tie_embeddings(model, False)


def tie(model: nn.Module) -> None:
    """Tie the weights that the model's configuration ties; a quantized head always shares its embedding's table."""
    if not isinstance(model.get_input_embeddings(), QuantizedEmbedding):  # type: ignore[operator]
        model.tie_weights()  # type: ignore[operator]


def cast_dense(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Cast a model's parameters to a dtype in place; tensors of packed layers are buffers and keep theirs."""
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    return model
