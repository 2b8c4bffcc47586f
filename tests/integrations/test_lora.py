"""Test that PEFT's adapters on packed layers attach, train, and survive saving and loading."""

import subprocess
import sys

import littlebit.fast as lb
import pytest
import torch
from compare import assert_same, assert_within
from littlebit.fast.models.embeddings import quantize_embeddings_
from littlebit.fast.models.quantize import replace_module

peft = pytest.importorskip("peft")

TOKENS = (torch.arange(32)[None] * 5) % 256


@pytest.fixture(scope="module")
def checkpoint(loud_llama, tmp_path_factory):
    model = lb.load_model(loud_llama)
    lb.quantize_(model, lb.Config(bits=2.5), progress=False)
    return lb.save(model, tmp_path_factory.mktemp("lora") / "out")


def with_adapter(model, targets=("q_proj", "v_proj", "down_proj")):
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets if isinstance(targets, str) else list(targets))
    return peft.get_peft_model(model, config)


def loss(model):
    return model(TOKENS, labels=TOKENS).loss


FRESH = """
import sys
import littlebit.fast as lb
assert "peft" not in sys.modules
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
tokens = (torch.arange(32)[None] * 5) % 256
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
model = PeftModel.from_pretrained(model, sys.argv[2])
with torch.inference_mode():
    assert torch.equal(model(tokens).logits, torch.load(sys.argv[3]))
"""


