"""The compiled decoder against transformers, sampling, streaming, and quantized embeddings."""

import copy
import json
import logging
import subprocess
import sys

import littlebit.fast as lb
import numpy as np
import pytest
import torch
from compare import assert_same, assert_within
from conftest import make_tiny_llama
from hypothesis import given, strategies as st
from littlebit.conformance.strategies import NOISE
from littlebit.fast.decoding import generate
from littlebit.fast.decoding.architecture import STATIC_ROPE, NotDecodableError, inverse_frequencies, rotary_angles
from littlebit.fast.decoding.cpu_decoder import Decoder
from littlebit.fast.decoding.parity import PROMPTS, dense_twin, measure_parity
from littlebit.fast.decoding.sampling import sample
from littlebit.fast.decoding.torch_weights import decodable, through_transformers
from littlebit.fast.kernels import cpu, cpu_threads
from littlebit.fast.models.embeddings import (
    LARGEST_CODE,
    EmbeddingTable,
    QuantizedHead,
    damped,
    head_moments,
    quantize_embeddings_,
    quantize_table,
    random_tokens,
)
from littlebit.fast.models.generation_settings import GenerationConfig
from littlebit.fast.models.layers import PackedLinear
from littlebit.fast.models.quantize import packed_layers

BITS = 2.5
CHANGES = {
    "biases, grouped queries, tied": {},
    "plain": {"attention_bias": False, "num_key_value_heads": 4, "tie_word_embeddings": False},
    "more layers": {"num_hidden_layers": 3, "mlp_bias": True, "rope_theta": 100.0},
}


@pytest.fixture(scope="module", params=list(CHANGES))
def packed(request, tmp_path_factory):
    folder = make_tiny_llama(tmp_path_factory.mktemp("decode"), **CHANGES[request.param])
    model = lb.load_model(folder)
    lb.quantize_(model, lb.Config(bits=BITS, exclude=("*.0.mlp.up_proj",)), progress=False)
    return lb.pack_(model)


def exact_and_condition(model, tokens):
    """Logits after all tokens in float64, and how far the largest moves per unit of relative noise in the weights."""
    model = dense_twin(model, torch.float64)
    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode():
        exact = model(tokens[None]).logits[0, -1].numpy()
        moved = np.abs(exact).max()
        for _ in range(3):
            noisy = copy.deepcopy(model)
            for parameter in noisy.parameters():
                noise = torch.rand(parameter.shape, generator=generator, dtype=torch.float64) * 2 - 1
                parameter.data = parameter.data * (1 + NOISE * noise)
            moved = max(moved, np.abs(noisy(tokens[None]).logits[0, -1].numpy() - exact).max() / NOISE)
    return exact, np.full(exact.shape, moved)


@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize("length", [1, 7, 41])
def test_decoder_logits_equal_those_of_the_model(packed, bits, length):
    """A result entry sees the roundings of each layer's longest sums, 64 + 96 + the ranks and the positions."""
    model = copy.deepcopy(packed)
    quantize_embeddings_(model, bits)
    tokens = torch.randint(0, 256, (length,), generator=torch.Generator().manual_seed(length))
    exact, moved = exact_and_condition(model, tokens)
    terms = 64 + sum(layer.d_in + sum(layer.ranks) + length for layer in packed_layers(model).values())
    decoder = Decoder(decodable(model), 64)
    assert_within(decoder(tokens.numpy()), exact, moved, terms)
    with torch.inference_mode():
        assert_within(model(tokens[None]).logits[0, -1], exact, moved, terms)
    one_by_one = Decoder(decodable(model), 64)
    for token in tokens.numpy():
        logits = one_by_one(np.array([token]))
    assert_within(logits, exact, moved, terms)


def test_decoder_gives_the_same_on_any_number_of_threads(packed, monkeypatch):
    monkeypatch.setattr(cpu_threads, "PARALLEL_WORK", 0)
    tokens = np.arange(40) * 5 % 256
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        serial = Decoder(decodable(packed), 64)(tokens).copy()
        torch.set_num_threads(2)
        assert_same(Decoder(decodable(packed), 64)(tokens), serial)
    finally:
        torch.set_num_threads(before)


def test_generate_writes_what_transformers_writes(packed):
    prompts = [torch.randint(0, 256, (1, length), generator=torch.Generator().manual_seed(length)) for length in (1, 9)]
    for tokens in prompts:
        new = generate.generate_tokens(packed, tokens, GenerationConfig(40))
        expected = through_transformers(packed, tokens[0].tolist(), GenerationConfig(40), 258)
        assert new[0].tolist() == expected


