"""Training of whole models: its schedule, what moves, that it learns, its errors, several processes, the command.

Where two runs compute the same in another order, their losses may drift apart as those of a run do whose parameters
began with a little noise. That is measured: losses move by so much per unit of noise, and eps times the roundings of
a step is the noise that rounding makes (as in test_train.py).
"""

import copy
import json
import lzma
import math
import os
import signal
import subprocess
import sys

import littlebit.fast as lb
import numpy as np
import pytest
import torch
import workers
from compare import assert_same, assert_within
from hypothesis import given, strategies as st
from littlebit.fast.checkpoints import texts
from littlebit.fast.cli.main import main
from littlebit.fast.distill import hidden_loss
from littlebit.fast.training import causal_attention, trainer
from littlebit.fast.training.student import littlebit_layers
from littlebit.fast.training.trainer import Taps, learning_rate_factor, phases, schedule, schedules
from torch.optim.optimizer import register_optimizer_step_pre_hook

NOISE = 2.0**-12  # far above float32's rounding
TEXT = torch.randint(0, 256, (128,), generator=torch.Generator().manual_seed(0))
SETTINGS = {"tokens": 8 * 128, "sequence": 32, "batch": 4, "lr_latents": 0.01, "lr_scales": 0.01}
# Roundings of a loss: the longest sums of each layer forward and backward, 14 layers, and those of a batch's positions
ROUNDINGS = 2 * 14 * (64 + 96 + 32) + 128


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def models(loud_llama):
    """A teacher and its student."""
    teacher = lb.load_model(loud_llama)
    student = copy.deepcopy(teacher)
    lb.quantize_(student, lb.Config(bits=2.5), progress=False)
    return teacher, student


def train(models, texts=TEXT, keeper=None, weights=None, log_steps=1, **changes):
    """The trained student and the log; the models stay as they are."""
    teacher, student = copy.deepcopy(models)
    config = lb.TrainConfig(**(SETTINGS | changes))
    log = lb.train_(student, teacher, texts, config, weights, keeper, log_steps=log_steps, progress=False)
    return student, log


def losses(log, key="loss"):
    return np.array([entry[key] for entry in log], np.float32)


@pytest.fixture(scope="module")
def whole(models):
    return train(models)


def measured(models, log, texts=TEXT):
    """How far each loss and gradient norm of a run moves per unit of noise at the start: the most of four draws."""
    rng, moved = torch.Generator().manual_seed(0), []
    for _ in range(4):
        noisy = copy.deepcopy(models[1])
        for parameter in noisy.parameters():
            parameter.data *= 1 + NOISE * torch.randn(parameter.shape, generator=rng)
        moved.append(train((models[0], noisy), texts)[1])

    def condition(key):
        return np.maximum.accumulate(np.max([abs(losses(each, key) - losses(log, key)) for each in moved], 0)) / NOISE

    return {key: condition(key) for key in ("loss", "grad_norm")}


@pytest.fixture(scope="module")
def conditions(models, whole):
    return measured(models, whole[1])


def assert_same_curves(log, whole, conditions):
    for key, condition in conditions.items():
        expected = losses(whole, key)
        assert_within(losses(log, key), expected, expected + condition, ROUNDINGS)


configs = st.builds(
    lb.TrainConfig,
    tokens=st.integers(1, 4000),
    sequence=st.integers(1, 40),
    batch=st.integers(1, 9),
    seed=st.integers(0, 2**31),
)


@given(configs, st.data())
def test_schedule_reads_every_text_in_whole_windows(config, data):
    lengths = data.draw(st.lists(st.integers(config.sequence, 200), min_size=1, max_size=4))
    count = len(lengths)
    weights = data.draw(st.none() | st.lists(st.sampled_from([0, 1, 2.5]), min_size=count, max_size=count))
    weights = weights if weights and sum(weights) else None
    starts = schedule(lengths, weights, config)
    assert starts.shape == (config.steps, config.batch)
    assert starts.dtype == torch.int64
    assert_same(starts, schedule(lengths, weights, config))
    ends = np.cumsum(lengths)
    source = np.searchsorted(ends, starts.flatten().numpy(), side="right")
    assert ((starts.flatten().numpy() + config.sequence) <= ends[source]).all()
    drawn = set(source.tolist())
    assert all((lengths if weights is None else weights)[at] > 0 for at in drawn)
    for at in drawn:
        assert_read_in_epochs(starts.flatten().numpy()[source == at] - ends[at] + lengths[at], lengths[at], config)


def assert_read_in_epochs(starts, length, config):
    """Every epoch is all windows from one offset, each once, before any comes again; the last may be cut short."""
    while len(starts):
        offset = starts[0] % config.sequence
        windows = (length - offset) // config.sequence
        epoch, starts = starts[:windows], starts[windows:]
        assert len(set(epoch)) == len(epoch)
        assert set(epoch % config.sequence) == {offset}


