"""Test the packed layer's CUDA kernels on a GPU (`make test-gpu`); without a GPU, test_cuda.py simulates them."""

import copy
import threading
import warnings

import littlebit.fast as lb
import pytest
import torch
from hypothesis import given, settings, strategies as st
from littlebit.fast.bench.linear import exact_path, random_path
from littlebit.fast.bits import rank_for_bits
from littlebit.fast.kernels import cuda_schedule, dispatch
from torch.nn import functional

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # Numba's, with a newer NumPy
]
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# Both kernels round an entry by at most 2^-22 of the largest in its K tile of 256; float32 sums and scales add to it
EXACT = 2.0**-18
# The same bound for root mean squares. An error uniform in +-2^-23 has 2^-23 / 3^0.5, relative to the largest of 256
# entries, which is below 5 standard deviations of normal ones. Both kernels round; float32 sums and scales add to it.
EXACT_NORM = 2.0**-19
MAX_GEMV_ROWS = 4  # rows in 16 bits up to which these bounds hold


@pytest.fixture(scope="module")
def cuda_layer():
    module = dispatch.cuda_kernels(0)
    assert module
    return module


def layer(d_out, d_in, ranks, seed=0):
    generator = torch.Generator("cuda").manual_seed(seed)
    return [random_path(d_out, d_in, rank, generator) for rank in ranks]


def inputs(rows, d_in, dtype=torch.float16, seed=1):
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(rows, d_in, generator=generator, device="cuda").to(dtype) / 64


def exact(x, paths):
    return torch.stack([exact_path(x, path) for path in paths]).sum(0)


def assert_exact(y, x, paths, tolerance=EXACT):
    """Assert that y is exact but for a rounding to its dtype and the GEMV's error."""
    want = exact(x, paths)
    rounding = torch.finfo(y.dtype).eps / 2 * want.abs()
    size = want.norm() / want.numel() ** 0.5 if want.numel() else 0
    assert y.shape == want.shape
    assert ((y.double() - want).abs() <= 1.01 * rounding + 16 * tolerance * size).all()


def assert_near(y, x, paths):
    """Assert that y is within two roundings to float16 and one to its dtype, relative to sums of random signs."""
    squares = torch.zeros(len(x), dtype=torch.float64, device=x.device)
    for path in paths:
        h, ell, g = (scale.double() for scale in (path.h, path.ell, path.g))
        squares = squares + h.square().sum() * ell.square().sum() * (x.double() * g).square().sum(1)
    error = (y.double() - exact(x, paths)).norm(dim=1)
    assert (error <= 2 * (2 * torch.finfo(torch.float16).eps + torch.finfo(y.dtype).eps) * squares.sqrt()).all()


def relative_error(y, want):
    return float((y.double() - want).norm() / want.norm())


@settings(max_examples=60, deadline=None)
@given(
    d_out=st.integers(1, 3000),
    d_in=st.one_of(st.integers(1, 3000), st.integers(1, 40).map(lambda n: 128 * n)),
    ranks=st.lists(st.integers(1, 900), min_size=1, max_size=2),
    rows=st.integers(1, 20),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 1000),
)
def test_layers_of_any_size_equal_the_exact_product(d_out, d_in, ranks, rows, dtype, seed):
    paths, x = layer(d_out, d_in, ranks, seed), inputs(rows, d_in, dtype, seed)
    if rows <= MAX_GEMV_ROWS or dtype == torch.float32:
        assert_exact(lb.packed_linear(x, paths), x, paths)
    else:
        assert_near(lb.packed_linear(x, paths), x, paths)


@pytest.mark.parametrize("version", ["plain", "tensor", "pdl"])
@pytest.mark.parametrize("rows", [1, 3, 16])
@pytest.mark.parametrize(("d_out", "d_in"), [(28672, 8192), (8192, 28672), (4096, 4096)])
def test_every_version_at_real_sizes(cuda_layer, d_out, d_in, rows, version):
    paths, x = layer(d_out, d_in, (200, 300)), inputs(rows, d_in)
    packed = cuda_layer.CudaPackedLayer([tensor for path in paths for tensor in path])
    assert_exact(packed(x, version), x, paths)


