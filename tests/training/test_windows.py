"""Test the order of the training data, the phases of a run, and the learning rate."""

import math

import littlebit.fast as lb
import numpy as np
import pytest
import torch
from compare import assert_same
from hypothesis import given, strategies as st
from littlebit.fast.training.phases import learning_rate_factor, phases
from littlebit.fast.training.windows import phase_window_starts, window_starts

configs = st.builds(
    lb.TrainConfig,
    total_tokens=st.integers(1, 4000),
    sequence_length=st.integers(1, 40),
    batch_size=st.integers(1, 9),
    seed=st.integers(0, 2**31),
)


@given(configs, st.data())
def test_window_starts_reads_every_text_in_whole_windows(config, data):
    lengths = data.draw(st.lists(st.integers(config.sequence_length, 200), min_size=1, max_size=4))
    count = len(lengths)
    weights = data.draw(st.none() | st.lists(st.sampled_from([0, 1, 2.5]), min_size=count, max_size=count))
    weights = weights if weights and sum(weights) else None
    starts = window_starts(lengths, weights, config)
    assert starts.shape == (config.steps, config.batch_size)
    assert starts.dtype == torch.int64
    assert_same(starts, window_starts(lengths, weights, config))
    ends = np.cumsum(lengths)
    source = np.searchsorted(ends, starts.flatten().numpy(), side="right")
    assert ((starts.flatten().numpy() + config.sequence_length) <= ends[source]).all()
    drawn = set(source.tolist())
    assert all((lengths if weights is None else weights)[at] > 0 for at in drawn)
    for at in drawn:
        assert_read_in_epochs(starts.flatten().numpy()[source == at] - ends[at] + lengths[at], lengths[at], config)


def assert_read_in_epochs(starts, length, config):
    """Every epoch is all windows from one offset, each once, before any comes again; the last may be cut short."""
    while len(starts):
        offset = starts[0] % config.sequence_length
        windows = (length - offset) // config.sequence_length
        epoch, starts = starts[:windows], starts[windows:]
        assert len(set(epoch)) == len(epoch)
        assert set(epoch % config.sequence_length) == {offset}


@given(st.integers(1, 12), st.integers(0, 30), st.integers(0, 2**31))
def test_window_starts_begins_each_epoch_at_a_random_offset(sequence, more, seed):
    """Every offset that leaves a whole window comes up, equally often: each of 300 epochs draws one."""
    length = sequence + more
    offsets, windows = [], 0
    for epoch in range(300):
        config = lb.TrainConfig(total_tokens=sequence, sequence_length=sequence, batch_size=1, seed=seed + epoch)
        offsets.append(int(window_starts([length], None, config)[0, 0]) % sequence)
        windows = min(sequence, length - sequence + 1)
    assert set(offsets) <= set(range(windows))
    # each count is binomial with 300 draws: 6 standard deviations are passed once in 10^8 cases
    spread = 6 * np.sqrt(300 / windows * (1 - 1 / windows))
    assert all(abs(offsets.count(offset) - 300 / windows) <= spread for offset in range(windows))


@pytest.mark.parametrize("seed", [0, 7])
def test_window_starts_draws_in_the_order_that_its_states_rest_on(seed):
    """By value: a run goes on from a state only if the same seed gives the same windows in the same order."""
    lengths, weights = [61, 40], [1.0, 3.0]
    config = lb.TrainConfig(total_tokens=24 * 8, sequence_length=8, batch_size=4, seed=seed)
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
    assert window_starts(lengths, weights, config).flatten().tolist() == expected


@given(st.integers(0, 2**31))
def test_window_starts_draws_in_proportion_to_the_weights(seed):
    """Within six standard deviations of a binomial count."""
    config = lb.TrainConfig(total_tokens=4000, sequence_length=1, batch_size=10, seed=seed)
    starts = window_starts([50, 30, 20], [0, 1, 3], config).flatten()
    share = float((starts >= 80).float().mean())
    assert starts.min() >= 50
    assert abs(share - 0.75) < 6 * math.sqrt(0.75 * 0.25 / 4000)


@given(
    st.builds(
        lb.TrainConfig,
        total_tokens=st.integers(1, 4000),
        sequence_length=st.sampled_from([2, 4, 6]),
        batch_size=st.sampled_from([2, 4]),
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
        assert phase.sequence == (config.long_sequence if step >= config.steps - long else config.sequence_length)
    kinds = {(phase.blocks, phase.frozen): (phase.begin, phase.end) for phase in found}
    assert all(kinds[phase.blocks, phase.frozen] == (phase.begin, phase.end) for phase in found)
    assert sum(end - begin for begin, end in kinds.values()) == config.steps


def test_phase_window_starts_read_as_many_tokens_in_every_phase():
    config = lb.TrainConfig(
        total_tokens=1200,
        sequence_length=5,
        batch_size=4,
        block_tokens=200,
        long_tokens=400,
        long_sequence=10,
        frozen_tokens=100,
    )
    drawn = phase_window_starts([300], None, config)
    assert [tuple(part.shape) for part in drawn] == [(10, 4), (30, 4), (15, 2), (5, 2)]
    short, long = torch.cat(drawn[:2]).flatten(), torch.cat(drawn[2:]).flatten()
    assert_read_in_epochs(short.numpy(), 300, config)
    assert_read_in_epochs(long.numpy(), 300, lb.TrainConfig(sequence_length=10))


def test_window_starts_differs_from_seed_to_seed():
    config = lb.TrainConfig(total_tokens=400, sequence_length=10, batch_size=4)
    other = lb.TrainConfig(total_tokens=400, sequence_length=10, batch_size=4, seed=1)
    assert not torch.equal(window_starts([500], None, config), window_starts([500], None, other))


@pytest.mark.parametrize("weights", [[1], [-1, 2], [0, 0], [float("nan"), 1], [float("inf"), 1]])
def test_window_starts_refuses_weights_that_cannot_be_drawn_from(weights):
    with pytest.raises(ValueError, match="weights must be one per text, finite, not negative, and not all zero"):
        window_starts([100, 100], weights, lb.TrainConfig(total_tokens=100, sequence_length=10, batch_size=1))


@given(st.floats(0, 1), st.floats(0, 0.99), st.floats(0, 1))
def test_learning_rate_factor_rises_then_falls(progress, warmup, final):
    config = lb.TrainConfig(warmup=warmup, final_lr_fraction=final)
    factor = learning_rate_factor(progress, config)
    assert 0 <= factor <= 1
    if progress < warmup:
        assert factor == progress / warmup
    else:
        assert factor >= learning_rate_factor(min(1.0, progress + 0.1), config) >= min(final, factor)
    assert learning_rate_factor(warmup, config) == 1
    assert abs(learning_rate_factor(1.0, config) - final) < 1e-15
