"""Test decoding on a GPU (`make test-gpu`); skipped without one. test_decode_cuda.py tests the engines on a CPU."""

import json
import logging
import urllib.request
import warnings

import littlebit.fast as lb
import pytest
import torch
from littlebit.fast.bench.decode_cuda import random_model
from littlebit.fast.checkpoints.fetch import fetch
from littlebit.fast.decoding import graph_decoder
from littlebit.fast.decoding.cuda_ops import CudaOps
from littlebit.fast.decoding.engines import engine_of, fused_engine
from littlebit.fast.decoding.fused_llama import FusedEngine, PackedGroup
from littlebit.fast.decoding.fused_llama_latent import LatentEngine
from littlebit.fast.decoding.graph_decoder import DecodeLoop, decode_batch
from littlebit.fast.decoding.ops import HeadNorms, Heads, ResidualStream
from littlebit.fast.decoding.parity import logit_bound
from littlebit.fast.decoding.static_cache import StaticEngine
from littlebit.fast.decoding.torch_ops import TorchOps
from littlebit.fast.kernels import dispatch
from littlebit.fast.memory import MODEL_SHAPES, ModelShape
from littlebit.fast.models.embeddings import QuantizedHead, quantize_embeddings_, quantize_table
from littlebit.fast.models.generation_settings import GenerationConfig
from server import serving
from shares import combine_partials
from test_decode_cuda import FUSED, KINDS, by_transformers, columns, packed_model, prompt, put_in_charge

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # Numba's, with a newer NumPy
]
CUDA = torch.device("cuda", 0)
HEADS64 = {"hidden_size": 256, "head_dim": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
SHAPES = [Heads(32, 32, 128), Heads(64, 8, 128), Heads(9, 3, 64), Heads(14, 2, 64), Heads(8, 4, 256), Heads(40, 1, 128)]


def numbers(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator("cuda").manual_seed(seed), device="cuda").to(dtype)


@pytest.mark.parametrize("family", list(KINDS))
def test_any_family_generates_the_same_text_on_both_devices(family, monkeypatch, caplog):
    """Test prompts of several lengths, graphs, and two larger caches, in float32 on both devices."""
    monkeypatch.setattr(graph_decoder, "SMALLEST_CAPACITY", 8)
    put_in_charge(monkeypatch, StaticEngine)
    model, prompts = packed_model(family), [prompt(length, seed=length) for length in (3, 11)]
    expected = [by_transformers(model, tokens, 30) for tokens in prompts]
    with caplog.at_level(logging.WARNING):
        assert columns(decode_batch(model.cuda(), prompts, GenerationConfig(30))) == expected
    assert "no graph can be captured" not in caplog.text


@pytest.mark.parametrize("batch", [1, 2, 16])
@pytest.mark.parametrize("position", [0, 1, 63, 200, 1000])
@pytest.mark.parametrize("heads", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_attention_equals_torch(heads, position, batch, dtype):
    """Both round keys and values to float16, so a weighted mean is as exact as scores and values are."""
    cached = torch.float16
    ours = CudaOps(heads, cached, 1e-5, batch, CUDA)
    positions = (position + 7 * torch.arange(batch, device="cuda")) % 1024
    projected = numbers(batch, (heads.heads + 2 * heads.kv_heads) * heads.size, dtype=dtype)
    cache = [numbers(batch, heads.kv_heads, 1024, heads.size, seed=i, dtype=cached) for i in (1, 2)]
    angles = numbers(2, 1024, heads.size // 2, seed=3).clamp(-1, 1)
    norms = HeadNorms(*(1 + numbers(2, heads.size, seed=4) / 10)) if heads.size == 64 else None
    twin = [each.clone() for each in cache]
    got = ours.attend(projected, *cache, positions, angles, norms)
    again = ours.attend(projected, *cache, positions, angles, norms)  # the arrival counters are zero again
    want = TorchOps(heads, cached, 1e-5).attend(projected.float(), *twin, positions, angles, norms)
    assert torch.equal(got, again)
    partials = ours.attend(projected, *cache, positions, angles, norms, combine=False)
    combined = combine_partials(partials).flatten(1)
    assert partials.ndim == 4
    assert ((combined - got).abs() <= (2**-10 if dtype == torch.float16 else 2**-16) * combined.abs() + 2**-18).all()
    for mine, theirs in zip(cache, twin, strict=True):
        assert ((mine - theirs).abs() <= 2**-10 * theirs.abs() + 2**-20).all()
    assert ((got.float() - want).abs() <= 2**-8).all()  # torch rounds queries and results to float16
    assert (got.float() - want).norm() <= 2**-9 * want.norm()


@pytest.mark.parametrize("size", [576, 4096, 8192])
def test_residual_stream_norm_and_swiglu_equal_torch(size):
    heads = Heads(1, 1, 64)
    ours, theirs = CudaOps(heads, torch.float16, 1e-5, 3, CUDA), TorchOps(heads, torch.float16, 1e-5)
    embedding = torch.nn.Embedding(100, size, device="cuda", dtype=torch.float16)
    tokens, weight = torch.tensor([3, 99, 0], device="cuda"), numbers(size)
    streams: list[ResidualStream] = [each.embed(tokens, embedding) for each in (ours, theirs)]
    for each, stream in zip((ours, theirs), streams, strict=True):
        each.add(numbers(3, size, seed=1, dtype=torch.float16), stream)
    assert torch.equal(streams[0].x, streams[1].x)
    mine, other = (each.rms_norm(s, weight) for each, s in zip((ours, theirs), streams, strict=True))
    assert ((mine - other).abs() <= 2**-9 * other.abs() + 2**-24).all()
    x = numbers(3, 2 * size, dtype=torch.float16)
    mine, other = (each.swiglu(x) for each in (ours, theirs))
    assert ((mine - other).abs() <= 2**-9 * other.abs() + 2**-20).all()


@pytest.mark.parametrize("rows", [1, 2, 5, 16])
@pytest.mark.parametrize("bits", [8, 4])
def test_logits_of_a_table_equal_torch(bits, rows):
    head = QuantizedHead(quantize_table(numbers(1003, 576).cpu(), bits)).cuda()
    x = numbers(rows, 576, dtype=torch.float16)
    got = CudaOps(Heads(1, 1, 64), torch.float16, 1e-5, rows, CUDA).logits(x, head)
    want = head(x.double())
    assert (got - want).abs().max() <= 2**-18 * (x.double().abs() @ head.table.rows(slice(None)).double().abs().T).max()


@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize("family", FUSED)
def test_fused_logits_are_within_what_float16_gives(family, bits):
    """Scale the bound of parity.py, for float32, to float16's rounding: keys, values and the head are float16."""
    assert dispatch.cuda_kernels(0)
    model = packed_model(family, **HEADS64)
    quantize_embeddings_(model, bits)
    text = torch.tensor(prompt(24))
    (exact,), (bound,) = logit_bound(model, [text])
    engine = fused_engine(model.cuda(), 1, 32)
    assert isinstance(engine, FusedEngine)
    assert all(isinstance(group, PackedGroup) for groups in engine.groups for group in groups)
    with torch.inference_mode():
        rows = [engine.prefill([text[:12].tolist()])]
        rows += [engine.step(text[12 + at : 13 + at].cuda()) for at in range(12)]
    for at, logits in enumerate(rows):
        error = (logits[0].double().cpu() - exact[11 + at]).abs().max()
        assert error <= 2**13 * bound[11 + at]
        assert error <= 0.05 * exact[11 + at].abs().max()


@pytest.mark.parametrize("batch", [1, 5, 16])
@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_replayed_steps_equal_steps_without_a_graph(batch, temperature, monkeypatch):
    """Grow the cache, with sequences of several lengths."""
    monkeypatch.setattr(graph_decoder, "SMALLEST_CAPACITY", 16)
    model = packed_model("Llama", **HEADS64).cuda()
    prompts = [prompt(3 + row % 7, seed=row) for row in range(batch)]

    def text(captures):
        loop = DecodeLoop(
            fused_engine(model, batch, 16), GenerationConfig(64, temperature, 40, 0.95, 0.01, 1.2, seed=3)
        )
        loop.captures = captures
        return columns(graph_decoder.decode_steps(loop, prompts, 60, ()))

    replayed = text(True)
    assert replayed == text(False)
    assert len({tuple(row) for row in replayed}) == len({tuple(each) for each in prompts})


def test_a_sequence_does_not_depend_on_those_beside_it():
    model = packed_model("Llama", **HEADS64).cuda()
    prompts = [prompt(length, seed=length) for length in (5, 30, 300)]
    together = columns(decode_batch(model, prompts, GenerationConfig(40)))
    for tokens, new in zip(prompts, together, strict=True):
        (alone,) = columns(decode_batch(model, [tokens], GenerationConfig(40)))
        assert sum(a == b for a, b in zip(alone, new, strict=True)) >= 20  # equal until two logits nearly are


def test_a_step_waits_for_nothing():
    engine = fused_engine(packed_model("Llama", **HEADS64).cuda(), 2, 64)
    loop = DecodeLoop(engine, GenerationConfig(64, 1.0, 10, 0.9, 0.01, 1.2))
    with torch.inference_mode():
        loop.start([prompt(4), prompt(5)])
        loop.step()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that this mode is a prototype
            torch.cuda.set_sync_debug_mode("error")
        try:
            loop.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_the_shipped_model_says_the_same_on_both_devices():
    try:
        fetch("smollm2")
    except OSError as error:
        pytest.skip(f"the model that it is made of cannot be had: {error}")
    on_cpu, on_gpu = (lb.load("smollm2-0.55bit", device=device) for device in ("cpu", "cuda"))
    text = "Once upon a time, in a small town by the sea,"
    one, two = (lb.generate(model, text, 32) for model in (on_cpu, on_gpu))
    assert one[:40] == two[:40]


@pytest.mark.parametrize("kind", ["latent", "latent-int8"])
@pytest.mark.parametrize("batch", [1, 3])
def test_latents_give_the_logits_of_keys_and_values(kind, batch):
    model = random_model(ModelShape("a small one", 512, 640, 2, 8, 4, 64, 128, 256), 0.9)
    text = [prompt(190 + 60 * row, seed=row) for row in range(batch)]  # some tiles of tokens
    made = model, batch, 400, CUDA, torch.float16
    engines = [FusedEngine(*made), LatentEngine(*made, kv_cache=kind)]
    with torch.inference_mode():
        tokens = torch.arange(batch, device="cuda")
        one, two = ([each.prefill(text)] + [each.step(tokens) for _ in range(20)] for each in engines)
    for mine, theirs in zip(two, one, strict=True):
        assert (mine - theirs).float().norm() <= (0.02 if kind == "latent" else 0.1) * theirs.float().norm()


def test_replayed_steps_with_latents_equal_steps_without_a_graph():
    model = random_model(ModelShape("a small one", 512, 640, 2, 8, 4, 64, 100, 4096), 0.9)
    prompts = [prompt(2040, seed=1), prompt(9, seed=2)]

    def text(captures):
        loop = DecodeLoop(LatentEngine(model, 2, 2048, CUDA, torch.float16))
        loop.captures = captures
        return columns(graph_decoder.decode_steps(loop, [[token % 100 for token in each] for each in prompts], 30, ()))

    assert text(True) == text(False)


def test_ten_times_the_context_on_the_same_memory():
    """Take two blocks of Llama-2-7B's shape at 0.1 bits, and 1 GiB for the cache."""
    shape = MODEL_SHAPES["llama2-7b"]._replace(layers=2, vocabulary=1000)
    model, budget = random_model(shape, 0.1), 1 << 30
    lengths = []
    for kind in ("full", "latent-int8"):
        one = engine_of(model, 1, 1, CUDA, torch.float16, kind).token_bytes
        lengths.append(budget // one)
    assert lengths[1] >= 10 * lengths[0]
    engine = engine_of(model, 1, 10 * lengths[0] + 64, CUDA, torch.float16, "latent-int8")
    assert engine.token_bytes * engine.capacity <= budget
    engine.positions.fill_(10 * lengths[0])
    with torch.inference_mode():
        assert engine.step(torch.tensor([7], device="cuda")).isfinite().all()


def test_a_server_writes_what_a_batch_of_sixteen_writes(chat_model):
    pytest.importorskip("uvicorn", reason="the extra is not installed: pip install 'littlebit[serve]'")
    tokenizer = lb.load_tokenizer(chat_model)
    prompts = ["It was the best of times, it was the worst of times"[at : 9 + 2 * at] for at in range(16)]
    tokens = [tokenizer(text)["input_ids"] for text in prompts]
    config = GenerationConfig(40, temperature=0.0, stop_tokens=())
    expected = columns(decode_batch(lb.load(chat_model).to(CUDA), tokens, config))
    asked = {"model": "tiny", "prompt": prompts, "max_tokens": 40, "temperature": 0, "ignore_eos": True}
    with serving(chat_model, "--device", CUDA) as (address, _):
        request = urllib.request.Request(f"{address}/v1/completions", json.dumps(asked).encode())
        request.add_header("Content-Type", "application/json")
        with urllib.request.urlopen(request) as answer:
            texts = [each["text"] for each in json.load(answer)["choices"]]
    assert texts == [tokenizer.decode(each) for each in expected]
