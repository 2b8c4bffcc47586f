"""Hold the trained tensors of a student, and compute the weights of its forward pass from them.

The trained tensors are float32 master weights: latents and scales of the LittleBit layers, and norms (or all other
parameters) of the model. A forward pass uses the folded pair of each layer (see `linear.folded`), rounded to the
compute dtype.

`StackedStudent` stacks the master weights of all layers with the same shapes into one tensor. A few large operations
then fold a model of 210 layers, instead of thousands of small ones. The layers' own parameters are slices of the
stacks, so they change with every step. `ShardedStudent` leaves the master weights in the layers and shards them over
the processes (FSDP2).
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from ..admm import root_mean_square
from ..factors import Factors
from ..linear import folded
from ..models.blocks import block_list, decoder_blocks
from ..models.layers import LatentModule, LittleBitLinear, Path
from ..signs import named_rule

TRAINABLE = ("none", "norms", "all")
RANK_STEP = 16  # Folded ranks are padded to a multiple of this, which aligns the operands of matrix units.


class Masters(NamedTuple):
    """Hold the trained tensors by name, in groups with separate learning rates.

    Attributes
    ----------
    latents : dict
        u and v of every path, and the latents of any other `LatentModule`.
    scales : dict
        h, ell and g of every path, and the other parameters of any other `LatentModule`.
    others : dict
        Biases, norms and, with train="all", embeddings and head.
    """

    latents: dict[str, Tensor]
    scales: dict[str, Tensor]
    others: dict[str, Tensor]

    def named(self) -> dict[str, Tensor]:
        """Return all trained tensors by name."""
        return {**self.latents, **self.scales, **self.others}


class Stack(NamedTuple):
    """Hold the stacked parameters of layers with the same shape and ranks.

    Attributes
    ----------
    names : list of str
        Names of the layers, in the model's order.
    paths : list of Factors
        Their paths, each tensor stacked over the layers: u is (layers, d_out, rank), h is (layers, d_out).
    """

    names: list[str]
    paths: list[Factors]


class StackedStudent:
    """Train a model on one device, its master weights stacked over layers with the same shapes.

    The model's parameters become views of the stacks.

    Parameters
    ----------
    model : transformers causal language model after `quantize_`
    rule : str
        Gradient of the sign function: a name in `signs.RULES`.
    train : str
        Which of the other parameters to train: "none", "norms" or "all", which includes embeddings.
    dtype : torch.dtype
        Dtype that the forward pass computes in.
    """

    def __init__(self, model: nn.Module, rule: str, train: str, dtype: torch.dtype):
        named_rule(rule)
        check_trainable(train)
        self.model, self.rule, self.dtype = model, rule, dtype
        self.fold: Callable[..., tuple[Tensor, Tensor]] = fold
        layers = littlebit_layers(model)
        self.stacks = [stack_layers(names, layers) for names in names_by_shape(layers)]
        self.widths = [self.width(stack) for stack in self.stacks]
        own = {f"{name}.{key}" for name, layer in layers.items() for key, _ in layer.paths.named_parameters("paths")}
        self.unstacked = grouped(model, (name for name, _ in model.named_parameters() if name not in own))
        others = self.unstacked.others
        self.others = {name: p for name, p in others.items() if is_trained(model, name, train)}
        self.fixed = {name: p.detach().to(dtype) for name, p in others.items() if name not in self.others}
        set_rule(model, rule)
        for master in self.masters().named().values():
            master.requires_grad_()

    def width(self, stack: Stack) -> int:
        """Compute the padded rank of a stack's folded factors: the same multiple of RANK_STEP for a shape.

        Every block then has the same sizes, and runs the same compiled code.
        """
        shape = stack.paths[0].h.shape[1], stack.paths[0].g.shape[1]
        same = [each.paths for each in self.stacks if (each.paths[0].h.shape[1], each.paths[0].g.shape[1]) == shape]
        return -(-max(sum(path.rank for path in paths) for paths in same) // RANK_STEP) * RANK_STEP

    def masters(self) -> Masters:
        """Return the trained tensors."""
        latents, scales = dict(self.unstacked.latents), dict(self.unstacked.scales)
        for stack in self.stacks:
            for at, path in enumerate(stack.paths):
                for field, tensor in path._asdict().items():
                    group = latents if field in Path.latents else scales
                    group[f"{stack.names[0]}.paths.{at}.{field}"] = tensor
        return Masters(latents, scales, dict(self.others))

    def weights(self) -> dict[str, Tensor]:
        """Compute the weights of a forward pass by name: folded factors and other parameters, in the compute dtype.

        They are computed anew for each micro-batch, so its gradients reach the float32 master weights and accumulate
        there.
        """
        weights = {**self.fixed, **self.unstacked.latents, **self.unstacked.scales}
        for stack, width in zip(self.stacks, self.widths, strict=True):
            a, b = self.fold(stack.paths, self.rule, width, self.dtype)
            for name, a_layer, b_layer in zip(stack.names, Unstack.apply(a), Unstack.apply(b), strict=True):
                weights[f"{name}.a"], weights[f"{name}.b"] = a_layer, b_layer
        for name, master in self.others.items():
            weights[name] = master.to(self.dtype)
        return weights

    def logits(self, tokens: Tensor) -> Tensor:
        """Compute (batch, sequence, vocabulary) logits in the compute dtype from (batch, sequence) tokens."""
        keywords = {"input_ids": tokens, "use_cache": False}
        return functional_call(self.model, self.weights(), kwargs=keywords).logits

    def finish(self) -> None:
        """End training: let the model's parameters require gradients again."""
        for p in self.model.parameters():
            p.grad = None
            p.requires_grad_()


