"""Dense models as GGUF files, for llama.cpp: what the packed layers stand for, in 16 or 8 bits a weight.

GGUF has no packed LittleBit layer, so the file is as large as that of any dense model and runs as fast as one. It is
there to evaluate a trained model elsewhere, and to compare.
"""

import json
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from .._checks import LittleBitWarning, has_sliding_window
from ..files.atomic import check_file, check_room, file_whole
from ..models.embeddings import QuantizedEmbedding, QuantizedHead
from ..models.generation_settings import GenerationDefaults, generation_defaults
from ..models.layers import Joined, PackedLinear, stored_half
from ..models.shared import refuse_shared
from ..models.wrappers import without_adapters

ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
PRECISIONS = ("f16", "q8_0")
BLOCK = 32  # weights that share a scale in Q8_0


def save_gguf(model: Any, path: str | Path, tokenizer: Any, precision: str = "f16", overwrite: bool = False) -> Path:
    """Write the dense model that a packed one stands for; complete, or not at all.

    Parameters
    ----------
    model : transformers model from `load`, or a dense one
        A Llama, Mistral, Qwen2 or Qwen3.
    path : str or Path
        File to make.
    tokenizer : transformers tokenizer
        A byte-level BPE, as those of Llama 3, Qwen and SmolLM2.
    precision : str
        "f16", or "q8_0": blocks of 32 weights in 8 bits with a 16-bit scale. Vectors are kept in 32 bits.
    overwrite : bool
        Replace an existing file.

    Returns
    -------
    The file.

    Raises
    ------
    ValueError
        If the architecture, the tokenizer or the precision cannot be written, or the model has adapters of PEFT.
    OSError
        If `path` exists and may not be replaced, or cannot be written.
    """
    from ..models.build import transformers

    transformers()  # gguf comes with it, and its absence is explained
    path = Path(path)
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, not {precision!r}")
    place = check_gguf(path, overwrite)
    model = without_adapters(model, "save_gguf")
    check_architecture(model)
    refuse_shared(model, "a GGUF file")
    byte_level_vocabulary(tokenizer)
    check_room(place, dense_bytes(model, precision))
    try:
        with file_whole(place) as part:
            write_model(part, model, tokenizer, precision)
    except OSError as error:
        raise OSError(f"cannot write {path}: {error.strerror or error}; nothing was left there") from error
    return path


def write_model(part: Path, model: Any, tokenizer: Any, precision: str) -> None:
    """Write a model to a GGUF file; see `save_gguf`."""
    import gguf

    architecture, vocabulary = check_architecture(model), byte_level_vocabulary(tokenizer)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[architecture.upper()], model.config.num_hidden_layers)
    writer = gguf.GGUFWriter(part, architecture, use_temp_file=True)  # else all tensors would be in memory at once
    try:
        add_settings(writer, model.config, precision)
        add_vocabulary(writer, vocabulary, tokenizer, model.config.vocab_size)
        add_generation(writer, tokenizer, generation_defaults(model))
        for name, tensor in dense_tensors(model):
            if architecture == "llama":
                tensor = interleaved(name, tensor, model.config)
            known = names.get_name(name, try_suffixes=(".weight", ".bias"))
            if known is None:
                raise ValueError(f"tensor {name} has no name in GGUF's {architecture}; export such models elsewhere")
            add_tensor(writer, known, tensor, precision)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()
        if writer.temp_file is not None:
            writer.temp_file.close()


def check_gguf(path: Path, overwrite: bool) -> Path:
    """The place of a GGUF file that is to be written.

    Raises
    ------
    OSError
        If it exists and may not be replaced, is no ordinary file, or cannot be written.
    """
    if os.path.exists(path) and not (overwrite and path.is_file()):
        raise FileExistsError(f"{path} exists already; choose another file, or pass overwrite=True (--overwrite)")
    return check_file(path)


def dense_bytes(model: nn.Module, precision: str) -> int:
    """Bytes of the matrices of a GGUF file, about."""
    bits = {"f16": 16, "q8_0": 8.5}[precision]
    packed = sum(module.d_out * module.d_in for module in model.modules() if isinstance(module, PackedLinear))
    return int(bits * (packed + sum(parameter.numel() for parameter in model.parameters())) / 8)


def check_architecture(model: Any) -> str:
    """GGUF's name of a model's architecture.

    Raises
    ------
    ValueError
        If it is not one of those that can be written, or its positions are scaled.
    """
    config = model.config
    if config.model_type not in ARCHITECTURES or any(isinstance(module, Joined) for module in model.modules()):
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
    """Settings of the rotary positions."""
    return getattr(config, "rope_parameters", None) or {}


def dense_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Names and values of a model's parameters, with packed ones as the dense ones that they stand for."""
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
    """Rows of queries and keys in the order of GGUF's llama: pairs that rotate together are neighbours there.

    In transformers they are half a head apart.
    """
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
    return tensor if heads is None else tensor.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def add_tensor(writer: Any, name: str, tensor: Tensor, precision: str) -> None:
    """Give the writer a tensor in its precision."""
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
    """Give the writer the sizes of the model."""
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
    """What tokenizer.json says, of a tokenizer that llama.cpp can imitate.

    Raises
    ------
    ValueError
        If it is not a byte-level BPE, or splits text in a way that is not known here.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    described = json.loads(backend.to_str()) if backend is not None else {}
    if described.get("model", {}).get("type") != "BPE" or described["model"].get("byte_fallback"):
        raise ValueError(
            "GGUF files are written with byte-level BPE tokenizers only, as Llama 3's, Qwen's or SmolLM2's"
        )
    return described | {"pre": splitting(described.get("pre_tokenizer") or {})}


def splitting(before: dict[str, Any]) -> str:
    """llama.cpp's name for the way in which a tokenizer cuts text before its merges."""
    steps = before.get("pretokenizers", [before])
    kinds = [step.get("type") for step in steps]
    if kinds == ["ByteLevel"]:
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and steps[0]["individual_digits"]:
        return "smollm"
    if kinds == ["Split", "ByteLevel"]:
        pattern = str(steps[0]["pattern"])
        return "llama-bpe" if r"\\p{N}{1,3}" in pattern else "qwen2"
    raise ValueError(f"llama.cpp cuts text in no way that is known here to equal {kinds}")


def add_vocabulary(writer: Any, described: dict[str, Any], tokenizer: Any, size: int) -> None:
    """Give the writer tokens, merges and special tokens; the vocabulary is filled up to the model's size."""
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
    """Give the writer the stop tokens, of which GGUF names two; warn of what it cannot say."""
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
            f"the GGUF file does not say {' and '.join(unsaid)}: give that to llama.cpp", LittleBitWarning, stacklevel=3
        )
