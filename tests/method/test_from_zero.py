"""The file that builds the method from zero gives what the packages give."""

import ast
from pathlib import Path

import littlebit.reference as ref
import numpy as np
import pytest
from compare import assert_same, assert_within
from littlebit.notebooks import littlebit_from_zero as zero
from littlebit.reference.distill import log_softmax

SOURCE = Path(zero.__file__)
RNG = np.random.default_rng(0)


def whole_paths(d_out, d_in, ranks):
    """Make paths of small whole numbers, for which all sums are exact."""
    shapes = [((d_out, rank), (d_in, rank), d_out, rank, d_in) for rank in ranks]
    return [zero.Factors(*(RNG.integers(-3, 4, size).astype(float) / 4 for size in each)) for each in shapes]


def test_file_is_short_and_needs_numpy_alone():
    source = SOURCE.read_text(encoding="utf-8")
    imported = {name for node in ast.walk(ast.parse(source)) for name in module_names(node)}
    assert imported == {"sys", "time", "pathlib", "pydoc_data", "typing", "numpy"}
    assert len(source.splitlines()) <= 200


def module_names(node):
    if isinstance(node, ast.ImportFrom):
        return [str(node.module).split(".")[0]]
    return [alias.name for alias in node.names] if isinstance(node, ast.Import) else []


def test_svd_agrees_with_the_reference():
    matrix = RNG.standard_normal((20, 12)) * 0.5 ** np.arange(12)
    u, s, v = zero.svd(matrix)
    assert_within(s, ref.svd(matrix)[1], s[0], terms=20)
    assert_within((u * s) @ v.T, matrix, s[0], terms=20)
    assert_within(u.T @ u, np.eye(12), 1.0, terms=20)


def test_paths_agree_with_the_reference():
    matrix = RNG.standard_normal((24, 16))
    for mine, theirs in zip(zero.compensate(matrix, [4, 4]), ref.compensate(matrix, [4, 4]), strict=True):
        for name in ("h", "ell", "g"):
            expected = getattr(theirs, name)
            # both power iterations stop early: what is left of the second singular value is below 1e-7 here
            assert_within(getattr(mine, name), expected, expected.max(), terms=24, slack=1e-7 * expected.max())
        columns = np.sign(mine.u[0] * theirs.u[0])  # a singular vector may point the other way
        assert_same(zero.sign(mine.u), ref.sign(theirs.u * columns))
        assert_same(zero.sign(mine.v), ref.sign(theirs.v * columns))


def test_layer_and_gradients_agree_with_the_reference():
    paths, x, dy = whole_paths(6, 8, (3, 5)), RNG.integers(-4, 5, (7, 8)) / 1.0, RNG.integers(-4, 5, (7, 6)) / 1.0
    theirs = [ref.Factors(*path) for path in paths]
    assert_same(zero.linear(x, paths), ref.linear(x, theirs))
    _, grads, _ = ref.linear_vjp(x, theirs, dy, "straight_through")
    for path, expected in zip(paths, grads, strict=True):
        for mine, reference in zip(zero.linear_vjp(x, path, dy), expected, strict=True):
            assert_same(mine, reference)


@pytest.mark.parametrize(("rows", "count"), [(1, 32), (5, 96)])
def test_packed_bytes_and_product_agree_with_the_reference(rows, count):
    signs = ref.sign(RNG.standard_normal((rows, count)))
    assert_same(zero.pack(signs), ref.pack_signs(signs).astype("<u4").view(np.uint8))
    x = zero.half(RNG.standard_normal(count))
    assert_same(zero.packed_product(zero.pack(signs), x), signs @ x)


def test_training_step_agrees_with_the_reference():
    paths, rng = whole_paths(8, 4, (3, 2)), np.random.default_rng(0)
    x, p = RNG.standard_normal((zero.BATCH, 4)), np.exp(log_softmax(RNG.standard_normal((zero.BATCH, 5))))
    params = [a for path in paths for a in path] + [np.zeros(8), RNG.standard_normal((5, 8)), np.zeros(5)]
    split = [slice(0, 5), slice(5, 10)]

    def layer(x, arrays):
        return zero.linear(x, [zero.Factors(*arrays[each]) for each in split])

    def vjp(x, arrays, dy):
        return [grad for each in split for grad in zero.linear_vjp(x, zero.Factors(*arrays[each]), dy)]

    (*arrays, b, C, c), lr = params, 1e-3
    rows = rng.integers(0, len(x), zero.BATCH)
    y = layer(x[rows], arrays) + b
    hidden = np.maximum(y, 0)
    d = ref.kl_loss_vjp(hidden @ C.T + c, np.log(p[rows]))
    dy = d @ C * (y > 0)
    grads = [*vjp(x[rows], arrays, dy), dy.sum(0), d.T @ hidden, d.sum(0)]
    expected, _ = ref.adam_step(params, grads, ref.adam_start(params), lr)
    mine = zero.train(x, p, layer, vjp, params, 1, 10 * lr)  # the last steps are ten times smaller
    rounding = np.finfo(float).eps * zero.BATCH * max(np.abs(grad).max() for grad in grads)
    for before, after, theirs in zip(params, mine, expected, strict=True):
        assert (after != before).any()
        assert_within(after, theirs, np.abs(before) + lr, terms=4, slack=lr * rounding / 1e-8)  # Adam's eps
