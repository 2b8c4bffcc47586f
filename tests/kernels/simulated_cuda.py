"""Properties of the CUDA kernels in numba-cuda's simulator; test_cuda.py runs them in a process of their own."""

# pyright: reportArgumentType=false, reportAttributeAccessIssue=false

import math
import os

os.environ["NUMBA_ENABLE_CUDASIM"] = "1"

import cuda_simulator  # noqa: F401 (before any kernel)
import littlebit.fast.kernels.cuda_layer as kernels
import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from littlebit.fast.bench.linear import exact_path, random_path
from littlebit.fast.kernels.cuda_gemm import Tile
from littlebit.fast.kernels.cuda_schedule import Blocks, Schedule
from littlebit.fast.packing import PackedFactors, unpack_factors
from numba import cuda

# An entry is off by at most 2^-22 of the largest in its slice, twice, and float32 sums by less. Relative to the sum of
# magnitudes a slice's error is at most 256 times that of its largest entry; random entries come nowhere near it.
TOLERANCE = 3 * 2.0**-17
ONE = Schedule(1, Blocks(1, 0, 1), Blocks(1, 0, 1))


def on_device(tensor):
    array = tensor.numpy().ravel()
    views = {np.dtype(np.int32): np.uint32, np.dtype(np.float16): np.uint16}
    return cuda.to_device(array.view(views.get(array.dtype, array.dtype)))


def start(kernel, grid, threads, size, arguments):
    kernel[grid, threads, 0, size](*arguments)


