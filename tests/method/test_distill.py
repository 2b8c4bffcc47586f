"""Test distillation losses against float64, their gradients against differences, and that float32 memory is chunked.

Bound of the KL divergence: a log probability is x - max - log sum exp(x - max). Each term is at most 2 max|x| +
log(vocabulary), called the size of a row, and enters with a few roundings; the sum has one for each entry of the
vocabulary. A probability has the same error, relative to itself. The magnitudes below follow from this.
"""

import littlebit.fast as fast
import littlebit.fast.distill as chunked
import littlebit.reference as ref
import numpy as np
import pytest
import torch
from compare import assert_same, assert_within
from hypothesis import given, strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

DTYPES = st.sampled_from([np.float16, np.float32, np.float64])
BATCHES = [(), (1,), (2,), (5,), (2, 3), (1, 2, 2)]
BFLOAT16 = 2.0**16  # eps of bfloat16 over that of float32


@st.composite
def pairs(draw, dtypes=DTYPES):
    """Draw a student and a teacher: unrelated, close or equal, with logits from flat to certain."""
    dtype, batch, width = draw(dtypes), draw(st.sampled_from(BATCHES)), draw(st.integers(1, 40))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    size = draw(st.sampled_from([1e-3, 1.0, 30.0]))
    teacher = size * rng.standard_normal((*batch, width))
    student = teacher + draw(st.sampled_from([0, 1e-2, 1.0])) * size * rng.standard_normal(teacher.shape)
    return student.astype(dtype), teacher.astype(dtype)


def wide(pair):
    return [array.astype(np.float64) for array in pair]


def row_size(logits):
    return 1 + 2 * np.abs(logits).max(axis=-1, keepdims=True) + np.log(logits.shape[-1])


def softmax(logits):
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


def kl_magnitude(student, teacher):
    """Compute the magnitude of sum p (log p - log q).

    Both log probabilities are wrong by eps of their row's size, and p as the teacher's.
    """
    size = row_size(student) + row_size(teacher)
    return (size * (1 + row_size(teacher))).mean()


def kl_vjp_magnitude(student, teacher):
    rows = student.size // student.shape[-1]
    return (softmax(student) * row_size(student) + softmax(teacher) * row_size(teacher)) / rows


def terms_of(student):
    return 16 + student.shape[-1] + student.size // student.shape[-1]


def both(function, pair, *options):
    """Call a function in the reference and in fast."""
    yield getattr(ref, function)(*pair, *options)
    yield getattr(fast, function)(*map(torch.from_numpy, pair), *options)


def dtype_name(values):
    return str(values.dtype).removeprefix("torch.")


@given(pairs())
def test_kl_loss_agrees(pair):
    student, teacher = wide(pair)
    p, q = softmax(teacher), softmax(student)
    exact = np.where(p > 0, p * (np.log(np.maximum(p, 1e-300)) - np.log(np.maximum(q, 1e-300))), 0).sum(axis=-1).mean()
    for actual in both("kl_loss", pair):
        assert dtype_name(actual) == ("float64" if pair[0].dtype == np.float64 else "float32")
        assert_within(actual, exact, kl_magnitude(student, teacher), terms_of(student))


