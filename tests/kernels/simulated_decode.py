"""Test the decoder's CUDA kernels in numba-cuda's simulator; test_cuda_decode.py runs this file in a subprocess."""

# pyright: reportArgumentType=false, reportAttributeAccessIssue=false

import os

os.environ["NUMBA_ENABLE_CUDASIM"] = "1"

from littlebit.notebooks import cuda_simulator  # noqa: F401 (before any kernel)

# isort: split

import contextlib
from types import SimpleNamespace

import littlebit.fast.kernels.cuda_decode as kernels
import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from littlebit.fast.bench import tune
from littlebit.fast.bench.decode_cuda import random_model, random_packed
from littlebit.fast.decoding.architecture import NotDecodableError
from littlebit.fast.decoding.cuda_ops import CudaOps
from littlebit.fast.decoding.fused_llama import GROUPS, FusedEngine, PackedGroup
from littlebit.fast.decoding.fused_llama_latent import LatentEngine
from littlebit.fast.decoding.ops import Heads, Spans, pad_latents
from littlebit.fast.decoding.torch_ops import TorchOps
from littlebit.fast.kernels import cuda_driver, cuda_latent_attention, cuda_layer, cuda_schedule, dispatch
from littlebit.fast.kernels.cuda_decode import THREADS, AttentionConfig
from littlebit.fast.kv_cache import Latents, round_latents
from littlebit.fast.memory import ModelShape
from littlebit.fast.models.embeddings import quantize_table
from numba import cuda
from shares import combine_partials

EPS = 2.0**-24
DTYPES = {"half": torch.float16, "bfloat": torch.bfloat16, "single": torch.float32}


def on_device(tensor):
    tensor = tensor.contiguous().flatten()
    raw = tensor.view(torch.int16).numpy().view(np.uint16) if tensor.dtype.itemsize == 2 else tensor.numpy()
    return cuda.to_device(raw.copy())


def fetched(array, dtype, *shape):
    raw = array.copy_to_host()
    tensor = torch.from_numpy(raw.view(np.int16) if raw.dtype == np.uint16 else raw)
    return (tensor.view(dtype) if dtype.itemsize == 2 else tensor).reshape(shape)


