"""Define LittleBit in plain NumPy, one idea a file, in the order of the paper.

Every function states its computation as directly as NumPy allows. `littlebit.fast` has the same files, functions and
parameters in torch, made to be fast. Tests prove that the two agree.
"""

if __name__ != "littlebit.reference":
    raise ImportError(
        f"this package is called littlebit.reference, not {__name__}: install the project (pip install -e .) and "
        "import littlebit.reference"
    )

from . import _renamed
from .admm import admm as admm, importance as importance, refit_scales as refit_scales
from .alignment import itq as itq, joint_itq as joint_itq, random_rotation as random_rotation
from .bits import (
    SCALE_BITS as SCALE_BITS,
    WORD_BITS as WORD_BITS,
    allocate_ranks as allocate_ranks,
    kv_cache_bytes as kv_cache_bytes,
    layer_bits as layer_bits,
    model_bits as model_bits,
    official_rank as official_rank,
    path_bits as path_bits,
    paths_for_bits as paths_for_bits,
    rank_for_bits as rank_for_bits,
)
from .distill import (
    hidden_loss as hidden_loss,
    hidden_loss_vjp as hidden_loss_vjp,
    kl_loss as kl_loss,
    kl_loss_vjp as kl_loss_vjp,
)
from .dual_svid import dual_svid as dual_svid, svid as svid
from .factors import Factors as Factors
from .kv_cache import (
    Latents as Latents,
    apply_rope as apply_rope,
    latent_attention as latent_attention,
    latents as latents,
    round_latents as round_latents,
    up_projection as up_projection,
)
from .linear import linear as linear, linear_vjp as linear_vjp, packed_linear as packed_linear
from .memory import (
    MODEL_SHAPES as MODEL_SHAPES,
    ModelMemory as ModelMemory,
    ModelShape as ModelShape,
    model_memory as model_memory,
)
from .packing import (
    PackedFactors as PackedFactors,
    pack_factors as pack_factors,
    pack_signs as pack_signs,
    unpack_factors as unpack_factors,
    unpack_signs as unpack_signs,
)
from .residual import compensate as compensate, compensate_weighted as compensate_weighted
from .signs import (
    RULES as RULES,
    sign as sign,
    smooth_sign as smooth_sign,
    smooth_sign_vjp as smooth_sign_vjp,
    straight_through as straight_through,
    straight_through_vjp as straight_through_vjp,
)
from .svd import rank_one as rank_one, svd as svd, truncated_svd as truncated_svd
from .train import (
    AdamState as AdamState,
    Dense as Dense,
    Layer as Layer,
    adam_start as adam_start,
    adam_step as adam_step,
    dense_mlp as dense_mlp,
    dense_step as dense_step,
    mlp as mlp,
    mlp_vjp as mlp_vjp,
    qat as qat,
    qat_step as qat_step,
)


def __getattr__(name: str) -> object:
    """Find what had another name in the version before."""
    return _renamed.renamed_attribute(__name__, name)
