"""The latent key-value cache: its parts against float64, and whole models against the full cache."""

import copy
import json

import littlebit.fast as lb
import littlebit.reference as ref
import numpy as np
import pytest
import torch
from compare import assert_same, assert_within
from conftest import make_tiny_llama
from hypothesis import given, strategies as st
from littlebit.conformance import exact
from littlebit.conformance.examples import torch_fast
from littlebit.conformance.laws.latent_cache import attentions
from littlebit.fast import kv_cache
from littlebit.fast.bench.cache import bench_cache, crossover
from littlebit.fast.cli.main import main
from littlebit.fast.decoding import generate, torch_weights
from littlebit.fast.decoding.latent_cache import LATENT_TYPES
from littlebit.fast.decoding.latent_cache_hf import GROWTH
from littlebit.fast.memory import KV_CACHES
from littlebit.fast.models.hf_names import CACHE_NAMES
from littlebit.fast.models.quantize import packed_layers
from littlebit.reference.memory import LATENT_BYTES
from test_decode import exact_and_condition

DTYPES = {"float32": torch.float32, "float16": torch.float16, "int8": torch.int8}


@given(attentions(), st.sampled_from(list(DTYPES)), st.sampled_from([1, 3]))
def test_latent_attention_is_the_same_in_blocks_and_batches(case, dtype, block):
    """Blocks of tokens and a batch axis stay within the bound of test_laws.py's law."""
    wanted, bound = exact.attention(case, dtype)
    paths = [
        [torch_fast.PackedFactors(*map(tensor, path)) for path in each] for each in (case.key_paths, case.value_paths)
    ]
    x, query, mask, *turn = map(tensor, (case.x, case.query, case.mask, *case.turn))
    bias = [None if each is None else tensor(each) for each in case.biases]
    kept = [lb.round_latents(lb.latents(x, each), DTYPES[dtype]) for each in paths]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kv_cache, "BLOCK", block)
        batched = lb.latent_attention(
            query.expand(2, *query.shape),
            *(lb.Latents(*(part.expand(2, *part.shape) for part in each)) for each in kept),
            *paths,
            *(each.expand(2, *each.shape) for each in (*turn, mask)),
            *bias,
        )
    for each in batched:
        assert_within(each, wanted, bound / np.finfo(np.float32).eps, terms=1, factor=1)


def tensor(array):
    return torch_fast.to_backend(array, "cpu")


def test_round_latents_uses_all_of_int8():
    codes = lb.round_latents(torch.tensor([[1.0, -3.0], [0.0, 0.0]]), torch.int8)
    assert_same(codes.codes, np.array([[42, -127], [0, 0]], np.int8))
    assert_same(codes.scale[1], np.ones(1, np.float32))


CHANGES = {
    "biases, grouped queries, two paths": ({}, 2),
    "plain, one path": ({"attention_bias": False, "num_key_value_heads": 4}, 1),
    "one key head, scaled positions": (
        {
            "num_key_value_heads": 1,
            "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 100.0},
        },
        2,
    ),
}


@pytest.fixture(scope="module", params=list(CHANGES))
def packed(request, tmp_path_factory):
    changes, paths = CHANGES[request.param]
    model = lb.load_model(make_tiny_llama(tmp_path_factory.mktemp("latent"), **changes))
    lb.quantize_(model, lb.Config(bits=2.5, paths=paths), progress=False)
    return lb.pack_(model)


@pytest.fixture(scope="module")
def one_packed(tiny_llama):
    model = lb.load_model(tiny_llama)
    lb.quantize_(model, lb.Config(bits=2.5), progress=False)
    return lb.pack_(model)


def some_tokens(rows, length, seed=0):
    return torch.randint(0, 256, (rows, length), generator=torch.Generator().manual_seed(seed))


def projections(model):
    return [layer for name, layer in packed_layers(model).items() if name.endswith(("k_proj", "v_proj"))]


def assert_last_logits(logits, model, tokens):
    """(rows, vocabulary) logits after all tokens equal the model's in float64, up to rounding."""
    terms = 64 + sum(layer.d_in + sum(layer.ranks) + tokens.shape[1] for layer in packed_layers(model).values())
    for row, found in zip(tokens, logits, strict=True):
        exact, moved = exact_and_condition(model, row)
        assert_within(found, exact, moved, terms)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("steps", [(17,), (9, 1, 1, 6), (1,) * 17])
