"""Test on a CPU what the benchmark of decoding on a GPU makes and counts: its models and their bytes."""

import pytest
import torch
from littlebit.fast.bench import decode_cuda as bench
from littlebit.fast.cli.main import main
from littlebit.fast.decoding.fused_llama import FusedEngine, parts_of
from littlebit.fast.memory import ModelShape, model_memory
from littlebit.fast.models.layers import PackedLinear
from test_decode_cuda import packed_model

SHAPE = ModelShape("a small one", 128, 192, 2, 4, 2, 32, 96, 256)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("bits", "paths"), [(0.9, 1), (1.5, 2), (None, 1)])
def test_random_models_have_the_bytes_of_their_shape_and_run(bits, paths, tied):
    shape = SHAPE._replace(tied=tied, biases="qkv" if tied else "none")
    model = bench.random_model(shape, bits, paths, "cpu")
    linear = [module for block in model.blocks for module in bench.modules_of(block)]
    assert all(isinstance(module, PackedLinear) == (bits is not None) for module in linear)
    assert bench.weights_bytes(model) == model_memory(shape, bits, paths).weights
    with torch.inference_mode():
        engine = FusedEngine(model, 2, 32, torch.device("cpu"), torch.float16)
        engine.prefill([[1, 2, 3], [4]])
        logits = engine.step(torch.tensor([5, 6]))
    assert logits.shape == (2, shape.vocabulary)
    assert 0.01 < logits.std() < 100
    assert engine.token_bytes == model_memory(shape, None, context=1).kv_cache
    unread = 0 if tied else 2 * shape.hidden * (shape.vocabulary - 2)
    assert bench.unread_bytes(model, 2) == unread


def test_stored_bits_are_below_the_ceiling():
    assert 0.85 < bench.stored_bits(SHAPE, 0.9, 1) <= 0.9


def test_a_loaded_models_bytes_are_counted():
    model = packed_model("Llama")
    parts = parts_of(model, torch.float32)
    linear = sum(bench.module_bytes(module) for block in parts.blocks for module in bench.modules_of(block))
    packed = sum(t.nbytes for m in model.modules() if isinstance(m, PackedLinear) for t in m.buffers())
    assert linear == packed
    assert bench.weights_bytes(parts) == packed + 2 * 4 * 128 * 64 + 2 * 64 * 5


def test_every_context_is_timed_with_every_cache_where_there_is_room(monkeypatch, capsys):
    """Pretend that there is a GPU, on which a step takes a millisecond per token of context."""

    def fits(shape, bits, paths, tokens, batch, kv_cache="full"):
        return bits is not None and (kv_cache == "latent" or tokens < 1000)

    def timed(model, context, batch, tokens, copy_rate, profile, kv_cache):
        counted = {"weights_bytes": 1, "peak_bytes": 1, "fraction_of_copy": 0.5, "tokens_per_s": 1 / context}
        return counted | {"time_ms": context / 1e3, "kv_cache": kv_cache}

    for name, stand_in in {"fits": fits, "timed_engine": timed, "random_model": lambda *of: None}.items():
        monkeypatch.setattr(bench, name, stand_in)
    monkeypatch.setattr(bench, "copy_bytes_per_second", lambda: 1.0)
    for name in ("reset_peak_memory_stats", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "any")
    words = "bench decode --device cuda --bits 0.1 --tokens 8 --context 128 4096 --kv-cache full latent"
    assert main(words.split()) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [line[3:5] for line in lines] == [
        ["context", "cache"], ["128", "full"], ["128", "latent"], ["4096", "latent"]
    ]  # fmt: skip


def test_llama_shape_refuses_other_shapes():
    for name in ("opt-1.3b", "phi4-14b", "llama9"):
        with pytest.raises(ValueError, match="choose one of llama-7b, llama2-7b"):
            bench.llama_shape(name)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_command_says_that_there_is_no_gpu(capsys):
    assert main(["bench", "decode", "--device", "cuda"]) == 2
    assert "torch sees no GPU" in capsys.readouterr().err