@given(st.integers(1, 12), st.integers(0, 30), st.integers(0, 2**31))
def test_schedule_begins_each_epoch_at_a_random_offset(sequence, more, seed):
    """Every offset that leaves a whole window comes up, equally often: each of 300 epochs draws one."""
    length = sequence + more
    offsets, windows = [], 0
    for epoch in range(300):
        config = lb.TrainConfig(tokens=sequence, sequence=sequence, batch=1, seed=seed + epoch)
        offsets.append(int(schedule([length], None, config)[0, 0]) % sequence)
        windows = min(sequence, length - sequence + 1)
    assert set(offsets) <= set(range(windows))
    # each count is binomial with 300 draws: 6 standard deviations are passed once in 10^8 cases
    spread = 6 * np.sqrt(300 / windows * (1 - 1 / windows))
    assert all(abs(offsets.count(offset) - 300 / windows) <= spread for offset in range(windows))


@pytest.mark.parametrize("seed", [0, 7])
def test_schedule_draws_in_the_order_that_its_states_rest_on(seed):
    """By value: a run goes on from a state only if the same seed gives the same windows in the same order."""
    lengths, weights = [61, 40], [1.0, 3.0]
    config = lb.TrainConfig(tokens=24 * 8, sequence=8, batch=4, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    texts = torch.multinomial(torch.tensor(weights).double(), 24, replacement=True, generator=generator).tolist()
    starts = {}
    for text, length in enumerate(lengths):
        starts[text] = []
        while len(starts[text]) < texts.count(text):
            offset = int(torch.randint(8, (), generator=generator))
            order = torch.randperm((length - offset) // 8, generator=generator).tolist()
            starts[text] += [sum(lengths[:text]) + offset + 8 * window for window in order]
    expected = [starts[text].pop(0) for text in texts]
    assert schedule(lengths, weights, config).flatten().tolist() == expected


def test_train_reads_the_windows_of_the_schedule(models):
    """By value, in order, each step's sequences together; the teacher and the student read the same."""
    teacher, student = copy.deepcopy(models)
    texts = [TEXT[:70], TEXT[70:]]
    config = lb.TrainConfig(**(SETTINGS | {"tokens": 3 * 128}))
    read = {teacher: [], student: []}
    for model in read:
        model.register_forward_pre_hook(
            lambda model, args, kwargs: read[model].append(kwargs["input_ids"].clone()), with_kwargs=True
        )
    lb.train_(student, teacher, texts, config, progress=False)
    expected = [
        torch.stack([TEXT[start : start + 32] for start in step]) for step in schedule([70, 58], None, config).tolist()
    ]
    for found in read.values():
        assert len(found) == len(expected) == 3
        for mine, wanted in zip(found, expected, strict=True):
            assert_same(mine, wanted)


@given(st.integers(0, 2**31))
def test_schedule_draws_in_proportion_to_the_weights(seed):
    """Within six standard deviations of a binomial count."""
    config = lb.TrainConfig(tokens=4000, sequence=1, batch=10, seed=seed)
    starts = schedule([50, 30, 20], [0, 1, 3], config).flatten()
    share = float((starts >= 80).float().mean())
    assert starts.min() >= 50
    assert abs(share - 0.75) < 6 * math.sqrt(0.75 * 0.25 / 4000)


@given(
    st.builds(
        lb.TrainConfig,
        tokens=st.integers(1, 4000),
        sequence=st.sampled_from([2, 4, 6]),
        batch=st.sampled_from([2, 4]),
        block_tokens=st.integers(0, 5000),
        long_tokens=st.integers(0, 5000),
        long_sequence=st.sampled_from([1, 2, 4]),
        frozen_tokens=st.integers(0, 5000),
    )
)
def test_phases_cover_every_step_once(config):
    found = phases(config)
    assert [phase.first for phase in found] == [0, *(phase.last for phase in found[:-1])]
    assert found[-1].last == config.steps
    steps = [(phase, step) for phase in found for step in range(phase.first, phase.last)]
    blocks, long, frozen = (
        min(config.steps, tokens // config.step_tokens)
        for tokens in (config.block_tokens, config.long_tokens, config.frozen_tokens)
    )
    for phase, step in steps:
        assert phase.begin <= phase.first < phase.last <= phase.end
        assert phase.blocks == (step < blocks)
        assert phase.frozen == (step >= max(blocks, config.steps - frozen))
        assert phase.sequence == (config.long_sequence if step >= config.steps - long else config.sequence)
    kinds = {(phase.blocks, phase.frozen): (phase.begin, phase.end) for phase in found}
    assert all(kinds[phase.blocks, phase.frozen] == (phase.begin, phase.end) for phase in found)
    assert sum(end - begin for begin, end in kinds.values()) == config.steps


def test_schedules_read_as_many_tokens_in_every_phase():
    config = lb.TrainConfig(
        tokens=1200, sequence=5, batch=4, block_tokens=200, long_tokens=400, long_sequence=10, frozen_tokens=100
    )
    drawn = schedules([300], None, config)
    assert [tuple(part.shape) for part in drawn] == [(10, 4), (30, 4), (15, 2), (5, 2)]
    short, long = torch.cat(drawn[:2]).flatten(), torch.cat(drawn[2:]).flatten()
    assert_read_in_epochs(short.numpy(), 300, config)
    assert_read_in_epochs(long.numpy(), 300, lb.TrainConfig(sequence=10))


def test_schedule_differs_from_seed_to_seed():
    config = lb.TrainConfig(tokens=400, sequence=10, batch=4)
    other = lb.TrainConfig(tokens=400, sequence=10, batch=4, seed=1)
    assert not torch.equal(schedule([500], None, config), schedule([500], None, other))


@pytest.mark.parametrize("weights", [[1], [-1, 2], [0, 0], [float("nan"), 1], [float("inf"), 1]])
def test_schedule_refuses_weights_that_cannot_be_drawn_from(weights):
    with pytest.raises(ValueError, match="weights must be one per text, not negative, and not all zero"):
        schedule([100, 100], weights, lb.TrainConfig(tokens=100, sequence=10, batch=1))


@given(st.floats(0, 1), st.floats(0, 0.99), st.floats(0, 1))
def test_learning_rate_factor_rises_then_falls(progress, warmup, final):
    config = lb.TrainConfig(warmup=warmup, final=final)
    factor = learning_rate_factor(progress, config)
    assert 0 <= factor <= 1
    if progress < warmup:
        assert factor == progress / warmup
    else:
        assert factor >= learning_rate_factor(min(1.0, progress + 0.1), config) >= min(final, factor)
    assert learning_rate_factor(warmup, config) == 1
    assert abs(learning_rate_factor(1.0, config) - final) < 1e-15


def test_train_log_says_what_was_done(whole):
    _, log = whole
    assert [entry["step"] for entry in log] == list(range(1, 9))
    assert [entry["tokens"] for entry in log] == [128 * step for step in range(1, 9)]
    config = lb.TrainConfig(**SETTINGS)
    assert [entry["lr"] for entry in log] == [0.01 * learning_rate_factor(step / 8, config) for step in range(8)]
    assert all(entry["tokens_per_s"] > 0 for entry in log)


def test_train_log_holds_means(models, whole):
    _, log = train(models, log_steps=3)
    assert [entry["step"] for entry in log] == [3, 6, 8]
    means = [losses(whole[1])[part].mean() for part in (slice(0, 3), slice(3, 6), slice(6, 8))]
    assert_within(losses(log), np.array(means), np.array(means), 3)


@pytest.mark.parametrize("rule", ["straight_through", "smooth_sign"])
def test_train_learns_its_teachers_logits(models, rule):
    """From four nats to less than one on a text that comes again and again."""
    _, log = train(models, tokens=60 * 128, rule=rule, log_steps=1)
    assert losses(log)[0] > 3
    assert losses(log)[-5:].mean() < losses(log)[0] / 4


def test_train_rules_differ(models, whole):
    _, log = train(models, rule="smooth_sign")
    assert losses(log)[0] == losses(whole[1])[0]  # the same forward pass
    assert losses(log, "grad_norm")[0] != losses(whole[1], "grad_norm")[0]


def test_train_first_loss_is_the_divergence(models, whole, conditions):
    teacher, student = copy.deepcopy(models)
    config = lb.TrainConfig(**SETTINGS)
    tokens = TEXT[schedule([len(TEXT)], None, config)[0][:, None] + torch.arange(config.sequence)]
    with torch.no_grad():
        expected = lb.kl_loss(student.double()(tokens).logits, teacher.double()(tokens).logits)
    expected = expected.numpy()[None]
    assert_within(losses(whole[1])[:1], expected, expected + conditions["loss"][:1], ROUNDINGS)


def test_train_lowers_the_hidden_state_loss(models):
    def hidden(student):
        with torch.no_grad():
            mine, theirs = (  # of copies, because transformers leaves its hooks there
                copy.deepcopy(each)(TEXT[None], output_hidden_states=True, use_cache=False).hidden_states[1:-1]
                for each in (student, models[0])
            )
        return sum(float(hidden_loss(*pair, normalize=True)) for pair in zip(mine, theirs, strict=True))

    trained, log = train(models, tokens=40 * 128, hidden=10.0)
    assert hidden(trained) < hidden(models[1]) / 2
    assert losses(log)[-1] < losses(log)[0] / 2


def test_train_block_by_block_lowers_each_blocks_error(models):
    """The first part's losses are the blocks' own; then the loss is that of the logits again."""
    _, log = train(models, tokens=60 * 128, block_tokens=40 * 128)
    blocks, logits = losses(log)[:40], losses(log)[40:]
    assert blocks[-1] < blocks[0] / 2
    assert logits[0] < 3  # the untrained model's is four
    assert log[39]["lr"] < 1e-4 < log[41]["lr"]  # each part has a schedule of its own


def test_train_reads_longer_sequences_at_the_end(models, monkeypatch):
    """With as many tokens a step, and within the one schedule of the learning rates."""
    read, real = {}, trainer.Run.batch

    def batch(self, step):
        read[step] = real(self, step)
        return read[step]

    monkeypatch.setattr(trainer.Run, "batch", batch)
    _, log = train(models, long_tokens=3 * 128, long_sequence=64)
    assert [tuple(tokens.shape) for tokens in read.values()] == [(4, 32)] * 5 + [(2, 64)] * 3
    assert [entry["tokens"] for entry in log] == [128 * step for step in range(1, 9)]
    config = lb.TrainConfig(**SETTINGS)
    assert [entry["lr"] for entry in log] == [0.01 * learning_rate_factor(step / 8, config) for step in range(8)]


def test_train_in_longer_sequences_is_train_with_that_sequence(models):
    long, log = train(models, long_tokens=8 * 128, long_sequence=64)
    whole, expected = train(models, sequence=64, batch=2)
    assert_same(losses(log), losses(expected))
    for mine, theirs in zip(long.parameters(), whole.parameters(), strict=True):
        assert_same(mine, theirs)


@pytest.mark.parametrize("optimizer", trainer.OPTIMIZERS)
def test_train_moves_no_latent_while_signs_are_frozen(models, optimizer):
    trained, log = train(models, frozen_tokens=8 * 128, optimizer=optimizer)
    before = dict(models[1].named_parameters())
    moved = {name.rsplit(".", 1)[1] for name, p in trained.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {"h", "ell", "g", "weight", "bias"}
    assert {entry["lr"] for entry in log} == {0.0}
    assert losses(log)[-1] < losses(log)[0]


def test_train_gives_each_schedule_moments_of_its_own(models, tmp_path):
    """Adam counts its steps from where the whole model begins to train, and again from where signs are frozen."""
    for tokens, counts in ((5, 2), (8, 1)):
        keeper = lb.Keeper(tmp_path / str(tokens), 0.0)
        changes = {"block_tokens": 3 * 128, "frozen_tokens": 128 if tokens == 8 else 0}
        train(models, keeper=keeper, tokens=tokens * 128, **changes)
        _, tensors, _ = keeper.last()
        assert {float(tensor) for name, tensor in tensors.items() if name.endswith(".step")} == {counts}


def test_train_with_labels_learns_the_text(models):
    """Cross-entropy alone knows of no teacher: the text, which comes again and again, is learned by heart."""

    def text_loss(student):
        with torch.no_grad():
            logits = copy.deepcopy(student)(TEXT.view(4, 32), use_cache=False).logits[:, :-1]
        return float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), TEXT.view(4, 32)[:, 1:].flatten()))

    found = {
        weight: text_loss(train(models, tokens=60 * 128, label_weight=weight, log_steps=60)[0])
        for weight in (0, 0.5, 1)
    }
    assert found[1] < found[0.5] < found[0] / 2


def test_next_tokens_end_with_no_label():
    assert_same(trainer.next_tokens(torch.tensor([[1, 2, 3], [4, 5, 6]])), torch.tensor([2, 3, -1, 5, 6, -1]))


def test_train_begins_with_scaled_latents(models):
    """The forward pass stays the same; with a rate of zero only the size of the latents has changed."""
    trained, log = train(models, tokens=128, latent_scale=0.25, lr_latents=0.0, lr_scales=0.0)
    assert losses(log)[0] == losses(train(models, tokens=128)[1])[0]
    for layer, old in zip(*(littlebit_layers(each).values() for each in (trained, models[1])), strict=True):
        for mine, before in zip(layer.factors(), old.factors(), strict=True):
            for a, b in ((mine.u, before.u), (mine.v, before.v)):
                assert torch.equal(a < 0, b < 0)
                assert_within(a.square().mean().sqrt(), np.float64(0.25), np.float64(0.25), a.numel())


@pytest.mark.parametrize("sequence", [32, 64])
def test_train_with_muon_learns(models, sequence):
    _, log = train(models, tokens=60 * 128, optimizer="muon", long_tokens=20 * 128, long_sequence=sequence)
    assert losses(log)[-5:].mean() < losses(log)[0] / 4


def test_taps_let_a_block_read_the_teachers_stream(models):
    teacher, student = copy.deepcopy(models)
    read = []
    for forced in (True, False):
        taps = Taps(list(student.model.layers), list(teacher.model.layers), forced)
        look = student.model.layers[1].register_forward_pre_hook(
            lambda module, arguments, keywords: read.append([*arguments, keywords.get("hidden_states")][0]),
            with_kwargs=True,
        )
        with torch.no_grad():
            teacher(TEXT[None], use_cache=False)
            student(TEXT[None], use_cache=False)
        assert_same(read.pop(), (taps.teacher if forced else taps.student)[0])
        assert [len(taps.student), len(taps.teacher)] == [2, 2]
        taps.remove()
        look.remove()
    assert not any(block._forward_hooks or block._forward_pre_hooks for block in student.model.layers)


@pytest.mark.parametrize("train_", ["none", "norms", "all"])
def test_train_moves_what_it_should_and_nothing_else(models, train_):
    trained, _ = train(models, train=train_, tokens=3 * 128)
    before = dict(models[1].named_parameters())
    moved = {name for name, p in trained.named_parameters() if not torch.equal(p, before[name])}
    wanted = {
        name
        for name, p in before.items()
        if ".paths." in name or train_ == "all" or (train_ == "norms" and p.ndim == 1)
    }
    assert moved == wanted


def gradients(models, **changes):
    """What the optimiser is given in each of two steps, and the log."""
    seen = []

    def keep(optimizer, *_):
        found = [master.grad for group in optimizer.param_groups for master in group["params"]]
        seen.append([gradient.clone() for gradient in found])

    handle = register_optimizer_step_pre_hook(keep)
    try:
        _, log = train(models, tokens=2 * 128, **changes)
    finally:
        handle.remove()
    return seen[1:], log  # the first step only lets the optimiser allocate its state


def test_train_clips_the_gradient_by_its_norm(models):
    """The norm is the root of all squares, within one rounding of each; a clipped step has its gradients scaled."""
    free, log = gradients(models, clip=0.0)
    norms = [math.sqrt(sum(float(each.double().square().sum()) for each in step)) for step in free]
    terms = sum(each.numel() for each in free[0]) / 2  # the root halves the relative error of a sum of squares
    assert_within(losses(log, "grad_norm"), np.array(norms), np.array(norms), terms, factor=1)
    clipped, other = gradients(models, clip=norms[0] / 4)
    assert other[0] == log[0] | {"tokens_per_s": other[0]["tokens_per_s"]}  # the log has the norm before clipping
    for mine, whole in zip(clipped[0], free[0], strict=True):
        expected = whole.double() / 4 * (norms[0] / (norms[0] + 1e-6))  # torch's clipping adds so much to the norm
        assert_within(mine, expected, expected.abs(), terms + 4, factor=1)
    assert_same(losses(other)[0], losses(log)[0])


def test_train_leaves_a_small_gradient_alone(models):
    """A largest norm that is never reached, or 0 for none at all."""
    (step, *_), _ = gradients(models, clip=1e6)
    (whole, *_), _ = gradients(models, clip=0.0)
    for mine, expected in zip(step, whole, strict=True):
        assert_same(mine, expected)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_train_in_micro_batches_draws_the_same_curve(models, whole, conditions, size):
    _, log = train(models, micro_batch=size)
    assert_same_curves(log, whole[1], conditions)
    if size == 4:
        assert_same(losses(log), losses(whole[1]))


def test_train_reads_the_text_that_is_drawn(models, whole):
    """The same windows of the same text, wherever it lies."""
    other = torch.full((40,), 7)
    config = lb.TrainConfig(**SETTINGS)
    assert_same(schedule([40, 128], [0, 1], config) - 40, schedule([128], None, config))
    assert_same(losses(train(models, [other, TEXT], weights=[0, 1])[1]), losses(whole[1]))
    assert not np.array_equal(losses(train(models, [other, TEXT], weights=[1, 0])[1]), losses(whole[1]))


def test_causal_attention_is_the_models_own(models):
    """Within the bound for float32 sums, on logits whose condition is measured with noise on the weights."""
    model = copy.deepcopy(models[0])
    with torch.no_grad():
        before = model(TEXT[None], use_cache=False).logits
        with causal_attention.causal_attention(model):
            inside = model(TEXT[None], use_cache=False).logits
        assert_same(model(TEXT[None], use_cache=False).logits, before)
        moved = torch.zeros(())
        for parameter in model.parameters():
            parameter.data *= 1 + NOISE * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
        moved = (model(TEXT[None], use_cache=False).logits - before).abs().max() / NOISE
    assert causal_attention.is_plainly_causal(model, 128)
    assert_within(inside, before, torch.full_like(before, float(moved)), ROUNDINGS)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"texts": TEXT[:31]}, "at least 32 tokens are needed, got 31"),
        ({"texts": [TEXT, torch.zeros(0, dtype=torch.int64)]}, "at least 32 tokens are needed, got 0"),
        ({"texts": TEXT[: len(TEXT) // 2 * 2].reshape(2, -1)}, r"shape \(n,\) or \(1, n\)"),
        ({"texts": TEXT + 100}, "must be from 0 to 259"),
        ({"texts": TEXT - 256}, "token -[0-9]+ is not one of"),
        ({"batch": 4, "micro_batch": 3}, "cannot be divided evenly into parts of 3"),
        ({"micro_batch": 0}, "micro_batch must be a whole number >= 1, got 0"),
        ({"micro_batch": -1}, "micro_batch must be a whole number >= 1, got -1"),
        ({"rule": "tanh"}, "rule must be one of"),
        ({"train": "some"}, "train must be one of none, norms, all, not 'some'"),
        ({"warmup": 1.0}, "warmup must be"),
        ({"warmup": -0.1}, "warmup must be"),
        ({"lr_latents": float("nan")}, "lr_latents must be a finite number"),
        ({"clip": -1.0}, "clip must be"),
        ({"block_tokens": -1}, "block_tokens must be"),
        ({"tokens": 0}, "tokens must be a whole number >= 1"),
        ({"sequence": 0}, "sequence must be a whole number >= 1"),
        ({"weights": [1, 2]}, "weights must be one per text"),
        ({"log_steps": 0}, "log_steps must be a whole number >= 1"),
        ({"long_tokens": 128, "long_sequence": 48}, "cannot be read as sequences of 48"),
        ({"long_tokens": 128, "long_sequence": 256}, "cannot be read as sequences of 256"),
        ({"long_tokens": 128, "long_sequence": 0}, "long_sequence must be a whole number >= 1"),
        ({"texts": TEXT[:100], "long_tokens": 128, "long_sequence": 128}, "at least 128 tokens are needed, got 100"),
        ({"long_tokens": -1, "long_sequence": 32}, "long_tokens must be"),
        ({"frozen_tokens": -1}, "frozen_tokens must be"),
        ({"latent_scale": -1.0}, "latent_scale must be"),
        ({"label_weight": 1.5}, "label_weight must be a finite number >= 0 and <= 1"),
        ({"label_weight": float("nan")}, "label_weight must be a finite number >= 0 and <= 1"),
        ({"optimizer": "sgd"}, "optimizer must be one of adam, muon, not 'sgd'"),
    ],
)
def test_train_refuses_settings_and_data(models, changes, message):
    with pytest.raises(ValueError, match=message):
        train(models, **changes)


def test_train_refuses_models_that_do_not_fit(models, tmp_path):
    from conftest import make_tiny_llama

    teacher, student = models
    with pytest.raises(ValueError, match="no LittleBit layer that can be trained; call quantize_ first"):
        train((teacher, teacher))
    with pytest.raises(ValueError, match="the teacher is quantised"):
        train((student, student))
    with pytest.raises(ValueError, match="no LittleBit layer that can be trained"):
        train((teacher, lb.pack_(copy.deepcopy(student))))
    other = lb.load_model(make_tiny_llama(tmp_path / "other", num_hidden_layers=1))
    with pytest.raises(ValueError, match="teacher and student do not fit each other: num_hidden_layers is 1 and 2"):
        train((other, student))


def test_train_divided_needs_processes(models):
    teacher, student = copy.deepcopy(models)
    with pytest.raises(ValueError, match="start them with torchrun"):
        lb.train_(student, teacher, TEXT, lb.TrainConfig(**SETTINGS), shard=True)


def poison(monkeypatch, at, value):
    """Let the gradient of one latent be `value` from a step on, after its loss was computed."""
    real, count = trainer.Run.average_gradients, []

    def average_gradients(self):
        real(self)
        count.append(0)
        if len(count) >= at:
            next(iter(self.masters.values())).grad.flatten()[0] = value

    monkeypatch.setattr(trainer.Run, "average_gradients", average_gradients)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("log_steps", [1, 20])
def test_train_stops_at_a_loss_that_is_not_finite(models, whole, tmp_path, monkeypatch, value, log_steps):
    """The step that spoils the parameters has a finite loss itself; its state must not be kept."""
    with monkeypatch.context() as patch:
        poison(patch, 5, value)
        with pytest.raises(lb.TrainingError, match="lower the learning rates, or look at the data; the last"):
            train(models, keeper=lb.Keeper(tmp_path, 0.0), log_steps=log_steps)
    step, tensors, _ = lb.Keeper(tmp_path).last()
    assert step == 4
    assert all(torch.isfinite(tensor).all() for tensor in tensors.values())
    trained, _ = train(models, keeper=lb.Keeper(tmp_path, 0.0), log_steps=log_steps)
    for mine, theirs in zip(trained.parameters(), whole[0].parameters(), strict=True):
        assert_same(mine, theirs)


def test_train_stops_at_parameters_that_are_not_finite(models):
    broken = copy.deepcopy(models[1])
    broken.model.norm.weight.data[3] = float("nan")
    with pytest.raises(lb.TrainingError, match="the loss is nan"):
        train((models[0], broken), log_steps=4)


@pytest.mark.parametrize("where", ["__init__", "logits"])
def test_train_names_what_to_do_about_memory(models, where, monkeypatch):
    def forward(*arguments, **keywords):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(trainer.StackedStudent, where, forward)
    with pytest.raises(lb.TrainingError, match="with 2 sequences of 32 tokens at once: lower micro_batch"):
        train(models, micro_batch=2)


def test_train_leaves_torchs_settings_as_they_were(models, whole):
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.utils.deterministic.fill_uninitialized_memory


def command(model, out, text, *more):
    settings = {"--tokens": 8 * 128, "--sequence": 32, "--batch": 4, "--lr-latents": 0.01, "--lr-scales": 0.01}
    settings |= {"--bits": 2.5, "--device": "cpu", "--log-steps": 1, "--data": text}
    return [str(word) for word in ("train", model, out, *(part for pair in settings.items() for part in pair), *more)]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A file that the byte-level tokenizer reads as 128 tokens."""
    path = tmp_path_factory.mktemp("data") / "text.txt"
    path.write_text("".join(chr(97 + token % 26) for token in TEXT.tolist()))
    return path


def logged(out):
    return [json.loads(line) for line in (out / "training.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def one_process(loud_llama, text, tmp_path_factory):
    """What one process writes, and how its losses respond to noise."""
    out = tmp_path_factory.mktemp("one") / "out"
    assert main(command(loud_llama, out, text)) == 0
    return out


@pytest.fixture(scope="module")
def command_conditions(loud_llama, models, text):
    """The conditions of what the command trains."""
    tokens = texts.text_tokens(lb.load_tokenizer(loud_llama), text)
    return measured(models, train(models, tokens)[1], tokens)


def test_command_writes_checkpoint_and_log(loud_llama, one_process, text, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(command(loud_llama, out, text, "--json")) == 0
    printed = json.loads(capsys.readouterr().out)
    log = logged(out)
    assert printed["training"] == log[-1]
    assert printed["bits_per_weight"] == lb.info(out)["bits_per_weight"] <= 2.5
    assert [entry["step"] for entry in log] == list(range(1, 9))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (out / "model.safetensors").read_bytes() == (one_process / "model.safetensors").read_bytes()
    assert lb.generate(lb.load(out), "abc", 3, tokenizer=lb.load_tokenizer(out))


def test_command_reads_compressed_text(loud_llama, one_process, text, tmp_path, capsys):
    packed, out = tmp_path / "text.txt.xz", tmp_path / "out"
    packed.write_bytes(lzma.compress(text.read_bytes()))
    assert main(command(loud_llama, out, packed)) == 0
    assert "last loss" in capsys.readouterr().out
    assert (out / "model.safetensors").read_bytes() == (one_process / "model.safetensors").read_bytes()


def test_command_reads_tokens(loud_llama, one_process, text, tmp_path):
    tokens, out = tmp_path / "tokens.npy", tmp_path / "out"
    np.save(tokens, texts.text_tokens(lb.load_tokenizer(loud_llama), text).numpy().astype(np.uint16))
    assert main(command(loud_llama, out, tokens)) == 0
    assert (out / "model.safetensors").read_bytes() == (one_process / "model.safetensors").read_bytes()


@pytest.mark.parametrize("content", [b"", b"some text"])
def test_command_refuses_what_is_no_array(loud_llama, tmp_path, capsys, content):
    (tmp_path / "tokens.npy").write_bytes(content)
    assert main(command(loud_llama, tmp_path / "out", tmp_path / "tokens.npy")) == 2
    assert "tokens.npy is not an array that NumPy can read" in capsys.readouterr().err


@pytest.mark.parametrize("values", [np.zeros((2, 3), np.uint16), np.zeros(300, np.float32)])
def test_command_refuses_arrays_that_hold_no_tokens(loud_llama, tmp_path, capsys, values):
    np.save(tmp_path / "tokens.npy", values)
    assert main(command(loud_llama, tmp_path / "out", tmp_path / "tokens.npy")) == 2
    assert "tokens.npy must hold token ids, integers of shape (n,)" in capsys.readouterr().err


def test_long_texts_are_tokenised_once(loud_llama, tmp_path, monkeypatch):
    """In pieces, of which this tokenizer, which reads bytes, makes the same tokens; another text has others."""
    monkeypatch.setattr(texts, "LONG_TEXT", 10)
    monkeypatch.setenv("LITTLEBIT_CACHE", str(tmp_path / "cache"))
    tokenizer, file = lb.load_tokenizer(loud_llama), tmp_path / "text.txt"
    file.write_text("It was the best of times.\n\nIt was the worst of times.\n\n\nThe age of wisdom.")
    expected = texts.text_tokens(tokenizer, file)
    assert_same(texts.training_tokens(tokenizer, file), expected)
    with monkeypatch.context() as patch:
        patch.setattr(texts, "read_text", lambda path: pytest.fail("tokenised again"))
        assert_same(texts.training_tokens(tokenizer, file), expected)
    file.write_text("It was the age of foolishness.")
    assert_same(texts.training_tokens(tokenizer, file), texts.text_tokens(tokenizer, file))
    packed = tmp_path / "text.txt.xz"
    packed.write_bytes(lzma.compress(file.read_bytes()))
    assert_same(texts.training_tokens(tokenizer, packed), texts.text_tokens(tokenizer, file))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("binary.txt", b"\xff\xfe\x00\x81", "is not a UTF-8 text file"),
        ("broken.xz", lzma.compress(b"text" * 100)[:-20], "is not a UTF-8 text file"),
        ("plain.xz", b"text", "is not a UTF-8 text file"),
        ("missing.txt", None, "missing.txt"),
        ("empty.txt", b"", "at least 32 tokens are needed, got 0"),
        ("short.txt", b"too short", "at least 32 tokens are needed, got 9"),
    ],
)
def test_command_says_what_is_wrong_with_the_data(loud_llama, tmp_path, capsys, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    assert main(command(loud_llama, tmp_path / "out", tmp_path / name)) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("littlebit: error: ")
    assert message in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--device", "cuda"], "torch sees no GPU"),
        (["--shard"], "torchrun"),
    ],
)
def test_command_refuses_what_cannot_be_done(loud_llama, text, tmp_path, capsys, more, message):
    if "cuda" in more and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert main(command(loud_llama, tmp_path / "out", text, *more)) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def assert_same_checkpoint(out, one_process, conditions):
    """Same losses within the bound, and a checkpoint of the same size that works."""
    assert_same_curves(logged(out), logged(one_process), conditions)
    stored, expected = lb.info(out), lb.info(one_process)
    for each in (stored, expected):
        each.pop("path", None)
    assert stored == expected
    assert lb.generate(lb.load(out), "abc", 3, tokenizer=lb.load_tokenizer(out))


@pytest.mark.parametrize("more", [[], ["--shard"], ["--micro-batch", "1", "--train", "all"]])
def test_command_in_two_processes_draws_the_same_curve(
    loud_llama, text, one_process, command_conditions, tmp_path, more
):
    out, printed = tmp_path / "out", [tmp_path / "first", tmp_path / "second"]
    processes = workers.group([command(loud_llama, out, text, *more)] * 2, printed)
    assert [workers.ended(process) for process in processes] == [0, 0], printed[0].read_text()
    if "all" not in more:
        assert_same_checkpoint(out, one_process, command_conditions)
    assert "last loss" in printed[0].read_text()
    assert "last loss" not in printed[1].read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["first", "out", "second"]


@pytest.mark.parametrize(("more", "kills"), [([], (2, 5)), (["--shard", "--log-steps", "4"], (3,))])
def test_command_in_two_processes_goes_on_after_a_kill(loud_llama, text, tmp_path, more, kills):
    """Also within and after the part that trains block by block, in which the last norm has no gradient."""
    words = ["--block-tokens", "512", "--save-minutes", "0", *more]
    whole_run, out = tmp_path / "whole", tmp_path / "out"
    outputs = [tmp_path / "first", tmp_path / "second"]
    processes = workers.group([command(loud_llama, whole_run, text, *words)] * 2, outputs)
    assert [workers.ended(process) for process in processes] == [0, 0], outputs[0].read_text()
    for step in kills:
        processes = workers.group([command(loud_llama, out, text, *words)] * 2, outputs)
        while processes[0].is_alive() and not any(
            (out.with_name("out.training") / f"step-{at}").exists() for at in range(step, 9)
        ):
            processes[0].join(0.002)
        for process in processes:
            process.kill()
            workers.ended(process)
    processes = workers.group([command(loud_llama, out, text, *words)] * 2, outputs)
    assert [workers.ended(process) for process in processes] == [0, 0], outputs[0].read_text()
    assert (out / "model.safetensors").read_bytes() == (whole_run / "model.safetensors").read_bytes()
    assert [entry["loss"] for entry in logged(out)] == [entry["loss"] for entry in logged(whole_run)]


def test_command_in_two_processes_begins_with_the_first_ones_factors(loud_llama, text, tmp_path):
    """Where rounding differs between processes, so do factors; here they do because they are found differently."""
    outputs, written = [tmp_path / "first", tmp_path / "second"], []
    for init in ("itq", "dual-svid"):
        out = tmp_path / init
        commands = [command(loud_llama, out, text, "--init", each) for each in ("itq", init)]
        processes = workers.group(commands, outputs)
        assert [workers.ended(process) for process in processes] == [0, 0], outputs[0].read_text()
        written.append((out / "model.safetensors").read_bytes())
    assert written[0] == written[1]


def test_command_in_two_processes_stops_in_all_when_one_is_told(loud_llama, text, tmp_path):
    words = command(loud_llama, tmp_path / "out", text, "--tokens", str(400 * 128), "--log-steps", "2")
    outputs, log = [tmp_path / "first", tmp_path / "second"], tmp_path / "out.training" / "log.jsonl"
    processes = workers.group([words] * 2, outputs)
    while processes[1].is_alive() and not (log.exists() and log.read_text()):
        processes[1].join(0.01)
    os.kill(processes[1].pid, signal.SIGTERM)
    assert [workers.ended(process) for process in processes] == [143, 143]
    (state,) = log.parent.glob("step-*")
    assert all(f"step {state.name[5:]}; its state is saved" in output.read_text() for output in outputs)


def test_command_in_two_processes_refuses_a_step_that_cannot_be_divided(loud_llama, text, tmp_path):
    outputs = [tmp_path / "first", tmp_path / "second"]
    processes = workers.group([command(loud_llama, tmp_path / "out", text, "--batch", "3")] * 2, outputs)
    assert [workers.ended(process) for process in processes] == [2, 2]
    assert "3 sequences cannot be divided evenly among 2 processes" in outputs[0].read_text()


def test_command_under_torchrun(loud_llama, text, one_process, command_conditions, tmp_path):
    out = tmp_path / "out"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*launch, "-m", "littlebit.fast", *command(loud_llama, out, text, "--shard", "--threads", "1")],
        capture_output=True,
        text=True,
        timeout=workers.TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert_same_checkpoint(out, one_process, command_conditions)
