"""Find initial factors of a model's weights: the registered initializers, and functions of the user's own.

An initializer takes one path of a layer, a weight and a rank, and returns Factors:

    def my_init(weight, rank):  # (d_out, d_in) float32, int
        return dual_svid(weight - weight.mean(), rank)

    quantize_(model, Config(init=my_init))

`register_init("mine", my_init)` lets `Config(init="mine")` choose it. If the function has a parameter `generator`, it
gets a seeded torch.Generator. For a layer with two paths it is called twice: for the weight, then for the residual.
"""

import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..admm import admm, importance
from ..alignment import itq, random_rotation
from ..bits import Ranks
from ..dual_svid import dual_svid
from ..factors import Factors
from ..residual import compensate, compensate_weighted
from .calibrate import Moments
from .registry import choice_name, register

OVERSAMPLING = 16  # columns of a randomized SVD's sketch beyond the rank


class Initializer(NamedTuple):
    """Hold an initializer and how to call it.

    Attributes
    ----------
    function : callable
        (weight, rank) or (weight, rank, generator) -> Factors.
    batched : bool
        Whether it takes a batch of weights (batch, d_out, d_in), which is faster for small layers.
    """

    function: Callable[..., Factors]
    batched: bool


def dual_svid_init(weight: Tensor, rank: int, generator: torch.Generator) -> Factors:
    """Factorize by Dual-SVID, the initialization of the paper (LittleBit, arXiv 2506.13771)."""
    return dual_svid(weight, rank, sketch(weight, rank, generator))


def itq_init(weight: Tensor, rank: int, generator: torch.Generator) -> Factors:
    """Factorize by Joint-ITQ, which rotates the latents towards signs (see `alignment.itq`)."""
    columns = sketch(weight, rank, generator)
    return itq(weight, rank, random_rotation(gaussian(weight, rank, rank, generator)), columns)


def admm_init(weight: Tensor, rank: int, generator: torch.Generator) -> Factors:
    """Factorize by latent-binary ADMM, which has the smallest error (see `admm.admm`)."""
    return admm(weight, rank, sketch(weight, rank, generator))


#: Name -> initializer that `Config.init` may choose; `register_init` adds one.
INITS: dict[str, Initializer] = {
    "dual-svid": Initializer(dual_svid_init, batched=True),
    "itq": Initializer(itq_init, batched=True),
    "admm": Initializer(admm_init, batched=True),
}
UNWEIGHTED = ("dual-svid", "itq")  # They decompose the weight itself, so importance weights do not serve them.


def register_init(name: str, function: Callable[..., Factors], batched: bool = False) -> None:
    """Register an initializer under a name that `Config.init` and the benchmarks can choose.

    Parameters
    ----------
    name : str
    function : callable
        (weight, rank) -> Factors; with a third parameter `generator`, it gets a torch.Generator.
    batched : bool
        Whether it takes (batch, d_out, d_in) weights and returns Factors with the same batch axis. If not, it is called
        with one (d_out, d_in) weight at a time.

    Raises
    ------
    ValueError
        If the name is empty or taken.

    Examples
    --------
    >>> register_init("one", lambda weight, rank: dual_svid(0 * weight + 1, rank))
    >>> factorize(torch.zeros(1, 3, 2), (1,), "one")[0].u.shape
    torch.Size([1, 3, 1])
    >>> del INITS["one"]
    """
    register("an initializer", INITS, name, Initializer(function, batched))


def initializer_of(init: str | Callable[..., Factors]) -> Initializer:
    """Find the initializer that `Config.init` chooses; a function is called with one weight at a time."""
    return Initializer(init, batched=False) if callable(init) else INITS[init]


def factorize(
    weights: Tensor,
    ranks: Ranks,
    init: str | Callable[..., Factors],
    seed: int = 0,
    moments: Sequence[Moments] = (),
    layer: str = "",
) -> list[Factors]:
    """Factorize a batch of weights with the same ranks, one path after another.

    Parameters
    ----------
    weights : (batch, d_out, d_in) float tensor
        One weight only, if the initializer is not batched.
    ranks : tuple of int
        One per path.
    init : str or callable
        See `Config.init`.
    seed : int
        Seed of the generator for sketches and rotations.
    moments : sequence of Moments, optional
        One per weight. If given, the error counts important channels more (see `compensate_weighted`).
    layer : str
        Name of the first layer, for errors.

    Returns
    -------
    One Factors per path, with the batch axis.

    Raises
    ------
    ValueError
        If the initializer returns something other than finite factors of the right shapes and dtype.
    """
    function, batched = initializer_of(init)
    options: dict[str, Any] = {}
    if takes_generator(function):
        options["generator"] = torch.Generator().manual_seed(seed)

    def one_path(weight: Tensor, rank: int) -> Factors:
        found = function(weight if batched else weight.squeeze(0), rank, **options)
        check_factors(found, weight if batched else weight.squeeze(0), rank, f"layer {layer}: init {choice_name(init)}")
        return Factors(*(tensor.detach() if batched else tensor.detach().unsqueeze(0) for tensor in found))

    if not moments:
        return compensate(weights, ranks, one_path)
    column, row = (importance(torch.stack(each).to(weights)) for each in zip(*moments, strict=True))
    return compensate_weighted(weights, ranks, row, column, one_path)


def takes_generator(function: Callable) -> bool:
    """Tell whether a function has a parameter `generator`."""
    try:
        return "generator" in inspect.signature(function).parameters
    except (TypeError, ValueError):  # Some functions written in C have no signature.
        return False


def check_factors(found: Any, weight: Tensor, rank: int, place: str) -> None:
    """Raise ValueError unless an initializer returned finite factors of the right shapes and dtype.

    Parameters
    ----------
    found : object
        What it returned.
    weight : (..., d_out, d_in) tensor
    rank : int
    place : str
        The layer and the initializer, for the message.
    """
    if not isinstance(found, tuple) or len(found) != len(Factors._fields):
        raise ValueError(f"{place} must return Factors(u, v, h, ell, g), got {type(found).__name__}")
    *batch, d_out, d_in = weight.shape
    shapes = ((d_out, rank), (d_in, rank), (d_out,), (rank,), (d_in,))
    for field, tensor, shape in zip(Factors._fields, found, shapes, strict=True):
        wanted = (*batch, *shape)
        if not isinstance(tensor, Tensor) or tuple(tensor.shape) != wanted:
            given = tuple(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
            raise ValueError(f"{place} must return {field} as a tensor of shape {wanted}, got {given}")
        if tensor.dtype != weight.dtype or tensor.device != weight.device:
            raise ValueError(
                f"{place} must return {field} as {weight.dtype} on {weight.device}, got {tensor.dtype} on "
                f"{tensor.device}"
            )
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{place} must return finite {field}, got NaN or infinity")


def sketch(weight: Tensor, rank: int, generator: torch.Generator) -> Tensor | None:
    """Draw the sketch of a randomized SVD, (d_in, rank + OVERSAMPLING); None where an exact SVD costs hardly more."""
    columns = rank + OVERSAMPLING
    if 3 * columns >= min(weight.shape[-2:]):
        return None
    return gaussian(weight, weight.shape[-1], columns, generator)


def gaussian(weight: Tensor, rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """Draw a (rows, columns) matrix of Gaussian numbers, with the dtype and device of a weight."""
    return torch.randn(rows, columns, generator=generator).to(weight)
