"""A small transformer in NumPy, with its backward pass by hand: the one that a notebook trains by the paper's recipe.

It reads characters and predicts the next one. Each block is causal attention, then a multi-layer perceptron, each after
a normalization and added to the residual stream. The six linear layers of a block are `Dense` in the teacher and
`Layer` (LittleBit paths) in the student; everything else is the same in both.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import littlebit.reference as ref
import numpy as np
from littlebit.reference import train

EPS = 1e-6  # under the root of a normalization


class Block(NamedTuple):
    """Hold the linear layers of a block, each `Dense` or `Layer`.

    Attributes
    ----------
    query, key, value, output : (width, width) each
        Of attention.
    up : (4 width, width); down : (width, 4 width)
        Of the multi-layer perceptron, with a ReLU between them.
    """

    query: Any
    key: Any
    value: Any
    output: Any
    up: Any
    down: Any


class Transformer(NamedTuple):
    """Hold a transformer.

    Attributes
    ----------
    embedding : (alphabet, width)
        The embedding of each character; its transpose computes the logits.
    positions : (context, width)
    blocks : sequence of Block
    """

    embedding: np.ndarray
    positions: np.ndarray
    blocks: Sequence[Block]


def random_transformer(
    rng: np.random.Generator, alphabet: int, width: int, context: int, blocks: int, dtype: Any = np.float32
) -> Transformer:
    """Draw a transformer with `Dense` layers before training."""

    def dense(d_out: int, d_in: int) -> ref.Dense:
        return ref.Dense((rng.standard_normal((d_out, d_in)) / np.sqrt(d_in)).astype(dtype), np.zeros(d_out, dtype))

    square, wide = (width, width), (4 * width, width)
    layers = [Block._make(dense(*size) for size in (*[square] * 4, wide, wide[::-1])) for _ in range(blocks)]
    embedding, positions = ((0.1 * rng.standard_normal((n, width))).astype(dtype) for n in (alphabet, context))
    return Transformer(embedding, positions, layers)


def arrays(value: Any) -> list[np.ndarray]:
    """List every array of a transformer, or of a part of one, in a fixed order."""
    return [value] if isinstance(value, np.ndarray) else [array for part in value for array in arrays(part)]


def with_arrays(value: Any, rest: Any) -> Any:
    """Rebuild a transformer with other arrays, an iterator in the order of `arrays`."""
    if isinstance(value, np.ndarray):
        return next(rest)
    parts = [with_arrays(part, rest) for part in value]
    return type(value)(*parts) if hasattr(value, "_fields") else parts


def quantize(model: Transformer, bits: float, paths: int = 2) -> tuple[Transformer, float]:
    """Replace each linear layer by Dual-SVID paths with residual compensation, and count stored bits per weight."""
    stored, weights = 0, 0

    def quantized(layer: ref.Dense) -> ref.Layer:
        nonlocal stored, weights
        d_out, d_in = layer.weight.shape
        rank = ref.rank_for_bits(d_out, d_in, bits, paths)
        stored, weights = stored + paths * ref.path_bits(d_out, d_in, rank), weights + d_out * d_in
        return ref.Layer(ref.compensate(layer.weight, [rank] * paths), layer.bias)

    blocks = [Block._make(map(quantized, block)) for block in model.blocks]
    return model._replace(blocks=blocks), stored / weights


def apply(x: np.ndarray, layer: Any) -> np.ndarray:
    """Compute the output of a linear layer of either kind."""
    return train.dense(x, layer) if isinstance(layer, ref.Dense) else train.littlebit_layer(x, layer)


def apply_vjp(x: np.ndarray, layer: Any, grad: np.ndarray, rule: str) -> tuple[np.ndarray, Any]:
    """Compute the gradients of the input and of a linear layer of either kind."""
    vjp: Any = train.dense_vjp if isinstance(layer, ref.Dense) else train.littlebit_layer_vjp(rule)
    return vjp(x, layer, grad)


def normalize(x: np.ndarray) -> np.ndarray:
    """Divide each row by its root mean square (RMSNorm without a weight)."""
    return x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + EPS)


def normalize_vjp(x: np.ndarray, grad: np.ndarray) -> np.ndarray:
    """Compute the gradient of `normalize`: what points along the row is taken out, the rest is divided as the row was.

    y = x / r, r^2 = mean(x^2) + eps: dx = (dy - y mean(dy y)) / r
    """
    root = np.sqrt((x * x).mean(axis=-1, keepdims=True) + EPS)
    y = x / root
    return (grad - y * (grad * y).mean(axis=-1, keepdims=True)) / root


def split(x: np.ndarray, heads: int) -> np.ndarray:
    """Divide the last axis among heads: (batch, tokens, width) -> (batch, heads, tokens, size)."""
    return x.reshape(*x.shape[:-1], heads, -1).swapaxes(-2, -3)


def join(x: np.ndarray) -> np.ndarray:
    """Undo `split`."""
    return x.swapaxes(-2, -3).reshape(*x.shape[:-3], x.shape[-2], -1)


def attention_weights(query: np.ndarray, key: np.ndarray) -> np.ndarray:
    """Compute softmax(q k^T / sqrt(size)) over the tokens up to each one: (batch, heads, tokens, tokens)."""
    tokens, size = query.shape[-2:]
    scores = query @ key.swapaxes(-1, -2) / np.sqrt(size).astype(query.dtype)
    scores = np.where(np.tri(tokens, dtype=bool), scores, -np.inf)
    exponentials = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return exponentials / exponentials.sum(axis=-1, keepdims=True)


def block_forward(x: np.ndarray, block: Block, heads: int) -> tuple[np.ndarray, tuple]:
    """Compute the output of a block, and what its backward pass needs."""
    a = normalize(x)
    q, k, v = (split(apply(a, layer), heads) for layer in block[:3])
    p = attention_weights(q, k)
    mixed = join(p @ v)
    middle = x + apply(mixed, block.output)
    b = normalize(middle)
    hidden = np.maximum(apply(b, block.up), 0)
    return middle + apply(hidden, block.down), (x, a, q, k, v, p, mixed, middle, b, hidden)


def block_vjp(kept: tuple, block: Block, heads: int, grad: np.ndarray, rule: str) -> tuple[np.ndarray, Block]:
    """Compute the gradients of a block's input and layers, from the last line of `block_forward` to the first."""
    x, a, q, k, v, p, mixed, middle, b, hidden = kept
    d_hidden, down = apply_vjp(hidden, block.down, grad, rule)
    d_b, up = apply_vjp(b, block.up, d_hidden * (hidden > 0), rule)
    d_middle = grad + normalize_vjp(middle, d_b)
    d_mixed, output = apply_vjp(mixed, block.output, d_middle, rule)
    d_heads = split(d_mixed, heads)
    d_v, d_p = p.swapaxes(-1, -2) @ d_heads, d_heads @ v.swapaxes(-1, -2)
    d_scores = p * (d_p - (p * d_p).sum(axis=-1, keepdims=True)) / np.sqrt(q.shape[-1]).astype(q.dtype)
    pairs = zip((d_scores @ k, d_scores.swapaxes(-1, -2) @ q, d_v), block[:3], strict=True)
    grads = [apply_vjp(a, layer, join(each), rule) for each, layer in pairs]
    d_x = d_middle + normalize_vjp(x, np.sum([d_a for d_a, _ in grads], axis=0))
    return d_x, Block._make([*(layer for _, layer in grads), output, up, down])


