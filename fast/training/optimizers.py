"""Make the optimizers of a training run: AdamW, or Muon for the latents, with a learning rate for each group."""

from typing import Any, NamedTuple

import torch

from .config import TrainConfig
from .muon import Muon
from .student import Masters


class ParameterGroup(NamedTuple):
    """Hold trained tensors that share a learning rate.

    Attributes
    ----------
    settings : dict
        The optimizer's parameter group. Its "lr" is set before each step.
    peak_lr : float
        Highest learning rate of the schedule.
    latents : bool
        Whether the tensors are latents, which a phase may freeze.
    """

    settings: dict[str, Any]
    peak_lr: float
    latents: bool


def make_optimizers(
    masters: Masters, config: TrainConfig, device: torch.device
) -> tuple[list[torch.optim.Optimizer], list[ParameterGroup]]:
    """Make the optimizers of all trained tensors, and list the parameter groups: latents, scales, others.

    On a GPU the learning rates are tensors, because a CUDA graph reads them from memory.
    """
    on_gpu = device.type == "cuda"
    rates = (config.lr_latents, config.lr_scales, config.lr_others)
    found = [
        ({"params": list(group.values()), "lr": torch.tensor(rate, device=device) if on_gpu else rate}, rate)
        for group, rate in zip(masters, rates, strict=True)
        if group
    ]
    count = 1 if config.optimizer == "muon" else 0
    optimizers: list[torch.optim.Optimizer] = [Muon([group for group, _ in found[:count]])] if count else []
    if found[count:]:
        settings = {"betas": config.betas, "weight_decay": 0.0, "fused": True, "capturable": on_gpu}
        optimizers.append(torch.optim.AdamW([group for group, _ in found[count:]], **settings))
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    return optimizers, [
        ParameterGroup(group, rate, at == 0) for at, (group, (_, rate)) in enumerate(zip(groups, found, strict=True))
    ]