class ShardedStudent:
    """Train a model with master weights, gradients and optimizer state sharded over the processes (FSDP2).

    A copy of the model is sharded and trained, while the model waits in the memory of the CPU. `finish` copies the
    result into it. Blocks are copied to the GPU and sharded one by one, so that it never holds all of them.

    The masters are this process's shards as plain tensors, which share the memory of FSDP's. An operation on a
    thousand distributed tensors takes Python longer than the GPU.

    Parameters
    ----------
    model : transformers causal language model after `quantize_`, on this process's device
    rule, train, dtype
        See StackedStudent.
    recompute : bool
        Whether to compute each block again in the backward pass, and keep only its input.
    """

    def __init__(self, model: nn.Module, rule: str, train: str, dtype: torch.dtype, recompute: bool = False):
        named_rule(rule)
        check_trainable(train)
        self.device = next(model.parameters()).device
        self.original = model.cpu()
        others = grouped(model).others
        for name, p in model.named_parameters():
            p.requires_grad_(name not in others or is_trained(model, name, train))
        blocks = decoder_blocks(model)
        self.model = copy.deepcopy(model, {id(block): block for block in blocks})  # deepcopy keeps what it finds here
        places = block_list(self.model)
        del places[:]
        self.model.to(self.device)
        for block in blocks:
            places.append(shard_block_(copy.deepcopy(block).to(self.device), dtype, recompute))
        shard_rest_(self.model, dtype)
        set_rule(self.model, rule)
        self.trained: dict[str, Any] = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        self.shards = {name: p.to_local().detach().requires_grad_() for name, p in self.trained.items()}

    def masters(self) -> Masters:
        """Return this process's shards of the trained tensors."""
        names = grouped(self.model, self.shards)
        return Masters(*({name: self.shards[name] for name in group} for group in names))

    def take_gradients(self) -> None:
        """Move the gradients of all micro-batches, which FSDP has averaged over the processes, to the masters."""
        for name, p in self.trained.items():
            self.shards[name].grad = None if p.grad is None else p.grad.to_local()
            p.grad = None

    def state(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Describe tensors of the masters' sizes as shards of whole tensors; leave others as they are.

        A tensor belongs to the master whose name its own name begins with. Memory is shared.
        """
        from torch.distributed.tensor import DTensor

        found = {}
        for name, tensor in tensors.items():
            whole = self.trained[name if name in self.trained else name.rpartition(".")[0]]
            if tensor.ndim:
                layout = {"shape": whole.shape, "stride": whole.stride(), "run_check": False}
                tensor = DTensor.from_local(tensor, whole.device_mesh, whole.placements, **layout)
            found[name] = tensor
        return found

    def logits(self, tokens: Tensor) -> Tensor:
        """Compute (batch, sequence, vocabulary) logits in the compute dtype from (batch, sequence) tokens."""
        return self.model(input_ids=tokens, use_cache=False).logits

    def finish(self) -> None:
        """End training: gather the trained values from all processes and copy them into the model."""
        with torch.no_grad():
            for name, p in self.model.named_parameters():
                self.original.get_parameter(name).copy_(full_tensor(p))
        for p in self.original.parameters():
            p.requires_grad_()
        self.original.to(self.device)


def fold(paths: Sequence[Factors], rule: str, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Compute the folded pair, (..., width, d_in) and (..., d_out, width), its rank padded with zeros to `width`."""
    a, b = folded(paths, rule)
    a, b = (factor.to(dtype).contiguous() for factor in (a, b))
    missing = width - a.shape[-2]
    return functional.pad(a, (0, 0, 0, missing)), functional.pad(b, (0, missing))


def scale_latents_(model: nn.Module, size: float) -> None:
    """Scale each matrix of latents to a root mean square of `size`, in place. No sign changes."""
    for latents in grouped(model).latents.values():
        latents.data *= size / root_mean_square(latents.data)


class Unstack(torch.autograd.Function):
    """Split a tensor along its first axis into slices that share its memory but are not views to autograd.

    torch.compile would specialize code to the place of a view in the stack, and compile it again for every block.
    """

    @staticmethod
    def forward(ctx: Any, stack: Tensor) -> tuple[Tensor, ...]:
        """Return the slices, which must not be written to."""
        return tuple(row.data for row in stack)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        """Stack the gradients of the slices."""
        return torch.stack(grads)


def shard_(model: nn.Module, dtype: torch.dtype) -> None:
    """Shard a model's parameters over all processes, block by block (FSDP2), to compute in `dtype`."""
    for block in decoder_blocks(model):
        shard_block_(block, dtype)
    shard_rest_(model, dtype)


def shard_block_(block: nn.Module, dtype: torch.dtype, recompute: bool = False) -> nn.Module:
    """Shard a block's parameters over all processes, and return the block.

    With `recompute`, it is computed again in the backward pass (activation checkpointing).
    """
    from torch.utils.checkpoint import checkpoint

    if recompute:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)  # type: ignore[method-assign]
    shard_rest_(block, dtype)
    return block


