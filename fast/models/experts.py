"""Split mixture-of-experts (MoE) modules, which hold all experts of a block in one tensor, into linear layers.

In transformers, a module of experts holds `gate_up_proj` and `down_proj`, of shapes (experts, 2 i, d) and
(experts, d, i) or with the last two axes swapped. Before quantization it is split into three layers for each expert:

    model.layers.0.mlp.experts.3.gate_proj, ....3.up_proj, ....3.down_proj

Each then has its own factors, like any other layer. Gate and up projection become separate layers, as in the dense MLPs
of the same families and in most published checkpoints. A fused layer would have one matrix V for both; at equal bits,
two pairs of factors hold more directions than one.

Llama 4 holds the same tensors in a module of another form: its input holds every token once for each expert, multiplied
by the routing weight, which is zero where the router does not choose the expert.

Routers decide which experts a token uses. They are small and stay dense.
"""

import copy
import inspect
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn import functional

from .layers import Path, linear_over

GATED = ("gate_proj", "up_proj", "down_proj")
UNGATED = ("up_proj", "down_proj")
#: Largest share of the weights that may stay dense without an --exclude, outside embeddings and linear layers.
MOST_LEFT_DENSE = 0.1


class DenseProjection(nn.Module):
    """Compute a projection of one expert that was excluded from quantization.

    Its parameter is not called weight, because transformers would take `experts.3.up_proj.weight` for a part of the
    tensor that holds all experts.

    Parameters
    ----------
    weight : (d_out, d_in) tensor
        Copied.
    bias : (d_out,) tensor, optional
    """

    def __init__(self, weight: Tensor, bias: Tensor | None):
        super().__init__()
        self.matrix = nn.Parameter(weight.detach().clone(memory_format=torch.contiguous_format))
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., d_in) to (..., d_out)."""
        return functional.linear(x, self.matrix, self.bias)


class QuantizedExperts(nn.Module):
    """Compute the experts of one block from separate layers.

    The children 0, 1, ... each hold the layers of one expert.

    Parameters
    ----------
    activate : callable
        Maps the first projection's output, (tokens, 2 i) with a gate, to the input of the last, (tokens, i).
    interleaved : bool
        Whether gate and up entries alternate in the input of `activate`, or the gate entries come first.
    """

    def __init__(self, activate: Callable[[Tensor], Tensor], interleaved: bool):
        super().__init__()
        self.activate, self.interleaved = activate, interleaved

    def __len__(self) -> int:
        """Count the experts."""
        return len(self._modules)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Sum the weighted outputs of each token's experts; only experts that a token is routed to are computed.

        Parameters
        ----------
        hidden_states : (tokens, d)
        top_k_index : (tokens, k) integer tensor
            Experts of each token. An index beyond the last expert means no expert.
        top_k_weights : (tokens, k), or (tokens, experts) from some routers of transformers 5.0

        Returns
        -------
        (tokens, d) tensor with the dtype of `hidden_states`; sums are in float32.
        """
        of_all = top_k_weights.shape != top_k_index.shape
        output = torch.zeros_like(hidden_states, dtype=torch.promote_types(hidden_states.dtype, torch.float32))
        for expert in self.reached(top_k_index):
            token, place = torch.where(top_k_index == expert)
            weight = top_k_weights[token, expert if of_all else place, None]
            found = self.expert(expert, hidden_states[token]) * weight
            output = output.index_add(0, token, found.to(output.dtype))
        return output.to(hidden_states.dtype)

    def reached(self, top_k_index: Tensor) -> list[int]:
        """List the experts to compute: the experts of any token or, where several processes train, all.

        Indices beyond the last expert are left out.
        """
        if self.computes_all():
            return list(range(len(self)))
        return [expert for expert in top_k_index.unique().tolist() if expert < len(self)]

    def computes_all(self) -> bool:
        """Tell whether experts without a token must be computed too.

        Processes that train together average their gradients, so each needs a gradient for every parameter.
        """
        return torch.is_grad_enabled() and distributed.is_available() and distributed.is_initialized()

    def expert(self, at: int, x: Tensor) -> Tensor:
        """Compute one expert: (tokens, d) to (tokens, d)."""
        layers: Any = self._modules[str(at)]
        hidden = layers["up_proj"](x)
        if "gate_proj" in layers:
            gate = layers["gate_proj"](x)
            hidden = torch.stack((gate, hidden), -1).flatten(-2) if self.interleaved else torch.cat((gate, hidden), -1)
        return layers["down_proj"](self.activate(hidden))