def test_latent_cache_gives_the_logits_of_the_model(packed, steps, attention):
    """At once, in parts, or token by token; the bound is that of the compiled decoder's test."""
    model = copy.deepcopy(packed)
    model.set_attn_implementation(attention)
    tokens, cache = some_tokens(2, 17), lb.latent_cache(model, torch.float32)
    with torch.inference_mode():
        for part in tokens.split(list(steps), 1):
            logits = model(part, **lb.cache_argument(cache)).logits[:, -1]
    assert_last_logits(logits, packed, tokens)
    assert cache.get_seq_length() == 17


def test_generate_writes_the_same_from_latents(packed):
    """Greedily and by beams, for a batch padded on the left, and for each of its rows alone."""
    tokens, mask = some_tokens(3, 11), torch.ones(3, 11, dtype=torch.int64)
    mask[0, :5] = mask[2, :1] = 0
    settings = {"max_new_tokens": 30, "do_sample": False, "pad_token_id": 258, "eos_token_id": None}
    for beams in (1, 3):
        settings["num_beams"] = beams
        expected = packed.generate(tokens, attention_mask=mask, **settings)
        cache = lb.latent_cache(packed, torch.float32)
        assert_same(packed.generate(tokens, attention_mask=mask, **lb.cache_argument(cache), **settings), expected)
        assert cache.get_seq_length() == 40
        assert cache.positions.filled().shape == (3 * beams, 40)
        alone = packed.generate(tokens[:1, 5:], **lb.cache_argument(lb.latent_cache(packed, torch.float32)), **settings)
        assert_same(alone[0, 6:], expected[0, 11:])


def test_generation_continues_from_a_cropped_cache(one_packed):
    tokens, cache = some_tokens(2, 20), lb.latent_cache(one_packed, torch.float32)
    with torch.inference_mode():
        whole = one_packed(tokens, **lb.cache_argument(cache)).logits
        cache.crop(-6)
        assert cache.get_seq_length() == 14
        again = one_packed(tokens[:, 14:], **lb.cache_argument(cache)).logits
        assert_last_logits(again[:, -1], one_packed, tokens)
        cache.batch_select_indices(torch.tensor([1]))
        cache.crop(-1)
        again = one_packed(tokens[1:, 19:], **lb.cache_argument(cache)).logits
        assert_last_logits(again[:, -1], one_packed, tokens[1:])
        cache.reset()
        assert cache.nbytes == cache.get_seq_length() == 0
        assert_same(one_packed(tokens, **lb.cache_argument(cache)).logits, whole)
    with pytest.raises(ValueError, match="negative number"):
        cache.crop(3)


@pytest.mark.parametrize("dtype", list(DTYPES))
def test_latent_cache_holds_what_it_says(one_packed, dtype):
    cache = lb.latent_cache(one_packed, DTYPES[dtype])
    length = GROWTH // 4 - 3
    for part in some_tokens(2, length).split(100, 1):
        with torch.inference_mode():
            one_packed(part, **lb.cache_argument(cache))
    widths = [sum(layer.ranks) for layer in projections(one_packed)]
    width = {"float32": 4, "float16": 2, "int8": 1}[dtype]
    assert cache.nbytes == ref.kv_cache_bytes(2 * length, widths, width, 4) + 4 * 2 * length
    codes = cache.layers[1].tensors[0]
    assert codes.filled().shape == (2, length, widths[2])
    assert codes.buffer.dtype == DTYPES[dtype]
    assert codes.buffer.shape[1] == GROWTH


def test_latent_cache_grows_beyond_its_room(one_packed, monkeypatch):
    monkeypatch.setattr("littlebit.fast.decoding.latent_cache_hf.GROWTH", 4)
    test_latent_cache_gives_the_logits_of_the_model(one_packed, (3, 1, 1, 1, 11), "sdpa")


def test_other_caches_are_as_before(one_packed):
    tokens = some_tokens(1, 9)
    with torch.inference_mode():
        before = one_packed(tokens).logits
        lb.latent_cache(one_packed)
        wrapped = one_packed.model.layers[0].self_attn.forward
        lb.latent_cache(one_packed)
        assert one_packed.model.layers[0].self_attn.forward is wrapped
        assert_same(one_packed(tokens).logits, before)
        clone = copy.deepcopy(one_packed)
        for layer in projections(clone):
            layer.paths[0].h *= -2
        changed = clone(tokens, **lb.cache_argument(lb.latent_cache(clone, torch.float32))).logits
        assert_last_logits(changed[:, -1], clone, tokens)
        with pytest.raises(AssertionError, match="entries are off"):
            assert_last_logits(changed[:, -1], one_packed, tokens)


