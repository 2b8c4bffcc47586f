"""LittleBit in torch and Numba: the same functions as `littlebit.reference`, made to be used.

Importing this package needs neither a GPU nor transformers.
"""

if __name__ != "littlebit.fast":
    raise ImportError(
        f"this package is called littlebit.fast, not {__name__}: install the project (pip install -e .) and "
        "import littlebit.fast"
    )

from .bits import (
    SCALE_BITS as SCALE_BITS,
    WORD_BITS as WORD_BITS,
    allocate_ranks as allocate_ranks,
    layer_bits as layer_bits,
    path_bits as path_bits,
    rank_for_bits as rank_for_bits,
)
from .checkpoint import CheckpointError as CheckpointError, info as info, load as load, save as save
from .decode import generate as generate
from .dual_svid import dual_svid as dual_svid, svid as svid
from .evaluate import Perplexity as Perplexity, perplexity as perplexity
from .factors import Factors as Factors
from .fetch import fetch as fetch
from .hf import load_model as load_model, load_tokenizer as load_tokenizer
from .layers import LittleBitLinear as LittleBitLinear, PackedLinear as PackedLinear
from .linear import linear as linear, packed_linear as packed_linear
from .model import Config as Config, LayerResult as LayerResult, pack_ as pack_, quantize_ as quantize_
from .packing import (
    PackedFactors as PackedFactors,
    pack_factors as pack_factors,
    pack_signs as pack_signs,
    unpack_factors as unpack_factors,
    unpack_signs as unpack_signs,
)
from .residual import compensate as compensate
from .signs import sign as sign
from .svd import rank_one as rank_one, svd as svd, truncated_svd as truncated_svd
