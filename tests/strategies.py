"""Hypothesis strategies: matrices that nobody chose."""

import numpy as np
from hypothesis import strategies as st

ODD_SIZES = (1, 2, 3, 7, 31, 32, 33, 63, 64, 65, 97, 127)

KINDS = ("normal", "low-rank", "heavy", "constant", "zero", "tiny", "denormal", "huge", "integers")


def sizes(largest: int = 40):
    return st.one_of(st.integers(1, largest), st.sampled_from([size for size in ODD_SIZES if size <= largest]))


@st.composite
def weights(draw, largest: int = 24, dtype=np.float64):
    """A weight matrix of one of the KINDS, contiguous, transposed, or a view with odd strides."""
    m, n = draw(sizes(largest)), draw(sizes(largest))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    kind = draw(st.sampled_from(KINDS))
    base = rng.standard_normal((m, n))
    matrix = {
        "normal": lambda: base,
        "low-rank": lambda: rng.standard_normal((m, 1)) @ rng.standard_normal((1, n)),
        "heavy": lambda: base / np.maximum(np.abs(rng.standard_normal((m, n))), 1e-2),
        "constant": lambda: np.full((m, n), rng.standard_normal()),
        "zero": lambda: np.zeros((m, n)),
        "tiny": lambda: base * 1e-30,
        "denormal": lambda: base * (32 * np.finfo(dtype).smallest_subnormal),
        "huge": lambda: base * (1e15 if dtype == np.float32 else 1e140),
        "integers": lambda: np.sign(base) * rng.integers(0, 2, (m, n)),
    }[kind]().astype(dtype)
    layout = draw(st.sampled_from(["C", "transposed", "strided"]))
    if layout == "transposed":
        matrix = np.ascontiguousarray(matrix.T).T
    if layout == "strided":
        wide = np.zeros((2 * m, 3 * n), dtype)
        wide[::2, ::3] = matrix
        matrix = wide[::2, ::3]
    return matrix


@st.composite
def factor_arrays(draw, largest: int = 40, paths: int = 2, dtype=np.float32):
    """(paths, d_out, d_in): each path the five arrays of a Factors, with scales of either sign near one."""
    d_out, d_in = draw(sizes(largest)), draw(sizes(largest))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    result = []
    for _ in range(draw(st.integers(1, paths))):
        rank = draw(sizes(largest))
        shapes = ((d_out, rank), (d_in, rank), (d_out,), (rank,), (d_in,))
        result.append(tuple(rng.standard_normal(shape).astype(dtype) for shape in shapes))
    return result


@st.composite
def inputs(draw, d_in: int, dtype=np.float32):
    """X of any batch shape, from none to three axes, an axis of zero rows included."""
    batch = draw(st.sampled_from([(), (0,), (1,), (2,), (3,), (4,), (5,), (9,), (2, 3), (1, 2, 2)]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    return rng.standard_normal((*batch, d_in)).astype(dtype)


NOISE = 2.0**-30  # far above float64's rounding, far below what changes a well-conditioned result


def condition(compute, *arrays, draws=3):
    """How far the largest entry of compute(*arrays) can move per unit of relative noise in the arrays, measured.

    Rounding moves a result as noise of size eps in the arrays does, once per operation: eps times this times the
    number of operations bounds the difference of two ways to compute. Where noise flips a sign the measured condition
    is huge, and rightly so: rounding may flip it too.
    """
    rng = np.random.default_rng(0)
    result = compute(*arrays)
    moved = np.abs(result)
    for _ in range(draws):
        noisy = [array * (1 + NOISE * rng.uniform(-1, 1, array.shape)) for array in arrays]
        moved = np.maximum(moved, np.abs(compute(*noisy) - result) / NOISE)
    return np.full(result.shape, moved.max(initial=0.0))
