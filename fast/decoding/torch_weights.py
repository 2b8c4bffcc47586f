"""Convert a torch model for the compiled CPU decoder, or generate with transformers where that decoder cannot.

Conversion shares memory with the model: only tensors that are neither float16 nor float32 are copied.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..kernels import cpu
from ..kernels.cpu_layer import path_table
from ..models.embeddings import QuantizedEmbedding, QuantizedHead
from ..models.generation_settings import GenerationConfig, generation_defaults
from ..models.hf_names import cache_argument
from ..models.layers import PackedLinear
from ..models.wrappers import has_adapters, has_hooks
from .architecture import NORMS, PROJECTIONS, NotDecodableError, architecture
from .cpu_decoder import Decodable, EmbeddingArrays, Linear, Weights
from .latent_cache import LATENT_TYPES, latent_cache


def decodable(model: Any) -> Decodable:
    """Convert a torch model to the form that the compiled CPU decoder runs.

    Raises
    ------
    NotDecodableError
        If the decoder does not support the model.
    """
    sizes = architecture(model.config.to_dict() if hasattr(model, "config") else {})
    if next(model.parameters()).device.type != "cpu":
        raise NotDecodableError("it is not on the CPU")
    inner = model.model
    layers = [[linear(name, each.get_submodule(name)) for name in PROJECTIONS] for each in inner.layers]
    norms = [getattr(each, name) for each in inner.layers for name in NORMS] + [inner.norm]
    if getattr(model.lm_head, "bias", None) is not None:
        raise NotDecodableError("its head has a bias")
    embedding, head = table(inner.embed_tokens), table(model.lm_head)
    weights = Weights(layers, [floats(norm.weight) for norm in norms], embedding, head)
    return Decodable(sizes, weights, generation_defaults(model), model.name_or_path)


def linear(name: str, module: nn.Module) -> Linear:
    """Take the arrays of a linear layer, packed or dense."""
    if isinstance(module, PackedLinear):
        _, kept = path_table(module.factors())
        arrays = [tensor.numpy() for tensor in kept]
        paths = [arrays[first : first + cpu.RANK] for first in range(0, len(arrays), cpu.RANK)]
        return Linear(module.d_out, module.d_in, paths, None, floats(module.bias))
    if type(module) is not nn.Linear:
        raise NotDecodableError(f"{name} is a {type(module).__name__}")
    if module.in_features % cpu.LANES:
        raise NotDecodableError(f"{name} has {module.in_features} inputs, which is no multiple of {cpu.LANES}")
    return Linear(module.out_features, module.in_features, [], floats(module.weight), floats(module.bias))


def floats(tensor: Tensor | None) -> Any:
    """View a float16 or float32 tensor as a NumPy array; copy other dtypes to float32; return None for None."""
    if tensor is None:
        return None
    return (tensor if tensor.dtype == torch.float16 else tensor.float()).detach().contiguous().numpy()


def table(module: Any) -> EmbeddingArrays:
    """Take the arrays of an embedding or head, quantized or dense."""
    if not isinstance(module, QuantizedEmbedding | QuantizedHead):
        if type(module) not in (nn.Embedding, nn.Linear):
            raise NotDecodableError(f"its embedding or head is a {type(module).__name__}")
        return EmbeddingArrays(floats(module.weight))
    codes, scale, offset = module.table.codes, module.table.scale, module.table.offset
    return EmbeddingArrays(codes.numpy(), scale.numpy(), None if offset is None else offset.numpy())


def check_settings(model: Any) -> None:
    """Raise NotDecodableError if a model has adapters, hooks or generation settings that only transformers follows."""
    if has_adapters(model):
        raise NotDecodableError("it has adapters of PEFT")
    if has_hooks(model):
        raise NotDecodableError("its modules have hooks")
    if unsupported := generation_defaults(model).unsupported:
        raise NotDecodableError(f"its generation_config sets {unsupported}")


def through_transformers(
    model: Any, tokens: Sequence[int], config: GenerationConfig, pad: int | None = None
) -> list[int]:
    """Generate the tokens that follow a prompt of tokens with transformers' `generate`.

    Parameters and the result are the same as in `generate.stream_tokens`, but the tokens come all at once.
    """
    config = config.with_defaults(generation_defaults(model).config)
    choice = {"do_sample": False, "temperature": None, "top_k": None, "top_p": None, "min_p": None}
    if config.temperature:
        choice = {"do_sample": True, "temperature": config.temperature, "min_p": config.min_p or 0.0}
        choice |= {"top_k": config.top_k or 0, "top_p": config.top_p or 1.0}
    dtype = LATENT_TYPES.get(config.kv_cache)
    cache = {} if dtype is None else cache_argument(latent_cache(model, dtype))
    prompt = torch.tensor([list(tokens)], device=next(model.parameters()).device)
    with torch.random.fork_rng(), torch.inference_mode():
        torch.manual_seed(config.seed)
        output = model.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=config.max_new_tokens,
            repetition_penalty=float(config.repetition_penalty or 1.0),
            eos_token_id=list(config.stop_tokens or ()) or None,
            pad_token_id=pad,
            return_dict_in_generate=False,
            **choice,
            **cache,
        )
    return output[0, prompt.shape[1] :].tolist()
