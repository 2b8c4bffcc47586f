"""Test that all readers and engines agree on stop tokens, sampling, chat templates and positions."""

import json
import shutil
from dataclasses import replace

import littlebit.fast as lb
import pytest
import torch
from compare import assert_same
from conftest import make_tiny_llama
from littlebit.fast._checks import LittleBitWarning
from littlebit.fast.cli.generate import load_to_generate
from littlebit.fast.cli.main import build_parser, main
from littlebit.fast.decoding import generate
from littlebit.fast.decoding.architecture import NotDecodableError
from littlebit.fast.decoding.mapped_weights import map_model
from littlebit.fast.decoding.tokenizer import Tokenizer
from littlebit.fast.decoding.torch_weights import decodable, through_transformers
from littlebit.fast.models.generation_settings import (
    FILE,
    GREEDY,
    IGNORED,
    NEUTRAL_VALUES,
    SAMPLING_DEFAULTS,
    SUPPORTED,
    GenerationConfig,
    GenerationDefaults,
    generation_defaults,
    parse_generation_config,
    read_generation_config,
)
from transformers import AutoModelForCausalLM, GenerationConfig as TheirConfig

BITS = 3.0


def saved(folder, out, **said):
    """Save a packed checkpoint whose model has generation settings."""
    model = lb.load_model(folder)
    model.generation_config = TheirConfig(**said)
    lb.quantize_(model, lb.Config(bits=BITS), progress=False)
    return lb.save(model, out, lb.load_tokenizer(folder))


def greedy(*stop, **settings):
    return GenerationDefaults(replace(GREEDY, stop_tokens=stop, **settings))


def sampled(*settings, stop=()):
    return GenerationDefaults(GenerationConfig(64, *settings, stop_tokens=stop))


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ({}, GenerationDefaults()),
        ({"eos_token_id": 3}, greedy(3)),
        ({"eos_token_id": [3, 5], "temperature": 0.7, "top_p": 0.8}, greedy(3, 5, top_p=0.8)),
        ({"do_sample": True}, sampled(1.0, 50, 1.0)),
        ({"do_sample": True, "temperature": 0.6, "top_k": 20}, sampled(0.6, 20, 1.0)),
        ({"do_sample": True, "min_p": 0.05}, sampled(1.0, 50, 1.0, 0.05)),
        ({"do_sample": False, "top_p": 0.0, "temperature": 0.0, "min_p": 2}, greedy()),
        ({"repetition_penalty": 1.0, "bad_words_ids": None, "max_length": 9}, greedy(repetition_penalty=1.0)),
        ({"repetition_penalty": 1.1}, greedy(repetition_penalty=1.1)),
        ({"min_p": 0.05}, greedy(min_p=0.05)),
        ({"num_beams": 4}, GenerationDefaults(unsupported="num_beams to 4")),
        ({"stop_strings": ["."]}, GenerationDefaults(unsupported="stop_strings to ['.']")),
        ({"a_setting_of_next_year": 2}, GenerationDefaults(unsupported="a_setting_of_next_year to 2")),
        ({"a_setting_of_next_year": False, "_from_model_config": True}, GenerationDefaults()),
    ],
)
def test_parse_generation_config_gives_the_decoders_defaults(said, expected):
    assert parse_generation_config(said) == expected


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"eos_token_id": "</s>"}, "eos_token_id must be a token number or a list of them, got '</s>'"),
        ({"eos_token_id": [2, True]}, "eos_token_id must be"),
        ({"do_sample": True, "temperature": -1}, "temperature must be a finite number >= 0, got -1"),
        ({"do_sample": True, "top_p": 1.5}, "top_p must be"),
        ({"do_sample": True, "top_k": "many"}, "top_k must be"),
        ({"do_sample": True, "min_p": 1.5}, "min_p must be"),
        ({"repetition_penalty": 0}, "repetition_penalty must be a finite number >= 0.001 and <= 1000, got 0"),
    ],
)
def test_parse_generation_config_refuses_values_out_of_range(said, message):
    with pytest.raises(lb.CheckpointError, match=message):
        parse_generation_config(said)


def test_every_setting_of_transformers_is_known():
    """A new one is left to transformers until somebody has looked at it; none stands in two places."""
    known = IGNORED | NEUTRAL_VALUES.keys() | SUPPORTED
    assert len(known) == len(IGNORED) + len(NEUTRAL_VALUES) + len(SUPPORTED)
    assert SAMPLING_DEFAULTS.keys() < SUPPORTED
    assert parse_generation_config(TheirConfig().to_dict()) == GenerationDefaults()
    unseen = {name for name in TheirConfig().to_dict() if not name.startswith("_")} - known
    assert unseen <= {"use_mtp", "speculation_type", "continuous_batching_config"}


