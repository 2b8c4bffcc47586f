"""Export a model as a dense GGUF file for llama.cpp, in 16 or 8 bits per weight.

GGUF has no packed LittleBit layer, so each layer is expanded to its dense weight. The file is as large, and runs as
fast, as any dense model; it serves to evaluate and compare a trained model elsewhere.
"""

import json
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from .._checks import LittleBitWarning, has_sliding_window
from ..files.atomic import atomic_file, check_file, check_room
from ..models.embeddings import QuantizedEmbedding, QuantizedHead
from ..models.generation_settings import GenerationDefaults, generation_defaults
from ..models.layers import ConcatLinear, PackedLinear, stored_half
from ..models.shared import refuse_shared
from ..models.wrappers import without_adapters

ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
PRECISIONS = ("f16", "q8_0")
BLOCK = 32  # weights per scale in Q8_0


def save_gguf(model: Any, path: str | Path, tokenizer: Any, precision: str = "f16", overwrite: bool = False) -> Path:
    """Write a packed or dense model as a dense GGUF file, atomically.

    Parameters
    ----------
    model : transformers model, from `load` or `load_model`
        A Llama, Mistral, Qwen2 or Qwen3.
    path : str or Path
        File to create.
    tokenizer : transformers tokenizer
        A byte-level BPE, such as the tokenizers of Llama 3, Qwen and SmolLM2.
    precision : str
        "f16", or "q8_0": blocks of 32 weights in 8 bits with a 16-bit scale. Vectors are stored in 32 bits.
    overwrite : bool
        Replace an existing file.

    Returns
    -------
    Path
        The file.

    Raises
    ------
    ValueError
        If the architecture, tokenizer or precision is not supported, or the model has adapters of PEFT.
    OSError
        If `path` exists and may not be replaced, or cannot be written.
    """
    from ..models.build import transformers

    transformers()  # explains what to install if it is missing; gguf comes with it
    path = Path(path)
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
    place = check_gguf(path, overwrite)
    model = without_adapters(model, "save_gguf")
    check_architecture(model)
    refuse_shared(model, "a GGUF file")
    byte_level_vocabulary(tokenizer)
    check_room(place, dense_bytes(model, precision))
    try:
        with atomic_file(place) as part:
            write_model(part, model, tokenizer, precision)
    except OSError as error:
        raise OSError(f"cannot write {path}: {error.strerror or error}; nothing was left there") from error
    return path


def write_model(part: Path, model: Any, tokenizer: Any, precision: str) -> None:
    """Write a model to a GGUF file; see `save_gguf`."""
    import gguf

    architecture, vocabulary = check_architecture(model), byte_level_vocabulary(tokenizer)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[architecture.upper()], model.config.num_hidden_layers)
    writer = gguf.GGUFWriter(part, architecture, use_temp_file=True)  # else it holds all tensors in memory
    try:
        add_settings(writer, model.config, precision)
        add_vocabulary(writer, vocabulary, tokenizer, model.config.vocab_size)
        add_generation(writer, tokenizer, generation_defaults(model))
        for name, tensor in dense_tensors(model):
            if architecture == "llama":
                tensor = interleaved(name, tensor, model.config)
            known = names.get_name(name, try_suffixes=(".weight", ".bias"))
            if known is None:
                raise ValueError(f"GGUF's {architecture} has no name for tensor {name}: this model cannot be exported")
            add_tensor(writer, known, tensor, precision)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()
        if writer.temp_file is not None:
            writer.temp_file.close()


def check_gguf(path: Path, overwrite: bool) -> Path:
    """Resolve the path of a GGUF file, and check that it can be written.

    Raises
    ------
    OSError
        If it exists and may not be replaced, is not an ordinary file, or cannot be written.
    """
    if os.path.exists(path) and not (overwrite and path.is_file()):
        raise FileExistsError(f"{path} exists already; choose another file, or pass overwrite=True (--overwrite)")
    return check_file(path)


