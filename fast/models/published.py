"""Describe models of published shapes by the transformers configuration that builds them."""

from typing import Any

from ..memory import MODEL_SHAPES, ModelShape


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
