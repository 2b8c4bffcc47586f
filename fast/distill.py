"""Compare a student with its teacher: distillation losses on logits and hidden states, and their gradients.

Distillation trains a student on a teacher's outputs (Hinton et al., arXiv 1503.02531). LittleBit's quantization-aware
training minimizes KL(teacher || student) on the logits plus 10 times the mean squared error of the hidden states,
summed over layers (arXiv 2506.13771, the section on quantization-aware training).
"""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..reference._renamed import renamed_keywords

ROWS = 256  # positions whose logits are converted to float32 at once


def kl_loss(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Average the Kullback-Leibler divergence (KL) of the student from the teacher over positions.

    KL(p || q) = sum over the vocabulary of p (log p - log q),  p = softmax(teacher),  q = softmax(student)

    The authors add positions up instead. Their loss, and its weight against the hidden-state loss, is larger by the
    length of a sequence.

    Autograd reaches the student's logits, not the teacher's. Beside the logits there is one more tensor of their size,
    the gradient in the student's dtype. float32 copies are made of ROWS positions at a time.

    Parameters
    ----------
    student_logits, teacher_logits : (..., vocabulary) finite float tensors of one shape

    Returns
    -------
    () tensor in nats; at least float32, in which float16 and bfloat16 logits are computed with.

    Raises
    ------
    ValueError
        If the shapes differ or there is no position.

    Examples
    --------
    >>> teacher = torch.tensor([[0.5, 0.5], [0.5, 0.5]]).log()
    >>> kl_loss(torch.tensor([[0.5, 0.5], [0.25, 0.75]]).log(), teacher)  # second: 0.5 log 2 + 0.5 log(2/3)
    tensor(0.0719)
    """
    check_pair(student_logits, teacher_logits)
    return cast(Tensor, KLLoss.apply(student_logits, teacher_logits.detach(), kl_rows, None, 0.0))


class KLLoss(torch.autograd.Function):
    """Compute `kl_loss`, and store q - p in the forward pass: no float32 logits wait for the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, student: Tensor, teacher: Tensor, part_loss: Callable, labels: Tensor | None, label_weight: float
    ) -> Tensor:
        """Compute the loss, ROWS positions at a time; `part_loss` is `kl_rows`, or `kl_rows` compiled."""
        logits, targets = rows(student), rows(teacher)
        difference = torch.empty_like(logits) if ctx.needs_input_grad[0] else None
        losses = []
        for start in range(0, len(logits), ROWS):
            part = slice(start, start + ROWS)
            mixed = () if labels is None else (labels[part], label_weight)
            loss, q_minus_p = part_loss(logits[part], targets[part], *mixed)
            losses.append(loss)
            if difference is not None:
                difference[part] = q_minus_p
        ctx.save_for_backward(difference)
        ctx.shape = student.shape
        return torch.stack(losses).sum() / len(logits)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        """Compute the gradient (q - p) / positions.

        The division comes last, so that float16 keeps small entries.
        """
        (difference,) = ctx.saved_tensors
        return (difference * (grad / len(difference))).reshape(ctx.shape), None, None, None, None


