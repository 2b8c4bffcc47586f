"""Test Joint-ITQ and latent-binary ADMM: laws, agreement of the backends, and which initializer wins on an LLM."""

import importlib
import json
from functools import partial
from pathlib import Path

import littlebit.fast as fast
import littlebit.reference as ref
import numpy as np
import pytest
import torch
from compare import assert_same, assert_within
from hypothesis import given, strategies as st
from littlebit.conformance.strategies import condition, weights
from test_factorise import LAPACK, compensate_roundings, dual_svid_roundings, frobenius, in_magnitude, well_separated

# modules, not the functions of the same names that the packages export
radmm, fadmm = (importlib.import_module(f"littlebit.{package}.admm") for package in ("reference", "fast"))
ralign, falign = (importlib.import_module(f"littlebit.{package}.alignment") for package in ("reference", "fast"))
balanced_factors = importlib.import_module("littlebit.reference.dual_svid").balanced_factors
fast_balanced_factors = importlib.import_module("littlebit.fast.dual_svid").balanced_factors
SPECTRA = json.loads((Path(__file__).parents[1] / "data").joinpath("smollm2_spectra.json").read_text())["layers"]


EPS = np.finfo(np.float64).eps


def rotation_of(size, seed):
    return ralign.random_rotation(np.random.default_rng(seed).standard_normal((size, size)))


@given(st.integers(1, 20), st.integers(0, 2**32 - 1))
def test_random_rotation_is_orthogonal(size, seed):
    rotation = rotation_of(size, seed)
    assert_within(rotation.T @ rotation, np.eye(size), np.ones((size, size)), terms=LAPACK * size)


@given(weights(largest=16), st.integers(0, 2**32 - 1))
def test_rotation_leaves_the_product_unchanged(weight, seed):
    """But for two products with the rotation, each of rank terms, and its own distance from orthogonality."""
    rank = min(weight.shape)
    u, v = balanced_factors(weight, rank)
    rotation = rotation_of(rank, seed)
    magnitude = np.abs(u) @ np.abs(rotation) @ np.abs(rotation).T @ np.abs(v).T
    assert_within((u @ rotation) @ (v @ rotation).T, u @ v.T, magnitude, terms=(2 + LAPACK) * rank)


@given(st.integers(2, 20), st.integers(1, 8), st.integers(0, 2**32 - 1))
def test_joint_itq_keeps_the_rotation_orthogonal_and_improves(n, rank, seed):
    """Sum |Z R| falls at most by the rounding of the sum and of the rotation.

    A rotation is the product of two factors of an SVD, so it is orthogonal within 2 LAPACK rank eps.
    """
    z = np.random.default_rng(seed).standard_normal((n, rank))
    start = rotation_of(rank, seed)
    agreement = np.abs(z @ start).sum()
    for steps in (1, 3, 10):
        rotation = ralign.joint_itq(z, start, steps)
        assert_within(rotation.T @ rotation, np.eye(rank), np.ones((rank, rank)), terms=2 * LAPACK * rank)
        now = np.abs(z @ rotation).sum()
        assert now >= agreement - 2 * (n * rank + (2 * LAPACK + 1) * rank) * EPS * (np.abs(z) @ np.abs(rotation)).sum()
        agreement = now


@st.composite
def with_a_polar_factor(draw):
    """Draw Z (n, rank) and a rotation R so that a step of Joint-ITQ has one result: sign(Z R)^T Z has full rank.

    Z R = D S E, with signs S of full rank and positive diagonal matrices D and E, has the signs S and no zeros.
    """
    rank = draw(st.integers(1, 8))
    n, seed = draw(st.integers(rank, 20)), draw(st.integers(0, 2**32 - 1))
    rng, start = np.random.default_rng(seed), rotation_of(rank, seed)
    regular = np.tril(-2 * np.ones((rank, rank)), -1) + 1  # its inverse has a norm of at most 1
    signs = rng.permutation(np.concatenate([regular, rng.choice([-1.0, 1.0], (n - rank, rank))]))
    z = (rng.uniform(0.5, 2, (n, 1)) * signs * rng.uniform(0.5, 2, rank)) @ start.T
    return z, start, signs, np.linalg.svd(signs.T @ z, compute_uv=False)[-1]