def dense_bytes(model: nn.Module, precision: str) -> int:
    """Estimate the size of a model's GGUF file in bytes."""
    bits = {"f16": 16, "q8_0": 8.5}[precision]
    packed = sum(module.d_out * module.d_in for module in model.modules() if isinstance(module, PackedLinear))
    return int(bits * (packed + sum(parameter.numel() for parameter in model.parameters())) / 8)


def check_architecture(model: Any) -> str:
    """Return GGUF's name of a model's architecture.

    Raises
    ------
    ValueError
        If it cannot be exported: it is not in ARCHITECTURES, has split layers, scaled positions, sliding windows or
        another activation than SiLU.
    """
    config = model.config
    if config.model_type not in ARCHITECTURES or any(isinstance(module, ConcatLinear) for module in model.modules()):
        raise ValueError(
            f"GGUF files are written of {', '.join(ARCHITECTURES)} models with whole layers, not of {config.model_type}"
        )
    if rope(config).get("rope_type", "default") != "default" or rope(config).get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(f"GGUF files are written of models with plain rotary positions, not {rope(config)}")
    if has_sliding_window(config.to_dict()):
        raise ValueError("GGUF files are written of models without sliding windows")
    if config.hidden_act != "silu":
        raise ValueError(
            f"llama.cpp computes {config.model_type} models with the activation silu, not {config.hidden_act}"
        )
    return ARCHITECTURES[config.model_type]


def rope(config: Any) -> dict[str, Any]:
    """Return the rotary settings of a configuration."""
    return getattr(config, "rope_parameters", None) or {}


def dense_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the names and values of a model's parameters, with packed layers and embeddings expanded."""
    seen = set()
    for name, module in model.named_modules():
        if isinstance(module, PackedLinear):
            yield f"{name}.weight", module.weight
            if module.bias is not None:
                yield f"{name}.bias", module.bias
        elif isinstance(module, QuantizedEmbedding | QuantizedHead):
            if module.table not in seen:
                yield f"{name}.weight", module.table.rows(slice(None))
            seen.add(module.table)
        else:
            for key, parameter in module.named_parameters(recurse=False):
                if parameter not in seen:
                    yield f"{name}.{key}", parameter.detach()
                seen.add(parameter)


def interleaved(name: str, tensor: Tensor, config: Any) -> Tensor:
    """Reorder the rows of q_proj and k_proj for GGUF's llama, where pairs that rotate together are neighbours.

    In transformers they are half a head apart. Other tensors are returned unchanged.
    """
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
    return tensor if heads is None else tensor.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def add_tensor(writer: Any, name: str, tensor: Tensor, precision: str) -> None:
    """Add a tensor to a GGUF file: vectors in float32, matrices in float16 or Q8_0."""
    import gguf

    values = tensor.float().contiguous().numpy()
    if tensor.ndim < 2:
        writer.add_tensor(name, values)
    elif precision == "q8_0" and tensor.shape[-1] % BLOCK == 0:
        kind = gguf.GGMLQuantizationType.Q8_0
        writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
    else:
        writer.add_tensor(name, stored_half(name, tensor).contiguous().numpy())