def test_a_checkpoint_keeps_its_settings(tiny_llama, tmp_path):
    """Several stop tokens and sampling, in every reader, and after another round of saving."""
    said = {"eos_token_id": [257, 65], "pad_token_id": 258, "do_sample": True, "temperature": 0.7, "top_k": 20}
    path = saved(tiny_llama, tmp_path / "out", **said)
    expected = sampled(0.7, 20, 1.0, stop=(257, 65))
    loaded, plugged = lb.load(path), AutoModelForCausalLM.from_pretrained(path)
    again = lb.load(lb.save(loaded, tmp_path / "again"))
    assert [generation_defaults(each) for each in (loaded, plugged, again)] == [expected] * 3
    assert map_model(path).generation == decodable(loaded).generation == expected
    assert parse_generation_config(read_generation_config(path)) == expected
    for model in (loaded, plugged, again):
        assert {name: getattr(model.generation_config, name) for name in said} == said


def test_settings_that_transformers_would_not_write_are_kept(tiny_llama, tmp_path):
    """It reads a temperature beside greedy decoding, but refuses to write it once it was changed."""
    path = saved(tiny_llama, tmp_path / "out", do_sample=False, temperature=0.6, top_p=0.9)
    assert generation_defaults(lb.load(path)) == map_model(path).generation == greedy(top_p=0.9)


def test_without_the_file_config_json_decides(tiny_llama, tmp_path):
    """As in transformers: old checkpoints keep settings of generation in config.json."""
    path = saved(tiny_llama, tmp_path / "out", eos_token_id=[257])
    (path / FILE).unlink()
    config = json.loads((path / "config.json").read_text())
    for change, expected in (
        ({"eos_token_id": [257, 9]}, greedy(257, 9)),
        ({"eos_token_id": 9, "repetition_penalty": 1.3}, greedy(9, repetition_penalty=1.3)),
    ):
        (path / "config.json").write_text(json.dumps(config | change))
        assert parse_generation_config(read_generation_config(path)) == expected
        assert generation_defaults(lb.load(path, verify=False)) == expected
    dense = shutil.copytree(tiny_llama, tmp_path / "dense")
    (dense / FILE).unlink(missing_ok=True)
    assert map_model(dense).generation == generation_defaults(lb.load_model(dense)) == greedy(257)


@pytest.mark.parametrize("content", ["{", "[]", '{"eos_token_id": "</s>"}'])
def test_a_damaged_file_is_named(tiny_llama, tmp_path, content, capsys):
    path = saved(tiny_llama, tmp_path / "out")
    (path / FILE).write_text(content)
    with pytest.raises(lb.CheckpointError, match=FILE):
        map_model(path)
    assert main(["generate", str(path), "--prompt", "a"]) == 2
    assert FILE in capsys.readouterr().err
    with pytest.raises(ValueError, match=FILE):
        lb.generate(lb.load(path), "a", tokenizer=lb.load_tokenizer(tiny_llama))


def test_generate_samples_as_the_checkpoint_says(loud_llama, tmp_path):
    """The caller's settings win over the checkpoint's; every decoder chooses the same tokens."""
    path = saved(loud_llama, tmp_path / "out", do_sample=True, temperature=1.4, top_k=30, top_p=0.95)
    greedy = saved(loud_llama, tmp_path / "greedy")
    loaded, mapped, tokens = lb.load(path), map_model(path), [5, 6, 7]

    def written(model, **settings):
        return list(generate.stream_tokens(model, tokens, GenerationConfig(12, seed=3, **settings), 258))

    own = {"temperature": 1.4, "top_k": 30, "top_p": 0.95}
    for model in (loaded, mapped):
        assert written(model) == written(lb.load(greedy), **own)
        assert written(model, temperature=0) == written(map_model(greedy))
        assert written(model, temperature=0.5) == written(map_model(greedy), **own | {"temperature": 0.5})
        assert written(model, top_k=0, top_p=1.0) == written(map_model(greedy), temperature=1.4)
    assert generate.batch_tokens(loaded, [tokens], GenerationConfig(12, seed=3)) == [written(mapped)]