@given(with_a_polar_factor())
def test_joint_itq_agrees(problem):
    """The polar factor of M moves by at most 2 |E|_F / (smallest singular value of M) if M is off by E (Higham, 8.9).

    M = S^T Z is off by the rounding of its sums, and an SVD by its backward error, in both packages.
    """
    z, start, signs, smallest = problem
    actual = falign.joint_itq(torch.from_numpy(z), torch.from_numpy(start), 1)
    expected = ralign.joint_itq(z, start, 1)
    (n, rank), product = z.shape, signs.T @ z
    sums = n * np.linalg.norm(np.abs(signs).T @ np.abs(z))
    moved = 2 * (sums + LAPACK * rank * np.linalg.norm(product)) / smallest + LAPACK * rank
    assert_within(actual, expected, np.full(expected.shape, moved), terms=1)


@given(weights(largest=12), st.floats(0, 1), st.integers(0, 2**32 - 1))
def test_refit_scales_never_increases_the_error(weight, fraction, seed):
    """But for the rounding of the dense weights that the errors are measured with, before and after."""
    weight = weight / (np.abs(weight).max() or 1.0)
    rank = 1 + int(fraction * (min(weight.shape) - 1))
    rng = np.random.default_rng(seed)
    shapes = ((weight.shape[0], rank), (weight.shape[1], rank), weight.shape[:1], (rank,), weight.shape[1:])
    factors = ref.Factors(*(rng.standard_normal(shape) for shape in shapes))
    for refit in (radmm.refit_ell, radmm.refit_h, radmm.refit_g):
        before, sizes = frobenius(weight - factors.to_dense()), [in_magnitude(factors)]
        factors = refit(weight, factors)
        sizes.append(in_magnitude(factors))
        slack = (rank + 4 + weight.size / 2) * EPS * (2 * frobenius(weight) + sum(map(frobenius, sizes)))
        assert frobenius(weight - factors.to_dense()) <= before + slack


@given(weights(largest=12), st.floats(0, 1), st.integers(0, 2**32 - 1))
def test_refit_scales_agrees(weight, fraction, seed):
    weight = weight / (np.abs(weight).max() or 1.0)
    rank = 1 + int(fraction * (min(weight.shape) - 1))
    rng = np.random.default_rng(seed)
    shapes = ((weight.shape[0], rank), (weight.shape[1], rank), weight.shape[:1], (rank,), weight.shape[1:])
    arrays = [rng.standard_normal(shape) for shape in shapes]
    operations = solve_roundings(*weight.shape, rank)
    for name, scale in (("refit_h", "h"), ("refit_g", "g")):

        def refit(w, *rest, name=name, scale=scale):
            return getattr(getattr(radmm, name)(w, ref.Factors(*rest)), scale)

        expected = getattr(radmm, name)(weight, ref.Factors(*arrays))
        actual = getattr(fadmm, name)(torch.from_numpy(weight), fast.Factors(*map(torch.from_numpy, arrays)))
        magnitude = condition(refit, weight, *arrays)
        assert_within(getattr(actual, scale), getattr(expected, scale), magnitude, operations)
        for other in set(expected._fields) - {scale}:
            assert_same(getattr(actual, other), getattr(expected, other))


