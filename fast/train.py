"""Train a small quantized network step by step: forward, loss, backward, Adam.

This is quantization-aware training (QAT). The network is a multi-layer perceptron with a ReLU between layers. Dense
layers make the teacher. LittleBit layers make the student, which learns the teacher's logits and, as in the paper
(LittleBit, arXiv 2506.13771), its hidden states. The paper also uses AdamW with a cosine schedule; here it is Adam.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from .distill import hidden_loss, kl_loss
from .factors import Factors
from .linear import linear


class AdamState(NamedTuple):
    """Hold what Adam remembers between steps: two running means for every parameter.

    Attributes
    ----------
    step : int
        Steps done.
    mean : list of tensors
        Running mean of the gradients.
    square : list of tensors
        Running mean of their squares.
    """

    step: int
    mean: list[Tensor]
    square: list[Tensor]


def adam_start(parameters: Sequence[Tensor]) -> AdamState:
    """Make the state of Adam before the first step: zeros for every parameter.

    Examples
    --------
    >>> adam_start([torch.ones(2)])
    AdamState(step=0, mean=[tensor([0., 0.])], square=[tensor([0., 0.])])
    """
    return AdamState(0, [torch.zeros_like(p) for p in parameters], [torch.zeros_like(p) for p in parameters])


def adam_step(
    parameters: Sequence[Tensor],
    grads: Sequence[Tensor],
    state: AdamState,
    lr: float | Sequence[float],
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
) -> tuple[list[Tensor], AdamState]:
    """Update parameters by one step of Adam (Kingma and Ba, arXiv 1412.6980, algorithm 1).

        m <- b1 m + (1 - b1) grad
        v <- b2 v + (1 - b2) grad^2
        p <- p - lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps),  t = 1, 2, ...

    Parameters
    ----------
    parameters, grads : sequences of float tensors, equal in shape one by one
    state : AdamState
    lr : float, or one float per parameter
        Learning rate.
    betas : (b1, b2)
    eps : float

    Returns
    -------
    The new parameters and the new state; the arguments do not change.

    Raises
    ------
    ValueError
        If there is not one gradient, one moment and one learning rate per parameter.

    Examples
    --------
    >>> parameters = [torch.tensor([1.0, 1.0])]
    >>> adam_step(parameters, [torch.tensor([5.0, -0.1])], adam_start(parameters), lr=0.01)[0]
    [tensor([0.9900, 1.0100])]
    """
    rates = list(lr) if isinstance(lr, Sequence) else [lr] * len(parameters)
    check_counts(parameters, grads, state.mean, rates)
    step = state.step + 1
    mean = [betas[0] * m + (1 - betas[0]) * grad for m, grad in zip(state.mean, grads, strict=True)]
    square = [betas[1] * v + (1 - betas[1]) * (grad * grad) for v, grad in zip(state.square, grads, strict=True)]
    stepped = []
    for p, m, v, rate in zip(parameters, mean, square, rates, strict=True):
        root = torch.sqrt(v / (1 - betas[1] ** step))
        stepped.append(p - rate * (m / (1 - betas[0] ** step)) / (root + eps))
    return stepped, AdamState(step, mean, square)


def check_counts(parameters: Sequence, grads: Sequence, moments: Sequence, rates: Sequence[float]) -> None:
    """Raise ValueError unless there is one gradient, one moment and one learning rate per parameter."""
    if not len(parameters) == len(grads) == len(moments) == len(rates):
        raise ValueError(
            "there must be one gradient, one moment and one learning rate per parameter, but for "
            f"{len(parameters)} parameters there are {len(grads)} gradients, {len(moments)} moments (adam_start makes "
            f"them) and {len(rates)} rates"
        )


class Dense(NamedTuple):
    """Hold a dense layer of the teacher, y = W x + b.

    Attributes
    ----------
    weight : (d_out, d_in)
    bias : (d_out,)
    """

    weight: Tensor
    bias: Tensor


class Layer(NamedTuple):
    """Hold a LittleBit layer of the student; `linear` computes its output.

    Attributes
    ----------
    paths : sequence of Factors
    bias : (d_out,)
    """

    paths: Sequence[Factors]
    bias: Tensor


def dense_mlp(x: Tensor, layers: Sequence[Dense]) -> Tensor:
    """Compute the output of a dense multi-layer perceptron.

    y = W relu(... relu(W x + b) ...) + b

    Parameters
    ----------
    x : (..., d_in) float tensor
    layers : sequence of Dense

    Returns
    -------
    (..., d_out) tensor: no ReLU follows the last layer.

    Examples
    --------
    >>> one = torch.ones((1, 1))
    >>> dense_mlp(torch.tensor([[3.0], [-3.0]]), [Dense(2 * one, one[0]), Dense(-one, one[0])])
    tensor([[-6.],
            [ 1.]])
    """
    for layer in layers[:-1]:
        x = functional.linear(x, *layer).relu()
    return functional.linear(x, *layers[-1])


def mlp(x: Tensor, layers: Sequence[Layer], rule: str = "smooth_sign") -> Tensor:
    """Compute the output of a LittleBit multi-layer perceptron: `linear` layers with a ReLU between.

    Parameters
    ----------
    x : (..., d_in) float tensor
    layers : sequence of Layer
    rule : str
        The gradient that autograd gives a sign: a name in `signs.RULES`. It does not change the output.

    Returns
    -------
    (..., d_out) tensor: no ReLU follows the last layer.

    Examples
    --------
    >>> one = torch.ones((1, 1))
    >>> layer = Layer([Factors(u=one, v=-one, h=one[0], ell=one[0], g=one[0])], bias=one[0])
    >>> mlp(torch.tensor([[3.0], [-3.0]]), [layer, layer])
    tensor([[ 1.],
            [-3.]])
    """
    for layer in layers[:-1]:
        x = linear(x, *layer, rule=rule).relu()
    return linear(x, *layers[-1], rule=rule)


def mlp_vjp(x: Tensor, layers: Sequence[Layer], grad: Tensor, rule: str = "smooth_sign") -> tuple[Tensor, list[Layer]]:
    """Compute the gradients of a loss with respect to the input and all parameters of `mlp`.

    Backpropagation by autograd.

    Parameters
    ----------
    x : (..., d_in) float tensor
    layers : sequence of Layer
    grad : (..., d_out) float tensor
        Gradient of the loss with respect to the output.
    rule : str
        The gradient of a sign: a name in `signs.RULES`.

    Returns
    -------
    grad_x : (..., d_in); grad_layers : list of Layer.

    Raises
    ------
    ValueError
        If a shape does not fit, or there is no such rule.

    Examples
    --------
    >>> one = torch.ones((1, 1))
    >>> layer = Layer([Factors(u=one, v=-one, h=one[0], ell=one[0], g=one[0])], bias=one[0])
    >>> grad_x, _ = mlp_vjp(torch.tensor([[3.0], [-3.0]]), [layer, layer], torch.ones((2, 1)))
    >>> grad_x + 0.0
    tensor([[0.],
            [1.]])
    """
    leaves = [tensor.detach().requires_grad_() for tensor in (x, *parameters(layers))]
    with torch.enable_grad():
        y = mlp(leaves[0], with_parameters(layers, leaves[1:]), rule)
    grad_x, *grads = torch.autograd.grad(y, leaves, grad)
    return grad_x, with_parameters(layers, grads)


def dense_step(
    layers: Sequence[Dense], x: Tensor, targets: Tensor, state: AdamState, lr: float | Sequence[float]
) -> tuple[list[Dense], AdamState, float]:
    """Train a dense network by one step: forward, cross-entropy, backward, Adam.

    Parameters
    ----------
    layers : sequence of Dense
    x : (..., d_in) float tensor
    targets : (...) integer tensor
        Correct class of each row.
    state : AdamState
        `adam_start(dense_parameters(layers))` before the first step.
    lr : float, or one float per parameter

    Returns
    -------
    layers and state after the step, and the loss before it, in nats.

    Examples
    --------
    >>> layers = [Dense(torch.zeros((2, 1)), torch.zeros(2))]
    >>> x, targets = torch.tensor([[1.0], [-1.0]]), torch.tensor([0, 1])
    >>> state = adam_start(dense_parameters(layers))
    >>> layers, state, loss = dense_step(layers, x, targets, state, lr=0.1)
    >>> round(loss, 4), layers[0].weight
    (0.6931, tensor([[ 0.1000],
            [-0.1000]]))
    """
    leaves = [tensor.detach().requires_grad_() for tensor in dense_parameters(layers)]
    with torch.enable_grad():
        loss = cross_entropy(dense_mlp(x, with_dense_parameters(layers, leaves)), targets)
    grads = torch.autograd.grad(loss, leaves)
    stepped, state = adam_step(dense_parameters(layers), grads, state, lr)
    return with_dense_parameters(layers, stepped), state, loss.item()


def qat_step(
    layers: Sequence[Layer],
    x: Tensor,
    teacher_logits: Tensor,
    state: AdamState,
    lr: float | Sequence[float],
    rule: str = "smooth_sign",
    teacher_hidden: Sequence[Tensor] = (),
    hidden_weight: float = 10.0,
) -> tuple[list[Layer], AdamState, float]:
    """Train a LittleBit network by one step of QAT: forward, KL to the teacher, backward, Adam.

    loss = KL(teacher || student) + hidden_weight * sum over hidden states of `hidden_loss`

    The second term (LittleBit, arXiv 2506.13771, with weight 10) needs the teacher's hidden states.

    Parameters
    ----------
    layers : sequence of Layer
    x : (..., d_in) float tensor
    teacher_logits : (..., d_out) float tensor
        The teacher's output for x.
    state : AdamState
        `adam_start(parameters(layers))` before the first step.
    lr : float, or one float per parameter
    rule : str
        The gradient of a sign: a name in `signs.RULES`.
    teacher_hidden : sequence of (..., width) float tensors
        The teacher's outputs of all layers but the last, after the ReLU. Empty leaves the second term out.
    hidden_weight : float

    Returns
    -------
    layers and state after the step, and the loss before it.

    Raises
    ------
    ValueError
        If a shape or the number of hidden states does not fit, or there is no such rule.

    Examples
    --------
    >>> one = torch.ones((1, 1))
    >>> path = Factors(u=torch.ones((2, 1)), v=one, h=torch.tensor([1.0, 2.0]), ell=one[0], g=one[0])
    >>> layers = [Layer([path], bias=torch.zeros(2))]
    >>> state = adam_start(parameters(layers))
    >>> layers, state, loss = qat_step(layers, torch.ones((1, 1)), torch.tensor([[0.75, 0.25]]).log(), state, lr=0.1)
    >>> round(loss, 4), layers[0].paths[0].h, layers[0].bias
    (0.5009, tensor([1.1000, 1.9000]), tensor([ 0.1000, -0.1000]))
    """
    leaves = [tensor.detach().requires_grad_() for tensor in parameters(layers)]
    with torch.enable_grad():
        student, states = with_parameters(layers, leaves), [x]
        for layer in student[:-1]:
            states.append(linear(states[-1], *layer, rule=rule).relu())
        loss = kl_loss(linear(states[-1], *student[-1], rule=rule), teacher_logits)
        pairs = hidden_pairs(states[1:], teacher_hidden)
        loss = loss + hidden_weight * sum(hidden_loss(mine, theirs) for mine, theirs in pairs)
    grads = torch.autograd.grad(loss, leaves)
    stepped, state = adam_step(parameters(layers), grads, state, lr)
    return with_parameters(layers, stepped), state, loss.item()


def qat(
    layers: Sequence[Layer],
    batches: Iterable[tuple],
    lr: float | Sequence[float],
    rule: str = "smooth_sign",
    state: AdamState | None = None,
) -> tuple[list[Layer], AdamState, list[float]]:
    """Train a LittleBit network by quantization-aware training (QAT), one `qat_step` for each batch.

    Parameters
    ----------
    layers : sequence of Layer
    batches : iterable of (x, teacher_logits) or (x, teacher_logits, teacher_hidden)
    lr : float, or one float per parameter
    rule : str
        The gradient of a sign: a name in `signs.RULES`.
    state : AdamState, optional
        Returned by an earlier call, to continue from there, for instance at another learning rate.

    Returns
    -------
    layers and state after the last step, and the loss before each, in nats.

    Raises
    ------
    ValueError
        If a shape does not fit, or there is no such rule.

    Examples
    --------
    >>> one = torch.ones((1, 1))
    >>> path = Factors(u=torch.ones((2, 1)), v=one, h=torch.tensor([1.0, 2.0]), ell=one[0], g=one[0])
    >>> layers = [Layer([path], bias=torch.zeros(2))]
    >>> layers, state, losses = qat(layers, [(torch.ones((1, 1)), torch.tensor([[0.75, 0.25]]).log())] * 3, lr=0.1)
    >>> [round(loss, 4) for loss in losses], state.step
    ([0.5009, 0.2677, 0.1304], 3)
    """
    layers = list(layers)
    state = adam_start(parameters(layers)) if state is None else state
    losses = []
    for x, teacher_logits, *hidden in batches:
        layers, state, loss = qat_step(layers, x, teacher_logits, state, lr, rule, *hidden)
        losses.append(loss)
    return layers, state, losses


def hidden_pairs(student: Sequence, teacher: Sequence) -> list[tuple]:
    """Pair the hidden states of student and teacher; no pair if the teacher's are not given.

    Raises
    ------
    ValueError
        If their numbers differ.
    """
    if teacher and len(teacher) != len(student):
        raise ValueError(
            f"the teacher must have as many hidden states as the student, {len(student)}, got {len(teacher)}"
        )
    return list(zip(student, teacher, strict=True)) if teacher else []


def dense_parameters(layers: Sequence[Dense]) -> list[Tensor]:
    """List weight and bias of each layer."""
    return [tensor for layer in layers for tensor in layer]


def with_dense_parameters(layers: Sequence[Dense], values: Iterable[Tensor]) -> list[Dense]:
    """Rebuild dense layers with other parameters, in the order of `dense_parameters`."""
    rest = iter(values)
    return [Dense(*(next(rest) for _ in layer)) for layer in layers]


def parameters(layers: Sequence[Layer]) -> list[Tensor]:
    """List u, v, h, ell and g of each path, then the bias, for each layer."""
    return [tensor for layer in layers for tensor in (*(tensor for path in layer.paths for tensor in path), layer.bias)]


def with_parameters(layers: Sequence[Layer], values: Iterable[Tensor]) -> list[Layer]:
    """Rebuild LittleBit layers with other parameters, in the order of `parameters`."""
    rest = iter(values)
    return [Layer([Factors(*(next(rest) for _ in path)) for path in layer.paths], next(rest)) for layer in layers]


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Compute the mean over positions of -log softmax(logits)[target], in nats.

    Logits are (..., classes), targets (...).
    """
    return functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), targets.reshape(-1))