@given(pairs())
def test_kl_loss_vjp_agrees(pair):
    student, teacher = wide(pair)
    exact = (softmax(student) - softmax(teacher)) / (student.size // student.shape[-1])
    for actual in both("kl_loss_vjp", pair):
        assert dtype_name(actual) == str(pair[0].dtype)
        assert_within(actual, exact, kl_vjp_magnitude(student, teacher), terms_of(student))


@given(pairs(dtypes=st.just(np.float32)))
def test_kl_loss_takes_bfloat16_and_accumulates_in_float32(pair):
    student, teacher = (torch.from_numpy(array).bfloat16() for array in pair)
    known = [tensor.float().double().numpy() for tensor in (student, teacher)]
    loss = fast.kl_loss(student, teacher)
    assert loss.dtype == torch.float32
    assert_within(loss, ref.kl_loss(*known), kl_magnitude(*known), terms_of(known[0]))
    gradient = fast.kl_loss_vjp(student, teacher)
    assert gradient.dtype == torch.bfloat16
    size = kl_vjp_magnitude(*known)
    rounded = np.abs(ref.kl_loss_vjp(*known)) * BFLOAT16 / terms_of(known[0]) + size
    assert_within(gradient.float(), ref.kl_loss_vjp(*known), rounded, terms_of(known[0]))


@given(pairs(dtypes=st.just(np.float64)))
def test_kl_loss_vjp_is_the_derivative(pair):
    """Compare with a central difference of step t along d, |d| <= 1.

    The third derivative of log sum exp along d is a third central moment of d, at most 8. So the difference is wrong by
    at most t^2 8 / 6, and by the rounding of the two losses over t.
    """
    student, teacher = pair
    d, t = np.random.default_rng(0).uniform(-1, 1, student.shape), 1e-5
    slope = (ref.kl_loss(student + t * d, teacher) - ref.kl_loss(student - t * d, teacher)) / (2 * t)
    terms = terms_of(student)
    truncation = t * t * 8 / 6 / (2 * terms * np.finfo(np.float64).eps)
    size = kl_magnitude(student, teacher) / t + truncation
    assert_within(slope, (ref.kl_loss_vjp(student, teacher) * d).sum(), size, terms)


@given(pairs())
def test_kl_loss_is_zero_for_equal_logits_and_never_negative(pair):
    student, teacher = pair
    for loss in both("kl_loss", (teacher, teacher)):
        assert_same(float(loss), 0.0)
    for gradient in both("kl_loss_vjp", (teacher, teacher)):
        assert_same(gradient, np.zeros_like(teacher))
    for loss in both("kl_loss", pair):
        negative = np.minimum(np.asarray(loss), 0)
        assert_within(negative, np.zeros(()), kl_magnitude(*wide(pair)), terms_of(student))


@given(pairs(dtypes=st.just(np.float64)), st.floats(-50, 50))
def test_kl_loss_does_not_see_a_shift_of_the_logits(pair, shift):
    student, teacher = pair
    size = kl_magnitude(np.abs(student) + abs(shift), teacher)
    for loss in both("kl_loss", (student + shift, teacher)):
        assert_within(loss, ref.kl_loss(student, teacher), size, terms_of(student))


def test_kl_loss_does_not_overflow():
    logits = np.array([[1e30, -1e30, 0.0]], np.float32), np.array([[1e30, 0.0, 1e30]], np.float32)
    for loss in both("kl_loss", logits):
        assert_same(np.float32(loss), np.float32(0.5) * np.float32(1e30))
    for gradient in both("kl_loss_vjp", logits):
        assert_same(gradient, np.array([[0.5, 0.0, -0.5]], np.float32))


@given(pairs(dtypes=st.just(np.float32)), st.integers(1, 4))
def test_kl_loss_is_the_same_in_any_chunks(pair, rows):
    student, teacher = map(torch.from_numpy, pair)
    expected, gradient = fast.kl_loss(student, teacher), fast.kl_loss_vjp(student, teacher)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunked, "ROWS", rows)
        size, terms = kl_magnitude(*wide(pair)), terms_of(pair[0])
        assert_within(fast.kl_loss(student, teacher), expected, size, terms)
        assert_within(fast.kl_loss_vjp(student, teacher), gradient, kl_vjp_magnitude(*wide(pair)), terms)


@pytest.mark.parametrize("count", [1, 2, 255, 256, 257, 300, 511, 512, 513])
def test_kl_loss_counts_every_position_once(count):
    """Each position's divergence is far larger than those before it, so that a row left out or doubled shows."""
    student = torch.zeros(count, 2)
    for at in {0, 1, 254, 255, 256, 257, 510, 511, count - 1}:
        if at < count:
            teacher = torch.zeros(count, 2)
            teacher[at, 0] = 50.0  # certain: log 2 nats from a uniform student, all other positions 0
            loss = fast.kl_loss(student, teacher)
            assert_within(loss, np.float64(np.log(2) / count), np.float64(np.log(2) / count), terms=count + 4)
            gradient = fast.kl_loss_vjp(student, teacher)
            expected = torch.zeros(count, 2)
            expected[at] = torch.tensor([-0.5, 0.5]) / count
            assert_within(gradient, expected, expected.abs(), terms=4)


class LargestFloat32(TorchDispatchMode):
    """Record the number of entries of the largest float32 tensor that an operation makes."""

    entries = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor) and tensor.dtype == torch.float32:
                self.entries = max(self.entries, tensor.numel())
        return result


def test_kl_loss_makes_no_float32_copy_of_all_logits():
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(2, 2 * chunked.ROWS, 11, generator=generator).bfloat16() for _ in range(2))
    student.requires_grad_()
    with LargestFloat32() as seen:
        fast.kl_loss(student, teacher).backward()
    assert_same(seen.entries, chunked.ROWS * 11)
    assert student.grad.shape == student.shape


def test_kl_loss_scales_its_gradient():
    student, teacher = torch.tensor([[1.0, 2.0, 0.5]], requires_grad=True), torch.tensor([[0.0, 1.0, 0.0]])
    (8 * fast.kl_loss(student, teacher)).backward()
    assert_same(student.grad, 8 * fast.kl_loss_vjp(student, teacher))


@given(pairs(), st.booleans())
def test_hidden_loss_agrees(pair, normalize):
    """Use the loss as its own magnitude: it sums squares of differences that are rounded once, so nothing cancels."""
    student, teacher = wide(pair)
    scale = (teacher**2).mean(axis=-1) if normalize else np.ones(student.shape[:-1])
    exact = (((student - teacher) ** 2).mean(axis=-1) / np.where(scale == 0, 1, scale)).mean()
    for actual in both("hidden_loss", pair, normalize):
        assert dtype_name(actual) == ("float64" if pair[0].dtype == np.float64 else "float32")
        assert_within(actual, exact, exact, terms_of(student))


