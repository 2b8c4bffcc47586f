"""Test that other people's models are read completely, or refused: folders, GGUF files, quantized models."""

import json
import os
import shutil

import gguf
import littlebit.fast as lb
import numpy as np
import pytest
import torch
from compare import assert_same
from conftest import make_tiny_llama
from littlebit.fast.checkpoints.dense_files import foreign_method
from littlebit.fast.checkpoints.fetch import resolve
from littlebit.fast.checkpoints.format import INDEX, WEIGHTS
from littlebit.fast.checkpoints.gguf_reader import ROPE_FACTORS, gguf_config, llama3_factors, read_gguf_header
from littlebit.fast.cli.estimate import configuration, estimate
from littlebit.fast.cli.main import main
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

BITS = 2.5
UP = "model.layers.1.mlp.up_proj.weight"
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


@pytest.fixture
def folder(tiny_llama, tmp_path):
    return shutil.copytree(tiny_llama, tmp_path / "dense")


@pytest.fixture
def untied(tmp_path):
    """Save a model with a separate head whose configuration ties the head to the embedding."""
    made = make_tiny_llama(tmp_path / "untied", tie_word_embeddings=False)
    change(made, tie_word_embeddings=True)
    return made


def change(folder, **settings):
    """Change settings in config.json."""
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


def rewrite(folder, edit):
    """Apply `edit` to the dict of tensors in a folder."""
    save_file(edit(load_file(folder / WEIGHTS)), folder / WEIGHTS, metadata={"format": "pt"})


