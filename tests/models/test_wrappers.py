"""Test compiled, parallel and PEFT models: each function unwraps them, runs them, or raises a clear error."""

import littlebit.fast as lb
import pytest
import torch
from compare import assert_same
from conftest import make_tiny_llama
from littlebit.fast.checkpoints.gguf import save_gguf
from littlebit.fast.decoding.latent_cache import check_latent
from littlebit.fast.models.embeddings import quantize_embeddings_
from littlebit.fast.models.layers import LittleBitLinear, PackedLinear
from littlebit.fast.models.quantize import packed_layers
from littlebit.fast.models.wrappers import has_adapters, has_hooks, unwrapped, with_adapters_inside
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

peft = pytest.importorskip("peft")

# Of PEFT on ties and on layers that it does not know, of torch.compile as it is imported, and of transformers' cache
FILTERS = ("ignore::UserWarning:peft", "ignore:`torch.jit.script", "ignore::FutureWarning")
pytestmark = [pytest.mark.filterwarnings(each) for each in FILTERS]
TOKENS = (torch.arange(40)[None] * 5) % 256
PROMPT = "hello"


@pytest.fixture(scope="module")
def checkpoint(loud_llama, tmp_path_factory):
    model = lb.load_model(loud_llama)
    lb.quantize_(model, lb.Config(bits=2.5), progress=False)
    return lb.save(model, tmp_path_factory.mktemp("wrappers") / "out", lb.load_tokenizer(loud_llama))


WRAPPERS = {"compiled": torch.compile, "parallel": torch.nn.DataParallel}
WRAPPERS["both"] = lambda model: torch.nn.DataParallel(torch.compile(model))
ADAPTERS = {
    "a layer": peft.LoraConfig(r=4, target_modules=["down_proj"]),
    "the head": peft.LoraConfig(r=4, target_modules=["lm_head"]),
    "the embedding": peft.LoraConfig(r=4, target_modules=["embed_tokens"]),
    "a layer, with magnitudes": peft.LoraConfig(r=4, target_modules=["down_proj"], use_dora=True),
    "norms": peft.LNTuningConfig(target_modules=["norm"]),
    "the head as a whole": peft.LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"]),
    "some tokens": peft.LoraConfig(r=4, target_modules=["q_proj"], trainable_token_indices=[104, 101]),
    "the prompt": peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "keys and values": peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
}


def adapted(model, config, size=0.5):
    """Make a model with adapters that have left their initial values."""
    model = peft.get_peft_model(model, config)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += size * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def greedy(model, tokenizer, count):
    """Generate by transformers, without this package."""
    prompt = torch.tensor([tokenizer(PROMPT)["input_ids"]])
    options = {"max_new_tokens": count, "do_sample": False, "pad_token_id": 258}
    new = model.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), **options)
    return tokenizer.decode(new[0, prompt.shape[1] :], skip_special_tokens=True)


