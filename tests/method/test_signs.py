"""Test the forward pass of the rules, autograd, and huge latents; test_laws.py tests the surrogate gradients."""

import littlebit.fast as fast
import littlebit.reference as ref
import numpy as np
import pytest
import torch
from compare import assert_same
from hypothesis import given, strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

DTYPES = [np.float16, np.float32, np.float64]
RULES = pytest.mark.parametrize("rule", ["smooth_sign", "straight_through"])


def floats(dtype):
    """Draw any float but NaN: zeros of both signs, subnormals, the largest, infinities, and many near zero."""
    width = np.dtype(dtype).itemsize * 8
    edges = st.sampled_from([0.0, -0.0, 1.0, -1.0, float(np.finfo(dtype).max), -np.inf])
    near = st.floats(-0.125, 0.125, width=width)
    return st.one_of(edges, near, st.floats(-2, 2, width=width), st.floats(allow_nan=False, width=width))


@st.composite
def latents_and_grad(draw):
    dtype = draw(st.sampled_from(DTYPES))
    x = draw(arrays(dtype, array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=5), elements=floats(dtype)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    return np.asarray(x), np.asarray(rng.standard_normal(x.shape)).astype(dtype)


@RULES
@given(latents_and_grad())
def test_rules_go_forward_as_sign(rule, pair):
    x, _ = pair
    assert_same(getattr(ref, rule)(x), ref.sign(x))
    assert_same(getattr(fast, rule)(torch.from_numpy(x)), ref.sign(x))


@RULES
@given(latents_and_grad())
def test_autograd_calls_the_vjp(rule, pair):
    x, grad = map(torch.from_numpy, pair)
    x.requires_grad_()
    (actual,) = torch.autograd.grad(getattr(fast, rule)(x), x, grad)
    assert_same(actual, getattr(fast, f"{rule}_vjp")(x.detach(), grad))


@pytest.mark.parametrize("dtype", DTYPES)
def test_vjps_do_not_overflow(dtype):
    x = np.array([np.finfo(dtype).max, -np.finfo(dtype).max, np.inf, -np.inf], dtype)
    grad = np.ones(4, dtype)
    for package, mine in ((ref, [x, grad]), (fast, [torch.from_numpy(x), torch.from_numpy(grad)])):
        assert_same(package.smooth_sign_vjp(*mine), np.zeros(4, dtype))
        assert_same(package.straight_through_vjp(*mine), np.zeros(4, dtype))


@RULES
def test_rules_keep_bfloat16(rule):
    x = torch.tensor([-1e38, -0.01, 0.0, 0.01, 1e38], dtype=torch.bfloat16, requires_grad=True)
    y = fast.RULES[rule](x)
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert y.dtype == grad.dtype == torch.bfloat16
    assert_same(grad[[0, 4]].float(), np.zeros(2, np.float32))
    assert_same(float(grad[2]), {"smooth_sign": 100.0, "straight_through": 1.0}[rule])


def test_rules_have_the_same_names():
    assert list(ref.RULES) == list(fast.RULES) == ["smooth_sign", "straight_through"]


@pytest.mark.parametrize("package", [ref, fast])
def test_named_rule_lists_the_known_ones(package):
    with pytest.raises(ValueError, match="one of 'smooth_sign', 'straight_through', not 'tanh'"):
        package.signs.named_rule("tanh")