@st.composite
def well_conditioned_factors(draw):
    """Draw a weight, and factors whose columns of signs are orthogonal over their first eight rows.

    With scales from a half to two the equations for ell then have a condition number of at most some thousands.
    """
    m, n, rank = draw(st.integers(8, 14)), draw(st.integers(8, 14)), draw(st.integers(1, 4))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    hadamard = np.array([[1.0]])
    for _ in range(3):
        hadamard = np.block([[hadamard, hadamard], [hadamard, -hadamard]])

    def latents(size):
        signs = np.concatenate([hadamard[:, rng.permutation(8)[:rank]], rng.choice([-1.0, 1.0], (size - 8, rank))])
        return signs * rng.uniform(0.1, 1, (size, rank))

    scales = [rng.uniform(0.5, 2, size) for size in (m, rank, n)]
    return rng.standard_normal((m, n)), [latents(m), latents(n), *scales]


@given(well_conditioned_factors())
def test_refit_ell_agrees_and_is_stationary(problem):
    """The equations G ell = b are off by the rounding of sums over the weight, and of a dense weight before and after.

    Their solution is off by no more than |G^-1| times that.
    """
    weight, arrays = problem
    m, n, rank = *weight.shape, len(arrays[3])
    factors = ref.Factors(*arrays)
    fitted = radmm.refit_ell(weight, factors)
    sums = np.abs(weight) + in_magnitude(factors) + in_magnitude(fitted)
    moved = np.abs(np.linalg.inv(system_of(factors))).sum(axis=1) * (factors.h @ sums @ factors.g)
    terms = m + n + 17 * rank + 8  # the ridge is 16 rank eps
    assert_within(radmm.refit_ell(weight, fitted).ell, fitted.ell, moved, terms)
    actual = fadmm.refit_ell(torch.from_numpy(weight), fast.Factors(*map(torch.from_numpy, arrays)))
    assert_within(actual.ell, fitted.ell, moved, terms)


def system_of(factors):
    """Compute the matrix G of the equations for ell; scales are positive."""
    u, v = factors.h[:, None] * factors.u_sign, factors.g[:, None] * factors.v_sign
    return (u.T @ u) * (v.T @ v)


def solve_roundings(m, n, rank):
    """Count the roundings of a least-squares solve: two products, a Cholesky and two substitutions, and norms."""
    return 4 * (m + n + rank)


def admm_roundings(m, n, rank, steps, sweeps):
    """Count the roundings of ADMM: an SVD, two solves a step, and three solves a sweep over the scales."""
    return LAPACK * max(m, n) + (2 * steps + 3 * sweeps) * solve_roundings(m, n, rank)


@given(st.integers(2, 10), st.integers(2, 10), st.integers(0, 2**32 - 1))
def test_solve_factor_agrees_and_minimises(m, n, seed):
    rng = np.random.default_rng(seed)
    rank = min(m, n)
    target, fixed, pull = (rng.standard_normal(shape) for shape in ((m, n), (n, rank), (m, rank)))
    rho = 0.5
    solution = radmm.solve_factor(target, fixed, pull, rho)
    x = fixed / np.sqrt((fixed**2).sum(0))

    def objective(a):
        return ((target - a @ x.T) ** 2).sum() + rho * ((a - pull) ** 2).sum() + radmm.RIDGE * (a**2).sum()

    for _ in range(5):
        assert objective(solution) <= objective(solution + 1e-3 * rng.standard_normal(solution.shape))
    actual = fadmm.solve_factor(*map(torch.from_numpy, (target, fixed, pull)), rho)
    moved = condition(lambda *arrays: radmm.solve_factor(*arrays, rho), target, fixed, pull)
    assert_within(actual, solution, moved, terms=solve_roundings(m, n, rank))