def outputs(x, paths, schedule, kind="single", dtype=np.float32, early=False):
    """What the kernels make of x, (rows, d_out); the plain ones if there is no schedule."""
    rows, d_out, ranks = len(x), len(paths[0].h), sum(kernels.padded(path.rank) for path in paths)
    y = cuda.to_device(np.full(rows * d_out, 99, dtype))
    part = cuda.to_device(
        np.full((schedule.parts if schedule else 1) * rows * ranks, np.nan, np.float32)
    )  # all written
    arrays = [PackedFactors(*map(on_device, path)) for path in paths]
    arguments = cuda.to_device(np.ascontiguousarray(x).ravel()), kind, rows, arrays, y, part
    if schedule:
        kernels.launch(*arguments[:3], [arrays], y, part, schedule, early, start)
    else:
        kernels.launch_plain(*arguments, start)
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
    """Sizes, few enough for a simulator, and a schedule for them."""
    d_out, d_in = draw(st.sampled_from([1, 15, 17, 33])), draw(st.sampled_from([17, 64, 129, 300, 512]))
    ranks = draw(st.lists(st.sampled_from([17, 31, 64, 128, 270]), min_size=1, max_size=2))
    rows, slices = draw(st.sampled_from([1, 2, 5])), -(-d_in // 256)
    parts = draw(st.sampled_from([1, 2, 3][:slices] if d_in % 128 == 0 else [1]))
    schedule = Schedule(parts, draw(blocks()), draw(blocks()))
    return d_out, d_in, ranks, rows, schedule, draw(st.booleans()), draw(st.integers(0, 1000))


@st.composite
def blocks(draw):
    return Blocks(*draw(st.sampled_from([(1, 0, 1), (2, 0, 1), (1, 1, 2), (2, 1, 1)])))


@settings(max_examples=6, deadline=None)
@given(cases())
def test_both_kernels_equal_the_exact_product(case):
    d_out, d_in, ranks, rows, schedule, early, seed = case
    generator = torch.Generator().manual_seed(seed)
    paths = [random_path(d_out, d_in, rank, generator) for rank in ranks]
    x = torch.randn(rows, d_in, generator=generator)
    error = np.abs(outputs(x.numpy(), paths, schedule, early=early) - exact(x, paths))
    assert (error <= bound(x, paths)).all()


@pytest.mark.parametrize("schedule", [ONE, None])
@pytest.mark.parametrize(("kind", "dtype"), [("half", torch.float16), ("bfloat", torch.bfloat16)])
def test_sixteen_bit_inputs_and_outputs(kind, dtype, schedule):
    generator = torch.Generator().manual_seed(1)
    paths = [random_path(20, 72, 40, generator)]
    x = torch.randn(1, 72, generator=generator).to(dtype)
    raw = x.view(torch.int16).numpy().view(np.uint16)
    got = outputs(raw, paths, schedule, kind, raw.dtype)
    got = torch.from_numpy(got.view(np.int16)).view(dtype).float().numpy()
    want = exact(x.float(), paths)
    rounding = torch.finfo(dtype).eps / 2 * np.abs(want)
    assert (np.abs(got - want) <= 1.01 * rounding + bound(x.float(), paths)).all()


@pytest.mark.parametrize("size", [2.0**-60, 2.0**-40, 2.0**30, 2.0**80])
def test_tiny_and_huge_inputs_keep_their_precision(size):
    generator = torch.Generator().manual_seed(2)
    paths = [random_path(17, 40, 33, generator)]
    x = torch.randn(1, 40, generator=generator) * size
    error = np.abs(outputs(x.numpy(), paths, ONE) - exact(x, paths))
    assert (error <= bound(x, paths)).all()


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
def test_what_is_not_finite_comes_out_as_not_finite_for_its_vector_alone(value):
    generator = torch.Generator().manual_seed(4)
    paths = [random_path(17, 40, 33, generator)]
    x = torch.randn(2, 40, generator=generator)
    x[1, 7] = value
    y = outputs(x.numpy(), paths, ONE)
    assert np.isfinite(y[0]).all()
    assert not np.isfinite(y[1]).any()


def test_a_vector_of_zeros_gives_zeros():
    paths = [random_path(17, 40, 33, torch.Generator().manual_seed(4))]
    assert (outputs(np.zeros((1, 40), np.float32), paths, ONE) == 0).all()


@pytest.mark.parametrize(("d_out", "d_in", "rank"), [(16, 512, 17), (19, 17, 256), (19, 384, 384)])
def test_rows_of_whole_fours_of_words_come_apart_in_shared_memory(d_out, d_in, rank):
    generator = torch.Generator().manual_seed(3)
    paths = [random_path(d_out, d_in, rank, generator)]
    x = torch.randn(1, d_in, generator=generator)
    y = outputs(x.numpy(), paths, Schedule(1, Blocks(2, 0, 1), Blocks(2, 0, 2)))
    assert (np.abs(y - exact(x, paths)) <= bound(x, paths)).all()


def test_the_result_does_not_depend_on_the_schedule_within_a_part():
    generator = torch.Generator().manual_seed(8)
    paths = [random_path(20, 300, 33, generator), random_path(20, 300, 17, generator)]
    x = torch.randn(2, 300, generator=generator).numpy()
    one = outputs(x, paths, ONE)
    assert (one == outputs(x, paths, Schedule(1, Blocks(1, 1, 1), Blocks(1, 0, 2)), early=True)).all()
    assert (one[:1] == outputs(x[:1], paths, ONE)).all()  # nor on the batch


@pytest.mark.parametrize("ranks", [(33,), (33, 17)])
def test_the_plain_kernels_equal_the_exact_product(ranks):
    generator = torch.Generator().manual_seed(5)
    paths = [random_path(9, 70, rank, generator) for rank in ranks]
    x = torch.randn(2, 70, generator=generator)
    assert (np.abs(outputs(x.numpy(), paths, None) - exact(x, paths)) <= bound(x, paths)).all()


@pytest.mark.parametrize(
    ("kind", "dtype", "sizes", "scale"),
    [
        ("half", torch.float16, (270, 40, [33]), 1),
        ("half", torch.float16, (33, 70, [17, 40]), 1),
        ("half", torch.float16, (9, 300, [9]), 600),
        ("bfloat", torch.bfloat16, (17, 41, [8, 3]), 600),
    ],
)
def test_unpacked_factors_are_folded_ones_times_powers_of_two(kind, dtype, sizes, scale):
    d_out, d_in, ranks = sizes
    paths = scaled_paths(d_out, d_in, ranks, scale)
    a, b = unpacked(paths, kind, dtype)
    largest = max(float(path.h.float().abs().max()) for path in paths)
    largest *= max(float(path.ell.float().abs().max()) for path in paths)
    unit = 2.0 ** max(0, math.floor(math.log2(largest)) - 14) if kind == "half" else 1
    assert (unit > 1) == (kind == "half" and scale > 1)
    rows, eighths = 0, [-(-rank // 8) * 8 for rank in ranks]
    assert a.shape == (sum(eighths), -(-d_in // 8) * 8)
    for path, size in zip(paths, eighths, strict=True):
        u, v, h, ell, g = (tensor.float() for tensor in unpack_factors(path))
        here, rank = slice(rows, rows + path.rank), path.rank
        assert torch.equal(a[here, :d_in], (unit * g * v.T).to(dtype))
        assert torch.equal(b[:, here], (h[:, None] / unit * ell * u).to(dtype))
        assert (a[rows + rank : rows + size] == 0).all()
        assert (b[:, rows + rank : rows + size] == 0).all()
        rows += size
    assert (a[:, d_in:] == 0).all()
    assert b.isfinite().all()


def test_unpacked_factors_keep_scales_that_are_not_finite_where_they_are():
    (path,) = scaled_paths(9, 20, [16], 1)
    path.h[2], path.ell[3], path.g[4] = math.inf, math.nan, -math.inf
    a, b = unpacked([path], "half", torch.float16)
    infinite, nan = torch.zeros(9, 16, dtype=torch.bool), torch.zeros(9, 16, dtype=torch.bool)
    infinite[2], nan[:, 3] = True, True
    assert torch.equal(b.isnan(), nan)
    assert torch.equal(b.isinf(), infinite & ~nan)
    assert torch.equal(a.isinf().any(0), torch.arange(24) == 4)
    assert not a.isnan().any()


def scaled_paths(d_out, d_in, ranks, scale):
    generator = torch.Generator().manual_seed(7)
    paths = [random_path(d_out, d_in, rank, generator) for rank in ranks]
    return [path._replace(h=path.h * scale, ell=path.ell * scale) for path in paths]


def unpacked(paths, kind, dtype):
    """A and B of all paths, all of the memory that they have."""
    d_out, d_in = len(paths[0].h), len(paths[0].g)
    rows, columns = (8 * sum(-(-count // 8) for count in counts) for counts in ([p.rank for p in paths], [d_in]))
    out = cuda.to_device(np.full(rows * (columns + d_out) // 2, 0x7E007E00, np.uint32))  # NaN
    arrays = [PackedFactors(*map(on_device, path)) for path in paths]
    kernels.launch_unpacking(kind, arrays, out, 1, True, start)
    both = torch.from_numpy(out.copy_to_host().view(np.int16)).view(dtype)
    return both[: rows * columns].view(rows, columns), both[rows * columns :].view(d_out, rows)


def run(x, layers, schedule=ONE, y=None, **options):
    """What `launch` makes of x, (rows, ...), for layers that share it, with all of its options; early."""
    y = np.full((len(x), sum(len(layer[0].h) for layer in layers)), 99, np.float32) if y is None else y
    outputs, columns = cuda.to_device(y.ravel()), sum(kernels.padded(path.rank) for layer in layers for path in layer)
    part = cuda.to_device(np.full(schedule.parts * len(x) * columns, np.nan, np.float32))
    arrays = [[PackedFactors(*map(on_device, path)) for path in layer] for layer in layers]
    x = cuda.to_device(np.ascontiguousarray(x).ravel())
    kernels.launch(x, "single", len(y), arrays, outputs, part, schedule, True, start, **options)
    return outputs.copy_to_host().reshape(y.shape)


@pytest.mark.parametrize("rows", [1, 3])
def test_siblings_are_the_layers_one_after_the_other(rows):
    generator = torch.Generator().manual_seed(9)
    shapes = (20, [33, 17]), (5, [40]), (33, [31, 16])
    layers = [[random_path(d_out, 512, rank, generator) for rank in ranks] for d_out, ranks in shapes]
    x = torch.randn(rows, 512, generator=generator).numpy()
    bias = torch.randn(58, generator=generator).numpy()
    schedule = Schedule(2, Blocks(1, 1, 1), Blocks(2, 0, 2))
    layers = layers[: 4 - rows]  # several rows of all of them take a simulator most of a minute
    alone = np.concatenate([run(x, [layer], schedule) for layer in layers], axis=1)
    assert (run(x, layers, schedule) == alone).all()
    if rows > 1:
        return
    biased = run(x, layers, schedule, bias=cuda.to_device(bias))
    # the bias joins a sum of two paths, here or there: three additions are rounded, none larger than the magnitudes
    sizes = np.concatenate([bound(torch.from_numpy(x), layer) for layer in layers], axis=1) / TOLERANCE + np.abs(bias)
    assert (np.abs(biased - (alone + bias)) <= 3 * np.finfo(np.float32).eps * sizes).all()


@pytest.mark.parametrize("rows", [1, 2])
def test_a_norm_before_the_layer(rows):
    generator = torch.Generator().manual_seed(10)
    path, eps = random_path(17, 72, 40, generator), 1e-5
    x, weight = torch.randn(rows, 72, generator=generator), torch.rand(72, generator=generator)
    squares = x.square().reshape(rows, 3, 24).sum(-1)
    norm = kernels.Norm(on_device(weight), on_device(squares), 3, eps)
    normed = weight * x / (x.square().mean(1, keepdim=True) + eps).sqrt()
    y = run(x.numpy(), [[path]], norm=norm)
    assert (np.abs(y - exact(normed, [path])) <= 2 * bound(normed, [path])).all()


@pytest.mark.parametrize(
    ("name", "activation"),
    [("silu", torch.nn.functional.silu), ("gelu_tanh", lambda v: torch.nn.functional.gelu(v, approximate="tanh"))],
)
def test_an_activation_before_the_layer(name, activation):
    generator = torch.Generator().manual_seed(11)
    path = random_path(17, 72, 40, generator)
    x = 4 * torch.randn(2, 144, generator=generator)
    x[0, :2] = torch.tensor([-200.0, 200.0])
    gated = activation(x[:, :72]) * x[:, 72:]
    y = run(x.numpy(), [[path]], activation=name)
    assert (np.abs(y - exact(gated, [path])) <= 2 * bound(gated, [path])).all()


@pytest.mark.parametrize(("rows", "sharing"), [(1, 1), (3, 2)])
def test_outputs_added_to_what_was_there_and_their_squares(rows, sharing):
    generator = torch.Generator().manual_seed(12)
    path, schedule = random_path(70, 40, 33, generator), Schedule(1, Blocks(1, 0, 1), Blocks(sharing, 1, 1))
    x, before = torch.randn(rows, 40, generator=generator), torch.randn(rows, 70, generator=generator).numpy()
    count = kernels.output_blocks(70, schedule)
    squares = cuda.to_device(np.full(rows * count, np.nan, np.float32))
    after = run(x.numpy(), [[path]], schedule, before.copy(), squares=squares)
    want = before + exact(x, [path])
    assert (np.abs(after - want) <= bound(x, [path]) + np.spacing(np.abs(want))).all()
    blocks = np.pad(after, ((0, 0), (0, count * schedule.output.rows - 70))).reshape(rows, count, -1)
    want, terms = (
        (blocks.astype(np.float64) ** 2).sum(-1),
        schedule.output.rows + 1,
    )  # squares, and their sum in any order
    assert (np.abs(squares.copy_to_host().reshape(rows, count) - want) <= terms * np.finfo(np.float32).eps * want).all()


@pytest.mark.parametrize(
    ("d_out", "d_in", "ranks", "rows", "parts", "tile"),
    [
        (17, 70, [33], 3, 1, (1, 1, 1, 1)),
        (40, 300, [40, 70], 9, 2, (2, 1, 1, 2)),
        (33, 450, [17], 20, 3, (1, 2, 2, 1)),
        (70, 64, [130, 1], 5, 1, (2, 2, 1, 1)),
        (70, 130, [70, 33], 9, 2, (4, 1, 1, 2)),
    ],
)
def test_batches_equal_the_exact_product_but_for_two_roundings(d_out, d_in, ranks, rows, parts, tile):
    generator = torch.Generator().manual_seed(13)
    paths = [random_path(d_out, d_in, rank, generator) for rank in ranks]
    sizes = torch.tensor([2.0**30, 1, 2.0**-30])[torch.arange(rows) % 3, None]
    x = torch.randn(rows, d_in, generator=generator) * sizes
    y = batch(x.numpy(), paths, kernels.BatchSchedule(parts, Tile(*tile), Tile(*tile)))
    assert (np.abs(y - exact(x, paths)) <= 2.0**-10 / TOLERANCE * bound(x, paths)).all()
    relative = np.linalg.norm(y - exact(x, paths), axis=1) / np.linalg.norm(exact(x, paths), axis=1)
    assert (relative < 2.0**-10).all()


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_a_batch_with_what_is_not_finite_and_zeros(dtype):
    paths = [random_path(20, 72, 40, torch.Generator().manual_seed(14))]
    x = np.ones((3, 72), dtype)
    x[1, 5], x[2] = np.inf, 0
    tile = Tile(1, 1, 1, 1)
    y = batch(x, paths, kernels.BatchSchedule(1, tile, tile))
    assert np.isfinite(y[0]).all()
    assert np.isnan(y[1]).all()
    assert (y[2] == 0).all()


@pytest.mark.parametrize(
    ("d_out", "d_in", "ranks", "rows", "parts", "tile"),
    [
        (17, 72, [33], 3, 1, (1, 1, 1, 1)),
        (33, 424, [17], 20, 3, (1, 2, 2, 1)),
        (70, 128, [70, 33], 9, 2, (4, 1, 1, 2)),
        (20, 8, [130], 9, 1, (4, 1, 1, 2)),
    ],
)
def test_batches_of_float16_are_multiplied_as_they_are(d_out, d_in, ranks, rows, parts, tile):
    generator = torch.Generator().manual_seed(15)
    paths = [random_path(d_out, d_in, rank, generator) for rank in ranks]
    sizes = torch.tensor([2.0**6, 1, 2.0**-6])[torch.arange(rows) % 3, None]
    x = (torch.randn(rows, d_in, generator=generator) * sizes).half()
    y = batch(x.numpy(), paths, kernels.BatchSchedule(parts, Tile(*tile), Tile(*tile))).astype(np.float64)
    want = exact(x, paths)
    assert (np.abs(y - want) <= 2.0**-11 / TOLERANCE * bound(x, paths) + 2.0**-11 * np.abs(want)).all()
    relative = np.linalg.norm(y - want, axis=1) / np.linalg.norm(want, axis=1)
    assert (relative < 2.0**-10).all()


def batch(x, paths, schedule):
    """What the kernels for batches make of x in float32 or float16, (rows, d_out) likewise."""
    kind, seen = ("half", np.uint16) if x.dtype == np.float16 else ("single", np.float32)
    sizes = kernels.Sizes(x.shape[1], (len(paths[0].h),), (tuple(path.rank for path in paths),))
    dtypes = kernels.Work(np.uint32, np.float32, np.float32, np.uint32, np.float32)
    counts = kernels.work_sizes(sizes, len(x), schedule)
    nans = [np.full(4 * count, 0xFF, np.uint8).view(dtype) for count, dtype in zip(counts, dtypes, strict=True)]
    y = cuda.to_device(np.full(len(x) * len(paths[0].h), 99, x.dtype).view(seen))
    arrays = [PackedFactors(*map(on_device, path)) for path in paths]
    work = kernels.Work(*map(cuda.to_device, nans))
    flat = cuda.to_device(np.ascontiguousarray(x).ravel().view(seen))
    kernels.launch_batch(flat, kind, len(x), arrays, y, work, schedule, True, start, grouped=True)
    return y.copy_to_host().view(x.dtype).reshape(len(x), -1)


@pytest.mark.parametrize(("d_in", "most"), [(70, 1), (600, 1), (512, 2)])
def test_more_parts_than_there_can_be_are_refused(d_in, most):
    paths = [random_path(9, d_in, 33, torch.Generator().manual_seed(6))]
    with pytest.raises(ValueError, match=rf"{d_in} columns cannot be divided into 3 parts: at most {most}"):
        outputs(np.zeros((1, d_in), np.float32), paths, ONE._replace(parts=3))
