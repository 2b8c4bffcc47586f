"""Test the engines that graph_decoder.py runs against transformers, on a CPU without graphs, and its sampling."""

import logging

import littlebit.fast as lb
import pytest
import torch
import transformers as hf
from compare import assert_same
from hypothesis import given, strategies as st
from littlebit.fast import memory
from littlebit.fast.bench.decode_cuda import random_model
from littlebit.fast.decoding import graph_decoder
from littlebit.fast.decoding.architecture import NotDecodableError
from littlebit.fast.decoding.engines import engine_of, fused_engine
from littlebit.fast.decoding.fused_llama import FUSED_TYPES, FusedEngine
from littlebit.fast.decoding.graph_decoder import DecodeLoop, decode_batch, sample
from littlebit.fast.decoding.parity import logit_bound
from littlebit.fast.decoding.static_cache import StaticEngine
from littlebit.fast.models.embeddings import quantize_embeddings_
from littlebit.fast.models.generation_settings import GenerationConfig
from test_families import FAMILIES, GROUPED, SIZES

BITS = 3.0
LONG = {"max_position_embeddings": 400}
PHI = {"num_key_value_heads": 2, "partial_rotary_factor": 0.5, "pad_token_id": None}
KINDS = {name: FAMILIES[name] for name in FAMILIES if name != "GPT-2"}
KINDS["Mistral, no window"] = (hf.MistralConfig, GROUPED | {"sliding_window": None}, KINDS["Mistral"][2])
KINDS["Phi"] = (hf.PhiConfig, SIZES | PHI, {"q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2"})


def packed_model(family, **changes):
    """Make a random packed model whose greedy texts do not repeat themselves at once."""
    config, sizes, _ = KINDS[family]
    torch.manual_seed(0)
    model = hf.AutoModelForCausalLM.from_config(config(**(sizes | LONG | changes))).eval()
    for name, parameter in model.named_parameters():
        loud = 1.0 if "embed" in name else 0.25
        torch.nn.init.normal_(parameter, 1.0 if parameter.ndim == 1 else 0.0, 0.2 if parameter.ndim == 1 else loud)
    model.generation_config.eos_token_id = None
    lb.quantize_(model, lb.Config(bits=BITS), progress=False)
    return lb.pack_(model)


@pytest.fixture(scope="module")
def models():
    """Make each family's model once."""
    made = {}

    def model(family):
        if family not in made:
            made[family] = packed_model(family)
        return made[family]

    return model


def put_in_charge(monkeypatch, engine):
    """Make `choose_engine` take one engine for every model."""
    monkeypatch.setattr(
        graph_decoder, "choose_engine", lambda model, batch, capacity, kv_cache: engine(model, batch, capacity)
    )


def prompt(length, seed=0):
    return torch.randint(3, 128, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def by_transformers(model, tokens, count):
    ids = torch.tensor([tokens])
    with torch.inference_mode():
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False)
    return out[0, len(tokens) :].tolist()


def columns(steps):
    return [list(column) for column in zip(*steps, strict=True)]


FUSED = ("Llama", "Mistral, no window", "Qwen2.5", "Qwen3")
ENGINES = [(StaticEngine, family) for family in KINDS] + [(fused_engine, family) for family in FUSED]


@pytest.fixture(params=ENGINES, ids=lambda pair: f"{pair[0].__name__}-{pair[1]}")
def packed(request, models, monkeypatch):
    """Return a model of each family that each engine runs, and make that engine run it."""
    make, family = request.param
    put_in_charge(monkeypatch, make)
    monkeypatch.setattr(graph_decoder, "SMALLEST_CAPACITY", 8)
    return models(family)


def test_engines_write_what_transformers_writes(packed):
    """Go beyond the sliding windows of eight tokens, and through three larger caches."""
    tokens = prompt(5)
    assert columns(decode_batch(packed, [tokens], GenerationConfig(40))) == [by_transformers(packed, tokens, 40)]


def test_prompts_of_a_batch_do_not_touch_each_other(packed):
    prompts = [prompt(length, seed=length) for length in (3, 11, 20)]
    alone = [by_transformers(packed, tokens, 12) for tokens in prompts]
    assert columns(decode_batch(packed, prompts, GenerationConfig(12))) == alone


