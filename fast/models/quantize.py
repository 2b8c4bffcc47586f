"""A whole model: which layers are quantised, at which ranks, and how they take the places of the dense ones."""

import contextlib
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from .._checks import check_number
from .._progress import tqdm
from ..admm import admm, importance
from ..alignment import itq, random_rotation
from ..bits import Ranks, allocate_ranks, layer_bits, official_rank
from ..dual_svid import dual_svid
from ..factors import Factors
from ..residual import compensate, compensate_weighted
from .calibrate import Moments, bounded_gains, calibrate, spectral_gains
from .experts import check_left_dense, is_known, projection_names, split_experts
from .layers import Joined, LittleBitLinear, LowRankLinear, PackedLinear, linear_over, stored_half
from .selection import (
    Selection,
    as_patterns,
    describe_dense,
    is_linear,
    linear_shape,
    linear_weight,
    matches,
    reason_dense,
    select,
    surroundings,
)
from .shared import parameter_users
from .wrappers import to_change, unwrapped

log = logging.getLogger(__name__)

#: Functions that are called with each model that was quantized or loaded, and what config.json says of it.
OBSERVERS: list[Callable[[nn.Module, dict[str, Any]], None]] = []
BATCH_ELEMENTS = 1 << 24  # weights factorised at once: bounds the memory that the decompositions take
OVERSAMPLING = 16  # columns of the sketch beyond the rank


INITS = ("dual-svid", "itq", "admm")
ALLOCATIONS = ("uniform", "sensitivity", "official")
FUSED = {
    "gate_up_proj": ("gate_proj", "up_proj"),
    **dict.fromkeys(("qkv_proj", "c_attn"), ("q_proj", "k_proj", "v_proj")),
}


@dataclass(frozen=True)
class Config:
    """What to quantise and how.

    Attributes
    ----------
    bits : float
        Ceiling in stored bits per weight, over all quantised layers together.
    paths : int or None
        1, or 2 for primary and residual; None chooses for each layer by `bits.paths_for_bits`.
    init : str
        How factors are found: "dual-svid" (the paper), "itq" (rotated first) or "admm" (solved for; the best).
    allocation : str
        How ranks are divided: "uniform" bits, by "sensitivity", measured on calibration text, or as the authors'
        program does ("official"; see `bits.official_rank`), which takes no other ranks and may exceed the ceiling.
    spread : float, optional
        Bound of allocation by "sensitivity": no layer gets more than so many times the rank, or less than that part of
        the rank, that uniform allocation would give it. None for no bound.
    importance : bool
        Whether "admm" weighs channels by their second moments, measured on calibration text.
    include, exclude : tuple of str
        Shell-style patterns of module names, or one pattern. A linear layer is quantised if it matches one of
        `include` and none of `exclude`, and if it can be (see selection.py). The output head, embeddings and routers
        of experts are never quantised. A pattern that matches no layer is an error.
    split_fused : bool
        Quantise the parts of fused projections (qkv_proj, gate_up_proj; c_attn of GPT-2) as layers of their own, with
        names such as LAYER.qkv_proj.q_proj.
    kv_rank_factor : float
        How many times the sign bits per weight of other layers k_proj and v_proj get in a model with grouped queries,
        where they are small and shared by many heads. The ceiling stays.
    seed : int
        Of the randomised decompositions and rotations.
    """

    bits: float = 0.55
    paths: int | None = 2
    init: str = "dual-svid"
    allocation: str = "uniform"
    spread: float | None = None
    importance: bool = False
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()
    split_fused: bool = False
    kv_rank_factor: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        """Keep patterns as tuples; one string is one pattern."""
        for key in ("include", "exclude"):
            object.__setattr__(self, key, as_patterns(key, getattr(self, key)))

    def needs_calibration(self) -> bool:
        """Whether `quantize_` needs calibration tokens."""
        return self.importance or self.allocation == "sensitivity"


