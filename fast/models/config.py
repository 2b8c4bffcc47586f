"""Hold the settings of quantization, and check them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor

from .._checks import check_number
from ..bits import SCALE_BITS, Ranks
from ..factors import Factors
from ..packing import check_scale_bits
from .allocation import ALLOCATIONS, AllocationProblem
from .initializers import INITS, UNWEIGHTED
from .registry import check_choice, choice_name
from .selection import as_patterns, matches


@dataclass(frozen=True)
class Config:
    """Set which layers to quantize, and how.

    Attributes
    ----------
    bits : float
        Ceiling in stored bits per weight, over all quantized layers together.
    paths : int or None
        1, or 2 for a primary and a residual path; None chooses for each layer by `bits.paths_for_bits`.
    init : str or callable
        How to find initial factors: "dual-svid" (the paper), "itq" (rotated first), "admm" (the smallest error), a name
        from `register_init`, or a function (weight, rank) -> Factors (see initializers.py).
    allocation : str or callable
        How to divide the bits among layers: "uniform", by "sensitivity" measured on calibration text, "official" (as
        the authors' program, which may exceed the ceiling), a name from `register_allocation`, or a function
        AllocationProblem -> ranks of each layer (see allocation.py).
    spread : float, optional
        Bound of allocation by "sensitivity": each layer's rank is between uniform rank / spread and uniform rank *
        spread. None: no bound.
    importance : bool
        Whether the error counts channels by their second moments, measured on calibration text; not for "dual-svid" and
        "itq".
    include, exclude : tuple of str
        Shell-style patterns of module names, or one pattern. A linear layer is quantized if it matches one of
        `include`, none of `exclude`, and can be quantized (see selection.py). The output head, embeddings and routers
        of experts stay dense. A pattern that matches no layer is an error.
    split_fused : bool
        Whether to quantize the parts of fused projections (qkv_proj, gate_up_proj; c_attn of GPT-2) as separate layers,
        with names such as LAYER.qkv_proj.q_proj.
    kv_rank_factor : float
        Sign bits per weight of k_proj and v_proj as a multiple of the other layers', in models with grouped-query
        attention, where many heads share these small layers. The ceiling holds.
    scale_bits : int
        Stored bits of a scale: 16 (float16), or 8 (codes, see `packing.encode_scale`), which leaves more bits to signs.
    seed : int
        Seed of randomized decompositions and rotations.
    """

    bits: float = 0.55
    paths: int | None = 2
    init: str | Callable[..., Factors] = "dual-svid"
    allocation: str | Callable[[AllocationProblem], Mapping[str, Ranks]] = "uniform"
    spread: float | None = None
    importance: bool = False
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()
    split_fused: bool = False
    kv_rank_factor: float = 1.0
    scale_bits: int = SCALE_BITS
    seed: int = 0

    def __post_init__(self) -> None:
        """Store patterns as tuples; a string is one pattern."""
        for key in ("include", "exclude"):
            object.__setattr__(self, key, as_patterns(key, getattr(self, key)))

    def needs_calibration(self) -> bool:
        """Tell whether `quantize_` needs calibration tokens."""
        return self.importance or self.allocation == "sensitivity"

    def described(self) -> dict[str, Any]:
        """Return the settings as JSON values; a function is described by its name, module:function."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return values | {"init": choice_name(self.init), "allocation": choice_name(self.allocation)}

    def selects(self, name: str) -> bool:
        """Tell whether the patterns select a layer of this name."""
        return matches(name, self.include) and not matches(name, self.exclude)

    def selects_parameter(self, name: str) -> bool:
        """Tell whether the patterns select a parameter, by its own name or by its module's."""
        names = name, name.rpartition(".")[0]
        included = any(matches(each, self.include) for each in names)
        return included and not any(matches(each, self.exclude) for each in names)


def check_config(config: Config, tokens: Tensor | None) -> None:
    """Raise ValueError unless the settings are in range, fit each other, and have the calibration text they need."""
    check_choice("init", INITS, config.init)
    check_choice("allocation", ALLOCATIONS, config.allocation)
    check_number("bits", config.bits, above=0)
    check_number("kv_rank_factor", config.kv_rank_factor, above=0)
    check_scale_bits(config.scale_bits)
    check_number("seed", config.seed, low=0, below=2**63, whole=True)
    if config.paths is not None:
        check_number("paths", config.paths, low=1, whole=True)
    if config.kv_rank_factor != 1 and config.allocation == "sensitivity":
        raise ValueError(
            "kv_rank_factor must be 1 with allocation 'sensitivity', which measures what k_proj and v_proj need, got "
            f"{config.kv_rank_factor:g}"
        )
    if config.spread is not None and not config.spread >= 1:
        raise ValueError(f"spread must be at least 1, where all ranks are uniform, got {config.spread}")
    if config.spread is not None and config.allocation != "sensitivity":
        raise ValueError(
            f"spread bounds allocation by sensitivity: leave it out with allocation {choice_name(config.allocation)!r}"
        )
    if config.allocation == "official" and config.paths is None:
        raise ValueError("allocation 'official' needs the same number of paths in every layer: choose paths=1 or 2")
    if config.importance and config.init in UNWEIGHTED:
        raise ValueError(f"importance needs init 'admm' or a function of your own, got {config.init!r}")
    if config.needs_calibration() and tokens is None:
        raise ValueError("importance and allocation 'sensitivity' are measured on text: pass calibration tokens")
