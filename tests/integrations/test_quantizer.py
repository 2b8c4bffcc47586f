"""Test LittleBit inside transformers: from_pretrained, save_pretrained, generate, pipeline, quantization."""

import copy
import json
import os
import shutil
import subprocess
import sys

import littlebit.fast as lb
import pytest
import torch
from compare import assert_same
from conftest import make_tiny_llama
from littlebit.fast.checkpoints.format import INDEX, weight_files
from littlebit.fast.models.embeddings import quantize_embeddings_
from littlebit.fast.models.layers import LittleBitLinear
from littlebit.fast.models.quantize import packed_layers
from random_checkpoint import peak_over_size, random_checkpoint
from safetensors.torch import load_file
from test_model import rewrite, without_checksums
from transformers import AutoModelForCausalLM

BITS = 2.5
LAYER = "model.layers.0.mlp.up_proj"
TOKENS = torch.arange(24)[None] % 256


def logits(model):
    with torch.inference_mode():
        return model(TOKENS).logits.float()


def quantised(source):
    model = lb.load_model(source)
    lb.quantize_(model, lb.Config(bits=BITS), progress=False)
    return model


@pytest.fixture(scope="module")
def checkpoint(tiny_llama, tmp_path_factory):
    """Save a checkpoint of at least two shards."""
    path = tmp_path_factory.mktemp("quantizer") / "out"
    lb.save(quantised(tiny_llama), path, lb.load_tokenizer(tiny_llama), bits=BITS, shard_bytes=20_000)
    assert (path / INDEX).is_file()
    assert len(weight_files(path)) > 1
    return path


FRESH = """
import sys
import littlebit.fast as lb
assert "transformers" not in sys.modules
import torch
from transformers import AutoModelForCausalLM, pipeline
path, again = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
assert [name for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)] == ["lm_head"]
assert model.lm_head.weight is model.model.embed_tokens.weight
tokens = torch.arange(24)[None]
expected = lb.load(path)(tokens).logits
assert torch.equal(model(tokens).logits, expected)
new = model.generate(tokens, max_new_tokens=5, min_new_tokens=5, do_sample=False)
assert new.shape == (1, 29)
model.save_pretrained(again, max_shard_size="20KB")
assert torch.equal(AutoModelForCausalLM.from_pretrained(again)(tokens).logits, expected)
assert torch.equal(lb.load(again)(tokens).logits, expected)
speak = pipeline("text-generation", model=path, dtype=torch.float32)
text = speak("abc", max_new_tokens=6, do_sample=False, return_full_text=False)[0]["generated_text"]
assert text == lb.generate(lb.load(path), "abc", 6), text
"""


def test_a_fresh_process_loads_saves_generates_and_pipes(checkpoint, tmp_path):
    command = [sys.executable, "-W", "ignore", "-c", FRESH, str(checkpoint), str(tmp_path / "again")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr


def test_transformers_imported_first_knows_littlebit_too():
    code = (
        "import transformers.quantizers.auto as auto, littlebit.fast as lb;"
        "assert auto.AUTO_QUANTIZATION_CONFIG_MAPPING['littlebit'] is lb.LittleBitConfig"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)


@pytest.mark.parametrize("first", ["lb.load(path)", "lb.LittleBitConfig()"])
def test_whatever_is_done_first_the_format_is_known(first, checkpoint):
    code = (
        f"import sys, littlebit.fast as lb; path = sys.argv[1]; {first}\n"
        "from transformers import AutoModelForCausalLM\n"
        "from littlebit.fast.models.quantize import packed_layers\n"
        "assert len(packed_layers(AutoModelForCausalLM.from_pretrained(path))) == 14"
    )
    done = subprocess.run([sys.executable, "-c", code, checkpoint], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "cannot plug" not in done.stderr


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_from_pretrained_casts_what_is_not_packed(checkpoint, dtype):
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype)
    assert model.dtype == dtype
    for name, layer in packed_layers(lb.load(checkpoint)).items():
        mine = model.get_submodule(name)
        assert_same(mine.bias, layer.bias) if layer.bias is not None else None
        for left, right in zip(mine.factors(), layer.factors(), strict=True):
            for one, other in zip(left, right, strict=True):
                assert_same(one, other)
    assert_same(logits(model), logits(lb.load(checkpoint, dtype=dtype)))


@pytest.mark.parametrize("options", [{"device_map": "auto"}, {"device_map": "cpu"}, {"low_cpu_mem_usage": True}])
def test_from_pretrained_takes_the_usual_options(checkpoint, options):
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32, **options)
    assert_same(logits(model), logits(lb.load(checkpoint)))


