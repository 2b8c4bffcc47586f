"""Quantize a whole model: choose layers and ranks, factorize the weights, and replace the dense layers."""

import contextlib
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from .._progress import tqdm
from ..bits import Ranks, layer_bits
from ..factors import Factors
from ..files.mapped import release_pages
from .allocation import AllocationProblem, allocate, attention_heads, kv_shares
from .calibrate import Moments, calibrate
from .config import Config, check_config
from .experts import check_left_dense, is_known, projection_names, split_experts
from .initializers import factorize, initializer_of
from .layer_store import LayerStore, layer_key
from .layers import ConcatLinear, LittleBitLinear, LowRankLinear, PackedLinear, linear_over, stored_half
from .registry import choice_name
from .results import LayerResult, Results
from .selection import (
    Selection,
    describe_dense,
    is_linear,
    linear_shape,
    linear_weight,
    reason_dense,
    select,
    surroundings,
)
from .shared import parameter_users
from .wrappers import to_change, unwrapped

log = logging.getLogger(__name__)

#: Functions to call with each model that was quantized or loaded, and with what config.json says of it.
OBSERVERS: list[Callable[[nn.Module, dict[str, Any]], None]] = []
BATCH_ELEMENTS = 1 << 24  # Weights to factorize at once. This bounds the memory of the decompositions.
FUSED = {
    "gate_up_proj": ("gate_proj", "up_proj"),
    **dict.fromkeys(("qkv_proj", "c_attn"), ("q_proj", "k_proj", "v_proj")),
}


def quantize_(
    model: nn.Module,
    config: Config | None = None,
    tokens: Tensor | None = None,
    progress: bool = True,
    device: str | torch.device | None = None,
    store: LayerStore | None = None,
) -> Results:
    """Replace a model's linear layers by LittleBitLinear layers, in place.

    A layer that cannot be quantized (see selection.py) stays dense, and the log warns of it. A module that stands in
    several places is replaced in all of them. Where an error is raised, the model stays as it was.

    Parameters
    ----------
    model : torch.nn.Module
        A model that torch.compile wrapped is unwrapped first.
    config : Config, optional
    tokens : (n,) integer tensor, optional
        Calibration text, for `importance` and allocation by "sensitivity".
    progress : bool
        Whether to show progress bars.
    device : str or torch.device, optional
        Where to calibrate and factorize, one block or layer at a time; by default where the model is.
    store : LayerStore, optional
        Pack each layer as soon as it is factorized, and save it here. Layers that the store holds already are read
        from it. The model then gets PackedLinear layers, on the CPU.

    Returns
    -------
    Results, a dict of layer name to LayerResult in the model's order. Its `dense` says which layers stayed dense.

    Raises
    ------
    ValueError
        If a pattern or the config matches no layer; a weight is not finite (the layer is named); a tensor of a
        transformers model does not fit float16, in which `save` stores it; the bits cannot be met; calibration text is
        missing; an initializer or allocation of your own returns wrong values; experts of an unknown form hold more
        than a tenth of the weights and are not excluded; or the model has PEFT adapters or is data-parallel.
    """
    config = config or Config()
    check_config(config, tokens)
    model = to_change(model, "quantize_")
    with fused_split(model, config):
        selection, ranks = plan_ranks(model, config)  # before calibration: raises if the bits cannot be met
        layers = selection.layers
        check_weights(model, layers)
        moments: dict[str, Moments] = {}
        if tokens is not None and config.needs_calibration():
            moments = calibrate(model, tokens, layers, progress=progress, device=device)
            ranks = allocate(config.allocation, allocation_problem(model, layers, config, moments))
        results = replace_layers(model, layers, ranks, config, moments, progress, device, store)
    tell_observers(model, {"bits": config.bits})
    ordered = Results({name: results[name] for name in layers})
    ordered.dense = selection.dense
    return ordered


