"""What quantising or training a model will take, before it is begun: its weights are not read."""

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

PROBE_SECONDS = 0.1
PROBE_SIZE = 512  # rows and columns of the matrices that are multiplied, and of the layer that is factorised
PROBE_RANK = 64
PROBE_STEPS = 10
DECOMPOSITION = 4  # time of a multiplication in QR or Cholesky, in those of a product
EXACT = 50  # time of a full SVD, in multiplications of a product for each m n min(m, n)


def estimate(source: str | Path, config: Config, tokens: int = 0) -> dict[str, Any]:
    """Bits (exact), memory and time (estimates) of quantising a model on this machine's CPU, and of training it.

    A training token takes three multiplications by each latent and entry of the head (forward, and backward for both
    factors of a product), and one by each weight of the teacher.

    Parameters
    ----------
    source : str or Path
        As for `load_model`. Only the configuration is read, of a GGUF file the header.
    config : Config
    tokens : int
        Training tokens; 0 for no training.

    Returns
    -------
    dict with `layers`, `weights`, `bits_per_weight` and `linear_bytes` (exact; but for allocation by sensitivity, which
    reads the weights, those of uniform allocation), `file_bytes` (tensors, without the file's header), `memory_bytes`
    (dense model, latents and the largest group of layers at work, in float32; with training also gradients and moments,
    the teacher, but no activations), `quantise_s` and `train_s` (seconds), `kinds` by kind of layer, `dense` (why each
    selected layer that cannot be quantised stays dense) and `dense_share` (their part of the selected weights).

    Raises
    ------
    ValueError
        If `load_model` would refuse what there is, or `quantize_` the config, the bits cannot be met, or no layer
        matches.
    """
    with torch.device("meta"):
        model: Any = empty_model(configuration(source))
    model.tie_weights()
    check_config(config, torch.empty(0))  # no calibration text is read
    with fused_split(model, config):
        selection, ranks = plan_ranks(model, config)
    layers = selection.layers
    shapes = {name: linear_shape(layer) for name, layer in layers.items()}
    weights = sum(d_out * d_in for d_out, d_in in shapes.values())
    stored = model_bits(shapes, ranks)
    parameters = sum(parameter.numel() for parameter in dict.fromkeys(model.parameters()))
    latents = sum(sum(ranks[name]) * sum(shapes[name]) for name in shapes)
    head = model.get_output_embeddings().weight.numel()
    largest = max(d_out * d_in for d_out, d_in in shapes.values())
    kinds: dict[str, dict[str, Any]] = {}
    for name, (d_out, d_in) in shapes.items():
        kind = kinds.setdefault(layer_type(name), {"layers": 0, "d_out": d_out, "d_in": d_in, "ranks": ranks[name]})
        kind["layers"] += 1
        kind["bits"] = layer_bits(d_out, d_in, ranks[name]) / (d_out * d_in)
    memory = 4 * (parameters + latents + 4 * largest)
    if tokens:
        memory += 4 * (parameters + 3 * (latents + parameters - weights))
    return {
        "layers": len(layers),
        "weights": weights,
        "bits_per_weight": stored / weights,
        "linear_bytes": stored // 8,
        "file_bytes": stored // 8 + 2 * (parameters - weights),
        "memory_bytes": memory,
        "quantise_s": quantise_seconds(shapes, ranks, config),
        "train_s": tokens * (3 * (latents + head) + weights + head) / multiplications_per_second() if tokens else 0.0,
        "kinds": kinds,
        "dense": selection.dense,
        "dense_share": selection.share,
    }


def configuration(source: str | Path) -> dict[str, Any]:
    """Return the configuration of a dense model, without its weights; what others quantised is refused."""
    path = locate(source, weights=False)
    if path.is_dir():
        check_dense(path, source)
        return transformers().AutoConfig.from_pretrained(path, trust_remote_code=False).to_dict()
    from ..checkpoints.gguf_reader import gguf_config, read_gguf_header

    return gguf_config(path, read_gguf_header(path)).to_dict()


def quantise_seconds(shapes: dict[str, Shape], ranks: dict[str, Ranks], config: Config) -> float:
    """Estimate the time to factorise all layers, from a product of matrices and one small layer, which are timed here.

    Large layers spend their time on products; the rest goes over the entries of both factors a number of times, which
    the small layer tells.
    """
    rate, probe = multiplications_per_second(), ((PROBE_SIZE, PROBE_SIZE), PROBE_RANK)
    passes = probe_seconds(config) - products(*probe, choice_name(config.init), PROBE_STEPS) / rate
    share = ADMM_STEPS / PROBE_STEPS if config.init == "admm" else 1
    each = max(passes, 0) * share / (2 * PROBE_SIZE * PROBE_RANK)  # seconds for an entry of a factor
    kinds = Counter((shapes[name], rank) for name in shapes for rank in ranks[name])
    return sum(
        count * (products(shape, rank, choice_name(config.init), ADMM_STEPS) / rate + each * sum(shape) * rank)
        for (shape, rank), count in kinds.items()
    )


def probe_seconds(config: Config) -> float:
    """Time the factorisation of one small layer; ADMM with fewer steps."""
    weight = torch.randn(PROBE_SIZE, PROBE_SIZE, generator=torch.Generator().manual_seed(0))
    sketch = torch.randn(PROBE_SIZE, PROBE_RANK + OVERSAMPLING, generator=torch.Generator().manual_seed(1))

    def run(rank: int, steps: int) -> None:
        if config.init == "admm":
            admm(weight, rank, sketch, steps)
        else:
            factorize(weight[None], (rank,), config.init, config.seed)

    run(1, 1)  # the first call loads libraries
    start = time.perf_counter()
    run(PROBE_RANK, PROBE_STEPS)
    return time.perf_counter() - start


def products(shape: Shape, rank: int, init: str, steps: int) -> float:
    """Count the multiplications in the products and decompositions of matrices that one path of a layer takes.

    Those in a decomposition take longer, and count several times: DECOMPOSITION times in QR, the small SVD and
    Cholesky. Where the rank is so near the sizes that `factorize` decomposes the whole weight, that takes EXACT times
    m n min(m, n).
    """
    (d_out, d_in), columns = shape, rank + OVERSAMPLING
    if 3 * columns < min(shape):
        count = 10 * d_out * d_in * columns + 10 * DECOMPOSITION * (d_out + d_in) * columns**2
    else:
        count = EXACT * d_out * d_in * min(shape)
    if init == "itq":
        count += ITQ_STEPS * ((d_out + d_in) * rank**2 + EXACT * rank**3)
    if init == "admm":
        count += steps * (2 * d_out * d_in * rank + DECOMPOSITION * (d_out + d_in) * rank**2)
    return count


def multiplications_per_second() -> float:
    """What a product of matrices in float32 achieves here, in multiplications with their additions."""
    a = torch.ones(PROBE_SIZE, PROBE_SIZE)
    start, count = time.perf_counter(), 0
    while time.perf_counter() - start < PROBE_SECONDS:
        torch.mm(a, a)
        count += 1
    return count * PROBE_SIZE**3 / (time.perf_counter() - start)
