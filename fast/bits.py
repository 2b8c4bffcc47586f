"""Re-export `littlebit.reference.bits`: exact integer arithmetic, which both packages share."""

from ..reference.bits import (
    SCALE_BITS as SCALE_BITS,
    SECOND_PATH_SHARE as SECOND_PATH_SHARE,
    WORD_BITS as WORD_BITS,
    Ranks as Ranks,
    Shape as Shape,
    allocate_ranks as allocate_ranks,
    kv_cache_bytes as kv_cache_bytes,
    layer_bits as layer_bits,
    model_bits as model_bits,
    official_rank as official_rank,
    official_rank_before_rounding as official_rank_before_rounding,
    path_bits as path_bits,
    paths_for_bits as paths_for_bits,
    rank_for_bits as rank_for_bits,
    word_width as word_width,
)
