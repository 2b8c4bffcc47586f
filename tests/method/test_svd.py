"""Compare the SVD from scratch with numpy.linalg.svd, and test the approximations that use it.

All SVDs have the bound ERROR * max(m, n) * eps * ||A||_F. Householder reflections and Givens rotations are backward
stable: u diag(s) v^T is A + E with ||E||_F <= p(m, n) eps ||A||_F, p a polynomial of low degree (Higham, Accuracy and
Stability of Numerical Algorithms, Lemma 19.3). Each row and column passes through at most n reflections and about 2 n
sweeps of rotations, a few roundings each. So p grows with max(m, n) if the roundings add up, and with its root if they
average out. Singular values move by at most ||E||_F in the Euclidean norm (Mirsky, 1960), and u^T u - 1 has the size of
E for ||A||_F = 1. The largest constant in 30 000 random draws from the tests below was 4.2; ERROR is nearly twice that.
"""

import importlib

import littlebit.fast as fast
import littlebit.reference as ref
import numpy as np
import pytest
import torch
from compare import assert_same, assert_within
from hypothesis import given, strategies as st
from littlebit.conformance.strategies import weights
from littlebit.reference.svd import bidiagonalize, diagonalize, givens, orthonormal, range_finder, rank_one

ERROR = 8
DTYPES = pytest.mark.parametrize("dtype", [np.float32, np.float64])


def assert_small(error, magnitude, dtype, terms):
    """Assert that the Frobenius norm of an error is within ERROR * terms * eps * magnitude, with eps of the dtype."""
    assert_within(np.linalg.norm(error).astype(dtype), np.zeros(()), np.asarray(magnitude), terms, factor=ERROR)


def assert_orthonormal(columns):
    wide = columns.astype(np.float64)
    assert_small(wide.T @ wide - np.eye(wide.shape[1]), 1.0, columns.dtype, max(wide.shape))


def assert_svd(matrix, u, s, v):
    """Assert that (u, s, v) is a thin SVD of the matrix, with the singular values of numpy.linalg.svd."""
    (m, n), k = matrix.shape, min(matrix.shape)
    assert (u.shape, s.shape, v.shape) == ((m, k), (k,), (n, k))
    assert u.dtype == s.dtype == v.dtype == matrix.dtype
    assert (s >= 0).all()
    assert (np.diff(s) <= 0).all()
    assert_orthonormal(u)
    assert_orthonormal(v)
    wide, size = matrix.astype(np.float64), np.linalg.norm(matrix.astype(np.float64))
    assert_small(wide - u.astype(np.float64) * s @ v.T.astype(np.float64), size, matrix.dtype, max(m, n))
    assert_small(s - np.linalg.svd(wide, compute_uv=False), size, matrix.dtype, max(m, n))


def with_values(rng, m, n, values):
    """Make a matrix with the given min(m, n) singular values and random singular vectors."""
    u, _ = np.linalg.qr(rng.standard_normal((m, len(values))))
    v, _ = np.linalg.qr(rng.standard_normal((n, len(values))))
    return u * values @ v.T


def low_rank(rng, m, n):
    rank = rng.integers(1, min(m, n) + 1)
    return rng.standard_normal((m, rank)) @ rng.standard_normal((rank, n))


def bidiagonal(rng, m, n, diagonal, beyond):
    return np.eye(m, n) * rng.choice(diagonal, (m, n)) + np.eye(m, n, k=1) * rng.choice(beyond, (m, n))


KINDS = {
    "random": lambda rng, m, n: rng.standard_normal((m, n)),
    "graded": lambda rng, m, n: rng.standard_normal((m, n)) * 10 ** rng.uniform(-15, 0, (m, n)),
    "graded rows": lambda rng, m, n: rng.standard_normal((m, n)) * np.logspace(-15, 0, m)[:, None],
    "graded columns": lambda rng, m, n: rng.standard_normal((m, n)) * np.logspace(0, -15, n),
    "vanishing": lambda rng, m, n: rng.standard_normal((m, n)) * 10 ** rng.uniform(-300, 0, (m, n)),
    "low rank": low_rank,
    "repeated": lambda rng, m, n: with_values(rng, m, n, rng.choice([1, 0.5, 0.25], min(m, n))),
    "clustered": lambda rng, m, n: with_values(rng, m, n, 1 + rng.choice([0, 1e-15, 1e-12, 1e-8], min(m, n))),
    "halving": lambda rng, m, n: with_values(rng, m, n, 2.0 ** -np.arange(min(m, n))),
    "integers": lambda rng, m, n: rng.integers(-1, 2, (m, n)),
    "signs": lambda rng, m, n: rng.choice([-1, 1], (m, n)),
    "bidiagonal with zeros": lambda rng, m, n: bidiagonal(rng, m, n, [0, 0, 1, -2], [1, 3]),
    "bidiagonal with gaps": lambda rng, m, n: bidiagonal(rng, m, n, [0, 1, 2], [0, 1, 1e-8, 1e-16]),
    "shift": lambda _, m, n: np.eye(m, n, k=1),
    "triangle": lambda _, m, n: np.eye(m, n) - np.triu(np.ones((m, n)), 1),
    "hilbert": lambda _, m, n: 1 / (1 + np.add.outer(np.arange(m), np.arange(n))),
}
SIZES = st.integers(1, 20)
SEEDS = st.integers(0, 2**32 - 1)


