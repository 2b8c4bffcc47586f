"""Save, load, verify and measure packed checkpoints.

A checkpoint is a directory with config.json, safetensors files and the tokenizer. Quantized linear layers are stored as
packed signs, one bit each in words of 8, 16 or 32 bits, and float16 scales h, ell and g. Everything else is float16, or
8- or 4-bit integers for a quantized embedding. format.py specifies keys, shapes, dtypes and bit order, checksums.py the
checksums.

saving.py turns a model into tensors and files, loading.py does the reverse, and storage.py counts bits and bytes.
`load`, `verify` and `info` read the format of the authors' repository as well (official.py).
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .._checks import check_number
from ..files.atomic import atomic_directory, check_room, resolve_output
from ..models.embeddings import settle_ties
from ..models.quantize import tell_observers
from ..models.results import LayerResult
from ..models.wrappers import without_adapters
from .checksums import check_contents, corrupt_tensors, read_checksums
from .fetch import locate_packed
from .format import check_layers, is_official, packed_tensors, read_config, read_headers, weight_files
from .loading import build_model, cast_dense, check_values, generation_config, read_tensors
from .saving import (
    SHARD_BYTES,
    check_loadable,
    prepare_layers,
    quantization_section,
    stored_tensors,
    write_generation,
    write_tensors,
)
from .storage import format_name, storage


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
    """Write a quantized model as a packed checkpoint, atomically.

    Layers in training form (LittleBitLinear) are packed in place. If writing fails, nothing is left at `path`, and an
    earlier checkpoint there is unchanged.

    Parameters
    ----------
    model : transformers model after `quantize_`, `train_` or `load`
    path : str or Path
        Directory to create.
    tokenizer : transformers tokenizer, optional
        Saved with the model, so that the directory suffices for generation.
    bits : float, optional
        Target bits per weight to record. `info` counts the bits that are really stored.
    results : mapping of layer name to LayerResult, optional
        What `quantize_` returned; written to quantization.json.
    overwrite : bool
        Replace an existing checkpoint at `path`.
    log : sequence of mappings, optional
        What `train_` returned; written to training.jsonl.
    shard_bytes : int
        Largest number of bytes in one safetensors file; a larger model becomes several.

    Returns
    -------
    Path
        The directory.

    Raises
    ------
    ValueError
        If the model has no LittleBit layer, a value does not fit float16, the model has PEFT adapters, or `load` could
        not rebuild the model because it is not the causal language model that its configuration describes.
    OSError
        If `path` exists and may not be replaced, or cannot be written.
    """
    path = Path(path)
    check_number("shard_bytes", shard_bytes, low=1, whole=True)
    model = without_adapters(model, "save")
    prepare_layers(model, path, overwrite, bits)
    settle_ties(model)
    config = model.config.to_dict()  # type: ignore[operator, union-attr]
    config["architectures"] = [type(model).__name__]
    config["dtype"] = "float16"
    config["quantization_config"] = quantization_section(model, bits)
    tensors = stored_tensors(model)
    check_loadable(type(model).__name__, config, tensors, path)
    check_room(resolve_output(path), sum(tensor.nbytes for tensor in tensors.values()))
    with atomic_directory(path, overwrite) as folder:
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


def load(path: str | Path, device: str = "cpu", dtype: torch.dtype = torch.float32, verify: bool = True) -> nn.Module:
    """Load a packed checkpoint; quantized layers become PackedLinear and are never expanded to dense weights.

    A checkpoint from an untrusted source is safe to load: sizes, shapes, dtypes and values are checked before a model
    is built from them, and nothing in the files is executed.

    Parameters
    ----------
    path : str or Path
        A directory that `save` wrote, the name of a bundled checkpoint ("smollm2-0.55bit"), a checkpoint of the
        authors' repository (official.py), or the Hugging Face hub id of one of these.
    device : str
    dtype : torch.dtype
        Of the tensors that are not packed (embeddings, norms, head).
    verify : bool
        Compare the checksums of config.json and all tensors, where there are any. This reads all files.

    Returns
    -------
    transformers model in eval mode

    Raises
    ------
    CheckpointError
        If the checkpoint is incomplete, corrupt or inconsistent; the message names the file, layer or tensor.
    """
    path = locate_packed(path)
    config, layers, tensors = read_checkpoint(path, verify)
    model = build_model(config, layers, tensors, dtype, path)
    model.name_or_path = str(path)  # type: ignore[assignment]
    model.generation_config = generation_config(path)  # type: ignore[assignment]
    tell_observers(model, config["quantization_config"])
    return cast_dense(model, dtype).to(device)


def read_checkpoint(
    path: Path, verify: bool = False
) -> tuple[dict[str, Any], dict[str, dict[str, Any]], dict[str, Tensor]]:
    """Read a checkpoint's config.json, the `layers` in it and all tensors, and check them against each other.

    Parameters
    ----------
    path : Path
        From `locate_packed`.
    verify : bool
        Compare the checksums too.
    """
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


def verify(path: str | Path) -> dict[str, Any]:
    """Read a whole checkpoint and compare it with its checksums, without building a model.

    Parameters
    ----------
    path : str or Path
        As for `load`.

    Returns
    -------
    dict
        format : str
            As in `info`.
        tensors, tensor_bytes : int
        checksums : bool
            Whether the checkpoint has checksums. Without them only headers, sizes and the values of packed layers are
            checked.
        damaged : list of str
            The tensors that changed since they were saved, "config.json" if that changed, and `checksums.SET` if a
            tensor is missing.

    Raises
    ------
    CheckpointError
        If the checkpoint is incomplete or inconsistent, or its files come from different checkpoints.
    """
    path = locate_packed(path)
    damaged = []
    if is_official(path):
        config, headers, checksums = read_checkpoint(path)[0], read_headers(weight_files(path)), None
    else:
        config, layers = read_config(path)
        files = weight_files(path)
        headers, checksums = read_headers(files), read_checksums(files)
        check_layers(layers, headers)
        damaged = corrupt_tensors(files, headers, config["quantization_config"]["format_version"], config)
        if not damaged:
            check_values(layers, read_tensors(files))
    return {
        "format": format_name(path, config),
        "tensors": len(headers),
        "tensor_bytes": sum(header.nbytes for header in headers.values()),
        "checksums": checksums is not None,
        "damaged": damaged,
    }


def info(path: str | Path) -> dict[str, Any]:
    """Count the bits and bytes that a checkpoint really stores, from its config.json and file headers.

    Parameters
    ----------
    path : str or Path
        As for `load`.

    Returns
    -------
    dict
        bits_per_weight : float
            Bits of the packed layers, biases excluded, over their number of weights.
        target_bits : float or None
            What was asked for.
        weights, linear_bytes, layers : int
            Weights, stored bytes and number of the packed layers, biases excluded.
        kinds : dict
            The same and `bits_per_weight` for each kind of layer ("q_proj").
        other_bytes : int
            All tensors but the packed layers.
        file_bytes : int
            All safetensors files.
        embedding_bits : int
            16, 8 or 4.
        description_bytes : int
            The headers of the safetensors files (names and checksums), config.json and the index of shards.
        described_bits_per_weight : float
            `bits_per_weight` with those bytes included.
        file_bits_per_parameter : float
            Bits of all safetensors files over all parameters of the model.
        model_type, format : str
            Such as "llama", and "littlebit 3" or "official".
        checksums : bool
        kv_factor : float or None
            The authors' format only: the factor on the ranks of k_proj and v_proj.

    Raises
    ------
    CheckpointError
        If the checkpoint is incomplete or inconsistent.
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
    return storage(path, config, layers, owners, headers, files)