@given(pairs(), st.booleans())
def test_hidden_loss_vjp_agrees(pair, normalize):
    student, teacher = wide(pair)
    scale = (teacher**2).mean(axis=-1, keepdims=True) if normalize else np.ones((*student.shape[:-1], 1))
    exact = 2 * (student - teacher) / np.where(scale == 0, 1, scale) / student.size
    for actual in both("hidden_loss_vjp", pair, normalize):
        assert dtype_name(actual) == str(pair[0].dtype)
        assert_within(actual, exact, np.abs(exact), terms_of(student))


@given(pairs(dtypes=st.just(np.float64)), st.booleans())
def test_hidden_loss_vjp_is_the_derivative(pair, normalize):
    """Compare with a central difference, which is exact for any step: the loss is quadratic."""
    student, teacher = pair
    d = np.random.default_rng(0).standard_normal(student.shape)
    up, down = (ref.hidden_loss(student + step * d, teacher, normalize) for step in (1, -1))
    slope = (ref.hidden_loss_vjp(student, teacher, normalize) * d).sum()
    scale = (np.abs(student) + np.abs(teacher) + np.abs(d)) ** 2
    size = ref.hidden_loss(np.sqrt(scale) + np.abs(teacher), np.abs(teacher), normalize)
    assert_within((up - down) / 2, slope, size, terms_of(student))


def test_hidden_loss_normalised_is_not_swamped():
    teacher = np.ones((4, 8))
    teacher[0] = 1e4
    for loss in both("hidden_loss", (1.1 * teacher, teacher), True):
        assert_within(np.asarray(loss), np.float64(0.1**2), np.float64(1), terms=40)


def test_hidden_loss_normalised_takes_a_zero_position():
    pair = np.ones((2, 3)), np.array([[0.0, 0.0, 0.0], [1.0, 1.0, 1.0]])
    for loss in both("hidden_loss", pair, True):
        assert_same(float(loss), 0.5)


@pytest.mark.parametrize("normalize", [False, True])
def test_hidden_loss_takes_bfloat16(normalize):
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(3, 5, 16, generator=generator).bfloat16() for _ in range(2))
    known = [tensor.float().double().numpy() for tensor in (student, teacher)]
    exact = ref.hidden_loss(*known, normalize)
    assert_within(fast.hidden_loss(student, teacher, normalize), exact, exact, terms_of(known[0]))
    gradient, expected = fast.hidden_loss_vjp(student, teacher, normalize), ref.hidden_loss_vjp(*known, normalize)
    assert gradient.dtype == torch.bfloat16
    assert_within(gradient.float(), expected, np.abs(expected) * BFLOAT16, terms=2)


def test_losses_leave_the_teacher_alone():
    student, teacher = torch.zeros(2, 3, requires_grad=True), torch.ones(2, 3, requires_grad=True)
    for loss in (fast.kl_loss(student, teacher), fast.hidden_loss(student, teacher, True)):
        loss.backward()
    assert student.grad is not None
    assert teacher.grad is None


@pytest.mark.parametrize("function", ["kl_loss", "kl_loss_vjp", "hidden_loss", "hidden_loss_vjp"])
def test_losses_refuse_other_shapes_and_nothing(function):
    for shapes in (((2, 3), (3, 3)), ((2, 3), (3,)), ((0, 3), (0, 3))):
        for package, make in ((ref, np.zeros), (fast, torch.zeros)):
            with pytest.raises(ValueError, match="same shape and at least one position, but theirs are"):
                getattr(package, function)(*map(make, shapes))


@given(pairs(st.just(np.float64)), st.floats(0, 1), st.integers(0, 2**32 - 1))
def test_kl_rows_with_labels_is_the_mixed_cross_entropy_above_the_teachers(pair, weight, seed):
    """And its second result the gradient; a row without a label has the plain loss."""
    student, teacher = (torch.from_numpy(np.atleast_2d(array).reshape(-1, array.shape[-1])) for array in pair)
    rng = np.random.default_rng(seed)
    labels = torch.from_numpy(rng.integers(-1, student.shape[-1], len(student)))
    loss, gradient = chunked.kl_rows(student, teacher, labels, weight)
    p, q = (torch.log_softmax(logits, -1) for logits in (teacher, student))
    rows = torch.arange(len(labels))
    plain = (p.exp() * (p - q)).sum(-1)
    mixed = (1 - weight) * plain + weight * (p - q)[rows, labels.clamp(min=0)]
    expected = torch.where(labels < 0, plain, mixed).sum()
    magnitude = np.float64(len(labels) * kl_magnitude(student.numpy(), teacher.numpy()))
    largest = (row_size(student.numpy()) + row_size(teacher.numpy())).sum()
    assert_within(loss, expected, magnitude + largest, terms_of(student.numpy()))
    target = (1 - weight) * p.exp()
    target[rows, labels.clamp(min=0)] += weight
    target = torch.where(labels[:, None] < 0, p.exp(), target)
    size = len(labels) * kl_vjp_magnitude(student.numpy(), teacher.numpy()) + 1
    assert_within(gradient, q.exp() - target, size, terms_of(student.numpy()))