@DTYPES
@pytest.mark.parametrize("kind", KINDS)
@given(m=SIZES, n=SIZES, seed=SEEDS)
def test_svd_is_a_singular_value_decomposition(kind, dtype, m, n, seed):
    matrix = KINDS[kind](np.random.default_rng(seed), m, n).astype(dtype)
    assert_svd(matrix, *ref.svd(matrix))


@DTYPES
@given(n=SIZES, seed=SEEDS)
def test_svd_of_one_row_or_column_is_its_norm(dtype, n, seed):
    row = np.random.default_rng(seed).standard_normal((1, n)).astype(dtype)
    assert_svd(row, *ref.svd(row))
    assert_svd(row.T, *ref.svd(row.T))


@DTYPES
@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (7, 1), (5, 5), (4, 6), (6, 4)])
def test_svd_of_zero_and_identity_is_exact(dtype, shape):
    for matrix in (np.zeros(shape, dtype), np.eye(*shape, dtype=dtype), -np.eye(*shape, dtype=dtype)):
        u, s, v = ref.svd(matrix)
        assert_svd(matrix, u, s, v)
        assert_same(u * s @ v.T, matrix)
        assert_same(s, np.full(min(shape), np.abs(matrix).max()))


@DTYPES
@given(n=SIZES, seed=SEEDS)
def test_svd_of_a_diagonal_matrix_is_exact(dtype, n, seed):
    rng = np.random.default_rng(seed)
    values = (rng.choice([-1, 1], n) * 10 ** rng.uniform(-30, 0, n)).astype(dtype)
    u, s, v = ref.svd(np.diag(values))
    assert_same(s, np.sort(np.abs(values))[::-1])
    assert_same(u * s @ v.T, np.diag(values))


@DTYPES
@given(m=SIZES, n=SIZES, seed=SEEDS)
def test_svd_scales_exactly_by_powers_of_two(dtype, m, n, seed):
    matrix = np.random.default_rng(seed).integers(-99, 100, (m, n)).astype(dtype)
    limits = np.finfo(dtype)
    u, s, v = ref.svd(matrix)
    for exponent in (limits.maxexp - 16, limits.minexp, limits.minexp - limits.nmant):
        scaled_u, scaled_s, scaled_v = ref.svd(np.ldexp(matrix, exponent))
        assert_same(scaled_u, u)
        assert_same(scaled_s, np.ldexp(s, exponent))
        assert_same(scaled_v, v)


@pytest.mark.parametrize("scale", [1e300, 1e-300, 1e-310, 1e-320])
def test_svd_of_huge_and_denormal_matrices_keeps_orthogonality(scale, rng):
    matrix = rng.standard_normal((9, 6)) * scale
    u, s, v = ref.svd(matrix)
    assert_orthonormal(u)
    assert_orthonormal(v)
    _, exponent = np.frexp(np.abs(matrix).max())
    exact = np.linalg.svd(np.ldexp(matrix, -exponent), compute_uv=False)
    lost = np.ldexp(np.finfo(np.float64).smallest_subnormal, -exponent)  # rounding of subnormal singular values
    assert np.linalg.norm(np.ldexp(s, -exponent) - exact) <= ERROR * 9 * 2.0**-52 * np.linalg.norm(exact) + 6 * lost


@DTYPES
@given(m=SIZES, n=SIZES, seed=SEEDS)
def test_svd_reads_any_layout(dtype, m, n, seed):
    base = np.random.default_rng(seed).standard_normal((2 * m, 3 * n)).astype(dtype)
    base.setflags(write=False)
    for matrix in (base[::2, ::3], base[::2, ::3].T, base[::-2, ::-3], base[:m, :n], np.asfortranarray(base[:m, :n])):
        assert_svd(matrix, *ref.svd(matrix))


