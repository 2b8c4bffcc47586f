"""Test exported GGUF files with transformers' reader and by llama.cpp's format."""

import subprocess
import sys

import gguf
import littlebit.fast as lb
import numpy as np
import pytest
import torch
from compare import assert_same
from conftest import make_tiny_llama
from littlebit.fast.checkpoints.gguf import PRECISIONS, dense_tensors, interleaved, pre_tokenizer_name
from littlebit.fast.models.embeddings import quantize_embeddings_
from littlebit.fast.models.hf_names import dense_gguf
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen3Config


def read(path):
    """Read the model in a GGUF file with transformers."""
    options = {"dtype": torch.float32} | dense_gguf()
    return AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, **options)


@pytest.fixture(scope="module")
def checkpoint(tiny_llama, tmp_path_factory):
    model = lb.load_model(tiny_llama)
    lb.quantize_(model, lb.Config(bits=2.5), progress=False)
    return lb.save(model, tmp_path_factory.mktemp("gguf") / "out", lb.load_tokenizer(tiny_llama))


def rounded(model, precision):
    """Return the tensors that the file should hold, by their names in transformers."""
    expected = {}
    for name, tensor in dense_tensors(model):
        array = tensor.float().numpy()
        if array.ndim == 2 and precision == "f16":
            array = array.astype(np.float16).astype(np.float32)
        elif array.ndim == 2:
            blocks = array.reshape(len(array), -1, 32)
            scale = np.abs(blocks).max(-1, keepdims=True) / 127
            codes = np.divide(blocks, scale, where=scale > 0, out=np.zeros_like(blocks))
            codes = np.sign(codes) * np.floor(np.abs(codes) + 0.5)
            array = (scale.astype(np.float16).astype(np.float32) * codes).reshape(array.shape)
        expected[name] = array
    return expected


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_file_holds_the_dense_model(precision, tied, tmp_path):
    source = make_tiny_llama(tmp_path / "model", tie_word_embeddings=tied, attention_bias=False)
    model = lb.load_model(source)
    lb.quantize_(model, lb.Config(bits=2.5), progress=False)
    lb.save_gguf(lb.pack_(model), tmp_path / "model.gguf", lb.load_tokenizer(source), precision)
    found = read(tmp_path / "model.gguf")
    expected, state = rounded(model, precision), found.state_dict()
    assert ("lm_head.weight" in expected) == (not tied)
    assert tied == (found.lm_head.weight is found.model.embed_tokens.weight)
    for name, array in expected.items():
        assert_same(state[name], array)


@pytest.mark.parametrize("bits", [8, 4])
def test_quantised_embeddings_are_written_as_what_they_stand_for(bits, tiny_llama, tmp_path):
    model = lb.load_model(tiny_llama)
    lb.quantize_(model, lb.Config(bits=2.5), progress=False)
    quantize_embeddings_(lb.pack_(model), bits)
    tensors = dict(dense_tensors(model))
    assert_same(tensors["model.embed_tokens.weight"], model.get_input_embeddings().table.rows(slice(None)))
    assert "lm_head.weight" not in tensors


@pytest.mark.parametrize("config", [Qwen2Config, Qwen3Config])
def test_qwen_is_written_as_it_lies(config, tiny_llama, tmp_path):
    sizes = {"vocab_size": 260, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1}
    sizes |= {"head_dim": 128} if config is Qwen3Config else {}  # as transformers' reader takes for granted
    made = AutoModelForCausalLM.from_config(config(**sizes, num_attention_heads=4, num_key_value_heads=2))
    made.save_pretrained(tmp_path / "model")
    model = lb.load_model(tmp_path / "model")
    lb.quantize_(model, lb.Config(bits=2.5), progress=False)
    lb.save_gguf(lb.pack_(model), tmp_path / "model.gguf", lb.load_tokenizer(tiny_llama))
    state = read(tmp_path / "model.gguf").state_dict()
    for name, array in rounded(model, "f16").items():
        assert_same(state[name], array)


