"""Select the linear layers to quantize, and explain why the others stay dense.

A layer can be quantized if its call computes exactly x W^T + b, and if the model uses it only by calling it.
`reason_dense` checks that. To keep another kind of layer dense, add it there.
"""

import ast
import inspect
import textwrap
from collections.abc import Iterator, Sequence
from copy import copy
from difflib import get_close_matches
from fnmatch import fnmatchcase
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from .experts import is_known, projection_names, routers
from .layers import LowRankLinear

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
ROUTER = "it routes tokens to experts"
NO_SHAPE = "its weight has no shape before the first call"
#: Methods that set up parameters. They may read a layer's weight, because they do not run in the forward pass.
SET_UP = ("__init__", "reset_parameters", "extra_repr")
#: Attributes of a weight that do not depend on its values.
DESCRIPTIONS = ("dtype", "device", "shape", "ndim", "requires_grad")


class Selection(NamedTuple):
    """Hold the linear layers of a model that a config selects.

    Attributes
    ----------
    layers : dict of str to torch.nn.Module
        Layers to quantize by name, in the model's order.
    dense : dict of str to str
        Why each other selected layer stays dense, by its name.
    share : float
        Share of the selected layers' weights that stays dense.
    """

    layers: dict[str, Any]
    dense: dict[str, str]
    share: float


class Surroundings(NamedTuple):
    """Index a model, to look up where a layer stands and what else uses its weight.

    Attributes
    ----------
    model : torch.nn.Module
    parents : dict of int to list of (torch.nn.Module, str)
        Parents of each module, with its name in each, by the id of the module.
    owners : dict of int to list of str
        Names of the modules that hold each parameter, by the id of the parameter.
    towers : tuple of str
        Names of submodules that read other modalities than text.
    decoder : str or None
        Name of the language model's submodule in a multimodal model.
    tried : dict of str to bool
        Results of `computes_linear`, by class and settings of a layer.
    """

    model: nn.Module
    parents: dict[int, list[tuple[nn.Module, str]]]
    owners: dict[int, list[str]]
    towers: tuple[str, ...]
    decoder: str | None
    tried: dict[str, bool]


def select(model: nn.Module, include: Sequence[str], exclude: Sequence[str]) -> Selection:
    """Select linear layers by patterns of their names, and check which of them can be quantized.

    The output head is never selected. A module with several names is selected once.

    Raises
    ------
    ValueError
        If a pattern matches no linear layer, quantized or not, and no embedding.
    """
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None  # type: ignore[operator]
    names: dict[int, list[str]] = {}  # of each module, which may stand in several places
    modules: dict[int, Any] = {}
    known: list[str] = []
    for name, module in model.named_modules(remove_duplicate=False):
        if is_linear(module) or isinstance(module, nn.Embedding | LowRankLinear):
            known.append(name)
        stacks = [f"{name}.{key}" for key, each in module._parameters.items() if each is not None and each.ndim > 2]
        known += [name, *stacks] if stacks else []
        known += [f"{name}.{part}" for part in projection_names(module)] if is_known(module) else []
        if is_linear(module) and module is not head and name.split(".")[-1] != "lm_head":
            names.setdefault(id(module), []).append(name)
            modules[id(module)] = module
    choosers = routers(model)
    for key, patterns in (("include", include), ("exclude", exclude)):
        check_patterns(key, patterns, [*known, *choosers])
    around = surroundings(model)
    layers: dict[str, Any] = {}
    dense: dict[str, str] = {}
    for key, module in modules.items():
        if any(matches(name, include) for name in names[key]) and not any(
            matches(name, exclude) for name in names[key]
        ):
            name = names[key][0]
            reason = ROUTER if name in choosers else reason_dense(name, module, around)
            if reason is None:
                layers[name] = module
            else:
                dense[name] = reason
    dense |= {name: ROUTER for name in choosers if matches(name, include) and not matches(name, exclude)}
    join_shared(layers, dense, around)
    kept = sum(count_weights(model.get_submodule(name)) for name in dense)
    return Selection(layers, dense, kept / max(1, kept + sum(map(count_weights, layers.values()))))


def count_weights(layer: Any) -> int:
    """Count the weights of a linear layer; 0 if its weight is None or has no shape yet."""
    weight = layer.weight
    return 0 if weight is None or isinstance(weight, nn.parameter.UninitializedParameter) else weight.numel()


def join_shared(layers: dict[str, Any], dense: dict[str, str], around: Surroundings) -> None:
    """Keep only the first of several layers that share a weight; it will replace all of them.

    If one of them was not selected, all stay dense.
    """
    groups: dict[int, list[str]] = {}
    for name, layer in layers.items():
        groups.setdefault(id(layer.weight), []).append(name)
    for weight, group in groups.items():
        selected = {id(layers[name]) for name in group}
        rest = [name for name in around.owners[weight] if id(around.model.get_submodule(name)) not in selected]
        for name in group if rest else group[1:]:
            del layers[name]
            if rest:
                dense[name] = f"it shares its weight with {rest[0]}"


