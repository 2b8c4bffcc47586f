"""The student in training: which tensors are trained, and how they become the weights of a forward pass.

Masters are float32: latents and scales of the LittleBit layers, and the norms (or all other parameters) of the model.
A forward pass sees them folded (see `linear.folded`) and rounded to the compute dtype.

`StackedStudent` keeps the masters of all layers of a kind in one stacked tensor, so that a model of 210 layers is
folded by a few large operations instead of thousands of small ones; the layers' own parameters are slices of the
stacks and follow every step. `ShardedStudent` leaves them in the layers and divides them over processes (FSDP2).
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from ..admm import root_mean_square
from ..factors import Factors
from ..linear import folded
from ..models.layers import LittleBitLinear
from ..signs import named_rule

TRAINABLE = ("none", "norms", "all")  # which parameters other than the LittleBit layers' are trained
LATENTS = ("u", "v")
RANK_STEP = 16


class Masters(NamedTuple):
    """Trained tensors by name, in the groups that have learning rates of their own.

    Attributes
    ----------
    latents : dict
        u and v of every path.
    scales : dict
        h, ell and g of every path.
    others : dict
        Biases, norms and whatever else is trained.
    """

    latents: dict[str, Tensor]
    scales: dict[str, Tensor]
    others: dict[str, Tensor]

    def named(self) -> dict[str, Tensor]:
        """All of them."""
        return {**self.latents, **self.scales, **self.others}


class Stack(NamedTuple):
    """Layers of equal shape and ranks.

    Attributes
    ----------
    names : list of str
        Of the layers, in the model's order.
    paths : list of Factors
        With tensors stacked over the layers: u is (layers, d_out, rank) and so on.
    """

    names: list[str]
    paths: list[Factors]


class StackedStudent:
    """A student whose masters are stacked by kind of layer, on one device; the model's parameters become views of them.

    Parameters
    ----------
    model : transformers causal language model after `quantize_`
    rule : str
        A name in `signs.RULES`.
    train : str
        "none", "norms" or "all": which of the other parameters are trained; "all" includes embeddings.
    dtype : torch.dtype
        That the forward pass computes in.
    """

    def __init__(self, model: nn.Module, rule: str, train: str, dtype: torch.dtype):
        named_rule(rule)
        check_trainable(train)
        self.model, self.rule, self.dtype = model, rule, dtype
        self.fold: Callable[..., tuple[Tensor, Tensor]] = fold
        layers = littlebit_layers(model)
        self.stacks = [stacked(names, layers) for names in kinds(layers)]
        self.widths = [self.width(stack) for stack in self.stacks]
        own = {f"{name}.{key}" for name, layer in layers.items() for key, _ in layer.paths.named_parameters("paths")}
        others = {name: p for name, p in model.named_parameters() if name not in own}
        self.others = {name: p for name, p in others.items() if is_trained(model, name, train)}
        self.fixed = {name: p.detach().to(dtype) for name, p in others.items() if name not in self.others}
        for master in self.masters().named().values():
            master.requires_grad_()

    def width(self, stack: Stack) -> int:
        """Rank that a stack's factors are filled up to: one for all layers of a shape, and a multiple of RANK_STEP.

        So every block has the same sizes and runs the same compiled code, and matrix units get aligned operands.
        """
        shape = stack.paths[0].h.shape[1], stack.paths[0].g.shape[1]
        same = [each.paths for each in self.stacks if (each.paths[0].h.shape[1], each.paths[0].g.shape[1]) == shape]
        return -(-max(sum(path.rank for path in paths) for paths in same) // RANK_STEP) * RANK_STEP

    def masters(self) -> Masters:
        """The trained tensors."""
        latents, scales = {}, {}
        for stack in self.stacks:
            for at, path in enumerate(stack.paths):
                for field, tensor in path._asdict().items():
                    group = latents if field in LATENTS else scales
                    group[f"{stack.names[0]}.paths.{at}.{field}"] = tensor
        return Masters(latents, scales, dict(self.others))

    def weights(self) -> dict[str, Tensor]:
        """What the forward pass computes with, by name: folded factors and the other parameters, in the compute dtype.

        Built for each micro-batch, so that its gradients reach the float32 masters and add up there.
        """
        weights = dict(self.fixed)
        for stack, width in zip(self.stacks, self.widths, strict=True):
            a, b = self.fold(stack.paths, self.rule, width, self.dtype)
            for name, a_layer, b_layer in zip(stack.names, Unstack.apply(a), Unstack.apply(b), strict=True):
                weights[f"{name}.a"], weights[f"{name}.b"] = a_layer, b_layer
        for name, master in self.others.items():
            weights[name] = master.to(self.dtype)
        return weights

    def logits(self, tokens: Tensor) -> Tensor:
        """(batch, sequence) tokens to (batch, sequence, vocabulary) logits in the compute dtype."""
        keywords = {"input_ids": tokens, "use_cache": False}
        return functional_call(self.model, self.weights(), kwargs=keywords).logits

    def finish(self) -> None:
        """End training: the model's parameters are ordinary ones again, with the trained values."""
        for p in self.model.parameters():
            p.grad = None
            p.requires_grad_()


