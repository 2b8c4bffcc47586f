"""Estimate what quantizing or training a model will store and take, without reading its weights."""

import math
from pathlib import Path
from typing import Any

import torch

from ..bits import Ranks, Shape
from ..checkpoints.dense_files import locate_dense
from ..models.blocks import decoder_blocks
from ..models.build import empty_model, transformers
from ..models.config import Config, check_config
from ..models.published import is_published, published_config
from ..models.quantize import fused_split, plan_ranks
from ..models.registry import choice_name
from ..models.selection import linear_shape
from .quantization_cost import costs, trained_sizes
from .training_cost import TrainedSizes, Workload


def estimate(source: str | Path, config: Config, work: Workload | int = 0) -> dict[str, Any]:
    """Estimate bits, memory and time of quantizing a model on this machine's CPU, and of training it.

    Parameters
    ----------
    source : str or Path
        A model that `load_model` accepts, a config.json, or a published shape. Only the configuration is read, or a
        GGUF file's header.
    config : Config
    work : Workload or int
        How the model is trained; an int is a number of tokens on the CPU, 0 for no training.

    Returns
    -------
    dict
        `layers`, `weights`, `bits_per_weight`, `linear_bytes`: exact, but for allocation by sensitivity, which needs
        the weights; it is counted as uniform. `file_bytes`: the tensors, without the file's header. `memory_bytes`:
        host memory of quantizing or, if that is more, of training. `quantise_s`, `train_s`: seconds. `gpu_bytes`: with
        GPUs, the memory of each by part (see `training_cost.device_bytes`). `kinds`: a row for each layer type.
        `dense`: why a selected layer cannot be quantized. `dense_share`: the part of the selected weights in such
        layers.

    Raises
    ------
    ValueError
        If `load_model` would refuse the model or `quantize_` the config, the bits are too few, or no layer matches.
    """
    work = Workload(tokens=work) if isinstance(work, int) else work
    with torch.device("meta"):
        model: Any = empty_model(configuration(source))
    model.tie_weights()
    check_config(config, torch.empty(0))  # Any tensor passes for the calibration tokens, which are not read.
    with fused_split(model, config):
        selection, ranks = plan_ranks(model, config)
    shapes = {name: linear_shape(layer) for name, layer in selection.layers.items()}
    sizes = model_sizes(model, shapes, ranks)
    init = choice_name(config.init)
    found = costs(shapes, ranks, sizes, work, init, config.scale_bits, config.needs_calibration())
    return found | {"dense": selection.dense, "dense_share": selection.share}


def model_sizes(model: Any, shapes: dict[str, Shape], ranks: dict[str, Ranks]) -> TrainedSizes:
    """Count the sizes of a transformers model that memory and time depend on."""
    parameters = sum(parameter.numel() for parameter in dict.fromkeys(model.parameters()))
    vocabulary, hidden = model.get_output_embeddings().weight.shape
    tables = parameters - sum(math.prod(shape) for shape in shapes.values())
    return trained_sizes(shapes, ranks, tables, len(decoder_blocks(model)), hidden, vocabulary)


def configuration(source: str | Path) -> dict[str, Any]:
    """Read the configuration of a dense model or published shape, without weights; refuse a quantized model."""
    if is_published(source):
        return published_config(str(source))
    path = locate_dense(source)
    if path.is_dir():
        return transformers().AutoConfig.from_pretrained(path, trust_remote_code=False).to_dict()
    from ..checkpoints.gguf_reader import gguf_config, read_gguf_header

    return gguf_config(path, read_gguf_header(path)).to_dict()