def shard(folder, count=2):
    """Split a folder's weights into shards with an index."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    (folder / WEIGHTS).unlink()
    model.save_pretrained(folder, max_shard_size="80KB")
    files = sorted(set(json.loads((folder / INDEX).read_text())["weight_map"].values()))
    assert len(files) >= count
    return files


def logits(model):
    with torch.inference_mode():
        return model(torch.arange(20)[None]).logits


WRONG = {
    "missing": (lambda t: {name: each for name, each in t.items() if name != UP}, rf"tensor {UP} is missing"),
    "left over": (
        lambda t: t | {"model.layers.7.mlp.up_proj.weight": torch.ones(2)},
        r"layers\.7\S* is left over",
    ),
    "another shape": (lambda t: t | {UP: torch.ones(96, 63)}, rf"tensor {UP} must be \(96, 64\), got \(96, 63\)"),
    "compiled": (lambda t: {f"_orig_mod.{name}": each for name, each in t.items()}, r"'_orig_mod\.' of a wrapper"),
    "parallel": (lambda t: {f"module.{name}": each for name, each in t.items()}, r"'module\.' of a wrapper"),
    "adapted": (lambda t: {f"base_model.model.{name}": each for name, each in t.items()}, r"merge_and_unload"),
    "with lora": (
        lambda t: t | {UP.replace("weight", "lora_A.default.weight"): torch.ones(4, 64)},
        "a LoRA adapter that is not merged",
    ),
    "an extra bias": (lambda t: t | {UP.replace("weight", "bias"): torch.ones(96)}, r"up_proj\.bias is left over"),
}


@pytest.mark.parametrize("name", WRONG)
def test_load_model_refuses_what_does_not_fit_and_names_it(name, folder):
    edit, message = WRONG[name]
    rewrite(folder, edit)
    with pytest.raises(lb.CheckpointError, match=message):
        lb.load_model(folder)


def test_load_model_reads_what_is_harmless(folder):
    """Old versions stored rotary frequencies; a model without a head has names without the prefix."""
    expected = logits(lb.load_model(folder))
    rewrite(folder, lambda t: t | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)})
    assert_same(logits(lb.load_model(folder)), expected)
    rewrite(folder, lambda t: {name.removeprefix("model."): each for name, each in t.items() if "inv_freq" not in name})
    assert_same(logits(lb.load_model(folder)), expected)


def test_load_model_follows_links_of_a_dense_folder(folder, tmp_path):
    expected = logits(lb.load_model(folder))
    (tmp_path / "links").mkdir()
    for file in folder.iterdir():
        (tmp_path / "links" / file.name).symlink_to(file)
    assert_same(logits(lb.load_model(tmp_path / "links")), expected)


@pytest.mark.parametrize("cut", ["no file", "half a file", "one shard", "half a shard", "no map"])
def test_load_model_names_the_file_that_is_missing_or_cut(cut, folder):
    name = WEIGHTS
    if cut in ("one shard", "half a shard", "no map"):
        name = shard(folder)[1]
    file = folder / name
    if cut == "no map":
        (folder / INDEX).write_text("{}")
        name = INDEX
    elif cut.startswith("half"):
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    else:
        file.unlink()
    with pytest.raises(lb.CheckpointError, match=name.replace(".", r"\.")):
        lb.load_model(folder)


def test_load_model_says_that_pickled_weights_are_not_read(folder):
    (folder / WEIGHTS).rename(folder / "pytorch_model.bin")
    with pytest.raises(lb.CheckpointError, match="pickled weights are not read"):
        lb.load_model(folder)


def test_shards_are_read_as_one_file_is(folder):
    expected = logits(lb.load_model(folder))
    shard(folder)
    assert_same(logits(lb.load_model(folder)), expected)


def test_the_head_in_the_file_is_the_head_of_the_model(untied, tmp_path):
    head = load_file(untied / WEIGHTS)[HEAD]
    model = lb.load_model(untied)
    assert model.config.tie_word_embeddings is False
    lb.quantize_(model, lb.Config(bits=BITS), progress=False)
    lb.save(model, tmp_path / "out", lb.load_tokenizer(untied))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    change(tmp_path / "out", tie_word_embeddings=True)  # as older versions wrote it
    again = [lb.load(tmp_path / "out", verify=False), AutoModelForCausalLM.from_pretrained(untied, dtype=torch.float32)]
    for each in again:
        assert_same(each.lm_head.weight.half(), head.half())
    lb.save(again[0], tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text())["tie_word_embeddings"] is False
    assert_same(lb.load(tmp_path / "again").lm_head.weight, again[0].lm_head.weight)


def test_the_compiled_decoder_reads_the_head_in_the_file(untied):
    from littlebit.fast.decoding.mapped_weights import map_model

    assert_same(map_model(untied).weights.head.entries, load_file(untied / WEIGHTS)[HEAD].numpy())


def test_equal_heads_are_tied_and_a_missing_one_is_named(untied, folder):
    rewrite(untied, lambda tensors: tensors | {HEAD: tensors[EMBEDDING].clone()})
    model = lb.load_model(untied)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    change(folder, tie_word_embeddings=False)
    with pytest.raises(lb.CheckpointError, match="set tie_word_embeddings to true"):
        lb.load_model(folder)


@pytest.mark.parametrize("name", ["missing", "compiled", "an extra bias"])
def test_from_pretrained_quantises_no_random_weights(name, folder):
    edit, message = WRONG[name]
    rewrite(folder, edit)
    with pytest.raises(lb.CheckpointError, match=message):
        AutoModelForCausalLM.from_pretrained(folder, quantization_config=lb.LittleBitConfig(bits=BITS))


def test_from_pretrained_keeps_the_head_in_the_file(untied, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(untied, quantization_config=lb.LittleBitConfig(bits=BITS))
    model.save_pretrained(tmp_path / "out")
    assert_same(lb.load(tmp_path / "out").lm_head.weight.half(), load_file(untied / WEIGHTS)[HEAD].half())


FOREIGN = {
    "gptq": {"quantization_config": {"quant_method": "gptq", "bits": 4}},
    "awq": {"quantization_config": {"quant_method": "awq", "bits": 4, "version": "gemm"}},
    "fp8": {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}},
    "mxfp4": {"quantization_config": {"quant_method": "mxfp4"}},
    "bitsandbytes": {"quantization_config": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}},
    "compressed-tensors": {"compression_config": {"format": "pack-quantized"}},
    "mlx": {"quantization": {"group_size": 64, "bits": 4}, "tie_word_embeddings": True},
    "NVFP4": {"quantization_config": {"quant_algo": "NVFP4", "producer": {"name": "modelopt"}}},
    "hqq": {"text_config": {"quantization_config": {"quant_method": "hqq"}}},
}


@pytest.mark.parametrize("method", FOREIGN)
def test_what_others_quantised_is_refused_by_name(method, folder, tmp_path, capsys):
    assert foreign_method(FOREIGN[method]) == method
    change(folder, **FOREIGN[method])
    for extra in ([], ["--dry-run"]):
        assert main(["quantize", str(folder), str(tmp_path / "out"), "--bits", "2.5", *extra]) == 2
        assert f"already quantised, by {method}" in capsys.readouterr().err
    assert main(["train", str(folder), str(tmp_path / "out"), "--bits", "2.5", "--dry-run"]) == 2
    assert main(["eval", str(folder)]) == 2
    assert f"already quantised, by {method}" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_methods_are_known_by_the_files_that_they_leave(folder):
    (folder / "quantize_config.json").write_text("{}")
    with pytest.raises(lb.CheckpointError, match="already quantised, by gptq"):
        lb.load_model(folder)


def test_an_adapter_beside_a_model_is_refused(folder, tmp_path):
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(lb.CheckpointError, match="adapter of PEFT beside the model"):
        lb.load_model(folder)
    (folder / "config.json").unlink()
    with pytest.raises(lb.CheckpointError, match="but an adapter of PEFT: merge it"):
        lb.load_model(folder)


def test_info_and_verify_say_that_a_model_is_dense(folder, capsys):
    for command in ("info", "verify"):
        assert main([command, str(folder)]) == 2
        assert "describes a dense model, not a packed checkpoint" in capsys.readouterr().err
    with pytest.raises(lb.CheckpointError, match="describes a dense model"):
        lb.load(folder)


# ---- GGUF


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LITTLEBIT_CACHE", str(tmp_path / "cache"))


def tokenizer():
    """Build a byte-level tokenizer with a few merges, which GGUF readers need."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: at for at, letter in enumerate([*letters, "<s>", "</s>", "<pad>", "<unk>", "he", "ll"])}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=[("h", "e"), ("l", "l")], unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


