"""Define the two forms of a LittleBit layer: LittleBitLinear trains, PackedLinear is stored and runs inference."""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..bits import SCALE_BITS
from ..factors import Factors
from ..kernels.cpu_layer import CpuPackedLayer
from ..kernels.dispatch import packed_layer_for
from ..kernels.unpacked import unpacked
from ..linear import folded, linear, packed_linear
from ..packing import PackedFactors, check_scale_bits, decode_scale, encode_scale, pack_factors, to_half
from ..signs import named_rule
from .packed_shapes import SCALES, packed_headers

#: Names of dtypes in safetensors headers
DTYPES = {"F16": torch.float16, "I32": torch.int32, "I16": torch.int16, "U8": torch.uint8}


def stored_half(name: str, tensor: Tensor) -> Tensor:
    """Convert a float tensor to float16, as files store it; leave other tensors as they are.

    Raises
    ------
    ValueError
        If a value is not finite in float16. The message names the tensor.
    """
    half = tensor.half() if tensor.is_floating_point() else tensor
    if not torch.isfinite(half).all():
        raise ValueError(
            f"tensor {name} does not fit float16: it holds NaN, infinity, or magnitudes above 65504; repair the model "
            "or download it again"
        )
    return half


class LatentModule(nn.Module):
    """Mark a module that `train_` trains: its parameters named in `latents` are latents, all others are scales.

    A layer of another method is trained as a subclass. Its forward pass takes signs by `signs.named_rule(self.rule)`,
    and casts its float32 weight to its input's dtype.
    """

    latents: tuple[str, ...] = ()
    rule = "straight_through"  # `train_` sets it.


class Path(LatentModule):
    """Hold the tensors of one low-rank path: parameters of a LittleBitLinear, or buffers of a PackedLinear."""

    latents = ("u", "v")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Path":
        """Move buffers but never cast them: packed scales stay float16 when `.to(dtype)` casts the model."""
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = self._buffers[name]
            if old is not None and new is not None and new.dtype != old.dtype:
                self._buffers[name] = old.to(new.device)
        return self


class NotPickled(nn.Module):
    """Refuse to be pickled, because loading a pickle runs code; copying and saving as tensors work."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Refuse to be pickled.

        Raises
        ------
        TypeError
            Always.
        """
        raise TypeError(
            f"a {type(self).__name__} is not pickled, because loading a pickle runs any code in it: save the model "
            "with littlebit.fast.save or save_pretrained, or its tensors with torch.save(model.state_dict())"
        )

    def __copy__(self) -> Any:
        """Copy the module as copy.copy copies any module."""
        made = type(self).__new__(type(self))
        made.__dict__.update(self.__getstate__())
        return made

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """Copy the module as copy.deepcopy copies any module."""
        made = memo[id(self)] = type(self).__new__(type(self))
        made.__dict__.update(copy.deepcopy(self.__getstate__(), memo))
        return made