@pytest.mark.parametrize("kind", ["Qwen2", "Mistral"])
def test_latent_cache_serves_other_models(kind):
    import transformers

    torch.manual_seed(0)
    sizes = {"vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": None, "pad_token_id": 0}
    model = getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**sizes)).eval()
    lb.quantize_(model, lb.Config(bits=2.5), progress=False)
    lb.pack_(model)
    tokens = some_tokens(1, 12)
    expected = generate.generate_tokens(model, tokens, lb.GenerationConfig(20))
    cache = lb.latent_cache(model, torch.float32)
    found = model.generate(tokens, **lb.cache_argument(cache), max_new_tokens=20, do_sample=False)
    assert_same(found[:, 12:], expected)


def test_generate_takes_the_type_of_cache(one_packed, tiny_llama, tmp_path, capsys, monkeypatch):
    made = []
    monkeypatch.setattr(torch_weights, "latent_cache", lambda *given: made.append(lb.latent_cache(*given)) or made[-1])
    tokenizer = lb.load_tokenizer(tiny_llama)
    settings = {"max_new_tokens": 12, "tokenizer": tokenizer}
    for kind, dtype in (("latent", torch.float16), ("latent-int8", torch.int8)):
        tokens = tokenizer("abc", return_tensors="pt")["input_ids"]
        cache = lb.latent_cache(one_packed, dtype)
        new = one_packed.generate(
            tokens, **lb.cache_argument(cache), max_new_tokens=12, do_sample=False, pad_token_id=258
        )
        expected = tokenizer.decode(new[0, tokens.shape[1] :], skip_special_tokens=True)
        assert lb.generate(one_packed, "abc", kv_cache=kind, **settings) == expected
        assert made[-1].layers[0].tensors[0].filled().dtype == dtype
    with pytest.raises(ValueError, match="full, latent, latent-int8, not 'int8'"):
        lb.generate(one_packed, "abc", kv_cache="int8", **settings)
    lb.save(copy.deepcopy(one_packed), tmp_path / "out", tokenizer)
    command = ["generate", str(tmp_path / "out"), "--prompt", "abc", "--max-new-tokens", "5", "--json"]
    assert main([*command, "--kv-cache", "latent-int8"]) == 0
    assert json.loads(capsys.readouterr().out)["tokens_per_s"] > 0


def small_llama(**changes):
    import transformers

    sizes = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(num_attention_heads=2, **(sizes | changes)))


def test_latent_cache_refuses_what_it_cannot_keep(one_packed):
    import transformers

    model = small_llama()
    with pytest.raises(ValueError, match=r"layer model\.layers\.0\.self_attn\.k_proj must be packed, but is a Linear"):
        lb.latent_cache(model)
    lb.quantize_(model, lb.Config(bits=4, include=("*.k_proj",)), progress=False)
    with pytest.raises(ValueError, match="k_proj must be packed, but is a LittleBitLinear"):
        lb.latent_cache(model)
    with pytest.raises(ValueError, match="v_proj must be packed, but is a Linear"):
        lb.latent_cache(lb.pack_(model))
    with pytest.raises(ValueError, match="got gpt2"):
        lb.latent_cache(transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=8, n_layer=1, n_head=1)))
    with pytest.raises(ValueError, match="float32, float16 or int8"):
        lb.latent_cache(one_packed, torch.int16)
    windowed = copy.deepcopy(one_packed)
    windowed.config.use_sliding_window, windowed.config.sliding_window = True, 8
    with pytest.raises(ValueError, match="sliding window of 8 tokens"):
        lb.latent_cache(windowed)
    dynamic = copy.deepcopy(one_packed)
    dynamic.config.rope_parameters["rope_type"] = "dynamic"
    with pytest.raises(ValueError, match="'dynamic'"):
        lb.latent_cache(dynamic)
    spread = copy.deepcopy(one_packed)
    spread.model.layers[1].to("meta")
    with pytest.raises(ValueError, match="spread over cpu, meta"):
        lb.latent_cache(spread)


