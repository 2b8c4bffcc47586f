"""Test tiny random mixture-of-experts models against transformers: each projection of an expert is a layer."""

import copy
import json
import math
import shlex
import shutil

import littlebit.fast as lb
import pytest
import torch
import transformers as hf
from compare import assert_same, assert_within
from littlebit.fast.checkpoints import loading, saving
from littlebit.fast.checkpoints.format import INDEX, weight_files
from littlebit.fast.cli.main import main
from littlebit.fast.decoding.parity import logit_bound
from littlebit.fast.models import experts
from littlebit.fast.models.layers import LittleBitLinear, PackedLinear
from littlebit.fast.models.quantize import packed_layers
from littlebit.fast.packing import unpack_factors
from safetensors.torch import load_file, save_file
from test_model import edit_config

BITS = 3.0
SIZES = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 2, "pad_token_id": 0}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "num_experts_per_tok": 2}
SIZES |= {"bos_token_id": 1, "eos_token_id": 2}
MLA = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16}
SMALL = {"moe_intermediate_size": 32}
FAMILIES = {
    "Mixtral": (hf.MixtralConfig, {"num_local_experts": 4}),
    "Qwen3-MoE": (hf.Qwen3MoeConfig, {"num_experts": 4, "head_dim": 16} | SMALL),
    "Qwen2-MoE": (hf.Qwen2MoeConfig, {"num_experts": 4, "shared_expert_intermediate_size": 48} | SMALL),
    "OLMoE": (hf.OlmoeConfig, {"num_experts": 4}),
    "gpt-oss": (hf.GptOssConfig, {"num_local_experts": 4, "head_dim": 16, "sliding_window": 8}),
    "DeepSeek-V3": (
        hf.DeepseekV3Config,
        {"num_key_value_heads": 4, "n_routed_experts": 4, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1}
        | (MLA | SMALL),
    ),
    "Llama 4": (hf.Llama4TextConfig, {"num_local_experts": 4, "intermediate_size_mlp": 48, "head_dim": 16}),
    "Hunyuan": (hf.HunYuanMoEV1Config, {"num_experts": 4, "moe_topk": 2, "head_dim": 16}),
}
JETMOE = {"num_local_experts": 4, "kv_channels": 16}  # its experts are of a form that is not known here
TOKENS = (torch.arange(20)[None] * 7) % 128
LAYER = "model.layers.1.mlp.experts.2.up_proj"


def random_model(config, sizes):
    torch.manual_seed(0)
    model = hf.AutoModelForCausalLM.from_config(config(**(SIZES | sizes))).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 1.0 if parameter.ndim == 1 else 0.0, 0.15)
        parameter.data = parameter.data.half().float()
    return model


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Make the directory of a random model of a family, once."""
    made = {}

    def make(family):
        if family not in made:
            made[family] = tmp_path_factory.mktemp("dense") / family
            random_model(*FAMILIES[family]).save_pretrained(made[family])
        return made[family]

    return make


@pytest.fixture(scope="module")
def packed(folders, tmp_path_factory):
    """Save a packed Mixtral."""
    model = lb.load_model(folders("Mixtral"))
    lb.quantize_(model, lb.Config(bits=BITS), progress=False)
    return lb.save(model, tmp_path_factory.mktemp("packed") / "out", bits=BITS)


def logits(model):
    with torch.inference_mode():
        return model(TOKENS).logits


def paths_of(layer):
    return [unpack_factors(path) for path in layer.factors()] if isinstance(layer, PackedLinear) else layer.factors()


def put_back(model, dense):
    """Make the dense model with the weights of another model's layers, multiplied out in float64."""
    dense = copy.deepcopy(dense).double()
    dense.config._experts_implementation = "batched_mm"  # the others have no float64, or misread some routers in 5.0
    known = dict(dense.named_modules())
    for name, layer in model.named_modules():
        if isinstance(layer, PackedLinear | LittleBitLinear):
            parts = [type(path)(*(tensor.detach().double() for tensor in path)) for path in paths_of(layer)]
            weight = torch.stack([path.to_dense() for path in parts]).sum(0)
            place = known[name].weight.data if name in known else rows_of(known, name)
            place.copy_(weight)
    return dense


