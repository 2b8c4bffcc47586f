"""Dual-SVID and residual compensation: up to signs of singular vectors, and never worse than the definition."""

import numpy as np
from hypothesis import assume, strategies as st

from .. import exact
from ..backend import Backend
from ..compare import assert_same, assert_true, assert_within
from ..law import Draw, laws_of
from ..strategies import condition, generators, sizes, weights
from .packing import assert_refused

LAWS, law = laws_of("factorization")
DUAL_SVID = "LittleBit (arXiv 2506.13771), Dual-SVID"
RESIDUAL = "LittleBit (arXiv 2506.13771), residual compensation"
LAPACK = 8  # constant of the backward error of a QR or an SVD, times the larger size


def roundings(m: int, n: int, paths: int = 1) -> int:
    """Count the roundings of a path: the SVDs of the weight, |U| and |V|, sums over rows and columns, and the step."""
    return paths * (3 * LAPACK * max(m, n) + m + n + m * n)


def weight_with_clear_scales(draw: Draw) -> tuple[np.ndarray, int]:
    """Draw a weight and a rank at which |U'| and |V'| have a leading singular value 1.25 times the next or more.

    Otherwise an iteration that stops when nothing moves may end short of the best rank-one approximation.
    """
    weight = well_separated(draw)
    rank = some_rank(weight, draw)
    factors = exact.dual_svid(weight, rank)
    for factor in (factors.u, factors.v):
        s = np.linalg.svd(np.abs(factor), compute_uv=False)
        assume(len(s) == 1 or s[1] <= 0.8 * s[0])
    return weight, rank


def some_rank(weight: np.ndarray, draw: Draw) -> int:
    """Draw a rank that the weight allows."""
    return draw(st.integers(1, min(weight.shape)))


@law("dual_svid", source=DUAL_SVID)
def factors_have_the_shapes_of_the_rank(backend: Backend, draw: Draw) -> None:
    """U is (d_out, rank), v (d_in, rank), h (d_out,), ell (rank,) and g (d_in,)."""
    weight = draw(weights(12))
    rank = some_rank(weight, draw)
    found = [array.shape for array in backend.dual_svid(weight, rank)]
    d_out, d_in = weight.shape
    wanted = [(d_out, rank), (d_in, rank), (d_out,), (rank,), (d_in,)]
    assert_true(found == wanted, f"shapes {found} instead of {wanted}")


@law("dual_svid", source=DUAL_SVID)
def scales_are_not_negative(backend: Backend, draw: Draw) -> None:
    """h, ell and g are finite and not negative, for any weight: all signs are in U and V."""
    weight = draw(weights(16))
    factors = backend.dual_svid(weight, some_rank(weight, draw))
    for name in ("h", "ell", "g"):
        assert_true((getattr(factors, name) >= 0).all(), f"{name} is {getattr(factors, name)}")


@law("dual_svid", source=DUAL_SVID)
def rank_one_is_recovered(backend: Backend, draw: Draw) -> None:
    """An outer product is factorized exactly at rank 1, whatever its scale and wherever it is zero."""
    rng, sides = draw(generators()), []
    for size in (draw(sizes(16)), draw(sizes(16))):
        side = rng.standard_normal(size) * 10.0 ** draw(st.integers(-70, 70))
        side[rng.permutation(size)[: draw(st.integers(0, size - 1))]] = 0
        sides.append(side)
    outer = np.outer(*sides)
    magnitude = LAPACK * max(outer.shape) * exact.frobenius(outer) + 12 * np.abs(outer)
    assert_within(exact.dense(exact.factors_of(backend.dual_svid(outer, 1))), outer, magnitude, terms=1)


def well_separated(draw: Draw, largest: int = 12) -> np.ndarray:
    """Draw a weight whose singular values fall by 0.7 each: only then do all algorithms find the same vectors."""
    m, n, rng = draw(st.integers(1, largest)), draw(st.integers(1, largest)), draw(generators())
    k = min(m, n)
    u, v = (np.linalg.qr(rng.standard_normal((size, k)))[0] for size in (m, n))
    return (u * 0.7 ** np.arange(k)) @ v.T


@law("dual_svid", source=DUAL_SVID)
def signs_are_of_the_singular_vectors(backend: Backend, draw: Draw) -> None:
    """U and V are the signs of the leading singular vectors, up to a common sign of each pair."""
    weight = well_separated(draw)
    rank = some_rank(weight, draw)
    found, wanted = backend.dual_svid(weight, rank), exact.dual_svid(weight, rank)
    flip = np.where((found.u * wanted.u).sum(axis=0) < 0, -1, 1)
    error = 2 * LAPACK * max(weight.shape) * np.finfo(found.u.dtype).eps / (0.3 * 0.7 ** np.arange(rank))
    for mine, theirs in ((found.u, wanted.u), (found.v, wanted.v)):
        clear = np.abs(theirs) > error * np.linalg.norm(theirs, axis=0)  # else rounding may decide the sign
        assert_same((exact.signs_of(mine) * flip)[clear], exact.signs_of(theirs)[clear])


