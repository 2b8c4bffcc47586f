"""Test that the stacked student has the same outputs and gradients as the quantized model, layer by layer.

Bounds come from the arithmetic and from the whole model's condition, which is measured: see `strategies.condition`.
"""

import copy

import littlebit.fast as lb
import pytest
import torch
from compare import assert_same, assert_within
from littlebit.conformance.strategies import condition
from littlebit.fast.distill import kl_loss
from littlebit.fast.linear import folded
from littlebit.fast.models.quantize import replace_module
from littlebit.fast.signs import RULES
from littlebit.fast.training import student as students
from littlebit.fast.training.student import RANK_STEP, StackedStudent, littlebit_layers

TOKENS = torch.arange(48).reshape(3, 16) * 5 % 256


@pytest.fixture(params=[1, 2], ids=["one path", "two paths"])
def quantised(loud_llama, request):
    """Quantize a model so that every layer has a different rank, 3 to 29, even among equal shapes."""
    torch.manual_seed(0)
    model = lb.load_model(loud_llama)
    layers = [(name, each) for name, each in model.named_modules() if isinstance(each, torch.nn.Linear)]
    for at, (name, layer) in enumerate(layers):
        if name != "lm_head":
            ranks = [3 + 2 * at, 29 - at][: request.param]
            paths = [lb.dual_svid(layer.weight.detach(), rank) for rank in ranks]
            paths = [path._replace(u=0.3 * torch.randn_like(path.u), h=path.h * 8) for path in paths]
            replace_module(model, name, lb.LittleBitLinear(paths, layer.bias))
    return model


def roundings(model):
    """Count the roundings along the longest chain of sums: into and out of every layer, and around it."""
    sums = sum(layer.d_in + layer.d_out + sum(layer.ranks) for layer in littlebit_layers(model).values())
    return sums + 260 + 16 * 64


def with_parameters(model, arrays):
    for parameter, array in zip(model.parameters(), arrays, strict=True):
        parameter.data = torch.from_numpy(array)
    return model


def parameters(model):
    return [parameter.detach().double().numpy().copy() for parameter in model.parameters()]


def test_logits_are_the_quantised_models_own(quantised):
    with torch.no_grad():
        own = quantised(TOKENS, use_cache=False).logits
    wide = copy.deepcopy(quantised).double()

    def exact(*arrays):
        with torch.no_grad():
            return with_parameters(wide, arrays)(TOKENS, use_cache=False).logits.numpy()

    start = parameters(quantised)
    magnitude = condition(exact, *start)
    student = StackedStudent(copy.deepcopy(quantised), "straight_through", "norms", torch.float32)
    for actual in (own, student.logits(TOKENS)):
        assert_within(actual, exact(*start), magnitude, roundings(quantised))