def check_weights(model: nn.Module, layers: Mapping[str, Any]) -> None:
    """Raise ValueError unless every weight is finite and, in a transformers model, every tensor fits float16."""
    for name, layer in layers.items():
        if layer.weight.is_meta:
            raise ValueError(f"layer {name}: the weight is on the meta device; load the model onto a CPU or GPU")
        if not torch.isfinite(layer.weight).all():
            raise ValueError(f"layer {name}: the weight holds NaN or infinity; repair or re-download the checkpoint")
        release_pages()
    if hasattr(model, "save_pretrained"):  # `save` would refuse such a tensor after hours of work.
        for name, tensor in model.state_dict().items():
            stored_half(name, tensor)
            release_pages()


def replace_layers(
    model: nn.Module,
    layers: Mapping[str, Any],
    ranks: Mapping[str, Ranks],
    config: Config,
    moments: Mapping[str, Moments],
    progress: bool,
    device: str | torch.device | None = None,
    store: LayerStore | None = None,
) -> dict[str, LayerResult]:
    """Factorize the weights of layers in batches, and replace the layers.

    Each batch is replaced before the next, which frees its dense weights. A user's own initializer may fail at any
    layer, so its layers are replaced together at the end. Other parameters as in `quantize_`.
    """
    results, users = {}, parameter_users(model)
    shapes = {name: linear_shape(layer) for name, layer in layers.items()}
    batched = initializer_of(config.init).batched
    made: dict[str, nn.Module] = {}
    description = f"{choice_name(config.init)}, {config.bits:g} bits"
    count = sum(math.prod(shape) for shape in shapes.values())
    with tqdm(total=count, desc=description, unit="weight", unit_scale=True, disable=not progress) as bar:
        for names in batches(shapes, ranks, BATCH_ELEMENTS if batched else 1):
            own = [moments[name] for name in names] if config.importance else []
            found = quantized(names, [layers[name] for name in names], ranks[names[0]], config, own, device, store)
            for name, (layer, results[name]) in zip(names, found, strict=True):
                made |= dict.fromkeys(users.get(id(layers[name].weight), [name]), layer)  # all that share the weight
            if batched:
                replace_modules(model, made)
                made = {}
            release_pages()
            bar.update(sum(math.prod(shapes[name]) for name in names))
    replace_modules(model, made)
    return results


def quantized(
    names: Sequence[str],
    layers: Sequence[Any],
    ranks: Ranks,
    config: Config,
    moments: Sequence[Moments],
    device: str | torch.device | None,
    store: LayerStore | None,
) -> list[tuple[nn.Module, LayerResult]]:
    """Quantize linear layers of one shape, or find them in a store.

    If one is missing, all are made again, because rounding depends on the layers that are factorized together.
    """
    if store is None:
        made = factorized(names, layers, ranks, config, moments, device)
        return [(layer.to(dense.weight.device), result) for dense, (layer, result) in zip(layers, made, strict=True)]
    own = list(moments) or [()] * len(names)
    keys = [layer_key(linear_weight(layer), ranks, config, each) for layer, each in zip(layers, own, strict=True)]
    kept = [store.find(key, layer.bias, config.scale_bits) for key, layer in zip(keys, layers, strict=True)]
    found: list[tuple[nn.Module, LayerResult]] = [each for each in kept if each is not None]
    if len(found) == len(names):
        return found
    found = []
    made = factorized(names, layers, ranks, config, moments, device)
    for name, key, (layer, result) in zip(names, keys, made, strict=True):
        try:
            packed = layer.pack().cpu()
        except ValueError as error:
            raise ValueError(f"layer {name}: {error}") from error
        store.save(key, packed, result)
        found.append((packed, result))
    return found