@pytest.mark.parametrize("place", ADAPTERS)
def test_generate_and_perplexity_use_adapters_on_any_module(place, checkpoint, caplog):
    model, tokenizer = adapted(lb.load(checkpoint), ADAPTERS[place]), lb.load_tokenizer(checkpoint)
    assert lb.generate(model, PROMPT, 8) == greedy(model, tokenizer, 8)
    assert "it has adapters of PEFT" in caplog.text
    assert lb.generate(model, [PROMPT, PROMPT], 4) == 2 * [greedy(model, tokenizer, 4)]
    found = lb.perplexity(model, TOKENS[0], window=40, progress=False)
    with torch.inference_mode():
        scores = torch.log_softmax(model(TOKENS[:, :-1]).logits[0, -39:].double(), -1)
        losses = -scores.gather(-1, TOKENS[0, 1:, None])
        plain = torch.log_softmax(lb.load(checkpoint)(TOKENS[:, :-1]).logits[0].double(), -1)
    # float32 losses of 39 tokens, each off by less than a millionth of the largest
    assert abs(found.perplexity / float(losses.mean().exp()) - 1) < 1e-4
    assert abs(found.perplexity / float((-plain.gather(-1, TOKENS[0, 1:, None])).mean().exp()) - 1) > 1e-3


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_wrappers_are_taken_off_where_a_model_is_read(wrapper, checkpoint, tmp_path, caplog):
    model = lb.load(checkpoint)
    wrapped = WRAPPERS[wrapper](model)
    assert unwrapped(wrapped) is model
    assert with_adapters_inside(wrapped) is model
    assert lb.generate(wrapped, PROMPT, 8) == lb.generate(model, PROMPT, 8)
    assert lb.generate(wrapped, [PROMPT], 4) == [lb.generate(model, PROMPT, 4)]
    assert not caplog.records  # none of them was left to transformers
    loaded = lb.load(lb.save(wrapped, tmp_path / "out"))
    assert_same(loaded(TOKENS).logits, model(TOKENS).logits)
    assert lb.latent_cache(wrapped).nbytes == 0


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_wrappers_where_a_model_is_changed(wrapper, tiny_llama):
    model = lb.load_model(tiny_llama)
    wrapped = WRAPPERS[wrapper](model)
    if wrapper == "compiled":
        results = lb.quantize_(wrapped, lb.Config(bits=2.5), progress=False)
        assert all(isinstance(model.get_submodule(name), LittleBitLinear) for name in results)
        assert lb.pack_(wrapped) is wrapped
        assert len(packed_layers(model)) == 14
        quantize_embeddings_(wrapped, 8)
        return
    for change in (
        lambda: lb.quantize_(wrapped, lb.Config(bits=2.5), progress=False),
        lambda: lb.train_(wrapped, model, TOKENS[0]),
        lambda: quantize_embeddings_(wrapped, 8),
    ):
        with pytest.raises(
            ValueError, match=r"replaces parameters, but DataParallel holds the old ones: pass model\.module"
        ):
            change()
    assert not any(isinstance(module, LittleBitLinear) for module in model.modules())


@pytest.mark.parametrize("place", ["a layer", "the head", "the embedding", "norms", "the prompt"])
def test_a_model_with_adapters_is_refused_where_it_is_changed_or_saved(place, checkpoint, tmp_path):
    model = adapted(lb.load(checkpoint), ADAPTERS[place])
    names = set(model.state_dict())
    tokenizer = lb.load_tokenizer(checkpoint)
    for each in (model, torch.compile(model)):
        for action in (
            lambda given: lb.quantize_(given, progress=False),
            lambda given: lb.train_(given, given, TOKENS[0]),
            lambda given: lb.save(given, tmp_path / "out"),
            lambda given: lb.save_official(given, tmp_path / "out"),
            lambda given: save_gguf(given, tmp_path / "out", tokenizer),
            lambda given: quantize_embeddings_(given, 8),
        ):
            with pytest.raises(ValueError, match="needs a model without adapters, but this one has adapters of PEFT"):
                action(each)
    assert list(tmp_path.iterdir()) == []
    assert set(model.state_dict()) == names


def test_adapters_inside_a_plain_model_are_noticed(checkpoint, tmp_path):
    inner = adapted(lb.load(checkpoint), ADAPTERS["a layer"]).get_base_model()
    assert has_adapters(inner)
    with pytest.raises(ValueError, match="needs a model without adapters"):
        lb.save(inner, tmp_path / "out")
    with pytest.raises(ValueError, match=r"save those with PeftModel\.save_pretrained"):
        inner.save_pretrained(tmp_path / "out")
    assert lb.generate(inner, PROMPT, 4) == greedy(inner, lb.load_tokenizer(checkpoint), 4)