def test_decoder_refuses_what_it_cannot_hold(packed):
    decoder = Decoder(decodable(packed), 4)
    with pytest.raises(ValueError, match="holds 4 tokens"):
        decoder(np.arange(5))
    with pytest.raises(ValueError, match="from 0 to 259"):
        decoder(np.array([260]))


@given(st.data())
def test_sample_draws_from_the_likeliest(data):
    size = data.draw(st.integers(2, 30))
    logits = np.array(data.draw(st.permutations(range(size))), np.float32) / 3
    config = GenerationConfig(
        temperature=data.draw(st.floats(0.2, 2.0)),
        top_k=data.draw(st.none() | st.integers(1, size)),
        top_p=data.draw(st.none() | st.floats(0.05, 1.0)),
    )
    order = np.argsort(-logits)[: config.top_k]
    chances = np.exp(logits[order].astype(np.float64) / config.temperature)
    chances /= chances.sum()
    allowed = order
    if config.top_p is not None:
        before = np.cumsum(chances) - chances
        allowed = order[: max(1, int((before < config.top_p + 1e-5).sum()))]
    generator = np.random.default_rng(data.draw(st.integers(0, 100)))
    for _ in range(10):
        assert sample(logits, config, generator) in allowed


@pytest.mark.parametrize(("top_p", "allowed"), [(0.5, 2), (0.25, 1), (0.75, 3), (0.76, 4), (0.24, 1), (1.0, 4)])
def test_sample_stops_where_the_likelier_tokens_hold_the_probability(top_p, allowed):
    """Four chances of exactly a quarter: a token is left out once the likelier ones hold top_p, and not only more."""
    generator, config = np.random.default_rng(0), GenerationConfig(temperature=1.0, top_p=top_p)
    drawn = {sample(np.zeros(4, np.float32), config, generator) for _ in range(200)}
    assert drawn == set(range(allowed))


def test_sample_has_the_frequencies_of_the_softmax():
    """Each count of 4000 draws lies within five standard deviations of its mean."""
    logits, generator = np.array([0.0, 1.0, 2.0, -1.0], np.float32), np.random.default_rng(0)
    config = GenerationConfig(temperature=0.7)
    counts = np.bincount([sample(logits, config, generator) for _ in range(4000)], minlength=4)
    chances = np.exp(logits / 0.7) / np.exp(logits / 0.7).sum()
    assert (np.abs(counts - 4000 * chances) < 5 * np.sqrt(4000 * chances * (1 - chances))).all()


def test_stream_yields_the_text_of_generate_in_chunks(tiny_llama):
    model, tokenizer = lb.load_model(tiny_llama), lb.load_tokenizer(tiny_llama)
    for seed in range(3):
        settings = {"max_new_tokens": 50, "temperature": 1.5, "seed": seed, "tokenizer": tokenizer}
        chunks = list(generate.stream(model, "abc", **settings))
        assert len(chunks) > 1
        tokens = tokenizer("abc", return_tensors="pt")["input_ids"]
        new = generate.generate_tokens(model, tokens, GenerationConfig(50, 1.5, seed=seed))
        assert "".join(chunks) == lb.generate(model, "abc", **settings)
        assert "".join(chunks) == tokenizer.decode(new[0], skip_special_tokens=True)


def test_text_chunks_hold_whole_characters(tiny_llama):
    tokenizer = lb.load_tokenizer(tiny_llama)
    tokens = tokenizer("a é 漢 🎈!")["input_ids"]
    assert list(generate.text_chunks(tokenizer, iter(tokens))) == list("a é 漢 🎈!")


def test_generate_stops_at_the_last_token(packed):
    tokens = torch.tensor([[5, 6, 7]])
    full = generate.generate_tokens(packed, tokens, GenerationConfig(30))[0].tolist()
    model = copy.deepcopy(packed)
    model.generation_config.eos_token_id = [full[11]]
    assert generate.generate_tokens(model, tokens, GenerationConfig(30))[0].tolist() == full[: full.index(full[11]) + 1]


