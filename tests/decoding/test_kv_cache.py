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

EPS = float(np.finfo(np.float32).eps)
DTYPES = {"float32": torch.float32, "float16": torch.float16, "int8": torch.int8}


def both_packed(arrays):
    """Paths packed by both packages, from the same five arrays each."""
    return (
        [ref.pack_factors(ref.Factors(*path)) for path in arrays],
        [lb.pack_factors(lb.Factors(*map(torch.from_numpy, path))) for path in arrays],
    )


def random_paths(rng, d_out, d_in, ranks):
    shapes = [((d_out, rank), (d_in, rank), (d_out,), (rank,), (d_in,)) for rank in ranks]
    return [tuple(rng.standard_normal(shape).astype(np.float32) for shape in each) for each in shapes]


def split(paths):
    """A = [V_sign ell g]^T, (R, d_in), and B = [h U_sign], (d_out, R), in float64."""
    dense = [[array.astype(np.float64) for array in ref.unpack_factors(path)] for path in paths]
    a = np.concatenate([(g[:, None] * v * ell).T for _, v, _, ell, g in dense])
    return a, np.concatenate([h[:, None] * u for u, _, h, _, _ in dense], axis=1)


@st.composite
def cases(draw):
    """Sizes, inputs and layers of one attention over some tokens."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    kv_heads, group = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    size, d_in = draw(st.sampled_from([2, 4, 8])), draw(st.integers(1, 20))
    tokens = draw(st.integers(1, 20))
    queries = draw(st.integers(1, tokens))
    ranks = [draw(st.lists(st.integers(1, 10), min_size=1, max_size=2)) for _ in "kv"]
    arrays = [random_paths(rng, kv_heads * size, d_in, each) for each in ranks]
    bias = [rng.standard_normal(kv_heads * size).astype(np.float32) if draw(st.booleans()) else None for _ in "kv"]
    x = (rng.standard_normal((tokens, d_in)) * 10.0 ** draw(st.integers(-3, 1))).astype(np.float32)
    query = rng.standard_normal((kv_heads * group, queries, size)).astype(np.float32)
    angles = rng.uniform(0, 100, (tokens, size // 2))
    turn = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
    hidden = draw(st.integers(0, tokens))  # padding on the left
    mask = np.tril(np.ones((queries, tokens), bool), tokens - queries) & (np.arange(tokens) >= hidden)
    return x, query, arrays, bias, turn, mask


def latent_error(x, a, dtype):
    """Latents in float64, and how far stored ones may be from them."""
    t, magnitude = x.astype(np.float64) @ a.T, np.abs(x).astype(np.float64) @ np.abs(a).T
    error = 2 * (a.shape[1] + 4) * EPS * magnitude
    largest = (np.abs(t) + error).max(axis=1, keepdims=True)
    rounding = {
        "float32": 0,
        "float16": (np.abs(t) + error) * 2.0**-11 + largest * 2.0**-25,
        "int8": largest / 254,
    }[dtype]
    return t, magnitude, error + rounding * (1 + 8 * EPS) + 4 * EPS * magnitude


def exact_attention(x, query, packed, bias, turn, mask, dtype):
    """Attention with whole keys and values in float64, and how far one over stored latents may be from it.

    Score errors of at most d change each weight by a factor of at most exp(2 d).
    """
    (a_k, b_k), (a_v, b_v) = map(split, packed)
    (t_k, size_k, error_k), (t_v, size_v, error_v) = (latent_error(x, a, dtype) for a in (a_k, a_v))
    heads, _, size = query.shape
    group = heads // (len(b_k) // size)
    bias = [np.zeros(len(b_k)) if each is None else each.astype(np.float64) for each in bias]
    keys, values = t_k @ b_k.T + bias[0], t_v @ b_v.T + bias[1]
    cosine, sine = (each.astype(np.float64) for each in turn)
    scale = size**-0.5

    def turned(rows, c, s):  # multiplication of complex numbers
        half = size // 2
        whole = (rows[:, :half] + 1j * rows[:, half:]) * (c + 1j * s)
        return np.concatenate([whole.real, whole.imag], axis=1)

    def turned_magnitude(rows):
        low, high = np.split(rows, 2, axis=1)
        c, s = np.abs(cosine), np.abs(sine)
        return np.concatenate([low * c + high * s, high * c + low * s], axis=1)

    outputs, bounds = [], []
    for head in range(heads):
        mine = slice(head // group * size, (head // group + 1) * size)
        q = query[head].astype(np.float64)
        scores = scale * q @ turned(keys[:, mine], cosine, sine).T
        size_of_keys = size_k @ np.abs(b_k[mine]).T + np.abs(bias[0][mine])
        score_error = scale * np.abs(q) @ turned_magnitude(error_k @ np.abs(b_k[mine]).T).T
        score_size = scale * np.abs(q) @ turned_magnitude(size_of_keys).T
        score_error += 2 * (b_k.shape[1] + size + 12) * EPS * score_size
        scores = np.where(mask, scores, -np.inf)
        blind = ~mask.any(axis=1)
        scores[blind], score_error[blind] = 0, 0
        weights = np.exp(scores - scores.max(axis=1, keepdims=True))
        weights /= weights.sum(axis=1, keepdims=True)
        seen = mask | blind[:, None]
        d = np.where(seen, score_error, 0).max(axis=1, keepdims=True)
        size_of_values = size_v @ np.abs(b_v[mine]).T + np.abs(bias[1][mine])
        value_error = error_v @ np.abs(b_v[mine]).T
        rounding = 2 * (b_v.shape[1] + len(x) + 16) * EPS
        outputs.append(weights @ values[:, mine])
        bounds.append(
            np.expm1(2 * d) * (weights @ size_of_values)
            + np.exp(2 * d) * (weights @ (value_error + rounding * size_of_values))
        )
    return np.stack(outputs), np.stack(bounds)


@given(cases(), st.sampled_from(list(DTYPES)), st.sampled_from([1, 3, 256]))
def test_latent_attention_is_attention(case, dtype, block):
    """Both packages give what whole keys and values give, within what rounding and storage may change."""
    x, query, arrays, bias, turn, mask = case
    (ref_k, fast_k), (ref_v, fast_v) = map(both_packed, arrays)
    exact, bound = exact_attention(x, query, (ref_k, ref_v), bias, turn, mask, dtype)
    kept = [ref.round_latents(ref.latents(x, paths), dtype) for paths in (ref_k, ref_v)]
    found = ref.latent_attention(query, *kept, ref_k, ref_v, *turn, mask, *bias)
    assert_within(found, exact, bound / EPS, terms=1, factor=1)
    x, query, mask, *turn = map(torch.from_numpy, (x, query, mask, *turn))
    bias = [None if each is None else torch.from_numpy(each) for each in bias]
    kept = [lb.round_latents(lb.latents(x, paths), DTYPES[dtype]) for paths in (fast_k, fast_v)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kv_cache, "BLOCK", block)
        found = lb.latent_attention(query, *kept, fast_k, fast_v, *turn, mask, *bias)
        batched = lb.latent_attention(
            query.expand(2, *query.shape),
            *(lb.Latents(*(part.expand(2, *part.shape) for part in each)) for each in kept),
            *(fast_k, fast_v),
            *(each.expand(2, *each.shape) for each in (*turn, mask)),
            *bias,
        )
    for each in (found, *batched):
        assert_within(each, exact, bound / EPS, terms=1, factor=1)


@given(st.integers(0, 2**32 - 1), st.lists(st.integers(1, 40), min_size=1, max_size=2), st.integers(1, 40))
def test_latents_and_up_projection_are_the_layer_in_two_steps(seed, ranks, d_in):
    rng = np.random.default_rng(seed)
    mine, theirs = both_packed(random_paths(rng, 6, d_in, ranks))
    a, b = split(mine)
    x = rng.standard_normal((3, d_in)).astype(np.float32)
    t, magnitude = x @ a.T, np.abs(x) @ np.abs(a).T
    for found in (ref.latents(x, mine), lb.latents(torch.from_numpy(x), theirs)):
        assert_within(found, t, magnitude, terms=d_in + 3)
    assert_same(ref.up_projection(mine), b.astype(np.float32))
    assert_same(lb.up_projection(theirs), b.astype(np.float32))


@given(st.integers(0, 2**32 - 1), st.sampled_from(list(DTYPES)), st.integers(-30, 30))
def test_round_latents_stays_within_its_bound(seed, dtype, exponent):
    """Whatever the size of the latents: float16 alone would overflow."""
    rng = np.random.default_rng(seed)
    t = (rng.standard_normal((4, 9)) * 10.0**exponent).astype(np.float32)
    t[1] = 0
    mine, theirs = ref.round_latents(t, dtype), lb.round_latents(torch.from_numpy(t), DTYPES[dtype])
    assert_same(theirs.codes, mine.codes)
    assert_same(theirs.scale, mine.scale)
    assert mine.codes.dtype == dtype
    scale = mine.scale.astype(np.float64)
    bound = {
        "float32": 0 * t,
        "float16": np.abs(t) * 2.0**-11 + scale * 2.0**-25,
        "int8": np.broadcast_to(scale / 2, t.shape),
    }[dtype]
    for found in (mine.values(), theirs.values()):
        assert_within(found, t, np.abs(t) + bound / EPS, terms=2)


def test_round_latents_uses_all_of_int8():
    codes = lb.round_latents(torch.tensor([[1.0, -3.0], [0.0, 0.0]]), torch.int8)
    assert_same(codes.codes, np.array([[42, -127], [0, 0]], np.int8))
    assert_same(codes.scale[1], np.ones(1, np.float32))


@given(st.integers(0, 2**32 - 1))
def test_apply_rope_multiplies_complex_numbers(seed):
    rng = np.random.default_rng(seed)
    x, cosine, sine = (rng.standard_normal((3, size)).astype(np.float32) for size in (8, 4, 4))
    exact = (x[:, :4] + 1j * x[:, 4:].astype(np.float64)) * (cosine + 1j * sine.astype(np.float64))
    low, high = np.abs(x[:, :4]), np.abs(x[:, 4:])
    magnitude = np.concatenate([low * abs(cosine) + high * abs(sine), high * abs(cosine) + low * abs(sine)], axis=1)
    for found in (ref.apply_rope(x, cosine, sine), lb.apply_rope(*map(torch.from_numpy, (x, cosine, sine)))):
        assert_within(found, np.concatenate([exact.real, exact.imag], axis=1), magnitude, terms=3)


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
