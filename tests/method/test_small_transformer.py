"""The notebooks' transformer: gradients by hand agree with torch's autograd, and a step with torch's AdamW."""

import littlebit.fast as fast
import littlebit.reference as ref
import numpy as np
import pytest
import torch
from littlebit.notebooks import small_transformer as small
from torch.nn import functional

ALPHABET, WIDTH, CONTEXT, BLOCKS, HEADS, BATCH = 7, 8, 6, 2, 2, 3
RTOL = 1e-9
ATOL = 1e-12  # of the largest gradient; that of a key's bias is zero, since softmax ignores what all scores share


def models():
    """Make a dense transformer in float64, and a student of two paths whose latents both rules can move."""
    rng = np.random.default_rng(0)
    dense = small.random_transformer(rng, ALPHABET, WIDTH, CONTEXT, BLOCKS, np.float64)
    student, bits = small.quantize(dense, 20.0)
    assert 0 < bits <= 20
    scaled = []
    for block in student.blocks:
        layers = []
        for layer in block:
            paths = [path._replace(u=0.02 * path.u, v=0.02 * path.v) for path in layer.paths]
            layers.append(layer._replace(paths=paths))
        scaled.append(small.Block(*layers))
    return dense, student._replace(blocks=scaled), rng.integers(0, ALPHABET, (BATCH, CONTEXT))


def torch_linear(x, layer, rule):
    if isinstance(layer, ref.Dense):
        return functional.linear(x, layer.weight, layer.bias)
    return fast.linear(x, [fast.Factors(*path) for path in layer.paths], layer.bias, rule)


def torch_forward(codes, model, rule):
    """Compute logits and hidden states with torch's own normalization and attention."""
    x, hidden = model.embedding[codes] + model.positions, []
    for block in model.blocks:
        a = functional.rms_norm(x, (WIDTH,), eps=small.EPS)
        q, k, v = (torch_linear(a, layer, rule).unflatten(-1, (HEADS, -1)).transpose(1, 2) for layer in block[:3])
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        x = x + torch_linear(mixed, block.output, rule)
        up = torch_linear(functional.rms_norm(x, (WIDTH,), eps=small.EPS), block.up, rule)
        x = x + torch_linear(up.relu(), block.down, rule)
        hidden.append(x)
    return functional.rms_norm(x, (WIDTH,), eps=small.EPS) @ model.embedding.T, hidden


def to_torch(model):
    """Rebuild a transformer with tensors that need gradients; also list them."""
    leaves = [torch.tensor(array, requires_grad=True) for array in small.arrays(model)]
    return small.with_arrays(model, iter(leaves)), leaves


@pytest.mark.parametrize("rule", sorted(ref.RULES))
def test_a_step_of_the_recipe_is_torchs(rule):
    teacher, student, codes = models()
    mine, leaves = to_torch(student)
    logits, hidden = torch_forward(codes, mine, rule)
    wanted, wanted_hidden = (lambda run: (run[0].detach(), [each.detach() for each in run[1]]))(
        torch_forward(codes, to_torch(teacher)[0], rule)
    )
    kl = fast.kl_loss(logits, wanted)
    rest = 10 * sum(fast.hidden_loss(*pair) for pair in zip(hidden, wanted_hidden, strict=True))
    optimizer = torch.optim.AdamW(leaves, lr=1e-3, weight_decay=0.1)
    (kl + rest).backward()
    optimizer.step()
    state = ref.adam_start(small.arrays(student))
    stepped, state, my_kl, my_rest = small.recipe_step(
        student, codes, teacher, HEADS, state, 1e-3, rule, weight_decay=0.1
    )
    assert np.allclose([my_kl, my_rest], [kl.item(), rest.item()], rtol=RTOL)
    grads = [10 * mean for mean in state.mean]  # Adam's first mean is a tenth of the gradient
    assert len(leaves) == len(grads)
    largest = max(np.abs(grad).max() for grad in grads)
    assert sum(np.abs(grad).max() > 1e-6 * largest for grad in grads) == len(grads) - BLOCKS
    for leaf, grad, array in zip(leaves, grads, small.arrays(stepped), strict=True):
        assert np.allclose(grad, leaf.grad, rtol=RTOL, atol=ATOL * largest)
        # where a gradient is near Adam's eps, its last digits decide the step
        assert np.allclose(array, leaf.detach(), rtol=1e-6, atol=1e-8)


def test_a_step_on_text_is_torchs():
    model, _, codes = models()
    targets = np.roll(codes, -1, axis=1)
    mine, leaves = to_torch(model)
    logits, _ = torch_forward(codes, mine, "straight_through")
    loss = functional.cross_entropy(logits.flatten(0, 1), torch.tensor(targets.ravel()))
    loss.backward()
    _, state, my_loss = small.text_step(model, codes, targets, HEADS, ref.adam_start(small.arrays(model)), 1e-3)
    assert np.isclose(my_loss, loss.item(), rtol=RTOL)
    largest = max(np.abs(10 * mean).max() for mean in state.mean)
    for leaf, mean in zip(leaves, state.mean, strict=True):
        assert np.allclose(10 * mean, leaf.grad, rtol=RTOL, atol=ATOL * largest)


def test_a_token_does_not_see_later_ones():
    model, _, codes = models()
    changed = codes.copy()
    changed[:, -1] = (changed[:, -1] + 1) % ALPHABET
    before, after = (small.forward(each, model, HEADS)[0] for each in (codes, changed))
    assert (before[:, :-1] == after[:, :-1]).all()
    assert (before[:, -1] != after[:, -1]).any()
