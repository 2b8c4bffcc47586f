"""The layer's output, by `linear` and by `packed_linear`: exact where sums are of integers, else within a bound.

Where a law draws integers, every partial sum is an integer below 2^24 in any order of additions. So float32 has nothing
to round, and one wrong bit shows.
"""

from collections.abc import Sequence

import numpy as np
from hypothesis import strategies as st
from littlebit.reference import Factors

from .. import exact
from ..backend import Backend
from ..compare import assert_same, assert_true, assert_within
from ..law import Draw, Law, laws_of
from ..strategies import BATCHES, WORD_EDGES, generators, inputs, integer_paths, layers, small_integers
from .packing import assert_refused, packed_exactly

FORWARD = "LittleBit (arXiv 2506.13771), forward pass; notation page"
PATHS = "packed format, section Paths"
ERRORS = "packed format, section Arithmetic"
FUNCTIONS = ("linear", "packed_linear")
LAWS: list[Law] = []


def law(source: str):
    """Make a law of (call, draw) into two, one for `linear` and one for `packed_linear`."""

    def add(check):
        for function in FUNCTIONS:
            mine, decorate = laws_of(function)

            def run(backend: Backend, draw: Draw, function: str = function) -> None:
                check(Layer(backend, function), draw)

            run.__name__, run.__doc__ = check.__name__, check.__doc__
            decorate(function, source=source)(run)
            LAWS.extend(mine)
        return check

    return add


class Layer:
    """Call `linear` or `packed_linear` of a backend with factors, which are packed for the latter."""

    def __init__(self, backend: Backend, function: str):
        self.backend, self.function = backend, function
        self.largest = backend.declared("LARGEST")

    def paths(self, paths: Sequence[Factors]) -> list:
        """Return what the function takes for these paths."""
        return list(paths) if self.function == "linear" else [packed_exactly(path) for path in paths]

    def __call__(self, x: np.ndarray, paths: Sequence, bias: np.ndarray | None = None) -> np.ndarray:
        """Compute the output."""
        arguments = (x, list(paths)) if bias is None else (x, list(paths), bias)
        return getattr(self.backend, self.function)(*arguments)

    def assert_exact(self, x: np.ndarray, paths: Sequence[Factors], bias: np.ndarray | None = None) -> None:
        """Require the exact output, of integers."""
        wanted = exact.linear(x, paths, bias).value
        assert_same(self(x, self.paths(paths), bias).astype(np.float64), wanted)


@law(FORWARD)
def every_sign_counts(layer: Layer, draw: Draw) -> None:
    """With scales of 1 and an input of small integers, y = U (V^T x) to the last bit."""
    paths = draw(integer_paths(layer.largest))
    layer.assert_exact(draw(small_integers((2, len(paths[0].g)))), paths)


@law(FORWARD)
def h_scales_the_outputs(layer: Layer, draw: Draw) -> None:
    """Output i is multiplied by h_i."""
    paths = draw(integer_paths(min(33, layer.largest), scaled=["h"]))
    layer.assert_exact(draw(small_integers((1, len(paths[0].g)))), paths)


@law(FORWARD)
def ell_scales_the_latents(layer: Layer, draw: Draw) -> None:
    """Latent k, entry k of V^T (g x), is multiplied by ell_k."""
    paths = draw(integer_paths(min(33, layer.largest), scaled=["ell"]))
    layer.assert_exact(draw(small_integers((1, len(paths[0].g)))), paths)


@law(FORWARD)
def g_scales_the_inputs(layer: Layer, draw: Draw) -> None:
    """Input j is multiplied by g_j."""
    paths = draw(integer_paths(min(33, layer.largest), scaled=["g"]))
    layer.assert_exact(draw(small_integers((1, len(paths[0].g)))), paths)


@law(FORWARD)
def paths_add_up(layer: Layer, draw: Draw) -> None:
    """The output of a layer is the sum over its paths, each with its own rank and scales."""
    paths = draw(integer_paths(min(33, layer.largest), paths=2, scaled=["h", "ell", "g"]))
    layer.assert_exact(draw(small_integers((1, len(paths[0].g)))), paths)


@law(FORWARD)
def bias_is_added_once(layer: Layer, draw: Draw) -> None:
    """The bias is added to the sum of the paths, once and unscaled."""
    paths = draw(integer_paths(min(17, layer.largest), paths=draw(st.integers(1, 3)), scaled=["h"]))
    x = draw(small_integers((2, len(paths[0].g))))
    layer.assert_exact(x, paths, draw(small_integers((len(paths[0].h),))))