def test_adapters_train_and_come_back_in_a_fresh_process(checkpoint, tmp_path):
    model = with_adapter(lb.load(checkpoint), "all-linear")
    words = {name: tensor.clone() for name, tensor in model.state_dict().items() if ".paths." in name}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert len(trained) == 2 * 7 * 2  # A and B of all seven layers of two blocks
    optimiser = torch.optim.AdamW(trained, lr=5e-3)
    first = float(loss(model).detach())
    for _ in range(30):
        optimiser.zero_grad()
        loss(model).backward()
        assert all(parameter.grad is not None for parameter in trained)
        optimiser.step()
    assert float(loss(model).detach()) < 0.8 * first
    for name, tensor in model.state_dict().items():
        if ".paths." in name:
            assert_same(tensor, words[name])
    model.save_pretrained(tmp_path / "adapter")
    with torch.inference_mode():
        torch.save(model.eval()(TOKENS).logits, tmp_path / "logits.pt")
    command = [sys.executable, "-W", "ignore", "-c", FRESH, checkpoint, tmp_path / "adapter", tmp_path / "logits.pt"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr


def test_adapters_get_the_gradients_that_they_get_on_a_dense_layer(checkpoint):
    """The expected output comes from a dense float64 layer with the same weight."""
    packed, dense = lb.load(checkpoint), lb.load(checkpoint).double()
    name = "model.layers.0.self_attn.q_proj"
    layer = packed.get_submodule(name)
    linear = torch.nn.Linear(layer.d_in, layer.d_out, dtype=torch.float64)
    linear.weight.data, linear.bias.data = layer.weight.double(), layer.bias.double()
    replace_module(dense, name, linear)
    x, found = torch.randn(3, 64, generator=torch.Generator().manual_seed(1)), []
    for model in (packed, dense):
        adapted = with_adapter(model).base_model.model.get_submodule(name)
        a, b = adapted.lora_A["default"].weight, adapted.lora_B["default"].weight
        a.data, b.data = torch.ones_like(a) / 8, torch.ones_like(b) / 16
        given = x.to(a.dtype, copy=True).requires_grad_()
        y = adapted(given)
        y.square().sum().backward()
        found.append((y.detach(), given.grad, a.grad, b.grad))
    for mine, exact in zip(*found, strict=True):
        # sums over 64 inputs or outputs and the ranks; a sum is at most its terms, which are at most 64
        # times the largest result here
        assert_within(mine, exact, (64 * exact.abs().max()).expand(exact.shape), terms=3 * 64 + sum(layer.ranks))


def test_adapters_are_not_merged(checkpoint):
    """No layer is merged, not even dense ones that come before packed ones."""
    model = lb.load(checkpoint)
    replace_module(model, "model.layers.0.self_attn.q_proj", torch.nn.Linear(64, 64))
    model = with_adapter(model)
    before = {name: type(module) for name, module in model.named_modules()}
    for merge in (model.merge_and_unload, model.merge_adapter):
        with pytest.raises(ValueError, match="cannot be merged into packed signs"):
            merge()
    assert {name: type(module) for name, module in model.named_modules()} == before
    assert not any(layer.merged_adapters for layer in model.modules() if hasattr(layer, "lora_A"))


def lora(**options):
    return peft.LoraConfig(**({"r": 4, "target_modules": ["q_proj", "up_proj"]} | options))


@pytest.mark.filterwarnings("ignore:`init_lora_weights` is", "ignore:lora with eva")  # PEFT's hints
@pytest.mark.parametrize("init", [True, False, "gaussian", "Gaussian", "orthogonal", "eva", "mica"])
def test_initialisers_of_adapters_alone_change_nothing_at_first(init, checkpoint):
    torch.manual_seed(0)
    model = peft.get_peft_model(lb.load(checkpoint), lora(init_lora_weights=init)).eval()
    with torch.inference_mode():
        fresh, plain = model(TOKENS).logits, lb.load(checkpoint)(TOKENS).logits
    if init is False:  # random from the start, as PEFT says
        assert float((fresh - plain).abs().max()) > 0
    elif init == "orthogonal":  # B A is zero but for rounding
        assert float((fresh - plain).norm() / plain.norm()) < 1e-3
    else:
        assert_same(fresh, plain)


@pytest.mark.filterwarnings("ignore:`init_lora_weights` is")
@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora", "OLoRA", "corda", "lora_ga", "kasa"])
def test_initialisers_that_assign_the_weight_are_refused_by_name(init, checkpoint):
    model = lb.load(checkpoint)
    options = {"init_lora_weights": init}
    if init == "kasa":
        options = {"kasa_config": pytest.importorskip("peft.tuners.lora.config").KasaConfig()}
    with pytest.raises(ValueError, match=f"{init}.* changes the weight of the layer itself, which packed signs"):
        peft.get_peft_model(model, lora(**options))
    if init == "kasa":  # PEFT has another reason then
        return
    second = with_adapter(lb.load(checkpoint))
    with pytest.raises(ValueError, match="changes the weight of the layer itself"):
        second.add_adapter("second", lora(**options))


def test_loftq_is_refused_by_name():
    from littlebit.fast.integrations.peft_lora import check_initialiser

    config = lora()
    config.init_lora_weights = "loftq"  # a LoraConfig asks for scipy first
    with pytest.raises(ValueError, match="'loftq' changes the weight of the layer itself"):
        check_initialiser(config)


def test_all_linear_finds_packed_and_dense_layers(checkpoint):
    model = lb.load(checkpoint)
    replace_module(model, "model.layers.0.self_attn.q_proj", torch.nn.Linear(64, 64))
    model = peft.get_peft_model(model, lora(target_modules="All-Linear"))
    found = {name for name, module in model.named_modules() if hasattr(module, "lora_A")}
    assert len(found) == 14
    assert not any("lm_head" in name for name in found)
    model.add_adapter("second", lora(target_modules="all-linear"))
    assert all(set(module.lora_A) == {"default", "second"} for module in model.modules() if hasattr(module, "lora_A"))


def test_layers_that_cannot_be_trained_are_refused_in_words(checkpoint, loud_llama):
    with pytest.raises(
        ValueError, match="modules_to_save trains modules whole, but a PackedLinear has nothing to train"
    ):
        peft.get_peft_model(lb.load(checkpoint), lora(modules_to_save=["down_proj"]))
    model = lb.load(checkpoint)
    quantize_embeddings_(model, 8)
    with pytest.raises(ValueError, match="a QuantizedEmbedding has nothing to train"):
        peft.get_peft_model(model, lora(modules_to_save=["embed_tokens"]))
    model = lb.load_model(loud_llama)
    lb.quantize_(model, lb.Config(bits=2.5), progress=False)
    with pytest.raises(ValueError, match="this model is in training form: pack_ it first"):
        peft.get_peft_model(model, lora())


def test_dense_layers_beside_packed_ones_keep_peft_s_own_adapters(checkpoint):
    model = lb.load(checkpoint)
    replace_module(model, "model.layers.0.self_attn.q_proj", torch.nn.Linear(64, 64))
    kinds = [type(m).__name__ for m in with_adapter(model).modules() if hasattr(m, "lora_A")]
    assert sorted(kinds) == ["Linear"] + ["PackedLora"] * 5


@pytest.mark.parametrize("package", ["transformers.quantizers.auto", "peft.tuners.lora.model"])
def test_libraries_that_are_too_old_can_still_be_imported(package):
    code = "import littlebit.fast.integrations.plugin as plugin\n"
    code += f"plugin.REGISTRARS['{package}'] = '.no_such_name'\nimport {package}\n"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    assert f"cannot plug into this version of {package.split('.')[0]} (No module named" in done.stderr
