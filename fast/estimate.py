"""What quantising or training a model will take, before it is begun: its weights are not read."""

import math
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from .bits import Ranks, Shape, layer_bits, model_bits
from .experts import routers
from .headers import layer_kind
from .hf import empty_model, resolve, transformers
from .model import Config, check_config, factorise, fused_split, linear_shape, plan

PROBE_SECONDS = 0.2
PROBE_SIZE = 512
PROBE_WEIGHTS = 1 << 20  # weights of the largest layers that are tried


def estimate(source: str | Path, config: Config, tokens: int = 0) -> dict[str, Any]:
    """Bits (exact), memory and time (estimates) of quantising a model on this machine's CPU, and of training it.

    A training token takes three multiplications by each latent and entry of the head (forward, and backward for both
    factors of a product), and one by each weight of the teacher.

    Parameters
    ----------
    source : str or Path
        As for `load_model`. Only the configuration is read.
    config : Config
    tokens : int
        Training tokens; 0 for no training.

    Returns
    -------
    dict with `layers`, `weights`, `bits_per_weight` and `linear_bytes` (exact; but for allocation by sensitivity, which
    reads the weights, those of uniform allocation), `file_bytes` (tensors, without the file's header), `memory_bytes`
    (dense model, latents and the largest group of layers at work, in float32; with training also gradients and moments,
    the teacher, but no activations), `quantise_s` and `train_s` (seconds), `kinds` by kind of
    layer, and `routers` (names and weights of the routers of experts, which stay dense).

    Raises
    ------
    ValueError
        If `quantize_` would refuse the config, the bits cannot be met, or no layer matches.
    """
    settings = transformers().AutoConfig.from_pretrained(resolve(source)).to_dict()
    model: Any = empty_model(settings)
    model.tie_weights()
    check_config(config, torch.empty(0))  # no calibration text is read
    with fused_split(model, config):
        layers, ranks = plan(model, config)
    shapes = {name: linear_shape(layer) for name, layer in layers.items()}
    weights = sum(d_out * d_in for d_out, d_in in shapes.values())
    stored = model_bits(shapes, ranks)
    parameters = sum(parameter.numel() for parameter in dict.fromkeys(model.parameters()))
    latents = sum(sum(ranks[name]) * sum(shapes[name]) for name in shapes)
    head = model.get_output_embeddings().weight.numel()
    largest = max(d_out * d_in for d_out, d_in in shapes.values())
    kinds: dict[str, dict[str, Any]] = {}
    for name, (d_out, d_in) in shapes.items():
        kind = kinds.setdefault(layer_kind(name), {"layers": 0, "d_out": d_out, "d_in": d_in, "ranks": ranks[name]})
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
        "routers": routers(model),
    }


def quantise_seconds(shapes: dict[str, Shape], ranks: dict[str, Ranks], config: Config) -> float:
    """Time to factorise all layers: small kinds are tried, and larger ones scaled up from the largest tried."""
    kinds: dict[tuple[Shape, Ranks], int] = {}
    for name, shape in shapes.items():
        kinds[shape, ranks[name]] = kinds.get((shape, ranks[name]), 0) + 1
    work = {(shape, rank): math.prod(shape) * sum(rank) for shape, rank in kinds}
    smallest = min(math.prod(shape) for shape, _ in kinds)
    config = replace(config, importance=False)
    seconds: dict[tuple[Shape, Ranks], float] = {}
    for kind, count in kinds.items():
        if math.prod(kind[0]) <= max(PROBE_WEIGHTS, smallest):
            together = min(count, max(1, PROBE_WEIGHTS // math.prod(kind[0])))
            weights = torch.randn(together, *kind[0], generator=torch.Generator().manual_seed(0))
            if not seconds:
                factorise(weights, kind[1], config, [])  # the first call loads libraries
            start = time.perf_counter()
            factorise(weights, kind[1], config, [])
            seconds[kind] = (time.perf_counter() - start) / together
    tried = max(seconds, key=lambda kind: work[kind])
    return sum(count * seconds.get(kind, seconds[tried] * work[kind] / work[tried]) for kind, count in kinds.items())


def multiplications_per_second() -> float:
    """What a product of matrices in float32 achieves here, in multiplications with their additions."""
    a = torch.ones(PROBE_SIZE, PROBE_SIZE)
    start, count = time.perf_counter(), 0
    while time.perf_counter() - start < PROBE_SECONDS:
        torch.mm(a, a)
        count += 1
    return count * PROBE_SIZE**3 / (time.perf_counter() - start)
