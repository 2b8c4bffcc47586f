"""Compute the packed layer in 20 lines of NumPy.

pytest --pyargs littlebit.conformance --backend littlebit.conformance.examples.numpy_kernel
"""

import numpy as np


def signs_of(words: np.ndarray, count: int) -> np.ndarray:
    """Read the signs of each row of words, (rows, words) to (rows, count): bit 1 means -1, lowest bit first."""
    octets = np.ascontiguousarray(words).view(np.uint8)  # little-endian, as the format
    return np.float32(1) - 2 * np.unpackbits(octets, axis=-1, count=count, bitorder="little").astype(np.float32)


def packed_linear(x, paths, bias=None):
    """Compute the sum over paths of ((((x * g) V) * ell) U^T) * h, plus the bias."""
    y = np.float32(0)
    for u_words, v_words, h, ell, g in paths:
        if x.shape[-1] != len(g):
            raise ValueError(f"the input's last axis must be {len(g)}, got {x.shape}")
        u, v = signs_of(u_words, len(ell)), signs_of(v_words, len(g))  # (d_out, rank), (rank, d_in)
        h, ell, g = (scale.astype(np.float32) for scale in (h, ell, g))
        y = y + ((x * g) @ v.T * ell) @ u.T * h
    return y if bias is None else y + bias
