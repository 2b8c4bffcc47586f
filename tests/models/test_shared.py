"""Test that shared modules and parameters are quantized once, stored once, and shared again after loading."""

import json

import littlebit.fast as lb
import pytest
import torch
from compare import assert_same
from littlebit.fast.checkpoints.format import WEIGHTS
from littlebit.fast.models.layers import LittleBitLinear, PackedLinear
from littlebit.fast.models.shared import shared_names
from safetensors.torch import load_file
from test_model import without_checksums
from transformers import AutoModelForCausalLM

BITS = 2.5
TOKENS = torch.arange(24)[None]
FIRST, SECOND = "model.layers.0", "model.layers.1"


def logits(model):
    with torch.inference_mode():
        return model(TOKENS).logits


def share_module(model):
    model.model.layers[1].mlp = model.model.layers[0].mlp


def share_layer(model):
    model.model.layers[1].self_attn.o_proj = model.model.layers[0].self_attn.o_proj


def share_weight(model):
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight


def share_norm(model):
    model.model.layers[1].input_layernorm.weight = model.model.layers[0].input_layernorm.weight


CASES = {
    share_module: {f"{SECOND}.mlp": f"{FIRST}.mlp"},
    share_layer: {f"{SECOND}.self_attn.o_proj": f"{FIRST}.self_attn.o_proj"},
    share_weight: {f"{SECOND}.mlp.up_proj": f"{FIRST}.mlp.up_proj"},
    share_norm: {f"{SECOND}.input_layernorm.weight": f"{FIRST}.input_layernorm.weight"},
}


def quantised(source, change):
    model = lb.load_model(source)
    change(model)
    results = lb.quantize_(model, lb.Config(bits=BITS), progress=False)
    return model, results


def first_and_second(model, names):
    """Return what stands in both places."""
    (second, first) = next(iter(names.items()))
    try:
        return model.get_submodule(first), model.get_submodule(second)
    except AttributeError:
        return model.get_parameter(first), model.get_parameter(second)


