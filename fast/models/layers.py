"""Layers: LittleBitLinear, which trains, and PackedLinear, which is stored and run."""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..factors import Factors
from ..kernels.cpu_layer import CpuPackedLayer
from ..kernels.dispatch import packed_layer_for
from ..kernels.unpacked import unpacked
from ..linear import folded, linear, packed_linear
from ..packing import PackedFactors, pack_factors, to_half
from ..signs import named_rule
from .packed_shapes import packed_headers

# What the tensors of a packed path are called in a safetensors header
DTYPES = {"F16": torch.float16, "I32": torch.int32, "I16": torch.int16, "U8": torch.uint8}


def stored_half(name: str, tensor: Tensor) -> Tensor:
    """A tensor as it is stored: floats as float16.

    Raises
    ------
    ValueError
        If it is not finite there; the tensor is named.
    """
    half = tensor.half() if tensor.is_floating_point() else tensor
    if not torch.isfinite(half).all():
        raise ValueError(
            f"tensor {name} does not fit float16: it holds NaN, infinity, or magnitudes above 65504; repair the model "
            "or download it again"
        )
    return half


class Path(nn.Module):
    """The tensors of one low-rank path: parameters of a LittleBitLinear, buffers of a PackedLinear."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Path":
        """Move buffers but never cast them: packed scales are float16, whatever `.to(dtype)` makes of the model."""
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = self._buffers[name]
            if old is not None and new is not None and new.dtype != old.dtype:
                self._buffers[name] = old.to(new.device)
        return self


class NotPickled(nn.Module):
    """A module that is copied, and saved as tensors, but not pickled: a pickle runs code when it is loaded."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Refuse.

        Raises
        ------
        TypeError
            Always.
        """
        raise TypeError(
            f"a {type(self).__name__} is not pickled, because loading a pickle runs whatever code it holds: save the "
            "model with littlebit.fast.save or save_pretrained, or its tensors with torch.save(model.state_dict())"
        )

    def __copy__(self) -> Any:
        """What copy.copy makes of any module."""
        made = type(self).__new__(type(self))
        made.__dict__.update(self.__getstate__())
        return made

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """What copy.deepcopy makes of any module."""
        made = memo[id(self)] = type(self).__new__(type(self))
        made.__dict__.update(copy.deepcopy(self.__getstate__(), memo))
        return made


class LowRankLinear(NotPickled):
    """What both forms of a layer have: `paths`, `bias` and sizes, under the names of torch.nn.Linear too."""

    d_out: int
    d_in: int

    def factors(self) -> Sequence[Any]:
        """The tensors of each path."""
        raise NotImplementedError

    @property
    def ranks(self) -> tuple[int, ...]:
        """Rank of each path."""
        return tuple(path.rank for path in self.factors())

    @property
    def in_features(self) -> int:
        """d_in, under the name that it has in torch.nn.Linear."""
        return self.d_in

    @property
    def out_features(self) -> int:
        """d_out, under the name that it has in torch.nn.Linear."""
        return self.d_out

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute, but for `weight`.

        Raises
        ------
        AttributeError
            If it is `weight`.
        """
        if name == "weight":
            raise AttributeError(
                f"the weight of a {type(self).__name__} cannot be set: it follows from signs and scales; replace the "
                "module by a torch.nn.Linear, or quantise that"
            )
        super().__setattr__(name, value)

    def extra_repr(self) -> str:
        """Sizes, for print(model)."""
        return f"d_in={self.d_in}, d_out={self.d_out}, ranks={self.ranks}, bias={self.bias is not None}"


class LittleBitLinear(LowRankLinear):
    """A linear layer y = W_hat x + b whose weight is the sum of its paths; latents and scales are float parameters.

    Parameters
    ----------
    paths : sequence of Factors
        One or more; see `residual.compensate`.
    bias : (d_out,) tensor, optional
    rule : str
        What autograd takes the derivative of a sign for: a name in `signs.RULES`.

    Raises
    ------
    ValueError
        If there is no such rule.
    """

    # The folded factors (see `linear.folded`), where a trainer has built them for all layers at once and passes them
    # through torch.func.functional_call; otherwise the layer folds its own.
    a: Tensor | None = None
    b: Tensor | None = None

    def __init__(self, paths: Sequence[Factors], bias: Tensor | None = None, rule: str = "smooth_sign"):
        super().__init__()
        named_rule(rule)  # refuses an unknown name here rather than at the first step
        self.rule = rule
        self.d_out, self.d_in = paths[0].h.shape[0], paths[0].g.shape[0]
        self.paths = nn.ModuleList()
        for factors in paths:
            path = Path()
            for name, tensor in factors._asdict().items():
                values = tensor.detach().clone(memory_format=torch.contiguous_format)
                path.register_parameter(name, nn.Parameter(values))
            self.paths.append(path)
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone())

    def factors(self) -> list[Factors]:
        """The paths' parameters."""
        return [Factors(*(getattr(path, name) for name in Factors._fields)) for path in self.paths]

    @property
    def weight(self) -> Tensor:
        """The dense (d_out, d_in) weight that the layer stands for, made anew each time; gradients reach latents."""
        a, b = folded(self.factors(), self.rule) if self.a is None or self.b is None else (self.a, self.b)
        return b @ a

    def forward(self, x: Tensor) -> Tensor:
        """(..., d_in) to (..., d_out)."""
        if self.a is not None and self.b is not None:
            return functional.linear(functional.linear(x, self.a), self.b, self.bias)
        return linear(x, self.factors(), self.bias, self.rule)

    def pack(self) -> "PackedLinear":
        """The layer as it is stored: signs as bits, scales and bias as float16.

        Raises
        ------
        ValueError
            If a latent is NaN, or a scale or the bias does not fit float16.
        """
        bias = None if self.bias is None else to_half("bias", self.bias.detach())
        return PackedLinear([pack_factors(path) for path in self.factors()], bias)