def test_what_the_decoder_cannot_follow_goes_through_transformers(loud_llama, tmp_path, caplog):
    """Its own settings, several stop tokens among them, and the caller's, which win."""
    path = saved(
        loud_llama, tmp_path / "out", no_repeat_ngram_size=1, eos_token_id=[257, 65], return_dict_in_generate=True
    )
    with pytest.raises(NotDecodableError, match="no_repeat_ngram_size to 1"):
        map_model(path)
    model = lb.load(path)
    prompt, config = torch.tensor([[5, 6, 7]]), GenerationConfig(12)
    settings = {"max_new_tokens": 12, "do_sample": False, "return_dict_in_generate": False, "pad_token_id": 258}
    expected = model.generate(prompt, attention_mask=torch.ones_like(prompt), **settings)
    assert_same(generate.generate_tokens(model, prompt, config, 258), expected[:, 3:])
    assert "no_repeat_ngram_size to 1" in caplog.text
    plain = saved(loud_llama, tmp_path / "plain")
    assert generate.generate_tokens(lb.load(plain), prompt, config).tolist() != expected[:, 3:].tolist()
    config = GenerationConfig(12, 1.3, 5, 0.9, 0.01, 1.2, seed=1)
    drawn = through_transformers(model, [5, 6, 7], config, 258)
    assert list(generate.stream_tokens(model, [5, 6, 7], config, 258)) == drawn


def test_generate_stops_at_each_of_several_tokens(loud_llama, tmp_path):
    path = saved(loud_llama, tmp_path / "out")
    full = list(generate.stream_tokens(map_model(path), [5, 6, 7], GenerationConfig(20)))
    for stop in (full[4], full[9]):
        said = json.loads((path / FILE).read_text()) | {"eos_token_id": [257, stop]}
        (path / FILE).write_text(json.dumps(said))
        expected = full[: full.index(stop) + 1]
        for model in (map_model(path), lb.load(path)):
            assert list(generate.stream_tokens(model, [5, 6, 7], GenerationConfig(20))) == expected
        assert through_transformers(lb.load(path), [5, 6, 7], GenerationConfig(20), 258) == expected


TEMPLATES = {
    "with BOS": "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}[assistant]",
    "without": "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}",
}


@pytest.fixture(scope="module")
def with_bos(tmp_path_factory):
    """Make a model whose tokenizer puts BOS before a text."""
    from tokenizers import processors

    folder = make_tiny_llama(tmp_path_factory.mktemp("bos") / "model")
    tokenizer = lb.load_tokenizer(folder)
    after = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 256)])
    tokenizer.backend_tokenizer.post_processor = after
    tokenizer.save_pretrained(folder)
    assert lb.load_tokenizer(folder)("a")["input_ids"][0] == 256
    return folder


@pytest.mark.parametrize("template", list(TEMPLATES))
def test_a_chat_has_the_special_tokens_of_its_template_alone(with_bos, template, tmp_path):
    folder = shutil.copytree(with_bos, tmp_path / "copy")
    (folder / "chat_template.jinja").write_text(TEMPLATES[template])
    theirs, mine = lb.load_tokenizer(folder), Tokenizer(folder)
    messages = [{"role": "user", "content": "hé"}]
    expected = list(theirs.apply_chat_template(messages, add_generation_prompt=True)["input_ids"])
    assert expected.count(256) == (template == "with BOS")
    for tokenizer in (theirs, mine):
        assert generate.prompt_tokens(tokenizer, "hé", True) == expected
        assert generate.prompt_tokens(tokenizer, "hé", False)[0] == 256


def test_named_templates_are_those_of_transformers(with_bos, tmp_path, capsys):
    """A list of them, or files beside the default one: the default is taken, in the command too."""
    listed, files = (shutil.copytree(with_bos, tmp_path / name) for name in ("listed", "files"))
    config = json.loads((listed / "tokenizer_config.json").read_text())
    config["chat_template"] = [{"name": "default", "template": "d{{ messages[0]['content'] }}"}]
    config["chat_template"].append({"name": "tool_use", "template": "t{{ messages[0]['content'] }}"})
    (listed / "tokenizer_config.json").write_text(json.dumps(config))
    (files / "chat_template.jinja").write_text("d{{ messages[0]['content'] }}")
    (files / "additional_chat_templates").mkdir()
    (files / "additional_chat_templates" / "tool_use.jinja").write_text("t{{ messages[0]['content'] }}")
    for folder in (listed, files):
        words = ["generate", str(folder), "--prompt", "a", "--chat", "--max-new-tokens", "4"]
        _, tokenizer = load_to_generate(build_parser("generate").parse_args(words))
        assert generate.prompt_tokens(tokenizer, "a", True) == generate.prompt_tokens(tokenizer, "da", False)[1:]
        assert main(words) == 0