def rows_of(known, name):
    """View the (d_out, d_in) rows of an expert's projection in the stacks of transformers."""
    block, at, projection = name.rsplit(".", 2)
    stacks = known[block]
    stack = (stacks.down_proj if projection == "down_proj" else stacks.gate_up_proj).data[int(at)]
    stack = stack.mT if getattr(stacks, "is_transposed", True) else stack
    half = len(stack) // 2
    if projection == "down_proj":
        return stack
    if type(stacks).__name__ == "GptOssExperts":  # gate and up alternate
        return stack[projection == "up_proj" :: 2]
    return stack[half:] if projection == "up_proj" else stack[:half]


def as_stored(model):
    """Round what a checkpoint keeps in 16 bits, so that packing changes nothing."""
    for name, parameter in model.named_parameters():
        if name.rsplit(".", 1)[-1] not in ("u", "v"):
            parameter.data = parameter.data.half().float()
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_is_quantised_saved_loaded_and_run(family, folders, tmp_path):
    dense = lb.load_model(folders(family))
    model = copy.deepcopy(dense)
    results = lb.quantize_(model, lb.Config(bits=BITS), progress=False)
    blocks = {name: module for name, module in dense.named_modules() if experts.is_known(module)}
    assert len(blocks) == (1 if family == "DeepSeek-V3" else 2)
    for name, block in blocks.items():
        mine = {key for key in results if key.startswith(f"{name}.")}
        assert mine == {f"{name}.{part}" for part in experts.projection_names(block)}
        assert len(mine) == 3 * 4
    assert all("_proj" in name for name in results)
    stays = {name for name, parameter in model.named_parameters() if parameter.ndim == 2 and ".paths." not in name}
    assert stays == {f"{name}.weight" for name in ("model.embed_tokens", "lm_head", *experts.routers(model))}

    as_stored(model)
    oracle = logits(put_back(model, dense))
    trained = logits(model)
    lb.save(model, tmp_path / "out", bits=BITS)
    stored = lb.info(tmp_path / "out")
    assert stored["weights"] == sum(result.d_out * result.d_in for result in results.values())
    assert stored["bits_per_weight"] <= BITS
    assert stored["kinds"]["experts.up_proj"]["layers"] == 4 * len(blocks)
    assert not lb.verify(tmp_path / "out")["damaged"]

    model.save_pretrained(tmp_path / "direct")
    loaded = lb.load(tmp_path / "out")
    assert set(packed_layers(loaded)) == set(results)
    _, (bound,) = logit_bound(loaded, [TOKENS[0]])
    assert_same(logits(put_back(loaded, dense)), oracle)
    for each in (trained, logits(loaded)):
        assert bool(((each - oracle).abs()[0] <= bound[:, None]).all())
    for block in (module for module in model.modules() if isinstance(module, experts.QuantizedExperts)):
        for expert in block.children():  # a bound that says something: it tells gate from up
            expert.gate_proj, expert.up_proj = expert.up_proj, expert.gate_proj
    assert bool(((logits(model) - oracle).abs()[0] > bound[:, None]).any())

    again = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    again.save_pretrained(tmp_path / "again")
    others = [again, copy.deepcopy(loaded)]
    for folder in ("direct", "again"):
        others += [lb.load(tmp_path / folder)]
        others += [hf.AutoModelForCausalLM.from_pretrained(tmp_path / folder, dtype=torch.float32)]
    for each in others:
        assert_same(logits(each), logits(loaded))
    new = again.generate(TOKENS, max_new_tokens=2, do_sample=False, attention_mask=torch.ones_like(TOKENS))
    assert int(new[0, 20]) == int(oracle[0, -1].argmax())


@pytest.mark.parametrize("family", ["Mixtral", "Qwen3-MoE"])
def test_a_step_of_training_moves_the_experts(family, folders, tmp_path):
    model, teacher = (lb.load_model(folders(family)) for _ in range(2))
    results = lb.quantize_(model, lb.Config(bits=BITS), progress=False)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    settings = lb.TrainConfig(total_tokens=32, sequence_length=16, batch_size=2, warmup=0)
    (entry,) = lb.train_(model, teacher, TOKENS[0].repeat(4), settings, progress=False)
    assert math.isfinite(entry["loss"])
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert {f"{name}.paths.0.u" for name in results} <= moved
    lb.save(model, tmp_path / "out")
    assert set(packed_layers(lb.load(tmp_path / "out"))) == set(results)


@pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated")
def test_generate_goes_through_transformers(packed, caplog):
    from littlebit.fast.decoding.generate import stream_tokens

    model = lb.load(packed)
    with caplog.at_level("DEBUG", logger="littlebit"):
        new = list(stream_tokens(model, TOKENS[0].tolist(), lb.GenerationConfig(3), 0))
    want = model.generate(TOKENS, max_new_tokens=3, do_sample=False, attention_mask=torch.ones_like(TOKENS))
    assert new == want[0, 20:].tolist()
    assert "mixtral" in caplog.text


def block_of(model):
    return model.model.layers[1].mlp.experts


def test_only_experts_that_tokens_are_routed_to_are_computed(packed):
    block, rows = block_of(lb.load(packed)), {}
    for at in range(len(block)):
        for name, layer in getattr(block, str(at)).items():
            layer.register_forward_hook(lambda module, given, out, key=(at, name): rows.update({key: len(given[0])}))
    block(torch.randn(3, 64), torch.tensor([[0, 2], [2, 3], [2, 0]]), torch.ones(3, 2))
    wanted = {0: 2, 2: 3, 3: 1}
    assert rows == {(at, name): count for at, count in wanted.items() for name in experts.GATED}


@pytest.mark.parametrize("family", ["Mixtral", "gpt-oss"])
def test_split_experts_compute_what_transformers_computes(family, folders):
    dense = block_of(lb.load_model(folders(family)))
    split = experts.split_experts(dense, lambda name: name.startswith("2"))
    x = torch.randn(7, 64, generator=torch.Generator().manual_seed(0))
    chosen, weights = torch.tensor([[0, 3], [2, 1], [1, 3], [3, 0], [2, 3], [1, 0], [0, 2]]), torch.rand(7, 2)
    exact = split.double()(x.double(), chosen, weights.double()).float()
    # |act(g)| <= |g|, and gpt-oss adds 1 to up: the same computation on absolute values bounds every term
    sizes = copy.deepcopy(split)
    for parameter in sizes.parameters():
        parameter.data = parameter.data.abs()
    sizes.activate = lambda both: both[..., :48] * (1 + both[..., 48:])
    sizes.interleaved = False
    magnitude = sizes(x.abs().double(), chosen, weights.double()).detach()
    terms = 3 * (64 + 48) + 8
    assert_within(split.float()(x, chosen, weights), exact, magnitude, terms)
    assert_within(dense(x, chosen, weights), exact, magnitude, terms)


def test_experts_beyond_the_last_are_none_and_weights_may_be_those_of_all(folders):
    split = experts.split_experts(block_of(lb.load_model(folders("Mixtral"))), lambda name: True)
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    chosen = torch.tensor([[0, 3], [2, 1], [1, 3]])
    weights = torch.rand(3, 2)
    of_all = torch.zeros(3, 4).scatter(1, chosen, weights)
    assert_same(split(x, chosen, of_all), split(x, chosen, weights))
    assert_same(split(x, torch.where(chosen == 3, 4, chosen), weights)[1], split(x, chosen, weights)[1])
    none = torch.full((3, 2), 4)
    assert_same(split(x, none, weights), torch.zeros(3, 64))


def test_all_experts_get_a_gradient_where_processes_train_together(packed, folders, monkeypatch):
    model = lb.load_model(folders("Mixtral"))
    lb.quantize_(model, lb.Config(bits=BITS, include=("*.experts.*",)), progress=False)
    block, x, chosen = block_of(model), torch.randn(2, 64), torch.tensor([[0, 1], [1, 0]])

    def without_gradient():
        model.zero_grad()
        block(x, chosen, torch.ones(2, 2)).sum().backward()
        return {name.split(".")[0] for name, p in block.named_parameters() if p.grad is None}

    assert without_gradient() == {"2", "3"}
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    assert without_gradient() == set()
    with torch.no_grad():
        assert block.reached(chosen) == [0, 1]
    x.requires_grad_()  # as with adapters on packed layers
    block_of(lb.load(packed))(x, chosen, torch.ones(2, 2)).sum().backward()