def test_interleaved_puts_pairs_that_rotate_together_side_by_side(checkpoint):
    config = lb.load(checkpoint).config
    rows = torch.arange(64)[:, None]  # 4 heads of 16
    mine = interleaved("model.layers.0.self_attn.q_proj.weight", rows, config).flatten().tolist()
    assert mine == [16 * head + at + half for head in range(4) for at in range(8) for half in (0, 8)]
    other = interleaved("model.layers.0.self_attn.v_proj.weight", rows, config)
    assert_same(other, rows)


def test_the_command_writes_a_file_in_a_fresh_process(checkpoint, tmp_path):
    """Transformers' reader ignores biases of a Llama's attention, so the test reads the file itself."""
    out = tmp_path / "new" / "model.gguf"
    command = [sys.executable, "-m", "littlebit.fast", "export", checkpoint, out, "--to", "gguf"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "not packed" in done.stdout
    reader = gguf.GGUFReader(out)
    model = lb.load(checkpoint)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    layer = model.model.layers[1].self_attn.k_proj
    bias = interleaved("model.layers.1.self_attn.k_proj.bias", layer.bias.float(), model.config)
    assert_same(np.array(tensors["blk.1.attn_k.bias"].data), bias)
    weight = interleaved("model.layers.1.self_attn.k_proj.weight", layer.weight, model.config)
    assert_same(np.array(tensors["blk.1.attn_k.weight"].data), weight.half())
    value = {key: reader.get_field(key).contents() for key in ("llama.attention.head_count_kv", "tokenizer.ggml.pre")}
    tokens = reader.get_field("tokenizer.ggml.tokens").contents()
    assert (tokens[256], len(tokens)) == ("<s>", 260)
    assert value == {"llama.attention.head_count_kv": 2, "tokenizer.ggml.pre": "gpt-2"}
    assert sorted(entry.name for entry in out.parent.iterdir()) == ["model.gguf"]
    again = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False, timeout=300)
    assert again.returncode == 2
    assert "--overwrite" in again.stderr


def test_what_cannot_be_written_leaves_no_file(checkpoint, tiny_llama, tmp_path):
    model, tokenizer = lb.load(checkpoint), lb.load_tokenizer(tiny_llama)
    with pytest.raises(ValueError, match="precision must be one of f16, q8_0"):
        lb.save_gguf(model, tmp_path / "a.gguf", tokenizer, "q4_0")
    model.config.rope_parameters = {"rope_type": "llama3"}
    with pytest.raises(ValueError, match="plain rotary positions"):
        lb.save_gguf(model, tmp_path / "a.gguf", tokenizer)
    model = lb.load(checkpoint)
    model.model.norm.extra = torch.nn.Parameter(torch.zeros(1))
    with pytest.raises(ValueError, match=r"no name for tensor model\.norm\.extra"):
        lb.save_gguf(model, tmp_path / "a.gguf", tokenizer)
    model = lb.load(checkpoint)
    model.config.model_type = "gpt2"
    with pytest.raises(ValueError, match="not of gpt2"):
        lb.save_gguf(model, tmp_path / "a.gguf", tokenizer)
    with pytest.raises(ValueError, match="byte-level BPE tokenizers only"):
        lb.save_gguf(lb.load(checkpoint), tmp_path / "a.gguf", object())
    with pytest.raises(FileExistsError):
        lb.save_gguf(lb.load(checkpoint), tmp_path, tokenizer)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("steps", "name"),
    [
        ({"type": "ByteLevel"}, "gpt-2"),
        ([{"type": "Digits", "individual_digits": True}, {"type": "ByteLevel"}], "smollm"),
        ([{"type": "Split", "pattern": {"Regex": r"\p{N}{1,3}| ?[^\s]+"}}, {"type": "ByteLevel"}], "llama-bpe"),
        ([{"type": "Split", "pattern": {"Regex": r"\p{N}| ?[^\s]+"}}, {"type": "ByteLevel"}], "qwen2"),
        ([{"type": "Whitespace"}], None),
    ],
)
def test_splitting_knows_tokenizers_by_their_steps(steps, name):
    described = steps if isinstance(steps, dict) else {"type": "Sequence", "pretokenizers": steps}
    if name is None:
        with pytest.raises(ValueError, match="Whitespace"):
            pre_tokenizer_name(described)
    else:
        assert pre_tokenizer_name(described) == name
