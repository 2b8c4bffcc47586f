"""Test calibration: second moments of activations and gradients, and what uses them."""

import copy

import littlebit.fast as lb
import numpy as np
import pytest
import torch
from compare import assert_same, assert_within

TOKENS = torch.arange(70) * 7 % 256
LAYER = "model.layers.0.mlp.up_proj"


def direct_moments(model, window):
    """Mean x^2 and (dL/dy)^2 of one layer, by autograd on whole windows."""
    layer = model.get_submodule(LAYER)
    inputs, outputs, count = 0, 0, 0
    for start in range(0, len(TOKENS) - window + 1, window):
        part = TOKENS[start : start + window]
        kept = {}

        def hook(module, given, output, kept=kept):
            kept["x"], kept["y"] = given[0], output
            output.retain_grad()

        handle = layer.register_forward_hook(hook)
        logits = model(part[None]).logits[0, :-1]
        handle.remove()
        torch.nn.functional.cross_entropy(logits, part[1:], reduction="sum").backward()
        inputs = inputs + kept["x"][0].detach().square().sum(0)
        outputs = outputs + kept["y"].grad[0].square().sum(0)
        count += window
    return inputs / count, outputs / count


def test_calibrate_gives_the_second_moments(tiny_llama):
    model = lb.load_model(tiny_llama)
    moments = lb.calibrate(model, TOKENS, [LAYER], window=32, progress=False)[LAYER]
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    inputs, outputs = direct_moments(model, 32)
    assert_within(moments.inputs, inputs, inputs, terms=2000)
    assert_within(moments.outputs, outputs, outputs.max().expand_as(outputs), terms=2000)


def test_calibrate_leaves_no_hooks_and_no_change(tiny_llama):
    model = lb.load_model(tiny_llama)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    lb.calibrate(model, TOKENS, [LAYER], progress=False)
    assert not model.get_submodule(LAYER)._forward_hooks
    for name, tensor in model.state_dict().items():
        assert_same(tensor, before[name])
    with pytest.raises(ValueError, match="at least 2 tokens"):
        lb.calibrate(model, TOKENS[:1], [LAYER], progress=False)


def test_spectral_gains_are_weighted_singular_values():
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((5, 7)).astype(np.float32)
    row, column = rng.uniform(0.1, 2, 5).astype(np.float32), rng.uniform(0.1, 2, 7).astype(np.float32)
    moments = lb.Moments(inputs=torch.from_numpy(column), outputs=torch.from_numpy(row))
    gains = np.array(lb.spectral_gains({"layer": torch.from_numpy(weight)}, {"layer": moments})["layer"], np.float32)
    expected = np.linalg.svd(np.sqrt(row)[:, None] * weight.astype(np.float64) * np.sqrt(column), compute_uv=False) ** 2
    assert_within(gains, expected.astype(np.float32), np.full(5, expected[0], np.float32), terms=60)


@pytest.mark.parametrize("paths", [1, None])
@pytest.mark.parametrize("allocation", ["uniform", "sensitivity"])
def test_quantize_by_sensitivity_and_importance_keeps_the_budget(tiny_llama, allocation, paths):
    model = lb.load_model(tiny_llama)
    config = lb.Config(bits=2.2, paths=paths, init="admm", allocation=allocation, importance=True)
    results = lb.quantize_(model, config, TOKENS, progress=False)
    stored = sum(result.bits * result.d_out * result.d_in for result in results.values())
    assert stored <= 2.2 * sum(result.d_out * result.d_in for result in results.values())


def test_importance_lowers_the_weighted_error(tiny_llama):
    errors = {}
    for importance in (False, True):
        model = lb.load_model(tiny_llama)
        moments = lb.calibrate(model, TOKENS, [LAYER], progress=False)[LAYER]
        weight = model.get_submodule(LAYER).weight.detach().clone()
        config = lb.Config(bits=2.0, paths=1, init="admm", importance=importance, include=(LAYER,))
        lb.quantize_(model, config, TOKENS, progress=False)
        rest = weight - sum(path.to_dense() for path in model.get_submodule(LAYER).factors())
        row, column = lb.importance(moments.outputs), lb.importance(moments.inputs)
        errors[importance] = float((row[:, None] * rest.detach().square() * column).sum())
    assert errors[True] < errors[False]


@pytest.mark.parametrize("init", ["itq", "admm"])
def test_every_initialiser_beats_dual_svid(tiny_llama, init):
    errors = {}
    for way in ("dual-svid", init):
        results = lb.quantize_(lb.load_model(tiny_llama), lb.Config(bits=2.5, init=way), progress=False)
        errors[way] = sum(result.error for result in results.values())
    assert errors[init] < errors["dual-svid"]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (lb.Config(bits=2.5, init="admm", importance=True), "pass calibration tokens"),
        (lb.Config(bits=2.5, allocation="sensitivity"), "pass calibration tokens"),
        (lb.Config(bits=2.5, importance=True), "importance needs init 'admm'"),
        (lb.Config(bits=2.5, allocation="sensitivity", spread=0.5), "spread must be at least 1"),
        (lb.Config(bits=2.5, spread=2.0), "spread bounds allocation by sensitivity"),
        (lb.Config(bits=2.5, allocation="best"), "allocation must be one of uniform, sensitivity"),
    ],
)
def test_quantize_says_what_calibration_needs(tiny_llama, config, message):
    with pytest.raises(ValueError, match=message):
        lb.quantize_(lb.load_model(tiny_llama), config, progress=False)


@pytest.mark.parametrize("spread", [1.0, 1.5, 4.0])
def test_spread_bounds_ranks_by_sensitivity(tiny_llama, spread):
    """Up to the words that ranks fill, and the rest of the budget that goes to the smallest."""
    model = lb.load_model(tiny_llama)
    tokens = torch.arange(600) % 256
    configs = [
        lb.Config(bits=2.0, paths=1, allocation=each, spread=spread if each == "sensitivity" else None)
        for each in ("uniform", "sensitivity")
    ]
    uniform, found = (
        {name: result.ranks[0] for name, result in lb.quantize_(copy.deepcopy(model), config, tokens, False).items()}
        for config in configs
    )
    for name, rank in found.items():
        assert uniform[name] / spread - 32 <= rank <= uniform[name] * spread + 32
