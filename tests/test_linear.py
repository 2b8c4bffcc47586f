"""The layer: both backends, packed and not, against float64 within the bound of the arithmetic."""

import littlebit.fast as fast
import littlebit.reference as ref
import numpy as np
import pytest
import torch
from compare import assert_same, assert_within
from hypothesis import given, strategies as st
from littlebit.fast.bench import random_path
from littlebit.fast.kernels import unpacked_linear, widened
from strategies import factor_arrays, inputs, sizes


def exact_and_magnitude(x, paths, bias=None):
    """The output in float64, the same on absolute values, and the number of roundings of an entry."""
    doubled = [ref.Factors(*(array.astype(np.float64) for array in path)) for path in paths]
    absolute = [ref.Factors(*map(np.abs, path)) for path in doubled]
    absolute = [path._replace(u=np.ones_like(path.u), v=np.ones_like(path.v)) for path in absolute]
    bias64 = None if bias is None else bias.astype(np.float64)
    exact = ref.linear(x.astype(np.float64), doubled, bias64)
    magnitude = ref.linear(np.abs(x).astype(np.float64), absolute, None if bias is None else np.abs(bias64))
    terms = 8 + len(paths) * max(len(path.g) + path.rank for path in doubled)
    return exact, magnitude, terms


def torch_factors(arrays):
    return fast.Factors(*map(torch.from_numpy, arrays))


@given(st.data(), factor_arrays(), st.booleans())
def test_linear_agrees(data, paths, with_bias):
    x = data.draw(inputs(len(paths[0][4])))
    paths = [path if at == 0 else same_outer(path, paths[0]) for at, path in enumerate(paths)]
    bias = np.linspace(-1, 1, len(paths[0][2]), dtype=np.float32) if with_bias else None
    exact, magnitude, terms = exact_and_magnitude(x, [ref.Factors(*path) for path in paths], bias)
    assert_within(ref.linear(x, [ref.Factors(*path) for path in paths], bias), exact, magnitude, terms)
    fast_bias = None if bias is None else torch.from_numpy(bias)
    y = fast.linear(torch.from_numpy(x), [torch_factors(path) for path in paths], fast_bias)
    assert_within(y, exact, magnitude, terms)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@given(data=st.data(), paths=factor_arrays(largest=20, paths=1))
def test_linear_agrees_for_every_input_dtype(dtype, data, paths):
    """The factors are rounded to x's dtype, so the bound is that of the coarser of it and of the factors' float32."""
    x = torch.from_numpy(data.draw(inputs(len(paths[0][4])))).to(dtype)
    exact, magnitude, terms = exact_and_magnitude(x.double().numpy(), [ref.Factors(*paths[0])])
    y = fast.linear(x, [torch_factors(paths[0])])
    assert y.dtype == dtype
    coarser = max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps) / torch.finfo(torch.float64).eps
    assert_within(y.double(), exact, coarser * magnitude, terms)


def same_outer(path, first):
    """The path with the d_out and d_in of the first one."""
    u, v, h, ell, g = path
    return (
        np.resize(u, (len(first[2]), len(ell))),
        np.resize(v, (len(first[4]), len(ell))),
        np.resize(h, len(first[2])),
        ell,
        np.resize(g, len(first[4])),
    )


@pytest.mark.parametrize("largest", [20, 127])
@given(data=st.data())
def test_packed_linear_equals_dense(largest, data):
    paths = data.draw(factor_arrays(largest))
    x = data.draw(inputs(len(paths[0][4])))
    paths = [path if at == 0 else same_outer(path, paths[0]) for at, path in enumerate(paths)]
    bias = np.linspace(-1, 1, len(paths[0][2]), dtype=np.float32)
    packed = [ref.pack_factors(ref.Factors(*path)) for path in paths]
    exact, magnitude, terms = exact_and_magnitude(x, [ref.unpack_factors(path) for path in packed], bias)
    assert_within(ref.packed_linear(x, packed, bias), exact, magnitude, terms)
    fast_packed = [fast.pack_factors(torch_factors(path)) for path in paths]
    y = fast.packed_linear(torch.from_numpy(x), fast_packed, torch.from_numpy(bias))
    assert_within(y, exact, 3 * magnitude, terms)  # sum - 2 * part: at most three times the magnitude is rounded


@given(sizes(40), sizes(40), st.integers(1, 40))
def test_random_path_is_as_pack_factors_makes_it(d_out, d_in, rank):
    path = random_path(d_out, d_in, rank, torch.Generator().manual_seed(0))
    for mine, packed in zip(path, fast.pack_factors(fast.unpack_factors(path)), strict=True):
        assert_same(mine, packed)


@pytest.mark.parametrize("count", [1, 7, 8, 9, 15, 16, 17, 32])
def test_widened_adds_nothing_but_zeros(count):
    words = fast.pack_signs(-torch.ones(3, count))
    assert widened(words).dtype == torch.int32
    assert_same(widened(words), np.full((3, 1), 2**count - 1, np.uint32))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@given(data=st.data(), paths=factor_arrays())
def test_unpacked_linear_agrees_for_every_input_dtype(dtype, data, paths):
    """The factors, and x in between, are rounded to x's dtype, but never to finer than float32."""
    x = torch.from_numpy(data.draw(inputs(len(paths[0][4])))).reshape(-1, len(paths[0][4])).to(dtype)
    paths = [path if at == 0 else same_outer(path, paths[0]) for at, path in enumerate(paths)]
    packed = [fast.pack_factors(torch_factors(path)) for path in paths]
    exact, magnitude, terms = exact_and_magnitude(x.double().numpy(), [as_reference(path) for path in packed])
    y = unpacked_linear(x, packed)
    assert y.dtype == torch.float32
    coarser = max(1, torch.finfo(dtype).eps / torch.finfo(torch.float32).eps)
    assert_within(y, exact, coarser * magnitude, terms)
    assert_within(fast.packed_linear(x.float(), packed), exact, 3 * magnitude, terms)


