"""Test which layers are quantized: others stay dense, run, and are reported with the reason; patterns."""

import logging
import re

import littlebit.fast as lb
import pytest
import torch
import transformers as hf
from compare import assert_same
from littlebit.fast.cli.main import main
from littlebit.fast.models.layers import LittleBitLinear, PackedLinear
from littlebit.fast.models.quantize import packed_layers
from littlebit.fast.models.selection import computes_linear, near, reads_in, weights_read
from torch import nn
from torch.nn import functional

SIZE = 32
CONFIG = lb.Config(bits=6.0, paths=1)
X = torch.linspace(-1, 1, 3 * SIZE).view(3, SIZE)


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class OnlyNamed(nn.Linear):
    """Its forward is that of torch's linear layer."""


class InOtherWords(nn.Linear):
    def forward(self, x):
        return self.bias + x @ self.weight.mT


class InTraining(nn.Linear):
    def forward(self, x):
        return super().forward(x + 1 if self.training else x)


class Strange(nn.Linear):
    def forward(self, x):
        raise KeyError(x.shape)


class Calls(nn.Module):
    """Calls its layer, and looks at the dtype of the weight as many models do."""

    def __init__(self, layer):
        super().__init__()
        self.special = layer

    def forward(self, x):
        return self.special(x.to(self.special.weight.dtype))


class Reads(Calls):
    def forward(self, x):
        return functional.linear(x, self.special.weight)


class ReadsOtherwise(Calls):
    def forward(self, x):
        if hasattr(self, "never"):
            return x
        else:
            return x @ self.special.weight.T


class ReadsInTraining(Calls):
    def forward(self, x):
        if self.training:
            return functional.linear(x, self.special.weight)
        return self.special(x)


class Tower(Calls):
    main_input_name = "pixel_values"


class Model(nn.Module):
    """A plain layer, and one that may not be plain, inside a module that may not just call it."""

    def __init__(self, inner, **others):
        super().__init__()
        self.plain, self.inner = linear(), inner
        for name, module in others.items():
            setattr(self, name, module)

    def forward(self, x):
        return self.inner(self.plain(x))


def linear(kind=nn.Linear, **options):
    torch.manual_seed(0)
    return kind(SIZE, SIZE, **options)


def parametrised():
    return nn.utils.parametrizations.weight_norm(linear())


def hooked():
    layer = linear()
    layer.register_forward_hook(lambda module, inputs, output: output + 1)
    return layer


def patched():
    layer = linear()
    layer.forward = lambda x: 3 * x
    return layer


def integers():
    layer = linear()
    layer.weight = nn.Parameter(torch.ones(SIZE, SIZE, dtype=torch.int8), requires_grad=False)
    return layer


def shared(**places):
    layer = linear()
    model = Model(Calls(layer))
    for name, module in places.items():
        setattr(model, name, module)
        module.weight = layer.weight
    return model


DENSE = {
    "a subclass that does more": (lambda: Model(Calls(linear(Doubled))), "its Doubled does more than a linear layer"),
    "a subclass that does more in training": (lambda: Model(Calls(linear(InTraining))), "its InTraining does more"),
    "a parametrised weight": (lambda: Model(Calls(parametrised())), "does more than|is parametrized"),
    "hooks": (lambda: Model(Calls(hooked())), "hooks run with it"),
    "a forward of its own": (lambda: Model(Calls(patched())), "hooks run with it"),
    "a weight that is read": (lambda: Model(Reads(linear())), "Reads reads its weight instead of calling it"),
    "a weight that is read otherwise": (lambda: Model(ReadsOtherwise(linear())), "ReadsOtherwise reads its weight"),
    "another modality": (lambda: Model(Tower(linear())), "it reads another modality than text"),
    "an embedding's weight": (
        lambda: shared(embedding=nn.Embedding(SIZE, SIZE)),
        "it shares its weight with embedding",
    ),
    "another layer's weight": (lambda: shared(twin=linear()), "it shares its weight with twin"),
}


@pytest.mark.parametrize("case", DENSE)
def test_quantize_leaves_layers_dense_that_are_not_plain(case, caplog):
    make, reason = DENSE[case]
    model = make()
    before, x = model.inner.special, model.plain(X)
    expected = model.inner(x)
    with caplog.at_level(logging.WARNING, "littlebit.fast.models.quantize"):
        results = lb.quantize_(model, CONFIG, progress=False)
    assert set(results) == {"plain"}
    assert re.search(reason, results.dense["inner.special"])
    assert model.inner.special is before
    assert isinstance(model.plain, LittleBitLinear)
    assert "stay" in caplog.text
    assert "special (" in caplog.text
    assert_same(model.inner(x), expected)
    lb.pack_(model)
    model(X)


PLAIN = {
    "a subclass that does nothing more": lambda: Model(Calls(linear(OnlyNamed))),
    "a subclass that says it in other words": lambda: Model(Calls(linear(InOtherWords))),
    "a dtype that is read": lambda: Model(Calls(linear())),
    "a special case that reads the weight": lambda: Model(ReadsInTraining(linear(bias=False))),
}


