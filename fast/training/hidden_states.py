"""Record the hidden states of a student and its teacher, for the losses that compare them."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class HiddenStateHooks:
    """Record the output of every block of both models, by forward hooks.

    Parameters
    ----------
    student, teacher : lists of the models' blocks, equally long
    teacher_forcing : bool
        Whether each of the student's blocks reads the output of the teacher's block before it. The teacher must then
        run first.

    Attributes
    ----------
    student, teacher : lists of (batch, sequence, hidden size) tensors
        The outputs of the last forward pass.
    """

    def __init__(self, student: list[nn.Module], teacher: list[nn.Module], teacher_forcing: bool):
        self.student: list[Tensor] = []
        self.teacher: list[Tensor] = []
        self.handles = [
            block.register_forward_hook(self.record(outputs, block is blocks[0]))
            for blocks, outputs in ((student, self.student), (teacher, self.teacher))
            for block in blocks
        ]
        if teacher_forcing:
            for before, block in enumerate(student[1:]):
                self.handles.append(block.register_forward_pre_hook(self.replace(before), with_kwargs=True))

    def record(self, outputs: list[Tensor], is_first: bool) -> Callable:
        """Make a hook that appends a block's output to a list; the first block empties the list before."""

        def hook(module: nn.Module, arguments: Any, output: Any) -> None:
            if is_first:
                outputs.clear()
            outputs.append(output[0] if isinstance(output, tuple) else output)

        return hook

    def replace(self, before: int) -> Callable:
        """Make a hook that replaces a block's input by the output of the teacher's block `before`."""

        def hook(module: nn.Module, arguments: tuple, keywords: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
            states = self.teacher[before]
            if arguments:
                return (states, *arguments[1:]), keywords
            return arguments, keywords | {"hidden_states": states}

        return hook

    def loss(self, hidden_loss: Callable[[Tensor, Tensor, bool], Tensor], normalize: bool) -> Tensor:
        """Sum the hidden-state loss over all blocks, and forget the hidden states.

        Forgetting them lets the backward pass free the activations as it goes.
        """
        pairs = zip(self.student, self.teacher, strict=True)
        loss = torch.stack([hidden_loss(states, targets, normalize) for states, targets in pairs]).sum()
        self.student.clear()
        self.teacher.clear()
        return loss

    def remove(self) -> None:
        """Remove the hooks from both models."""
        for handle in self.handles:
            handle.remove()
