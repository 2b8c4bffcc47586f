"""Draw the order of the training data: which window of which text is read in which step."""

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby

import torch
from torch import Tensor, nn

from .._checks import check_positions, flat_tokens, positions_of
from .config import TrainConfig
from .phases import phases


def phase_window_starts(lengths: Sequence[int], weights: Sequence[float] | None, config: TrainConfig) -> list[Tensor]:
    """Draw the `window_starts` of every phase, each (steps, sequences in a step).

    Phases with the same sequence length share epochs.
    """
    drawn = []
    for sequence, group in groupby(phases(config), key=lambda phase: phase.sequence):
        steps = [phase.last - phase.first for phase in group]
        shape = {"sequence_length": sequence, "batch_size": config.step_tokens // sequence}
        part = replace(config, total_tokens=sum(steps) * config.step_tokens, **shape)
        drawn += window_starts(lengths, weights, part).split(steps)
    return drawn


def window_starts(lengths: Sequence[int], weights: Sequence[float] | None, config: TrainConfig) -> Tensor:
    """Draw where each sequence of each step begins, in the texts laid end to end.

    Each text is cut into windows that do not overlap, from an offset that is drawn for each epoch. Its windows are read
    in random order. The text of each sequence is drawn in proportion to the weights.

    Parameters
    ----------
    lengths : sequence of int
        Tokens of each text.
    weights : sequence of float, optional
        One per text; by default the lengths.
    config : TrainConfig

    Returns
    -------
    (steps, batch_size) int64 tensor.

    Raises
    ------
    ValueError
        If there is not one finite, non-negative weight per text, or all are zero.
    """
    weights = list(lengths if weights is None else weights)
    if len(weights) != len(lengths) or not all(0 <= each < math.inf for each in weights) or not sum(weights):
        raise ValueError(
            f"weights must be one per text, finite, not negative, and not all zero, got {weights} for {len(lengths)} "
            "texts"
        )
    generator = torch.Generator().manual_seed(config.seed)
    count = config.steps * config.batch_size
    source = torch.multinomial(torch.tensor(weights, dtype=torch.float64), count, replacement=True, generator=generator)
    starts = torch.empty(count, dtype=torch.int64)
    for text, length in enumerate(lengths):
        drawn = source == text
        first = sum(lengths[:text])
        starts[drawn] = first + epoch_starts(length, config.sequence_length, int(drawn.sum()), generator)
    return starts.view(config.steps, config.batch_size)


def epoch_starts(length: int, sequence: int, count: int, generator: torch.Generator) -> Tensor:
    """Draw the starts of `count` windows of one text, epoch after epoch."""
    parts, found = [torch.empty(0, dtype=torch.int64)], 0
    while found < count:
        offset = int(torch.randint(min(sequence, length - sequence + 1), (), generator=generator))
        windows = (length - offset) // sequence
        parts.append(offset + sequence * torch.randperm(windows, generator=generator))
        found += windows
    return torch.cat(parts)[:count]


def checked_text(text: Tensor, model: nn.Module, sequence: int) -> Tensor:
    """Convert a training text to an (n,) int64 tensor of tokens on the CPU.

    Raises
    ------
    ValueError
        If it has fewer than `sequence` tokens, a token has no row in the embedding, or the model has fewer than
        `sequence` positions.
    """
    check_positions(sequence, positions_of(model), f"a sequence of {sequence} tokens")
    return flat_tokens(text, model, least=sequence)