@pytest.mark.parametrize("case", PLAIN)
def test_quantize_takes_plain_layers_and_special_cases_still_run(case, caplog):
    model = PLAIN[case]()
    results = lb.quantize_(model, CONFIG, progress=False)
    assert set(results) == {"plain", "inner.special"}
    assert results.dense == {}
    assert not caplog.records
    for packed in (False, True):
        if packed:
            lb.pack_(model)
        other = model.train()(X).detach()
        # the weight is multiplied out in one order and not in the other: 32 inputs, ranks of at most 32, float32
        assert float((model.eval()(X).detach() - other).abs().max()) < 200 * 2**-24 * 32 * float(other.abs().max())


def test_computes_linear_tries_a_layer_without_touching_it():
    for kind, linear_after_all in ((InOtherWords, True), (InTraining, False), (Strange, False), (nn.Linear, True)):
        for device in ("cpu", "meta"):
            layer = linear(kind, device=device)
            before, mode = dict(layer._parameters), layer.training
            assert computes_linear(layer) is linear_after_all
            assert layer.training == mode
            assert all(layer._parameters[key] is each for key, each in before.items())


def test_quantize_leaves_integers_and_empty_layers_dense():
    model = Model(Calls(integers()), empty=linear(), head=linear(), lazy=nn.LazyLinear(SIZE), without=linear())
    model.without.weight = None
    model.empty.weight = nn.Parameter(torch.empty(SIZE, 0))
    results = lb.quantize_(model, CONFIG, progress=False)
    assert set(results) == {"plain", "head"}
    assert results.dense == {
        "inner.special": "its weight is int8, not a float of 16, 32 or 64 bits",
        "empty": "it has no weights",
        "lazy": "its weight has no shape before the first call",
        "without": "its weight is None, not a float of 16, 32 or 64 bits",
    }


def test_quantize_says_how_many_layers_and_weights_stay_dense(caplog):
    model = Model(Calls(linear(Doubled)), other=Calls(linear(Doubled)), third=linear())
    lb.quantize_(model, CONFIG, progress=False)
    expected = "2 layers stay dense, with 50.00% of the selected weights: 2 special (its Doubled does more"
    assert expected in caplog.text


def test_quantize_refuses_a_model_in_which_nothing_is_plain():
    model = nn.Sequential(linear(Doubled))
    with pytest.raises(ValueError, match=r"can be quantized; 1 layer stays dense, with 100\.00% .*Doubled"):
        lb.quantize_(model, CONFIG, progress=False)
    model = nn.Sequential(linear())
    lb.quantize_(model, CONFIG, progress=False)
    with pytest.raises(ValueError, match="the model is quantized already"):
        lb.quantize_(model, CONFIG, progress=False)


def test_quantize_refuses_weights_without_memory():
    with pytest.raises(ValueError, match="layer 0: the weight is on the meta device"):
        lb.quantize_(nn.Sequential(linear(device="meta")), CONFIG, progress=False)


def test_attention_that_reads_its_output_layer_still_runs():
    model = nn.TransformerEncoderLayer(SIZE, 4, 48, batch_first=True)
    results = lb.quantize_(model, CONFIG, progress=False)
    assert set(results) == {"linear1", "linear2"}
    assert "MultiheadAttention reads its weight" in results.dense["self_attn.out_proj"]
    for mode in (True, False):
        model.train(mode)(X[None])
    lb.pack_(model).eval()(X[None])


def test_a_module_in_several_places_is_one_before_and_after():
    layer = linear()
    model = Model(Calls(layer), again=layer)
    results = lb.quantize_(model, CONFIG, progress=False)
    assert set(results) == {"plain", "inner.special"}
    assert model.again is model.inner.special
    assert isinstance(model.again, LittleBitLinear)
    lb.pack_(model)
    assert model.again is model.inner.special
    assert isinstance(model.again, PackedLinear)
    excluded = Model(Calls(linear()), again=linear())
    excluded.again = excluded.inner.special
    assert set(lb.quantize_(excluded, lb.Config(bits=6.0, paths=1, exclude="again"), progress=False)) == {"plain"}


def test_weights_read_follows_classes_and_skips_set_up():
    class SetsUp(Calls):
        def __init__(self, layer):
            super().__init__(layer)
            nn.init.zeros_(self.special.weight)

        def _init_weights(self, module):
            nn.init.zeros_(self.special.weight)

    class Inherits(Reads):
        pass

    assert weights_read(SetsUp) == frozenset()
    assert weights_read(Inherits) == {"special"}
    assert weights_read(type("NoSource", (nn.Module,), {})) == frozenset()
    assert list(reads_in([])) == []


SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0}
MAMBA = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "state_size": 8, "pad_token_id": 0}
MAMBA |= {"bos_token_id": 1, "eos_token_id": 2}
VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
VISION |= {"image_size": 28, "patch_size": 14}
FAMILIES = {
    "Mamba": (lambda: hf.MambaConfig(**MAMBA), {"dt_proj": "reads its weight"}),
    "Falcon Mamba": (lambda: hf.FalconMambaConfig(**MAMBA), {"dt_proj": "reads its weight"}),
    "Llama 4": (
        lambda: hf.Llama4TextConfig(**SIZES, intermediate_size_mlp=48, num_local_experts=4),
        {"router": "it routes tokens to experts"},
    ),
    "Falcon": (lambda: hf.FalconConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=4), {}),
    "Gemma 3": (
        lambda: hf.Gemma3Config(
            text_config={**SIZES, "model_type": "gemma3_text"},
            vision_config={**VISION, "model_type": "siglip_vision_model"},
            mm_tokens_per_image=4,
            image_token_index=63,
            boi_token_index=62,
            eoi_token_index=61,
        ),
        {"q_proj": "another modality", "fc1": "another modality"},
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_with_special_layers_runs_in_every_form(family, tmp_path):
    """What is not plain stays as it was; the model runs quantised, packed and, in bfloat16, loaded."""
    config, special = FAMILIES[family]
    torch.manual_seed(0)
    model = hf.AutoModelForCausalLM.from_config(config()).eval()
    tokens = torch.arange(3, 20)[None]
    results = lb.quantize_(model, lb.Config(bits=6.0, paths=1), progress=False)
    for kind, reason in special.items():
        found = [each for name, each in results.dense.items() if name.endswith(f".{kind}")]
        assert found
        assert all(reason in each for each in found)
    assert not any("vision" in name or "projector" in name for name in results)
    model(tokens)
    saved = lb.save(model, tmp_path / "out")
    expected = model(tokens).logits
    assert set(packed_layers(model)) == set(results)
    for parameter in model.parameters():
        parameter.data = parameter.data.half().float()  # as a checkpoint holds it
    expected = model(tokens).logits
    assert_same(lb.load(saved)(tokens).logits, expected)
    for load in (lb.load, hf.AutoModelForCausalLM.from_pretrained):
        assert load(saved, dtype=torch.bfloat16)(tokens).logits.isfinite().all()


@pytest.mark.parametrize(
    ("pattern", "near_it"),
    [
        ("down_proj", r"did you mean '\*\.down_proj'"),
        ("*.downproj", r"did you mean '\*\.down_proj'"),
        ("model.layers.0", r"did you mean 'model\.layers\.0\.\*'"),
        ("mlp", r"did you mean '\*\.mlp\.\*'"),
        ("q_prjo", r"did you mean '\*\.q_proj'"),
        ("*.Q_PROJ", r"did you mean '\*\.q_proj'"),
    ],
)
@pytest.mark.parametrize("key", ["include", "exclude"])
def test_a_pattern_that_matches_nothing_is_refused_with_what_is_near(key, pattern, near_it, tiny_llama):
    model = lb.load_model(tiny_llama)
    with pytest.raises(ValueError, match=rf"no linear layer matches the pattern '.*' of {key}; {near_it}"):
        lb.quantize_(model, lb.Config(**{key: ("*.o_proj", pattern)}), progress=False)
    assert not any(isinstance(module, LittleBitLinear) for module in model.modules())


def test_near_always_has_an_answer():
    assert near("x", ["a.b"]) == ["a.b"]
    assert near("x", []) == ["*"]


def test_one_string_is_one_pattern(tiny_llama):
    assert lb.Config(include="*.q_proj", exclude=["a"]) == lb.Config(include=("*.q_proj",), exclude=("a",))
    results = lb.quantize_(lb.load_model(tiny_llama), lb.Config(bits=2.5, include="*.q_proj"), progress=False)
    assert [name.split(".")[-1] for name in results] == ["q_proj", "q_proj"]
    assert lb.LittleBitConfig(include="*.q_proj").config().include == ("*.q_proj",)
    for given in (None, 3, ("*", 3), b"*"):
        with pytest.raises(TypeError, match=r"include must be a pattern of layer names or a list of patterns, got"):
            lb.Config(include=given)


def test_the_head_and_layers_that_are_quantised_already_may_be_named(tiny_llama):
    model = lb.load_model(tiny_llama)
    lb.quantize_(model, lb.Config(bits=2.5, include="*.q_proj", exclude=("lm_head", "*embed*")), progress=False)
    results = lb.quantize_(model, lb.Config(bits=2.5, exclude="*.q_proj"), progress=False)
    assert len(results) == 12


def test_the_command_refuses_a_pattern_that_matches_nothing(tiny_llama, tmp_path, capsys):
    for more in ([], ["--dry-run"]):
        command = ["quantize", str(tiny_llama), str(tmp_path / "out"), "--bits", "2.5", "--exclude", "down_proj", *more]
        assert main(command) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert "the pattern 'down_proj' of exclude; did you mean '*.down_proj'?" in captured.err
        assert not (tmp_path / "out").exists()