def numbers(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def turned(x, positions, theta=100.0):
    """Apply RoPE to (sequences, heads, size) in float64; return the result, and cosines and sines of 64 positions."""
    half = x.shape[-1] // 2
    angles = torch.arange(64.0)[:, None] * theta ** (-torch.arange(half) / half)
    cosine, sine = angles.cos(), angles.sin()
    c, s = (each[positions][:, None].double() for each in (cosine, sine))
    low, high = x.double().chunk(2, -1)
    return torch.cat([low * c - high * s, high * c + low * s], -1), cosine, sine


def norm(x, weight, eps):
    return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * weight


@st.composite
def cases(draw):
    """Draw a launch that is small enough for a simulator."""
    size = draw(st.sampled_from([64, 128]))
    group, chunks, kv_heads = draw(st.sampled_from([(1, 1, 2), (1, 1, 1), (3, 1, 1), (2, 2, 1), (5, 1, 1)]))
    config = AttentionConfig(
        draw(st.sampled_from(["single", "half"])), size, group, draw(st.sampled_from([1, 2])),
        draw(st.booleans()), draw(st.booleans()),
    )  # fmt: skip
    positions = draw(st.lists(st.integers(0, 40), min_size=1, max_size=2))
    return (
        config,
        chunks,
        kv_heads,
        positions,
        draw(st.sampled_from([3, 16, 64])),
        draw(st.integers(1, 3)),
        draw(st.booleans()),
    )


@settings(max_examples=16, deadline=None)
@given(cases())
def test_attend_is_attention_over_the_cache_and_the_new_token(case):
    """Softmax weights sum to one, so the output's error is bounded by the errors of scores and of cached values."""
    config, chunks, kv_heads, positions, min_split, splits, early = case
    dtype, cached, size = DTYPES[config.dtype], torch.float16, config.size
    rows, heads, capacity, eps = len(positions), kv_heads * chunks * config.group, 48, 1e-5
    projected = numbers(rows, heads + 2 * kv_heads, size).to(dtype)
    keys, values = (numbers(rows, kv_heads, capacity, size, seed=i).to(cached) for i in (1, 2))
    weights = 1 + numbers(2, size, seed=3) / 10
    scale = size**-0.5

    query, key, value = projected.double().split([heads, kv_heads, kv_heads], 1)
    if config.qk_norm:
        query, key = norm(query, weights[0].double(), eps), norm(key, weights[1].double(), eps)
    places = torch.tensor(positions)
    query, cosine, sine = turned(query, places)
    key = turned(key, places)[0]

    on_gpu = [on_device(tensor) for tensor in (keys, values)]
    blocks = rows * kv_heads * chunks
    y = cuda.to_device(on_device(torch.full((rows * heads * size,), 7.0, dtype=dtype)).copy_to_host())
    partials = cuda.to_device(np.full(blocks * splits * config.partial, np.nan, np.float32))
    arrivals = cuda.to_device(np.zeros(blocks, np.int32))
    kernels.attend(config, early)[(splits, kv_heads * chunks, rows), config.threads, 0, config.shared_bytes](
        on_device(projected), *on_gpu, on_device(cosine), on_device(sine), on_device(weights[0]), on_device(weights[1]),
        on_device(places), y, partials, arrivals, kv_heads, chunks, capacity, min_split,
        np.float32(scale), np.float32(eps),
    )  # fmt: skip
    assert (arrivals.copy_to_host() == 0).all()

    new_keys, new_values = (fetched(each, cached, rows, kv_heads, capacity, size) for each in on_gpu)
    got = fetched(y, dtype, rows, heads, size).double()
    if not config.combine:
        got = combine_partials(fetched(partials, torch.float32, rows, heads, splits, -1))
    for row, position in enumerate(positions):
        for new, old, fresh in ((new_keys, keys, key), (new_values, values, value)):
            error = (new[row, :, position].double() - fresh[row]).abs()
            assert (error <= torch.finfo(cached).eps / 2 * fresh[row].abs() + 64 * EPS * fresh[row].abs().max()).all()
            rest = torch.arange(capacity) != position
            assert torch.equal(new[row, :, rest], old[row, :, rest])
        seen = slice(0, position + 1)
        every_key, every_value = (
            each[row, :, seen].double().repeat_interleave(heads // kv_heads, 0) for each in (new_keys, new_values)
        )
        scores = torch.einsum("hd,htd->ht", query[row], every_key) * scale
        want = torch.einsum("ht,htd->hd", scores.softmax(-1), every_value)
        # a few hundred roundings of a score, and a weight's relative error is the absolute error of its score
        bound = 2 * (scores.abs().amax() + 1) * 2 * (size + position + 64) * EPS * every_value.abs().amax()
        assert ((got[row] - want).abs() <= bound + torch.finfo(dtype).eps * want.abs()).all()


@pytest.mark.parametrize("kind", ["half", "bfloat", "single", "8", "4"])
def test_embed_looks_rows_up(kind):
    size, tokens = 96, torch.tensor([5, 0])
    table = numbers(7, size)
    if kind in DTYPES:
        rows = table.to(DTYPES[kind])
        want, arrays, group = rows.float(), (on_device(rows), *[cuda.to_device(np.zeros(1, np.uint16))] * 2), size
    else:
        quantised = quantize_table(table, int(kind))
        want, group = quantised.rows(slice(None)), quantised.group
        offset = quantised.scale if quantised.offset is None else quantised.offset
        codes = quantised.codes.flatten().view(torch.uint8).numpy()
        arrays = cuda.to_device(codes.copy()), on_device(quantised.scale), on_device(offset)
    x, squares = cuda.to_device(np.full(2 * size, 9, np.float32)), cuda.to_device(np.full(2, 9, np.float32))
    kernels.embed(kind)[(1, 2), THREADS](on_device(tokens), *arrays, x, squares, size, group)
    got = fetched(x, torch.float32, 2, size)
    assert ((got - want[tokens]).abs() <= 2 * EPS * (want[tokens].abs() + want.abs().max())).all()
    exact = got.double().square().sum(-1)
    assert ((fetched(squares, torch.float32, 2) - exact).abs() <= 64 * EPS * exact).all()


@pytest.mark.parametrize(("kind", "rows"), [("8", 1), ("8", 3), ("4", 2)])
def test_logits_are_rows_of_a_table_times_x(kind, rows):
    size, count = 288, 19
    table = quantize_table(numbers(count, size), int(kind))
    x = numbers(rows, size, seed=1).half()
    y = cuda.to_device(np.full(rows * count, 9, np.float32))
    offset = table.scale if table.offset is None else table.offset
    arrays = (
        cuda.to_device(table.codes.flatten().view(torch.uint8).numpy().copy()),
        *map(on_device, (table.scale, offset)),
    )
    vectors = {1: 1, 2: 2, 3: 4}[rows]
    grid = 2, -(-rows // vectors)
    kernels.logits("half", kind, vectors)[grid, THREADS](on_device(x), *arrays, y, rows, count, size, table.group)
    entries = table.rows(slice(None)).double()
    want, magnitude = x.double() @ entries.T, x.double().abs() @ entries.abs().T
    assert ((fetched(y, torch.float32, rows, count) - want).abs() <= 2 * (size + 4) * EPS * magnitude).all()


@pytest.mark.parametrize("kind", ["half", "single"])
def test_add_and_rms_norm_of_the_residual_stream(kind):
    size, rows, dtype = 1032, 2, DTYPES[kind]
    x, y, weight = numbers(rows, size), numbers(rows, size, seed=1).to(dtype), numbers(size, seed=2)
    stream, squares = on_device(x), cuda.to_device(np.full(2 * rows, 9, np.float32))
    kernels.add(kind)[(2, rows), THREADS](on_device(y), stream, squares, size)
    got = fetched(stream, torch.float32, rows, size)
    assert torch.equal(got, x + y.float())
    out = on_device(torch.full((rows * size,), 9.0, dtype=dtype))
    kernels.rms_norm(kind)[(2, rows), THREADS](stream, on_device(weight), squares, out, size, 2, np.float32(1e-5))
    want = norm(got.double(), weight.double(), 1e-5)
    error = (fetched(out, dtype, rows, size).double() - want).abs()
    limits = torch.finfo(dtype)
    assert (error <= (limits.eps / 2 + 64 * EPS) * want.abs() + limits.eps * limits.tiny).all()


def test_swiglu_is_silu_of_one_half_times_the_other():
    x = numbers(2, 2 * 72)
    out = cuda.to_device(np.full(2 * 72, 9, np.float32))
    kernels.swiglu("single")[(1, 2), THREADS](on_device(x), out, 72)
    gate, up = x.double().chunk(2, -1)
    want = torch.nn.functional.silu(gate) * up
    assert ((fetched(out, torch.float32, 2, 72) - want).abs() <= 32 * EPS * (want.abs() + up.abs())).all()


@pytest.fixture
def simulated(monkeypatch):
    """Send launches to the simulator, which takes arrays where the driver takes addresses."""
    views = {torch.int32: np.uint32, torch.int16: np.uint16, torch.float16: np.uint16, torch.int8: np.uint8}

    def array(tensor):
        raw = tensor.view(torch.int16) if tensor.dtype == torch.float16 else tensor
        raw = raw.reshape(-1).detach().numpy()
        kernel_sees = views.get(tensor.dtype)
        return raw.view(kernel_sees) if kernel_sees else raw

    def start(stream, early, kernel, grid, threads, size, arguments):
        known = {}  # an array that is given twice must be one array on the device

        def seen(each):
            if isinstance(each, tuple):
                return tuple(map(seen, each))
            if not isinstance(each, np.ndarray):
                return np.float32(each) if isinstance(each, float) else each
            return known.setdefault((each.ctypes.data, each.dtype), (each, cuda.to_device(each)))[1]

        kernel[grid, threads, 0, size](*map(seen, arguments))
        for host, on_gpu in known.values():
            host[:] = on_gpu.copy_to_host()

    monkeypatch.setattr(cuda_driver, "array", array)
    monkeypatch.setattr(cuda_driver, "start", start)
    monkeypatch.setattr(cuda_driver, "device_properties", lambda index: cuda_schedule.Device("any", 1, 227 << 10))
    one_warp = cuda_schedule.Tiling(
        1, 0, 2
    )  # idle warps cost time in a simulator; simulated_cuda.py tests other schedules
    schedule = cuda_schedule.LaunchConfig(1, one_warp, one_warp)
    monkeypatch.setattr(cuda_schedule, "launch_config", lambda *sizes: schedule)
    monkeypatch.setattr(cuda_latent_attention, "WARPS", 4)
    monkeypatch.setattr(cuda_latent_attention, "THREADS", 128)
    monkeypatch.setattr(dispatch, "cuda_kernels", lambda index: cuda_layer)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    monkeypatch.setattr(torch.cuda, "device", lambda index: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=0))


@pytest.mark.usefixtures("simulated")
def test_the_output_layer_combines_split_kv_partials(monkeypatch):
    """Compare with torch, for contexts that leave some blocks without a token."""
    monkeypatch.setattr(cuda_driver, "device_properties", lambda index: cuda_schedule.Device("any", 3, 227 << 10))
    monkeypatch.setattr(AttentionConfig, "unroll", lambda self, early: 1)
    monkeypatch.setattr(CudaOps, "attention_config", lambda self, *_: AttentionConfig("single", 64, 1, 1, False))
    model = random_model(ModelShape("a small one", 64, 80, 1, 1, 1, 64, 40, 256), 2.0, 1, "cpu")
    sides = [FusedEngine(model, 2, 16, torch.device("cpu"), torch.float16, kernels) for kernels in (True, False)]
    shapes = []
    attend = CudaOps.attend
    monkeypatch.setattr(CudaOps, "attend", lambda *all_: shapes.append(attend(*all_)) or shapes[-1])
    with torch.inference_mode():
        for each in sides:
            each.prefill([list(range(9)), [4, 5]])
        mine, theirs = (each.step(torch.tensor([5, 6])) for each in sides)
    assert shapes[0].shape == (2, 1, 3, 64 + kernels.SUMMARY)
    assert (shapes[0][1, 0, 1:, 64] < -1e29).all()
    assert (mine - theirs).abs().max() <= 2**-7 * theirs.abs().max()


@pytest.mark.usefixtures("simulated")
def test_packed_layers_take_the_outputs_of_dense_ones():
    model = random_model(ModelShape("a small one", 64, 80, 1, 1, 1, 64, 40, 256), 2.0, 1, "cpu")
    dense = [torch.nn.Linear(64, 64, bias=False, dtype=torch.float16) for _ in range(3)]
    model = model._replace(blocks=[model.blocks[0]._replace(qkv=dense)])
    sides = [FusedEngine(model, 1, 16, torch.device("cpu"), torch.float16, kernels) for kernels in (True, False)]
    assert [isinstance(group, PackedGroup) for group in sides[0].groups[0]] == [False, True, True, True]
    with torch.inference_mode():
        for each in sides:
            each.prefill([[1, 2, 3]])
        mine, theirs = (each.step(torch.tensor([5])) for each in sides)
    assert (mine - theirs).abs().max() <= 2**-7 * theirs.abs().max()


@pytest.mark.usefixtures("simulated")
@pytest.mark.parametrize(
    ("bits", "heads", "paths", "kv_cache"),
    [(2.0, 1, 1, "full"), (None, 2, 1, "full"), (3.0, 2, 2, "latent"), (2.0, 1, 1, "latent-int8")],
)
def test_a_step_by_kernels_equals_a_step_by_torch(bits, heads, paths, kv_cache, monkeypatch):
    """Test packed layers in fused groups, dense layers with kernels between them, and all types of cache."""
    monkeypatch.setattr(cuda_latent_attention, "TILE_TOKENS", (8, 8))  # since the cache holds few tokens
    monkeypatch.setattr(CudaOps, "min_split_tiles", 1)
    shape = ModelShape("a small one", 64, 80, 1, heads, 1, 64, 40, 256)
    model = random_model(shape, bits, paths, "cpu")
    common = model, 2, 16, torch.device("cpu"), torch.float16
    if kv_cache == "full":
        sides = [FusedEngine(*common, kernels) for kernels in (True, False)]
    else:
        monkeypatch.setattr(
            cuda_driver, "device_properties", lambda index: cuda_schedule.Device("any", 4 * heads, 227 << 10)
        )
        sides = [LatentEngine(*common, kernels, kv_cache) for kernels in (True, False)]
    assert all(isinstance(group, PackedGroup) == (bits is not None) for groups in sides[0].groups for group in groups)
    with torch.inference_mode():
        one, two = ([each.prefill([[1, 2, 3], [4]])] for each in sides)
        for each, rows in zip(sides, (one, two), strict=True):
            rows.append(each.step(torch.tensor([5, 6])))
    assert torch.equal(one[0], two[0])
    for mine, theirs in zip(one[1:], two[1:], strict=True):
        assert (mine - theirs).abs().max() <= 2**-7 * theirs.abs().max()
    assert sides[0].positions.tolist() == [4, 2]
    if kv_cache != "full":
        for mine, theirs in zip(*(each.cache[0][0] + each.cache[0][1] for each in sides), strict=True):
            assert (mine.float() - theirs.float()).abs().max() <= 2**-6 * theirs.float().abs().max()
            assert mine[0, 3].any()
            assert mine[1, 1].any()


@pytest.mark.usefixtures("simulated")
@pytest.mark.parametrize(
    ("size", "heads", "kv_heads", "ranks", "kept", "tokens", "positions", "grouped", "shares"),
    [
        (64, 4, 2, ((40,), (72,)), torch.float16, 8, (17, 0), False, 1),
        (64, 3, 3, ((30, 9), (33, 20)), torch.int8, 16, (15, 16), True, 2),
        (128, 5, 1, ((96,), (16, 16)), torch.float16, 32, (40,), False, 1),
        (256, 1, 1, ((70,), (16, 16)), torch.float16, 8, (41,), True, 4),
    ],
)
def test_attention_to_latents_equals_torch(
    size, heads, kv_heads, ranks, kept, tokens, positions, grouped, shares, monkeypatch
):
    """Test contexts of several tiles with a partial last one, and one or two paths of ranks that fill no word."""
    monkeypatch.setattr(cuda_schedule, "WGMMA_CAPABILITY", torch.cuda.get_device_capability(0) if grouped else None)
    monkeypatch.setattr(cuda_latent_attention, "TILE_TOKENS", (tokens, tokens))
    monkeypatch.setattr(CudaOps, "min_split_tiles", 1)
    generator, rows, capacity = torch.Generator().manual_seed(0), len(positions), 44
    device = cuda_schedule.Device("any", rows * heads * shares, 227 << 10)
    monkeypatch.setattr(cuda_driver, "device_properties", lambda index: device)
    biases = False, shares == 1
    layers = [
        random_packed(kv_heads * size, 64, each, generator, bias) for each, bias in zip(ranks, biases, strict=True)
    ]
    if biases[1]:
        layers[1].bias.normal_(generator=generator)
    angles = torch.stack(turned(torch.zeros(1, 1, size), 0)[1:])[:, :capacity]
    projected, places = numbers(rows, (heads + 2 * kv_heads) * size), torch.tensor(positions)
    spans, begin = [], 3
    for each in ranks:
        spans.append(Spans.at(begin, each, cuda_schedule.padded_rank))
        begin = sum(spans[-1].begins[-1:]) + cuda_schedule.padded_rank(each[-1])
    part = numbers(2, rows, begin, seed=1)
    for of, each in zip(spans, ranks, strict=True):  # kernels leave zeros in the padding
        for at, count, rank in zip(*of, each, strict=True):
            part[..., at + rank : at + count] = 0
    known = [numbers(rows, capacity, sum(each), seed=2) for each in ranks]
    cache = [round_latents(pad_latents(latent, each), kept) for latent, each in zip(known, ranks, strict=True)]
    found = []
    for ops in (
        CudaOps(Heads(heads, kv_heads, size), torch.float16, 1e-5, rows, torch.device("cpu")),
        TorchOps(Heads(heads, kv_heads, size), torch.float16, 1e-5),
    ):
        mine = [Latents(*(tensor.clone() for tensor in each)) for each in cache]
        up = ops.up_projections(layers)
        found.append((ops.attend_latents(projected, part, spans, mine, up, places, angles, shares == 1), mine))
    (got, ours), (want, theirs) = found
    if shares > 1:
        assert got.shape == (rows, heads, shares, size + cuda_latent_attention.SUMMARY)
        weights = (got[..., size] - got[..., size].amax(-1, keepdim=True)).exp()
        totals = (weights * got[..., size + 1]).sum(-1, keepdim=True)
        got = ((weights[..., None] * got[..., :size]).sum(-2) / totals).flatten(1)
    assert (got - want).abs().max() <= 2**-12 * want.abs().max()
    for mine, other, old in zip(ours, theirs, cache, strict=True):
        assert (mine.codes.float() - other.codes.float()).abs().max() <= (1 if kept == torch.int8 else 2**-11)
        assert (mine.scale - other.scale).abs().max() <= 2**-20 * other.scale.max()
        changed = (mine.codes != old.codes).any(-1)
        assert changed.sum(-1).tolist() == [1] * rows
        assert changed[torch.arange(rows), places].all()


@pytest.mark.usefixtures("simulated")
def test_choose_tile_fits_the_shared_memory_or_raises():
    generator, heads = torch.Generator().manual_seed(0), Heads(8, 8, 64)
    ops, found = CudaOps(heads, torch.float16, 1e-5, 1, torch.device("cpu")), []
    for rank in (160, 1500, 2600, 20000):
        layers = [random_packed(512, 64, (rank,), generator) for _ in range(2)]
        if rank == 20000:
            with pytest.raises(NotDecodableError, match="latents of 20000 and 20000 entries do not fit"):
                ops.up_projections(layers)
            continue
        up = ops.up_projections(layers)
        config, of_block = ops.choose_tile("single", "half", 1, 4096, up)
        assert config.shared_bytes(of_block, up[0].words.shape[1], rank) <= 227 << 10
        found.append(config.tokens)
    assert found == [64, 32, 16]


@pytest.mark.usefixtures("simulated")
def test_tuning_takes_the_fastest_schedule_of_each_group(monkeypatch):
    """Replace the timer by a known cost of each schedule; run the first group with the schedule found for it."""
    model = random_model(ModelShape("a small one", 256, 80, 2, 1, 1, 64, 40, 256), 2.0, 1, "cpu")
    engine, ran = FusedEngine(model, 1, 16, torch.device("cpu"), torch.float16, True), []

    def cost(schedule):
        return abs(schedule.latent.row_tiles - 2) + abs(schedule.output.log_row_warps - 1)

    def replay_seconds(calls, replays):
        assert len(calls) == 2  # layers of both blocks
        if replays == tune.REPLAYS and not ran:
            ran.append(calls[0]())
        return 1e-6 * (1 + sum(cost(group.schedule) for groups in engine.groups for group in groups))

    monkeypatch.setattr(tune, "replay_seconds", replay_seconds)
    with torch.inference_mode():
        rows = tune.tune(engine, progress=False)
    assert [row["part"] for row in rows] == list(GROUPS)
    assert ran
    for at, row in enumerate(rows):
        assert cost(row["schedule"]) == 0
        assert row["after_us"] < row["before_us"]
        assert all(groups[at].schedule == row["schedule"] for groups in engine.groups)
        assert row["sizes"] == str(engine.groups[0][at].siblings.shape)
