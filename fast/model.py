"""A whole model: which layers are quantised, at which ranks, and how they take the places of the dense ones."""

import contextlib
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Any

import torch
from torch import Tensor, nn

from .admm import admm, importance
from .alignment import itq, random_rotation
from .bits import Ranks, allocate_ranks, layer_bits, official_rank
from .calibrate import Moments, calibrate, spectral_gains
from .dual_svid import dual_svid
from .experts import check_left_dense, is_known, projection_names, routers, split_experts
from .factors import Factors
from .layers import Joined, LittleBitLinear, PackedLinear, linear_over
from .progress import tqdm
from .residual import compensate, compensate_weighted

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
    importance : bool
        Whether "admm" weighs channels by their second moments, measured on calibration text.
    include, exclude : tuple of str
        Shell-style patterns of module names. A linear layer is quantised if it matches one of `include` and none of
        `exclude`; the output head, embeddings and routers of experts are never quantised.
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
    importance: bool = False
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()
    split_fused: bool = False
    kv_rank_factor: float = 1.0
    seed: int = 0

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


def quantize_(
    model: nn.Module, config: Config | None = None, tokens: Tensor | None = None, progress: bool = True
) -> dict[str, LayerResult]:
    """Replace a model's linear layers by LittleBitLinear layers, in place.

    Everything is checked before the first layer is replaced, so that a refused model is left as it was.

    Parameters
    ----------
    model : torch.nn.Module
    config : Config, optional
    tokens : (n,) integer tensor, optional
        Calibration text, for `importance` and allocation by "sensitivity".
    progress : bool
        Whether to show progress bars.

    Returns
    -------
    dict of layer name to LayerResult, in the model's order.

    Raises
    ------
    ValueError
        If no layer matches, a weight is not finite (the layer is named), the bits cannot be met, calibration text is
        missing, or more than a tenth of the weights would stay dense, in forms that are unknown, and is not excluded.
    """
    config = config or Config()
    check_config(config, tokens)
    with fused_split(model, config):
        layers, ranks = plan(model, config)  # before calibration: raises if the bits cannot be met
        shapes = {name: linear_shape(layer) for name, layer in layers.items()}
        for name, layer in layers.items():
            if not torch.isfinite(layer.weight).all():
                raise ValueError(
                    f"layer {name}: the weight holds NaN or infinity; repair or re-download the checkpoint"
                )
        moments = {}
        if tokens is not None and config.needs_calibration():
            moments = calibrate(model, tokens, layers, progress=progress)
        if config.allocation == "sensitivity":
            gains = spectral_gains({name: linear_weight(layer) for name, layer in layers.items()}, moments)
            ranks = allocate_ranks(shapes, config.bits, config.paths, gains)
    results = {}
    with tqdm(
        total=len(layers), desc=f"{config.init}, {config.bits:g} bits", unit="layer", disable=not progress
    ) as bar:
        for names in batches(shapes, ranks):
            weights = torch.stack([linear_weight(layers[name]).float() for name in names])
            paths = factorise(weights, ranks[names[0]], config, [moments[name] for name in names] if moments else [])
            errors = relative_errors(weights, paths)
            for at, name in enumerate(names):
                mine = [Factors(*(tensor[at] for tensor in path)) for path in paths]
                replace_module(model, name, LittleBitLinear(mine, layers[name].bias))
                bits = layer_bits(*shapes[name], ranks[name]) / layers[name].weight.numel()
                results[name] = LayerResult(*shapes[name], ranks[name], bits, errors[at])
            bar.update(len(names))
    if hasattr(model, "save_pretrained"):  # a transformers model, which should know how it is to be saved
        from .quantizer import attach

        attach(model, {"bits": config.bits})
    return {name: results[name] for name in layers}