SIZES = {"vocab_size": 262, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256}


def written(path, config=LlamaConfig, seed=0, **changes):
    """Write a random model into a GGUF file; return both."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config(**SIZES | {"tie_word_embeddings": False} | changes)).eval()
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, float("norm" in name), 0.1)
    lb.save_gguf(model, path, tokenizer())
    return model


def edited(path, out, tensors=None, fields=None, leave=()):
    """Copy a GGUF file, and change, add or drop some tensors and fields."""
    reader, header = gguf.GGUFReader(path), read_gguf_header(path)
    writer = gguf.GGUFWriter(out, header.get("general.architecture"))
    for key, field in reader.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture":
            subtype = field.types[-1] if len(field.types) > 1 else None
            writer.add_key_value(key, field.contents(), field.types[0], subtype)
    for key, value in (fields or {}).items():
        getattr(writer, f"add_{'string' if isinstance(value, str) else 'uint32'}")(key, value)
    for tensor in reader.tensors:
        if tensor.name not in leave:
            writer.add_tensor(tensor.name, np.array(tensor.data))
    for name, array in (tensors or {}).items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


def test_a_header_is_that_of_the_package_gguf(cache, tmp_path):
    written(tmp_path / "model.gguf")
    header, reader = read_gguf_header(tmp_path / "model.gguf"), gguf.GGUFReader(tmp_path / "model.gguf")
    for key, field in reader.fields.items():
        if not key.startswith("GGUF."):
            assert header.get(key) == field.contents()
    assert list(header.tensors) == [tensor.name for tensor in reader.tensors]
    for tensor in reader.tensors:
        shape, kind, start = header.tensors[tensor.name]
        assert (shape, kind, start) == (tuple(tensor.shape.tolist()[::-1]), tensor.tensor_type, tensor.data_offset)


@pytest.mark.parametrize("length", [3, 20, 100, -1000, -1])
def test_a_cut_file_is_refused(length, cache, tmp_path):
    written(tmp_path / "model.gguf")
    content = (tmp_path / "model.gguf").read_bytes()
    (tmp_path / "cut.gguf").write_bytes(content[:length])
    with pytest.raises(lb.CheckpointError, match=r"cut\.gguf is damaged or no GGUF file"):
        lb.load_model(tmp_path / "cut.gguf")


def test_a_cached_model_is_found_by_the_contents_of_its_file(cache, tmp_path):
    """Files with equal names, sizes and times, a file replaced with its time kept, and a copy with another name."""
    paths = [tmp_path / name / "model.gguf" for name in "ab"]
    models = [written(path, seed=seed) for seed, path in enumerate(paths)]
    for path in paths:
        os.utime(path, (1.7e9, 1.7e9))
    loaded = [lb.load_model(path) for path in paths]
    for mine, theirs in zip(loaded, models, strict=True):
        assert_same(mine.lm_head.weight, theirs.lm_head.weight.half().float())
    shutil.copy2(paths[1], paths[0])
    assert resolve(paths[0]) == resolve(paths[1])
    assert len(list((tmp_path / "cache" / "converted").iterdir())) == 2


def test_biases_and_heads_of_their_own_size_are_read(cache, tmp_path):
    """Transformers' reader ignores both; llama.cpp reads them."""
    model = written(tmp_path / "biases.gguf", attention_bias=True)
    state = lb.load_model(tmp_path / "biases.gguf").state_dict()
    for name, tensor in model.state_dict().items():
        assert_same(state[name], tensor.half().float())
    model = written(tmp_path / "heads.gguf", Qwen3Config, head_dim=32)
    assert lb.load_model(tmp_path / "heads.gguf").config.head_dim == 32
    assert estimate(tmp_path / "heads.gguf", lb.Config(bits=BITS))["weights"] == sum(
        each.weight.numel()
        for name, each in model.named_modules()
        if isinstance(each, torch.nn.Linear) and name != "lm_head"
    )