def interchangeable(one: Any, other: Any) -> bool:
    """Tell whether one linear layer can replace another with the same weight."""
    return type(one) is type(other) and one.bias is other.bias


def reason_dense(name: str, module: Any, around: Surroundings) -> str | None:
    """Explain in a few words why a linear layer must stay dense; return None if it can be quantized."""
    kind, weight = type(module), module.weight
    if isinstance(weight, nn.parameter.UninitializedParameter):
        return NO_SHAPE
    if not is_conv1d(module) and kind.forward is not nn.Linear.forward:
        key = f"{kind.__module__}.{module}"
        if key not in around.tried:
            around.tried[key] = computes_linear(module)
        if not around.tried[key]:
            return f"its {kind.__name__} does more than a linear layer"
    if hasattr(module, "parametrizations"):
        return "its weight is parametrized"
    if "forward" in vars(module) or module._forward_hooks or module._forward_pre_hooks:
        return "hooks run with it"
    if weight is None or weight.dtype not in FLOATS:
        dtype = str(getattr(weight, "dtype", None)).removeprefix("torch.")
        return f"its weight is {dtype}, not a float of 16, 32 or 64 bits"
    if type(weight.data) is not Tensor:
        return f"its weight is a {type(weight.data).__name__}, which is quantized or sharded already"
    if weight.numel() == 0:
        return "it has no weights"
    if any(name == tower or name.startswith(f"{tower}.") for tower in around.towers):
        return "it reads another modality than text"
    if around.decoder is not None and not name.startswith(f"{around.decoder}."):
        return "it is not part of the language model"
    for owner in around.owners.get(id(weight), []):
        if not interchangeable(around.model.get_submodule(owner), module):
            return f"it shares its weight with {owner}"
    for parent, key in around.parents[id(module)]:
        if key in weights_read(type(parent)):
            return f"{type(parent).__name__} reads its weight instead of calling it"
    return None


def computes_linear(module: Any) -> bool:
    """Tell whether a layer's own forward computes x W^T + b, by calling it with random parameters."""
    numbers = torch.Generator().manual_seed(0)
    probe = copy(module)
    probe.__dict__["_parameters"] = {
        key: None if each is None else torch.randn(each.shape, generator=numbers)
        for key, each in module._parameters.items()
    }
    probe.__dict__["_buffers"] = {key: None if each is None else each.clone() for key, each in module._buffers.items()}
    try:
        weight, bias, size = probe.weight, probe.bias, module.in_features
        x = torch.randn(2, size, generator=numbers)
        expected = functional.linear(x, weight, bias)
        magnitudes = functional.linear(x.abs(), weight.abs(), None if bias is None else bias.abs())
        bound = 4 * size * torch.finfo(x.dtype).eps * magnitudes  # rounding of sums in another order
        with torch.inference_mode():
            for mode in (True, False):
                probe.training = mode
                found = probe.forward(x)
                if found.shape != expected.shape or not bool(((found - expected).abs() <= bound).all()):
                    return False
    except Exception:  # A forward may raise anything for unexpected inputs.
        return False
    return True


def surroundings(model: nn.Module) -> Surroundings:
    """Index a model for `reason_dense`."""
    parents: dict[int, list[tuple[nn.Module, str]]] = {}
    owners: dict[int, list[str]] = {}
    towers = []
    for name, module in model.named_modules(remove_duplicate=False):
        for parameter in module._parameters.values():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append(name)
        if name and getattr(module, "main_input_name", "input_ids") not in ("input_ids", "inputs_embeds"):
            towers.append(name)
    for module in model.modules():
        for key, child in module._modules.items():
            if child is not None:
                parents.setdefault(id(child), []).append((module, key))
    return Surroundings(model, parents, owners, tuple(towers), decoder_name(model), {})


def decoder_name(model: Any) -> str | None:
    """Find the name of the language model inside a multimodal model; None for a plain language model."""
    config = getattr(model, "config", None)
    if not hasattr(model, "get_decoder") or not hasattr(config, "get_text_config"):
        return None
    try:
        decoder = None if config.get_text_config() is config else model.get_decoder()  # type: ignore[union-attr]
    except ValueError:  # transformers raises this if the model has several text configurations.
        return None
    return next((name for name, module in model.named_modules() if name and module is decoder), None)