@pytest.mark.parametrize("batched", [True, False])
def test_generate_answers_several_prompts_as_if_each_were_alone(batched, loud_llama, monkeypatch, caplog):
    model, prompts = lb.load_model(loud_llama), ["Hello", "a somewhat longer prompt", "x"]
    alone = [lb.generate(model, each, 12) for each in prompts]
    batches = []
    batch = graph_decoder.decode_batch
    monkeypatch.setattr(graph_decoder, "decode_batch", lambda *all_: batches.append(len(all_[1])) or batch(*all_))
    monkeypatch.setattr(graph_decoder, "LARGEST_BATCH", 2)
    monkeypatch.setattr("littlebit.fast.decoding.generate.on_gpu", lambda model: batched)
    assert lb.generate(model, prompts, 12) == alone
    assert batches == ([2, 1] if batched else [])
    assert lb.generate(model, [], 12) == []
    with pytest.raises(ValueError, match="the prompt is empty"):
        lb.generate(model, ["Hello", ""], 12)
    with pytest.raises(ValueError, match="max_new_tokens must be a whole number >= 1, got 0"):
        lb.generate(model, prompts, 0)


@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize(
    "changes", [{}, {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 4, "num_hidden_layers": 3}]
)
def test_logits_of_the_fused_engine_are_exact_within_the_bound(changes, bits, monkeypatch):
    """Prefill two prompts in blocks of four tokens, then run steps; check every row of logits."""
    from littlebit.fast.decoding import fused_llama as module

    monkeypatch.setattr(module, "PREFILL_TOKENS", 4)
    model = packed_model("Llama", **changes)
    quantize_embeddings_(model, bits)
    texts = [torch.tensor(prompt(length)) for length in (6, 13)]
    exact, bound = logit_bound(model, texts)
    engine = fused_engine(model, 2, 16)
    with torch.inference_mode():
        rows = [engine.prefill([texts[0][:2].tolist(), texts[1][:9].tolist()])]
        rows += [engine.step(torch.stack([texts[0][2 + at], texts[1][9 + at]])) for at in range(4)]
    for at, logits in enumerate(rows):
        for row, start in enumerate((1, 8)):
            error = (logits[row].double() - exact[row][start + at]).abs().max()
            assert error <= bound[row][start + at]


def test_the_fused_engine_names_the_reason_for_refusing_a_model(llama, monkeypatch):
    def reason(change):
        with pytest.MonkeyPatch.context() as patch:
            change(patch)
            with pytest.raises(NotDecodableError) as found:
                fused_engine(llama, 1, 8)
        return str(found.value)

    assert set(FUSED_TYPES) == {"llama", "mistral", "qwen2", "qwen3"}
    assert "gelu" in reason(lambda patch: patch.setattr(llama.config, "hidden_act", "gelu"))
    mlp, head = llama.model.layers[1].mlp, torch.nn.Linear(64, 128)
    assert "Identity" in reason(lambda patch: patch.setitem(mlp._modules, "up_proj", torch.nn.Identity()))
    assert "head has a bias" in reason(lambda patch: patch.setitem(llama._modules, "lm_head", head))
    assert "Identity" in reason(lambda patch: patch.setitem(llama.model._modules, "embed_tokens", torch.nn.Identity()))


