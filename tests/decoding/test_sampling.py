"""The choice of the next token: NumPy and torch against transformers' own processors, and every decoder alike."""

import warnings

import littlebit.fast as lb
import numpy as np
import pytest
import torch
from compare import assert_same, assert_within
from hypothesis import given, strategies as st
from littlebit.fast.decoding import generate, graph_decoder
from littlebit.fast.decoding.cpu_decoder import decode
from littlebit.fast.decoding.engines import fused_engine
from littlebit.fast.decoding.graph_decoder import DecodeLoop, decode_batch, sample
from littlebit.fast.decoding.mapped_weights import map_model
from littlebit.fast.decoding.sampling import candidates, choose_token, penalize_repetition
from littlebit.fast.decoding.static_cache import StaticEngine
from littlebit.fast.decoding.torch_weights import decodable, through_transformers
from littlebit.fast.models.generation_settings import GenerationConfig
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

VOCABULARY = 200
PENALTIES = st.floats(0.001, 1000)


def random_logits(seed, rows=1):
    return torch.randn(rows, VOCABULARY, generator=torch.Generator().manual_seed(seed)) * 4


@st.composite
def sampling_configs(draw):
    return GenerationConfig(
        temperature=draw(st.floats(0.3, 2.0)),
        top_k=draw(st.none() | st.integers(1, VOCABULARY)),
        top_p=draw(st.none() | st.floats(0.05, 1.0)),
        min_p=draw(st.none() | st.floats(0.0, 1.0)),
    )


def probabilities_of_transformers(logits, config):
    """The distribution (vocabulary,) that transformers would sample from, in float64."""
    steps = LogitsProcessorList([TemperatureLogitsWarper(config.temperature)])
    steps += [TopKLogitsWarper(config.top_k)] if config.top_k else []
    steps += [TopPLogitsWarper(config.top_p)] if config.top_p is not None else []
    steps += [MinPLogitsWarper(config.min_p)] if config.min_p is not None else []
    return steps(None, logits.double()).softmax(-1)[0].numpy()


@given(st.integers(0, 2**32 - 1), PENALTIES, st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=30))
def test_penalize_repetition_equals_transformers(seed, penalty, tokens):
    logits, seen = random_logits(seed), torch.zeros(1, VOCABULARY, dtype=torch.bool)
    seen[0, tokens] = True
    expected = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([tokens]), logits.clone())
    assert_same(graph_decoder.penalize_repetition(logits, seen, penalty), expected)
    found = logits[0].numpy().copy()
    penalize_repetition(found, seen[0].numpy(), penalty)
    assert_same(found, expected[0])


@given(st.integers(0, 2**32 - 1), sampling_configs())
def test_candidates_have_the_probabilities_of_transformers(seed, config):
    """Terms: a difference, a division and an exponential, and two sums over the vocabulary."""
    logits = random_logits(seed)
    expected = probabilities_of_transformers(logits, config)
    tokens, probabilities = candidates(logits[0].numpy(), config)
    assert sorted(tokens) == np.flatnonzero(expected).tolist()
    size = 1 + np.abs(logits[0].double().numpy()).max() / config.temperature  # relative error of an exponential
    assert_within(probabilities, expected[tokens], expected[tokens] * size, terms=2 * VOCABULARY + 8)


@given(st.integers(0, 2**32 - 1), sampling_configs(), st.floats(0, 1, exclude_max=True, width=32))
def test_choose_inverts_the_distribution_of_transformers(seed, config, uniform):
    logits = random_logits(seed)
    expected = probabilities_of_transformers(logits, config)
    order = np.argsort(-logits[0].numpy())
    (token,) = sample(logits, config, torch.tensor([uniform])).tolist()
    upper = expected[order].cumsum()[order.tolist().index(token)]
    slack = 1e-12  # two ways to round the same sums
    assert expected[token] > 0
    assert upper - expected[token] - slack <= uniform <= upper + slack


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_choose_token_counts_its_own_choice_as_seen(temperature):
    config = GenerationConfig(temperature=temperature, min_p=1.0, repetition_penalty=1000.0)
    seen, generator = np.zeros(5, bool), np.random.default_rng(0)
    chosen = [choose_token(np.array([1, 3, 5, 4, 2], np.float32), config, seen, generator) for _ in range(5)]
    assert chosen == [2, 3, 1, 4, 0]
    assert seen.all()