def test_split_experts_share_the_memory_of_the_dense_ones(folders):
    dense = block_of(lb.load_model(folders("gpt-oss")))
    split = experts.split_experts(dense, lambda name: not name.endswith("down_proj"))
    pointers = {getattr(dense, name).untyped_storage().data_ptr() for name in ("gate_up_proj", "gate_up_proj_bias")}
    for name, parameter in split.named_parameters():
        assert (parameter.untyped_storage().data_ptr() in pointers) == ("down_proj" not in name)
    assert not list(split.activate.__self__.parameters())


@pytest.mark.parametrize("family", ["Mixtral", "Qwen3-MoE", "gpt-oss"])
def test_projections_may_stay_dense_in_part(family, folders, tmp_path):
    model = lb.load_model(folders(family))
    config = lb.Config(bits=BITS, include=("*.experts.*",), exclude=("*.down_proj", "*.layers.0.*"))
    results = lb.quantize_(model, config, progress=False)
    assert set(results) == {
        f"model.layers.1.mlp.experts.{at}.{kind}" for at in range(4) for kind in ("gate_proj", "up_proj")
    }
    assert experts.is_known(model.model.layers[0].mlp.experts)  # nothing of it was selected, so it is as it was
    lb.save(model, tmp_path / "out")
    loaded = [lb.load(tmp_path / "out"), hf.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)]
    loaded[1].save_pretrained(tmp_path / "again")
    loaded += [lb.load(tmp_path / "again")]
    loaded += [hf.AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype=torch.float32)]
    for each in loaded:
        assert_same(logits(each), logits(model))
        assert_same(getattr(block_of(each), "3").down_proj.matrix, getattr(block_of(model), "3").down_proj.matrix)


def test_patterns_that_select_no_expert_leave_them_alone(folders):
    parts = ("*.experts.*.gate_proj", "*.experts.*.up_proj", "*.experts.*.down_proj")
    for config in ({"exclude": ("*experts*",)}, {"include": ("*self_attn*",)}, {"exclude": parts}):
        model = lb.load_model(folders("Qwen2-MoE"))
        results = lb.quantize_(model, lb.Config(bits=BITS, **config), progress=False)
        assert not any(".experts." in name for name in results)
        assert experts.is_known(block_of(model))
        assert isinstance(model.model.layers[0].mlp.shared_expert_gate, torch.nn.Linear)


@pytest.mark.parametrize(
    "config", [{"bits": 0.1}, {"bits": BITS, "kv_rank_factor": 4, "exclude": ("*k_proj", "*v_proj")}]
)
def test_a_refused_model_is_left_as_it_was(config, folders):
    model = lb.load_model(folders("Mixtral"))
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    with pytest.raises(ValueError):  # noqa: PT011 (whatever it says)
        lb.quantize_(model, lb.Config(**config), progress=False)
    for name, parameter in model.named_parameters():
        assert_same(parameter, before.pop(name))
    assert not before


def test_calibration_that_reaches_some_experts_only(folders):
    model = lb.load_model(folders("gpt-oss"))
    for layer in model.model.layers:
        layer.mlp.router.bias.data = torch.tensor([1e4, 1e4, -1e4, -1e4])
    other = copy.deepcopy(model)
    results = lb.quantize_(model, lb.Config(bits=BITS, allocation="sensitivity"), TOKENS[0], progress=False)
    config = lb.Config(bits=BITS, init="admm", importance=True, include=("*.1.mlp.experts.*",))
    results |= lb.quantize_(other, config, TOKENS[0], progress=False)
    assert all(result.error < 1 for result in results.values())


