"""Re-export `littlebit.reference.memory`: exact integer arithmetic, which both packages share."""

from ..reference.memory import (
    KV_CACHES as KV_CACHES,
    MODEL_SHAPES as MODEL_SHAPES,
    ModelMemory as ModelMemory,
    ModelShape as ModelShape,
    layer_ranks as layer_ranks,
    linear_shapes as linear_shapes,
    model_memory as model_memory,
)