@pytest.mark.parametrize("bits", [0.1, 0.55, 1.0])
def test_the_error_is_the_rounding_of_the_output(bits):
    d_out, d_in = 28672, 8192
    paths, x = layer(d_out, d_in, [rank_for_bits(d_out, d_in, bits, 1)]), inputs(1, d_in)
    want = exact(x, paths)
    ours, rounded = lb.packed_linear(x, paths), want.half()
    assert relative_error(ours, want) <= 1.001 * relative_error(rounded, want)


def test_tilings_do_not_change_the_result(cuda_layer):
    paths, x = layer(4096, 4096, [600]), inputs(2, 4096, torch.float32)
    packed = cuda_layer.CudaPackedLayer([tensor for path in paths for tensor in path])
    config = packed.launch_config(2)
    one = packed(x, "tensor")
    assert torch.equal(one, packed(x, "pdl"))
    other = config._replace(latent=cuda_schedule.Tiling(config.latent.k_warps, 1, 2))
    assert torch.equal(one, packed(x, "pdl", other))
    assert torch.equal(one, packed(x, "pdl"))


@settings(max_examples=40, deadline=None)
@given(
    d_out=st.integers(1, 3000),
    d_in=st.one_of(st.integers(1, 5000), st.integers(1, 600).map(lambda n: 8 * n)),
    ranks=st.lists(st.integers(1, 900), min_size=1, max_size=2),
    rows=st.integers(5, 1500),
    dtype=st.sampled_from(DTYPES[:2]),
    seed=st.integers(0, 1000),
)
def test_batches_of_any_size_equal_the_exact_product_but_for_roundings(d_out, d_in, ranks, rows, dtype, seed):
    paths, x = layer(d_out, d_in, ranks, seed), inputs(rows, d_in, dtype, seed)
    y = lb.packed_linear(x, paths)
    assert y.dtype == dtype
    assert_near(y, x, paths)


@pytest.mark.parametrize("wgmma", [True, False])
@pytest.mark.parametrize("d_in", [2100, 2104])
@pytest.mark.parametrize("rows", [9, 30, 60, 200])
def test_every_tile_of_the_gemm(cuda_layer, monkeypatch, rows, d_in, wgmma):
    if not wgmma:
        monkeypatch.setattr(cuda_schedule, "WGMMA_CAPABILITY", None)
    paths, x = layer(1500, d_in, (130, 260)), inputs(rows, d_in)
    packed = cuda_layer.CudaPackedLayer([tensor for path in paths for tensor in path])
    for tile in cuda_schedule.tiles_for(rows, wgmma):
        for split_k in (1, 3):
            y = torch.full((rows, 1500), 99.0, device="cuda").half()
            assert_near(packed.gemm(x, y, rows, cuda_schedule.GemmConfig(split_k, tile, tile)), x, paths)


@pytest.mark.parametrize("rows", [33, 2000])
@pytest.mark.parametrize("dtype", DTYPES)
def test_large_batches_are_multiplied_by_unpacked_signs(cuda_layer, rows, dtype):
    paths, x = layer(777, 1027, (130, 35)), inputs(rows, 1027, dtype)
    packed = cuda_layer.CudaPackedLayer([tensor for path in paths for tensor in path])
    y, want = packed.unpacked(x), exact(x, paths)
    assert y.dtype == dtype
    assert relative_error(y, want) <= 3 * torch.finfo(dtype).eps


def test_scales_whose_products_overflow_float16(cuda_layer):
    (path,) = layer(64, 128, [40])
    path = path._replace(h=path.h * 600, ell=path.ell * 600)
    x = inputs(200, 128) / 1024
    want = exact(x, [path])
    for y in (lb.packed_linear(x, [path]), cuda_layer.CudaPackedLayer([*path]).unpacked(x)):
        assert y.isfinite().all()
        assert relative_error(y, want) <= 3e-3


