"""Join the processes that torchrun starts, and catch the signals that tell them to stop."""

import contextlib
import os
import signal
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, distributed


def rank_and_world_size() -> tuple[int, int]:
    """Return the rank of this process and the number of processes: 0 and 1 without torch.distributed."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


def all_reduce_mean(parameters: Sequence[Tensor], world_size: int) -> None:
    """Average gradients over the processes, in place."""
    for parameter in parameters:
        if parameter.grad is not None:  # Where blocks are trained alone, the last norm has no gradient.
            distributed.all_reduce(parameter.grad)
            parameter.grad /= world_size


@contextlib.contextmanager
def joined_processes(device: str | None = None) -> Iterator[str]:
    """Choose the device to train on and, under torchrun, join the processes while the context is active.

    Parameters
    ----------
    device : str, optional
        "cpu" or "cuda"; by default cuda if there is a GPU. Under torchrun, cuda is the GPU of the local rank.

    Raises
    ------
    ValueError
        If torch sees no GPU but the device is a GPU.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device {device} needs a GPU, but torch sees no GPU: choose cpu")
    if "RANK" not in os.environ:
        yield device
        return
    if device == "cuda":
        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
        torch.cuda.set_device(device)
    distributed.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    try:
        yield device
    finally:
        distributed.destroy_process_group()


@contextlib.contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Collect SIGTERM and SIGINT in a list while the context is active, so that training can save its state first.

    A second signal raises KeyboardInterrupt at once.
    """
    received: list[int] = []
    before = {}

    def note(number: int, frame: Any) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(number)

    for number in (signal.SIGTERM, signal.SIGINT):
        with contextlib.suppress(ValueError):  # Python allows this in the main thread only
            before[number] = signal.signal(number, note)
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
