"""Test training of whole models: what moves, that it learns, the step, and what it refuses."""

import copy
import math

import littlebit.fast as lb
import numpy as np
import pytest
import torch
from compare import assert_same, assert_within
from littlebit.fast.distill import hidden_loss
from littlebit.fast.linear import linear
from littlebit.fast.models.layers import LatentModule
from littlebit.fast.models.quantize import replace_modules
from littlebit.fast.training import causal_attention, trainer
from littlebit.fast.training.config import OPTIMIZERS, RENAMED_SETTINGS
from littlebit.fast.training.hidden_states import HiddenStateHooks
from littlebit.fast.training.phases import learning_rate_factor
from littlebit.fast.training.student import littlebit_layers
from littlebit.fast.training.windows import window_starts
from torch.optim.optimizer import register_optimizer_step_pre_hook
from training_runs import (
    NOISE,
    ROUNDINGS,
    SETTINGS,
    TEXT,
    assert_same_curves,
    losses,
    measured,
    one_thread,  # noqa: F401 (a fixture of this module)
    teacher_and_student,
    train,
)


@pytest.fixture(scope="module")
def models(loud_llama):
    return teacher_and_student(loud_llama)


@pytest.fixture(scope="module")
def whole(models):
    return train(models)


@pytest.fixture(scope="module")
def conditions(models, whole):
    return measured(models, whole[1])


def test_train_reads_the_windows_of_the_schedule(models):
    """By value, in order, each step's sequences together; the teacher and the student read the same."""
    teacher, student = copy.deepcopy(models)
    texts = [TEXT[:70], TEXT[70:]]
    config = lb.TrainConfig(**(SETTINGS | {"total_tokens": 3 * 128}))
    read = {teacher: [], student: []}
    for model in read:
        model.register_forward_pre_hook(
            lambda model, args, kwargs: read[model].append(kwargs["input_ids"].clone()), with_kwargs=True
        )
    lb.train_(student, teacher, texts, config, progress=False)
    expected = [
        torch.stack([TEXT[start : start + 32] for start in step])
        for step in window_starts([70, 58], None, config).tolist()
    ]
    for found in read.values():
        assert len(found) == len(expected) == 3
        for mine, wanted in zip(found, expected, strict=True):
            assert_same(mine, wanted)


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
    _, log = train(models, total_tokens=60 * 128, rule=rule, log_steps=1)
    assert losses(log)[0] > 3
    assert losses(log)[-5:].mean() < losses(log)[0] / 4


def test_train_rules_differ(models, whole):
    _, log = train(models, rule="smooth_sign")
    assert losses(log)[0] == losses(whole[1])[0]  # the same forward pass
    assert losses(log, "grad_norm")[0] != losses(whole[1], "grad_norm")[0]


def test_train_first_loss_is_the_divergence(models, whole, conditions):
    teacher, student = copy.deepcopy(models)
    config = lb.TrainConfig(**SETTINGS)
    tokens = TEXT[window_starts([len(TEXT)], None, config)[0][:, None] + torch.arange(config.sequence_length)]
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

    trained, log = train(models, total_tokens=40 * 128, hidden_loss_weight=10.0)
    assert hidden(trained) < hidden(models[1]) / 2
    assert losses(log)[-1] < losses(log)[0] / 2


def test_train_block_by_block_lowers_each_blocks_error(models):
    """The first part's losses are the blocks' own; then the loss is that of the logits again."""
    _, log = train(models, total_tokens=60 * 128, block_tokens=40 * 128)
    blocks, logits = losses(log)[:40], losses(log)[40:]
    assert blocks[-1] < blocks[0] / 2
    assert logits[0] < 3  # the untrained model's is four
    assert log[39]["lr"] < 1e-4 < log[41]["lr"]  # each part has a schedule of its own


def test_train_reads_longer_sequences_at_the_end(models, monkeypatch):
    """With as many tokens a step, and within the one schedule of the learning rates."""
    read, real = {}, trainer.Trainer.batch

    def batch(self, step):
        read[step] = real(self, step)
        return read[step]

    monkeypatch.setattr(trainer.Trainer, "batch", batch)
    _, log = train(models, long_tokens=3 * 128, long_sequence=64)
    assert [tuple(tokens.shape) for tokens in read.values()] == [(4, 32)] * 5 + [(2, 64)] * 3
    assert [entry["tokens"] for entry in log] == [128 * step for step in range(1, 9)]
    config = lb.TrainConfig(**SETTINGS)
    assert [entry["lr"] for entry in log] == [0.01 * learning_rate_factor(step / 8, config) for step in range(8)]