def test_from_pretrained_spreads_over_devices(checkpoint, tmp_path):
    """One block is offloaded to disk, as on a machine with little memory."""
    places = {"model.embed_tokens": "cpu", "lm_head": "cpu", "model.rotary_emb": "cpu", "model.norm": "cpu"}
    places |= {"model.layers.0": "cpu", "model.layers.1": "disk"}
    options = {"device_map": places, "offload_folder": tmp_path, "dtype": torch.float32}
    model = AutoModelForCausalLM.from_pretrained(checkpoint, **options)
    assert_same(logits(model), logits(lb.load(checkpoint)))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("bits", [16, 8, 4])
def test_from_pretrained_reads_quantised_embeddings(bits, tied, tmp_path):
    model = quantised(make_tiny_llama(tmp_path / "model", tie_word_embeddings=tied))
    quantize_embeddings_(model, bits)
    expected = logits(lb.load(lb.save(model, tmp_path / "out")))
    for path in ("out", "again"):
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / path, dtype=torch.float32, device_map="auto")
        assert_same(logits(loaded), expected)
        loaded.save_pretrained(tmp_path / "again")
    head = [name for name in load_file(tmp_path / "again" / "model.safetensors") if name.startswith("lm_head")]
    assert bool(head) == (not tied)


def test_from_pretrained_quantises_an_ordinary_model(tiny_llama, tmp_path):
    config = lb.LittleBitConfig(bits=BITS, exclude=["*.down_proj"])
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, quantization_config=config, dtype=torch.float32)
    mine = lb.load_model(tiny_llama)
    lb.quantize_(mine, lb.Config(bits=BITS, exclude=("*.down_proj",)), progress=False)
    assert set(packed_layers(model)) == set(packed_layers(lb.pack_(mine)))
    assert_same(logits(model), logits(mine))
    assert config.layers is None  # the caller's own is as it was, fit for the next model
    model.save_pretrained(tmp_path / "out")
    assert lb.info(tmp_path / "out")["target_bits"] == BITS
    assert_same(logits(lb.load(tmp_path / "out")), logits(model))


def test_config_refuses_what_from_pretrained_cannot_do(tiny_llama):
    with pytest.raises(TypeError, match="importance"):
        lb.LittleBitConfig(importance=True)
    with pytest.raises(ValueError, match="smallest possible value is"):
        AutoModelForCausalLM.from_pretrained(tiny_llama, quantization_config=lb.LittleBitConfig(bits=0.1))


def test_save_pretrained_works_after_quantize_and_pack(tiny_llama, tmp_path):
    model = quantised(tiny_llama)
    with pytest.raises(ValueError, match=r"littlebit\.fast\.pack_ first"):
        model.save_pretrained(tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())
    expected = logits(lb.pack_(copy.deepcopy(model)))
    lb.pack_(model).save_pretrained(tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert_same(logits(loaded), expected)
    loaded.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text())["quantization_config"]["bits"] == BITS