@cache
def weights_read(parent: type) -> frozenset[str]:
    """Find the attributes whose ``.weight`` a module class reads, as in self.NAME.weight, in its usual path.

    The body of an ``if`` counts as a special case (training with fused kernels, for instance), for which the computed
    ``weight`` of packed layers suffices. Its ``else`` counts as usual. Classes without source code read none.
    """
    found: set[str] = set()
    for each in parent.__mro__:
        if issubclass(each, nn.Module) and each is not nn.Module:
            try:
                tree = ast.parse(textwrap.dedent(inspect.getsource(each)))
            except (OSError, TypeError, SyntaxError):
                continue
            for function in ast.walk(tree):
                if isinstance(function, ast.FunctionDef) and not is_set_up(function.name):
                    found.update(reads_in(function.body))
    return frozenset(found)


def is_set_up(name: str) -> bool:
    """Tell whether a method of this name sets up parameters."""
    return name in SET_UP or name.startswith(("init_", "_init"))


def reads_in(body: Sequence[ast.AST]) -> Iterator[str]:
    """Yield each NAME of self.NAME.weight in a syntax tree.

    Bodies and conditions of `if` are left out, and so are attributes such as self.NAME.weight.dtype.
    """
    for node in body:
        if isinstance(node, ast.If):
            yield from reads_in(node.orelse)
        elif isinstance(node, ast.Attribute) and node.attr in DESCRIPTIONS:
            continue
        elif (
            isinstance(node, ast.Attribute)
            and node.attr == "weight"
            and isinstance(node.value, ast.Attribute)
            and isinstance(node.value.value, ast.Name)
            and node.value.value.id == "self"
        ):
            yield node.value.attr
        else:
            yield from reads_in(list(ast.iter_child_nodes(node)))


def describe_dense(selection: Selection) -> str:
    """Describe in one line which layers stay dense and why, grouped by the last part of their names."""
    kinds: dict[tuple[str, str], int] = {}
    for name, reason in selection.dense.items():
        kind = name.split(".")[-1], reason
        kinds[kind] = kinds.get(kind, 0) + 1
    parts = "; ".join(f"{count} {kind} ({reason})" for (kind, reason), count in kinds.items())
    count = len(selection.dense)
    layers = "1 layer stays" if count == 1 else f"{count} layers stay"
    return f"{layers} dense, with {selection.share:.2%} of the selected weights: {parts}"


def is_linear(module: nn.Module) -> bool:
    """Tell whether a module is a dense linear layer: torch's, or GPT-2's Conv1D, which stores its weight transposed."""
    return isinstance(module, nn.Linear) or is_conv1d(module)


def is_conv1d(module: nn.Module) -> bool:
    """Tell whether a module is transformers' Conv1D."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def linear_weight(layer: Any) -> Tensor:
    """Return the (d_out, d_in) weight of a dense linear layer."""
    weight = layer.weight.detach()
    return weight.mT if is_conv1d(layer) else weight


def linear_shape(layer: Any) -> tuple[int, int]:
    """Return the sizes (d_out, d_in) of a dense linear layer."""
    d_out, d_in = linear_weight(layer).shape
    return d_out, d_in


def as_patterns(key: str, given: Any) -> tuple[str, ...]:
    """Convert patterns to a tuple; a string is one pattern.

    Raises
    ------
    TypeError
        If a pattern is not a string.
    """
    patterns = (given,) if isinstance(given, str) else given
    if not isinstance(patterns, list | tuple | set | frozenset) or not all(isinstance(each, str) for each in patterns):
        raise TypeError(f"{key} must be a pattern of layer names or a list of patterns, got {given!r}")
    return tuple(sorted(patterns) if isinstance(patterns, set | frozenset) else patterns)


def check_patterns(key: str, patterns: Sequence[str], names: Sequence[str]) -> None:
    """Raise ValueError if a pattern matches none of the names; the message suggests patterns or names."""
    for pattern in patterns if names else ():
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ValueError(
                f"no linear layer matches the pattern {pattern!r} of {key}; "
                f"did you mean {' or '.join(map(repr, near(pattern, names)))}?"
            )


def near(pattern: str, names: Sequence[str]) -> list[str]:
    """Suggest patterns that resemble a given one and match some of the names; otherwise one of the names."""
    tries = [f"*.{pattern}", f"{pattern}.*", f"*.{pattern}.*", f"*{pattern}*"]
    found = next(([each] for each in tries if any(fnmatchcase(name, each) for name in names)), [])
    if not found:
        kinds = sorted({f"*.{name.split('.')[-1]}" for name in names})
        known = {each.lower(): each for each in (*kinds, *names)}
        found = [known[each] for each in get_close_matches(pattern.lower(), known, 2, 0.5)]
    return found or list(names[:1]) or ["*"]


def matches(name: str, patterns: Sequence[str]) -> bool:
    """Tell whether a module name matches one of the shell-style patterns."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)