def factorized(
    names: Sequence[str],
    layers: Sequence[Any],
    ranks: Ranks,
    config: Config,
    moments: Sequence[Moments],
    device: str | torch.device | None,
) -> list[tuple[LittleBitLinear, LayerResult]]:
    """Factorize the weights of linear layers of one shape as a batch, in float32 on a device."""
    shape = linear_shape(layers[0])
    weights = torch.stack([linear_weight(layer).to(device=device).float() for layer in layers])
    paths = factorize(weights, ranks, config.init, config.seed, moments, names[0])
    errors = relative_errors(weights, paths)
    bits = layer_bits(*shape, ranks, config.scale_bits) / math.prod(shape)
    found = []
    for at, layer in enumerate(layers):
        own = [Factors(*(tensor[at] for tensor in path)) for path in paths]
        made = LittleBitLinear(own, layer.bias, scale_bits=config.scale_bits)
        found.append((made.to(weights.device), LayerResult(*shape, ranks, bits, errors[at])))
    return found


def tell_observers(model: nn.Module, described: dict[str, Any]) -> None:
    """Call all OBSERVERS with a model that was quantized, or loaded packed."""
    for observer in OBSERVERS:
        observer(model, described)


def plan_ranks(model: nn.Module, config: Config) -> tuple[Selection, dict[str, Ranks]]:
    """Select the layers to quantize, and choose their ranks before any calibration.

    The log warns of layers that stay dense, and gives the reason. For allocation by sensitivity the ranks are uniform.

    Raises
    ------
    ValueError
        If no layer matches, or the bits cannot be met.
    """
    selection = select(model, config.include, config.exclude)
    layers = selection.layers
    if not layers:
        found = describe_dense(selection) if selection.dense else "print(model) shows the names"
        if any(isinstance(module, LowRankLinear) for module in model.modules()):
            found = "the model is quantized already"
        raise ValueError(
            f"no linear layer matches include={config.include} and exclude={config.exclude} and can be quantized; "
            f"{found}"
        )
    if selection.dense:
        log.warning("littlebit: %s", describe_dense(selection))
    weights = sum(math.prod(linear_shape(layer)) for layer in layers.values())
    check_left_dense(model, weights, config.selects_parameter)
    return selection, allocate(config.allocation, allocation_problem(model, layers, config))


def allocation_problem(
    model: nn.Module, layers: Mapping[str, Any], config: Config, moments: Mapping[str, Moments] = MappingProxyType({})
) -> AllocationProblem:
    """Describe the layers and the budget of a model for its allocation."""
    weights = {name: linear_weight(layer) for name, layer in layers.items()}
    shares = kv_shares(model, layers, config.kv_rank_factor)
    return AllocationProblem(weights, config.bits, config.paths, shares, config.spread, moments, config.scale_bits)


def stored_bytes(model: nn.Module, config: Config, embedding_bits: int = 16) -> int:
    """Estimate the bytes of a transformers model's checkpoint after quantization."""
    weights = sum(layer.weight.numel() for _, layer in target_layers(model, config))
    embeddings = [model.get_input_embeddings(), model.get_output_embeddings()]  # type: ignore[operator]
    tables = {id(each.weight): each.weight.numel() for each in embeddings if each is not None}  # one, if they are tied
    entries = sum(tables.values())
    others = sum(parameter.numel() for parameter in model.parameters()) - weights - entries
    return int(config.bits * weights + embedding_bits * entries + 16 * others) // 8


def target_layers(model: nn.Module, config: Config) -> Iterator[tuple[str, nn.Linear]]:
    """Yield names and modules of the linear layers that a config selects and that can be quantized."""
    yield from select(model, config.include, config.exclude).layers.items()