@given(weights(largest=20))
def test_svd_agrees(weight):
    scaled = weight / (np.abs(weight).max() or 1)
    factors = fast.svd(torch.from_numpy(scaled))
    assert_svd(scaled, *(factor.numpy() for factor in factors))
    assert_svd(scaled, *ref.svd(scaled))


@DTYPES
def test_svd_of_a_batch_in_torch(dtype, rng):
    matrices = rng.standard_normal((2, 3, 4, 6)).astype(dtype)
    u, s, v = fast.svd(torch.from_numpy(matrices))
    for at in np.ndindex(2, 3):
        assert_svd(matrices[at], u[at].numpy(), s[at].numpy(), v[at].numpy())


@pytest.mark.parametrize("svd", [ref.svd, lambda matrix: fast.svd(torch.from_numpy(matrix))], ids=["reference", "fast"])
def test_svd_refuses_bad_input(svd):
    for bad in (np.nan, np.inf):
        with pytest.raises(ValueError, match="NaN or infinity"):
            svd(np.full((2, 3), bad))
    with pytest.raises(ValueError, match="must be a matrix"):
        svd(np.ones(3))
    with pytest.raises(ValueError, match="0 x 3 matrix"):
        svd(np.ones((0, 3)))


@DTYPES
@pytest.mark.parametrize("factor", [0.5, 1.0, 1.5, 2.0, 4.0, 8.0, 15.0])
def test_diagonalise_drops_no_entry_above_the_rounding(dtype, factor):
    """[[1, e], [0, 1]] has the singular values 1 + e / 2 and 1 - e / 2, but for e^2 / 8: dropped, e leaves 1 and 1.

    Entries up to eps times the largest of both diagonals, which are 1 and e, together may be dropped.
    """
    eps = np.finfo(dtype).eps
    e = dtype(factor * eps)
    _, s, _ = diagonalize(np.ones(2, dtype), np.array([e]))
    if factor <= 1:
        assert_same(s, np.ones(2, dtype))
    else:
        assert_within(
            s[:1] - s[1:], np.array([e]), np.array([1.0]), terms=1, factor=1
        )  # s is known to half an ulp each
        assert s[0] > s[1]


@DTYPES
@pytest.mark.parametrize("ratio", [0.3, 0.5, 0.6, 0.7])
def test_rank_one_goes_on_until_it_stands_still(dtype, ratio):
    """Another step, in more precision, moves the right vector by no more than its rounding and the last step's."""
    angles = np.radians([40.0, 50.0])  # left and right singular vectors differ, so that the row sums are no solution
    first, second = np.array([np.sin(angles), np.cos(angles)]), np.array([np.cos(angles), -np.sin(angles)])
    matrix = (np.outer(first[:, 0], first[:, 1]) + ratio * np.outer(second[:, 0], second[:, 1])).astype(dtype)
    assert (matrix >= 0).all()
    _, right = rank_one(matrix)
    wide, unit = matrix.astype(np.longdouble), right.astype(np.longdouble)
    unit /= np.sqrt(unit @ unit)
    again = wide.T @ (wide @ unit)
    again /= np.sqrt(again @ again)
    # the last step moved it by eps at most and this one by less; each entry of `right` is off by 3 roundings
    assert np.abs(again - unit).max() <= 4 * np.finfo(dtype).eps


def test_svd_raises_when_it_does_not_converge(monkeypatch, rng):
    monkeypatch.setattr(importlib.import_module("littlebit.reference.svd"), "STEPS_PER_VALUE", 1)
    with pytest.raises(ArithmeticError, match="must converge in"):
        ref.svd(rng.standard_normal((9, 9)))


WRONG = {
    "u off": lambda u, s, v: (u + 1e-12, s, v),
    "v off": lambda u, s, v: (u, s, v + 1e-12),
    "a value off": lambda u, s, v: (u, s * (1 + 1e-12), v),
    "signs": lambda u, s, v: (-u, s, v),
    "negative": lambda u, s, v: (-u, -s, v),
    "ascending": lambda u, s, v: (u[:, ::-1], s[::-1], v[:, ::-1]),
    "NaN": lambda u, s, v: (u, s, v * np.nan),
    "rank": lambda u, s, v: (u[:, :2], s[:2], v[:, :2]),
    "v transposed": lambda u, s, v: (u, s, v.T),
    "dtype": lambda u, s, v: (u, s.astype(np.float32), v),
}


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
def test_assert_svd_fails_on_wrong_input(wrong, rng):
    matrix = rng.standard_normal((5, 3))
    with pytest.raises(AssertionError):
        assert_svd(matrix, *wrong(*ref.svd(matrix)))