def test_unloaded_models_are_saved_as_they_were(checkpoint, tmp_path):
    model = adapted(lb.load(checkpoint), ADAPTERS["a layer"]).unload()
    assert not has_adapters(model)
    assert_same(lb.load(lb.save(model, tmp_path / "out"))(TOKENS).logits, lb.load(checkpoint)(TOKENS).logits)


def test_latent_caches_take_adapters_beside_other_layers(checkpoint):
    model = adapted(lb.load(checkpoint), peft.LoraConfig(r=4, target_modules=["q_proj"]))
    assert lb.latent_cache(model).nbytes == 0
    with pytest.raises(ValueError, match="k_proj must be packed, but is a PackedLora"):
        lb.latent_cache(adapted(lb.load(checkpoint), peft.LoraConfig(r=4, target_modules=["k_proj"])))
    with pytest.raises(ValueError, match="PEFT puts learned tokens before the prompt"):
        lb.latent_cache(adapted(lb.load(checkpoint), ADAPTERS["the prompt"]))
    check_latent(lb.load(checkpoint), torch.float16)


def test_teachers_may_be_compiled_or_have_adapters(tiny_llama):
    for wrap in (torch.compile, lambda model: adapted(model, ADAPTERS["a layer"])):
        model = lb.load_model(tiny_llama)
        lb.quantize_(model, lb.Config(bits=2.5, paths=1), progress=False)
        config = lb.TrainConfig(total_tokens=64, sequence_length=16, batch_size=2, warmup=0)
        log = lb.train_(
            torch.compile(model), wrap(lb.load_model(tiny_llama)), TOKENS[0].repeat(2), config, progress=False
        )
        assert log[-1]["step"] == 2


def test_the_compiled_decoder_steps_aside_for_hooks_and_other_layers(checkpoint, caplog):
    model = lb.load(checkpoint)
    model(TOKENS, output_hidden_states=True)  # leaves transformers' own hooks, which only look on
    assert not has_hooks(model)
    expected = lb.generate(model, PROMPT, 4)
    assert not caplog.records
    handle = model.model.layers[0].register_forward_hook(lambda module, inputs, output: -output)
    assert lb.generate(model, PROMPT, 4) == greedy(model, lb.load_tokenizer(checkpoint), 4) != expected
    assert "its modules have hooks" in caplog.text
    handle.remove()

    class Louder(torch.nn.Linear):
        def forward(self, x):
            return -super().forward(x)

    head = Louder(64, 260, bias=False)
    head.weight = model.lm_head.weight
    model.lm_head = head
    assert lb.generate(model, PROMPT, 4) == greedy(model, lb.load_tokenizer(checkpoint), 4)
    assert "its embedding or head is a Louder" in caplog.text


@pytest.mark.parametrize("bits", [16, 8])
@pytest.mark.parametrize("tied", [True, False])
def test_auto_model_takes_what_it_has_of_a_packed_checkpoint(bits, tied, tmp_path):
    """Without the head, with another one, and back: transformers' renaming of tensors is followed by layers."""
    model = lb.load_model(make_tiny_llama(tmp_path / "model", tie_word_embeddings=tied))
    lb.quantize_(model, lb.Config(bits=2.5), progress=False)
    quantize_embeddings_(model, bits)
    saved = lb.save(model, tmp_path / "out")
    expected = lb.load(saved).model(TOKENS).last_hidden_state
    headless = AutoModel.from_pretrained(saved, dtype=torch.float32)
    assert len(packed_layers(headless)) == 14
    assert_same(headless(TOKENS).last_hidden_state, expected)
    classes = AutoModelForSequenceClassification.from_pretrained(saved, dtype=torch.float32)
    assert_same(classes.model(TOKENS).last_hidden_state, expected)
    headless.save_pretrained(tmp_path / "headless")
    again = AutoModel.from_pretrained(tmp_path / "headless", dtype=torch.float32)
    assert_same(again(TOKENS).last_hidden_state, expected)
    if tied:  # else the head is missing, and transformers makes a new one
        whole = AutoModelForCausalLM.from_pretrained(tmp_path / "headless", dtype=torch.float32)
        assert_same(whole.model(TOKENS).last_hidden_state, expected)


