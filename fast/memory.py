"""What a whole model takes, in bytes: the arithmetic of `littlebit.reference.memory`, which is not said twice."""

from ..reference.memory import (
    LATENT_BYTES as LATENT_BYTES,
    MODEL_SHAPES as MODEL_SHAPES,
    ModelMemory as ModelMemory,
    ModelShape as ModelShape,
    model_memory as model_memory,
)