@pytest.mark.parametrize("family", list(KINDS))
def test_a_step_reads_no_value_from_the_device(family):
    """A graph can capture it: fake tensors, which hold no values, raise if one is read."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    config, sizes, _ = KINDS[family]
    with FakeTensorMode(), torch.inference_mode():
        model = hf.AutoModelForCausalLM.from_config(config(**(sizes | LONG))).eval()
        engine = StaticEngine(model, 2, 16)
        for layer in engine.cache.layers:
            heads = model.config.num_attention_heads
            states = torch.zeros(2, getattr(model.config, "num_key_value_heads", heads), 1, 16)
            layer.lazy_initialization(states, states)
        assert sample(
            engine.step(torch.ones(2, dtype=torch.int64)), GenerationConfig(64, 1.0, 5, 0.9), torch.rand(2)
        ).shape == (2,)


@given(st.data())
def test_sample_inverts_the_cumulative_distribution(data):
    """Sort tokens by probability; each covers an interval of `uniform` as wide as its probability."""
    size = data.draw(st.integers(2, 30))
    logits = torch.tensor(data.draw(st.permutations(range(size))), dtype=torch.float32) / 3
    sampling = GenerationConfig(
        64,
        data.draw(st.floats(0.2, 2.0)),
        data.draw(st.none() | st.integers(1, 40)),
        data.draw(st.none() | st.floats(0.05, 1)),
    )
    uniform = data.draw(st.floats(0, 1, exclude_max=True, width=32))
    order = logits.argsort(descending=True)[: sampling.top_k]
    chances = (logits[order].double() / sampling.temperature).softmax(0)
    if sampling.top_p is not None:
        chances = chances[: max(1, int((chances.cumsum(0) - chances < sampling.top_p).sum()))]
    reached = (chances.cumsum(0) / chances.sum()).tolist()
    (token,) = sample(logits[None], sampling, torch.tensor([uniform])).tolist()
    place = order.tolist().index(token)
    assert place < len(chances)
    slack = 1e-12  # the sums are rounded in two ways
    assert (reached[place - 1] if place else 0) - slack <= uniform <= reached[place] + slack
    assert sample(logits[None], GenerationConfig(), torch.zeros(1)).tolist() == [int(logits.argmax())]


@pytest.mark.parametrize(("top_p", "allowed"), [(0.5, 2), (0.25, 1), (0.75, 3), (0.76, 4), (0.24, 1), (1.0, 4)])
def test_sample_stops_where_the_likelier_tokens_reach_top_p(top_p, allowed):
    """Four probabilities of exactly 1/4: a token is left out once the likelier ones reach top_p, not only exceed it."""
    uniform = torch.arange(64) / 64
    tokens = sample(torch.zeros(1, 4).expand(64, 4), GenerationConfig(64, 1.0, None, top_p), uniform)
    assert len(set(tokens.tolist())) == allowed


def test_sample_has_the_frequencies_of_the_softmax():
    """Each count of 4000 draws lies within five standard deviations of its mean."""
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0])
    uniform = torch.rand(4000, generator=torch.Generator().manual_seed(0))
    counts = torch.bincount(sample(logits.expand(4000, 4), GenerationConfig(64, 0.7), uniform), minlength=4)
    chances = (logits / 0.7).softmax(0)
    assert ((counts - 4000 * chances).abs() < 5 * (4000 * chances * (1 - chances)).sqrt()).all()


@pytest.fixture
def llama(models):
    return models("Llama")


def test_a_seed_gives_the_same_text_again(llama):
    def text(seed):
        return columns(decode_batch(llama, [prompt(4), prompt(9)], GenerationConfig(20, 1.5, 40, 0.95, seed=seed)))

    assert text(1) == text(1)
    assert text(1) != text(2)


def test_a_sequence_that_has_ended_stays_so(llama, monkeypatch):
    prompts = [prompt(6), prompt(8)]
    one, two = columns(decode_batch(llama, prompts, GenerationConfig(20)))
    stop = next(token for token in one if token not in two[: one.index(token) + 3])
    monkeypatch.setattr(llama.generation_config, "eos_token_id", stop)
    steps = list(decode_batch(llama, prompts, GenerationConfig(20)))
    length = one.index(stop) + 1
    assert [row[0] for row in steps] == one[:length] + [None] * (len(steps) - length)
    assert [row[1] for row in steps][: length + 2] == two[: length + 2]


def test_decode_batch_refuses_invalid_input(llama, monkeypatch):
    put_in_charge(monkeypatch, StaticEngine)
    for prompts in ([], [[1]] * 17):
        with pytest.raises(ValueError, match=f"1 to 16 prompts, got {len(prompts)}: split it"):
            decode_batch(llama, prompts, GenerationConfig(4))
    with pytest.raises(ValueError, match="each prompt must have at least one token"):
        decode_batch(llama, [[1], []], GenerationConfig(4))
    for token in (-1, 128):
        with pytest.raises(ValueError, match="must be from 0 to 127"):
            decode_batch(llama, [[5, token]], GenerationConfig(4))
    assert len(list(decode_batch(llama, [prompt(390)], GenerationConfig(11)))) == 11
    with pytest.raises(
        ValueError, match=r"prompt of 390 tokens with 12 new ones needs 401 positions, but the model has 400 "
    ):
        decode_batch(llama, [prompt(390)], GenerationConfig(12))
    monkeypatch.setattr(type(llama), "_can_compile_fullgraph", False)
    with pytest.raises(NotDecodableError, match="LlamaForCausalLM takes no cache of fixed size"):
        decode_batch(llama, [[1]], GenerationConfig(4))


def test_a_model_on_several_devices_is_refused(llama):
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2, device="meta"))
    with pytest.raises(ValueError, match="spread over cpu, meta: move it to one device"):
        decode_batch(model, [[1]], GenerationConfig(4))


def test_lack_of_memory_says_what_to_do(llama, monkeypatch):
    def fail(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate\nmore")

    monkeypatch.setattr(graph_decoder, "SMALLEST_CAPACITY", 8)
    steps = decode_batch(llama, [prompt(4)], GenerationConfig(10))
    monkeypatch.setattr(FusedEngine, "grow", fail)
    with pytest.raises(ValueError, match="no memory left after 8 tokens of 1 sequences: give fewer"):
        list(steps)


def test_steps_go_on_without_a_graph_where_none_can_be_captured(llama, monkeypatch, caplog):
    """Run a GPU's loop on a CPU, where torch cannot capture: it warns once."""
    loop = DecodeLoop(StaticEngine(llama, 1, 64))
    loop.captures = True
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: None)

    def refuse(graph):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(torch.cuda, "graph", refuse)
    tokens = prompt(5)
    with torch.inference_mode(), caplog.at_level(logging.WARNING):
        loop.start([tokens])
        found = [loop.tokens.item()]
        for _ in range(5):
            loop.advance()
            found.append(loop.tokens.item())
    assert found == by_transformers(llama, tokens, 6)
    assert len(caplog.records) == 1
    assert "no graph can be captured: operation not permitted" in caplog.text
    assert_same(loop.length, 10)