def shard_rest_(module: nn.Module, dtype: torch.dtype) -> None:
    """Shard those parameters of a module over all processes that are not sharded yet."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    fully_shard(module, mp_policy=MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32))


def full_tensor(tensor: Tensor) -> Tensor:
    """Gather a sharded tensor from all processes; return any other tensor as it is."""
    gather: Callable[[], Tensor] | None = getattr(tensor, "full_tensor", None)
    return tensor if gather is None else gather()


def copy_state(targets: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    """Copy values, in place, into tensors with the same names, which may be sharded over processes."""
    for name, target in targets.items():
        value = values[name].to(target.device)
        if hasattr(target, "full_tensor"):
            from torch.distributed.tensor import distribute_tensor

            value = distribute_tensor(value, target.device_mesh, target.placements)  # type: ignore[attr-defined]
        target.copy_(value)


def littlebit_layers(model: nn.Module) -> dict[str, LittleBitLinear]:
    """Map names to the LittleBitLinear layers of a model."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LittleBitLinear)}


def grouped(model: nn.Module, names: Iterable[str] | None = None) -> Masters:
    """Group parameters of a model, by default all: latents and scales of each `LatentModule`, and others."""
    groups = Masters({}, {}, {})
    for name in [name for name, _ in model.named_parameters()] if names is None else names:
        head, _, field = name.rpartition(".")
        module, group = model.get_submodule(head), groups.others
        if isinstance(module, LatentModule):
            group = groups.latents if field in module.latents else groups.scales
        group[name] = model.get_parameter(name)
    return groups


def set_rule(model: nn.Module, rule: str) -> None:
    """Set the gradient of the sign function in every layer that trains."""
    for module in model.modules():
        if isinstance(module, LatentModule | LittleBitLinear):
            module.rule = rule


def check_trainable(train: str) -> None:
    """Raise ValueError unless `train` is one of TRAINABLE."""
    if train not in TRAINABLE:
        raise ValueError(f"train must be one of {', '.join(TRAINABLE)}, got {train!r}")


def is_trained(model: nn.Module, name: str, train: str) -> bool:
    """Tell whether to train a parameter outside the paths: "norms" trains vectors, which are norms and biases."""
    return train == "all" or (train == "norms" and model.get_parameter(name).ndim == 1)


def names_by_shape(layers: dict[str, LittleBitLinear]) -> Iterator[list[str]]:
    """Yield the names of layers that have the same shape and ranks."""
    groups: dict[Any, list[str]] = {}
    for name, layer in layers.items():
        groups.setdefault((layer.d_out, layer.d_in, layer.ranks), []).append(name)
    yield from groups.values()


def stack_layers(names: list[str], layers: dict[str, LittleBitLinear]) -> Stack:
    """Stack the parameters of layers, which become views of the stacks and no longer require gradients."""
    paths = []
    for at in range(len(layers[names[0]].paths)):
        mine = [layers[name].factors()[at] for name in names]
        stack = Factors(*(torch.stack([tensor.detach() for tensor in field]) for field in zip(*mine, strict=True)))
        for row, factors in enumerate(mine):
            for tensor, stacked in zip(factors, stack, strict=True):
                tensor.requires_grad_(False)
                tensor.data = stacked[row]
        paths.append(stack)
    return Stack(names, paths)


def check_models(model: nn.Module, teacher: nn.Module) -> None:
    """Raise ValueError unless the model is quantized, the teacher is not, and their sizes are the same."""
    if not grouped(model).latents:
        raise ValueError("the model must have LittleBit layers in training form, got none: call quantize_ first")
    if littlebit_layers(teacher):
        raise ValueError("the teacher must be a dense model, got a quantized one: pass the model before quantize_")
    for key in ("model_type", "vocab_size", "hidden_size", "num_hidden_layers"):
        sizes = [getattr(each.config, key, None) for each in (teacher, model)]
        if sizes[0] != sizes[1]:
            raise ValueError(
                f"teacher and student must have the same {key}, got {sizes[0]} and {sizes[1]}: quantize a copy of this "
                "teacher"
            )