def test_save_refuses_what_load_cannot_rebuild(checkpoint, tmp_path):
    headless = AutoModel.from_pretrained(checkpoint, dtype=torch.float32)
    with pytest.raises(ValueError, match="this LlamaModel cannot be saved so that load can read it"):
        lb.save(headless, tmp_path / "out")
    more = lb.load(checkpoint)
    more.value_head = torch.nn.Linear(64, 1)
    with pytest.raises(ValueError, match=r"left over \['value_head\.weight'"):
        lb.save(more, tmp_path / "out")
    other = lb.load(checkpoint)
    other.config.vocab_size = 300
    with pytest.raises(ValueError, match=r"tensor model\.embed_tokens\.weight must be \(300, 64\)"):
        lb.save(other, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    resized = lb.load(checkpoint)
    resized.resize_token_embeddings(300, mean_resizing=False)
    assert lb.load(lb.save(resized, tmp_path / "out"))(TOKENS).logits.shape == (1, 40, 300)


def test_quantised_embeddings_refuse_what_they_cannot_do(checkpoint):
    model = lb.load(checkpoint)
    quantize_embeddings_(model, 8)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert (embedding.num_embeddings, embedding.embedding_dim) == (260, 64)
    assert not hasattr(embedding, "weight")
    for refused in (
        lambda: embedding.weight,
        lambda: head.weight,
        lambda: setattr(head, "weight", torch.nn.Parameter(torch.zeros(260, 64))),
        lambda: model.resize_token_embeddings(300),
    ):
        with pytest.raises(AttributeError, match="has no weight to read, resize, tie or train"):
            refused()
    with pytest.raises(AttributeError, match="no attribute 'wieght'"):
        _ = embedding.wieght
    with pytest.raises(ValueError, match="quantized already, to 8 bits"):
        quantize_embeddings_(model, 8)
    model.tie_weights()
    assert model(TOKENS).logits.isfinite().all()
    with pytest.raises(AttributeError, match="has no weight to read, resize, tie or train"):
        peft.get_peft_model(model, ADAPTERS["some tokens"])


def test_heads_that_are_more_than_a_weight_stay_in_16_bits(tiny_llama):
    model = lb.load_model(tiny_llama)
    model.lm_head = torch.nn.Linear(64, 260)
    with pytest.raises(ValueError, match="has a Linear with more than a weight as head"):
        quantize_embeddings_(model, 8)
    with pytest.raises(ValueError, match="has no output head"):
        quantize_embeddings_(AutoModel.from_pretrained(tiny_llama), 8)


def test_the_weight_of_both_forms_is_read_and_not_set(checkpoint, tiny_llama):
    trained = lb.load_model(tiny_llama)
    lb.quantize_(trained, lb.Config(bits=2.5), progress=False)
    name = "model.layers.0.mlp.up_proj"
    for model, kind in ((trained, LittleBitLinear), (lb.load(checkpoint), PackedLinear)):
        layer = model.get_submodule(name)
        assert isinstance(layer, kind)
        assert (layer.in_features, layer.out_features) == (64, 96)
        assert layer.weight.shape == (96, 64)
        assert layer.weight.dtype == torch.float32
        with pytest.raises(AttributeError, match="cannot be set, because it is computed from signs and scales"):
            layer.weight = torch.nn.Parameter(torch.zeros(96, 64))
    layer = trained.get_submodule(name)
    layer.weight.square().sum().backward()
    assert all(parameter.grad is not None for parameter in layer.paths.parameters())
    layer.a, layer.b = torch.ones(1, 64), torch.ones(96, 1)  # what a trainer builds for all layers at once
    assert_same(layer.weight, torch.ones(96, 64))