@pytest.mark.parametrize("kind", ["latent", "latent-int8"])
def test_latents_give_the_logits_of_keys_and_values(kind, monkeypatch):
    """On a CPU the engines differ only by the rounding of latents: in blocks, steps and larger caches."""
    from littlebit.fast.decoding import fused_llama as module, fused_llama_latent

    monkeypatch.setattr(module, "PREFILL_TOKENS", 4)
    monkeypatch.setattr(fused_llama_latent, "BLOCK", 8)
    model = packed_model("Llama", attention_bias=False, num_key_value_heads=2)
    sides = [fused_engine(model, 2, 11, kv_cache) for kv_cache in ("full", kind)]
    assert sides[1].next_capacity == 16
    assert sides[1].token_bytes < sides[0].token_bytes
    rounding = 2**-11 if kind == "latent" else 2**-8  # relative to a token's largest latent
    with torch.inference_mode():
        one, two = ([each.prefill([prompt(9), prompt(3)])] for each in sides)
        for each, rows in zip(sides, (one, two), strict=True):
            rows += [each.step(torch.tensor([5, 6])) for _ in range(2)]
            each.grow(each.next_capacity)
            rows += [each.step(torch.tensor([7, 8])) for _ in range(3)]
    for mine, theirs in zip(two, one, strict=True):
        error = (mine - theirs).norm() / theirs.norm()
        assert 0 < error < 40 * rounding


def test_a_latent_cache_generates_the_text_of_a_full_cache(monkeypatch):
    monkeypatch.setattr(graph_decoder, "SMALLEST_CAPACITY", 8)
    model = packed_model("Llama")
    prompts = [prompt(6), prompt(13)]
    full, latent = (
        columns(decode_batch(model, prompts, GenerationConfig(12, kv_cache=kind))) for kind in ("full", "latent")
    )
    assert full == latent


def test_a_latent_cache_refuses_what_it_cannot_keep(models):
    with pytest.raises(NotDecodableError, match="a bias or a norm before RoPE"):
        fused_engine(models("Qwen3"), 1, 8, "latent")
    model = packed_model("Llama")
    layer = model.model.layers[0].self_attn
    layer.k_proj = torch.nn.Linear(64, 32, bias=False)
    with pytest.raises(NotDecodableError, match="k_proj and v_proj as packed layers"):
        decode_batch(model, [[1]], GenerationConfig(4, kv_cache="latent"))


@pytest.mark.parametrize("kv_cache", memory.KV_CACHES)
def test_a_random_cache_is_attended_to(kv_cache):
    """The next token's logits depend on the random numbers, and the position counts them."""
    model = random_model(memory.ModelShape("a small one", 64, 80, 1, 2, 1, 64, 40, 256), 2.0, 1, "cpu")
    engine, found = engine_of(model, 2, 16, torch.device("cpu"), torch.float16, kv_cache), []
    with torch.inference_mode():
        for count in (0, 9, 9):
            engine.fill_cache_with_random(count)
            found.append(engine.step(torch.tensor([5, 6])))
            assert engine.positions.tolist() == [count + 1] * 2
    assert all(each.isfinite().all() for each in found)
    assert (found[0] - found[1]).abs().max() > 1e-3
    assert (found[1] - found[2]).abs().max() > 1e-3