class SortedExperts(QuantizedExperts):
    """The experts of a Llama 4 block, whose input holds every token once for each expert."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Apply each expert to its own rows; skip rows of zeros, whose outputs are zeros.

        Parameters
        ----------
        hidden_states : (experts * tokens, d)
            Tokens of the first expert, then of the second, and so on.

        Returns
        -------
        (experts * tokens, d) tensor
        """
        outputs = []
        for at, rows in enumerate(hidden_states.chunk(len(self))):
            (token,) = torch.where(rows.any(-1))
            output = torch.zeros_like(rows)
            if len(token) or self.computes_all():
                output = output.index_copy(0, token, self.expert(at, rows[token]).to(rows.dtype))
            outputs.append(output)
        return torch.cat(outputs)


def is_sorted(module: Any) -> bool:
    """Tell whether a module holds experts as Llama 4 does: (experts, d, 2 i), (experts, i, d) and an activation."""
    if {name for name, _ in module.named_parameters()} != {"gate_up_proj", "down_proj"}:
        return False
    if not hasattr(module, "act_fn") or any(True for _ in module.buffers()):
        return False
    if list(inspect.signature(module.forward).parameters) != ["hidden_states"]:
        return False
    first, last = module.gate_up_proj.shape, module.down_proj.shape
    return len(first) == 3 and last == (first[0], first[2] // 2, first[1])


def is_known(module: Any) -> bool:
    """Tell whether a module holds experts in a form that `split_experts` reads.

    transformers marks most of them with the decorator `use_experts_implementation`, which defines their forward.
    """
    if is_sorted(module):
        return True
    if not (hasattr(module, "_apply_gate") and hasattr(module, "is_transposed") and hasattr(module, "has_bias")):
        return False
    if getattr(module, "has_post_expert_norm", False):
        return False
    first = "gate_up_proj" if getattr(module, "has_gate", True) else "up_proj"
    wanted = {name + end for name in (first, "down_proj") for end in ("", "_bias")[: 1 + module.has_bias]}
    found = dict(module.named_parameters())
    if set(found) != wanted or any(True for _ in module.buffers()):
        return False
    return all(parameter.ndim == (2 if name.endswith("_bias") else 3) for name, parameter in found.items())


def split_experts(module: Any, selected: Callable[[str], bool]) -> QuantizedExperts:
    """Split a module of experts (see `is_known`) into one linear layer per projection of each expert.

    The layers share the memory of the module's parameters. Only projections that are not selected are copied.

    Parameters
    ----------
    module : torch.nn.Module
    selected : callable
        Tells whether a projection will be quantized, by its name below the module, such as "3.gate_proj".
    """
    bare = copy.copy(module)
    bare._parameters = {}
    gated = getattr(module, "has_gate", True)
    if is_sorted(module):
        interleaved = False
        experts: QuantizedExperts = SortedExperts(partial(halves_gated, bare.act_fn), interleaved)
    else:
        interleaved = gated and alternates(bare._apply_gate)
        experts = QuantizedExperts(bare._apply_gate if gated else bare.act_fn, interleaved)
    for expert in range(len(module.down_proj)):
        layers = {}
        for name, weight, bias in projections(module, expert, interleaved):
            make = linear_over if selected(f"{expert}.{name}") else DenseProjection
            layers[name] = make(weight, bias)
        experts.add_module(str(expert), nn.ModuleDict(layers))
    return experts.train(module.training)


def halves_gated(activation: Callable[[Tensor], Tensor], gate_up: Tensor) -> Tensor:
    """Multiply the second half of the last axis by the activated first half."""
    gate, up = gate_up.chunk(2, -1)
    return up * activation(gate)


def alternates(apply_gate: Callable[[Tensor], Tensor]) -> bool:
    """Tell whether gate and up alternate in a gating function's input: its first output depends on its second input."""
    probe = torch.tensor([[0.0, torch.nan, 0.0, 0.0]], device="cpu")
    return bool(apply_gate(probe)[0, 0].isnan())


def projections(module: Any, expert: int, interleaved: bool) -> Iterator[tuple[str, Tensor, Tensor | None]]:
    """Yield name, (d_out, d_in) weight and bias of each projection of an expert, as views."""
    gated = getattr(module, "has_gate", True)
    first = "gate_up_proj" if gated else "up_proj"
    weights, biases = [], []
    for name in (first, "down_proj"):
        weight = getattr(module, name).detach()[expert]
        weights.append(weight.mT if getattr(module, "is_transposed", True) else weight)
        biases.append(getattr(module, f"{name}_bias").detach()[expert] if getattr(module, "has_bias", False) else None)

    def halves(tensor: Tensor) -> list[Tensor]:
        return [tensor[0::2], tensor[1::2]] if interleaved else list(tensor.chunk(2))

    if gated:
        weights = [*halves(weights[0]), weights[1]]
        biases = [None] * 3 if biases[0] is None else [*halves(biases[0]), biases[1]]
    yield from zip(GATED if gated else UNGATED, weights, biases, strict=True)


def projection_names(module: Any) -> list[str]:
    """List the names that `split_experts` gives to the layers of a module, such as "3.gate_proj"."""
    names = GATED if getattr(module, "has_gate", True) else UNGATED
    return [f"{expert}.{name}" for expert in range(len(module.down_proj)) for name in names]


def expert_counts(model: nn.Module) -> Iterator[tuple[str, int]]:
    """Yield the name and the number of experts of each module that holds experts, split or in stacked parameters."""
    for name, module in model.named_modules():
        if isinstance(module, QuantizedExperts):
            yield name, len(module)
        elif "expert" in f"{name} {type(module).__name__}".lower():
            yield from ((name, len(p)) for p in module.parameters(recurse=False) if p.ndim == 3)


def has_experts(model: nn.Module) -> bool:
    """Tell whether a model routes tokens to experts, so that what it computes depends on its input."""
    return any(True for _ in expert_counts(model))


def routers(model: nn.Module) -> dict[str, int]:
    """Map the names of a model's routers, and of the gates of shared experts, to their numbers of weights.

    A router stands beside its experts. Its name contains router or is gate, or it has one row for each expert. The gate
    of a shared expert has one row.
    """
    found = {}
    for experts, count in expert_counts(model):
        block, _, _ = experts.rpartition(".")
        for name, module in model.get_submodule(block).named_modules(prefix=block):
            weight = getattr(module, "weight", None)
            if isinstance(weight, nn.Parameter) and weight.ndim == 2 and not f"{name}.".startswith(f"{experts}."):
                called = any("router" in part or part == "gate" for part in name[len(block) :].split("."))
                if called or len(weight) in (1, count):
                    found[name] = weight.numel()
    return found


def check_left_dense(model: Any, quantized: int, wanted: Callable[[str], bool]) -> None:
    """Raise ValueError if a large share of a model's weights would stay dense without an exclude pattern.

    Parameters
    ----------
    model : torch.nn.Module
        Its known experts are split already.
    quantized : int
        Number of weights in the layers that will be quantized.
    wanted : callable
        Tells whether the user's patterns select a name.
    """
    left = sorted(other_stacks(model, wanted), key=lambda each: -each[1])
    dense = sum(count for _, count in left)
    share = dense / max(quantized + dense, 1)
    if share <= MOST_LEFT_DENSE:
        return
    patterns: list[str] = []
    for name, count in left:
        if dense > MOST_LEFT_DENSE * (quantized + dense) or pattern_for(name) in patterns:
            patterns += [] if pattern_for(name) in patterns else [pattern_for(name)]
            dense -= count
    largest, _ = left[0]
    owner = type(model.get_submodule(largest.rpartition(".")[0])).__name__
    raise ValueError(
        f"{100 * share:.1f} % of the weights would stay dense, above all {largest} of {owner}: littlebit quantizes "
        "linear layers and experts in known forms; to quantize only the rest, exclude these weights: --exclude "
        + " ".join(f"'{pattern}'" for pattern in patterns)
    )


def pattern_for(name: str) -> str:
    """Make a pattern that matches a parameter in every block: its name after the last number."""
    parts = name.split(".")
    numbers = [at for at, part in enumerate(parts) if part.isdigit()]
    return "*." + ".".join(parts[numbers[-1] + 1 :]) if numbers else name


def other_stacks(model: Any, wanted: Callable[[str], bool]) -> Iterator[tuple[str, int]]:
    """Yield name and size of each wanted stack of matrices: experts in an unknown form."""
    plain = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d, Path, DenseProjection)
    dense = routers(model)
    for name, module in model.named_modules():
        if isinstance(module, plain) or type(module).__name__ == "Conv1D" or name in dense:
            continue
        if is_known(module):  # Experts that are still in one tensor were excluded by the user.
            continue
        for key, parameter in module.named_parameters(name, recurse=False):
            if is_stack(key, parameter) and wanted(key):
                yield key, parameter.numel()


def is_stack(name: str, parameter: Tensor) -> bool:
    """Tell whether a parameter holds several matrices: it has three axes, or two and a name with expert."""
    return min(parameter.shape, default=0) > 1 and (parameter.ndim > 2 or (parameter.ndim == 2 and "expert" in name))
