"""Backward rules of signs, and the vector-Jacobian product of the layer."""

from collections.abc import Callable
from typing import Any

import numpy as np
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from littlebit.reference import Factors

from .. import exact
from ..backend import Backend
from ..compare import assert_same, assert_true, assert_within
from ..law import Draw, laws_of
from ..strategies import generators, inputs, layers

LAWS, law = laws_of("gradients")
STE = "Bengio et al. (arXiv 1308.3432), clipped"
SMOOTH_SIGN = "LittleBit (arXiv 2506.13771), SmoothSign"
CHAIN_RULE = "chain rule; littlebit.reference.linear.linear_vjp derives it"
WIDTH = 0.01  # of the latents' distribution: where SmoothSign has a slope


def latents_and_grad(backend: Backend, draw: Draw) -> tuple[np.ndarray, np.ndarray]:
    """Draw latents, any float but NaN and many near zero, and a gradient of their shape."""
    dtype = np.dtype(draw(st.sampled_from(backend.declared("DTYPES"))))
    width: Any = 8 * dtype.itemsize
    edges = st.sampled_from([0.0, -0.0, 1.0, -1.0, float(np.finfo(dtype).max), -np.inf])
    floats = (
        edges
        | st.floats(-0.125, 0.125, width=width)
        | st.floats(-2, 2, width=width)
        | st.floats(allow_nan=False, width=width)
    )
    x = draw(arrays(dtype, array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=5), elements=floats))
    return np.asarray(x), np.asarray(draw(generators()).standard_normal(np.shape(x))).astype(dtype)


@law("straight_through_vjp", source=STE)
def straight_through_passes_between_one_and_minus_one(backend: Backend, draw: Draw) -> None:
    """The straight-through rule passes the gradient on where |x| < 1, and gives 0 elsewhere, exactly."""
    x, grad = latents_and_grad(backend, draw)
    assert_same(backend.straight_through_vjp(x, grad), np.where(np.abs(x) < 1, grad, 0).astype(x.dtype))


@law("smooth_sign_vjp", source=SMOOTH_SIGN)
def smooth_sign_has_the_slope_of_tanh(backend: Backend, draw: Draw) -> None:
    """SmoothSign multiplies the gradient by 100 (1 - tanh^2(100 x)), accurately in the tails, in the dtype of x."""
    x, grad = latents_and_grad(backend, draw)
    found = backend.smooth_sign_vjp(x, grad)
    assert_true(found.dtype == x.dtype, f"dtype {found.dtype} instead of {x.dtype}")
    assert_within(found, *exact.sign_vjp(x, grad, "smooth_sign"))


def problem(backend: Backend, draw: Draw) -> tuple[np.ndarray, list[Factors], np.ndarray, str]:
    """Draw x, paths, the output's gradient, and a rule."""
    dtype = draw(st.sampled_from([name for name in backend.declared("DTYPES") if np.dtype(name).itemsize > 2]))
    drawn = draw(layers(min(20, backend.declared("LARGEST")), most=3, dtype=dtype))
    paths = [path._replace(u=path.u * path.u.dtype.type(WIDTH), v=path.v * path.v.dtype.type(WIDTH)) for path in drawn]
    x = draw(inputs(len(paths[0].g), np.dtype(dtype)))
    grad = draw(generators()).standard_normal((*x.shape[:-1], len(paths[0].h))).astype(dtype)
    return x, paths, grad, draw(st.sampled_from(["smooth_sign", "straight_through"]))


def gradient_law(name: str, statement: str) -> Callable[[Backend, Draw], None]:
    """Make the law of one gradient of `linear_vjp`."""

    def check(backend: Backend, draw: Draw) -> None:
        x, paths, grad, rule = problem(backend, draw)
        grad_x, grad_paths, grad_bias = backend.linear_vjp(x, paths, grad, rule)
        found = {"x": [grad_x], "bias": [grad_bias]}
        found = found.get(name) or [getattr(each, name) for each in grad_paths]
        for actual, wanted in zip(found, exact.linear_vjp(x, paths, grad, rule)[name], strict=True):
            assert_true(actual.dtype == x.dtype, f"dtype {actual.dtype} instead of {x.dtype}")
            assert_within(actual, *wanted)

    check.__name__, check.__doc__ = f"gradient_of_{name}", statement
    return law("linear_vjp", source=CHAIN_RULE)(check)


for NAME, STATEMENT in {
    "x": "dL/dx = dL/dy W, with W the dense weight that the layer stands for.",
    "bias": "dL/dbias is the sum of dL/dy over all rows.",
    "u": "dL/du is the rule's slope at u times dL/dU, with dL/dU_ik = h_i ell_k sum_j (dL/dy^T x)_ij g_j V_jk.",
    "v": "dL/dv is the rule's slope at v times dL/dV, with dL/dV_jk = g_j ell_k sum_i (dL/dy^T x)_ij h_i U_ik.",
    "h": "dL/dh_i = sum_j (dL/dy^T x)_ij g_j sum_k U_ik ell_k V_jk, summed over all rows of x.",
    "ell": "dL/dell_k = sum_ij (dL/dy^T x)_ij h_i U_ik V_jk g_j, summed over all rows of x.",
    "g": "dL/dg_j = sum_i (dL/dy^T x)_ij h_i sum_k U_ik ell_k V_jk, summed over all rows of x.",
}.items():
    gradient_law(NAME, STATEMENT)


@law("linear_vjp", "linear", source="definition of the vector-Jacobian product")
def gradients_are_the_derivatives_of_linear(backend: Backend, draw: Draw) -> None:
    """<dL/dp, d> = <dL/dy, y(p = d)> for each p of x, h, ell and g: the output is linear in each of them."""
    x, paths, grad, rule = problem(backend, draw)
    name = draw(st.sampled_from(["x", "h", "ell", "g"]))
    rng = draw(generators())
    grad_x, grad_paths, _ = backend.linear_vjp(x, paths, grad, rule)
    cases = [(x, [path], path, gradient) for path, gradient in zip(paths, grad_paths, strict=True)]
    terms = 32 + 2 * grad.size + 2 * x.size + sum(len(path.ell) for path in paths)
    if name == "x":
        d = rng.standard_normal(x.shape).astype(x.dtype)
        cases, found = [], [(grad_x, d, backend.linear(d, paths), exact.linear(d, paths).magnitude)]
    else:
        found = []
    for x_, _, path, gradient in cases:
        d = rng.standard_normal(getattr(path, name).shape).astype(x.dtype)
        moved = [path._replace(**{name: d})]
        found.append((getattr(gradient, name), d, backend.linear(x_, moved), exact.linear(x_, moved).magnitude))
    for gradient, d, y, size in found:
        one, other = ((a.astype(np.float64) * b).sum() for a, b in ((gradient, d), (y, grad)))
        total = (size * np.abs(grad.astype(np.float64))).sum()
        assert_within(np.asarray(one).astype(x.dtype), other, total, terms + grad.size)