@DTYPES
@given(m=SIZES, n=SIZES, seed=SEEDS)
def test_bidiagonalize_is_an_orthogonal_transformation(dtype, m, n, seed):
    matrix = np.random.default_rng(seed).standard_normal((max(m, n), n)).astype(dtype)
    q, d, e, p = bidiagonalize(matrix)
    assert_orthonormal(q)
    assert_orthonormal(p)
    product = q.astype(np.float64) @ (np.diag(d) + np.diag(e, 1)) @ p.T.astype(np.float64)
    assert_small(matrix - product, np.linalg.norm(matrix), dtype, max(m, n))


@DTYPES
@given(f=st.floats(-1, 1), g=st.floats(-1, 1))
def test_givens_clears_the_second_entry(dtype, f, g):
    f, g = dtype(f), dtype(g)
    c, s, r = givens(f, g)
    assert c.dtype == s.dtype == r.dtype == dtype
    if max(abs(f), abs(g)) >= np.finfo(dtype).tiny:
        assert_within(c * c + s * s, np.ones(()), np.ones(()), terms=4)
    assert_within(c * f + s * g, r, abs(r), terms=4)
    assert_within(c * g - s * f, np.zeros(()), abs(r), terms=4)


@DTYPES
def test_givens_of_zeros_is_the_identity(dtype):
    assert givens(dtype(0), dtype(0)) == (1, 0, 0)


@DTYPES
@given(m=SIZES, n=SIZES, seed=SEEDS)
def test_orthonormal_spans_the_columns(dtype, m, n, seed):
    matrix = low_rank(np.random.default_rng(seed), m, n).astype(dtype)
    basis = orthonormal(matrix)
    assert basis.shape == (m, min(m, n))
    assert basis.dtype == dtype
    assert_orthonormal(basis)
    wide = basis.astype(np.float64)
    assert_small(matrix - wide @ (wide.T @ matrix), np.linalg.norm(matrix), dtype, max(m, n))


@given(weights(largest=20), st.floats(0, 1))
def test_truncated_svd_is_the_head_of_the_svd(weight, fraction):
    rank = 1 + int(fraction * (min(weight.shape) - 1))
    u, s, v = ref.svd(weight)
    for actual, expected in zip(ref.truncated_svd(weight, rank), (u[:, :rank], s[:rank], v[:, :rank]), strict=True):
        assert_same(actual, expected)


def halving_with_sketch(m, n, seed, dtype):
    """Make a matrix with singular values 1, 1/2, 1/4, ... and a sketch of 12 columns.

    After four power steps the tangent of the angle between basis and singular vector i is at most (s_12 / s_i)^9
    ||Omega_2 Omega_1^-1|| (Saibaba, 2019). For i < 4 this is 2^-81 times a moderate number, which no dtype here
    resolves.
    """
    rng = np.random.default_rng(seed)
    matrix = with_values(rng, m, n, 2.0 ** -np.arange(min(m, n)))
    return matrix.astype(dtype), rng.standard_normal((n, 12)).astype(dtype)


@DTYPES
@given(m=st.integers(13, 20), n=st.integers(13, 20), rank=st.integers(1, 4), seed=SEEDS)
def test_truncated_svd_with_a_sketch_is_nearly_optimal(dtype, m, n, rank, seed):
    matrix, sketch = halving_with_sketch(m, n, seed, dtype)
    u, s, v = (factor.astype(np.float64) for factor in ref.truncated_svd(matrix, rank, sketch))
    best = np.linalg.norm(np.linalg.svd(matrix.astype(np.float64), compute_uv=False)[rank:])
    error = np.linalg.norm(matrix - u * s @ v.T)
    assert_small(max(error - best, 0), np.linalg.norm(matrix), dtype, max(m, n))


@DTYPES
@given(m=st.integers(13, 20), n=st.integers(13, 20), rank=st.integers(1, 4), seed=SEEDS)
def test_truncated_svd_with_a_sketch_agrees(dtype, m, n, rank, seed):
    matrix, sketch = halving_with_sketch(m, n, seed, dtype)
    u, s, v = ref.truncated_svd(matrix, rank, sketch)
    tensors = fast.truncated_svd(torch.from_numpy(matrix), rank, torch.from_numpy(sketch))
    other_u, other_s, other_v = (tensor.numpy() for tensor in tensors)
    assert (other_u.shape, other_s.shape, other_v.shape) == (u.shape, s.shape, v.shape)
    size = np.linalg.norm(matrix)
    sign = np.sign((u * other_u).sum(axis=0))  # singular vectors are unique up to a common sign
    gap = 2.0**-rank  # from the last value kept to the next; vectors move by error / gap (Wedin, 1972)
    assert_small(s - other_s, size, dtype, max(m, n))
    assert_small(u - sign * other_u, size / gap, dtype, max(m, n))
    assert_small(v - sign * other_v, size / gap, dtype, max(m, n))


