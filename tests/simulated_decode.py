"""The decoder's CUDA kernels in numba-cuda's simulator; test_cuda_decode.py runs them in a process of their own."""

# pyright: reportArgumentType=false, reportAttributeAccessIssue=false

import os

os.environ["NUMBA_ENABLE_CUDASIM"] = "1"

import cuda_simulator  # noqa: F401 (before any kernel)
import littlebit.fast.kernels.cuda_decode as kernels
import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from littlebit.fast.embeddings import quantize_table
from littlebit.fast.kernels.cuda_decode import EIGHTS, Attention
from numba import cuda

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
    """Rotated queries or keys, (sequences, heads, size), and tables of angles up to the largest position."""
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
    """Sizes for one launch, few enough for a simulator."""
    size = draw(st.sampled_from([64, 128]))
    group, chunks, kv_heads = draw(st.sampled_from([(1, 1, 2), (1, 1, 1), (3, 1, 1), (2, 2, 1), (5, 1, 1)]))
    made = Attention(
        draw(st.sampled_from(["single", "half", "bfloat"])), draw(st.sampled_from(["half", "bfloat"])), size, group,
        draw(st.sampled_from([1, 2])), draw(st.booleans()),
    )  # fmt: skip
    positions = draw(st.lists(st.integers(0, 40), min_size=1, max_size=2))
    return (
        made,
        chunks,
        kv_heads,
        positions,
        draw(st.sampled_from([3, 16, 64])),
        draw(st.integers(1, 3)),
        draw(st.booleans()),
    )


@settings(max_examples=12, deadline=None)
@given(cases())
def test_attend_is_attention_over_what_is_kept_and_the_new_token(case):
    """Weights sum to one, so the output's error is that of the scores, and of the values' rounding in the cache."""
    made, chunks, kv_heads, positions, shortest, splits, early = case
    kind, kept, size = DTYPES[made.kind], DTYPES[made.kept], made.size
    rows, heads, capacity, eps = len(positions), kv_heads * chunks * made.group, 48, 1e-5
    projected = numbers(rows, heads + 2 * kv_heads, size).to(kind)
    keys, values = (numbers(rows, kv_heads, capacity, size, seed=i).to(kept) for i in (1, 2))
    weights = 1 + numbers(2, size, seed=3) / 10
    scale = size**-0.5

    query, key, value = projected.double().split([heads, kv_heads, kv_heads], 1)
    if made.normed:
        query, key = norm(query, weights[0].double(), eps), norm(key, weights[1].double(), eps)
    places = torch.tensor(positions)
    query, cosine, sine = turned(query, places)
    key = turned(key, places)[0]

    on_gpu = [on_device(tensor) for tensor in (keys, values)]
    blocks = rows * kv_heads * chunks
    y = cuda.to_device(on_device(torch.full((rows * heads * size,), 7.0, dtype=kind)).copy_to_host())
    partial = cuda.to_device(np.full(blocks * splits * made.partial, np.nan, np.float32))
    tickets = cuda.to_device(np.zeros(blocks, np.int32))
    kernels.attend(made, early)[(splits, kv_heads * chunks, rows), made.threads, 0, made.shared_bytes](
        on_device(projected), *on_gpu, on_device(cosine), on_device(sine), on_device(weights[0]), on_device(weights[1]),
        on_device(places), y, partial, tickets, kv_heads, chunks, capacity, shortest,
        np.float32(scale), np.float32(eps),
    )  # fmt: skip
    assert (tickets.copy_to_host() == 0).all()

    new_keys, new_values = (fetched(each, kept, rows, kv_heads, capacity, size) for each in on_gpu)
    got = fetched(y, kind, rows, heads, size).double()
    for row, position in enumerate(positions):
        for new, old, fresh in ((new_keys, keys, key), (new_values, values, value)):
            error = (new[row, :, position].double() - fresh[row]).abs()
            assert (error <= torch.finfo(kept).eps / 2 * fresh[row].abs() + 64 * EPS * fresh[row].abs().max()).all()
            rest = torch.arange(capacity) != position
            assert torch.equal(new[row, :, rest], old[row, :, rest])
        seen = slice(0, position + 1)
        every_key, every_value = (
            each[row, :, seen].double().repeat_interleave(heads // kv_heads, 0) for each in (new_keys, new_values)
        )
        scores = torch.einsum("hd,htd->ht", query[row], every_key) * scale
        want = torch.einsum("ht,htd->hd", scores.softmax(-1), every_value)
        # scores are off by their size times a few hundred roundings, and a weight's relative error is its score's
        bound = 2 * (scores.abs().amax() + 1) * 2 * (size + position + 64) * EPS * every_value.abs().amax()
        assert ((got[row] - want).abs() <= bound + torch.finfo(kind).eps * want.abs()).all()


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
    kernels.embed(kind)[(1, 2), EIGHTS](on_device(tokens), *arrays, x, squares, size, group)
    got = fetched(x, torch.float32, 2, size)
    assert ((got - want[tokens]).abs() <= 2 * EPS * (want[tokens].abs() + want.abs().max())).all()
    exact = got.double().square().sum(-1)
    assert ((fetched(squares, torch.float32, 2) - exact).abs() <= 64 * EPS * exact).all()


@pytest.mark.parametrize("kind", ["half", "single"])
def test_the_residual_stream_gets_what_is_added_and_its_norm(kind):
    size, rows, dtype = 1032, 2, DTYPES[kind]
    x, y, weight = numbers(rows, size), numbers(rows, size, seed=1).to(dtype), numbers(size, seed=2)
    stream, squares = on_device(x), cuda.to_device(np.full(2 * rows, 9, np.float32))
    kernels.added(kind)[(2, rows), EIGHTS](on_device(y), stream, squares, size)
    got = fetched(stream, torch.float32, rows, size)
    assert torch.equal(got, x + y.float())
    out = on_device(torch.full((rows * size,), 9.0, dtype=dtype))
    kernels.normed(kind)[(2, rows), EIGHTS](stream, on_device(weight), squares, out, size, 2, np.float32(1e-5))
    want = norm(got.double(), weight.double(), 1e-5)
    error = (fetched(out, dtype, rows, size).double() - want).abs()
    limits = torch.finfo(dtype)
    assert (error <= (limits.eps / 2 + 64 * EPS) * want.abs() + limits.eps * limits.tiny).all()


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_gated_is_the_activation_of_one_half_times_the_other(activation):
    curve = {"silu": torch.nn.functional.silu, "gelu_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh")}
    x = numbers(2, 2 * 72)
    out = cuda.to_device(np.full(2 * 72, 9, np.float32))
    kernels.gated("single", activation)[(1, 2), EIGHTS](on_device(x), out, 72)
    gate, up = x.double().chunk(2, -1)
    want = curve[activation](gate) * up
    assert ((fetched(out, torch.float32, 2, 72) - want).abs() <= 32 * EPS * (want.abs() + up.abs())).all()
