"""Test that NaN, infinities, subnormal and huge numbers pass packed layers as they pass dense ones."""

import littlebit.fast as lb
import pytest
import torch
from compare import assert_same
from hypothesis import given, strategies as st
from littlebit.conformance.strategies import sizes
from littlebit.fast.bench.linear import random_path
from littlebit.fast.kernels import cpu, cpu_layer as plans
from littlebit.fast.kernels.unpacked import unpacked

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SPECIAL = (float("nan"), float("inf"), float("-inf"))


def make(d_out, d_in, rank, seed, rows=4):
    generator = torch.Generator().manual_seed(seed)
    paths = [random_path(d_out, d_in, rank, generator)]
    return lb.PackedLinear(paths), torch.randn(rows, d_in, generator=generator)


def dense(layer, x):
    """Compute the same by two dense products in float32, as a layer in training form does."""
    a, b = unpacked(layer.factors())
    return x.float() @ a.T @ b.T


@pytest.mark.parametrize("kernel", list(cpu.KERNELS))
@given(sizes(70), sizes(200), sizes(70), st.integers(0, 99), st.integers(0, 10**6), st.sampled_from(SPECIAL))
def test_nan_and_infinity_stay_in_their_row_and_reach_all_of_it(kernel, d_out, d_in, rank, seed, at, value):
    """Expect what a dense layer does: no sign is 0, so every output of a row depends on every input."""
    layer, x = make(d_out, d_in, rank, seed)
    with torch.inference_mode():
        clean = plans.packed_linear(x, layer.factors(), cpu.KERNELS[kernel])
        x[1, at % d_in] = value
        y, wanted = plans.packed_linear(x, layer.factors(), cpu.KERNELS[kernel]), dense(layer, x)
    assert not torch.isfinite(y[1]).any()
    assert not torch.isfinite(wanted[1]).any()
    if value != value:
        assert y[1].isnan().all()
    assert_same(y[[0, 2, 3]], clean[[0, 2, 3]])


@pytest.mark.parametrize("dtype", DTYPES)
@given(sizes(70), sizes(200), sizes(70), st.integers(0, 99), st.sampled_from([1e-45, 1e-40, 1e-30, 1e30, 6e4, 1.0]))
def test_tiny_and_huge_inputs_lie_within_the_bound(dtype, d_out, d_in, rank, seed, size):
    layer, x = make(d_out, d_in, rank, seed)
    x = (x * size).to(dtype)
    x = torch.where(x.isfinite(), x, 0)
    with torch.inference_mode():
        y = layer(x)
    a, b = (factor.double() for factor in unpacked(layer.factors()))
    exact, magnitude = x.double() @ a.T @ b.T, x.double().abs() @ a.abs().T @ b.abs().T
    # 2 n eps M for the sums, the flush or rounding of a subnormal in each term, and the output's own rounding
    terms = d_in + rank + 8
    scale = (1 + b.abs().sum(1)).expand_as(exact)
    bound = 2 * terms * torch.finfo(torch.float32).eps * magnitude + terms * scale * torch.finfo(torch.float32).tiny
    bound += torch.finfo(dtype).eps * exact.abs() + torch.finfo(dtype).tiny
    fits = magnitude < torch.finfo(dtype).max / 4
    assert ((y.double() - exact).abs() <= bound)[fits].all()
    assert y.isfinite()[fits].all()  # a float16 sum would have overflowed long before


def test_sums_that_no_float16_holds_do_not_overflow():
    """Make latents of 10^8, which float16 cannot hold, and outputs that it can."""
    layer, _ = make(8, 4096, 16, 0)
    with torch.no_grad():
        for path in layer.factors():
            path.v_words.zero_()
            path.g.fill_(1)
            path.ell.fill_(1e-4)
            path.h.fill_(1e-2)
            path.u_words.zero_()
    x = torch.full((2, 4096), 3e4, dtype=torch.float16)
    with torch.inference_mode():
        y = layer(x)
    assert y.dtype == torch.float16
    exact = 4096 * x[0, 0].double() * 16 * layer.factors()[0].ell[0].double() * layer.factors()[0].h[0].double()
    assert ((y.double() / exact - 1).abs() < 2**-10).all()


@given(sizes(70), sizes(300), sizes(70), st.integers(0, 99), st.integers(1, 80))
def test_results_are_the_same_twice_and_for_any_number_of_threads(d_out, d_in, rank, seed, rows):
    layer, x = make(d_out, d_in, rank, seed, rows)
    before = torch.get_num_threads()
    try:
        with torch.inference_mode():
            found = []
            for threads in (1, 2, 1, 3):
                torch.set_num_threads(threads)
                found.append(layer(x))
    finally:
        torch.set_num_threads(before)
    if rows <= plans.LARGE_BATCH:  # else torch's own products may split their sums over threads
        for y in found[1:]:
            assert_same(y, found[0])
    assert_same(found[2], found[0])


def test_deterministic_mode_takes_every_part():
    """Call torch.use_deterministic_algorithms, which refuses operations that are not deterministic."""
    layer, x = make(40, 60, 9, 0)
    torch.use_deterministic_algorithms(True)
    try:
        model = torch.nn.Sequential(layer)
        x.requires_grad_()
        first, second = (torch.autograd.grad(model(x).square().sum(), x)[0] for _ in range(2))
        assert_same(first, second)
    finally:
        torch.use_deterministic_algorithms(False)
