"""Refitting the scales by least squares, with the signs fixed."""

import numpy as np
from hypothesis import strategies as st
from littlebit.reference import Factors

from .. import exact
from ..backend import Backend
from ..compare import assert_same, assert_true
from ..law import Draw, laws_of
from ..strategies import generators, weights

LAWS, law = laws_of("scales")
REFIT = "least squares in ell, h and g in turn; after NanoQuant (arXiv 2602.06694)"


def weight_and_factors(draw: Draw) -> tuple[np.ndarray, Factors]:
    """Draw a weight with entries of at most 1, and random factors of its shape."""
    weight = draw(weights(12))
    weight = weight / (np.abs(weight).max() or 1.0)
    rank, rng = draw(st.integers(1, min(weight.shape))), draw(generators())
    (d_out, d_in) = weight.shape
    shapes = ((d_out, rank), (d_in, rank), (d_out,), (rank,), (d_in,))
    return weight, Factors(*(rng.standard_normal(shape) for shape in shapes))


@law("refit_scales", source=REFIT)
def refitting_never_increases_the_error(backend: Backend, draw: Draw) -> None:
    """||W - W_hat||_F does not rise, for any weight, any factors and any number of sweeps."""
    weight, factors = weight_and_factors(draw)
    sweeps = draw(st.integers(1, 3))
    before, slack = exact.dense_error(weight, factors)
    after, more = exact.dense_error(weight, backend.refit_scales(weight, factors, sweeps))
    slack += more
    assert_true(after <= before + 3 * sweeps * slack, f"the error rises from {before:.6g} to {after:.6g}")


@law("refit_scales", source=REFIT)
def signs_are_kept(backend: Backend, draw: Draw) -> None:
    """U and v stay as they are."""
    weight, factors = weight_and_factors(draw)
    found = backend.refit_scales(weight, factors, 1)
    assert_same(found.u, factors.u)
    assert_same(found.v, factors.v)


@law("refit_scales", source=REFIT)
def rank_one_scales_are_solved_for(backend: Backend, draw: Draw) -> None:
    """If W is a path of rank 1 and the signs are its own, one sweep finds it from any scales of h, ell and g."""
    rng, d_out, d_in = draw(generators()), draw(st.integers(1, 12)), draw(st.integers(1, 12))
    u, v = rng.choice([-1.0, 1.0], (d_out, 1)), rng.choice([-1.0, 1.0], (d_in, 1))
    wanted, start = (Factors(u, v, *(rng.uniform(0.5, 2, size) for size in (d_out, 1, d_in))) for _ in range(2))
    weight = exact.dense(exact.factors_of(wanted))
    error, slack = exact.dense_error(weight, backend.refit_scales(weight, start, 1))
    bound = 16 * (d_out + d_in) * slack
    assert_true(error <= bound, f"an error of {error:.3g} is left, more than {bound:.3g}")


@law("refit_scales", source=REFIT)
def g_is_fitted_last_and_stationary(backend: Backend, draw: Draw) -> None:
    """A sweep ends with g: W - W_hat is orthogonal, column by column, to W_hat without g."""
    weight, factors = weight_and_factors(draw)
    found = exact.factors_of(backend.refit_scales(weight, factors, 1))
    unscaled = exact.dense(found._replace(g=np.ones_like(found.g)))
    size = np.abs(weight) + exact.dense(exact.absolute(found))
    products = ((weight - unscaled * found.g) * unscaled).sum(axis=0)
    magnitude = (size * exact.dense(exact.absolute(found._replace(g=np.ones_like(found.g))))).sum(axis=0)
    terms = 8 * (weight.shape[0] + len(found.ell) + 8)
    bound = terms * np.finfo(weight.dtype).eps * magnitude + weight.size * np.finfo(weight.dtype).tiny
    wrong = np.flatnonzero(~(np.abs(products) <= bound))
    assert_true(not len(wrong), f"column {wrong[:1]}: the derivative is {products[wrong[:1]]}, not 0")