@pytest.mark.parametrize("change", CASES, ids=lambda change: change.__name__)
def test_what_is_shared_stays_shared_through_files(change, tiny_llama, tmp_path):
    names = CASES[change]
    model, results = quantised(tiny_llama, change)
    assert not any(name.startswith(second) for name in results for second in names)
    dense = [name for name, module in model.named_modules(remove_duplicate=False) if type(module) is torch.nn.Linear]
    assert dense == ["lm_head"]
    lb.pack_(model)
    assert shared_names(model) == names
    for parameter in model.parameters():  # as they are stored
        parameter.data = parameter.data.half().float()
    expected = logits(model)
    lb.save(model, tmp_path / "out")
    described = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert described["shared"] == names
    assert not any(name.startswith(second) for name in load_file(tmp_path / "out" / WEIGHTS) for second in names)
    loaded = lb.load(tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    again.save_pretrained(tmp_path / "again")
    lb.save(loaded, tmp_path / "twice")
    first, twice = (lb.info(tmp_path / name) for name in ("out", "twice"))
    described = {key for key in first if key.startswith("descri")}  # config.json of a loaded model has other entries
    same = first.keys() - described
    assert {key: first[key] for key in same} == {key: twice[key] for key in same}
    for each in (loaded, again, lb.load(tmp_path / "again"), lb.load(tmp_path / "twice")):
        one, other = first_and_second(each, names)
        assert one is other
        assert_same(logits(each), expected)


def test_a_layer_in_two_places_is_counted_and_trained_once(tiny_llama):
    model, results = quantised(tiny_llama, share_module)
    assert len(results) == 14 - 3
    one, other = first_and_second(model, CASES[share_module])
    assert one is other
    assert isinstance(one.up_proj, LittleBitLinear)
    lb.pack_(model)
    assert isinstance(model.model.layers[1].mlp.up_proj, PackedLinear)
    assert model.model.layers[1].mlp.up_proj is model.model.layers[0].mlp.up_proj


def test_a_layer_that_shares_its_weight_with_what_stays_dense_stays_dense(tiny_llama, caplog):
    model = lb.load_model(tiny_llama)
    model.model.layers[1].mlp.gate_proj.weight = model.model.layers[0].mlp.gate_proj.weight
    results = lb.quantize_(model, lb.Config(bits=BITS, exclude=("*.1.mlp.gate_proj",)), progress=False)
    assert "model.layers.0.mlp.gate_proj" not in results
    assert model.model.layers[0].mlp.gate_proj.weight is model.model.layers[1].mlp.gate_proj.weight
    assert "shares its weight with" in caplog.text


def test_fused_layers_in_two_places_are_split_once(tmp_path):
    from transformers import Phi3Config

    sizes = {"vocab_size": 260, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    torch.manual_seed(0)
    config = Phi3Config(**sizes, num_attention_heads=4, num_key_value_heads=2, pad_token_id=0)
    model = AutoModelForCausalLM.from_config(config).eval()
    share_module(model)
    lb.quantize_(model, lb.Config(bits=BITS, split_fused=True), progress=False)
    expected = logits(lb.pack_(model))
    loaded = lb.load(lb.save(model, tmp_path / "out"))
    assert loaded.model.layers[0].mlp is loaded.model.layers[1].mlp
    assert expected.shape == logits(loaded).shape
    assert_same(logits(lb.load(lb.save(loaded, tmp_path / "again"))), logits(loaded))


def test_blocks_that_a_class_shares_stay_shared(tmp_path):
    """Zamba2 has one attention block in several places, by ties of all of its parameters."""
    from transformers import Zamba2Config

    sizes = {"vocab_size": 256, "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 4, "intermediate_size": 96, "n_mamba_heads": 4, "mamba_ngroups": 1}
    kinds = {"layers_block_type": ["mamba", "hybrid"] * 2, "hybrid_layer_ids": [1, 3], "num_mem_blocks": 1}
    torch.manual_seed(0)
    try:
        made = AutoModelForCausalLM.from_config(Zamba2Config(**sizes, **kinds, adapter_rank=8)).eval()
    except ValueError as error:
        if "tie_weights_keys" not in str(error):
            raise
        pytest.skip("this version of transformers cannot make a Zamba2")
    made.save_pretrained(tmp_path / "dense")
    model = lb.load_model(tmp_path / "dense")
    place = "shared_transformer.feed_forward.down_proj"
    results = lb.quantize_(model, lb.Config(bits=3.0), progress=False)
    assert f"model.layers.1.{place}" in results
    assert f"model.layers.3.{place}" not in results
    lb.pack_(model)
    for parameter in model.parameters():  # as they are stored
        parameter.data = parameter.data.half().float()
    expected = logits(model)
    lb.save(model, tmp_path / "out")
    for read in (lb.load, lambda path: AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)):
        loaded = read(tmp_path / "out")
        assert loaded.get_submodule(f"model.layers.1.{place}") is loaded.get_submodule(f"model.layers.3.{place}")
        assert_same(logits(loaded), expected)


def test_formats_that_cannot_share_refuse(tiny_llama, tmp_path):
    model, _ = quantised(tiny_llama, share_module)
    for save in (lb.save_gguf, lb.save_official):
        with pytest.raises(ValueError, match=r"cannot express that model\.layers\.1\.mlp is model\.layers\.0\.mlp"):
            save(model, tmp_path / "out", lb.load_tokenizer(tiny_llama))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("shared", "message"),
    [
        (["a"], "must map names to names"),
        ({f"{SECOND}.mlp": "model.nothing"}, "names 'model.nothing'"),
        ({f"{SECOND}.mlp": 3}, "names 3"),
        ({"model": FIRST}, "their tensors differ"),
        ({f"{FIRST}.mlp": "model.layers"}, "their tensors differ"),
        ({f"{SECOND}.mlp.act_fn": f"{FIRST}.mlp.act_fn"}, "their tensors differ"),
        ({f"{SECOND}.mlp.up_proj": f"{FIRST}.mlp.down_proj"}, "their tensors differ"),
    ],
)
def test_files_that_share_what_cannot_be_are_refused(shared, message, tiny_llama, tmp_path):
    model, _ = quantised(tiny_llama, share_module)
    out = without_checksums(lb.save(model, tmp_path / "out"))
    config = json.loads((out / "config.json").read_text())
    config["quantization_config"]["shared"] = shared
    (out / "config.json").write_text(json.dumps(config))
    with pytest.raises(lb.CheckpointError, match=message):
        lb.load(out)
