"""What a whole model takes, in bytes: the arithmetic of `littlebit.reference.memory`, which is not said twice."""

from ..reference.memory import (
    KV_CACHES as KV_CACHES,
    MODEL_SHAPES as MODEL_SHAPES,
    ModelMemory as ModelMemory,
    ModelShape as ModelShape,
    model_memory as model_memory,
)
