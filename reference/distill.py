"""Compare a student with its teacher: distillation losses on logits and hidden states, and their gradients.

Distillation trains a student on a teacher's outputs (Hinton et al., arXiv 1503.02531). LittleBit's quantization-aware
training minimizes KL(teacher || student) on the logits plus 10 times the mean squared error of the hidden states,
summed over layers (arXiv 2506.13771, the section on quantization-aware training).
"""

import numpy as np

from ._renamed import renamed_keywords
from .arrays import Array


def kl_loss(student_logits: Array, teacher_logits: Array) -> Array:
    """Average the Kullback-Leibler divergence (KL) of the student from the teacher over positions.

    KL(p || q) = sum over the vocabulary of p (log p - log q),  p = softmax(teacher),  q = softmax(student)

    The authors add positions up instead. Their loss, and its weight against the hidden-state loss, is larger by the
    length of a sequence.

    Parameters
    ----------
    student_logits, teacher_logits : (..., vocabulary) finite float arrays of one shape

    Returns
    -------
    () array in nats; at least float32, in which float16 logits are computed with.

    Raises
    ------
    ValueError
        If the shapes differ or there is no position.

    Examples
    --------
    >>> teacher = np.log([[0.5, 0.5], [0.5, 0.5]])
    >>> loss = kl_loss(np.log([[0.5, 0.5], [0.25, 0.75]]), teacher)  # second: 0.5 log 2 + 0.5 log(2/3)
    >>> round(float(loss), 4)
    0.0719
    """
    check_pair(student_logits, teacher_logits)
    log_q, log_p = log_softmax(student_logits), log_softmax(teacher_logits)
    return (np.exp(log_p) * (log_p - log_q)).sum(axis=-1).mean()


def kl_loss_vjp(student_logits: Array, teacher_logits: Array) -> Array:
    """Compute the gradient of `kl_loss` with respect to the student's logits.

    dL/dx_j = (q_j - p_j) / positions

    Derivation: in log q_i = x_i - log sum_k exp(x_k), the last term depends on every entry, and its derivative by x_j
    is q_j. So d/dx_j of -sum_i p_i log q_i is -p_j + q_j sum_i p_i = q_j - p_j. The mean divides by the number of
    positions.

    Parameters
    ----------
    student_logits, teacher_logits : (..., vocabulary) finite float arrays of one shape

    Returns
    -------
    (..., vocabulary) array of the student's dtype.

    Raises
    ------
    ValueError
        If the shapes differ or there is no position.

    Examples
    --------
    >>> kl_loss_vjp(np.log([[0.25, 0.75]]), np.log([[0.5, 0.5]])).round(6)
    array([[-0.25,  0.25]])
    """
    check_pair(student_logits, teacher_logits)
    difference = np.exp(log_softmax(student_logits)) - np.exp(log_softmax(teacher_logits))
    return (difference / len(rows(student_logits))).astype(student_logits.dtype)


@renamed_keywords(normalise="normalize")
def hidden_loss(student: Array, teacher: Array, normalize: bool = False) -> Array:
    """Compute the mean squared error of one layer's hidden states.

    mean over positions of mean (student - teacher)^2 [/ mean teacher^2 of the position, if normalized]

    The paper does not normalize. Normalizing keeps the few positions with massive activations (Sun et al., arXiv
    2402.17762) from swamping the rest.

    Parameters
    ----------
    student, teacher : (..., width) float arrays of one shape
    normalize : bool
        Whether to divide each position's error by the teacher's mean square there (by 1 where that is 0).

    Returns
    -------
    () array, at least float32, in which float16 states are computed with.

    Raises
    ------
    ValueError
        If the shapes differ or there is no position.

    Examples
    --------
    >>> teacher = np.array([[1.0, 1.0], [100.0, 100.0]])
    >>> losses = hidden_loss(1.1 * teacher, teacher), hidden_loss(1.1 * teacher, teacher, normalize=True)
    >>> [round(float(loss), 4) for loss in losses]
    [50.005, 0.01]
    """
    check_pair(student, teacher)
    error = widened(student) - widened(teacher)
    return ((error * error).mean(axis=-1) / position_scale(teacher, normalize)).mean()


@renamed_keywords(normalise="normalize")
def hidden_loss_vjp(student: Array, teacher: Array, normalize: bool = False) -> Array:
    """Compute the gradient of `hidden_loss` with respect to the student's hidden states.

    2 (student - teacher) / (positions * width) [/ mean teacher^2 of the position, if normalized]

    Parameters
    ----------
    student, teacher : (..., width) float arrays of one shape
    normalize : bool

    Returns
    -------
    (..., width) array of the student's dtype.

    Raises
    ------
    ValueError
        If the shapes differ or there is no position.

    Examples
    --------
    >>> hidden_loss_vjp(np.array([[3.0, 1.0]]), np.array([[1.0, 1.0]]))
    array([[2., 0.]])
    """
    check_pair(student, teacher)
    error = widened(student) - widened(teacher)
    gradient = 2 * error / position_scale(teacher, normalize)[..., None] / student.size
    return gradient.astype(student.dtype)


def log_softmax(logits: Array) -> Array:
    """Compute the logarithm of softmax in float32 or wider.

    The largest logit is subtracted first, so nothing overflows.
    """
    shifted = widened(logits) - widened(logits).max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def position_scale(teacher: Array, normalize: bool) -> Array:
    """Compute the divisor (...) of each position's squared error: the teacher's mean square, or 1."""
    wide = widened(teacher)
    scale = (wide * wide).mean(axis=-1)
    return np.where((scale == 0) | (not normalize), np.ones_like(scale), scale)


def widened(values: Array) -> Array:
    """Convert values to float32, or keep a wider dtype."""
    return values.astype(np.result_type(values.dtype, np.float32))


def rows(values: Array) -> Array:
    """Reshape to a matrix with one row for each position."""
    return values.reshape(-1, values.shape[-1])


def check_pair(student: Array, teacher: Array) -> None:
    """Raise ValueError unless student and teacher have the same shape and at least one entry."""
    if student.shape != teacher.shape or student.size == 0:
        raise ValueError(
            "student and teacher must have the same shape and at least one position, but theirs are "
            f"{tuple(student.shape)} and {tuple(teacher.shape)}; give both the same tokens"
        )