@dataclass(frozen=True)
class LayerResult:
    """What became of one layer.

    Attributes
    ----------
    d_out, d_in : int
    ranks : tuple of int
        One per path.
    bits : float
        Stored bits per weight.
    error : float
        ||W - W_hat||_F / ||W||_F.
    """

    d_out: int
    d_in: int
    ranks: Ranks
    bits: float
    error: float


class Results(dict[str, LayerResult]):
    """What became of each quantised layer, by its name.

    Attributes
    ----------
    dense : dict of str to str
        Why each other selected layer stayed dense, by its name.
    """

    dense: Mapping[str, str] = MappingProxyType({})


def quantize_(
    model: nn.Module, config: Config | None = None, tokens: Tensor | None = None, progress: bool = True
) -> Results:
    """Replace a model's linear layers by LittleBitLinear layers, in place.

    Everything is checked before the first layer is replaced, so that a refused model is left as it was. A layer that
    cannot be quantised (see selection.py) stays dense, and a warning in the log says so. A module in several places is
    replaced in all of them.

    Parameters
    ----------
    model : torch.nn.Module
        What torch.compile made of a model is taken off first.
    config : Config, optional
    tokens : (n,) integer tensor, optional
        Calibration text, for `importance` and allocation by "sensitivity".
    progress : bool
        Whether to show progress bars.

    Returns
    -------
    Results, a dict of layer name to LayerResult in the model's order; its `dense` says which layers stayed dense.

    Raises
    ------
    ValueError
        If a pattern or the config matches no layer, a weight is not finite (the layer is named), a tensor of a
        transformers model does not fit float16, in which `save` stores it, the bits cannot be met, calibration text is
        missing, experts of an unknown form hold more than a tenth of the weights and are not excluded, or the model has
        adapters of PEFT or is DistributedDataParallel.
    """
    config = config or Config()
    check_config(config, tokens)
    model = to_change(model, "quantize_")
    with fused_split(model, config):
        selection, ranks = plan(model, config)  # before calibration: raises if the bits cannot be met
        layers = selection.layers
        shapes = {name: linear_shape(layer) for name, layer in layers.items()}
        for name, layer in layers.items():
            if layer.weight.is_meta:
                raise ValueError(f"layer {name}: the weight is on the meta device; load the model onto a CPU or GPU")
            if not torch.isfinite(layer.weight).all():
                raise ValueError(
                    f"layer {name}: the weight holds NaN or infinity; repair or re-download the checkpoint"
                )
        if hasattr(model, "save_pretrained"):  # what `save` would refuse after hours of work
            for name, tensor in model.state_dict().items():
                stored_half(name, tensor)
        moments = {}
        if tokens is not None and config.needs_calibration():
            moments = calibrate(model, tokens, layers, progress=progress)
        if config.allocation == "sensitivity":
            gains = spectral_gains({name: linear_weight(layer) for name, layer in layers.items()}, moments)
            if config.spread is not None:
                gains = bounded_gains(gains, {name: sum(each) for name, each in ranks.items()}, config.spread)
            ranks = allocate_ranks(shapes, config.bits, config.paths, gains)
    results, users = {}, parameter_users(model)
    with tqdm(
        total=len(layers), desc=f"{config.init}, {config.bits:g} bits", unit="layer", disable=not progress
    ) as bar:
        for names in batches(shapes, ranks):
            weights = torch.stack([linear_weight(layers[name]).float() for name in names])
            paths = factorise(weights, ranks[names[0]], config, [moments[name] for name in names] if moments else [])
            errors = relative_errors(weights, paths)
            made = {}
            for at, name in enumerate(names):
                mine = [Factors(*(tensor[at] for tensor in path)) for path in paths]
                layer = LittleBitLinear(mine, layers[name].bias)
                made |= dict.fromkeys(users.get(id(layers[name].weight), [name]), layer)  # all that share the weight
                bits = layer_bits(*shapes[name], ranks[name]) / layers[name].weight.numel()
                results[name] = LayerResult(*shapes[name], ranks[name], bits, errors[at])
            replace_modules(model, made)
            bar.update(len(names))
    tell_observers(model, {"bits": config.bits})
    ordered = Results({name: results[name] for name in layers})
    ordered.dense = selection.dense
    return ordered