@pytest.fixture(scope="module")
def model(loud_llama):
    model = lb.load_model(loud_llama)
    lb.quantize_(model, lb.Config(bits=3.0), progress=False)
    return lb.pack_(model)


PROMPTS = ([5, 6, 7], [8, 9, 8, 9, 8], [100])


def by_transformers(model, tokens, **settings):
    ids = torch.tensor([tokens])
    settings = {"max_new_tokens": 40, "do_sample": False, "pad_token_id": 258} | settings
    return model.generate(ids, attention_mask=torch.ones_like(ids), **settings)[0, len(tokens) :].tolist()


def columns(steps):
    return [[token for token in column if token is not None] for column in zip(*steps, strict=True)]


@pytest.mark.parametrize("make", [StaticEngine, fused_engine], ids=lambda make: make.__name__)
def test_every_decoder_penalizes_repetitions_as_transformers_does(model, make, monkeypatch):
    """Each prompt of a batch as if it were alone, through larger caches."""
    monkeypatch.setattr(graph_decoder, "SMALLEST_CAPACITY", 8)
    monkeypatch.setattr(graph_decoder, "choose_engine", lambda model, batch, capacity, _: make(model, batch, capacity))
    config = GenerationConfig(40, repetition_penalty=1.3)
    expected = [by_transformers(model, tokens, repetition_penalty=1.3) for tokens in PROMPTS]
    assert expected != [by_transformers(model, tokens) for tokens in PROMPTS]
    assert columns(decode_batch(model, PROMPTS, config)) == expected
    for tokens, wanted in zip(PROMPTS, expected, strict=True):
        assert list(decode(decodable(model), tokens, config)) == wanted
        assert through_transformers(model, tokens, config, 258) == wanted


def test_a_latent_cache_penalizes_repetitions_as_transformers_does(model):
    config = GenerationConfig(20, repetition_penalty=1.3, kv_cache="latent")
    cache = lb.cache_argument(lb.latent_cache(model))
    expected = by_transformers(model, PROMPTS[1], max_new_tokens=20, repetition_penalty=1.3, **cache)
    assert list(generate.stream_tokens(model, PROMPTS[1], config, 258)) == expected


def test_a_min_p_of_one_is_greedy_decoding_in_every_decoder(model):
    config = GenerationConfig(20, temperature=1.5, min_p=1.0)
    for tokens in PROMPTS:
        greedy = by_transformers(model, tokens, max_new_tokens=20)
        assert list(decode(decodable(model), tokens, config)) == greedy
        assert through_transformers(model, tokens, config, 258) == greedy
        assert columns(decode_batch(model, [tokens], config)) == [greedy]


def test_the_settings_of_a_checkpoint_reach_every_decoder(model, tmp_path, caplog):
    import copy

    model = copy.deepcopy(model)
    model.generation_config.repetition_penalty, model.generation_config.min_p = 1.3, 0.05
    path = lb.save(model, tmp_path / "out")
    loaded, mapped, tokens = lb.load(path), map_model(path), PROMPTS[0]
    expected = by_transformers(loaded, tokens)
    for each in (loaded, mapped):
        assert list(generate.stream_tokens(each, tokens, GenerationConfig(40))) == expected
    assert columns(decode_batch(loaded, [tokens], GenerationConfig(40))) == [expected]
    for each in (loaded, mapped):
        plain = list(generate.stream_tokens(each, tokens, GenerationConfig(40, repetition_penalty=1.0)))
        assert plain == by_transformers(model, tokens, repetition_penalty=1.0)
    sampled = GenerationConfig(40, temperature=1.5, seed=4)
    assert list(generate.stream_tokens(mapped, tokens, sampled)) == list(
        generate.stream_tokens(decodable(model), tokens, GenerationConfig(40, 1.5, None, None, 0.05, 1.3, seed=4))
    )
    assert "transformers generates" not in caplog.text


