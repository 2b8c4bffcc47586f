"""Test the packed layer's CUDA kernels in numba-cuda's simulator; test_cuda.py runs this file in its own process."""

# pyright: reportArgumentType=false, reportAttributeAccessIssue=false

import math
import os
from types import ModuleType

os.environ["NUMBA_ENABLE_CUDASIM"] = "1"

from littlebit.notebooks import cuda_simulator  # noqa: F401 (before any kernel)

# isort: split

import littlebit.fast.kernels.cuda_launch as kernels
import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from littlebit.conformance import LAWS, Backend, check
from littlebit.conformance.examples import torch_fast
from littlebit.fast.bench.linear import exact_path, random_path
from littlebit.fast.kernels.cpu_layer import widen_words
from littlebit.fast.kernels.cuda_gemm import GemmTile
from littlebit.fast.kernels.cuda_layer import output_blocks
from littlebit.fast.kernels.cuda_schedule import LaunchConfig, Tiling, workspace_sizes
from littlebit.fast.packing import PackedFactors, unpack_factors
from numba import cuda

# Both kernels round an entry by at most 2^-22 of the largest in its K tile; float32 sums add less. Relative to the sum
# of magnitudes, a tile's error is at most 256 times its largest entry's error. Random entries stay far below that.
TOLERANCE = 3 * 2.0**-17
ONE = LaunchConfig(1, Tiling(1, 0, 1), Tiling(1, 0, 1))


def on_device(tensor):
    array = tensor.numpy().ravel()
    views = {np.dtype(np.int32): np.uint32, np.dtype(np.float16): np.uint16}
    return cuda.to_device(array.view(views.get(array.dtype, array.dtype)))


def start(kernel, grid, threads, size, arguments):
    kernel[grid, threads, 0, size](*arguments)


def outputs(x, paths, config, dtype_name="single", dtype=np.float32, pdl=False):
    """Run the GEMV on x, or the plain kernels without a configuration: (rows, d_out)."""
    rows, d_out, ranks = len(x), len(paths[0].h), sum(kernels.padded_rank(path.rank) for path in paths)
    y = cuda.to_device(np.full(rows * d_out, 99, dtype))
    t = cuda.to_device(np.full((config.split_k if config else 1) * rows * ranks, np.nan, np.float32))  # all written
    arrays = [PackedFactors(*map(on_device, path)) for path in paths]
    arguments = cuda.to_device(np.ascontiguousarray(x).ravel()), dtype_name, rows, arrays, y, t
    if config:
        kernels.launch_gemv(*arguments[:3], [arrays], y, t, config, pdl, start)
    else:
        kernels.launch_plain(*arguments, start)
    return y.copy_to_host().reshape(rows, d_out)


def bound(x, paths):
    """Bound the error of each output: TOLERANCE times the layer's output for absolute values."""
    total = 0
    for path in paths:
        h, ell, g = (scale.double().abs() for scale in (path.h, path.ell, path.g))
        total = total + h * ((x.double().abs() @ g)[:, None] * ell.sum())
    return TOLERANCE * total.numpy()


def exact(x, paths):
    return torch.stack([exact_path(x, path) for path in paths]).sum(0).numpy()


