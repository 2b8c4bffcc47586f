"""Compute the packed layer in JAX: unpack by shifts, then two products.

pytest --pyargs littlebit.conformance --backend littlebit.conformance.examples.jax_kernel
"""

# pyright: reportMissingImports=false

import jax
import jax.numpy as jnp
import numpy as np

to_backend = jnp.asarray
from_backend = np.asarray


def signs_of(words: jax.Array, count: int) -> jax.Array:
    """Read the signs of each row of words, (rows, words) to (rows, count): bit 1 means -1, lowest bit first."""
    places = jnp.arange(8 * words.dtype.itemsize, dtype=words.dtype)
    bits = (words[..., None] >> places) & 1
    return 1 - 2 * bits.reshape(*words.shape[:-1], -1)[..., :count].astype(jnp.float32)


@jax.jit
def path_output(x: jax.Array, path: tuple) -> jax.Array:
    """Compute ((((x * g) V) * ell) U^T) * h in float32."""
    u_words, v_words, *scales = path
    h, ell, g = (scale.astype(jnp.float32) for scale in scales)
    u, v = signs_of(u_words, len(ell)), signs_of(v_words, len(g))  # (d_out, rank), (rank, d_in)
    with jax.default_matmul_precision("highest"):
        return ((x * g) @ v.T * ell) @ u.T * h


def packed_linear(x: jax.Array, paths: list, bias: jax.Array | None = None) -> jax.Array:
    """Compute the sum over paths, plus the bias."""
    if x.shape[-1] != len(paths[0].g):
        raise ValueError(f"the input's last axis must be {len(paths[0].g)}, got {x.shape}")
    y = sum(path_output(x, tuple(path)) for path in paths)
    return y if bias is None else y + bias
