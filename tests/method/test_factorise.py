"""Test steps, batches, sketches and errors of Dual-SVID and residual compensation; test_laws.py has their laws."""

import littlebit.fast as fast
import littlebit.reference as ref
import numpy as np
import pytest
import torch
from compare import assert_same, assert_within
from hypothesis import given, strategies as st
from littlebit.conformance.strategies import condition, weights
from littlebit.fast.residual import best_step as fast_best_step
from littlebit.reference.residual import best_step

LAPACK = 8  # constant of a QR's or SVD's backward error, times the larger size: see test_svd.py


def dual_svid_roundings(m, n):
    """Count the roundings of Dual-SVID: the SVDs of the weight, |U| and |V|, and sums over rows and columns."""
    return 3 * LAPACK * max(m, n) + m + n


def compensate_roundings(m, n, paths):
    """Count the roundings of `compensate`: for each path Dual-SVID, and a step from sums over all entries."""
    return paths * (dual_svid_roundings(m, n) + m * n)


def frobenius(matrix):
    scale = np.abs(matrix).max(initial=0) or 1.0
    return np.sqrt(((matrix / scale) ** 2).sum()) * scale


def in_magnitude(factors):
    """Compute the dense weight of factors on absolute values."""
    return np.outer(np.abs(factors.h), np.abs(factors.g)) * np.abs(factors.ell).sum()


@given(weights(), st.integers(0, 2**32 - 1))
def test_best_step_minimises_the_error(weight, seed):
    direction = np.random.default_rng(seed).standard_normal(weight.shape) * (np.abs(weight).max() or 1)
    step = best_step(weight, direction)
    assert step >= 0
    error, limits = frobenius(weight - step * direction), np.finfo(weight.dtype)
    for other in (0.0, 0.9 * step, 1.1 * step, step + 1e-3):
        # three roundings of each entry, and the roundings of the sum; a tiny product rounds to a subnormal number
        size = frobenius(weight) + max(step, other) * frobenius(direction)
        slack = (3 + weight.size / 2) * limits.eps * size + weight.size * limits.smallest_subnormal
        assert error <= frobenius(weight - other * direction) + slack


def test_best_step_of_a_zero_direction_is_zero():
    assert best_step(np.ones((2, 2)), np.zeros((2, 2))) == 0
    assert fast_best_step(torch.ones(2, 2), torch.zeros(2, 2)) == 0


@given(weights())
def test_sign_of_zero_is_plus_one_in_both(weight):
    weight = np.where(np.abs(weight) < np.median(np.abs(weight)), -0.0, weight)
    signs = ref.sign(weight)
    assert (signs[weight == 0] == 1).all()
    assert_same(fast.sign(torch.from_numpy(weight.copy())), signs)


def well_separated(m, n, seed):
    """Make a float64 matrix with distinct singular values whose factors have no entry near zero.

    Only then two decompositions must find the same signs of singular vectors.
    """
    rng = np.random.default_rng(seed)
    k = min(m, n)
    u, _ = np.linalg.qr(rng.standard_normal((m, k)))
    v, _ = np.linalg.qr(rng.standard_normal((n, k)))
    return (u * 0.7 ** np.arange(k)) @ v.T


@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 2**32 - 1))
def test_compensate_agrees_and_batches(m, n, seed):
    matrices = np.stack([well_separated(m, n, seed + at) for at in range(3)])
    paths = fast.compensate(torch.from_numpy(matrices), [1, 1])

    def both_paths(matrix):
        return np.stack([path.to_dense() for path in ref.compensate(matrix, [1, 1])])

    for at, matrix in enumerate(matrices):
        actual = torch.stack([path.to_dense()[at] for path in paths])
        assert_within(actual, both_paths(matrix), condition(both_paths, matrix), compensate_roundings(m, n, paths=2))


@pytest.mark.parametrize("decompose", [ref.dual_svid, lambda w, r: fast.dual_svid(torch.from_numpy(w), r)])
def test_dual_svid_refuses_bad_input(decompose):
    weight = np.ones((3, 4))
    for rank in (0, 4):
        with pytest.raises(ValueError, match=f"rank {rank} is out of range for a 3 x 4 matrix; choose 1 to 3"):
            decompose(weight, rank)
    for bad in (np.nan, np.inf):
        with pytest.raises(ValueError, match="NaN or infinity"):
            decompose(np.where(np.eye(3, 4) > 0, bad, weight), 1)
    with pytest.raises(ValueError, match="must be a matrix"):
        decompose(weight[0], 1)


@given(st.integers(8, 14), st.integers(8, 14), st.integers(0, 2**32 - 1))
def test_dual_svid_with_a_sketch_of_the_whole_range_is_exact(m, n, seed):
    """A sketch of as many columns as the weight has rank finds its range, and so the same singular vectors."""
    rng, rank = np.random.default_rng(seed), 3
    left, right = (np.linalg.qr(rng.standard_normal((size, rank)))[0] for size in (m, n))
    weight = (left * 0.7 ** np.arange(rank)) @ right.T
    sketch = rng.standard_normal((n, rank + 2))

    def dense(matrix):
        return ref.dual_svid(matrix, rank, sketch).to_dense()

    moved = condition(dense, weight)
    terms = dual_svid_roundings(m, n) + 2 * LAPACK * max(m, n)  # the QR and the products of the range finder
    sketched = fast.dual_svid(torch.from_numpy(weight), rank, torch.from_numpy(sketch)).to_dense()
    assert_within(sketched, dense(weight), moved, terms)
    assert_within(ref.dual_svid(weight, rank).to_dense(), dense(weight), moved, terms)
