"""Draw shapes, signs, layers, inputs and weights with Hypothesis."""

from collections.abc import Sequence

import numpy as np
from hypothesis import strategies as st
from littlebit.reference import Factors
from numpy.typing import DTypeLike

ODD_SIZES = (1, 2, 3, 7, 31, 32, 33, 63, 64, 65, 97, 127)

KINDS = ("normal", "low-rank", "heavy", "constant", "zero", "tiny", "denormal", "huge", "integers")


#: Row lengths at which the width or the number of words changes, and the ones beside them.
WORD_EDGES = (1, 2, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65)
BATCHES = ((), (1,), (0,), (2,), (3,), (5,), (9,), (2, 3), (1, 2, 2))


def sizes(largest: int = 40):
    """Draw a size up to `largest`, odd ones often."""
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
def inputs(draw, d_in: int, dtype: DTypeLike = np.float32):
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


def generators():
    """Draw a NumPy generator of random numbers."""
    return st.integers(0, 2**32 - 1).map(np.random.default_rng)


@st.composite
def sign_arrays(draw, largest: int = 70, batches: Sequence[tuple[int, ...]] = BATCHES):
    """Draw a float32 array of signs, (..., n), of any batch shape and strides."""
    count = draw(st.sampled_from([size for size in WORD_EDGES if size <= largest]) | st.integers(1, largest))
    batch, rng = draw(st.sampled_from(batches)), draw(generators())
    signs = rng.choice(np.array([1, -1], np.float32), (*batch, count))
    return strided(draw, signs)


def strided(draw, array: np.ndarray) -> np.ndarray:
    """Return an array with the same entries, contiguous or with other strides."""
    layout = draw(st.sampled_from(["C", "transposed", "gaps"]))
    if layout == "transposed":
        return np.ascontiguousarray(array.T).T
    if layout == "gaps" and array.ndim:
        wide = np.zeros((*array.shape[:-1], 2 * array.shape[-1]), array.dtype)
        wide[..., ::2] = array
        return wide[..., ::2]
    return array


@st.composite
def small_integers(draw, shape: tuple[int, ...], largest: int = 3, dtype=np.float32):
    """Draw an array of small integers: all ones, or from -largest to largest without zero."""
    if draw(st.booleans()):
        numbers = draw(generators()).integers(1, largest + 1, shape)
        return (numbers * draw(generators()).choice([1, -1], shape)).astype(dtype)
    return np.ones(shape, dtype)


@st.composite
def integer_paths(draw, largest: int = 40, paths: int = 1, scaled: Sequence[str] = ()):
    """Draw paths whose products are integers, so that sums in float32 are exact in any order.

    Signs are all +1 or random, scales are 1, and small integers for the names in `scaled`.
    """
    edges = st.sampled_from([size for size in WORD_EDGES if size <= largest])
    d_out, d_in = draw(edges), draw(edges)
    result = []
    for _ in range(paths):
        rank = draw(edges)
        u, v = (signs(draw, (size, rank)) for size in (d_out, d_in))
        shapes = {"h": (d_out,), "ell": (rank,), "g": (d_in,)}
        scales = {n: draw(small_integers(s)) if n in scaled else np.ones(s, np.float32) for n, s in shapes.items()}
        result.append(Factors(u, v, **scales))
    return result


def signs(draw, shape: tuple[int, ...]) -> np.ndarray:
    """Draw float32 signs: all +1, or random."""
    if draw(st.booleans()):
        return draw(generators()).choice(np.array([1, -1], np.float32), shape)
    return np.ones(shape, np.float32)


@st.composite
def layers(draw, largest: int = 40, most: int = 2, dtype: str = "float32"):
    """Draw the paths of a layer, with normal latents and scales of either sign near one."""
    drawn = draw(factor_arrays(largest, most))
    return [Factors(*(array.astype(dtype) for array in path)) for path in drawn]