def forward(codes: np.ndarray, model: Transformer, heads: int) -> tuple[np.ndarray, list[np.ndarray], list[tuple]]:
    """Compute logits (batch, tokens, alphabet), the output of each block, and what the backward pass needs."""
    x = model.embedding[codes] + model.positions[: codes.shape[-1]]
    hidden, kept = [], []
    for block in model.blocks:
        x, inside = block_forward(x, block, heads)
        hidden.append(x)
        kept.append(inside)
    return normalize(x) @ model.embedding.T, hidden, kept


def backward(
    codes: np.ndarray,
    model: Transformer,
    heads: int,
    run: tuple,
    grad: np.ndarray,
    hidden_grads: Sequence = (),
    rule: str = "smooth_sign",
) -> Transformer:
    """Compute the gradients of all parameters.

    Parameters
    ----------
    codes : (batch, tokens) integers
    model : Transformer
    heads : int
    run : tuple
        What `forward` returned.
    grad : (batch, tokens, alphabet)
        Gradient of the loss with respect to the logits.
    hidden_grads : sequence of (batch, tokens, width)
        What the loss adds to the gradient of each block's output; may be empty.
    rule : str
        The gradient of a sign: a name in `signs.RULES`.
    """
    _, hidden, kept = run
    last, rows = normalize(hidden[-1]), grad.reshape(-1, grad.shape[-1])
    d_embedding = rows.T @ last.reshape(len(rows), -1)
    d_x, blocks = normalize_vjp(hidden[-1], grad @ model.embedding), []
    for at in reversed(range(len(model.blocks))):
        if hidden_grads:
            d_x = d_x + hidden_grads[at]
        d_x, block = block_vjp(kept[at], model.blocks[at], heads, d_x, rule)
        blocks.append(block)
    np.add.at(d_embedding, codes, d_x)
    d_positions = np.zeros_like(model.positions)
    d_positions[: codes.shape[-1]] = d_x.sum(axis=0)
    return Transformer(d_embedding, d_positions, blocks[::-1])