def tell_observers(model: nn.Module, described: dict[str, Any]) -> None:
    """Tell the libraries that registered in OBSERVERS of a model that was quantized, or loaded packed."""
    for observer in OBSERVERS:
        observer(model, described)


def plan(model: nn.Module, config: Config) -> tuple[Selection, dict[str, Ranks]]:
    """Select the layers to quantise and, except for allocation by sensitivity, their ranks.

    A warning in the log says which layers stay dense, and why.

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
            found = "the model is quantised already"
        raise ValueError(
            f"no linear layer matches include={config.include} and exclude={config.exclude} and can be quantised; "
            f"{found}"
        )
    if selection.dense:
        log.warning("littlebit: %s", describe_dense(selection))
    shapes = {name: linear_shape(layer) for name, layer in layers.items()}
    check_left_dense(model, sum(map(math.prod, shapes.values())), lambda name: selects_parameter(config, name))
    shares = kv_shares(model, shapes, config)
    if config.allocation != "official":
        return selection, allocate_ranks(shapes, config.bits, config.paths, shares=shares)
    ranks = official_ranks(shapes, config.bits, config.paths or 1, shares)  # paths=None is refused by `check_config`
    for name, (rank, *_) in ranks.items():
        if rank > min(shapes[name]):
            d_out, d_in = shapes[name]
            raise ValueError(
                f"layer {name}: allocation 'official' gives rank {rank}, but the rank of a {d_out} x {d_in} layer is "
                f"{min(d_out, d_in)} at most; lower bits or kv_rank_factor, exclude the layer, or choose another "
                "allocation"
            )
    return selection, ranks


def official_ranks(
    shapes: Mapping[str, tuple[int, int]], bits: float, paths: int, shares: Mapping[str, float]
) -> dict[str, Ranks]:
    """Compute the ranks of all layers as the authors' program does; see `bits.official_rank`.

    Parameters
    ----------
    shapes : mapping of layer name to (d_out, d_in)
    bits : float
    paths : int
        In each layer.
    shares : mapping of layer name to float
        What the ranks of these layers are multiplied by.
    """
    ranks = {name: official_rank(*shape, bits, paths, shares.get(name, 1.0)) for name, shape in shapes.items()}
    return {name: (rank,) * paths for name, rank in ranks.items()}


def kv_shares(model: Any, names: Iterable[str], config: Config) -> dict[str, float]:
    """`shares` of `allocate_ranks`: the factor for k_proj and v_proj of a model with grouped queries."""
    if config.kv_rank_factor == 1:
        return {}
    queries, keys = heads(model)
    found = [name for name in names if name.split(".")[-1] in ("k_proj", "v_proj")]
    if keys >= queries or not found:
        raise ValueError(
            f"kv_rank_factor is for k_proj and v_proj of models with grouped queries, but this one has {queries} query "
            f"and {keys} key heads and {len(found)} such layers; leave it at 1, or split fused layers (split_fused)"
        )
    return dict.fromkeys(found, config.kv_rank_factor)


def heads(model: Any) -> tuple[int, int]:
    """Number of query heads and of key-value heads of a transformers model, as its configuration has them."""
    queries = getattr(getattr(model, "config", None), "num_attention_heads", None) or 1
    return queries, getattr(getattr(model, "config", None), "num_key_value_heads", None) or queries


def check_config(config: Config, tokens: Tensor | None) -> None:
    """Raise ValueError unless the config's choices exist and come with what they need."""
    for key, known in (("init", INITS), ("allocation", ALLOCATIONS)):
        if getattr(config, key) not in known:
            raise ValueError(f"{key} must be one of {', '.join(known)}, not {getattr(config, key)!r}")
    check_number("bits", config.bits, above=0)
    check_number("kv_rank_factor", config.kv_rank_factor, above=0)
    check_number("seed", config.seed, low=0, below=2**63, whole=True)
    if config.paths is not None:
        check_number("paths", config.paths, low=1, whole=True)
    if config.kv_rank_factor != 1 and config.allocation == "sensitivity":
        raise ValueError("allocation by sensitivity measures what k_proj and v_proj need: leave kv_rank_factor at 1")
    if config.spread is not None and not config.spread >= 1:
        raise ValueError(f"spread must be at least 1, where ranks are uniform, not {config.spread}")
    if config.spread is not None and config.allocation != "sensitivity":
        raise ValueError(f"spread bounds allocation by sensitivity: leave it out with allocation {config.allocation!r}")
    if config.allocation == "official" and config.paths is None:
        raise ValueError("the authors' program has as many paths in every layer: choose paths=1 or 2")
    if config.importance and config.init != "admm":
        raise ValueError(f"importance weights serve init 'admm' only, not {config.init!r}")
    if config.needs_calibration() and tokens is None:
        raise ValueError("importance and allocation by sensitivity are measured on text: pass calibration tokens")


