"""Laws of the method, by level; a backend needs only the functions of the laws that it wants checked."""

from ..law import Law
from . import bits, checkpoints, factorization, gradients, latent_cache, linear, packing, scales

LEVELS = (packing, linear, gradients, factorization, scales, latent_cache, checkpoints, bits)

#: All laws, in the order of the levels.
LAWS: list[Law] = [each for level in LEVELS for each in level.LAWS]