def as_reference(packed):
    """The path of the reference that a packed one stands for."""
    return ref.Factors(*(tensor.numpy() for tensor in fast.unpack_factors(packed)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_unpacked_linear_takes_scales_whose_product_overflows_float16(dtype):
    path = random_path(40, 50, 20, torch.Generator().manual_seed(0))
    path = path._replace(h=path.h * 4e4, ell=path.ell * 4e4, g=path.g * 2.0**-10)
    x = torch.randn(3, 50, generator=torch.Generator().manual_seed(1)).to(dtype)
    exact, magnitude, terms = exact_and_magnitude(x.double().numpy(), [as_reference(path)])
    coarser = torch.finfo(dtype).eps / torch.finfo(torch.float32).eps
    assert_within(unpacked_linear(x, [path]), exact, coarser * magnitude, terms)


@pytest.mark.parametrize("rank", [5, 16, 33])
def test_packed_linear_on_another_device_waits_for_no_value(rank):
    """Tensors on meta have shapes and no values, so whatever asked for one would raise."""
    generator = torch.Generator().manual_seed(0)
    paths = [random_path(40, 12, rank, generator), random_path(40, 12, 3, generator)]
    paths = [fast.PackedFactors(*(tensor.to("meta") for tensor in path)) for path in paths]
    for dtype in (torch.float32, torch.float16):
        y = fast.packed_linear(torch.zeros(2, 3, 12, device="meta", dtype=dtype), paths)
        assert (y.shape, y.dtype, y.device.type) == ((2, 3, 40), dtype, "meta")


@given(st.data(), factor_arrays(paths=1))
def test_to_dense_agrees_with_linear(data, paths):
    factors = ref.Factors(*paths[0])
    x = data.draw(inputs(len(factors.g)))
    exact, magnitude, terms = exact_and_magnitude(x, [factors])
    assert_within((x @ factors.to_dense().T).astype(np.float32), exact, magnitude, terms)
    dense = torch_factors(paths[0]).to_dense()
    assert_within(
        dense, factors.to_dense(), np.abs(np.outer(factors.h, factors.g)) * np.abs(factors.ell).sum(), 4 + factors.rank
    )


@pytest.mark.parametrize("batch", [1, 3, 4, 6])
@pytest.mark.parametrize("threads", [1, 2])
def test_packed_linear_is_the_same_for_any_threads(batch, threads, monkeypatch):
    monkeypatch.setattr("littlebit.fast.kernels.cpu.PARALLEL_WORK", 0)
    paths = [random_path(130, 200, rank, torch.Generator().manual_seed(rank)) for rank in (33, 70)]
    x = torch.randn(batch, 200, generator=torch.Generator().manual_seed(0))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        serial = fast.packed_linear(x, paths)
        torch.set_num_threads(threads)
        assert_same(fast.packed_linear(x, paths), serial)
    finally:
        torch.set_num_threads(before)
    rows = torch.cat([fast.packed_linear(row[None], paths) for row in x])
    magnitude = np.full(serial.shape, float(serial.abs().max()))
    assert_within(serial, rows, magnitude, terms=300)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_packed_linear_keeps_dtype_and_takes_any_strides(dtype):
    path = random_path(40, 50, 20, torch.Generator().manual_seed(0))
    x = torch.randn(50, 2, 3, generator=torch.Generator().manual_seed(1)).to(dtype).permute(2, 1, 0)
    y = fast.packed_linear(x, [path])
    assert y.dtype == dtype
    assert y.shape == (3, 2, 40)
    assert_same(y.float(), fast.packed_linear(x.float().contiguous(), [path]).to(dtype).float())


def test_packed_linear_refuses_gradients_and_wrong_inputs():
    path = random_path(40, 50, 20, torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match=r"torch\.no_grad"):
        fast.packed_linear(torch.zeros(50, requires_grad=True), [path])
    with pytest.raises(ValueError, match="last axis must be d_in = 50"):
        fast.packed_linear(torch.zeros(2, 49), [path])
    with pytest.raises(ValueError, match=r"words are on cpu and the input is on meta: move .* with \.to\(device\)"):
        fast.packed_linear(torch.zeros(50, device="meta"), [path])
    with pytest.raises(ValueError, match=r"words are on meta and the input is on cpu"):
        fast.packed_linear(torch.zeros(50), [path, path._replace(v_words=path.v_words.to("meta"))])
    with pytest.raises(ValueError, match=r"20 signs need 1 word\(s\) of torch\.int32 a row, .* of torch\.int16"):
        fast.packed_linear(torch.zeros(50), [path._replace(u_words=path.u_words.to(torch.int16))])
    with pytest.raises(ValueError, match=r"50 signs need 2 word\(s\) of torch\.int32 a row, but there are 1"):
        fast.packed_linear(torch.zeros(50), [path._replace(v_words=path.v_words[:, :1])])
    with pytest.raises(ValueError, match="last axis must be d_in = 50"):
        ref.packed_linear(np.zeros((2, 49)), [ref.pack_factors(as_reference(path))])


def test_packed_linear_never_unpacks():
    """Peak memory of a large layer's forward stays far below one byte per sign."""
    import tracemalloc

    path = random_path(4096, 4096, 512, torch.Generator().manual_seed(0))
    x = torch.zeros(1, 4096)
    fast.packed_linear(x, [path])  # loads the kernel
    tracemalloc.start()
    fast.packed_linear(x, [path])
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 4096 * 512
