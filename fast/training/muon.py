"""Optimize matrices by orthogonalized momentum: Muon (Jordan et al., 2024; Liu et al., arXiv 2502.16982)."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # polynomial a x + b x^3 + c x^5 that drives x in (0, 1] to about 1
ITERATIONS = 5
STEP_SIZE = 0.2  # root mean square of a step's entries at learning rate 1, about the same as Adam's


class Muon(torch.optim.Optimizer):
    """Move matrices along their Nesterov momentum, replaced by the nearest matrix with orthonormal rows or columns.

        M <- momentum M + (1 - momentum) G
        N = momentum M + (1 - momentum) G
        W <- W - lr 0.2 sqrt(max(m, n)) orthogonalize(N)

    A step is about as large as one of Adam, so Adam's learning rates suit it.

    Parameters
    ----------
    params : iterable of (..., m, n) tensors, or of parameter groups
        Stacks of matrices W. The state is one momentum tensor for each.
    lr : float or tensor
    momentum : float
    """

    def __init__(self, params: Iterable[Any], lr: float | Tensor = 1e-3, momentum: float = 0.95):
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["momentum"] = torch.zeros_like(parameter)
                state["momentum"].lerp_(parameter.grad, 1 - group["momentum"])
                step = orthogonalize(parameter.grad.lerp(state["momentum"], group["momentum"]))
                parameter -= step * (group["lr"] * STEP_SIZE * max(parameter.shape[-2:]) ** 0.5)


def orthogonalize(matrix: Tensor) -> Tensor:
    """Bring all singular values of matrices close to 1 by Newton-Schulz iterations (0.7 to 1.2 after five).

    Parameters
    ----------
    matrix : (..., m, n) float tensor

    Returns
    -------
    (..., m, n) tensor of the same dtype; computed in bfloat16 on a GPU. A zero matrix stays zero.
    """
    a, b, c = COEFFICIENTS
    tall = matrix.shape[-2] > matrix.shape[-1]
    x = matrix.mT if tall else matrix
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=torch.finfo(x.dtype).tiny)
    x = x.to(torch.bfloat16) if x.is_cuda else x
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if tall else x).to(matrix.dtype)
