"""Test tiny random models of each family: quantize, train a step, save, load here and in transformers, run."""

import math
import subprocess
import sys

import littlebit.fast as lb
import pytest
import torch
import transformers as hf
from compare import assert_same
from littlebit.fast.models.layers import ConcatLinear, LittleBitLinear, PackedLinear
from littlebit.fast.models.quantize import packed_layers
from littlebit.fast.models.selection import linear_weight

BITS = 3.0
SIZES = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 4, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2}
GROUPED = SIZES | {"num_key_value_heads": 2}
WINDOWED = GROUPED | {"head_dim": 16, "sliding_window": 8}
OPT = {"vocab_size": 128, "hidden_size": 64, "word_embed_proj_dim": 64, "ffn_dim": 96, "num_hidden_layers": 2}
OPT |= {"num_attention_heads": 4, "max_position_embeddings": 64}
GPT2 = {"vocab_size": 128, "n_embd": 64, "n_inner": 96, "n_layer": 2, "n_head": 4, "n_positions": 64}
GPT2 |= {"bos_token_id": 1, "eos_token_id": 2}

LLAMA_KINDS = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
FAMILIES = {
    "Llama": (hf.LlamaConfig, GROUPED, LLAMA_KINDS),
    "Mistral": (hf.MistralConfig, GROUPED | {"sliding_window": 8}, LLAMA_KINDS),
    "Qwen2.5": (hf.Qwen2Config, GROUPED, LLAMA_KINDS),
    "Qwen3": (hf.Qwen3Config, GROUPED | {"head_dim": 16}, LLAMA_KINDS),
    "Gemma 2": (hf.Gemma2Config, WINDOWED, LLAMA_KINDS),
    "Gemma 3": (hf.Gemma3TextConfig, WINDOWED, LLAMA_KINDS),
    "OPT": (hf.OPTConfig, OPT, {"q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"}),
    "Phi-3": (hf.Phi3Config, GROUPED | {"pad_token_id": 0}, {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"}),
    "GPT-2": (hf.GPT2Config, GPT2, {"c_attn", "c_proj", "c_fc"}),
}
TOKENS = (torch.arange(20)[None] * 7) % 128


@pytest.fixture
def source(tmp_path):
    """Make the directory of a random model of a family."""

    def make(family, **changes):
        config, sizes, _ = FAMILIES[family]
        torch.manual_seed(0)
        model = hf.AutoModelForCausalLM.from_config(config(**(sizes | changes)))
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, 1.0 if parameter.ndim == 1 else 0.0, 0.2)
        model.half().save_pretrained(tmp_path / "source")
        return tmp_path / "source"

    return make


def logits(model):
    with torch.inference_mode():
        return model(TOKENS).logits


CASES = [(family, False) for family in FAMILIES] + [("Phi-3", True), ("GPT-2", True)]


@pytest.mark.parametrize(("family", "split_fused"), CASES)
def test_a_family_is_quantised_trained_saved_loaded_and_run(family, split_fused, source, tmp_path):
    path = source(family)
    model, teacher = lb.load_model(path), lb.load_model(path)
    results = lb.quantize_(model, lb.Config(bits=BITS, split_fused=split_fused), progress=False)
    kinds = {name.split(".")[-1] for name in results}
    parts = {"q_proj", "k_proj", "v_proj"} | ({"gate_proj", "up_proj"} if family == "Phi-3" else set())
    whole = FAMILIES[family][2]
    assert kinds == ((whole - {"qkv_proj", "gate_up_proj", "c_attn"}) | parts if split_fused else whole)
    for name, result in results.items():
        layer = model.get_submodule(name)
        assert isinstance(layer, LittleBitLinear)
        if not split_fused:
            dense = linear_weight(teacher.get_submodule(name))
            rest = float((dense - sum(each.to_dense().detach() for each in layer.factors())).norm() / dense.norm())
            assert math.isclose(rest, result.error, rel_tol=1e-4)

    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    (entry,) = lb.train_(
        model,
        teacher,
        TOKENS[0].repeat(4),
        lb.TrainConfig(32, 16, 2, warmup=0),
        progress=False,
    )
    assert math.isfinite(entry["loss"])
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert {f"{name}.paths.0.u" for name in results} <= moved

    for parameter in model.parameters():
        if parameter.ndim < 2 or parameter.shape[0] == 128:
            parameter.data = parameter.data.half().float()  # as a checkpoint holds it
    lb.save(model, tmp_path / "out", bits=BITS)
    assert lb.info(tmp_path / "out")["bits_per_weight"] <= BITS
    expected = logits(model)
    loaded = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    loaded.save_pretrained(tmp_path / "again")
    for each in (loaded, lb.load(tmp_path / "out"), lb.load(tmp_path / "again")):
        assert set(packed_layers(each)) == set(results)
        assert_same(logits(each), expected)
    new = loaded.generate(TOKENS, max_new_tokens=2, do_sample=False, attention_mask=torch.ones_like(TOKENS))
    assert int(new[0, 20]) == int(expected[0, -1].argmax())


def test_split_layers_may_stay_dense_in_part(source, tmp_path):
    model = lb.load_model(source("Phi-3"))
    dense = logits(model)
    results = lb.quantize_(model, lb.Config(bits=BITS, split_fused=True, include=("*1*.k_proj",)), progress=False)
    assert set(results) == {"model.layers.1.self_attn.qkv_proj.k_proj"}
    joined = [name for name, module in model.named_modules() if isinstance(module, ConcatLinear)]
    assert joined == ["model.layers.1.self_attn.qkv_proj"]
    lb.save(model, tmp_path / "out")
    for load in (lb.load, hf.AutoModelForCausalLM.from_pretrained):
        loaded = load(tmp_path / "out", dtype=torch.float32)
        assert_same(logits(loaded), logits(model))
    for name in joined:  # with the true weights of the one part the split model is the original
        part = model.get_submodule(name).k_proj
        assert isinstance(part, PackedLinear)
        original = lb.load_model(tmp_path / "source").get_submodule(name)
        rows = linear_weight(original)[64:96]
        model.get_submodule(name).k_proj = replacement = torch.nn.Linear(64, 32, bias=False)
        replacement.weight.data = rows
    assert float((logits(model) - dense).abs().max()) < 1e-4 * float(dense.abs().max())


def test_refused_models_are_not_split(source):
    model = lb.load_model(source("Phi-3"))
    with pytest.raises(ValueError, match="smallest possible value is"):
        lb.quantize_(model, lb.Config(bits=0.1, split_fused=True), progress=False)
    assert not any(isinstance(module, ConcatLinear) for module in model.modules())


@pytest.mark.parametrize("parts", [[["q_proj", 64], ["k_proj", 30]], [["q_proj", "x"]], 3])
def test_load_refuses_parts_that_do_not_fit(parts, source, tmp_path):
    from test_model import edit_config

    model = lb.load_model(source("Phi-3"))
    lb.quantize_(model, lb.Config(bits=BITS, split_fused=True), progress=False)
    lb.save(model, tmp_path / "out")
    name = "model.layers.0.self_attn.qkv_proj"
    edit_config(tmp_path / "out", lambda config: config["quantization_config"]["fused"].update({name: parts}))
    with pytest.raises(lb.CheckpointError, match=name):
        lb.load(tmp_path / "out", verify=False)


@pytest.mark.parametrize("family", ["Llama", "Phi-3"])
def test_kv_rank_factor_gives_keys_and_values_more_within_the_ceiling(family, source):
    def signs(factor):
        wide = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 8, "num_key_value_heads": 4}
        model = lb.load_model(source(family, **wide))
        config = lb.Config(bits=0.8, paths=1, kv_rank_factor=factor, split_fused=True)
        results = lb.quantize_(model, config, progress=False)
        stored = sum(result.bits * result.d_out * result.d_in for result in results.values())
        assert stored <= 0.8 * sum(result.d_out * result.d_in for result in results.values())
        kinds = {}
        for name, result in results.items():
            level = result.ranks[0] * (result.d_out + result.d_in) / (result.d_out * result.d_in)
            kinds.setdefault(name.split(".")[-1], set()).add(level)
        return kinds

    plain, more = signs(1.0), signs(2.0)
    for kind in plain:
        if kind in ("k_proj", "v_proj"):
            assert min(more[kind]) > max(plain[kind])
        else:
            assert max(more[kind]) <= max(plain[kind])
    assert sum(map(sum, more.values())) != sum(map(sum, plain.values()))