def test_train_in_longer_sequences_is_train_with_that_sequence(models):
    long, log = train(models, long_tokens=8 * 128, long_sequence=64)
    whole, expected = train(models, sequence_length=64, batch_size=2)
    assert_same(losses(log), losses(expected))
    for mine, theirs in zip(long.parameters(), whole.parameters(), strict=True):
        assert_same(mine, theirs)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
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
        checkpointer = lb.Checkpointer(tmp_path / str(tokens), 0.0)
        changes = {"block_tokens": 3 * 128, "frozen_tokens": 128 if tokens == 8 else 0}
        train(models, checkpointer=checkpointer, total_tokens=tokens * 128, **changes)
        _, tensors, _ = checkpointer.load()
        assert {float(tensor) for name, tensor in tensors.items() if name.endswith(".step")} == {counts}


def test_train_with_labels_learns_the_text(models):
    """Cross-entropy alone knows of no teacher: the text, which comes again and again, is learned by heart."""

    def text_loss(student):
        with torch.no_grad():
            logits = copy.deepcopy(student)(TEXT.view(4, 32), use_cache=False).logits[:, :-1]
        return float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), TEXT.view(4, 32)[:, 1:].flatten()))

    found = {
        weight: text_loss(train(models, total_tokens=60 * 128, label_weight=weight, log_steps=60)[0])
        for weight in (0, 0.5, 1)
    }
    assert found[1] < found[0.5] < found[0] / 2


def test_next_tokens_end_with_no_label():
    assert_same(trainer.next_tokens(torch.tensor([[1, 2, 3], [4, 5, 6]])), torch.tensor([2, 3, -1, 5, 6, -1]))


def test_train_begins_with_scaled_latents(models):
    """The forward pass stays the same; with a rate of zero only the size of the latents has changed."""
    trained, log = train(models, total_tokens=128, latent_scale=0.25, lr_latents=0.0, lr_scales=0.0)
    assert losses(log)[0] == losses(train(models, total_tokens=128)[1])[0]
    for layer, old in zip(*(littlebit_layers(each).values() for each in (trained, models[1])), strict=True):
        for mine, before in zip(layer.factors(), old.factors(), strict=True):
            for a, b in ((mine.u, before.u), (mine.v, before.v)):
                assert torch.equal(a < 0, b < 0)
                assert_within(a.square().mean().sqrt(), np.float64(0.25), np.float64(0.25), a.numel())


@pytest.mark.parametrize("sequence", [32, 64])
def test_train_with_muon_learns(models, sequence):
    _, log = train(models, total_tokens=60 * 128, optimizer="muon", long_tokens=20 * 128, long_sequence=sequence)
    assert losses(log)[-5:].mean() < losses(log)[0] / 4


def test_hooks_let_a_block_read_the_teachers_stream(models):
    teacher, student = copy.deepcopy(models)
    read = []
    for forced in (True, False):
        hooks = HiddenStateHooks(list(student.model.layers), list(teacher.model.layers), forced)
        look = student.model.layers[1].register_forward_pre_hook(
            lambda module, arguments, keywords: read.append([*arguments, keywords.get("hidden_states")][0]),
            with_kwargs=True,
        )
        with torch.no_grad():
            teacher(TEXT[None], use_cache=False)
            student(TEXT[None], use_cache=False)
        assert_same(read.pop(), (hooks.teacher if forced else hooks.student)[0])
        assert [len(hooks.student), len(hooks.teacher)] == [2, 2]
        hooks.remove()
        look.remove()
    assert not any(block._forward_hooks or block._forward_pre_hooks for block in student.model.layers)


@pytest.mark.parametrize("train_", ["none", "norms", "all"])
def test_train_moves_what_it_should_and_nothing_else(models, train_):
    trained, _ = train(models, train=train_, total_tokens=3 * 128)
    before = dict(models[1].named_parameters())
    moved = {name for name, p in trained.named_parameters() if not torch.equal(p, before[name])}
    wanted = {
        name
        for name, p in before.items()
        if ".paths." in name or train_ == "all" or (train_ == "norms" and p.ndim == 1)
    }
    assert moved == wanted


def gradients(models, **changes):
    """Train two steps, and return the gradients that the optimizer got in each, and the log."""
    seen = []

    def keep(optimizer, *_):
        found = [master.grad for group in optimizer.param_groups for master in group["params"]]
        seen.append([gradient.clone() for gradient in found])

    handle = register_optimizer_step_pre_hook(keep)
    try:
        _, log = train(models, total_tokens=2 * 128, **changes)
    finally:
        handle.remove()
    return seen[1:], log  # the first step only lets the optimiser allocate its state


