"""Several texts at once are the texts that each request would get alone."""

import queue

import littlebit.fast as lb
import numpy as np
import pytest
import torch
from conftest import make_tiny_llama
from hypothesis import given, settings, strategies as st
from littlebit.fast.decoding.batching import Batcher, Choice, CpuSlots, EngineSlots, Job, QueueFullError, slots_for
from littlebit.fast.decoding.cpu_decoder import Decoder, decode
from littlebit.fast.decoding.generate import TextDecoder
from littlebit.fast.decoding.graph_decoder import decode_batch
from littlebit.fast.decoding.torch_weights import decodable
from littlebit.fast.models.generation_settings import GenerationConfig


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    model = lb.load_model(make_tiny_llama(tmp_path_factory.mktemp("tiny"), attention_bias=False))
    lb.quantize_(model, lb.Config(bits=1.5, paths=1), progress=False)
    return lb.load(lb.save(model, tmp_path_factory.mktemp("packed") / "out"))


class Running:
    """A job whose events are kept."""

    def __init__(self, prompt, config, leave_after=None, **more):
        self.events, self.leave_after = queue.Queue(), leave_after
        self.job = Job(prompt, config, self.emit, **more)
        self.choices = []

    def emit(self, event):
        if isinstance(event, Choice):
            self.choices.append(event)
            if len(self.choices) == self.leave_after:
                self.job.cancel()
                self.events.put("left")
        else:
            self.events.put(event)

    @property
    def tokens(self):
        return [each.token for each in self.choices]


def run_all(batcher, running):
    batcher.submit([each.job for each in running])
    return [each.events.get(timeout=60) for each in running]


words = st.lists(st.integers(0, 259), min_size=1, max_size=40)
beginnings = st.sampled_from([[], [7] * 33, list(range(60))])


@settings(max_examples=20)  # each runs up to 18 texts twice
@given(
    st.lists(
        st.tuples(beginnings, words, st.integers(1, 12), st.sampled_from([0.0, 0.8]), st.none() | st.integers(1, 3)),
        min_size=1,
        max_size=9,
    )
)
def test_a_text_does_not_depend_on_the_others(model, jobs):
    compiled = decodable(model)
    batcher = Batcher(CpuSlots(compiled, size=4, context=128))
    try:
        for _ in range(2):  # the second time prompts find their beginnings in caches that were kept
            running = [
                Running(
                    start + rest,
                    GenerationConfig(max_new_tokens=new, temperature=temperature, seed=at, stop_tokens=()),
                    leave if leave is not None and leave < new else None,
                )
                for at, (start, rest, new, temperature, leave) in enumerate(jobs)
            ]
            ends = run_all(batcher, running)
            for each, end in zip(running, ends, strict=True):
                alone = list(decode(compiled, each.job.prompt, each.job.config))
                if each.leave_after is None:
                    assert (each.tokens, end) == (alone, "length")
                else:
                    assert each.tokens == alone[: each.leave_after]
        assert len(batcher.slots.kept) <= batcher.slots.size
    finally:
        batcher.close()
    assert not batcher.slots.caches


@pytest.mark.parametrize("kv_cache", ["full", "latent"])
def test_an_engine_gives_the_texts_of_decode_batch(model, kv_cache):
    config = GenerationConfig(max_new_tokens=6, temperature=0.0, stop_tokens=(), kv_cache=kv_cache)
    prompts = [[1, 2, 3], [9] * 20, [5]]
    rows = zip(*decode_batch(model, prompts, config), strict=True)
    slots = slots_for(model, 2, 64, kv_cache) if kv_cache == "latent" else EngineSlots(model, 2, 64)
    batcher = Batcher(slots)  # two places for three jobs: the third runs in the next batch
    running = [Running(prompt, config) for prompt in prompts]
    assert run_all(batcher, running) == ["length"] * 3
    batcher.close()
    assert [each.tokens for each in running] == [list(row) for row in rows]


def test_probabilities_of_prompt_and_answer(model):
    compiled, prompt = decodable(model), [3, 1, 4, 1, 5]
    batcher = Batcher(CpuSlots(compiled, context=64))
    config = GenerationConfig(max_new_tokens=3, temperature=0.0, stop_tokens=(), repetition_penalty=1.5)
    each = Running(prompt, config, logprobs=2, score_prompt=True)
    run_all(batcher, [each])
    batcher.close()
    decoder, tokens = Decoder(compiled, 64), prompt + each.tokens[4:]
    assert each.tokens == tokens[1:]
    for token, choice in zip(tokens, each.choices, strict=False):
        expected = torch.from_numpy(decoder(np.array([token])).astype(np.float64)).log_softmax(-1)
        best = expected.topk(2)
        # The sum's and the logarithm's rounding in float64, of float32 logits
        assert abs(choice.logprob - expected[choice.token]) <= 1e-12
        assert [other for other, _ in choice.top] == best.indices.tolist()


def test_a_full_queue_refuses_all_of_a_request(model):
    batcher = Batcher(CpuSlots(decodable(model), size=1, context=64), queue_limit=2)
    config = GenerationConfig(max_new_tokens=60, stop_tokens=())
    with pytest.raises(QueueFullError):
        batcher.submit([Running([1], config).job for _ in range(4)])
    assert not batcher.waiting
    running = [Running([1], config) for _ in range(3)]
    assert run_all(batcher, running) == ["length"] * 3
    batcher.close()
    with pytest.raises(QueueFullError, match="stopping"):
        batcher.submit([Running([1], config).job])


def test_a_failure_ends_the_running_jobs_and_no_others(model):
    batcher = Batcher(CpuSlots(decodable(model), context=64))
    bad = Running([1], GenerationConfig(max_new_tokens=2))
    bad.job.tokens = [10_000]  # not in the vocabulary
    (error,) = run_all(batcher, [bad])
    assert isinstance(error, ValueError)
    good = Running([1], GenerationConfig(max_new_tokens=2, stop_tokens=()))
    assert run_all(batcher, [good]) == ["length"]
    batcher.close()


class Letters:
    """A tokenizer whose tokens are letters."""

    def decode(self, tokens, skip_special_tokens=True):
        return "".join(map(chr, tokens))


@given(st.text("ab", max_size=12), st.lists(st.text("ab", min_size=1, max_size=3), max_size=3))
def test_stop_strings_end_a_text_before_the_first(text, stop):
    decoder, found = TextDecoder(Letters(), stop), ""
    for letter in text:
        found += decoder.push(ord(letter))
        if decoder.stopped:
            break
    found += decoder.finish()
    places = [place for place in map(text.find, stop) if place >= 0]
    assert decoder.stopped == bool(places)
    if not places:
        assert found == text
    else:  # the string that ends first, and of those the longest
        end = min(text.find(each) + len(each) for each in stop if each in text)
        assert found == text[: min(text.find(each) for each in stop if 0 <= text.find(each) <= end - len(each))]
