"""Divide a training run into phases, and compute the learning rate of a step."""

import math
from itertools import pairwise
from typing import NamedTuple

from .config import TrainConfig


class Phase(NamedTuple):
    """Describe the steps from `first` to before `last`, which train in the same way.

    Attributes
    ----------
    first, last : int
        Steps of the phase: first <= step < last.
    begin, end : int
        Steps of its learning-rate schedule, which may span several phases.
    sequence : int
        Tokens in a sequence.
    blocks : bool
        Whether each block is trained alone.
    frozen : bool
        Whether the signs are frozen.
    """

    first: int
    last: int
    begin: int
    end: int
    sequence: int
    blocks: bool
    frozen: bool


def phases(config: TrainConfig) -> list[Phase]:
    """List the phases of a training run: blocks alone, the whole model, then with frozen signs.

    Each of these three has its own learning-rate schedule, and starts with the optimizer's moments at zero. The phase
    of longer sequences cuts them where it begins, and starts no schedule.

    Examples
    --------
    >>> config = TrainConfig(800, sequence_length=5, batch_size=2, block_tokens=100, long_tokens=200, long_sequence=10)
    >>> [(phase.first, phase.last, phase.begin, phase.sequence) for phase in phases(config)]
    [(0, 10, 0, 5), (10, 60, 10, 5), (60, 80, 10, 10)]
    """
    steps = config.steps
    blocks, long, frozen = (
        min(steps, tokens // config.step_tokens)
        for tokens in (config.block_tokens, config.long_tokens, config.frozen_tokens)
    )
    freeze = max(blocks, steps - frozen)
    schedules = {0, blocks, freeze, steps}
    cuts = sorted({*schedules, steps - long})
    return [
        Phase(
            first,
            last,
            max(cut for cut in schedules if cut <= first),
            min(cut for cut in schedules if cut >= last),
            config.sequence_length if first < steps - long else config.long_sequence,
            first < blocks,
            first >= freeze,
        )
        for first, last in pairwise(cuts)
    ]


def longest_sequence(config: TrainConfig) -> int:
    """Count the tokens in the longest sequence of a training run."""
    return max(phase.sequence for phase in phases(config))


def learning_rate_factor(progress: float, config: TrainConfig) -> float:
    """Compute the factor of the peak learning rates: a linear warm-up, then a cosine.

    Parameters
    ----------
    progress : float
        Part of the schedule that is done, 0 to 1.
    config : TrainConfig

    Examples
    --------
    >>> [round(learning_rate_factor(x, TrainConfig(warmup=0.1)), 3) for x in (0.05, 0.1, 0.55, 1.0)]
    [0.5, 1.0, 0.5, 0.0]
    """
    if progress < config.warmup:
        return progress / config.warmup
    decay = (progress - config.warmup) / (1 - config.warmup)
    return config.final_lr_fraction + (1 - config.final_lr_fraction) * 0.5 * (1 + math.cos(math.pi * decay))