def test_kv_rank_factor_refuses_models_without_grouped_queries(source):
    for family, config in (("OPT", {}), ("Phi-3", {}), ("Llama", {"exclude": ("*k_proj", "*v_proj")})):
        with pytest.raises(ValueError, match="kv_rank_factor needs k_proj and v_proj"):
            lb.quantize_(lb.load_model(source(family)), lb.Config(BITS, kv_rank_factor=4, **config), progress=False)
    for config in ({"kv_rank_factor": 0}, {"kv_rank_factor": 4, "allocation": "sensitivity"}):
        with pytest.raises(ValueError, match="kv_rank_factor"):
            lb.quantize_(lb.load_model(source("Llama")), lb.Config(BITS, **config), TOKENS[0], progress=False)


def test_embeddings_that_scale_are_kept(source):
    from littlebit.fast.models.embeddings import quantize_embeddings_

    with pytest.raises(ValueError, match="must be kept in 16 bits"):
        quantize_embeddings_(lb.load_model(source("Gemma 3")), 8)


def test_calibration_reaches_every_kind_of_linear_layer(source):
    for family in ("GPT-2", "Phi-3"):
        model = lb.load_model(source(family))
        config = lb.Config(bits=BITS, allocation="sensitivity", init="admm", importance=True, split_fused=True)
        assert all(result.error < 1 for result in lb.quantize_(model, config, TOKENS[0], progress=False).values())


@pytest.mark.parametrize(("family", "split_fused"), [("Gemma 3", False), ("Phi-3", True), ("GPT-2", True)])
def test_a_family_is_loaded_and_run_in_a_fresh_process(family, split_fused, source, tmp_path):
    model = lb.load_model(source(family))
    lb.quantize_(model, lb.Config(bits=BITS, paths=1, split_fused=split_fused), progress=False)
    saved = lb.save(model, tmp_path / "out", bits=BITS)
    code = (
        "import sys, torch, littlebit.fast as lb, transformers as hf; "
        "tokens = (torch.arange(20)[None] * 7) % 128; "
        "models = lb.load(sys.argv[1]), hf.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32); "
        "[print(m.generate(tokens, max_new_tokens=8, do_sample=False)[0].tolist()) for m in models]"
    )
    done = subprocess.run([sys.executable, "-c", code, saved], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    with torch.inference_mode():
        expected = str(lb.load(saved).generate(TOKENS, max_new_tokens=8, do_sample=False)[0].tolist())
    assert done.stdout.splitlines() == [expected, expected]
