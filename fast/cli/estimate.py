"""Estimate what quantizing or training a model will store and take, without reading its weights."""

import math
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from ..admm import ADMM_STEPS, admm
from ..alignment import ITQ_STEPS
from ..bits import Ranks, Shape, layer_bits, model_bits
from ..checkpoints.dense import check_dense
from ..checkpoints.fetch import locate
from ..memory import MODEL_SHAPES
from ..models.blocks import decoder_blocks
from ..models.build import empty_model, transformers
from ..models.config import Config, check_config
from ..models.initializers import OVERSAMPLING, factorize
from ..models.packed_shapes import layer_type
from ..models.published import published_config
from ..models.quantize import fused_split, plan_ranks
from ..models.registry import choice_name
from ..models.selection import linear_shape
from .training_cost import (
    FLOAT_BYTES,
    HALF_BYTES,
    PROCESS_BYTES,
    TrainedSizes,
    Workload,
    device_bytes,
    host_bytes,
    seconds,
)

WORK_ARRAYS = 5  # a weight, its residual, its approximation, and what decompositions hold
PROBE_SECONDS = 0.1  # for timing matrix products
PROBE_SIZE = 512  # rows and columns of the matrices that are multiplied, and of the layer that is factorized
PROBE_RANK = 64
PROBE_STEPS = 10
QR_COST = 4  # time of a multiplication in QR or Cholesky / its time in a matrix product
SVD_COST = 50  # time of a full SVD / the time of m n min(m, n) multiplications in a matrix product


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
    stored, sizes = model_bits(shapes, ranks, config.scale_bits), trained_sizes(model, shapes, ranks)
    rate = multiplications_per_second()
    memory = quantization_bytes(sizes, shapes, ranks, stored // 8, config)
    return {
        "layers": len(shapes),
        "weights": sizes.weights,
        "bits_per_weight": stored / sizes.weights,
        "linear_bytes": stored // 8,
        "file_bytes": stored // 8 + HALF_BYTES * sizes.tables,
        "memory_bytes": max(memory, host_bytes(sizes, work)) if work.tokens else memory,
        "gpu_bytes": device_bytes(sizes, work) if work.tokens and work.gpus else {},
        "quantise_s": quantize_seconds(shapes, ranks, config),
        "train_s": seconds(sizes, work, rate) if work.tokens else 0.0,
        "kinds": count_layer_types(shapes, ranks, config.scale_bits),
        "dense": selection.dense,
        "dense_share": selection.share,
    }


def trained_sizes(model: Any, shapes: dict[str, Shape], ranks: dict[str, Ranks]) -> TrainedSizes:
    """Count the sizes of a model that memory and time depend on."""
    weights = sum(d_out * d_in for d_out, d_in in shapes.values())
    parameters = sum(parameter.numel() for parameter in dict.fromkeys(model.parameters()))
    vocabulary, hidden = model.get_output_embeddings().weight.shape
    return TrainedSizes(
        weights,
        parameters - weights,
        latents=sum(sum(ranks[name]) * sum(shapes[name]) for name in shapes),
        scales=sum(sum(ranks[name]) + len(ranks[name]) * sum(shapes[name]) for name in shapes),
        blocks=len(decoder_blocks(model)),
        hidden=hidden,
        vocabulary=vocabulary,
        widths=sum(sum(ranks[name]) + sum(shapes[name]) for name in shapes),
    )


def quantization_bytes(
    sizes: TrainedSizes, shapes: dict[str, Shape], ranks: dict[str, Ranks], packed: int, config: Config
) -> int:
    """Estimate the host memory of quantizing a model whose dense weights stay in their files.

    That is the process, all packed layers, and the most of: the arrays of the largest layer in float32 (WORK_ARRAYS of
    the weight's shape, as many of the factors'); the rest of the model in float16; with calibration, one block in
    float32.
    """
    layer = max(math.prod(shapes[name]) + sum(ranks[name]) * sum(shapes[name]) for name in shapes)
    most = [FLOAT_BYTES * WORK_ARRAYS * layer, HALF_BYTES * sizes.tables]
    if config.needs_calibration():
        most.append(FLOAT_BYTES * max(sizes.weights // sizes.blocks, sizes.vocabulary * sizes.hidden))
    return PROCESS_BYTES + packed + max(most)


def count_layer_types(shapes: dict[str, Shape], ranks: dict[str, Ranks], scale_bits: int) -> dict[str, dict[str, Any]]:
    """Count the layers of each type; take shape and ranks from its first layer, bits per weight from its last."""
    rows: dict[str, dict[str, Any]] = {}
    for name, (d_out, d_in) in shapes.items():
        row = rows.setdefault(layer_type(name), {"layers": 0, "d_out": d_out, "d_in": d_in, "ranks": ranks[name]})
        row["layers"] += 1
        row["bits"] = layer_bits(d_out, d_in, ranks[name], scale_bits) / (d_out * d_in)
    return rows


def configuration(source: str | Path) -> dict[str, Any]:
    """Read the configuration of a dense model or published shape, without weights; refuse a quantized model."""
    if str(source) in MODEL_SHAPES and not Path(source).exists():
        return published_config(str(source))
    if Path(source).name == "config.json":
        source = Path(source).parent
    path = locate(source, weights=False)
    if path.is_dir():
        check_dense(path, source)
        return transformers().AutoConfig.from_pretrained(path, trust_remote_code=False).to_dict()
    from ..checkpoints.gguf_reader import gguf_config, read_gguf_header

    return gguf_config(path, read_gguf_header(path)).to_dict()


def quantize_seconds(shapes: dict[str, Shape], ranks: dict[str, Ranks], config: Config) -> float:
    """Estimate the time to factorize all layers, from a matrix product and one small layer that are timed here.

    Large layers spend their time in matrix products. The rest is elementwise work on the entries of both factors, whose
    time for one entry comes from the small layer.
    """
    rate = multiplications_per_second()
    products = multiplications((PROBE_SIZE, PROBE_SIZE), PROBE_RANK, choice_name(config.init), PROBE_STEPS)
    elementwise = max(probe_seconds(config) - products / rate, 0)
    steps_ratio = ADMM_STEPS / PROBE_STEPS if config.init == "admm" else 1
    entry_seconds = elementwise * steps_ratio / (2 * PROBE_SIZE * PROBE_RANK)
    counts = Counter((shapes[name], rank) for name in shapes for rank in ranks[name])
    return sum(
        count
        * (
            multiplications(shape, rank, choice_name(config.init), ADMM_STEPS) / rate
            + entry_seconds * sum(shape) * rank
        )
        for (shape, rank), count in counts.items()
    )


def probe_seconds(config: Config) -> float:
    """Time the factorization of one small layer, with PROBE_STEPS steps of ADMM."""
    weight = torch.randn(PROBE_SIZE, PROBE_SIZE, generator=torch.Generator().manual_seed(0))
    sketch = torch.randn(PROBE_SIZE, PROBE_RANK + OVERSAMPLING, generator=torch.Generator().manual_seed(1))

    def run(rank: int, steps: int) -> None:
        if config.init == "admm":
            admm(weight, rank, sketch, steps)
        else:
            factorize(weight[None], (rank,), config.init, config.seed)

    run(1, 1)  # The first call loads libraries.
    start = time.perf_counter()
    run(PROBE_RANK, PROBE_STEPS)
    return time.perf_counter() - start


def multiplications(shape: Shape, rank: int, init: str, steps: int) -> float:
    """Count the multiplications in the matrix products and decompositions that factorize one path of a layer.

    A multiplication in a decomposition takes longer than in a product, so it counts QR_COST times in QR, Cholesky and
    the small SVD. If the rank is so large that `factorize` decomposes the whole weight, its SVD counts SVD_COST times
    m n min(m, n).
    """
    (d_out, d_in), columns = shape, rank + OVERSAMPLING
    if 3 * columns < min(shape):
        count = 10 * d_out * d_in * columns + 10 * QR_COST * (d_out + d_in) * columns**2
    else:
        count = SVD_COST * d_out * d_in * min(shape)
    if init == "itq":
        count += ITQ_STEPS * ((d_out + d_in) * rank**2 + SVD_COST * rank**3)
    if init == "admm":
        count += steps * (2 * d_out * d_in * rank + QR_COST * (d_out + d_in) * rank**2)
    return count


def multiplications_per_second() -> float:
    """Measure the speed of a float32 matrix product here, in multiply-adds per second."""
    a = torch.ones(PROBE_SIZE, PROBE_SIZE)
    start, count = time.perf_counter(), 0
    while time.perf_counter() - start < PROBE_SECONDS:
        torch.mm(a, a)
        count += 1
    return count * PROBE_SIZE**3 / (time.perf_counter() - start)
