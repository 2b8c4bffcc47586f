"""LittleBit in plain NumPy: what the method is, one idea a file, in the order in which the paper is read.

Every function here states a computation as directly as NumPy allows. `littlebit.fast` states the same ones again in
torch, file by file and name by name; the tests prove that the two agree.
"""

if __name__ != "littlebit.reference":
    raise ImportError(
        f"this package is called littlebit.reference, not {__name__}: install the project (pip install -e .) and "
        "import littlebit.reference"
    )

from .bits import (
    SCALE_BITS as SCALE_BITS,
    WORD_BITS as WORD_BITS,
    allocate_ranks as allocate_ranks,
    layer_bits as layer_bits,
    path_bits as path_bits,
    rank_for_bits as rank_for_bits,
)
from .dual_svid import dual_svid as dual_svid, svid as svid
from .factors import Factors as Factors
from .linear import linear as linear, packed_linear as packed_linear
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