def recipe_step(
    student: Transformer,
    codes: np.ndarray,
    teacher: Transformer,
    heads: int,
    state: ref.AdamState,
    lr: float,
    rule: str = "smooth_sign",
    hidden_weight: float = 10.0,
    weight_decay: float = 0.0,
) -> tuple[Transformer, ref.AdamState, float, float]:
    """Train the student by one step of the paper's recipe.

    loss = KL(teacher || student) + hidden_weight * sum over blocks of the mean squared error of the block's output

    The optimizer is AdamW (Loshchilov and Hutter, arXiv 1711.05101).

    Returns
    -------
    student and state after the step, KL and the second term before it.
    """
    logits, wanted, _ = forward(codes, teacher, heads)
    run = forward(codes, student, heads)
    pairs = list(zip(run[1], wanted, strict=True))
    extra = [hidden_weight * ref.hidden_loss_vjp(mine, theirs) for mine, theirs in pairs]
    grads = backward(codes, student, heads, run, ref.kl_loss_vjp(run[0], logits), extra, rule)
    decayed = [(1 - lr * weight_decay) * array for array in arrays(student)]  # AdamW: Adam on parameters that shrink
    stepped, state = ref.adam_step(decayed, arrays(grads), state, lr)
    kl, rest = ref.kl_loss(run[0], logits), hidden_weight * sum(ref.hidden_loss(*pair) for pair in pairs)
    return with_arrays(student, iter(stepped)), state, float(kl), float(rest)


def text_step(
    model: Transformer, codes: np.ndarray, targets: np.ndarray, heads: int, state: ref.AdamState, lr: float
) -> tuple[Transformer, ref.AdamState, float]:
    """Train a transformer by one step on text: cross-entropy of the next characters, backward, Adam.

    Returns
    -------
    model and state after the step, and the loss before it, in nats.
    """
    run = forward(codes, model, heads)
    grads = backward(codes, model, heads, run, train.cross_entropy_vjp(run[0], targets))
    stepped, state = ref.adam_step(arrays(model), arrays(grads), state, lr)
    return with_arrays(model, iter(stepped)), state, float(train.cross_entropy(run[0], targets))


def cosine(step: int, steps: int, lr: float) -> float:
    """Compute the learning rate of a cosine schedule, which falls from lr to 0."""
    return 0.5 * lr * (1 + float(np.cos(np.pi * step / steps)))