def test_a_gguf_file_that_does_not_fit_is_refused_by_name(cache, tmp_path):
    written(tmp_path / "model.gguf")
    extra, file = np.ones(64, np.float32), tmp_path / "edited.gguf"
    for changed, message in (
        ({"tensors": {"blk.0.attn_output.bias": extra}}, r"blk\.0\.attn_output\.bias is left over"),
        ({"tensors": {"blk.0.attn_sinks.weight": extra}}, r"blk\.0\.attn_sinks\.weight is left over"),
        ({"leave": ("blk.1.ffn_up.weight",)}, r"model\.layers\.1\.mlp\.up_proj\.weight is missing"),
        ({"fields": {"split.count": 3, "split.no": 1}}, r"part 2 of 3 of a split GGUF file"),
        ({"fields": {"general.type": "adapter"}}, "holds an adapter, not a model"),
        ({"fields": {"llama.rope.scaling.type": "yarn"}}, r"positions are scaled \(yarn\)"),
        ({"tensors": {ROPE_FACTORS: np.linspace(1, 7, 8, dtype=np.float32)}}, "in another way than Llama 3.1's"),
    ):
        file.unlink(missing_ok=True)
        with pytest.raises(lb.CheckpointError, match=message):
            lb.load_model(edited(tmp_path / "model.gguf", file, **changed))


def test_positions_of_llama_3_1_are_those_of_transformers(cache, tmp_path):
    written(tmp_path / "model.gguf")
    factors = llama3_factors(10000.0, 16, 8.0).astype(np.float32)
    header = read_gguf_header(edited(tmp_path / "model.gguf", tmp_path / "new.gguf", tensors={ROPE_FACTORS: factors}))
    config = gguf_config(tmp_path / "new.gguf", header)
    assert config.rope_parameters["rope_type"] == "llama3"
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = 10000.0 ** (-np.arange(0, 16, 2) / 16)
    assert np.abs(scaled.numpy() * factors / plain - 1).max() <= 32 * np.finfo(np.float32).eps  # a few roundings
    plainly = edited(tmp_path / "model.gguf", tmp_path / "ones.gguf", tensors={ROPE_FACTORS: np.ones(8, np.float32)})
    assert gguf_config(plainly, read_gguf_header(plainly)).rope_parameters["rope_type"] == "default"


def test_a_dry_run_of_a_gguf_file_converts_nothing(cache, tmp_path):
    written(tmp_path / "model.gguf")
    found = estimate(tmp_path / "model.gguf", lb.Config(bits=BITS))
    assert not (tmp_path / "cache").exists()
    kept = configuration(tmp_path / "model.gguf")
    read = lb.load_model(tmp_path / "model.gguf").config.to_dict()
    assert {key: kept[key] for key in SIZES} == {key: read[key] for key in SIZES} == SIZES
    assert found == estimate(resolve(tmp_path / "model.gguf"), lb.Config(bits=BITS)) | {
        "quantise_s": found["quantise_s"]
    }


def test_a_folder_of_gguf_files_names_the_file(cache, tmp_path):
    written(tmp_path / "some" / "model.gguf")
    with pytest.raises(lb.CheckpointError, match=r"name the file itself: .*some/model\.gguf"):
        lb.load_model(tmp_path / "some")
    with pytest.raises(lb.CheckpointError, match="is a GGUF file, which holds a dense model"):
        lb.info(tmp_path / "some" / "model.gguf")


def test_building_a_model_leaves_other_threads_alone():
    """Modules that other threads build at the same time get real memory."""
    import threading

    from littlebit.fast.models.build import empty_model, parameters_on_meta

    made = []
    with parameters_on_meta():
        thread = threading.Thread(target=lambda: made.append(torch.nn.Linear(2, 2)))
        thread.start()
        thread.join()
        assert torch.nn.Linear(2, 2).weight.is_meta
    assert not made[0].weight.is_meta
    assert not torch.nn.Linear(2, 2).weight.is_meta
    with pytest.raises(ValueError, match="asks for more than 1 parameters"):
        empty_model({"model_type": "llama", "num_hidden_layers": 1}, most_parameters=1)
    assert not torch.nn.Linear(2, 2).weight.is_meta