def test_train_clips_the_gradient_by_its_norm(models):
    """The norm is the root of all squares, within one rounding of each; a clipped step has its gradients scaled."""
    free, log = gradients(models, max_grad_norm=0.0)
    norms = [math.sqrt(sum(float(each.double().square().sum()) for each in step)) for step in free]
    terms = sum(each.numel() for each in free[0]) / 2  # the root halves the relative error of a sum of squares
    assert_within(losses(log, "grad_norm"), np.array(norms), np.array(norms), terms, factor=1)
    clipped, other = gradients(models, max_grad_norm=norms[0] / 4)
    assert other[0] == log[0] | {"tokens_per_s": other[0]["tokens_per_s"]}  # the log has the norm before clipping
    for mine, whole in zip(clipped[0], free[0], strict=True):
        expected = whole.double() / 4 * (norms[0] / (norms[0] + 1e-6))  # torch's clipping adds so much to the norm
        assert_within(mine, expected, expected.abs(), terms + 4, factor=1)
    assert_same(losses(other)[0], losses(log)[0])


def test_train_leaves_a_small_gradient_alone(models):
    """A largest norm that is never reached, or 0 for none at all."""
    (step, *_), _ = gradients(models, max_grad_norm=1e6)
    (whole, *_), _ = gradients(models, max_grad_norm=0.0)
    for mine, expected in zip(step, whole, strict=True):
        assert_same(mine, expected)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_train_in_micro_batches_draws_the_same_curve(models, whole, conditions, size):
    _, log = train(models, micro_batch=size)
    assert_same_curves(log, whole[1], conditions)
    if size == 4:
        assert_same(losses(log), losses(whole[1]))


class OtherLinear(LatentModule):
    """A layer that `train_` knows nothing of, with the parameters and the output of a LittleBitLinear."""

    latents = ("u", "v")

    def __init__(self, layer):
        super().__init__()
        (path,) = layer.factors()
        for name, tensor in path._asdict().items():
            self.register_parameter(name, torch.nn.Parameter(tensor.detach().clone()))

    def forward(self, x):
        return linear(x, [lb.Factors(self.u, self.v, self.h, self.ell, self.g)], None, self.rule)


def test_train_learns_with_layers_of_another_kind():
    teacher, own = lb.load_model("tiny"), lb.load_model("tiny")  # It has no biases.
    lb.quantize_(own, lb.Config(bits=2.5, paths=1), progress=False)
    other = copy.deepcopy(own)
    replace_modules(other, {name: OtherLinear(layer) for name, layer in littlebit_layers(other).items()})
    changes = {"rule": "smooth_sign", "latent_scale": 0.1}
    expected = train((teacher, own), **changes)
    student, log = train((teacher, other), **changes)
    assert_same_curves(log, expected[1], measured((teacher, own), expected[1], **changes))
    assert all(module.rule == "smooth_sign" for module in student.modules() if isinstance(module, OtherLinear))


def test_train_reads_the_text_that_is_drawn(models, whole):
    """The same windows of the same text, wherever it lies."""
    other = torch.full((40,), 7)
    config = lb.TrainConfig(**SETTINGS)
    assert_same(window_starts([40, 128], [0, 1], config) - 40, window_starts([128], None, config))
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
        ({"texts": TEXT - 256}, "must be from 0 to 259, .* got -"),
        ({"batch_size": 4, "micro_batch": 3}, "micro_batch must divide the 4 sequences .* got 3"),
        ({"micro_batch": 0}, "micro_batch must be a whole number >= 1, got 0"),
        ({"micro_batch": -1}, "micro_batch must be a whole number >= 1, got -1"),
        ({"rule": "tanh"}, "rule must be one of"),
        ({"train": "some"}, "train must be one of none, norms, all, got 'some'"),
        ({"warmup": 1.0}, "warmup must be"),
        ({"warmup": -0.1}, "warmup must be"),
        ({"lr_latents": float("nan")}, "lr_latents must be a finite number"),
        ({"max_grad_norm": -1.0}, "max_grad_norm must be"),
        ({"block_tokens": -1}, "block_tokens must be"),
        ({"total_tokens": 0}, "total_tokens must be a whole number >= 1"),
        ({"sequence_length": 0}, "sequence_length must be a whole number >= 1"),
        ({"weights": [1, 2]}, "weights must be one per text"),
        ({"log_steps": 0}, "log_steps must be a whole number >= 1"),
        ({"long_tokens": 128, "long_sequence": 48}, "long_sequence must divide the 4 x 32 tokens .* got 48"),
        ({"long_tokens": 128, "long_sequence": 256}, "long_sequence must divide the 4 x 32 tokens .* got 256"),
        ({"long_tokens": 128, "long_sequence": 0}, "long_sequence must be a whole number >= 1"),
        ({"texts": TEXT[:100], "long_tokens": 128, "long_sequence": 128}, "at least 128 tokens are needed, got 100"),
        ({"long_tokens": -1, "long_sequence": 32}, "long_tokens must be"),
        ({"frozen_tokens": -1}, "frozen_tokens must be"),
        ({"latent_scale": -1.0}, "latent_scale must be"),
        ({"label_weight": 1.5}, "label_weight must be a finite number >= 0 and <= 1"),
        ({"label_weight": float("nan")}, "label_weight must be a finite number >= 0 and <= 1"),
        ({"optimizer": "sgd"}, "optimizer must be one of adam, muon, got 'sgd'"),
    ],
)
def test_train_refuses_settings_and_data(models, changes, message):
    with pytest.raises(ValueError, match=message):
        train(models, **changes)