def factorise(weights: Tensor, ranks: Ranks, config: Config, moments: Sequence[Moments]) -> list[Factors]:
    """Paths of a batch of weights, as the config's `init` finds them."""
    generator = torch.Generator().manual_seed(config.seed)

    def gaussian(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, generator=generator).to(weights)

    def one_path(matrix: Tensor, rank: int) -> Factors:
        columns = rank + OVERSAMPLING
        cheap = 3 * columns < min(matrix.shape[-2:])  # else an exact SVD costs hardly more
        sketch = gaussian(matrix.shape[-1], columns) if cheap else None
        if config.init == "dual-svid":
            return dual_svid(matrix, rank, sketch)
        if config.init == "itq":
            return itq(matrix, rank, random_rotation(gaussian(rank, rank)), sketch)
        return admm(matrix, rank, sketch)

    if not config.importance:
        return compensate(weights, ranks, one_path)
    column, row = (importance(torch.stack(each).to(weights)) for each in zip(*moments, strict=True))
    return compensate_weighted(weights, ranks, row, column, one_path)


def stored_bytes(model: nn.Module, config: Config, embedding_bits: int = 16) -> int:
    """Estimate the bytes of a transformers model's checkpoint once it is quantised."""
    weights = sum(layer.weight.numel() for _, layer in target_layers(model, config))
    embeddings = [model.get_input_embeddings(), model.get_output_embeddings()]  # type: ignore[operator]
    tables = {id(each.weight): each.weight.numel() for each in embeddings if each is not None}  # one, if they are tied
    entries = sum(tables.values())
    others = sum(parameter.numel() for parameter in model.parameters()) - weights - entries
    return int(config.bits * weights + embedding_bits * entries + 16 * others) // 8


def target_layers(model: nn.Module, config: Config) -> Iterator[tuple[str, nn.Linear]]:
    """Names and modules of the linear layers that the config selects and that can be quantised."""
    yield from select(model, config.include, config.exclude).layers.items()


def selects(config: Config, name: str) -> bool:
    """Whether the config's patterns select a layer of this name."""
    return matches(name, config.include) and not matches(name, config.exclude)


def selects_parameter(config: Config, name: str) -> bool:
    """Whether the config's patterns select a parameter, by its own name or that of its module."""
    names = name, name.rpartition(".")[0]
    return any(matches(each, config.include) for each in names) and not any(
        matches(each, config.exclude) for each in names
    )