@pytest.mark.parametrize("rule", list(RULES))
def test_gradients_are_those_of_the_layers_own_parameters(quantised, rule):
    """In float64, where the noise that measures the condition is far above rounding."""
    wide = quantised.double()
    wanted = torch.randn(*TOKENS.shape, 260, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for layer in littlebit_layers(wide).values():
        layer.rule = rule
    names = [name for name, _ in wide.named_parameters()]

    def gradients(*arrays):
        model = with_parameters(wide, arrays)
        loss = kl_loss(model(TOKENS, use_cache=False).logits, wanted)
        return torch.autograd.grad(loss, list(model.parameters()))

    start = parameters(wide)
    expected = dict(zip(names, gradients(*start), strict=True))

    def flat(*arrays):
        return torch.cat([grad.flatten() / expected[name].norm() for name, grad in named(gradients(*arrays))]).numpy()

    def named(grads):
        return list(zip(names, grads, strict=True))

    size = condition(flat, *start).max()
    student = StackedStudent(with_parameters(wide, start), rule, "all", torch.float64)
    loss = kl_loss(student.logits(TOKENS), wanted)
    masters = student.masters().named()
    grads = dict(zip(masters, torch.autograd.grad(loss, list(masters.values())), strict=True))
    seen = set()
    for stack in student.stacks:
        for at, path in enumerate(stack.paths):
            for field in path._fields:
                stacked = grads.pop(f"{stack.names[0]}.paths.{at}.{field}")
                for row, name in enumerate(stack.names):
                    own = expected[f"{name}.paths.{at}.{field}"]
                    seen.add(f"{name}.paths.{at}.{field}")
                    assert_within(stacked[row], own, torch.full_like(own, size * float(own.norm())), roundings(wide))
    for name, grad in grads.items():
        own = expected[name]
        seen.add(name)
        assert_within(grad, own, torch.full_like(own, size * float(own.norm())), roundings(wide))
    assert seen == set(names)


def test_fold_fills_the_rank_with_zeros(quantised):
    student = StackedStudent(quantised, "smooth_sign", "none", torch.float32)
    assert {width % RANK_STEP for width in student.widths} == {0}
    for stack, width in zip(student.stacks, student.widths, strict=True):
        a, b = students.fold(stack.paths, "smooth_sign", width, torch.float32)
        a_own, b_own = folded(stack.paths)
        rank = a_own.shape[-2]
        assert rank == sum(path.rank for path in stack.paths) <= width
        assert_same(a[:, :rank], a_own)
        assert_same(b[..., :rank], b_own)
        assert_same(a[:, rank:], torch.zeros_like(a[:, rank:]))
        assert_same(b[..., rank:], torch.zeros_like(b[..., rank:]))
        wider = students.fold(stack.paths, "smooth_sign", width + RANK_STEP, torch.float32)
        assert_same(wider[0][:, :width], a)
        assert_same(wider[1][..., :width], b)


def test_layers_of_one_shape_share_a_width(quantised):
    student = StackedStudent(quantised, "smooth_sign", "none", torch.float32)
    layers = littlebit_layers(quantised)
    for stack, width in zip(student.stacks, student.widths, strict=True):
        shape = layers[stack.names[0]].d_out, layers[stack.names[0]].d_in
        largest = max(sum(layer.ranks) for layer in layers.values() if (layer.d_out, layer.d_in) == shape)
        assert largest <= width < largest + RANK_STEP
        assert width % RANK_STEP == 0


def test_layers_follow_their_masters(quantised):
    before = {name: p.detach().clone() for name, p in quantised.named_parameters()}
    student = StackedStudent(quantised, "straight_through", "norms", torch.float32)
    for name, p in quantised.named_parameters():
        assert_same(p, before[name])
    loss = student.logits(TOKENS).square().mean()
    loss.backward()
    optimizer = torch.optim.SGD(student.masters().named().values(), lr=1.0)
    optimizer.step()
    moved = {name for name, p in quantised.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name, p in before.items() if ".paths." in name or p.ndim == 1}
    with torch.no_grad():
        own = quantised(TOKENS, use_cache=False).logits
    assert_same(own.argmax(-1), student.logits(TOKENS).argmax(-1))


def test_finish_leaves_ordinary_parameters(quantised):
    names = [name for name, _ in quantised.named_parameters()]
    student = StackedStudent(quantised, "straight_through", "norms", torch.float32)
    student.logits(TOKENS).sum().backward()
    student.finish()
    assert [name for name, _ in quantised.named_parameters()] == names
    for p in quantised.parameters():
        assert isinstance(p, torch.nn.Parameter)
        assert p.is_leaf
        assert p.requires_grad
        assert p.grad is None
        assert p.is_contiguous()
    quantised(TOKENS, use_cache=False).logits.sum().backward()
    assert all(p.grad is not None for p in quantised.parameters())


def test_unstack_gives_each_slice_its_gradient():
    stack = torch.arange(24.0).reshape(4, 3, 2).requires_grad_()
    parts = students.Unstack.apply(stack)
    for at, part in enumerate(parts):
        assert_same(part, stack[at])
    (grad,) = torch.autograd.grad(sum((at + 1) * part.sum() for at, part in enumerate(parts[:3])), stack)
    assert_same(grad, torch.tensor([1.0, 2, 3, 0])[:, None, None].expand(4, 3, 2))


def test_masters_are_grouped_by_what_they_are(quantised):
    masters = StackedStudent(quantised, "smooth_sign", "all", torch.float32).masters()
    assert {name.rsplit(".", 1)[1] for name in masters.latents} == {"u", "v"}
    assert {name.rsplit(".", 1)[1] for name in masters.scales} == {"h", "ell", "g"}
    assert {name.rsplit(".", 1)[1] for name in masters.others} == {"weight", "bias"}
    assert "model.embed_tokens.weight" in masters.others
    assert all(master.requires_grad for master in masters.named().values())


def test_student_refuses_unknown_settings(quantised):
    with pytest.raises(ValueError, match="rule must be one of"):
        StackedStudent(quantised, "tanh", "norms", torch.float32)
    with pytest.raises(ValueError, match="train must be one of none, norms, all, got 'some'"):
        StackedStudent(quantised, "smooth_sign", "some", torch.float32)


def test_blocks_are_the_longest_list_of_modules(quantised):
    assert students.decoder_blocks(quantised) == list(quantised.model.layers)
    with pytest.raises(ValueError, match="must hold its decoder blocks"):
        students.decoder_blocks(torch.nn.Linear(2, 2))
