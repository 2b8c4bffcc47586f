"""Test gradients in bfloat16, and what modules pass on to autograd; test_laws.py tests the gradients themselves."""

import littlebit.fast as fast
import littlebit.reference as ref
import numpy as np
import pytest
import torch
from compare import assert_same, assert_within, roundings
from hypothesis import given, strategies as st
from littlebit.conformance.strategies import factor_arrays, inputs
from littlebit.fast.models.layers import LittleBitLinear
from test_linear import same_outer

RULES = st.sampled_from(["smooth_sign", "straight_through"])
WIDTH = 0.01  # of the latents' distribution: where SmoothSign has a slope


def as_type(path, dtype):
    return ref.Factors(*(array.astype(dtype) for array in path))


def as_torch(path):
    return fast.Factors(*(torch.from_numpy(array) for array in path))


@st.composite
def problems(draw, dtypes=(np.float32, np.float64), paths=3):
    """Draw x, paths and the output's gradient."""
    dtype = draw(st.sampled_from(dtypes))
    drawn = draw(factor_arrays(largest=20, paths=paths))
    drawn = [as_type(same_outer(path, drawn[0]), dtype) for path in drawn]
    drawn = [path._replace(u=path.u * dtype(WIDTH), v=path.v * dtype(WIDTH)) for path in drawn]
    x = draw(inputs(len(drawn[0].g), dtype))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    return x, drawn, rng.standard_normal((*x.shape[:-1], len(drawn[0].h))).astype(dtype)


def absolute(path):
    """Take absolute values of a path: signs of +1, whose latents pass every straight-through gradient."""
    path = as_type(path, np.float64)
    return ref.Factors(np.full_like(path.u, 0.5), np.full_like(path.v, 0.5), *map(np.abs, path[2:]))


def with_slopes(magnitude, path, rule):
    """Turn magnitudes of sign gradients into latent gradients'; the slope has its own relative error."""
    path = as_type(path, np.float64)

    def slope(latents):
        error = 1 + 200 * np.abs(latents) if rule == "smooth_sign" else 1
        return ref.RULES[rule](latents, np.ones_like(latents)) * error

    return magnitude._replace(u=magnitude.u * slope(path.u), v=magnitude.v * slope(path.v))


def flat(gradients):
    grad_x, grad_paths, grad_bias = gradients
    return [grad_x, *(array for path in grad_paths for array in path), grad_bias]


def exact_and_magnitude(x, paths, grad, rule):
    """Compute the gradients in float64, the same on absolute values, and the roundings that an entry has seen."""
    wide = [array.astype(np.float64) for array in (x, grad)]
    exact = ref.linear_vjp(wide[0], [as_type(path, np.float64) for path in paths], wide[1], rule)
    grad_x, grad_paths, grad_bias = ref.linear_vjp(
        np.abs(wide[0]), [absolute(path) for path in paths], np.abs(wide[1]), "straight_through"
    )
    grad_paths = [with_slopes(part, path, rule) for part, path in zip(grad_paths, paths, strict=True)]
    terms = 16 + x.shape[-1] + grad.shape[-1] + grad.size // grad.shape[-1] + sum(path.rank for path in paths)
    return flat(exact), flat((grad_x, grad_paths, grad_bias)), terms


@given(problems(), RULES)
def test_linear_vjp_keeps_bfloat16_inputs_beside_float32_parameters(problem, rule):
    """A folded factor, two products and what is returned are rounded to bfloat16; the sums are of float32."""
    x, paths, grad = problem
    x, grad = (torch.from_numpy(array).bfloat16() for array in (x, grad))
    paths = [as_type(path, np.float32) for path in paths]
    exact, magnitude, terms = exact_and_magnitude(x.float().numpy(), paths, grad.float().numpy(), rule)
    gradients = fast.linear_vjp(x, [*map(as_torch, paths)], grad, rule)
    assert gradients[0].dtype == torch.bfloat16
    for actual, wanted, size in zip(flat(gradients), exact, magnitude, strict=True):
        assert_within(actual.float(), wanted, size, terms, slack=roundings(4, torch.bfloat16) * size)


@given(problems(dtypes=[np.float32]), RULES)
def test_linear_is_the_same_with_and_without_gradients(problem, rule):
    x, paths, _ = problem
    x, paths = torch.from_numpy(x), [*map(as_torch, paths)]
    with torch.no_grad():
        expected = fast.linear(x, [fast.Factors(path.u_sign, path.v_sign, *path[2:]) for path in paths])
    for path in paths:
        path.u.requires_grad_()
    y = fast.linear(x, paths, rule=rule)
    assert y.requires_grad
    assert_same(y, expected)
    with torch.no_grad():
        assert_same(fast.linear(x, paths, rule=rule), expected)


@given(problems(dtypes=[np.float32]), RULES)
def test_littlebit_linear_passes_the_rule_on(problem, rule):
    x, paths, grad = problem
    x, grad, paths = torch.from_numpy(x), torch.from_numpy(grad), [*map(as_torch, paths)]
    layer = LittleBitLinear(paths, torch.zeros(grad.shape[-1]), rule)
    layer(x).backward(grad)
    _, expected, grad_bias = fast.linear_vjp(x, paths, grad, rule)
    for factors, gradients in zip(layer.factors(), expected, strict=True):
        for parameter, gradient in zip(factors, gradients, strict=True):
            assert_same(parameter.grad, gradient)
    assert_same(layer.bias.grad, grad_bias)


@pytest.mark.parametrize("package", [ref, fast])
def test_linear_vjp_refuses_wrong_arguments(package):
    make = np.ones if package is ref else torch.ones
    path = package.Factors(make((4, 2)), make((3, 2)), make(4), make(2), make(3))
    with pytest.raises(ValueError, match=r"input's last axis must be d_in = 3, but its shape is \(5, 4\)"):
        package.linear_vjp(make((5, 4)), [path], make((5, 4)))
    with pytest.raises(ValueError, match=r"the output's shape \(5, 4\), but its shape is \(5, 3\)"):
        package.linear_vjp(make((5, 3)), [path], make((5, 3)))
    with pytest.raises(ValueError, match="one of 'smooth_sign', 'straight_through', not 'tanh'"):
        package.linear_vjp(make((5, 3)), [path], make((5, 4)), "tanh")


def test_littlebit_linear_refuses_an_unknown_rule():
    path = fast.Factors(torch.ones(4, 2), torch.ones(3, 2), torch.ones(4), torch.ones(2), torch.ones(3))
    with pytest.raises(ValueError, match="not 'tanh'"):
        LittleBitLinear([path], rule="tanh")
    with pytest.raises(ValueError, match="not 'tanh'"):
        fast.linear(torch.ones(3), [path], rule="tanh")
