"""Quantize, train, save and run whole models with LittleBit, in torch and Numba.

The functions of `littlebit.reference` are here too, under the same names, made fast. Importing this package loads no
library and needs neither a GPU nor transformers: the first use of a name imports its module. torch, transformers and
PEFT are extended when they are imported (integrations/plugin.py).
"""

from typing import TYPE_CHECKING

if __name__ != "littlebit.fast":
    raise ImportError(
        f"this package is called littlebit.fast, not {__name__}: install the project (pip install -e .) and "
        "import littlebit.fast"
    )

from ._lazy import make_lazy
from .integrations.plugin import register

#: Module -> the names that it exports; what stands under TYPE_CHECKING below repeats them for editors.
EXPORTS = {
    "admm": "admm importance refit_scales",
    "alignment": "itq joint_itq random_rotation",
    "bits": (
        "SCALE_BITS WORD_BITS allocate_ranks kv_cache_bytes layer_bits model_bits official_rank path_bits "
        "paths_for_bits rank_for_bits"
    ),
    "checkpoints.checkpoint": "info load save verify",
    "checkpoints.dense": "load_model load_tokenizer",
    "checkpoints.fetch": "fetch",
    "checkpoints.gguf": "save_gguf",
    "checkpoints.official": "save_official",
    "decoding.generate": "generate",
    "decoding.latent_cache": "latent_cache",
    "distill": "hidden_loss hidden_loss_vjp kl_loss kl_loss_vjp",
    "dual_svid": "dual_svid svid",
    "evaluation.perplexity": "Divergence Perplexity divergence perplexity",
    "evaluation.tasks": "TaskScore TaskScores score_tasks",
    "evaluation.zero_shot": "BlimpResult blimp",
    "factors": "Factors",
    "files.untrusted": "CheckpointError",
    "integrations.hf_quantizer": "LittleBitConfig",
    "kv_cache": "Latents apply_rope latent_attention latents round_latents up_projection",
    "linear": "linear linear_vjp packed_linear",
    "memory": "MODEL_SHAPES ModelMemory ModelShape model_memory",
    "models.allocation": "AllocationProblem register_allocation",
    "models.calibrate": "Moments calibrate spectral_gains",
    "models.config": "Config",
    "models.generation_settings": "GenerationConfig",
    "models.hf_names": "cache_argument",
    "models.initializers": "register_init",
    "models.layers": "LittleBitLinear PackedLinear",
    "models.quantize": "pack_ quantize_",
    "models.results": "LayerResult",
    "packing": "PackedFactors pack_factors pack_signs unpack_factors unpack_signs",
    "residual": "compensate compensate_weighted",
    "signs": "RULES sign smooth_sign smooth_sign_vjp straight_through straight_through_vjp",
    "svd": "rank_one svd truncated_svd",
    "train": "AdamState Dense Layer adam_start adam_step dense_mlp dense_step mlp mlp_vjp qat qat_step",
    "training.config": "TrainConfig",
    "training.resume": "Checkpointer",
    "training.trainer": "TrainingError TrainingStopped train_",
}

if TYPE_CHECKING:
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
    from .checkpoints.checkpoint import info as info, load as load, save as save, verify as verify
    from .checkpoints.dense import load_model as load_model, load_tokenizer as load_tokenizer
    from .checkpoints.fetch import fetch as fetch
    from .checkpoints.gguf import save_gguf as save_gguf
    from .checkpoints.official import save_official as save_official
    from .decoding.generate import generate as generate
    from .decoding.latent_cache import latent_cache as latent_cache
    from .distill import (
        hidden_loss as hidden_loss,
        hidden_loss_vjp as hidden_loss_vjp,
        kl_loss as kl_loss,
        kl_loss_vjp as kl_loss_vjp,
    )
    from .dual_svid import dual_svid as dual_svid, svid as svid
    from .evaluation.perplexity import (
        Divergence as Divergence,
        Perplexity as Perplexity,
        divergence as divergence,
        perplexity as perplexity,
    )
    from .evaluation.tasks import TaskScore as TaskScore, TaskScores as TaskScores, score_tasks as score_tasks
    from .evaluation.zero_shot import BlimpResult as BlimpResult, blimp as blimp
    from .factors import Factors as Factors
    from .files.untrusted import CheckpointError as CheckpointError
    from .integrations.hf_quantizer import LittleBitConfig as LittleBitConfig
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
    from .models.allocation import (
        AllocationProblem as AllocationProblem,
        register_allocation as register_allocation,
    )
    from .models.calibrate import Moments as Moments, calibrate as calibrate, spectral_gains as spectral_gains
    from .models.config import Config as Config
    from .models.generation_settings import GenerationConfig as GenerationConfig
    from .models.hf_names import cache_argument as cache_argument
    from .models.initializers import register_init as register_init
    from .models.layers import LittleBitLinear as LittleBitLinear, PackedLinear as PackedLinear
    from .models.quantize import pack_ as pack_, quantize_ as quantize_
    from .models.results import LayerResult as LayerResult
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
    from .training.config import TrainConfig as TrainConfig
    from .training.resume import Checkpointer as Checkpointer
    from .training.trainer import (
        TrainingError as TrainingError,
        TrainingStopped as TrainingStopped,
        train_ as train_,
    )

make_lazy(__name__, EXPORTS)
register()