@pytest.mark.parametrize("template", ["{{ raise_exception('no') }}", "{% if %}", "{{ messages + 1 }}"])
def test_a_template_that_refuses_is_an_error_in_words(with_bos, template, tmp_path):
    folder = shutil.copytree(with_bos, tmp_path / "copy")
    (folder / "chat_template.jinja").write_text(template)
    for tokenizer in (lb.load_tokenizer(folder), Tokenizer(folder)):
        with pytest.raises(ValueError, match="chat template cannot be used"):
            generate.prompt_tokens(tokenizer, "a", True)


def test_tokenizer_leaves_a_changed_prefix_to_transformers(with_bos, tmp_path):
    folder = shutil.copytree(with_bos, tmp_path / "copy")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    for value, left in ((False, False), (True, True)):
        (folder / "tokenizer_config.json").write_text(json.dumps(config | {"add_prefix_space": value}))
        if left:
            with pytest.raises(NotDecodableError, match="add_prefix_space"):
                Tokenizer(folder)
        else:
            assert Tokenizer(folder)("a")["input_ids"] == lb.load_tokenizer(folder)("a")["input_ids"]


def test_gguf_says_the_stop_tokens_that_it_can(tiny_llama, tmp_path):
    import gguf

    def written(stop, **said):
        model = lb.load_model(tiny_llama)
        model.generation_config = TheirConfig(eos_token_id=stop, **said)
        tokenizer = lb.load_tokenizer(tiny_llama)
        tokenizer.chat_template = {"default": "a", "tool_use": "b"}
        path = lb.save_gguf(model, tmp_path / "model.gguf", tokenizer, overwrite=True)
        fields = gguf.GGUFReader(path).fields
        names = [f"tokenizer.ggml.{name}_token_id" for name in ("eos", "eot")]
        assert "tokenizer.chat_template.tool_use" in fields
        return [fields[name].contents() if name in fields else None for name in names]

    assert written(None) == written(257) == [257, None]
    assert written([65, 257]) == [257, 65]
    with pytest.warns(
        LittleBitWarning, match="does not say the stop tokens 67 and how to choose tokens: temperature 0.7, top_k 50"
    ):
        assert written([65, 66, 67], do_sample=True, temperature=0.7) == [65, 66]
    with pytest.warns(LittleBitWarning, match=r"how to choose tokens: temperature 0\.0, repetition_penalty 1\.2"):
        written(257, repetition_penalty=1.2)
    with pytest.warns(LittleBitWarning, match="that generation_config sets no_repeat_ngram_size to 3"):
        written(257, no_repeat_ngram_size=3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: setattr(c, "hidden_act", "gelu"), "activation silu, not gelu"),
        (lambda c: c.rope_parameters.update(partial_rotary_factor=0.5), "plain rotary positions"),
        (lambda c: c.update({"use_sliding_window": True, "sliding_window": 8}), "without sliding windows"),
        (lambda c: setattr(c, "layer_types", ["full_attention", "sliding_attention"]), "without sliding windows"),
    ],
)
def test_gguf_refuses_what_llama_cpp_would_compute_otherwise(tiny_llama, tmp_path, change, message):
    model = lb.load_model(tiny_llama)
    change(model.config)
    with pytest.raises(ValueError, match=message):
        lb.save_gguf(model, tmp_path / "model.gguf", lb.load_tokenizer(tiny_llama))


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}),
        ("llama", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}}),
        ("mistral", {"sliding_window": 8}),
        ("qwen2", {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 1}),
        ("granite", {"attention_multiplier": 0.5, "residual_multiplier": 0.7, "logits_scaling": 3.0}),
        ("gemma2", {"sliding_window": 8, "head_dim": 16, "attn_logit_softcapping": 5.0}),
        ("stablelm", {"partial_rotary_factor": 0.5}),
    ],
)
def test_models_beyond_the_decoder_write_what_transformers_writes(kind, changes, tmp_path, caplog):
    """Positions, windows and factors that the compiled decoder does not know are handed over, packed and loaded too."""
    from transformers import AutoConfig

    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 256}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **(sizes | changes))).eval()
    for parameter in model.parameters():
        parameter.data *= 6 if parameter.ndim == 2 else 1
    lb.quantize_(model, lb.Config(bits=BITS), progress=False)
    path = lb.save(model, tmp_path / "out")
    with pytest.raises(NotDecodableError):
        map_model(path)
    loaded, prompt = lb.load(path), torch.arange(3, 23)[None]
    settings = {"max_new_tokens": 16, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    expected = model.generate(prompt, attention_mask=torch.ones_like(prompt), **settings)
    loaded.generation_config.eos_token_id = None
    assert_same(generate.generate_tokens(loaded, prompt, GenerationConfig(16), 0), expected[:, 20:])
    assert "transformers generates for this model" in caplog.text
    assert generation_defaults(loaded).config == replace(GREEDY, stop_tokens=())
