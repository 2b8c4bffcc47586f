"""Choose the ranks of a model's layers: the registered allocations, and functions of the user's own.

An allocation takes an AllocationProblem and returns the ranks of every layer, one per path:

    def equal_ranks(problem):
        return {name: (16,) for name in problem.shapes}

    quantize_(model, Config(allocation=equal_ranks))

`register_allocation("equal", equal_ranks)` lets `Config(allocation="equal")` choose it.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from torch import Tensor

from ..bits import SCALE_BITS, Ranks, Shape, allocate_ranks, model_bits, official_rank
from .calibrate import Moments, bounded_gains, spectral_gains
from .registry import choice_name, register


class AllocationProblem(NamedTuple):
    """Hold what an allocation can know: layers, budget and measurements.

    Attributes
    ----------
    weights : dict of layer name to (d_out, d_in) tensor
        In the model's order. They are on the meta device, without values, where ranks are only estimated.
    bits : float
        Ceiling in stored bits per weight, over all layers.
    paths : int or None
        Paths in each layer; None lets the allocation choose 1 or 2.
    shares : dict of layer name to float
        Sign bits per weight of a layer as a multiple of the other layers' (`Config.kv_rank_factor`); 1 if missing.
    spread : float or None
        See `Config.spread`.
    moments : dict of layer name to Moments
        Second moments of each layer on calibration text; empty if none was measured.
    scale_bits : int
        Stored bits of a scale, 16 or 8.
    """

    weights: Mapping[str, Tensor]
    bits: float
    paths: int | None = 2
    shares: Mapping[str, float] = {}
    spread: float | None = None
    moments: Mapping[str, Moments] = {}
    scale_bits: int = SCALE_BITS

    @property
    def shapes(self) -> dict[str, Shape]:
        """Map layer names to (d_out, d_in)."""
        return {name: (weight.shape[0], weight.shape[1]) for name, weight in self.weights.items()}


def uniform(problem: AllocationProblem) -> dict[str, Ranks]:
    """Give all layers the same sign bits per weight, as nearly as words allow (see `bits.allocate_ranks`)."""
    return allocate_ranks(
        problem.shapes, problem.bits, problem.paths, shares=problem.shares, scale_bits=problem.scale_bits
    )


def by_sensitivity(problem: AllocationProblem) -> dict[str, Ranks]:
    """Give each layer ranks by how much they lower the loss; uniform ranks before calibration.

    See `calibrate.spectral_gains` for the estimate, and `calibrate.bounded_gains` for `spread`.
    """
    if not problem.moments:
        return uniform(problem)
    gains = spectral_gains(problem.weights, problem.moments)
    if problem.spread is not None:
        gains = bounded_gains(gains, {name: sum(ranks) for name, ranks in uniform(problem).items()}, problem.spread)
    return allocate_ranks(problem.shapes, problem.bits, problem.paths, gains, problem.scale_bits)


def official(problem: AllocationProblem) -> dict[str, Ranks]:
    """Compute the ranks that the authors' program chooses (see `bits.official_rank`); they may exceed the ceiling."""
    paths = problem.paths or 1
    return {
        name: (official_rank(*shape, problem.bits, paths, problem.shares.get(name, 1.0)),) * paths
        for name, shape in problem.shapes.items()
    }


#: Name -> allocation that `Config.allocation` may choose; `register_allocation` adds one.
ALLOCATIONS: dict[str, Callable[[AllocationProblem], Mapping[str, Ranks]]] = {
    "uniform": uniform,
    "sensitivity": by_sensitivity,
    "official": official,
}


def register_allocation(name: str, function: Callable[[AllocationProblem], Mapping[str, Ranks]]) -> None:
    """Register an allocation under a name that `Config.allocation` can choose.

    Parameters
    ----------
    name : str
    function : callable
        AllocationProblem -> mapping of every layer's name to a tuple of ranks, one per path.

    Raises
    ------
    ValueError
        If the name is empty or taken.

    Examples
    --------
    >>> register_allocation("ones", lambda problem: {name: (1,) for name in problem.shapes})
    >>> allocate("ones", AllocationProblem({"layer": __import__("torch").zeros(64, 64)}, bits=1.0))
    {'layer': (1,)}
    >>> del ALLOCATIONS["ones"]
    """
    register("an allocation", ALLOCATIONS, name, function)


def allocate(choice: str | Callable, problem: AllocationProblem) -> dict[str, Ranks]:
    """Choose the ranks of all layers by a registered allocation or a function, and check them.

    Raises
    ------
    ValueError
        If the bits cannot be met, or a layer's ranks are missing or out of range.
    """
    function = choice if callable(choice) else ALLOCATIONS[choice]
    ranks = function(problem)
    check_ranks(ranks, problem, choice_name(choice))
    return {name: tuple(map(int, ranks[name])) for name in problem.weights}


def check_ranks(ranks: Any, problem: AllocationProblem, choice: str) -> None:
    """Raise ValueError unless every layer has ranks in range that together meet the ceiling."""
    if not isinstance(ranks, Mapping):
        raise ValueError(f"allocation {choice} must return a dict of layer name to ranks, got {type(ranks).__name__}")
    for name in ranks:
        if name not in problem.weights:
            raise ValueError(f"allocation {choice} must return ranks of the selected layers alone, got {name!r}")
    for name, (d_out, d_in) in problem.shapes.items():
        found = ranks.get(name)
        if not isinstance(found, tuple | list) or not found:
            raise ValueError(
                f"layer {name}: allocation {choice} must return a tuple of ranks, one per path, got {found!r}"
            )
        most = min(d_out, d_in)
        if any(isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= most for rank in found):
            raise ValueError(
                f"layer {name}: allocation {choice} must return ranks of 1 to {most} for a {d_out} x {d_in} layer, got "
                f"{found}; lower bits or kv_rank_factor, exclude the layer, or choose another allocation"
            )
    if choice == "official":
        return
    weights = sum(d_out * d_in for d_out, d_in in problem.shapes.values())
    stored = model_bits(problem.shapes, {name: tuple(found) for name, found in ranks.items()}, problem.scale_bits)
    stored /= weights
    if stored > problem.bits:
        raise ValueError(
            f"allocation {choice} must store at most {problem.bits:g} bits per weight (bits), got {stored:.4g}: lower "
            "its ranks, or raise bits"
        )


def kv_shares(model: Any, names: Iterable[str], factor: float) -> dict[str, float]:
    """Compute the shares of an AllocationProblem: `kv_rank_factor` for k_proj and v_proj of grouped-query attention.

    Raises
    ------
    ValueError
        If the factor is not 1 and the model has no such layers.
    """
    if factor == 1:
        return {}
    queries, keys = attention_heads(model)
    found = [name for name in names if name.split(".")[-1] in ("k_proj", "v_proj")]
    if keys >= queries or not found:
        raise ValueError(
            f"kv_rank_factor needs k_proj and v_proj layers of grouped-query attention, got {queries} query heads, "
            f"{keys} key heads and {len(found)} such layers: leave it at 1, or split fused layers (split_fused)"
        )
    return dict.fromkeys(found, factor)


def attention_heads(model: Any) -> tuple[int, int]:
    """Count the query heads and the key-value heads of a transformers model, by its configuration."""
    config = getattr(model, "config", None)
    queries = getattr(config, "num_attention_heads", None) or 1
    return queries, getattr(config, "num_key_value_heads", None) or queries