def test_train_refuses_models_that_do_not_fit(models, tmp_path):
    from conftest import make_tiny_llama

    teacher, student = models
    with pytest.raises(ValueError, match="must have LittleBit layers in training form, got none: call quantize_"):
        train((teacher, teacher))
    with pytest.raises(ValueError, match="the teacher must be a dense model"):
        train((student, student))
    with pytest.raises(ValueError, match="must have LittleBit layers in training form"):
        train((teacher, lb.pack_(copy.deepcopy(student))))
    other = lb.load_model(make_tiny_llama(tmp_path / "other", num_hidden_layers=1))
    with pytest.raises(ValueError, match="must have the same num_hidden_layers, got 1 and 2"):
        train((other, student))


def test_train_divided_needs_processes(models):
    teacher, student = copy.deepcopy(models)
    with pytest.raises(ValueError, match="start them with torchrun"):
        lb.train_(student, teacher, TEXT, lb.TrainConfig(**SETTINGS), shard=True)


def poison(monkeypatch, at, value):
    """Let the gradient of one latent be `value` from a step on, after its loss was computed."""
    real, count = trainer.Trainer.average_gradients, []

    def average_gradients(self, recorder):
        real(self, recorder)
        count.append(0)
        if len(count) >= at:
            next(iter(self.masters.values())).grad.flatten()[0] = value

    monkeypatch.setattr(trainer.Trainer, "average_gradients", average_gradients)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("log_steps", [1, 20])
def test_train_stops_at_a_loss_that_is_not_finite(models, whole, tmp_path, monkeypatch, value, log_steps):
    """The step that spoils the parameters has a finite loss itself; its state must not be kept."""
    with monkeypatch.context() as patch:
        poison(patch, 5, value)
        with pytest.raises(lb.TrainingError, match="lower the learning rates, or check the data; the last"):
            train(models, checkpointer=lb.Checkpointer(tmp_path, 0.0), log_steps=log_steps)
    step, tensors, _ = lb.Checkpointer(tmp_path).load()
    assert step == 4
    assert all(torch.isfinite(tensor).all() for tensor in tensors.values())
    trained, _ = train(models, checkpointer=lb.Checkpointer(tmp_path, 0.0), log_steps=log_steps)
    for mine, theirs in zip(trained.parameters(), whole[0].parameters(), strict=True):
        assert_same(mine, theirs)


def test_train_stops_at_parameters_that_are_not_finite(models):
    broken = copy.deepcopy(models[1])
    broken.model.norm.weight.data[3] = float("nan")
    with pytest.raises(lb.TrainingError, match="must be finite, got nan"):
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


def test_old_names_of_settings_still_work(models, tmp_path):
    """Every old keyword warns with its new name, and so does the old name of the checkpointer."""
    for (old, new), value in zip(RENAMED_SETTINGS.items(), (64, 8, 2, 0.5, 0.25, 0.125, False), strict=True):
        with pytest.warns(DeprecationWarning, match=rf"TrainConfig\({old}=...\) is now TrainConfig\({new}=...\)"):
            assert lb.TrainConfig(**{old: value}) == lb.TrainConfig(**{new: value})
        assert getattr(lb.TrainConfig(**{new: value}), new) == value
    teacher, student = copy.deepcopy(models)
    with pytest.warns(DeprecationWarning, match="Keeper is now littlebit.fast.Checkpointer"):
        keeper = lb.Keeper(tmp_path, 0.0)
    with pytest.warns(DeprecationWarning, match=r"train_\(keeper=...\) is now train_\(checkpointer=...\)"):
        lb.train_(student, teacher, TEXT, lb.TrainConfig(128, 32, 4), keeper=keeper, progress=False)
    assert keeper.states()