def kl_rows(
    logits: Tensor, targets: Tensor, labels: Tensor | None = None, label_weight: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Sum over rows the loss of student logits against teacher logits, and return the gradient q - p too.

    Without labels the loss of a row is KL(p || q). With labels p becomes (1 - label_weight) p + label_weight times 1 at
    the label, and the loss sum p (log p_teacher - log q): the student's mixed cross-entropy above the teacher's own.

    Parameters
    ----------
    logits, targets : (rows, vocabulary) float tensors
    labels : (rows,) integer tensor, optional
        The class that each row should have; -1 for none.
    label_weight : float

    Returns
    -------
    () loss; (rows, vocabulary) q - p in the student's dtype.
    """
    log_q, log_p = log_softmax(logits), log_softmax(targets)
    p = log_p.exp()
    if labels is not None:
        right = labels[:, None] == torch.arange(logits.shape[-1], device=logits.device)
        p = torch.where(labels[:, None] < 0, p, (1 - label_weight) * p + label_weight * right.to(p.dtype))
    return (p * (log_p - log_q)).sum(), (log_q.exp() - p).to(logits.dtype)


def kl_loss_vjp(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Compute the gradient of `kl_loss` with respect to the student's logits, by autograd.

    dL/dx_j = (q_j - p_j) / positions

    Derivation: in log q_i = x_i - log sum_k exp(x_k), the last term depends on every entry, and its derivative by x_j
    is q_j. So d/dx_j of -sum_i p_i log q_i is -p_j + q_j sum_i p_i = q_j - p_j. The mean divides by the number of
    positions.

    Parameters
    ----------
    student_logits, teacher_logits : (..., vocabulary) finite float tensors of one shape

    Returns
    -------
    (..., vocabulary) tensor of the student's dtype.

    Raises
    ------
    ValueError
        If the shapes differ or there is no position.

    Examples
    --------
    >>> kl_loss_vjp(torch.tensor([[0.25, 0.75]]).log(), torch.tensor([[0.5, 0.5]]).log())
    tensor([[-0.2500,  0.2500]])
    """
    student = student_logits.detach().requires_grad_()
    with torch.enable_grad():
        loss = kl_loss(student, teacher_logits)
    return torch.autograd.grad(loss, student)[0]


@renamed_keywords(normalise="normalize")
def hidden_loss(student: Tensor, teacher: Tensor, normalize: bool = False) -> Tensor:
    """Compute the mean squared error of one layer's hidden states.

    mean over positions of mean (student - teacher)^2 [/ mean teacher^2 of the position, if normalized]

    The paper does not normalize. Normalizing keeps the few positions with massive activations (Sun et al., arXiv
    2402.17762) from swamping the rest.

    Parameters
    ----------
    student, teacher : (..., width) float tensors of one shape
        Autograd reaches the student's states, not the teacher's.
    normalize : bool
        Whether to divide each position's error by the teacher's mean square there (by 1 where that is 0).

    Returns
    -------
    () tensor, at least float32, in which float16 and bfloat16 states are computed with.

    Raises
    ------
    ValueError
        If the shapes differ or there is no position.

    Examples
    --------
    >>> teacher = torch.tensor([[1.0, 1.0], [100.0, 100.0]])
    >>> hidden_loss(1.1 * teacher, teacher), hidden_loss(1.1 * teacher, teacher, normalize=True)
    (tensor(50.0050), tensor(0.0100))
    """
    check_pair(student, teacher)
    teacher = teacher.detach()
    error = widened(student) - widened(teacher)
    return ((error * error).mean(dim=-1) / position_scale(teacher, normalize)).mean()


@renamed_keywords(normalise="normalize")
def hidden_loss_vjp(student: Tensor, teacher: Tensor, normalize: bool = False) -> Tensor:
    """Compute the gradient of `hidden_loss` with respect to the student's hidden states, by autograd.

    2 (student - teacher) / (positions * width) [/ mean teacher^2 of the position, if normalized]

    Parameters
    ----------
    student, teacher : (..., width) float tensors of one shape
    normalize : bool

    Returns
    -------
    (..., width) tensor of the student's dtype.

    Raises
    ------
    ValueError
        If the shapes differ or there is no position.

    Examples
    --------
    >>> hidden_loss_vjp(torch.tensor([[3.0, 1.0]]), torch.tensor([[1.0, 1.0]]))
    tensor([[2., 0.]])
    """
    student = student.detach().requires_grad_()
    with torch.enable_grad():
        loss = hidden_loss(student, teacher, normalize)
    return torch.autograd.grad(loss, student)[0]


def log_softmax(logits: Tensor) -> Tensor:
    """Compute the logarithm of softmax in float32 or wider.

    The largest logit is subtracted first, so nothing overflows.
    """
    return torch.log_softmax(logits, dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32))


def position_scale(teacher: Tensor, normalize: bool) -> Tensor:
    """Compute the divisor (...) of each position's squared error: the teacher's mean square, or 1."""
    wide = widened(teacher)
    scale = (wide * wide).mean(dim=-1)
    return torch.where((scale == 0) | (not normalize), torch.ones_like(scale), scale)


def widened(values: Tensor) -> Tensor:
    """Convert values to float32, or keep a wider dtype."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def rows(values: Tensor) -> Tensor:
    """Reshape to a matrix with one row for each position."""
    return values.reshape(-1, values.shape[-1])


def check_pair(student: Tensor, teacher: Tensor) -> None:
    """Raise ValueError unless student and teacher have the same shape and at least one entry."""
    if student.shape != teacher.shape or student.numel() == 0:
        raise ValueError(
            "student and teacher must have the same shape and at least one position, but theirs are "
            f"{tuple(student.shape)} and {tuple(teacher.shape)}; give both the same tokens"
        )
