"""Translate between the shape of a model and the transformers configuration that builds it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..memory import MODEL_SHAPES, ModelShape


def is_published(source: str | Path) -> bool:
    """Tell whether a model's name is that of a published shape, and not of a path."""
    return str(source) in MODEL_SHAPES and not Path(source).exists()


def published_config(name: str, layers: int | None = None) -> dict[str, Any]:
    """Make the content of config.json for a model of a published shape.

    Parameters
    ----------
    name : str
        A name in `memory.MODEL_SHAPES`.
    layers : int, optional
        Number of decoder blocks; by default all of the shape's.

    Raises
    ------
    ValueError
        If no shape has this name.

    Examples
    --------
    >>> config = published_config("llama2-7b")
    >>> config["model_type"], config["hidden_size"], config["num_hidden_layers"]
    ('llama', 4096, 32)
    """
    if name not in MODEL_SHAPES:
        raise ValueError(f"the shape must be one of {', '.join(MODEL_SHAPES)}, got {name!r}")
    shape = MODEL_SHAPES[name]
    shape = shape._replace(layers=shape.layers if layers is None else layers)
    config: dict[str, Any] = {
        "model_type": model_type(shape),
        "hidden_size": shape.hidden,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "vocab_size": shape.vocabulary,
        "max_position_embeddings": shape.context,
        "tie_word_embeddings": shape.tied,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": None,
        "dtype": "bfloat16",
    }
    if config["model_type"] == "opt":
        return config | {"ffn_dim": shape.intermediate, "word_embed_proj_dim": shape.hidden, "pad_token_id": 1}
    return config | {"intermediate_size": shape.intermediate, "num_key_value_heads": shape.kv_heads}


def model_type(shape: ModelShape) -> str:
    """Name the transformers architecture that has a shape's layers and biases."""
    if not shape.gated:
        return "opt"
    if shape.fused:
        return "phi3"
    return {"none": "llama", "qkv": "qwen2"}[shape.biases]


#: Names of a gated architecture's sizes in config.json, in the order of ModelShape.
SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
#: Architecture -> biases and fused, as in ModelShape. The parameters of these follow from the sizes alone.
GATED = {"llama": ("none", False), "mistral": ("none", False), "qwen2": ("qkv", False), "phi3": ("none", True)}


def config_shape(config: Mapping[str, Any]) -> ModelShape | None:
    """Read the shape of a model from its config.json, without torch.

    Parameters
    ----------
    config : mapping

    Returns
    -------
    ModelShape, or None if the architecture is not in GATED, adds biases, or a size is missing.

    Examples
    --------
    >>> config_shape(published_config("llama3-8b"))[1:] == MODEL_SHAPES["llama3-8b"][1:]
    True
    >>> config_shape({"model_type": "mamba"})
    """
    if config.get("model_type") not in GATED or config.get("attention_bias") or config.get("mlp_bias"):
        return None
    heads = config.get("num_attention_heads")
    sizes: list[Any] = [config.get(key) for key in SIZES]
    sizes += [config.get("num_key_value_heads") or heads]
    sizes += [config.get("vocab_size"), config.get("max_position_embeddings", 1)]
    if not all(isinstance(size, int) and size > 0 for size in sizes):
        return None
    hidden, intermediate, layers, heads, kv_heads, vocabulary, context = sizes
    head_size = config.get("head_dim") or hidden // heads
    biases, fused = GATED[config["model_type"]]
    tied = bool(config.get("tie_word_embeddings", False))
    values = hidden, intermediate, layers, heads, kv_heads, head_size, vocabulary, context
    return ModelShape("config.json", *values, tied=tied, biases=biases, fused=fused)