def test_generate_falls_back_to_transformers_and_says_so(tiny_llama, tmp_path, caplog):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=260, n_positions=64, n_embd=32, n_layer=1, n_head=2)).eval()
    tokenizer = lb.load_tokenizer(tiny_llama)
    with caplog.at_level(logging.WARNING):
        assert isinstance(lb.generate(model, "abc", 5, tokenizer=tokenizer), str)
    assert "model type 'gpt2'" in caplog.text
    caplog.clear()
    model = lb.load_model(tiny_llama)
    model.generation_config.no_repeat_ngram_size = 2
    with caplog.at_level(logging.WARNING):
        lb.generate(model, "abc", 5, tokenizer=tokenizer)
    assert "no_repeat_ngram_size" in caplog.text


ROPES = {
    "default": {},
    "linear": {"factor": 4.0},
    "llama3": {
        **{"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
        "original_max_position_embeddings": 128,
    },
}


@pytest.mark.parametrize("kind", STATIC_ROPE)
@pytest.mark.parametrize(("size", "theta"), [(32, 1e4), (64, 1e5), (128, 5e5), (48, 100.0)])
def test_rotary_angles_equal_transformers(kind, size, theta):
    """A power is at most an ulp off, and each of at most eight operations after it rounds once."""
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    rope = {"rope_type": kind, "rope_theta": theta} | ROPES[kind]
    config = LlamaConfig(hidden_size=2 * size, num_attention_heads=2, head_dim=size, rope_parameters=dict(rope))
    module = LlamaRotaryEmbedding(config)
    frequencies = inverse_frequencies(rope, size)
    expected = module.inv_freq.double().numpy()
    assert_within(frequencies, expected, expected, terms=8)
    cosines, sines = module(torch.zeros(1), torch.arange(300)[None])
    moved = 1 + np.arange(300)[:, None] * expected  # an angle's error is its relative one times itself
    for mine, theirs in zip(rotary_angles(rope, size, 300), (cosines, sines), strict=True):
        assert_within(mine, theirs[0, :, : size // 2].double().numpy(), moved, terms=8)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda model: setattr(model.config, "hidden_act", "gelu"), "gelu"),
        (lambda model: model.config.rope_parameters.update(rope_type="dynamic"), "dynamic"),
        (lambda model: setattr(model.model.layers[0].mlp, "up_proj", torch.nn.Identity()), "Identity"),
        (lambda model: setattr(model.config, "head_dim", 24), "sixteen"),
    ],
)
def test_decodable_names_what_the_decoder_does_not_support(packed, change, reason):
    model = copy.deepcopy(packed)
    assert decodable(model).sizes.layers == len(model.model.layers)
    change(model)
    with pytest.raises(NotDecodableError, match=reason):
        decodable(model)


def test_a_second_start_compiles_nothing(tiny_llama):
    """Numba's cache serves every function of a greedy generation in a fresh process."""
    code = f"""
import littlebit.fast as lb
from littlebit.fast.kernels import cpu_decode, cpu_threads
import numpy as np, torch
from littlebit.fast.decoding.cpu_decoder import Decoder
from littlebit.fast.decoding.torch_weights import decodable
model = lb.load_model({str(tiny_llama)!r})
Decoder(decodable(model), 8)(np.arange(3))
lb.packed_linear(torch.zeros(1, 32), [lb.pack_factors(lb.Factors(*map(torch.ones, ((8, 4), (32, 4), 8, 4, 32))))])
missed = [sum(f.stats.cache_misses.values()) for f in (cpu_decode.step, cpu_threads.divided_layer)]
assert missed == [0, 0], missed
"""
    for last in (False, True):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert done.returncode == 0 or not last, done.stderr


def test_compiled_code_of_other_sources_is_dropped(tmp_path, monkeypatch):
    from types import SimpleNamespace

    from littlebit.fast import kernels

    (tmp_path / "old.nbi").write_text("")
    monkeypatch.setattr(kernels.cpu, "layer_rows", SimpleNamespace(stats=SimpleNamespace(cache_path=str(tmp_path))))
    kernels.drop_stale_code()
    assert not (tmp_path / "old.nbi").exists()
    (tmp_path / "new.nbi").write_text("")
    kernels.drop_stale_code()
    assert (tmp_path / "new.nbi").exists()


@given(st.integers(0, 2**32 - 1), st.sampled_from([8, 4]), st.sampled_from([32, 64, 96, 192]))
def test_quantize_table_rounds_to_the_nearest(seed, bits, size):
    """Each entry lies within half a step of its own, or where 4 bits' best scale cuts off, has an outermost code."""
    rng = np.random.default_rng(seed)
    weight = torch.from_numpy(rng.standard_normal((5, size)).astype(np.float32) * 10 ** rng.uniform(-3, 3))
    weight[2] = 0
    table = quantize_table(weight, bits)
    rows = table.rows(slice(None))
    assert table.size == size
    scale = table.scale.float().repeat_interleave(table.group, 1)
    assert_same(rows[2], weight[2])
    inside = rows.abs() < 127 * scale
    if bits == 4:
        offset = table.offset.float().repeat_interleave(table.group, 1)
        inside = (rows > offset) & (rows < offset + LARGEST_CODE * scale)
    error = (rows - weight).abs()
    assert (error[inside] <= 0.5 * scale[inside] * (1 + 1e-5)).all()
    relative = error.square().sum() / weight.square().sum()
    assert relative < (1e-4 if bits == 8 else 1e-2)
    assert_same(table.rows(torch.tensor([[3, 1]])), rows[torch.tensor([[3, 1]])])


def test_quantize_table_keeps_what_lies_on_the_grid():
    codes = torch.arange(-127, 129).clamp(max=127).reshape(2, 128)
    codes[:, ::64] = -127
    assert_same(quantize_table(codes * 0.5, 8).codes, codes.to(torch.int8))
    grid = torch.arange(-8, 8).repeat(2, 2).float()
    assert_same(quantize_table(grid * 0.25, 4).rows(slice(None)), grid * 0.25)


def test_quantize_table_refuses_odd_sizes_and_bits():
    with pytest.raises(ValueError, match="multiple of 32"):
        quantize_table(torch.zeros(4, 40), 8)
    with pytest.raises(ValueError, match="16, 8 or 4 bits"):
        quantize_table(torch.zeros(4, 64), 3)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("tied", [True, False])
def test_quantized_embeddings_survive_saving(bits, tied, tmp_path):
    model = lb.load_model(make_tiny_llama(tmp_path / "model", tie_word_embeddings=tied))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    lb.quantize_(model, lb.Config(bits=BITS), progress=False)
    quantize_embeddings_(model, bits)
    loaded = lb.load(lb.save(model, tmp_path / "out"))
    tables = [loaded.get_input_embeddings().table, loaded.get_output_embeddings().table]
    assert (tables[0] is tables[1]) == tied
    assert_same(tables[1].codes, model.get_output_embeddings().table.codes)
    tokens = torch.arange(20)[None]
    with torch.inference_mode():
        first = loaded(tokens).logits
        assert_same(lb.load(tmp_path / "out")(tokens).logits, first)
    stored = lb.info(tmp_path / "out")
    assert stored["embedding_bits"] == bits
    assert round(8 * stored["file_bytes"] / stored["file_bits_per_parameter"]) == parameters
    rows = 260 * (64 * bits // 8 + (2 if bits == 8 else 4) * tables[0].scale.shape[1])
    norms = sum(p.numel() for p in loaded.parameters()) + 2 * 2 * (64 + 32 + 32 + 64) // 2
    assert rows * (1 if tied else 2) <= stored["other_bytes"] <= rows * (1 if tied else 2) + 2 * norms
    assert isinstance(lb.generate(loaded, "abc", 4, tokenizer=lb.load_tokenizer(tmp_path / "model")), str)


@pytest.mark.parametrize("section", [{"bits": 5, "group": 32}, {"bits": 8, "group": 48}, "eight"])
def test_load_refuses_a_section_that_describes_no_embedding(section, tiny_llama, tmp_path):
    model = lb.load_model(tiny_llama)
    lb.quantize_(model, lb.Config(bits=BITS), progress=False)
    quantize_embeddings_(model, 8)
    path = lb.save(model, tmp_path / "out")
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"]["embeddings"] = section
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(lb.CheckpointError, match="'embeddings' must have"):
        lb.load(path, verify=False)


def test_quantized_head_is_its_table_times_x():
    table = quantize_table(torch.randn(5000, 64, generator=torch.Generator().manual_seed(0)), 4)
    assert isinstance(table, EmbeddingTable)
    x = torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(1))
    exact = x.double() @ table.rows(slice(None)).double().T
    magnitude = x.double().abs() @ table.rows(slice(None)).double().abs().T
    assert_within(QuantizedHead(table)(x), exact, magnitude, terms=64)


def output_error(table, weight, moments):
    """tr(D M D^T) for the error D of a table."""
    error = (table.rows(slice(None)) - weight).double()
    return float((error @ moments.double() * error).sum())


@given(st.integers(0, 2**32 - 1), st.sampled_from([32, 96]), st.floats(0, 6))
def test_quantize_table_with_moments_has_the_smaller_error_where_it_counts(seed, size, mean):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(300, size, generator=generator)
    x = torch.randn(500, size, generator=generator) @ torch.randn(size, size, generator=generator) + mean
    moments = x.T @ x / len(x)
    error = output_error(quantize_table(weight, 4, moments), weight, moments)
    assert error < (0.5 if mean > 4 and size > 32 else 0.8) * output_error(quantize_table(weight, 4), weight, moments)
    white = quantize_table(weight, 4, torch.eye(size))
    assert_same(white.codes, quantize_table(weight, 4).codes)


@given(st.integers(0, 2**32 - 1))
def test_refitted_scales_are_those_of_least_squares(seed):
    """No scale or offset that is 1 % larger or smaller has a smaller error: they are the best but for float16."""
    generator = torch.Generator().manual_seed(seed)
    weight, x = torch.randn(6, 64, generator=generator), torch.randn(200, 64, generator=generator) + 1
    moments = damped(x.T @ x / len(x))
    table = quantize_table(weight, 4, x.T @ x / len(x))
    best = output_error(table, weight, moments)
    for numbers in table.scale, table.offset:
        for group in range(2):
            for factor in (0.99, 1.01):
                before = numbers.clone()
                numbers[:, group] *= factor
                assert output_error(table, weight, moments) > best
                numbers.copy_(before)


def test_quantize_table_with_moments_takes_rows_of_equal_entries():
    """A group of equal codes has no scale of its own: it is still kept as it is."""
    weight = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    weight[1], weight[2, :32] = 0, 0.25
    moments = torch.eye(64) + 1
    rows = quantize_table(weight, 4, moments).rows(slice(None))
    assert_same(rows[1], weight[1])
    assert (rows - weight).abs().max() < 0.25


def test_head_moments_are_those_of_the_heads_input(tiny_llama):
    model = lb.load_model(tiny_llama)
    tokens = torch.randint(0, 256, (600,), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        x = torch.cat([model.model(part[None]).last_hidden_state[0] for part in tokens.split(256)]).double()
    assert_within(head_moments(model, tokens), x.T @ x / 600, x.T.abs() @ x.abs() / 600, terms=600)
    plain, measured = copy.deepcopy(model), copy.deepcopy(model)
    quantize_embeddings_(plain, 4)
    quantize_embeddings_(measured, 4, tokens)
    table = measured.get_output_embeddings().table
    assert not torch.equal(plain.get_output_embeddings().table.codes, table.codes)
    unlike = random_tokens(260)
    assert unlike.unique().tolist() == list(range(260))
    moments = (head_moments(model, tokens) + head_moments(model, unlike)) / 2
    for mine, wanted in zip(table.buffers(), quantize_table(model.lm_head.weight, 4, moments).buffers(), strict=True):
        assert_same(mine, wanted)


def test_greedy_texts_are_those_of_transformers(tiny_llama):
    """Ten prompts, 256 tokens each, and every logit of both within the bound of the arithmetic."""
    model = lb.load_model(tiny_llama)
    lb.quantize_(model, lb.Config(bits=BITS), progress=False)
    model.config.max_position_embeddings = 512
    rows = measure_parity(lb.pack_(model), lb.load_tokenizer(tiny_llama), PROMPTS, 256, progress=False)
    assert [row["prompt"] for row in rows] == list(PROMPTS)
    for row in rows:
        assert row["same"] == 256
        assert 0 < row["error"] < row["gap"]
        assert row["bound_share"] < 1


def test_agreement_finds_where_texts_part(tiny_llama, monkeypatch):
    from littlebit.fast.decoding import parity as module

    model, tokenizer = lb.load_model(tiny_llama), lb.load_tokenizer(tiny_llama)
    lb.quantize_(model, lb.Config(bits=BITS), progress=False)
    right = module.decoder_greedy

    def wrong(*arguments):
        tokens, logits = right(*arguments)
        logits[5] = logits[5] + 1e9 * (np.arange(len(logits[5])) == 7)
        return [*tokens[:5], 7, *tokens[6:]], logits

    monkeypatch.setattr(module, "decoder_greedy", wrong)
    (row,) = measure_parity(lb.pack_(model), tokenizer, PROMPTS[:1], 9, progress=False)
    assert row["same"] == 5
    assert row["bound_share"] > 1


def test_packed_layers_are_what_the_decoder_reads(packed):
    assert any(isinstance(module, PackedLinear) for module in packed.modules())
    assert cpu.KERNELS["nibbles"] == cpu.NIBBLES