@st.composite
def cases(draw):
    """Draw shapes small enough for a simulator, and a configuration for them."""
    d_out, d_in = draw(st.sampled_from([1, 15, 17, 33])), draw(st.sampled_from([17, 64, 129, 300, 512]))
    ranks = draw(st.lists(st.sampled_from([17, 31, 64, 128, 270]), min_size=1, max_size=2))
    rows, k_tiles = draw(st.sampled_from([1, 2, 5])), -(-d_in // 256)
    split_k = draw(st.sampled_from([1, 2, 3][:k_tiles] if d_in % 128 == 0 else [1]))
    config = LaunchConfig(split_k, draw(tilings()), draw(tilings()))
    return d_out, d_in, ranks, rows, config, draw(st.booleans()), draw(st.integers(0, 1000))


@st.composite
def tilings(draw):
    return Tiling(*draw(st.sampled_from([(1, 0, 1), (2, 0, 1), (1, 1, 2), (2, 1, 1)])))


@settings(max_examples=6, deadline=None)
@given(cases())
def test_both_kernels_equal_the_exact_product(case):
    d_out, d_in, ranks, rows, config, pdl, seed = case
    generator = torch.Generator().manual_seed(seed)
    paths = [random_path(d_out, d_in, rank, generator) for rank in ranks]
    x = torch.randn(rows, d_in, generator=generator)
    error = np.abs(outputs(x.numpy(), paths, config, pdl=pdl) - exact(x, paths))
    assert (error <= bound(x, paths)).all()


def simulated(config):
    """Make a backend of littlebit.conformance from the kernels: packed_linear without a bias, of up to 33 rows."""
    module = ModuleType("simulated")
    module.LARGEST = 33

    def packed_linear(x, paths):
        paths = [PackedFactors(*(torch_fast.to_backend(array, "cpu") for array in path)) for path in paths]
        words = [[widen_words(tensor) for tensor in path[:2]] for path in paths]
        return outputs(x, [PackedFactors(*two, *path[2:]) for two, path in zip(words, paths, strict=True)], config)

    module.packed_linear = packed_linear
    return Backend(module)


@pytest.mark.parametrize("config", [ONE, None], ids=["gemv", "plain"])
@pytest.mark.parametrize("name", ["every_sign_counts", "paths_add_up"])
def test_laws_hold(name, config):
    """Two of the public laws, which draw integers: the digits of the GEMV are exact there."""
    (law,) = (law for law in LAWS if law.name == f"packed_linear.{name}")
    outcome = check(law, simulated(config), examples=3, shrink=False)
    assert outcome is None, str(outcome)


@pytest.mark.parametrize("config", [ONE, None])
@pytest.mark.parametrize(("name", "dtype"), [("half", torch.float16), ("bfloat", torch.bfloat16)])
def test_sixteen_bit_inputs_and_outputs(name, dtype, config):
    generator = torch.Generator().manual_seed(1)
    paths = [random_path(20, 72, 40, generator)]
    x = torch.randn(1, 72, generator=generator).to(dtype)
    raw = x.view(torch.int16).numpy().view(np.uint16)
    got = outputs(raw, paths, config, name, raw.dtype)
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
def test_an_input_that_is_not_finite_makes_only_its_own_outputs_not_finite(value):
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
def test_rows_of_a_multiple_of_four_words_are_padded_in_shared_memory(d_out, d_in, rank):
    generator = torch.Generator().manual_seed(3)
    paths = [random_path(d_out, d_in, rank, generator)]
    x = torch.randn(1, d_in, generator=generator)
    y = outputs(x.numpy(), paths, LaunchConfig(1, Tiling(2, 0, 1), Tiling(2, 0, 2)))
    assert (np.abs(y - exact(x, paths)) <= bound(x, paths)).all()


def test_the_result_does_not_depend_on_the_tiling():
    generator = torch.Generator().manual_seed(8)
    paths = [random_path(20, 300, 33, generator), random_path(20, 300, 17, generator)]
    x = torch.randn(2, 300, generator=generator).numpy()
    one = outputs(x, paths, ONE)
    assert (one == outputs(x, paths, LaunchConfig(1, Tiling(1, 1, 1), Tiling(1, 0, 2)), pdl=True)).all()
    assert (one[:1] == outputs(x[:1], paths, ONE)).all()  # the batch does not matter either


@pytest.mark.parametrize("ranks", [(33,), (33, 17)])
def test_the_plain_kernels_equal_the_exact_product(ranks):
    generator = torch.Generator().manual_seed(5)
    paths = [random_path(9, 70, rank, generator) for rank in ranks]
    x = torch.randn(2, 70, generator=generator)
    assert (np.abs(outputs(x.numpy(), paths, None) - exact(x, paths)) <= bound(x, paths)).all()


@pytest.mark.parametrize(
    ("name", "dtype", "sizes", "scale"),
    [
        ("half", torch.float16, (270, 40, [33]), 1),
        ("half", torch.float16, (33, 70, [17, 40]), 1),
        ("half", torch.float16, (9, 300, [9]), 600),
        ("bfloat", torch.bfloat16, (17, 41, [8, 3]), 600),
    ],
)
def test_unpacked_factors_are_folded_ones_times_powers_of_two(name, dtype, sizes, scale):
    d_out, d_in, ranks = sizes
    paths = scaled_paths(d_out, d_in, ranks, scale)
    a, b = unpacked(paths, name, dtype)
    largest = max(float(path.h.float().abs().max()) for path in paths)
    largest *= max(float(path.ell.float().abs().max()) for path in paths)
    unit = 2.0 ** max(0, math.floor(math.log2(largest)) - 14) if name == "half" else 1
    assert (unit > 1) == (name == "half" and scale > 1)
    rows, padded = 0, [-(-rank // 8) * 8 for rank in ranks]
    assert a.shape == (sum(padded), -(-d_in // 8) * 8)
    for path, size in zip(paths, padded, strict=True):
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


def unpacked(paths, name, dtype):
    """Unpack all paths to A and B, with their padding."""
    d_out, d_in = len(paths[0].h), len(paths[0].g)
    rows, columns = (8 * sum(-(-count // 8) for count in counts) for counts in ([p.rank for p in paths], [d_in]))
    out = cuda.to_device(np.full(rows * (columns + d_out) // 2, 0x7E007E00, np.uint32))  # NaN
    arrays = [PackedFactors(*map(on_device, path)) for path in paths]
    kernels.launch_unpack(name, arrays, out, 1, True, start)
    both = torch.from_numpy(out.copy_to_host().view(np.int16)).view(dtype)
    return both[: rows * columns].view(rows, columns), both[rows * columns :].view(d_out, rows)


def run(x, layers, config=ONE, y=None, **options):
    """Run `launch_gemv` on x, (rows, ...), for layers that share it, with any of its options."""
    y = np.full((len(x), sum(len(layer[0].h) for layer in layers)), 99, np.float32) if y is None else y
    outputs, columns = (
        cuda.to_device(y.ravel()),
        sum(kernels.padded_rank(path.rank) for layer in layers for path in layer),
    )
    t = cuda.to_device(np.full(config.split_k * len(x) * columns, np.nan, np.float32))
    arrays = [[PackedFactors(*map(on_device, path)) for path in layer] for layer in layers]
    x = cuda.to_device(np.ascontiguousarray(x).ravel())
    kernels.launch_gemv(x, "single", len(y), arrays, outputs, t, config, True, start, **options)
    return outputs.copy_to_host().reshape(y.shape)


@pytest.mark.parametrize("rows", [1, 3])
def test_fused_projections_are_the_layers_side_by_side(rows):
    generator = torch.Generator().manual_seed(9)
    shapes = (20, [33, 17]), (5, [40]), (33, [31, 16])
    layers = [[random_path(d_out, 512, rank, generator) for rank in ranks] for d_out, ranks in shapes]
    x = torch.randn(rows, 512, generator=generator).numpy()
    bias = torch.randn(58, generator=generator).numpy()
    config = LaunchConfig(2, Tiling(1, 1, 1), Tiling(2, 0, 2))
    layers = layers[: 4 - rows]  # several rows of all of them take a simulator most of a minute
    alone = np.concatenate([run(x, [layer], config) for layer in layers], axis=1)
    assert (run(x, layers, config) == alone).all()
    if rows > 1:
        return
    biased = run(x, layers, config, bias=cuda.to_device(bias))
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


def test_an_activation_before_the_layer():
    generator = torch.Generator().manual_seed(11)
    path = random_path(17, 72, 40, generator)
    x = 4 * torch.randn(2, 144, generator=generator)
    x[0, :2] = torch.tensor([-200.0, 200.0])
    gated = torch.nn.functional.silu(x[:, :72]) * x[:, 72:]
    y = run(x.numpy(), [[path]], activation="silu")
    assert (np.abs(y - exact(gated, [path])) <= 2 * bound(gated, [path])).all()


@pytest.mark.parametrize(("rows", "k_warps"), [(1, 1), (3, 2)])
def test_outputs_are_added_to_the_residual_stream_and_their_squares_summed(rows, k_warps):
    generator = torch.Generator().manual_seed(12)
    path, config = random_path(70, 40, 33, generator), LaunchConfig(1, Tiling(1, 0, 1), Tiling(k_warps, 1, 1))
    x, before = torch.randn(rows, 40, generator=generator), torch.randn(rows, 70, generator=generator).numpy()
    count = output_blocks(70, config)
    squares = cuda.to_device(np.full(rows * count, np.nan, np.float32))
    after = run(x.numpy(), [[path]], config, before.copy(), squares=squares)
    want = before + exact(x, [path])
    assert (np.abs(after - want) <= bound(x, [path]) + np.spacing(np.abs(want))).all()
    blocks = np.pad(after, ((0, 0), (0, count * config.output.rows - 70))).reshape(rows, count, -1)
    want = (blocks.astype(np.float64) ** 2).sum(-1)
    terms = config.output.rows + 1  # roundings of the squares and of their sum in any order
    assert (np.abs(squares.copy_to_host().reshape(rows, count) - want) <= terms * np.finfo(np.float32).eps * want).all()


@pytest.mark.parametrize(
    ("d_out", "d_in", "ranks", "rows", "split_k", "tile"),
    [
        (17, 70, [33], 3, 1, (1, 1, 1, 1)),
        (40, 300, [40, 70], 9, 2, (2, 1, 1, 2)),
        (33, 450, [17], 20, 3, (1, 2, 2, 1)),
        (70, 64, [130, 1], 5, 1, (2, 2, 1, 1)),
        (70, 130, [70, 33], 9, 2, (4, 1, 1, 2)),
    ],
)
def test_the_gemm_equals_the_exact_product_but_for_two_roundings(d_out, d_in, ranks, rows, split_k, tile):
    generator = torch.Generator().manual_seed(13)
    paths = [random_path(d_out, d_in, rank, generator) for rank in ranks]
    sizes = torch.tensor([2.0**30, 1, 2.0**-30])[torch.arange(rows) % 3, None]
    x = torch.randn(rows, d_in, generator=generator) * sizes
    y = gemm(x.numpy(), paths, kernels.GemmConfig(split_k, GemmTile(*tile), GemmTile(*tile)))
    assert (np.abs(y - exact(x, paths)) <= 2.0**-10 / TOLERANCE * bound(x, paths)).all()
    relative = np.linalg.norm(y - exact(x, paths), axis=1) / np.linalg.norm(exact(x, paths), axis=1)
    assert (relative < 2.0**-10).all()


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_the_gemm_with_an_infinite_entry_and_a_row_of_zeros(dtype):
    paths = [random_path(20, 72, 40, torch.Generator().manual_seed(14))]
    x = np.ones((3, 72), dtype)
    x[1, 5], x[2] = np.inf, 0
    tile = GemmTile(1, 1, 1, 1)
    y = gemm(x, paths, kernels.GemmConfig(1, tile, tile))
    assert np.isfinite(y[0]).all()
    assert np.isnan(y[1]).all()
    assert (y[2] == 0).all()


@pytest.mark.parametrize(
    ("d_out", "d_in", "ranks", "rows", "split_k", "tile"),
    [
        (17, 72, [33], 3, 1, (1, 1, 1, 1)),
        (33, 424, [17], 20, 3, (1, 2, 2, 1)),
        (70, 128, [70, 33], 9, 2, (4, 1, 1, 2)),
        (20, 8, [130], 9, 1, (4, 1, 1, 2)),
    ],
)
def test_the_gemm_multiplies_float16_inputs_directly(d_out, d_in, ranks, rows, split_k, tile):
    generator = torch.Generator().manual_seed(15)
    paths = [random_path(d_out, d_in, rank, generator) for rank in ranks]
    sizes = torch.tensor([2.0**6, 1, 2.0**-6])[torch.arange(rows) % 3, None]
    x = (torch.randn(rows, d_in, generator=generator) * sizes).half()
    y = gemm(x.numpy(), paths, kernels.GemmConfig(split_k, GemmTile(*tile), GemmTile(*tile))).astype(np.float64)
    want = exact(x, paths)
    assert (np.abs(y - want) <= 2.0**-11 / TOLERANCE * bound(x, paths) + 2.0**-11 * np.abs(want)).all()
    relative = np.linalg.norm(y - want, axis=1) / np.linalg.norm(want, axis=1)
    assert (relative < 2.0**-10).all()


def gemm(x, paths, config):
    """Run the GEMM on x in float32 or float16: (rows, d_out) of the same dtype."""
    name, seen = ("half", np.uint16) if x.dtype == np.float16 else ("single", np.float32)
    shape = kernels.LayerShape(x.shape[1], (len(paths[0].h),), (tuple(path.rank for path in paths),))
    dtypes = kernels.GemmWorkspace(np.uint32, np.float32, np.float32, np.uint32, np.float32)
    counts = workspace_sizes(shape, len(x), config)
    nans = [np.full(4 * count, 0xFF, np.uint8).view(dtype) for count, dtype in zip(counts, dtypes, strict=True)]
    y = cuda.to_device(np.full(len(x) * len(paths[0].h), 99, x.dtype).view(seen))
    arrays = [PackedFactors(*map(on_device, path)) for path in paths]
    workspace = kernels.GemmWorkspace(*map(cuda.to_device, nans))
    flat = cuda.to_device(np.ascontiguousarray(x).ravel().view(seen))
    kernels.launch_gemm(flat, name, len(x), arrays, y, workspace, config, True, start, wgmma=True)
    return y.copy_to_host().view(x.dtype).reshape(len(x), -1)


@pytest.mark.parametrize(("d_in", "most"), [(70, 1), (600, 1), (512, 2)])
def test_a_split_k_beyond_the_k_tiles_is_refused(d_in, most):
    paths = [random_path(9, d_in, 33, torch.Generator().manual_seed(6))]
    with pytest.raises(ValueError, match=rf"split_k must be at most {most} for {d_in} columns, got 3"):
        outputs(np.zeros((1, d_in), np.float32), paths, ONE._replace(split_k=3))
