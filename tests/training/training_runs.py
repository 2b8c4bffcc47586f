"""Run short training runs, and compare their losses within what rounding explains.

Where two runs compute the same in another order, their losses drift apart like the losses of runs whose parameters
begin with a little noise. That is measured: losses move by a factor times the noise, and eps times the roundings of a
step is the noise that rounding makes (see test_train.py).
"""

import copy

import littlebit.fast as lb
import numpy as np
import pytest
import torch
from compare import assert_within

NOISE = 2.0**-12  # far above float32's rounding
TEXT = torch.randint(0, 256, (128,), generator=torch.Generator().manual_seed(0))
SETTINGS = {"total_tokens": 8 * 128, "sequence_length": 32, "batch_size": 4, "lr_latents": 0.01, "lr_scales": 0.01}
# Roundings of a loss: the longest sums of each layer forward and backward, 14 layers, and the sum over a batch
ROUNDINGS = 2 * 14 * (64 + 96 + 32) + 128


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Run torch on one thread in the modules that import this."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def teacher_and_student(path):
    """Load a teacher, and quantize a copy of it."""
    teacher = lb.load_model(path)
    student = copy.deepcopy(teacher)
    lb.quantize_(student, lb.Config(bits=2.5), progress=False)
    return teacher, student


def train(models, texts=TEXT, checkpointer=None, weights=None, log_steps=1, **changes):
    """Train copies of the models, and return the trained student and the log."""
    teacher, student = copy.deepcopy(models)
    config = lb.TrainConfig(**(SETTINGS | changes))
    log = lb.train_(student, teacher, texts, config, weights, checkpointer, log_steps=log_steps, progress=False)
    return student, log


def losses(log, key="loss"):
    return np.array([entry[key] for entry in log], np.float32)


def measured(models, log, texts=TEXT, **changes):
    """Measure how far losses and gradient norms move per unit of noise at the start: the most of four draws."""
    rng, moved = torch.Generator().manual_seed(0), []
    for _ in range(4):
        noisy = copy.deepcopy(models[1])
        for parameter in noisy.parameters():
            parameter.data *= 1 + NOISE * torch.randn(parameter.shape, generator=rng)
        moved.append(train((models[0], noisy), texts, **changes)[1])

    def condition(key):
        return np.maximum.accumulate(np.max([abs(losses(each, key) - losses(log, key)) for each in moved], 0)) / NOISE

    return {key: condition(key) for key in ("loss", "grad_norm")}


def assert_same_curves(log, whole, conditions):
    for key, condition in conditions.items():
        expected = losses(whole, key)
        assert_within(losses(log, key), expected, expected + condition, ROUNDINGS)
