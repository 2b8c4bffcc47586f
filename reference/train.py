"""Train a small quantized network step by step: forward, loss, backward, Adam.

This is quantization-aware training (QAT). The network is a multi-layer perceptron with a ReLU between layers. Dense
layers make the teacher. LittleBit layers make the student, which learns the teacher's logits and, as in the paper
(LittleBit, arXiv 2506.13771), its hidden states. The paper also uses AdamW with a cosine schedule; here it is Adam.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from .distill import hidden_loss, hidden_loss_vjp, kl_loss, kl_loss_vjp, log_softmax
from .factors import Factors
from .linear import linear, linear_vjp


class AdamState(NamedTuple):
    """Hold what Adam remembers between steps: two running means for every parameter.

    Attributes
    ----------
    step : int
        Steps done.
    mean : list of arrays
        Running mean of the gradients.
    square : list of arrays
        Running mean of their squares.
    """

    step: int
    mean: list[np.ndarray]
    square: list[np.ndarray]


def adam_start(parameters: Sequence[np.ndarray]) -> AdamState:
    """Make the state of Adam before the first step: zeros for every parameter.

    Examples
    --------
    >>> adam_start([np.ones(2)])
    AdamState(step=0, mean=[array([0., 0.])], square=[array([0., 0.])])
    """
    return AdamState(0, [np.zeros_like(p) for p in parameters], [np.zeros_like(p) for p in parameters])


def adam_step(
    parameters: Sequence[np.ndarray],
    grads: Sequence[np.ndarray],
    state: AdamState,
    lr: float | Sequence[float],
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
) -> tuple[list[np.ndarray], AdamState]:
    """Update parameters by one step of Adam (Kingma and Ba, arXiv 1412.6980, algorithm 1).

        m <- b1 m + (1 - b1) grad
        v <- b2 v + (1 - b2) grad^2
        p <- p - lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps),  t = 1, 2, ...

    Parameters
    ----------
    parameters, grads : sequences of float arrays, equal in shape one by one
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
    >>> parameters = [np.array([1.0, 1.0])]
    >>> adam_step(parameters, [np.array([5.0, -0.1])], adam_start(parameters), lr=0.01)[0]
    [array([0.99, 1.01])]
    """
    rates = list(lr) if isinstance(lr, Sequence) else [lr] * len(parameters)
    check_counts(parameters, grads, state.mean, rates)
    step = state.step + 1
    mean = [betas[0] * m + (1 - betas[0]) * grad for m, grad in zip(state.mean, grads, strict=True)]
    square = [betas[1] * v + (1 - betas[1]) * (grad * grad) for v, grad in zip(state.square, grads, strict=True)]
    stepped = []
    for p, m, v, rate in zip(parameters, mean, square, rates, strict=True):
        root = np.sqrt(v / (1 - betas[1] ** step))
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

    weight: np.ndarray
    bias: np.ndarray


class Layer(NamedTuple):
    """Hold a LittleBit layer of the student; `linear` computes its output.

    Attributes
    ----------
    paths : sequence of Factors
    bias : (d_out,)
    """

    paths: Sequence[Factors]
    bias: np.ndarray


def dense_mlp(x: np.ndarray, layers: Sequence[Dense]) -> np.ndarray:
    """Compute the output of a dense multi-layer perceptron.

    y = W relu(... relu(W x + b) ...) + b

    Parameters
    ----------
    x : (..., d_in) float array
    layers : sequence of Dense

    Returns
    -------
    (..., d_out) array: no ReLU follows the last layer.

    Examples
    --------
    >>> one = np.ones((1, 1))
    >>> dense_mlp(np.array([[3.0], [-3.0]]), [Dense(2 * one, one[0]), Dense(-one, one[0])])
    array([[-6.],
           [ 1.]])
    """
    return forward(x, layers, dense)[-1]


def mlp(x: np.ndarray, layers: Sequence[Layer]) -> np.ndarray:
    """Compute the output of a LittleBit multi-layer perceptron: `linear` layers with a ReLU between.

    Parameters
    ----------
    x : (..., d_in) float array
    layers : sequence of Layer

    Returns
    -------
    (..., d_out) array: no ReLU follows the last layer.

    Examples
    --------
    >>> one = np.ones((1, 1))
    >>> layer = Layer([Factors(u=one, v=-one, h=one[0], ell=one[0], g=one[0])], bias=one[0])
    >>> mlp(np.array([[3.0], [-3.0]]), [layer, layer])
    array([[ 1.],
           [-3.]])
    """
    return forward(x, layers, littlebit_layer)[-1]


def mlp_vjp(
    x: np.ndarray, layers: Sequence[Layer], grad: np.ndarray, rule: str = "smooth_sign"
) -> tuple[np.ndarray, list[Layer]]:
    """Compute the gradients of a loss with respect to the input and all parameters of `mlp`.

    Backpropagation, from the last layer to the first: `linear_vjp` turns the gradient of a layer's output into the
    gradients of its input and parameters. The ReLU before a layer passes the gradient where its own output is positive.

    Parameters
    ----------
    x : (..., d_in) float array
    layers : sequence of Layer
    grad : (..., d_out) float array
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
    >>> one = np.ones((1, 1))
    >>> layer = Layer([Factors(u=one, v=-one, h=one[0], ell=one[0], g=one[0])], bias=one[0])
    >>> grad_x, _ = mlp_vjp(np.array([[3.0], [-3.0]]), [layer, layer], np.ones((2, 1)))
    >>> grad_x + 0.0
    array([[0.],
           [1.]])
    """
    return backward(forward(x, layers, littlebit_layer), layers, grad, littlebit_layer_vjp(rule))


def dense_step(
    layers: Sequence[Dense], x: np.ndarray, targets: np.ndarray, state: AdamState, lr: float | Sequence[float]
) -> tuple[list[Dense], AdamState, float]:
    """Train a dense network by one step: forward, cross-entropy, backward, Adam.

    Parameters
    ----------
    layers : sequence of Dense
    x : (..., d_in) float array
    targets : (...) integer array
        Correct class of each row.
    state : AdamState
        `adam_start(dense_parameters(layers))` before the first step.
    lr : float, or one float per parameter

    Returns
    -------
    layers and state after the step, and the loss before it, in nats.

    Examples
    --------
    >>> layers = [Dense(np.zeros((2, 1)), np.zeros(2))]
    >>> x, targets = np.array([[1.0], [-1.0]]), np.array([0, 1])
    >>> state = adam_start(dense_parameters(layers))
    >>> layers, state, loss = dense_step(layers, x, targets, state, lr=0.1)
    >>> round(loss, 6), layers[0].weight.round(6)
    (0.693147, array([[ 0.1],
           [-0.1]]))
    """
    values = forward(x, layers, dense)
    loss = cross_entropy(values[-1], targets)
    _, grads = backward(values, layers, cross_entropy_vjp(values[-1], targets), dense_vjp)
    stepped, state = adam_step(dense_parameters(layers), dense_parameters(grads), state, lr)
    return with_dense_parameters(layers, stepped), state, float(loss)


def qat_step(
    layers: Sequence[Layer],
    x: np.ndarray,
    teacher_logits: np.ndarray,
    state: AdamState,
    lr: float | Sequence[float],
    rule: str = "smooth_sign",
    teacher_hidden: Sequence[np.ndarray] = (),
    hidden_weight: float = 10.0,
) -> tuple[list[Layer], AdamState, float]:
    """Train a LittleBit network by one step of QAT: forward, KL to the teacher, backward, Adam.

    loss = KL(teacher || student) + hidden_weight * sum over hidden states of `hidden_loss`

    The second term (LittleBit, arXiv 2506.13771, with weight 10) needs the teacher's hidden states.

    Parameters
    ----------
    layers : sequence of Layer
    x : (..., d_in) float array
    teacher_logits : (..., d_out) float array
        The teacher's output for x.
    state : AdamState
        `adam_start(parameters(layers))` before the first step.
    lr : float, or one float per parameter
    rule : str
        The gradient of a sign: a name in `signs.RULES`.
    teacher_hidden : sequence of (..., width) float arrays
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
    >>> one = np.ones((1, 1))
    >>> path = Factors(u=np.ones((2, 1)), v=one, h=np.array([1.0, 2.0]), ell=one[0], g=one[0])
    >>> layers = [Layer([path], bias=np.zeros(2))]
    >>> state = adam_start(parameters(layers))
    >>> layers, state, loss = qat_step(layers, np.ones((1, 1)), np.log([[0.75, 0.25]]), state, lr=0.1)
    >>> round(loss, 4), layers[0].paths[0].h.round(4), layers[0].bias.round(4)
    (0.5009, array([1.1, 1.9]), array([ 0.1, -0.1]))
    """
    values = forward(x, layers, littlebit_layer)
    loss = kl_loss(values[-1], teacher_logits)
    pairs = hidden_pairs(values[1:-1], teacher_hidden)
    loss = loss + hidden_weight * sum(hidden_loss(mine, theirs) for mine, theirs in pairs)
    extra = [hidden_weight * hidden_loss_vjp(mine, theirs) for mine, theirs in pairs]
    grad = kl_loss_vjp(values[-1], teacher_logits)
    _, grads = backward(values, layers, grad, littlebit_layer_vjp(rule), extra)
    stepped, state = adam_step(parameters(layers), parameters(grads), state, lr)
    return with_parameters(layers, stepped), state, float(loss)


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
    >>> one = np.ones((1, 1))
    >>> path = Factors(u=np.ones((2, 1)), v=one, h=np.array([1.0, 2.0]), ell=one[0], g=one[0])
    >>> layers = [Layer([path], bias=np.zeros(2))]
    >>> layers, state, losses = qat(layers, [(np.ones((1, 1)), np.log([[0.75, 0.25]]))] * 3, lr=0.1)
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


def dense_parameters(layers: Sequence[Dense]) -> list[np.ndarray]:
    """List weight and bias of each layer."""
    return [array for layer in layers for array in layer]


def with_dense_parameters(layers: Sequence[Dense], values: Iterable[np.ndarray]) -> list[Dense]:
    """Rebuild dense layers with other parameters, in the order of `dense_parameters`."""
    rest = iter(values)
    return [Dense(*(next(rest) for _ in layer)) for layer in layers]


def parameters(layers: Sequence[Layer]) -> list[np.ndarray]:
    """List u, v, h, ell and g of each path, then the bias, for each layer."""
    return [array for layer in layers for array in (*(array for path in layer.paths for array in path), layer.bias)]


def with_parameters(layers: Sequence[Layer], values: Iterable[np.ndarray]) -> list[Layer]:
    """Rebuild LittleBit layers with other parameters, in the order of `parameters`."""
    rest = iter(values)
    return [Layer([Factors(*(next(rest) for _ in path)) for path in layer.paths], next(rest)) for layer in layers]


def forward(x: np.ndarray, layers: Sequence[Any], apply: Callable[[np.ndarray, Any], np.ndarray]) -> list[np.ndarray]:
    """Compute the input of each layer, and the output of the last."""
    values = [x]
    for layer in layers[:-1]:
        values.append(np.maximum(apply(values[-1], layer), 0))  # ReLU
    return [*values, apply(values[-1], layers[-1])]


def backward(
    values: Sequence[np.ndarray], layers: Sequence[Any], grad: np.ndarray, vjp: Callable, hidden: Sequence = ()
) -> tuple[np.ndarray, list]:
    """Compute the gradients of the input and of each layer.

    They follow from the values of `forward`, the gradient of the output, and what the loss adds to the gradients of the
    hidden states, the inputs of all layers but the first.
    """
    grads = []
    for at in reversed(range(len(layers))):
        grad, grad_layer = vjp(values[at], layers[at], grad)
        grads.append(grad_layer)
        if hidden and at > 0:
            grad = grad + hidden[at - 1]
        if at > 0:
            grad = grad * (values[at] > 0)  # ReLU
    return grad, grads[::-1]


def littlebit_layer(x: np.ndarray, layer: Layer) -> np.ndarray:
    """Compute the output of a LittleBit layer."""
    return linear(x, layer.paths, layer.bias)


def littlebit_layer_vjp(rule: str) -> Callable[[np.ndarray, Layer, np.ndarray], tuple[np.ndarray, Layer]]:
    """Make the function (x, layer, grad) -> (grad_x, grad_layer) of a LittleBit layer under a rule."""

    def vjp(x: np.ndarray, layer: Layer, grad: np.ndarray) -> tuple[np.ndarray, Layer]:
        grad_x, grad_paths, grad_bias = linear_vjp(x, layer.paths, grad, rule)
        return grad_x, Layer(grad_paths, grad_bias)

    return vjp


def dense(x: np.ndarray, layer: Dense) -> np.ndarray:
    """Compute the output of a dense layer."""
    return x @ layer.weight.T + layer.bias


def dense_vjp(x: np.ndarray, layer: Dense, grad: np.ndarray) -> tuple[np.ndarray, Dense]:
    """Compute the gradients of a dense layer: dx = dy W, dW = dy^T x, db = sum dy."""
    rows, dy = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
    return grad @ layer.weight, Dense(dy.T @ rows, dy.sum(axis=0))


def cross_entropy(logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Compute the mean over positions of -log softmax(logits)[target], in nats.

    Logits are (..., classes), targets (...).
    """
    return -np.take_along_axis(log_softmax(logits), targets[..., None], axis=-1).mean()


def cross_entropy_vjp(logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Compute the gradient of `cross_entropy`: (softmax(logits) - one at the target) / positions."""
    gradient = np.exp(log_softmax(logits))
    chosen = np.take_along_axis(gradient, targets[..., None], axis=-1)
    np.put_along_axis(gradient, targets[..., None], chosen - 1, axis=-1)
    return (gradient / targets.size).astype(logits.dtype)