def change(path, edit):
    """Remove the checksums, and edit the tensors of the file that holds the layer."""
    for file in weight_files(without_checksums(path)):
        if f"{LAYER}.paths.0.h" in load_file(file):
            rewrite(path, edit, file.name)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.pop(f"{LAYER}.paths.0.h"), f"{LAYER}.paths.0.h is missing"),
        (lambda t: t.update({f"{LAYER}.paths.0.h": torch.zeros(95).half()}), r"is \(95,\)"),
        (lambda t: t.update({f"{LAYER}.paths.0.h": torch.zeros(96)}), " F32, but"),
    ],
)
def test_from_pretrained_refuses_damaged_checkpoints(edit, message, checkpoint, tmp_path):
    """Without our checks transformers would leave the tensor uninitialized, or cast it."""
    path = shutil.copytree(checkpoint, tmp_path / "copy")
    change(path, edit)
    for load in (AutoModelForCausalLM.from_pretrained, lb.load):
        with pytest.raises(lb.CheckpointError, match=message):
            load(path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: (path / INDEX).write_text("{"), "is damaged"),
        (lambda path: (path / INDEX).write_text('{"weight_map": {"a": "../b.safetensors"}}'), "not the name of a file"),
        (lambda path: (path / INDEX).write_text('{"weight_map": {}}'), "files beside it"),
        (lambda path: os.remove(weight_files(path)[1]), "there is no model-00002"),
        (lambda path: os.truncate(weight_files(path)[1], 100), "model-00002.* is damaged or incomplete"),
    ],
)
def test_load_and_info_name_the_damaged_shard(damage, message, checkpoint, tmp_path):
    path = shutil.copytree(checkpoint, tmp_path / "copy")
    damage(path)
    for read in (lb.load, lb.info):
        with pytest.raises(lb.CheckpointError, match=message):
            read(path)


def test_shards_hold_the_same_as_one_file(checkpoint, tiny_llama, tmp_path):
    whole = lb.save(quantised(tiny_llama), tmp_path / "whole", bits=BITS)
    expected = load_file(whole / "model.safetensors")
    found = [(name, tensor) for file in weight_files(checkpoint) for name, tensor in load_file(file).items()]
    assert sorted(name for name, _ in found) == sorted(expected)
    for name, tensor in found:
        assert_same(tensor, expected[name])
    sharded, single = lb.info(checkpoint), lb.info(whole)
    assert sharded["file_bytes"] == sum(file.stat().st_size for file in weight_files(checkpoint))
    for key in ("bits_per_weight", "linear_bytes", "other_bytes", "kinds"):
        assert sharded[key] == single[key]


def test_packed_scales_keep_their_dtype_when_the_model_is_cast(checkpoint):
    model = lb.load(checkpoint).to(torch.bfloat16).double().float()
    assert model.model.norm.weight.dtype == torch.float32
    for name, layer in packed_layers(lb.load(checkpoint)).items():
        for mine, theirs in zip(model.get_submodule(name).factors(), layer.factors(), strict=True):
            for left, right in zip(mine, theirs, strict=True):
                assert_same(left, right)
    moved = packed_layers(model.to("meta", torch.bfloat16))[LAYER]
    assert {tensor.device.type for tensor in moved.buffers()} == {"meta"}
    assert {tensor.dtype for tensor in moved.buffers() if tensor.is_floating_point()} == {torch.float16}
    trained = LittleBitLinear([lb.dual_svid(torch.eye(4), 2)]).double()
    assert all(p.dtype == torch.float64 for p in trained.parameters())


def test_loading_takes_little_more_memory_than_the_packed_size(tmp_path):
    sizes = {"num_attention_heads": 8, "num_key_value_heads": 8, "max_position_embeddings": 64}
    tiny = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 64}
    large = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 12, "vocab_size": 24000}
    random_checkpoint(tmp_path / "tiny", bits=4, **sizes, **tiny)
    random_checkpoint(tmp_path / "large", shard_bytes=20_000_000, **sizes, **large)
    assert lb.info(tmp_path / "large")["file_bytes"] > 100e6
    for loader in ("transformers", "lb"):
        assert peak_over_size(tmp_path / "tiny", tmp_path / "large", loader) < 1.3