class ShardedStudent:
    """A student whose masters, gradients and optimiser state are divided over the processes (FSDP2).

    A copy of the model is divided and trained; the model itself gets the result.

    Parameters
    ----------
    model : transformers causal language model after `quantize_`, on this process's device
    rule, train, dtype
        See StackedStudent.
    """

    def __init__(self, model: nn.Module, rule: str, train: str, dtype: torch.dtype):
        named_rule(rule)
        check_trainable(train)
        self.original = model
        self.model = copy.deepcopy(model)
        for layer in littlebit_layers(self.model).values():
            layer.rule = rule
        for name, p in self.model.named_parameters():
            p.requires_grad_(is_littlebit(model, name) or is_trained(model, name, train))
        shard_(self.model, dtype)

    def masters(self) -> Masters:
        """The process's part of the trained tensors."""
        latents, scales, others = {}, {}, {}
        for name, p in self.model.named_parameters():
            if p.requires_grad:
                if not is_littlebit(self.model, name):
                    others[name] = p
                elif name.rsplit(".", 1)[-1] in LATENTS:
                    latents[name] = p
                else:
                    scales[name] = p
        return Masters(latents, scales, others)

    def logits(self, tokens: Tensor) -> Tensor:
        """(batch, sequence) tokens to (batch, sequence, vocabulary) logits in the compute dtype."""
        return self.model(input_ids=tokens, use_cache=False).logits

    def finish(self) -> None:
        """End training: give the model the trained values, gathered from all processes."""
        with torch.no_grad():
            for name, p in self.model.named_parameters():
                self.original.get_parameter(name).copy_(whole(p))


def fold(paths: Sequence[Factors], rule: str, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The folded pair, its rank filled up with zeros: (..., width, d_in) and (..., d_out, width) in the dtype."""
    a, b = folded(paths, rule)
    a, b = (factor.to(dtype).contiguous() for factor in (a, b))
    missing = width - a.shape[-2]
    return functional.pad(a, (0, 0, 0, missing)), functional.pad(b, (0, missing))


def scale_latents_(model: nn.Module, size: float) -> None:
    """Scale the latents of every path to a root mean square of `size`, in place; no sign changes."""
    for layer in littlebit_layers(model).values():
        for path in layer.factors():
            for latents in (path.u, path.v):
                latents.data *= size / root_mean_square(latents.data)


class Unstack(torch.autograd.Function):
    """The slices of a tensor along its first axis, as tensors that do not know of each other.

    They share its memory, but are no views to autograd: compiled code would be specialised to where in the stack a
    view lies, and be compiled again for every block.
    """

    @staticmethod
    def forward(ctx: Any, stack: Tensor) -> tuple[Tensor, ...]:
        """Slices, not to be written to."""
        return tuple(row.data for row in stack)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        """The slices' gradients in a stack."""
        return torch.stack(grads)


def shard_(model: nn.Module, dtype: torch.dtype) -> None:
    """Divide a model's parameters over all processes, block by block (FSDP2); computation is in `dtype`."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for block in blocks(model):
        fully_shard(block, mp_policy=policy)
    fully_shard(model, mp_policy=policy)


def whole(tensor: Tensor) -> Tensor:
    """A tensor gathered from all processes, if it is divided over them."""
    full: Callable[[], Tensor] | None = getattr(tensor, "full_tensor", None)
    return tensor if full is None else full()


def littlebit_layers(model: nn.Module) -> dict[str, LittleBitLinear]:
    """A model's LittleBitLinear layers by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LittleBitLinear)}


def is_littlebit(model: nn.Module, name: str) -> bool:
    """Whether a parameter is a latent or scale of a LittleBit layer."""
    head, _, _ = name.rpartition(".paths.")
    return bool(head) and isinstance(model.get_submodule(head), LittleBitLinear)


def check_trainable(train: str) -> None:
    """Raise ValueError unless `train` is one of TRAINABLE."""
    if train not in TRAINABLE:
        raise ValueError(f"train must be one of {', '.join(TRAINABLE)}, not {train!r}")


def is_trained(model: nn.Module, name: str, train: str) -> bool:
    """Whether a parameter outside the paths is trained: biases and norms are the vectors, "all" adds the matrices."""
    return train == "all" or (train == "norms" and model.get_parameter(name).ndim == 1)


def kinds(layers: dict[str, LittleBitLinear]) -> Iterator[list[str]]:
    """Names of the layers of equal shape and ranks."""
    groups: dict[Any, list[str]] = {}
    for name, layer in layers.items():
        groups.setdefault((layer.d_out, layer.d_in, layer.ranks), []).append(name)
    yield from groups.values()


def stacked(names: list[str], layers: dict[str, LittleBitLinear]) -> Stack:
    """The layers' parameters in stacks; the layers keep theirs as views, which no longer need gradients."""
    paths = []
    for at in range(len(layers[names[0]].paths)):
        mine = [layers[name].factors()[at] for name in names]
        stack = Factors(*(torch.stack([tensor.detach() for tensor in field]) for field in zip(*mine, strict=True)))
        for row, factors in enumerate(mine):
            for tensor, whole_tensor in zip(factors, stack, strict=True):
                tensor.requires_grad_(False)
                tensor.data = whole_tensor[row]
        paths.append(stack)
    return Stack(names, paths)


def blocks(model: nn.Module) -> list[nn.Module]:
    """The model's decoder blocks: the longest list of modules in it.

    Raises
    ------
    ValueError
        If the model holds no list of modules.
    """
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module)]
    if not lists:
        raise ValueError("the model has no list of decoder blocks, so it cannot be trained block by block or divided")
    return list(max(lists, key=len))
