"""Test Muon: its steps are nearly orthonormal, as large as Adam's, and the same for a stack and its matrices."""

import numpy as np
import pytest
import torch
from compare import assert_same, assert_within
from littlebit.fast.training.muon import ITERATIONS, STEP_SIZE, Muon, orthogonalize


def matrices(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(5, 5), (12, 4), (4, 12), (1, 7)])
@pytest.mark.parametrize("size", [1e-20, 1.0, 1e20])
def test_orthogonalize_brings_singular_values_to_one(shape, size):
    """Singular vectors stay: the polynomial is odd, so U and V^T of the matrix diagonalise the result."""
    matrix = matrices(*shape)
    u, _, vt = torch.linalg.svd(matrix, full_matrices=False)
    inside = u.mT @ orthogonalize(size * matrix) @ vt.mT
    values = inside.diagonal()
    assert (values > 0.6).all()
    assert (values < 1.3).all()
    # each of the iterations' products rounds, and the polynomial's slope is 3.4445 at most
    magnitude = 3.4445**ITERATIONS * torch.ones_like(inside)
    assert_within(inside, torch.diag(values), magnitude, ITERATIONS * sum(shape))


def test_orthogonalize_of_zero_is_zero():
    assert_same(orthogonalize(torch.zeros(2, 3, 4)), torch.zeros(2, 3, 4))


def test_a_stack_steps_as_each_of_its_matrices():
    grads, start = [matrices(3, 6, 4, seed=seed) for seed in range(4)], matrices(3, 6, 4, seed=9)
    stack = start.clone().requires_grad_()
    alone = [matrix.clone().requires_grad_() for matrix in start]
    together, apart = Muon([stack], lr=0.1), Muon(alone, lr=torch.tensor(0.1, dtype=torch.float64))
    for grad in grads:
        stack.grad = grad
        for matrix, part in zip(alone, grad, strict=True):
            matrix.grad = part
        together.step()
        apart.step()
    magnitude = torch.full_like(start, 4 * 3.4445**ITERATIONS)
    assert_within(stack, torch.stack(alone), magnitude, 4 * ITERATIONS * 10)


def test_a_step_has_adams_size_and_lowers_the_loss():
    target, start = matrices(40, 10), matrices(40, 10, seed=1)
    parameter = start.clone().requires_grad_()
    muon = Muon([parameter], lr=0.5)
    for step in range(100):
        loss = (parameter - target).square().sum()
        (parameter.grad,) = torch.autograd.grad(loss, parameter)
        before = parameter.detach().clone()
        for group in muon.param_groups:
            group["lr"] = 0.5 * (1 - step / 100)
        muon.step()
        if step == 0:
            size = float((parameter.detach() - before).square().mean().sqrt())
            assert 0.6 < size / (0.5 * STEP_SIZE) < 1.3
    assert float(loss.detach()) < float((start - target).square().sum()) / 100


def test_a_parameter_without_gradient_stays():
    parameter = torch.ones(2, 2, requires_grad=True)
    muon = Muon([parameter])
    muon.step()
    assert_same(parameter, np.ones((2, 2), np.float32))
    assert not muon.state