class LowRankLinear(NotPickled):
    """Define what both forms of a layer share: `paths`, `bias` and sizes, also under the names of torch.nn.Linear."""

    d_out: int
    d_in: int

    def factors(self) -> Sequence[Any]:
        """Return the tensors of each path."""
        raise NotImplementedError

    @property
    def ranks(self) -> tuple[int, ...]:
        """Return the rank of each path."""
        return tuple(path.rank for path in self.factors())

    @property
    def in_features(self) -> int:
        """Return d_in, under its name in torch.nn.Linear."""
        return self.d_in

    @property
    def out_features(self) -> int:
        """Return d_out, under its name in torch.nn.Linear."""
        return self.d_out

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute other than `weight`.

        Raises
        ------
        AttributeError
            If the attribute is `weight`.
        """
        if name == "weight":
            raise AttributeError(
                f"the weight of a {type(self).__name__} cannot be set, because it is computed from signs and scales: "
                "replace the module by a torch.nn.Linear, and quantize that"
            )
        super().__setattr__(name, value)

    def extra_repr(self) -> str:
        """Describe the sizes, for print(model)."""
        return f"d_in={self.d_in}, d_out={self.d_out}, ranks={self.ranks}, bias={self.bias is not None}"


class LittleBitLinear(LowRankLinear):
    """Compute y = W_hat x + b, where W_hat is the sum of low-rank paths with trainable latents and scales.

    Parameters
    ----------
    paths : sequence of Factors
        One or more; see `residual.compensate`.
    bias : (d_out,) tensor, optional
    rule : str
        Gradient of the sign function in autograd: a name in `signs.RULES`.
    scale_bits : int
        Bits of a scale once the layer is packed, 16 or 8; see `packing.pack_factors`.

    Raises
    ------
    ValueError
        If there is no such rule or width.
    """

    # The folded pair (see `linear.folded`). A trainer computes the pairs of all layers at once and passes them through
    # torch.func.functional_call. Where they are None, the layer folds its own factors.
    a: Tensor | None = None
    b: Tensor | None = None

    def __init__(
        self,
        paths: Sequence[Factors],
        bias: Tensor | None = None,
        rule: str = "smooth_sign",
        scale_bits: int = SCALE_BITS,
    ):
        super().__init__()
        named_rule(rule)  # An unknown name raises here, not at the first step.
        check_scale_bits(scale_bits)
        self.rule, self.scale_bits = rule, scale_bits
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
        """Return the parameters of each path."""
        return [Factors(*(getattr(path, name) for name in Factors._fields)) for path in self.paths]

    @property
    def weight(self) -> Tensor:
        """Compute the dense (d_out, d_in) weight; gradients reach latents and scales."""
        a, b = folded(self.factors(), self.rule) if self.a is None or self.b is None else (self.a, self.b)
        return b @ a

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., d_in) to (..., d_out)."""
        if self.a is not None and self.b is not None:
            return functional.linear(functional.linear(x, self.a), self.b, self.bias)
        return linear(x, self.factors(), self.bias, self.rule)

    def pack(self) -> "PackedLinear":
        """Pack the layer for storage and inference: signs as bits, scales and bias as float16.

        Raises
        ------
        ValueError
            If a latent is NaN, or a scale or the bias does not fit float16.
        """
        bias = None if self.bias is None else to_half("bias", self.bias.detach())
        return PackedLinear([pack_factors(path, self.scale_bits) for path in self.factors()], bias, self.scale_bits)


