"""Report how the layers of a model were quantized."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from ..bits import Ranks


@dataclass(frozen=True)
class LayerResult:
    """Report how one layer was quantized.

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


class Results(dict[str, LayerResult]):
    """Map the name of each quantized layer to its LayerResult.

    Attributes
    ----------
    dense : mapping of str to str
        Why each other selected layer stayed dense, by its name.
    """

    dense: Mapping[str, str] = MappingProxyType({})
