"""Write packed checkpoints of published shapes with random signs, to time models of a size that is not at hand."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..bits import allocate_ranks
from ..checkpoints.checkpoint import save
from ..checkpoints.dense import load_tokenizer
from ..checkpoints.saving import SHARD_BYTES
from ..models.build import empty_model
from ..models.config import Config
from ..models.embeddings import EmbeddingTable, replace_embeddings
from ..models.layers import PackedLinear
from ..models.published import published_config
from ..models.quantize import replace_modules, target_layers
from ..models.shared import assign
from .linear import random_path

TOKENIZER = "tiny"  # whose byte-level tokenizer the checkpoint gets
SCALE = 0.02  # standard deviation of embedding rows and other parameters


def random_checkpoint(
    out: Path,
    config: str | dict[str, Any],
    bits: float,
    paths: int = 1,
    embedding_bits: int = 16,
    shard_bytes: int = SHARD_BYTES,
) -> Path:
    """Write a packed checkpoint of random signs, without making a dense weight of a layer.

    Parameters
    ----------
    out : Path
        Directory to create.
    config : str or dict
        A published shape, or the content of a config.json.
    bits : float
        Most stored bits per weight of the packed layers.
    paths : int
        Paths of each layer.
    embedding_bits : int
        16, 8 or 4 bits for each entry of embedding and head.
    shard_bytes : int
        See `save`.
    """
    model: Any = empty_model(published_config(config) if isinstance(config, str) else config)
    shapes = {name: (layer.out_features, layer.in_features) for name, layer in target_layers(model, Config())}
    generator = torch.Generator().manual_seed(0)
    ranks = allocate_ranks(shapes, bits, paths)
    layers = {
        name: PackedLinear([random_path(*shape, rank, generator) for rank in ranks[name]])
        for name, shape in shapes.items()
    }
    replace_modules(model, layers)
    if embedding_bits != 16:
        rows, size = model.get_input_embeddings().weight.shape
        first = random_table(rows, size, embedding_bits, generator)
        tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
        head = first if tied else random_table(rows, size, embedding_bits, generator)
        replace_embeddings(model, first, head, torch.float32)
    for name, parameter in list(model.named_parameters()):
        values = torch.empty(parameter.shape, dtype=torch.float16).normal_(0, SCALE, generator=generator)
        assign(model, name, torch.nn.Parameter(values))
    model.tie_weights()
    return save(model, out, load_tokenizer(TOKENIZER), bits, shard_bytes=shard_bytes)


def random_table(rows: int, size: int, bits: int, generator: torch.Generator) -> EmbeddingTable:
    """Make a quantized table of random codes, with scales that give its entries the standard deviation SCALE."""
    empty = EmbeddingTable.empty(bits, rows, size, 64 if bits == 8 and size % 64 == 0 else 32)

    def codes(like: Tensor) -> Tensor:
        low, high = (-127, 128) if bits == 8 else (0, 256)
        return torch.randint(low, high, like.shape, generator=generator, dtype=torch.int16).to(like.dtype)

    step = SCALE * (12**0.5) / (254 if bits == 8 else 15)  # a uniform distribution over the codes
    scale = torch.full(empty.scale.shape, step).half()
    offset = torch.full(empty.scale.shape, -7.5 * step).half() if bits == 4 else None
    return EmbeddingTable(bits, codes(empty.codes), scale, offset)