def plan(model: nn.Module, config: Config) -> tuple[dict[str, nn.Linear], dict[str, Ranks]]:
    """The layers that are to be quantised and, except for allocation by sensitivity, their ranks.

    Raises
    ------
    ValueError
        If no layer matches, or the bits cannot be met.
    """
    layers = dict(target_layers(model, config))
    if not layers:
        raise ValueError(
            f"no linear layer matches include={config.include} and exclude={config.exclude}; "
            "print(model) shows the names"
        )
    shapes = {name: linear_shape(layer) for name, layer in layers.items()}
    check_left_dense(model, sum(map(math.prod, shapes.values())), lambda name: selects_parameter(config, name))
    shares = kv_shares(model, shapes, config)
    if config.allocation == "official":
        paths = config.paths or 1  # None is refused by `check_config`
        ranks = {
            name: official_rank(*shape, config.bits, paths, shares.get(name, 1.0)) for name, shape in shapes.items()
        }
        return layers, {name: (rank,) * paths for name, rank in ranks.items()}
    return layers, allocate_ranks(shapes, config.bits, config.paths, shares=shares)


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
    if not (math.isfinite(config.kv_rank_factor) and config.kv_rank_factor > 0):
        raise ValueError(f"kv_rank_factor must be a positive number, not {config.kv_rank_factor}")
    if config.kv_rank_factor != 1 and config.allocation == "sensitivity":
        raise ValueError("allocation by sensitivity measures what k_proj and v_proj need: leave kv_rank_factor at 1")
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


def target_layers(model: nn.Module, config: Config) -> Iterator[tuple[str, nn.Linear]]:
    """Yield names and modules of the linear layers that the config selects; routers of experts are never among them."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None  # type: ignore[operator]
    dense = routers(model)
    for name, module in model.named_modules():
        found = is_linear(module) and module is not head and name.split(".")[-1] != "lm_head"
        if found and name not in dense and selects(config, name):
            yield name, module  # type: ignore[misc]


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a dense linear layer: torch's, or the Conv1D of GPT-2, which keeps its weight transposed."""
    return isinstance(module, nn.Linear) or is_conv1d(module)


def is_conv1d(module: nn.Module) -> bool:
    """Whether a module is transformers' Conv1D."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def linear_weight(layer: Any) -> Tensor:
    """The (d_out, d_in) weight of a dense linear layer."""
    weight = layer.weight.detach()
    return weight.mT if is_conv1d(layer) else weight


def linear_shape(layer: Any) -> tuple[int, int]:
    """Sizes (d_out, d_in) of a dense linear layer."""
    d_out, d_in = linear_weight(layer).shape
    return d_out, d_in


def selects(config: Config, name: str) -> bool:
    """Whether the config's patterns select a layer of this name."""
    return matches(name, config.include) and not matches(name, config.exclude)


def selects_parameter(config: Config, name: str) -> bool:
    """Whether the config's patterns select a parameter, by its own name or that of its module."""
    names = name, name.rpartition(".")[0]
    return any(matches(each, config.include) for each in names) and not any(
        matches(each, config.exclude) for each in names
    )


def matches(name: str, patterns: Sequence[str]) -> bool:
    """Whether a module name matches one of the shell-style patterns."""
    return any(fnmatch(name, pattern) for pattern in patterns)


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
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, module)


@contextlib.contextmanager
def fused_split(model: nn.Module, config: Config) -> Iterator[None]:
    """Split experts and, if the config asks for it, fused layers of which a part is selected; undone on failure."""
    before = {}
    try:
        for name, module in list(model.named_modules()):
            if is_known(module):
                wanted = {part for part in projection_names(module) if selects(config, f"{name}.{part}")}
                if wanted:
                    replace_module(model, name, split_experts(module, wanted.__contains__))
                    before[name] = module
                continue
            parts = FUSED.get(name.split(".")[-1], ()) if config.split_fused else ()
            if is_linear(module) and any(selects(config, f"{name}.{part}") for part in parts):
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
    packed = {}
    for name, module in model.named_modules():
        if isinstance(module, LittleBitLinear):
            try:
                packed[name] = module.pack()
            except ValueError as error:
                raise ValueError(f"layer {name}: {error}") from error
    for name, module in packed.items():
        replace_module(model, name, module)
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