def batches(
    shapes: Mapping[str, tuple[int, int]], ranks: Mapping[str, Ranks], most: int = BATCH_ELEMENTS
) -> Iterator[list[str]]:
    """Yield groups of layers with the same shape and ranks, each of one layer or at most `most` weights."""
    groups: dict[tuple, list[str]] = {}
    for name, shape in shapes.items():
        groups.setdefault((shape, ranks[name]), []).append(name)
    for (shape, _), names in groups.items():
        size = max(1, most // (shape[0] * shape[1]))
        for start in range(0, len(names), size):
            yield names[start : start + size]


def relative_errors(weights: Tensor, paths: Sequence[Factors]) -> list[float]:
    """Compute ||W - W_hat||_F / ||W||_F for each weight of a batch; 0 where both are zero."""
    rest = weights - sum(path.to_dense() for path in paths)
    norms = torch.linalg.matrix_norm(weights)
    return (torch.linalg.matrix_norm(rest) / torch.where(norms == 0, 1, norms)).tolist()


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Replace a model's submodule, in every place where the model has it."""
    replace_modules(model, {name: module})


def replace_modules(model: nn.Module, modules: Mapping[str, nn.Module]) -> None:
    """Replace a model's submodules by name, in every place where the model has them."""
    new = {id(model.get_submodule(name)): module for name, module in modules.items()}
    for parent in list(model.modules()):
        for key, child in list(parent._modules.items()):
            if id(child) in new:
                setattr(parent, key, new[id(child)])


@contextlib.contextmanager
def fused_split(model: nn.Module, config: Config) -> Iterator[None]:
    """Split experts and, with `split_fused`, fused layers; undo it if an error is raised in the context."""
    before = {}
    around = surroundings(model)
    try:
        for name, module in list(model.named_modules()):
            if is_known(module):
                wanted = {part for part in projection_names(module) if config.selects(f"{name}.{part}")}
                if wanted:
                    replace_module(model, name, split_experts(module, wanted.__contains__))
                    before[name] = module
                continue
            parts = FUSED.get(name.split(".")[-1], ()) if config.split_fused and is_linear(module) else ()
            if any(config.selects(f"{name}.{part}") for part in parts) and not reason_dense(name, module, around):
                sizes = part_sizes(model, linear_shape(module)[0], len(parts))
                replace_module(model, name, split(module, dict(zip(parts, sizes, strict=True))))
                before[name] = module
        yield
    except BaseException:
        for name, module in before.items():
            replace_module(model, name, module)
        raise


def part_sizes(model: nn.Module, rows: int, count: int) -> list[int]:
    """Count the rows of each part of a fused layer: two equal parts, or queries, keys and values."""
    queries, keys = attention_heads(model)
    shares = (queries, keys, keys) if count == 3 else (1,) * count
    return [rows * share // sum(shares) for share in shares]


def split(layer: Any, sizes: dict[str, int]) -> ConcatLinear:
    """Split a linear layer into parts with the given numbers of rows, which share its memory."""
    weights = linear_weight(layer).split(list(sizes.values()))
    biases = [None] * len(sizes) if layer.bias is None else layer.bias.detach().split(list(sizes.values()))
    parts = zip(sizes, weights, biases, strict=True)
    return ConcatLinear({name: linear_over(weight, bias) for name, weight, bias in parts})


def pack_(model: nn.Module) -> nn.Module:
    """Replace a model's LittleBitLinear layers by PackedLinear layers, in place.

    Returns
    -------
    The model.

    Raises
    ------
    ValueError
        If a layer cannot be packed. The message names it, and the model stays as it was.
    """
    packed, inner = {}, unwrapped(model)
    for name, module in inner.named_modules():
        if isinstance(module, LittleBitLinear):
            try:
                packed[name] = module.pack()
            except ValueError as error:
                raise ValueError(f"layer {name}: {error}") from error
    replace_modules(inner, packed)
    return model


def device_of(model: nn.Module) -> torch.device:
    """Find the device that holds all tensors of a model.

    Raises
    ------
    ValueError
        If the tensors are on several devices.
    """
    places = {tensor.device for tensor in (*model.parameters(), *model.buffers())}
    if len(places) > 1:
        names = ", ".join(sorted(map(str, places)))
        raise ValueError(f"the model is spread over {names}: move it to one device with .to(device)")
    return places.pop()


def packed_layers(model: nn.Module) -> dict[str, PackedLinear]:
    """Map names to the PackedLinear layers of a model."""
    return {name: module for name, module in model.named_modules() if isinstance(module, PackedLinear)}
