"""A loaded torch model for the compiled decoder (decode_cpu.py); transformers' generate for what that cannot run."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..kernels import cpu
from ..kernels.cpu_layer import path_table
from ..models.embeddings import QuantizedEmbedding, QuantizedHead
from ..models.generation_settings import settings_of
from ..models.hf_names import cache_argument
from ..models.layers import PackedLinear
from ..models.wrappers import has_adapters, has_hooks
from .architecture import NORMS, PROJECTIONS, NotDecodableError, architecture
from .cpu_decoder import Decodable, Linear, Rows, Weights
from .latent_cache import LATENT_TYPES, latent_cache


def why_not(model: nn.Module) -> str | None:
    """Why `decodable` refuses a model, in a few words; None if it does not."""
    try:
        decodable(model)
    except NotDecodableError as reason:
        return str(reason)
    return None


def decodable(model: Any) -> Decodable:
    """A model for the decoder: its tensors where they lie, but for copies of those that are of other dtypes.

    Raises
    ------
    NotDecodableError
        If the decoder cannot run the model.
    """
    sizes = architecture(model.config.to_dict() if hasattr(model, "config") else {})
    if next(model.parameters()).device.type != "cpu":
        raise NotDecodableError("it is not on the CPU")
    inner = model.model
    layers = [[linear(name, each.get_submodule(name)) for name in PROJECTIONS] for each in inner.layers]
    norms = [getattr(each, name) for each in inner.layers for name in NORMS] + [inner.norm]
    if getattr(model.lm_head, "bias", None) is not None:
        raise NotDecodableError("its head has a bias")
    weights = Weights(layers, [floats(norm.weight) for norm in norms], rows(inner.embed_tokens), rows(model.lm_head))
    return Decodable(sizes, weights, settings_of(model), model.name_or_path)


def linear(name: str, module: nn.Module) -> Linear:
    """A linear layer's arrays."""
    if isinstance(module, PackedLinear):
        _, kept = path_table(module.factors())
        arrays = [tensor.numpy() for tensor in kept]
        paths = [arrays[at : at + cpu.RANK] for at in range(0, len(arrays), cpu.RANK)]
        return Linear(module.d_out, module.d_in, paths, None, floats(module.bias))
    if type(module) is not nn.Linear:
        raise NotDecodableError(f"{name} is a {type(module).__name__}")
    if module.in_features % cpu.LANES:
        raise NotDecodableError("the sizes of its dense layers are not multiples of sixteen")
    return Linear(module.out_features, module.in_features, [], floats(module.weight), floats(module.bias))


def floats(tensor: Tensor | None) -> Any:
    """A tensor's array, where it lies if it is of float16 or float32; None for none."""
    if tensor is None:
        return None
    return (tensor if tensor.dtype == torch.float16 else tensor.float()).detach().contiguous().numpy()


def rows(module: Any) -> Rows:
    """The arrays of an embedding or head."""
    if not isinstance(module, QuantizedEmbedding | QuantizedHead):
        if type(module) not in (nn.Embedding, nn.Linear):
            raise NotDecodableError(f"its embedding or head is a {type(module).__name__}")
        return Rows(floats(module.weight))
    table = module.table
    return Rows(table.codes.numpy(), table.scale.numpy(), None if table.offset is None else table.offset.numpy())


def check_settings(model: Any) -> None:
    """Raise NotDecodableError if a model has adapters, hooks or settings that only transformers follows."""
    if has_adapters(model):
        raise NotDecodableError("it has adapters of PEFT")
    if has_hooks(model):
        raise NotDecodableError("hooks run with its modules")
    if beyond := settings_of(model).beyond:
        raise NotDecodableError(f"its generation_config sets {beyond}")


def through_transformers(
    model: Any,
    tokens: Sequence[int],
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    seed: int,
    pad: int | None,
    kv_cache: str = "full",
) -> list[int]:
    """`decode.stream_tokens` by transformers' generate, all at once."""
    sampling = {"do_sample": True, "temperature": temperature, "top_k": top_k or 0, "top_p": top_p or 1.0}
    greedy = {"do_sample": False, "temperature": None, "top_k": None, "top_p": None}
    past = cache_argument(latent_cache(model, LATENT_TYPES[kv_cache])) if kv_cache in LATENT_TYPES else {}
    prompt = torch.tensor([list(tokens)], device=next(model.parameters()).device)
    with torch.random.fork_rng(), torch.inference_mode():
        torch.manual_seed(seed)
        output = model.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=max_new_tokens,
            pad_token_id=pad,
            return_dict_in_generate=False,
            **past,
            **(sampling if temperature else greedy),
        )
    return output[0, prompt.shape[1] :].tolist()