def test_scales_are_read_anew_when_a_graph_of_unpacked_signs_is_replayed(cuda_layer):
    (path,), x = layer(300, 1024, [100]), inputs(200, 1024) / 1024
    packed = cuda_layer.CudaPackedLayer([*path])
    packed.unpacked(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = packed.unpacked(x)
    for factor in (1, 600):
        path.h.mul_(factor)
        path.ell.mul_(factor)
        graph.replay()
        assert relative_error(y, exact(x, [path])) <= 3e-3


@pytest.mark.parametrize("rows", [0, 1, 200])
def test_batches_of_any_shape(rows):
    paths = layer(40, 50, [17])
    x = inputs(2 * rows, 50).reshape(2, rows, 50)
    y = lb.packed_linear(x, paths, bias=torch.ones(40, device="cuda").half())
    assert y.shape == (2, rows, 40)
    if rows:
        assert relative_error(y.reshape(-1, 40), exact(x.reshape(-1, 50), paths) + 1) < 2e-3


def test_inputs_of_any_strides_and_alignment():
    paths, wide = layer(100, 256, [64]), inputs(6, 1000)
    for x in (wide[:, 1:257], wide[::2, :256], wide[:, 0:512:2], inputs(256, 6).T):
        assert_near(lb.packed_linear(x, paths), x, paths)
        assert_exact(lb.packed_linear(x[:MAX_GEMV_ROWS], paths), x[:MAX_GEMV_ROWS], paths)


@pytest.mark.parametrize("rank", [1, 8, 16])
def test_narrow_words(rank):
    paths, x = layer(60, 12, [rank]), inputs(2, 12)
    assert paths[0].u_words.dtype != torch.int32
    assert_exact(lb.packed_linear(x, paths), x, paths)


def test_an_infinite_entry_affects_only_its_row():
    paths, x = layer(100, 300, [64]), inputs(3, 300)
    x[1, 5] = float("inf")
    y = lb.packed_linear(x, paths)
    assert y[[0, 2]].isfinite().all()
    assert not y[1].isfinite().any()


def test_nothing_waits_for_the_device():
    paths, x = layer(512, 512, [100]), inputs(4, 512)
    packed = lb.PackedLinear(paths).cuda()
    packed(x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # this mode is a prototype
        torch.cuda.set_sync_debug_mode("error")
    try:
        packed(x)
        lb.packed_linear(x, paths)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_packed_layer_follows_its_tensors():
    packed, x = lb.PackedLinear(layer(64, 256, [40])).cuda(), inputs(1, 256)
    y = packed(x)
    twin = copy.deepcopy(packed)
    assert torch.equal(twin(x), y)
    packed.load_state_dict(lb.PackedLinear(layer(64, 256, [40], seed=5)).state_dict())
    assert not torch.equal(packed(x), y)
    assert torch.equal(twin(x), y)
    with pytest.raises(ValueError, match="one device"):
        packed.cpu()(x)


def flat(paths):
    return [tensor for path in paths for tensor in path]


@pytest.mark.parametrize("rows", [1, 4, 16])
def test_fused_projections_with_prologues_and_epilogues(cuda_layer, rows):
    layers = [layer(d_out, 1024, ranks, d_out) for d_out, ranks in ((1024, (100,)), (256, (64, 70)), (256, (33,)))]
    group = cuda_layer.FusedProjections([flat(paths) for paths in layers])
    generator = torch.Generator("cuda").manual_seed(rows)
    x, bias = (torch.randn(n, generator=generator, device="cuda") for n in ((rows, 1024), 1536))
    weight, squares = torch.rand(1024, generator=generator, device="cuda"), x.square().reshape(rows, 8, 128).sum(-1)
    y = torch.empty(rows, 1536, device="cuda")
    t = torch.empty(group.latent_size(rows, group.launch_config(rows)), device="cuda")
    group.launch(x, y, t, norm=(weight, squares, 8, 1e-5), bias=bias)
    normed = functional.rms_norm(x.double(), (1024,), weight.double(), 1e-5)
    want = torch.cat([exact(normed, paths) for paths in layers], 1) + bias
    assert relative_error(y, want) < EXACT_NORM
    down = layer(1024, 768, (90, 80))
    last = cuda_layer.FusedProjections([flat(down)])
    config = last.launch_config(rows)
    t = torch.empty(last.latent_size(rows, config), device="cuda")
    squares = torch.empty(rows, cuda_layer.output_blocks(1024, config), device="cuda")
    residual = x.clone()
    last.launch(y, residual, t, activation="silu", squares=squares)
    gated = functional.silu(y[:, :768].double()) * y[:, 768:]
    assert relative_error(residual, x + exact(gated, down)) < EXACT_NORM
    blocks = functional.pad(residual.double(), (0, squares.shape[1] * config.output.rows - 1024))
    want = blocks.reshape(rows, squares.shape[1], -1).square().sum(-1)
    terms = config.output.rows + 1  # roundings of the squares and of their sum in any order
    assert ((squares - want).abs() <= terms * torch.finfo(torch.float32).eps * want).all()


@pytest.mark.parametrize("rows", [1, 100])
def test_graphs_replay_what_they_captured(rows):
    packed, x = lb.PackedLinear(layer(4096, 1024, (100, 120))).cuda(), inputs(rows, 1024)
    packed(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = packed(packed(x)[:, :1024] / 64)
    for seed in range(3):
        x.copy_(inputs(rows, 1024, seed=seed))
        graph.replay()
        assert torch.equal(y, packed(packed(x)[:, :1024] / 64))


def test_streams_and_threads_at_once():
    packed = lb.PackedLinear(layer(2048, 1024, [200])).cuda()
    batches = [inputs(1 + i % 3, 1024, seed=i) for i in range(8)]
    want = [packed(x) for x in batches]
    torch.cuda.synchronize()
    wrong = []

    def work(x, y):
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(50):
                if not torch.equal(packed(x), y):
                    wrong.append(x)

    threads = [threading.Thread(target=work, args=pair) for pair in zip(batches, want, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_graphs_replay_on_several_streams_at_once():
    packed = lb.PackedLinear(layer(2048, 1024, (100, 120))).cuda()
    batches = [inputs(1 + i % 3, 1024, seed=i) for i in range(4)]
    want, graphs = [packed(x) for x in batches], []
    for x in batches:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            graphs.append((graph, packed(x)))
    streams = [torch.cuda.Stream() for _ in graphs]
    for _ in range(20):
        for _, y in graphs:
            y.zero_()
        torch.cuda.synchronize()
        for stream, (graph, _) in zip(streams, graphs, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
        torch.cuda.synchronize()
        assert all(torch.equal(y, expected) for (_, y), expected in zip(graphs, want, strict=True))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_every_device_computes_the_same_whatever_is_the_current_one():
    packed, x = lb.PackedLinear(layer(2048, 1024, [200])), inputs(3, 1024)
    want = copy.deepcopy(packed).cuda()(x).cpu()
    devices = range(torch.cuda.device_count())
    there = [(copy.deepcopy(packed).to(f"cuda:{device}"), x.to(f"cuda:{device}")) for device in devices]
    for current in devices:
        with torch.cuda.device(current):
            found = [each(batch) for each, batch in there]  # none waits for the one before
        assert all(torch.equal(y.cpu(), want) for y in found)


def test_the_operator_is_what_torch_expects():
    paths = layer(40, 256, (33, 17))
    tensors = [tensor for path in paths for tensor in path]
    for x in (inputs(3, 256), inputs(3, 256, torch.float32).requires_grad_()):
        torch.library.opcheck(torch.ops.littlebit.packed_linear, (x, tensors))


def test_compiled_under_autocast_and_with_gradients():
    packed = lb.PackedLinear(layer(128, 256, [64])).cuda()
    x = inputs(3, 256, torch.float32)
    compiled = torch.compile(packed, fullgraph=True)
    assert torch.equal(compiled(x), packed(x))
    with torch.autocast("cuda", torch.float16):
        y = packed(functional.linear(x, torch.eye(256, device="cuda")))
    assert relative_error(y, exact(x.half(), packed.factors())) < 2e-3
    x = x.half().requires_grad_()
    grad = torch.autograd.grad(packed(x).float().square().sum() / 2, x)[0]
    want = exact(x.detach(), packed.factors()) @ packed.weight.double()
    assert relative_error(grad, want) < 3e-3