def test_stop_tokens_of_the_config_win_over_the_checkpoints(model):
    full = list(generate.stream_tokens(model, PROMPTS[0], GenerationConfig(12, stop_tokens=())))
    assert len(full) == 12
    config = GenerationConfig(12, stop_tokens=(full[5],))
    expected = full[: full.index(full[5]) + 1]
    assert list(generate.stream_tokens(model, PROMPTS[0], config)) == expected
    assert through_transformers(model, PROMPTS[0], config, 258) == expected
    assert columns(decode_batch(model, [PROMPTS[0]], config)) == [expected]


def test_a_graph_can_capture_the_choice(model):
    """Fake tensors refuse to tell a value, which a captured step must not need either."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    config = GenerationConfig(64, 1.0, 5, 0.9, 0.1, 1.2)
    loop = DecodeLoop(StaticEngine(model, 2, 16), config)
    loop.mark_seen([[1, 2], [3]], (2, VOCABULARY))
    mode = FakeTensorMode()
    for name in ("tokens", "uniform", "seen"):
        setattr(loop, name, mode.from_tensor(getattr(loop, name)))
    with mode, torch.inference_mode():
        loop.choose_next(mode.from_tensor(random_logits(0, 2)))


def test_generate_takes_a_config_and_keywords_that_win(model, tiny_llama):
    tokenizer = lb.load_tokenizer(tiny_llama)
    config = lb.GenerationConfig(9, 1.2, 30, 0.95, 0.01, 1.1, seed=5)
    settings = {"temperature": 1.2, "top_k": 30, "top_p": 0.95, "min_p": 0.01, "repetition_penalty": 1.1, "seed": 5}
    expected = lb.generate(model, "abc", 9, tokenizer=tokenizer, **settings)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert lb.generate(model, "abc", config=config, tokenizer=tokenizer) == expected
        assert "".join(generate.stream(model, "abc", config=config, tokenizer=tokenizer)) == expected
        assert lb.generate(model, ["abc"], config=config, tokenizer=tokenizer) == [expected]
        greedy = lb.generate(model, "abc", config=config, temperature=0, tokenizer=tokenizer)
    assert greedy == lb.generate(model, "abc", 9, repetition_penalty=1.1, tokenizer=tokenizer)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be a whole number >= 1, got 0"),
        ({"temperature": -1}, "temperature must be a finite number >= 0, got -1"),
        ({"top_k": 1.5}, "top_k must be a whole number >= 0, got 1.5"),
        ({"top_p": 0}, "top_p must be a finite number > 0 and <= 1, got 0"),
        ({"min_p": 1.5}, "min_p must be a finite number >= 0 and <= 1, got 1.5"),
        ({"repetition_penalty": 0}, "repetition_penalty must be a finite number >= 0.001 and <= 1000, got 0"),
        ({"seed": -1}, "seed must be a whole number >= 0 and < "),
        ({"seed": None}, "seed must be a whole number"),
        ({"stop_tokens": 5}, "stop_tokens must be a tuple of token numbers, got 5"),
        ({"stop_tokens": ["a"]}, "stop_tokens must be a tuple of token numbers"),
        ({"kv_cache": "int8"}, "kv_cache must be one of full, latent, latent-int8, not 'int8'"),
    ],
)
def test_generation_config_refuses_values_out_of_range(settings, message):
    with pytest.raises(ValueError, match="^" + message) as error:
        GenerationConfig(**settings)
    assert "\n" not in str(error.value)