def add_settings(writer: Any, config: Any, precision: str) -> None:
    """Add the sizes and settings of the model to a GGUF file."""
    import gguf

    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_name(Path(str(getattr(config, "name_or_path", "") or "model")).name)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_dimension_count(head)
    writer.add_rope_freq_base(float(rope(config).get("rope_theta", 10000.0)))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    kinds = {"f16": gguf.LlamaFileType.MOSTLY_F16, "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0}
    writer.add_file_type(kinds[precision])


def byte_level_vocabulary(tokenizer: Any) -> dict[str, Any]:
    """Return the content of tokenizer.json plus `pre`, llama.cpp's name of its pre-tokenizer.

    Raises
    ------
    ValueError
        If it is not a byte-level BPE, or llama.cpp's name of its pre-tokenizer is not known here.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    described = json.loads(backend.to_str()) if backend is not None else {}
    if described.get("model", {}).get("type") != "BPE" or described["model"].get("byte_fallback"):
        raise ValueError(
            "GGUF files are written with byte-level BPE tokenizers only, such as those for Llama 3, Qwen and SmolLM2; "
            "keep this model as safetensors"
        )
    return described | {"pre": pre_tokenizer_name(described.get("pre_tokenizer") or {})}


def pre_tokenizer_name(before: dict[str, Any]) -> str:
    """Return llama.cpp's name of a pre-tokenizer, which splits text before the merges."""
    steps = before.get("pretokenizers", [before])
    types = [step.get("type") for step in steps]
    if types == ["ByteLevel"]:
        return "gpt-2"
    if types == ["Digits", "ByteLevel"] and steps[0]["individual_digits"]:
        return "smollm"
    if types == ["Split", "ByteLevel"]:
        pattern = str(steps[0]["pattern"])
        return "llama-bpe" if r"\\p{N}{1,3}" in pattern else "qwen2"
    raise ValueError(f"the pre-tokenizer must be one that llama.cpp has, got {types}: this tokenizer is not supported")


def add_vocabulary(writer: Any, described: dict[str, Any], tokenizer: Any, size: int) -> None:
    """Add tokens, merges and special tokens to a GGUF file, padded to the rows of the model's embedding."""
    import gguf

    tokens = {at: token for token, at in described["model"]["vocab"].items()}
    special = {each["id"]: each for each in described["added_tokens"]}
    tokens |= {at: each["content"] for at, each in special.items()}
    kinds = []
    for at in range(size):
        ordinary = gguf.TokenType.NORMAL if at in tokens else gguf.TokenType.UNUSED
        added = gguf.TokenType.CONTROL if special.get(at, {}).get("special") else gguf.TokenType.USER_DEFINED
        kinds.append(added if at in special else ordinary)
    merges = described["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(described["pre"])
    writer.add_token_list([tokens.get(at, f"[PAD{at}]") for at in range(size)])
    writer.add_token_types(kinds)
    writer.add_token_merges([each if isinstance(each, str) else " ".join(each) for each in merges])
    writer.add_add_bos_token(
        len(tokenizer("a")["input_ids"]) > len(tokenizer("a", add_special_tokens=False)["input_ids"])
    )
    for name in ("bos", "pad", "unk"):
        token = getattr(tokenizer, f"{name}_token_id", None)
        if token is not None:
            getattr(writer, f"add_{name}_token_id")(token)
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = [{"name": name, "template": text} for name, text in template.items()]
    if template:
        writer.add_chat_template(template)


def add_generation(writer: Any, tokenizer: Any, settings: GenerationDefaults) -> None:
    """Add the first two stop tokens to a GGUF file, and warn of the settings that GGUF cannot store."""
    stop = list(settings.config.stop_tokens or ())
    if tokenizer.eos_token_id is not None and (tokenizer.eos_token_id in stop or not stop):
        stop = [tokenizer.eos_token_id, *(token for token in stop if token != tokenizer.eos_token_id)]
    for token, name in zip(stop, ("eos", "eot"), strict=False):
        getattr(writer, f"add_{name}_token_id")(token)
    unsaid = [f"the stop tokens {', '.join(map(str, stop[2:]))}"] if stop[2:] else []
    if settings.config.temperature or settings.config.repetition_penalty not in (None, 1):
        unsaid.append(f"how to choose tokens: {settings.config.described()}")
    unsaid += [f"that generation_config sets {settings.unsupported}"] if settings.unsupported else []
    if unsaid:
        warnings.warn(
            f"the GGUF file does not say {' and '.join(unsaid)}: pass that to llama.cpp", LittleBitWarning, stacklevel=3
        )