@DTYPES
@given(m=st.integers(13, 20), n=st.integers(13, 20), seed=SEEDS)
def test_range_finder_is_an_orthonormal_basis(dtype, m, n, seed):
    matrix, sketch = halving_with_sketch(m, n, seed, dtype)
    basis = range_finder(matrix, sketch)
    assert basis.shape == (m, 12)
    assert basis.dtype == dtype
    assert_orthonormal(basis)


@pytest.mark.parametrize("sketched", [False, True])
def test_truncated_svd_refuses_bad_input(sketched):
    sketch = np.ones((4, 2)) if sketched else None
    for backend, array in ((ref, np.asarray), (fast, torch.asarray)):
        options = {} if sketch is None else {"sketch": array(sketch)}
        with pytest.raises(ValueError, match="rank 4 is out of range for a 3 x 4 matrix; choose 1 to 3"):
            backend.truncated_svd(array(np.ones((3, 4))), 4, **options)
        with pytest.raises(ValueError, match="NaN or infinity"):
            backend.truncated_svd(array(np.full((3, 4), np.nan)), 1, **options)
        with pytest.raises(ValueError, match="must be a matrix"):
            backend.truncated_svd(array(np.ones(4)), 1, **options)


def test_dual_svid_passes_the_sketch_on(rng):
    matrix, sketch = halving_with_sketch(16, 14, 0, np.float64)
    left, s, right = ref.truncated_svd(matrix, 3, sketch)
    factors = ref.dual_svid(matrix, 3, sketch)
    assert_same(factors.u, left * np.sqrt(s))
    assert_same(factors.v, right * np.sqrt(s))


@given(weights(largest=20))
def test_rank_one_is_non_negative_of_equal_norms(weight):
    matrix = np.abs(weight)
    left, right = ref.rank_one(matrix)
    assert (left.shape, right.shape) == (matrix[:, 0].shape, matrix[0].shape)
    assert left.dtype == right.dtype == matrix.dtype
    assert (left >= 0).all()
    assert (right >= 0).all()
    scale = max(left.max(), right.max()) or 1.0  # else squares of tiny entries would underflow
    norms = np.linalg.norm(left / scale), np.linalg.norm(right / scale)
    assert_within(norms[0], norms[1], norms[1], terms=sum(matrix.shape))


@DTYPES
@given(m=SIZES, n=SIZES, seed=SEEDS)
def test_rank_one_is_the_leading_triplet(dtype, m, n, seed):
    """Use entries in [1/2, 1]: then s_1 <= s_0 / 3, and a power step contracts by 1 / 9 (Birkhoff, 1957)."""
    matrix = np.random.default_rng(seed).uniform(0.5, 1, (m, n)).astype(dtype)
    u, s, vt = np.linalg.svd(matrix.astype(np.float64), full_matrices=False)
    left, right = ref.rank_one(matrix)
    assert_small(left - np.abs(u[:, 0]) * np.sqrt(s[0]), np.sqrt(s[0]), dtype, m + n)
    assert_small(right - np.abs(vt[0]) * np.sqrt(s[0]), np.sqrt(s[0]), dtype, m + n)
    for actual, expected in zip(fast.rank_one(torch.from_numpy(matrix)), (left, right), strict=True):
        assert_small(actual.numpy() - expected, np.sqrt(s[0]), dtype, m + n)


@DTYPES
def test_rank_one_of_zero_is_zero(dtype):
    left, right = ref.rank_one(np.zeros((3, 2), dtype))
    assert_same(left, np.zeros(3, dtype))
    assert_same(right, np.zeros(2, dtype))


@DTYPES
def test_rank_one_of_the_largest_entries_is_finite(dtype):
    """Test a matrix whose singular value overflows, though the root of that does not."""
    largest = np.finfo(dtype).max
    for left, right in (
        ref.rank_one(np.full((3, 2), largest, dtype)),
        map(np.asarray, fast.rank_one(torch.from_numpy(np.full((3, 2), largest, dtype)))),
    ):
        assert_within(
            left[:, None] / np.sqrt(largest) * (right / np.sqrt(largest)), np.ones((3, 2)), np.ones(1), terms=40
        )