def test_experts_of_an_unknown_form_are_refused_with_their_share():
    model = random_model(hf.JetMoeConfig, JETMOE)
    stacks = sum(p.numel() for p in model.parameters() if p.ndim == 3)
    linear = sum(module.weight.numel() for name, module in model.named_modules() if name.endswith("kv_proj"))
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.input_linear\.weight of JetMoeParallelExperts") as error:
        lb.quantize_(model, lb.Config(bits=BITS), progress=False)
    assert str(error.value).startswith(f"{100 * stacks / (stacks + linear):.1f} % of the weights would stay dense")
    exclude = tuple(shlex.split(str(error.value).split("--exclude ")[1]))
    results = lb.quantize_(model, lb.Config(bits=BITS, exclude=exclude), progress=False)
    assert {name.split(".")[-1] for name in results} == {"kv_proj"}


def test_the_command_refuses_experts_of_an_unknown_form(tmp_path, capsys):
    random_model(hf.JetMoeConfig, JETMOE).save_pretrained(tmp_path / "dense")
    assert main(["quantize", str(tmp_path / "dense"), str(tmp_path / "out"), "--bits", "3", "--dry-run"]) == 2
    assert "would stay dense" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_dry_run_counts_experts_and_names_routers(folders, packed, tmp_path, capsys):
    arguments = ["quantize", str(folders("Mixtral")), str(tmp_path / "out"), "--bits", str(BITS), "--dry-run"]
    assert main([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    stored = lb.info(packed)
    assert found["kinds"]["experts.gate_proj"]["layers"] == 8
    for key in ("layers", "weights", "bits_per_weight", "linear_bytes"):
        assert found[key] == stored[key]
    assert found["dense"] == {f"model.layers.{at}.mlp.gate": "it routes tokens to experts" for at in range(2)}
    assert found["dense_share"] == 2 * 4 * 64 / (2 * 4 * 64 + found["weights"])


def test_many_tensors_are_divided_over_files(packed, tmp_path, monkeypatch):
    monkeypatch.setattr(saving, "SHARD_TENSORS", 100)
    saved = lb.save(lb.load(packed), tmp_path / "out")
    assert (saved / INDEX).is_file()
    assert len(weight_files(saved)) > 2
    assert_same(logits(lb.load(saved)), logits(lb.load(packed)))


def test_load_refuses_more_experts_than_a_model_may_have(packed, monkeypatch):
    monkeypatch.setattr(loading, "MOST_EXPERTS", 7)
    with pytest.raises(lb.CheckpointError, match="may have 7 experts, not 8"):
        lb.load(packed)


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("model.layers.1.mlp.experts.4.up_proj", {}, "no such layer"),
        ("model.layers.1.mlp.experts.-1.up_proj", {}, "no such layer"),
        ("model.layers.1.mlp.experts.2.w1", {}, "no such layer"),
        (LAYER, {"d_out": 32}, "config.json asks for"),
        ("model.layers.1.mlp.experts", {}, "config.json packs"),
    ],
)
def test_load_refuses_experts_that_the_model_has_not(name, changes, words, packed, tmp_path):
    copied = shutil.copytree(packed, tmp_path / "copy")
    tensors = load_file(copied / "model.safetensors")
    tensors |= {key.replace(LAYER, name): tensor.clone() for key, tensor in tensors.items() if key.startswith(LAYER)}
    save_file(tensors, copied / "model.safetensors", metadata={"format": "pt"})

    def edit(config):
        section = config["quantization_config"]
        section["format_version"] = 1
        section["layers"][name] = section["layers"][LAYER] | changes

    edit_config(copied, edit)
    with pytest.raises(lb.CheckpointError, match=words):
        lb.load(copied)


def test_what_cannot_hold_experts_says_so(packed, tmp_path, capsys):
    from littlebit.fast.decoding.architecture import NotDecodableError
    from littlebit.fast.decoding.static_cache import StaticEngine

    assert main(["export", str(packed), str(tmp_path / "gguf"), "--to", "gguf"]) == 2
    with pytest.raises(ValueError, match="has experts"):
        lb.save_official(lb.load(packed), tmp_path / "official")
    assert not list(tmp_path.iterdir())
    model = lb.load(packed)
    model._can_compile_fullgraph = True
    with pytest.raises(NotDecodableError, match="experts"):
        StaticEngine(model, 1, 32)