def batches(shapes: dict[str, tuple[int, int]], ranks: dict[str, Ranks]) -> Iterator[list[str]]:
    """Layer names in groups of equal shape and ranks, each of at most BATCH_ELEMENTS weights (or one layer)."""
    groups: dict[tuple, list[str]] = {}
    for name, shape in shapes.items():
        groups.setdefault((shape, ranks[name]), []).append(name)
    for (shape, _), names in groups.items():
        size = max(1, BATCH_ELEMENTS // (shape[0] * shape[1]))
        for start in range(0, len(names), size):
            yield names[start : start + size]


def relative_errors(weights: Tensor, paths: Sequence[Factors]) -> list[float]:
    """||W - W_hat||_F / ||W||_F of each weight of a batch; 0 where both are zero."""
    rest = weights - sum(path.to_dense() for path in paths)
    norms = torch.linalg.matrix_norm(weights)
    return (torch.linalg.matrix_norm(rest) / torch.where(norms == 0, 1, norms)).tolist()


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put `module` where the model has the submodule `name`."""
    replace_modules(model, {name: module})


def replace_modules(model: nn.Module, modules: Mapping[str, nn.Module]) -> None:
    """Put modules where the model has submodules of their names, in every place where it has them."""
    new = {id(model.get_submodule(name)): module for name, module in modules.items()}
    for parent in list(model.modules()):
        for key, child in list(parent._modules.items()):
            if id(child) in new:
                setattr(parent, key, new[id(child)])


@contextlib.contextmanager
def fused_split(model: nn.Module, config: Config) -> Iterator[None]:
    """Split experts and, if the config asks for it, fused layers of which a part is selected; undone on failure."""
    before = {}
    around = surroundings(model)
    try:
        for name, module in list(model.named_modules()):
            if is_known(module):
                wanted = {part for part in projection_names(module) if selects(config, f"{name}.{part}")}
                if wanted:
                    replace_module(model, name, split_experts(module, wanted.__contains__))
                    before[name] = module
                continue
            parts = FUSED.get(name.split(".")[-1], ()) if config.split_fused and is_linear(module) else ()
            if any(selects(config, f"{name}.{part}") for part in parts) and not reason_dense(name, module, around):
                sizes = part_sizes(model, linear_shape(module)[0], len(parts))
                replace_module(model, name, split(module, dict(zip(parts, sizes, strict=True))))
                before[name] = module
        yield
    except BaseException:
        for name, module in before.items():
            replace_module(model, name, module)
        raise


def part_sizes(model: nn.Module, rows: int, count: int) -> list[int]:
    """Rows of each part of a fused layer: of two equal ones, or of queries, keys and values."""
    queries, keys = heads(model)
    shares = (queries, keys, keys) if count == 3 else (1,) * count
    return [rows * share // sum(shares) for share in shares]


def split(layer: Any, sizes: dict[str, int]) -> Joined:
    """A linear layer as parts of so many rows each, side by side; they share its memory."""
    weights = linear_weight(layer).split(list(sizes.values()))
    biases = [None] * len(sizes) if layer.bias is None else layer.bias.detach().split(list(sizes.values()))
    parts = zip(sizes, weights, biases, strict=True)
    return Joined({name: linear_over(weight, bias) for name, weight, bias in parts})


def pack_(model: nn.Module) -> nn.Module:
    """Replace a model's LittleBitLinear layers by PackedLinear layers, in place, and return the model.

    Raises
    ------
    ValueError
        If a layer cannot be packed (the layer is named); the model is then left as it was.
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
    """The device of all of a model's tensors.

    Raises
    ------
    ValueError
        If there are several.
    """
    places = {tensor.device for tensor in (*model.parameters(), *model.buffers())}
    if len(places) > 1:
        names = ", ".join(sorted(map(str, places)))
        raise ValueError(f"the model is spread over {names}: move it to one device with .to(device)")
    return places.pop()


def packed_layers(model: nn.Module) -> dict[str, PackedLinear]:
    """A model's PackedLinear layers by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, PackedLinear)}