@law(PATHS)
def padding_takes_no_part(layer: Layer, draw: Draw) -> None:
    """A row whose last word is not full gives what its signs give: the last sign counts, and nothing after it does."""
    edges = st.sampled_from([size for size in WORD_EDGES if size <= layer.largest])
    d_out, d_in, rank = draw(edges), draw(edges), draw(edges)
    u, v = np.ones((d_out, rank), np.float32), np.ones((d_in, rank), np.float32)
    u[:, -1], v[-1] = -1, -1
    path = Factors(u, v, *(np.ones(size, np.float32) for size in (d_out, rank, d_in)))
    x = np.ones((1, d_in), np.float32)
    if draw(st.booleans()):
        x[:, :-1] = 0
    layer.assert_exact(x, [path])


@law(ERRORS)
def sums_are_of_float32(layer: Layer, draw: Draw) -> None:
    """Sums are accumulated in float32 or better: integers up to 2^24 are exact, which float16 holds up to 2^11 only."""
    d_in, rank = draw(st.integers(1, min(64, layer.largest))), draw(st.integers(1, min(8, layer.largest)))
    paths = [Factors(*(np.ones(shape, np.float32) for shape in ((3, rank), (d_in, rank), (3,), (rank,), (d_in,))))]
    x = np.ones((1, d_in), np.float32)
    x[0, 0] = 2.0 ** draw(st.integers(0, 14)) + draw(st.integers(0, 7))
    layer.assert_exact(x, paths)


@law(FORWARD)
def rows_are_independent(layer: Layer, draw: Draw) -> None:
    """A row of x that is huge, infinite or NaN does not change the outputs of other rows."""
    paths = draw(integer_paths(min(33, layer.largest)))
    x = draw(small_integers((3, len(paths[0].g))))
    x[1, draw(st.integers(0, x.shape[1] - 1))] = draw(st.sampled_from([1e30, np.inf, np.nan]))
    with np.errstate(all="ignore"):
        found = layer(x, layer.paths(paths))
    assert_same(found[[0, 2]].astype(np.float64), exact.linear(x[[0, 2]], paths).value)


@law(FORWARD)
def batch_axes_are_kept(layer: Layer, draw: Draw) -> None:
    """An input of shape (..., d_in) gives an output of shape (..., d_out), for no axes, several, and empty ones."""
    paths = draw(integer_paths(min(9, layer.largest)))
    layer.assert_exact(draw(small_integers((*draw(st.sampled_from(BATCHES)), len(paths[0].g)))), paths)


@law(ERRORS)
def error_is_within_the_bound(layer: Layer, draw: Draw) -> None:
    """|y - exact| <= 2 n eps M, with M the layer on absolute values and n its roundings, for every input dtype.

    For 16-bit inputs four roundings to that dtype are allowed on top, of the two folded factors, A x, and the output.
    """
    paths = draw(layers(min(40, layer.largest), most=3))
    bias = np.linspace(-1, 1, len(paths[0].h), dtype=np.float32) if draw(st.booleans()) else None
    dtype = np.dtype(draw(st.sampled_from(layer.backend.declared("DTYPES"))))
    x = draw(inputs(len(paths[0].g), dtype))
    if draw(st.booleans()):  # no sum is small beside its terms
        x, paths = np.abs(x), [Factors(*map(np.abs, path)) for path in paths]
    given = layer.paths(paths)
    value, magnitude, terms = exact.linear(x, given, bias)
    found = layer(x, given, bias)
    slack = exact.rounded_in_16_bits(x, given, dtype)
    if bias is not None and dtype.itemsize == 2:
        slack = slack + np.finfo(dtype).eps * (np.abs(bias) + np.abs(value))
    assert_within(found.astype(np.float32), value, magnitude, terms, slack=slack)


@law(FORWARD)
def wrong_inputs_are_refused(layer: Layer, draw: Draw) -> None:
    """An input whose last axis is not d_in raises ValueError."""
    paths = draw(integer_paths(min(17, layer.largest)))
    x = np.ones((2, len(paths[0].g) + draw(st.sampled_from([1, 32]))), np.float32)
    assert_refused(lambda: layer(x, layer.paths(paths)), f"an input of shape {x.shape} was taken")


@law(FORWARD)
def inputs_are_not_changed(layer: Layer, draw: Draw) -> None:
    """Computing an output changes neither the input nor the paths, and gives the same output again."""
    given = layer.paths(draw(layers(min(17, layer.largest), most=2)))
    x = draw(generators()).standard_normal((2, given[0].g.shape[-1])).astype(np.float32)
    before = [x.copy(), *(array.copy() for path in given for array in path)]
    first = layer(x, given)
    for array, kept in zip([x, *(array for path in given for array in path)], before, strict=True):
        assert_true((array == kept).all(), "an argument has changed")
    assert_same(layer(x, given), first)
