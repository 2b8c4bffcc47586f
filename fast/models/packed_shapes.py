"""Compute shapes and dtypes of the tensors of a packed path, without torch."""

import math
from typing import NamedTuple

from ..bits import SCALE_BITS, word_width

#: Bytes of an element, by the name of its dtype in a safetensors header. Other dtypes are refused.
ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "BOOL": 1, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1}
SCALES = ("h", "ell", "g")
WORD_TYPES = {8: "U8", 16: "I16", 32: "I32"}  # dtypes of packed words by their bits


class Header(NamedTuple):
    """Hold what a safetensors header says about a tensor.

    Attributes
    ----------
    shape : tuple of int
    dtype : str
        Name of the dtype in the file, one of `ITEM_BYTES`.
    """

    shape: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        """Count the bytes of the tensor."""
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


def layer_type(name: str) -> str:
    """Return the last part of a layer's name, with `experts.` before it for a layer of an expert.

    Examples
    --------
    >>> layer_type("model.layers.0.self_attn.q_proj"), layer_type("model.layers.0.mlp.experts.3.up_proj")
    ('q_proj', 'experts.up_proj')
    """
    *path, last = name.split(".")
    return f"{path[-2]}.{last}" if len(path) > 1 and "expert" in path[-2] and path[-1].isdigit() else last


def packed_headers(d_out: int, d_in: int, rank: int, scale_bits: int = SCALE_BITS) -> dict[str, Header]:
    """Compute the header of each stored tensor of a packed path, by its name: the fields of PackedFactors.

    With 8-bit scales h, ell and g are codes, and `peaks` holds the largest scale of each.

    Examples
    --------
    >>> packed_headers(64, 96, 16)["u_words"], packed_headers(64, 96, 16)["v_words"]
    (Header(shape=(64, 1), dtype='I16'), Header(shape=(16, 3), dtype='I32'))
    """

    def words(rows: int, count: int) -> Header:
        width = word_width(count)
        return Header((rows, -(-count // width)), WORD_TYPES[width])

    scales = dict(zip(SCALES, (d_out, rank, d_in), strict=True))
    return {
        "u_words": words(d_out, rank),
        "v_words": words(rank, d_in),
        **{name: Header((size,), "U8" if scale_bits == 8 else "F16") for name, size in scales.items()},
        **({"peaks": Header((len(SCALES),), "F16")} if scale_bits == 8 else {}),
    }
