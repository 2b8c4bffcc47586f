"""Estimate what quantizing or training a model will store and take, without reading its weights."""

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
from ..models.build import empty_model, transformers
from ..models.config import Config, check_config
from ..models.initializers import OVERSAMPLING, factorize
from ..models.packed_shapes import layer_type
from ..models.quantize import fused_split, plan_ranks
from ..models.registry import choice_name
from ..models.selection import linear_shape

PROBE_SECONDS = 0.1  # for timing matrix products
PROBE_SIZE = 512  # rows and columns of the matrices that are multiplied, and of the layer that is factorized
PROBE_RANK = 64
PROBE_STEPS = 10
QR_COST = 4  # time of a multiplication in QR or Cholesky / its time in a matrix product
SVD_COST = 50  # time of a full SVD / the time of m n min(m, n) multiplications in a matrix product


def estimate(source: str | Path, config: Config, tokens: int = 0) -> dict[str, Any]:
    """Estimate bits, memory and time of quantizing a model on this machine's CPU, and of training it.

    Training on a token multiplies three times by each latent factor and entry of the head: once forward, twice
    backward. It multiplies once by each weight of the teacher.

    Parameters
    ----------
    source : str or Path
        A model that `load_model` accepts. Only its configuration is read, or a GGUF file's header.
    config : Config
    tokens : int
        Training tokens; 0 for no training.

    Returns
    -------
    dict
        `layers`, `weights`, `bits_per_weight`, `linear_bytes`: exact, but for allocation by sensitivity, which needs
        the weights; it is counted as uniform. `file_bytes`: the tensors, without the file's header. `memory_bytes`:
        the dense model, the latent factors and the largest layer's work arrays in float32; with training also
        gradients, moments and the teacher, but no activations. `quantise_s`, `train_s`: seconds. `kinds`: a row for
        each layer type. `dense`: why a selected layer cannot be quantized. `dense_share`: the part of the selected
        weights in such layers.

    Raises
    ------
    ValueError
        If `load_model` would refuse the model or `quantize_` the config, the bits are too few, or no layer matches.
    """
    with torch.device("meta"):
        model: Any = empty_model(configuration(source))
    model.tie_weights()
    check_config(config, torch.empty(0))  # Any tensor passes for the calibration tokens, which are not read.
    with fused_split(model, config):
        selection, ranks = plan_ranks(model, config)
    shapes = {name: linear_shape(layer) for name, layer in selection.layers.items()}
    weights = sum(d_out * d_in for d_out, d_in in shapes.values())
    stored = model_bits(shapes, ranks, config.scale_bits)
    parameters = sum(parameter.numel() for parameter in dict.fromkeys(model.parameters()))
    latents = sum(sum(ranks[name]) * sum(shapes[name]) for name in shapes)
    head = model.get_output_embeddings().weight.numel()
    memory = 4 * (parameters + latents + 4 * max(d_out * d_in for d_out, d_in in shapes.values()))
    if tokens:
        memory += 4 * (parameters + 3 * (latents + parameters - weights))
    return {
        "layers": len(shapes),
        "weights": weights,
        "bits_per_weight": stored / weights,
        "linear_bytes": stored // 8,
        "file_bytes": stored // 8 + 2 * (parameters - weights),
        "memory_bytes": memory,
        "quantise_s": quantize_seconds(shapes, ranks, config),
        "train_s": tokens * (3 * (latents + head) + weights + head) / multiplications_per_second() if tokens else 0.0,
        "kinds": count_layer_types(shapes, ranks, config.scale_bits),
        "dense": selection.dense,
        "dense_share": selection.share,
    }


def count_layer_types(shapes: dict[str, Shape], ranks: dict[str, Ranks], scale_bits: int) -> dict[str, dict[str, Any]]:
    """Count the layers of each type; take shape and ranks from its first layer, bits per weight from its last."""
    rows: dict[str, dict[str, Any]] = {}
    for name, (d_out, d_in) in shapes.items():
        row = rows.setdefault(layer_type(name), {"layers": 0, "d_out": d_out, "d_in": d_in, "ranks": ranks[name]})
        row["layers"] += 1
        row["bits"] = layer_bits(d_out, d_in, ranks[name], scale_bits) / (d_out * d_in)
    return rows


def configuration(source: str | Path) -> dict[str, Any]:
    """Read the configuration of a dense model, without its weights; refuse a quantized one."""
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