class PackedLinear(LowRankLinear):
    """Compute a linear layer from packed signs, for inference.

    Scales are float16 in memory. With `scale_bits` 8, the state dict holds their codes (`packing.encode_scale`) and the
    largest scale of each vector, `peaks`, in the order h, ell, g.

    Parameters
    ----------
    paths : sequence of PackedFactors
        One or more, made by `packing.pack_factors` with the same `scale_bits`.
    bias : (d_out,) tensor, optional
    scale_bits : int
        Stored bits of a scale, 16 or 8.
    """

    def __init__(self, paths: Sequence[PackedFactors], bias: Tensor | None = None, scale_bits: int = SCALE_BITS):
        super().__init__()
        check_scale_bits(scale_bits)
        self.scale_bits = scale_bits
        self.d_out, self.d_in = paths[0].h.shape[0], paths[0].g.shape[0]
        self.paths = nn.ModuleList()
        for packed in paths:
            path = Path()
            for name, tensor in packed._asdict().items():
                path.register_buffer(name, tensor.detach().clone())
            if scale_bits == 8:
                path.register_state_dict_post_hook(store_codes)
                path.register_load_state_dict_pre_hook(load_codes)
            self.paths.append(path)
        self.bias: Tensor | None
        self.register_buffer("bias", None if bias is None else bias.detach().clone())
        self.plan: CpuPackedLayer | None = None  # of the last call, for the next one if the tensors are still the same

    def __getstate__(self) -> dict[str, Any]:
        """Return the state for copies, without the plan, which holds memory addresses."""
        return self.__dict__ | {"plan": None}

    @classmethod
    def empty(
        cls,
        d_out: int,
        d_in: int,
        ranks: Sequence[int],
        bias: bool = False,
        device: torch.device | str = "meta",
        scale_bits: int = SCALE_BITS,
    ) -> "PackedLinear":
        """Make a layer with uninitialized tensors, to fill from a checkpoint; then call `decode_scales`."""

        def tensors(rank: int) -> dict[str, Tensor]:
            shapes = packed_shapes(d_out, d_in, rank, scale_bits)
            return {name: torch.empty(shape, dtype=dtype, device=device) for name, (shape, dtype) in shapes.items()}

        stored = [tensors(rank) for rank in ranks]
        peaks = [path.pop("peaks", None) for path in stored]  # only of 8-bit scales
        made = cls(
            [PackedFactors(**path) for path in stored],
            torch.empty(d_out, dtype=torch.float16, device=device) if bias else None,
            scale_bits,
        )
        for path, tensor in zip(made.paths, peaks, strict=True):
            if tensor is not None:
                path.register_buffer("peaks", tensor)
        return made

    def decode_scales(self) -> None:
        """Replace the codes of 8-bit scales, which a checkpoint has filled in, by the scales."""
        for path in self.paths:
            if "peaks" in path._buffers:
                for name, peak in zip(SCALES, path._buffers.pop("peaks"), strict=True):  # type: ignore[arg-type]
                    path.register_buffer(name, decode_scale(path._buffers[name], peak))  # type: ignore[arg-type]

    @property
    def weight(self) -> Tensor:
        """Compute the dense (d_out, d_in) float32 weight."""
        a, b = unpacked(self.factors())
        return b @ a

    def factors(self) -> list[PackedFactors]:
        """Return the packed tensors of each path."""
        return [PackedFactors(*(getattr(path, name) for name in PackedFactors._fields)) for path in self.paths]

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., d_in) to (..., d_out)."""
        plan = self.plan
        # This reads nn.Module's dictionaries, because each attribute would take a microsecond.
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


class ConcatLinear(nn.Module):
    """Concatenate the outputs of several layers, in the place of the fused layer that they were split from.

    Parameters
    ----------
    parts : mapping of name to module
    """

    def __init__(self, parts: Mapping[str, nn.Module]):
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., d_in) to (..., sum of the parts' d_out)."""
        return torch.cat([part(x) for part in self.children()], dim=-1)


def linear_over(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """Make a linear layer whose parameters share the memory of two tensors."""
    layer = nn.Linear(*reversed(weight.shape), bias=bias is not None, device="meta")
    layer.weight = nn.Parameter(weight)
    layer.bias = None if bias is None else nn.Parameter(bias)  # type: ignore[assignment]
    return layer


def packed_shapes(
    d_out: int, d_in: int, rank: int, scale_bits: int = SCALE_BITS
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Compute shape and dtype of each stored tensor of a packed path, by its name."""
    headers = packed_headers(d_out, d_in, rank, scale_bits)
    return {name: (shape, DTYPES[dtype]) for name, (shape, dtype) in headers.items()}


def store_codes(path: nn.Module, state: dict[str, Tensor], prefix: str, _: Any) -> None:
    """Replace the scales of a path in a state dict by their codes and `peaks`, unless it holds codes already."""
    if path.h.dtype != torch.uint8:
        found = [encode_scale(state[prefix + name]) for name in SCALES]
        state |= {prefix + name: codes for name, (codes, _) in zip(SCALES, found, strict=True)}
        state[prefix + "peaks"] = torch.stack([peak for _, peak in found])


def load_codes(path: nn.Module, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """Replace codes and `peaks` in a state dict by the scales, for a path that holds scales."""
    if path.h.dtype != torch.uint8 and prefix + "peaks" in state:
        for name, peak in zip(SCALES, state.pop(prefix + "peaks"), strict=True):
            state[prefix + name] = decode_scale(state[prefix + name], peak)