def test_latent_cache_refuses_tokens_that_do_not_fit_it(one_packed):
    cache, limit = lb.latent_cache(one_packed), one_packed.config.max_position_embeddings
    with torch.inference_mode():
        one_packed(some_tokens(1, limit), **lb.cache_argument(cache))
        with pytest.raises(ValueError, match=f"needs {limit + 1} positions, but the model has {limit}"):
            one_packed(some_tokens(1, 1), **lb.cache_argument(cache))
        cache.crop(-9)
        with pytest.raises(ValueError, match="must have the 1 sequences of the latent cache, got 2"):
            one_packed(some_tokens(2, 1), **lb.cache_argument(cache))
        with pytest.raises(ValueError, match="takes latents, not keys and values"):
            small_llama()(some_tokens(1, 2), **lb.cache_argument(lb.latent_cache(one_packed)))
        with pytest.raises(ValueError, match="mask must have shape"):
            one_packed(
                some_tokens(1, 2), **lb.cache_argument(cache), attention_mask=torch.ones(1, 1, 2, 2, dtype=torch.bool)
            )
        with pytest.raises(ValueError, match="cache is empty"):
            lb.latent_cache(one_packed).angles()


def test_latent_types_are_the_caches_whose_memory_is_counted():
    assert {kind: dtype.itemsize for kind, dtype in LATENT_TYPES.items()} == LATENT_BYTES
    assert ("full", *LATENT_TYPES) == KV_CACHES


def test_bench_cache_times_both(tmp_path, capsys, monkeypatch):
    shape = ref.ModelShape("", 64, 96, 2, 4, 2, 16, 300, 128)
    monkeypatch.setitem(lb.MODEL_SHAPES, "small", shape)
    rows = bench_cache("small", 2.0, (8, 40), repeats=2, progress=False)
    assert [(row["context"], row["kind"]) for row in rows] == [
        (context, kind) for context in (8, 40) for kind in ("latent", "latent-int8")
    ]
    ranks = ref.model_memory(shape, 2.0).ranks
    for row in rows:
        assert row["time_us"] > 0
        assert_within(np.array(row["speed"]), row["ordinary_us"] / row["time_us"], np.array(row["speed"]), terms=4)
        assert row["ordinary_bytes_per_token"] == 2 * 2 * 2 * 32
        assert row["ranks"] == {"k_proj": ranks["0.k_proj"], "v_proj": ranks["0.v_proj"]}
    saved = tmp_path / "cache.json"
    command = ["bench", "cache", "--model-shape", "small", "--bits", "2", "--context", "8", "--save", str(saved)]
    assert main(command) == 0
    assert "latent-int8" in capsys.readouterr().out
    assert len(json.loads(saved.read_text())["rows"]) == 2
    assert main(["bench", "cache", "--model-shape", "phi4-14b"]) == 2
    assert "must be known and have separate key" in capsys.readouterr().err


def test_crossover_lies_where_the_times_meet():
    def rows(*gaps):
        return [{"context": 2**at, "time_us": 10.0 + gap, "ordinary_us": 10.0} for at, gap in enumerate(gaps)]

    assert crossover(rows(3, 1, -1)) == 3
    assert crossover(rows(3, 1, -1)[::-1]) == 3
    assert crossover(rows(-1, 1, -3)) == 2.5
    assert crossover(rows(-1, -1)) == 1
    assert crossover(rows(-1, 1)) is None
    assert crossover([]) is None


def test_cache_argument_follows_the_signature():
    """Of what is called, and else of transformers' own generate; a name it does not know is an error."""

    def old(tokens, past_key_values=None): ...
    def new(tokens, cache=None, past_key_values=None): ...

    assert lb.cache_argument(1, old) == {"past_key_values": 1}
    assert lb.cache_argument(1, new) == {"cache": 1}
    assert lb.cache_argument(1, lambda **named: None) == lb.cache_argument(1, small_llama().forward)
    assert lb.cache_argument(1) == lb.cache_argument(1, small_llama().forward)


@pytest.mark.parametrize("name", CACHE_NAMES)
def test_latent_attention_knows_its_cache_under_any_name(one_packed, name):
    cache = lb.latent_cache(one_packed, torch.float32)
    attention = one_packed.model.layers[0].self_attn
    x, positions = torch.randn(1, 3, 64, generator=torch.Generator().manual_seed(0)), torch.arange(3)[None]
    output, _ = attention(x, position_embeddings=None, attention_mask=None, position_ids=positions, **{name: cache})
    assert output.shape == (1, 3, 64)
    assert cache.get_seq_length() == 3
