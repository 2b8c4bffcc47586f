"""Properties of the CUDA kernels in numba-cuda's simulator; test_cuda.py runs them in a process of their own."""

import os

os.environ["NUMBA_ENABLE_CUDASIM"] = "1"

import cuda_simulator  # noqa: F401 (before any kernel)
import littlebit.fast.kernels.cuda as kernels
import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from littlebit.fast.bench import exact_path, random_path
from littlebit.fast.packing import PackedFactors
from numba import cuda

# A vector's high and low part have 16 bits together, and sums are float32: relative to the sum of magnitudes, a
# product is off by at most 2^-17, its two parts rounded to nearest, twice, and sums by far less.
TOLERANCE = 3 * 2.0**-17


def on_device(tensor):
    array = tensor.numpy().ravel()
    return cuda.to_device(array.view(np.uint32) if array.dtype == np.int32 else array)


def outputs(x, paths, plan, kind="single", dtype=np.float32):
    """What the two kernels make of x, (rows, d_out)."""
    rows, d_out, ranks = len(x), len(paths[0].h), sum(path.rank for path in paths)
    y = cuda.to_device(np.full(rows * d_out, 99, dtype))
    part = cuda.to_device(np.full(plan.parts * rows * ranks, np.nan, np.float32))  # nothing may be left in it
    arrays = [PackedFactors(*map(on_device, path)) for path in paths]
    kernels.launch(cuda.to_device(np.ascontiguousarray(x).ravel()), kind, rows, arrays, y, part, plan)
    return y.copy_to_host().reshape(rows, d_out)


def bound(x, paths):
    """Largest error of each output: TOLERANCE times what the sums of magnitudes come to."""
    total = 0
    for path in paths:
        h, ell, g = (scale.double().abs() for scale in (path.h, path.ell, path.g))
        total = total + h * ((x.double().abs() @ g)[:, None] * ell.sum())
    return TOLERANCE * total.numpy()


def exact(x, paths):
    return torch.stack([exact_path(x, path) for path in paths]).sum(0).numpy()


@st.composite
def cases(draw):
    """Sizes, few enough for a simulator, and a plan for them."""
    d_out, d_in = draw(st.sampled_from([1, 15, 17, 33])), draw(st.sampled_from([17, 64, 129, 512, 600]))
    ranks = draw(st.lists(st.sampled_from([17, 31, 64, 70]), min_size=1, max_size=2))
    rows, groups = draw(st.sampled_from([1, 2, 5])), -(-d_in // 512)
    plan = kernels.Plan(draw(st.sampled_from([1, 2][:groups])), *draw(warps()), *draw(warps()))
    return d_out, d_in, ranks, rows, plan, draw(st.integers(0, 1000))


@st.composite
def warps(draw):
    return draw(st.sampled_from([(1, 1), (2, 1), (2, 2)]))


@settings(max_examples=6, deadline=None)
@given(cases())
def test_both_kernels_equal_the_exact_product(case):
    d_out, d_in, ranks, rows, plan, seed = case
    generator = torch.Generator().manual_seed(seed)
    paths = [random_path(d_out, d_in, rank, generator) for rank in ranks]
    x = torch.randn(rows, d_in, generator=generator)
    error = np.abs(outputs(x.numpy(), paths, plan) - exact(x, paths))
    assert (error <= bound(x, paths)).all()


@pytest.mark.parametrize(("kind", "dtype"), [("half", torch.float16), ("bfloat", torch.bfloat16)])
def test_sixteen_bit_inputs_and_outputs(kind, dtype):
    generator = torch.Generator().manual_seed(1)
    paths = [random_path(20, 70, 40, generator)]
    x = torch.randn(1, 70, generator=generator).to(dtype)
    raw = x.numpy() if dtype == torch.float16 else x.view(torch.int16).numpy().view(np.uint16)
    got = outputs(raw, paths, kernels.Plan(1, 1, 1, 1, 1), kind, raw.dtype)
    if dtype == torch.bfloat16:
        got = torch.from_numpy(got.view(np.int16)).view(torch.bfloat16).float().numpy()
    want = exact(x.float(), paths)
    rounding = torch.finfo(dtype).eps / 2 * np.abs(want)
    assert (np.abs(got - want) <= 1.01 * rounding + bound(x.float(), paths)).all()


@pytest.mark.parametrize("size", [2.0**-40, 2.0**30])
def test_tiny_and_huge_inputs_keep_their_precision(size):
    generator = torch.Generator().manual_seed(2)
    paths = [random_path(17, 40, 33, generator)]
    x = torch.randn(1, 40, generator=generator) * size
    error = np.abs(outputs(x.numpy(), paths, kernels.Plan(1, 1, 1, 1, 1)) - exact(x, paths))
    assert (error <= bound(x, paths)).all()


@pytest.mark.parametrize(("d_in", "rank"), [(1030, 17), (17, 520)])
def test_vectors_that_do_not_fit_shared_memory_at_once_come_in_segments(d_in, rank, monkeypatch):
    monkeypatch.setattr(kernels, "SHARED_BYTES", 4 * (2 * (256 + 16) + 2 * 17 * 4 + 4 * 16))  # one group
    check(5, d_in, rank, kernels.Plan(1, 1, 1, 1, 1))


@pytest.mark.parametrize(("d_in", "rank"), [(512, 17), (17, 512)])
def test_words_are_read_four_at_a_time_where_rows_are_whole_groups(d_in, rank):
    check(16, d_in, rank, kernels.Plan(1, 1, 1, 1, 1))


def check(d_out, d_in, rank, plan):
    generator = torch.Generator().manual_seed(3)
    paths = [random_path(d_out, d_in, rank, generator)]
    x = torch.randn(1, d_in, generator=generator)
    assert (np.abs(outputs(x.numpy(), paths, plan) - exact(x, paths)) <= bound(x, paths)).all()


def test_the_plain_kernels_equal_the_exact_product():
    generator = torch.Generator().manual_seed(5)
    ranks, d_out, d_in, rows = (33, 17), 9, 70, 2
    paths = [random_path(d_out, d_in, rank, generator) for rank in ranks]
    x = torch.randn(rows, d_in, generator=generator)
    part, y = (cuda.to_device(np.full(rows * size, np.nan, np.float32)) for size in (sum(ranks), d_out))
    y, offset = y.reshape(rows, d_out), 0
    for path in paths:
        u, v = (cuda.to_device(words.numpy().view(np.uint32)) for words in (path.u_words, path.v_words))
        h, ell, g = (on_device(scale) for scale in (path.h, path.ell, path.g))
        inputs = cuda.to_device(x.numpy())
        kernels.plain_latent[(-(-path.rank // 2), rows), 64](inputs, g, v, d_in, rows, part, sum(ranks), offset)
        kernels.plain_output[(-(-d_out // 2), rows), 64](part, ell, u, h, d_out, rows, sum(ranks), offset, y)
        offset += path.rank
    assert (np.abs(y.copy_to_host() - exact(x, paths)) <= bound(x, paths)).all()


def test_more_parts_than_groups_are_refused():
    generator = torch.Generator().manual_seed(6)
    with pytest.raises(ValueError, match=r"70 columns cannot be divided into 2 parts: at most 1 \(Plan.parts\)"):
        outputs(np.zeros((1, 70), np.float32), [random_path(9, 70, 33, generator)], kernels.Plan(2, 1, 1, 1, 1))