@given(st.integers(2, 10), st.integers(2, 10), st.integers(0, 2**32 - 1))
def test_admm_agrees_over_its_first_steps(m, n, seed):
    weight = well_separated(m, n, seed)
    rank = max(1, min(m, n) // 2)

    def dense(w):
        return radmm.admm(w, rank, steps=2, sweeps=1).to_dense()

    actual = fadmm.admm(torch.from_numpy(weight), rank, steps=2, sweeps=1)
    terms = admm_roundings(m, n, rank, steps=2, sweeps=1)
    assert_within(actual.to_dense(), dense(weight), condition(dense, weight), terms)


@given(st.integers(2, 10), st.integers(2, 10), st.integers(0, 2**32 - 1))
def test_itq_agrees_over_its_first_steps(m, n, seed):
    weight = well_separated(m, n, seed)
    rank = max(1, min(m, n) // 2)
    start = rotation_of(rank, seed)

    def dense(w):
        return ralign.itq(w, rank, start, steps=2).to_dense()

    u, theirs = balanced_factors(weight, rank)[0], fast_balanced_factors(torch.from_numpy(weight), rank)[0].numpy()
    flip = np.where((u * theirs).sum(axis=0) < 0, -1.0, 1.0)  # singular vectors are unique up to a common sign
    actual = falign.itq(torch.from_numpy(weight), rank, torch.from_numpy(flip[:, None] * start), steps=2)
    terms = LAPACK * max(m, n) + 2 * (m + n + LAPACK * rank) + dual_svid_roundings(m, n)
    assert_within(actual.to_dense(), dense(weight), condition(dense, weight), terms)


@pytest.mark.parametrize("name", ["admm", "itq"])
def test_batched_initialisers_equal_single_ones(name):
    rotation = rotation_of(3, 0)
    ways = {
        "admm": (lambda w: fadmm.admm(w, 3, steps=20), lambda w: radmm.admm(w, 3, steps=20).to_dense()),
        "itq": (
            lambda w: falign.itq(w, 3, torch.from_numpy(rotation), steps=20),
            lambda w: ralign.itq(w, 3, rotation, steps=20).to_dense(),
        ),
    }
    initialise, reference = ways[name]
    batch = np.stack([well_separated(9, 7, seed) for seed in range(3)])
    together = initialise(torch.from_numpy(batch)).to_dense()
    for at, weight in enumerate(batch):
        alone = initialise(torch.from_numpy(weight)).to_dense()
        assert_within(together[at], alone, condition(reference, weight), admm_roundings(9, 7, 3, steps=20, sweeps=3))


@given(st.lists(st.floats(0, 1e30), min_size=1, max_size=20), st.floats(0, 1))
def test_importance_has_mean_one_and_agrees(moments, shrink):
    array = np.array(moments)
    expected = radmm.importance(array, shrink)
    assert (expected >= shrink).all()  # A sum of non-negative numbers rounds to no less than either.
    terms = len(array) + 5  # the mean, and five more operations
    assert_within(expected.mean(keepdims=True), np.ones(1), np.ones(1), terms + len(array))
    assert_within(fadmm.importance(torch.from_numpy(array), shrink), expected, expected, terms)


@pytest.mark.parametrize(("module", "convert"), [(radmm, np.array), (fadmm, torch.tensor)])
def test_importance_refuses_bad_input(module, convert):
    with pytest.raises(ValueError, match="shrink must be between 0 and 1"):
        module.importance(convert([1.0]), 1.5)
    for bad in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="finite and non-negative"):
            module.importance(convert([1.0, bad]))


def weighted_error(weight, paths, row, column):
    rest = weight - sum(path.to_dense() for path in paths)
    return frobenius(np.sqrt(row)[:, None] * rest * np.sqrt(column))


@given(st.integers(2, 10), st.integers(2, 10), st.integers(0, 2**32 - 1))
def test_compensate_weighted_lowers_the_weighted_error_and_agrees(m, n, seed):
    rng = np.random.default_rng(seed)
    weight, row, column = well_separated(m, n, seed), rng.uniform(0.1, 3, m), rng.uniform(0.1, 3, n)
    one = ref.compensate_weighted(weight, [1], row, column)
    two = ref.compensate_weighted(weight, [1, 1], row, column)
    start, first, second = (weighted_error(weight, paths, row, column) for paths in ([], one, two))
    sizes = [frobenius(np.sqrt(row)[:, None] * in_magnitude(path) * np.sqrt(column)) for path in two]
    roundings = (8 + m * n / 2) * EPS  # eight for each entry of a dense path of rank 1 and its weights, and the norm
    assert first <= start + roundings * (2 * start + sizes[0])
    assert second <= first + roundings * (2 * start + sum(sizes))

    def dense(*arrays):
        return ref.compensate_weighted(arrays[0], [1, 1], *arrays[1:])[1].to_dense()

    as_tensors = [torch.from_numpy(array) for array in (weight, row, column)]
    actual = fast.compensate_weighted(as_tensors[0], [1, 1], *as_tensors[1:])
    magnitude = condition(dense, weight, row, column)
    assert_within(actual[1].to_dense(), dense(weight, row, column), magnitude, compensate_roundings(m, n, paths=2))


def test_compensate_weighted_with_equal_weights_is_compensate():
    weight = well_separated(8, 6, 0)
    plain, weighted = ref.compensate(weight, [2, 2]), ref.compensate_weighted(weight, [2, 2], np.ones(8), np.ones(6))
    for mine, theirs in zip(weighted, plain, strict=True):
        for left, right in zip(mine, theirs, strict=True):
            assert_same(left, right)


@pytest.mark.parametrize(("module", "convert"), [(ref, np.asarray), (fast, torch.from_numpy)])
@pytest.mark.parametrize("wrong", [0.0, -1.5, np.nan])
def test_compensate_weighted_refuses_weights_that_are_not_positive(module, convert, wrong):
    weight, ones, some = (convert(array) for array in (np.ones((2, 2)), np.ones(2), np.array([1.0, wrong])))
    for row, column in ((some, ones), (ones, some)):
        with pytest.raises(ValueError, match=f"must be positive, but the smallest is {wrong:g}; shrink them"):
            module.compensate_weighted(weight, [1], row, column)


def llm_like(name, seed=0):
    """Make a float32 weight with the singular values of a layer of SmolLM2 and random singular vectors."""
    shape, values = SPECTRA[name]["shape"], np.array(SPECTRA[name]["singular_values"])
    rng = np.random.default_rng(seed)
    u, v = (np.linalg.qr(rng.standard_normal((size, len(values))))[0] for size in shape)
    return (u * values @ v.T).astype(np.float32), rng


def errors_of(weight, rank, rng, module, initialisers, convert):
    """Compute the relative errors of Dual-SVID, ITQ and ADMM with two paths of the same rank."""
    dual_svid, itq, admm = initialisers
    rotation = convert(rotation_of(rank, 1).astype(np.float32))
    sketch = convert(rng.standard_normal((weight.shape[1], rank + 16)).astype(np.float32))
    ways = (
        partial(dual_svid, sketch=sketch),
        partial(itq, rotation=rotation, sketch=sketch, steps=20),
        partial(admm, sketch=sketch, steps=100),
    )
    dense = (
        [np.asarray(path.to_dense()) for path in module.compensate(convert(weight), [rank, rank], way)] for way in ways
    )
    return [np.linalg.norm(weight - sum(paths)) / np.linalg.norm(weight) for paths in dense]


@pytest.mark.parametrize("name", SPECTRA)
def test_admm_beats_itq_beats_dual_svid_on_llm_spectra(name):
    weight, rng = llm_like(name)
    rank = ref.rank_for_bits(*weight.shape, 0.55)
    initialisers = fast.dual_svid, falign.itq, fadmm.admm
    dual_svid, itq, admm = errors_of(weight, rank, rng, fast, initialisers, torch.from_numpy)
    assert admm < itq < dual_svid < 1


def test_admm_beats_itq_beats_dual_svid_in_the_reference():
    weight, rng = llm_like("model.layers.14.self_attn.k_proj")
    rank = ref.rank_for_bits(*weight.shape, 0.55)
    initialisers = ref.dual_svid, ralign.itq, radmm.admm
    dual_svid, itq, admm = errors_of(weight, rank, rng, ref, initialisers, np.asarray)
    assert admm < itq < dual_svid < 1
