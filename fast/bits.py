"""Counting bits honestly: the arithmetic of `littlebit.reference.bits`, which is exact and is not said twice."""

from ..reference.bits import (
    SCALE_BITS as SCALE_BITS,
    WORD_BITS as WORD_BITS,
    Ranks as Ranks,
    Shape as Shape,
    allocate_ranks as allocate_ranks,
    layer_bits as layer_bits,
    path_bits as path_bits,
    rank_for_bits as rank_for_bits,
)