class PackedLinear(LowRankLinear):
    """A linear layer that computes from packed signs; for inference.

    Parameters
    ----------
    paths : sequence of PackedFactors
        One or more.
    bias : (d_out,) tensor, optional
    """

    def __init__(self, paths: Sequence[PackedFactors], bias: Tensor | None = None):
        super().__init__()
        self.d_out, self.d_in = paths[0].h.shape[0], paths[0].g.shape[0]
        self.paths = nn.ModuleList()
        for packed in paths:
            path = Path()
            for name, tensor in packed._asdict().items():
                path.register_buffer(name, tensor.detach().clone())
            self.paths.append(path)
        self.bias: Tensor | None
        self.register_buffer("bias", None if bias is None else bias.detach().clone())
        self.plan: CpuPackedLayer | None = None  # of the last call, for the next one if the tensors are still the same

    def __getstate__(self) -> dict[str, Any]:
        """What copies get: all but the plan, which holds addresses."""
        return self.__dict__ | {"plan": None}

    @classmethod
    def empty(
        cls, d_out: int, d_in: int, ranks: Sequence[int], bias: bool = False, device: torch.device | str = "meta"
    ) -> "PackedLinear":
        """A layer of uninitialised tensors, to be filled from a checkpoint."""

        def path(rank: int) -> PackedFactors:
            shapes = packed_shapes(d_out, d_in, rank)
            return PackedFactors(*(torch.empty(shape, dtype=dtype, device=device) for shape, dtype in shapes.values()))

        return cls(
            [path(rank) for rank in ranks], torch.empty(d_out, dtype=torch.float16, device=device) if bias else None
        )

    @property
    def weight(self) -> Tensor:
        """The dense (d_out, d_in) float32 weight that the layer stands for, made anew each time."""
        a, b = unpacked(self.factors())
        return b @ a

    def factors(self) -> list[PackedFactors]:
        """The paths' packed tensors."""
        return [PackedFactors(*(getattr(path, name) for name in PackedFactors._fields)) for path in self.paths]

    def forward(self, x: Tensor) -> Tensor:
        """(..., d_in) to (..., d_out)."""
        plan = self.plan
        # nn.Module's own dictionaries: its attributes take a microsecond each
        paths = self._modules["paths"]._modules.values()  # type: ignore[union-attr]
        tensors = [tensor for path in paths for tensor in path._buffers.values()]  # type: ignore[union-attr]
        fitting = packed_layer_for(x, tensors, plan)  # type: ignore[arg-type]
        if fitting is None or x.shape[-1] != self.d_in or not x.is_floating_point():
            return packed_linear(x, self.factors(), self.bias)
        if fitting is not plan:
            self.plan = fitting
        y = fitting(x)
        bias = self._buffers["bias"]
        if bias is not None:
            y += bias
        return y if x.dtype == torch.float32 else y.to(x.dtype)


class Joined(nn.Module):
    """The outputs of several layers side by side, in the place of the one layer that they were split from.

    Parameters
    ----------
    parts : mapping of name to module
    """

    def __init__(self, parts: Mapping[str, nn.Module]):
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, x: Tensor) -> Tensor:
        """(..., d_in) to (..., sum of the parts' d_out)."""
        return torch.cat([part(x) for part in self.children()], dim=-1)


def linear_over(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """Make a linear layer whose parameters share the memory of two tensors."""
    layer = nn.Linear(*reversed(weight.shape), bias=bias is not None, device="meta")
    layer.weight = nn.Parameter(weight)
    layer.bias = None if bias is None else nn.Parameter(bias)  # type: ignore[assignment]
    return layer


def packed_shapes(d_out: int, d_in: int, rank: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of each tensor of a packed path, by its name in PackedFactors."""
    return {name: (shape, DTYPES[dtype]) for name, (shape, dtype) in packed_headers(d_out, d_in, rank).items()}