def scale_law(name: str) -> None:
    """Make the law of one scale vector of Dual-SVID."""

    def check(backend: Backend, draw: Draw) -> None:
        weight, rank = weight_with_clear_scales(draw)

        def scale(matrix: np.ndarray) -> np.ndarray:
            return getattr(exact.dual_svid(matrix, rank), name)

        found = getattr(backend.dual_svid(weight, rank), name)
        assert_within(found, scale(weight), condition(scale, weight), roundings(*weight.shape))

    other = {"h": "the rows of |U'|", "ell": "the columns of |U'| and |V'|", "g": "the rows of |V'|"}[name]
    check.__name__ = f"{name}_is_read_off_the_magnitudes"
    check.__doc__ = f"{name} comes from the best rank-one approximation of {other}, W ~ U' V'^T with sqrt(S) in each."
    law("dual_svid", source=DUAL_SVID)(check)


for NAME in ("h", "ell", "g"):
    scale_law(NAME)


@law("dual_svid", source=DUAL_SVID)
def error_is_not_above_the_definitions(backend: Backend, draw: Draw) -> None:
    """||W - W_hat||_F is not above the error of the definition: three exact SVDs."""
    weight, rank = weight_with_clear_scales(draw)

    def error(matrix: np.ndarray) -> np.ndarray:
        return np.array([exact.frobenius(weight - exact.dense(exact.factors_of(exact.dual_svid(matrix, rank))))])

    found = exact.frobenius(weight - exact.dense(exact.factors_of(backend.dual_svid(weight, rank))))
    slack = 2 * roundings(*weight.shape) * np.finfo(weight.dtype).eps * (condition(error, weight)[0] + 1)
    assert_true(
        found <= error(weight)[0] + slack, f"error {found:.6g}, where the definition's is {error(weight)[0]:.6g}"
    )


@law("dual_svid", source=DUAL_SVID)
def impossible_ranks_and_weights_are_refused(backend: Backend, draw: Draw) -> None:
    """A rank below 1 or above min(d_out, d_in), and a weight with NaN or infinity, raise ValueError."""
    weight = draw(weights(8))
    if draw(st.booleans()):
        rank = draw(st.sampled_from([0, -1, min(weight.shape) + 1]))
        assert_refused(lambda: backend.dual_svid(weight, rank), f"rank {rank} of {weight.shape} was taken")
    else:
        weight = weight.copy()
        weight[-1, -1] = draw(st.sampled_from([np.nan, np.inf]))
        assert_refused(lambda: backend.dual_svid(weight, 1), f"a weight with {weight[-1, -1]} was taken")


@law("compensate", source=RESIDUAL)
def every_path_lowers_the_error(backend: Backend, draw: Draw) -> None:
    """There is one path for each rank, and no path increases ||W - W_hat||_F, for any weight."""
    weight = draw(weights(16))
    ranks = draw(st.lists(st.integers(1, min(weight.shape)), min_size=1, max_size=3))
    paths = [exact.factors_of(path) for path in backend.compensate(weight, ranks)]
    found = [len(path.ell) for path in paths]
    assert_true(found == ranks, f"ranks {found} instead of {ranks}")
    limits, rest = np.finfo(weight.dtype), weight
    error = exact.frobenius(rest)
    for at, path in enumerate(paths):
        rest = rest - exact.dense(path)
        size = 2 * error + exact.frobenius(exact.dense(exact.absolute(path)))
        slack = (len(path.ell) + 4 + weight.size / 2) * limits.eps * size + weight.size * limits.smallest_subnormal
        now = exact.frobenius(rest)
        assert_true(now <= error + slack, f"path {at} raises the error from {error:.6g} to {now:.6g}")
        error = now


@law("compensate", source=RESIDUAL)
def second_path_factorizes_the_residual(backend: Backend, draw: Draw) -> None:
    """W_1 is Dual-SVID of W times the step that fits best, W_2 the same of W - W_1, up to signs of singular vectors."""
    weight = well_separated(draw, 8)

    def dense(matrix: np.ndarray) -> np.ndarray:
        found, rest = [], matrix
        for _ in range(2):
            path = exact.dense(exact.factors_of(exact.dual_svid(rest, 1)))
            size = (path * path).sum()
            found.append(path * max(0.0, (rest * path).sum() / size) if size else path)
            rest = rest - found[-1]
        return np.stack(found)

    found = np.stack([exact.dense(exact.factors_of(path)) for path in backend.compensate(weight, [1, 1])])
    # a residual of rounding alone has no singular vectors to compare
    wanted, moved = dense(weight), condition(dense, weight)
    assert_within(found.astype(weight.dtype), wanted, moved, roundings(*weight.shape, paths=2))
