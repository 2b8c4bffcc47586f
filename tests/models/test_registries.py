"""Test initializers and allocations of the user's own: functions in Config, registered names, and what is refused."""

import functools
import json
import subprocess
import sys
from pathlib import Path

import littlebit.fast as lb
import pytest
import torch
from compare import assert_same
from littlebit.fast.models.allocation import ALLOCATIONS
from littlebit.fast.models.config import Config
from littlebit.fast.models.initializers import INITS
from littlebit.fast.models.quantize import packed_layers
from littlebit.fast.models.registry import choice_name, load_function

BITS = 2.5
BENCHMARK = Path(__file__).parents[2] / "book" / "experiments" / "initialisation.py"
LAYER = "model.layers.0.self_attn.q_proj"


def centered(weight, rank):
    """Ignore the mean of the weight: an initializer that differs from the registered ones."""
    return lb.dual_svid(weight - weight.mean(), rank)


def ones(weight, rank):
    """Return factors of ones."""
    shapes = ((weight.shape[0], rank), (weight.shape[1], rank), weight.shape[:1], (rank,), weight.shape[1:])
    return lb.Factors(*(torch.ones(shape) for shape in shapes))


@pytest.fixture
def registries():
    """Restore the registries after a test."""
    before = dict(INITS), dict(ALLOCATIONS)
    yield
    for registry, entries in zip((INITS, ALLOCATIONS), before, strict=True):
        registry.clear()
        registry.update(entries)


def quantized(path, **changes):
    """Quantize a model, and return it and the results."""
    model = lb.load_model(path)
    return model, lb.quantize_(model, Config(**({"bits": BITS} | changes)), progress=False)


def assert_same_parameters(model, other):
    for mine, theirs in zip(model.state_dict().values(), other.state_dict().values(), strict=True):
        assert_same(mine, theirs)


def test_own_initializer_is_called_for_each_path_and_survives_save_and_load(tiny_llama, tmp_path):
    """It gets the weight, then the residual; the packed checkpoint holds its signs and scales."""
    calls = []

    def own(weight, rank):
        calls.append((tuple(weight.shape), weight.dtype, rank))
        return centered(weight, rank)

    dense = lb.load_model(tiny_llama).get_submodule(LAYER).weight.detach()
    model, results = quantized(tiny_llama, init=own, paths=2)
    assert sorted(call[2] for call in calls) == sorted(rank for result in results.values() for rank in result.ranks)
    assert {(shape, dtype) for shape, dtype, _ in calls} == {
        ((result.d_out, result.d_in), torch.float32) for result in results.values()
    }
    for mine, expected in zip(
        model.get_submodule(LAYER).factors(), lb.compensate(dense, results[LAYER].ranks, centered), strict=True
    ):
        for left, right in zip(mine, expected, strict=True):
            assert_same(left, right)
    path = lb.save(model, tmp_path / "out", bits=BITS, results=results)
    loaded = packed_layers(lb.load(path))
    for name, layer in packed_layers(model).items():
        for mine, theirs in zip(loaded[name].factors(), layer.factors(), strict=True):
            for left, right in zip(mine, theirs, strict=True):
                assert_same(left, right)


def test_a_registered_initializer_is_what_its_function_is(tiny_llama, registries):
    lb.register_init("centered", centered)
    assert_same_parameters(quantized(tiny_llama, init="centered")[0], quantized(tiny_llama, init=centered)[0])


def test_a_batched_initializer_gets_several_layers_at_once(tiny_llama, registries):
    shapes = []

    def batched(weights, rank):
        shapes.append(tuple(weights.shape))
        return lb.dual_svid(weights, rank)

    lb.register_init("batched", batched, batched=True)
    _, results = quantized(tiny_llama, init="batched", paths=1)
    assert sum(shape[0] for shape in shapes) == len(results) > len(shapes)


def test_an_initializer_gets_a_seeded_generator_if_it_takes_one(tiny_llama):
    def random(weight, rank, generator):
        return ones(weight, rank)._replace(u=torch.randn(weight.shape[0], rank, generator=generator))

    one, other = (quantized(tiny_llama, init=random, seed=seed)[0] for seed in (0, 1))
    assert_same_parameters(one, quantized(tiny_llama, init=random)[0])
    assert not torch.equal(one.get_submodule(LAYER).paths[0].u, other.get_submodule(LAYER).paths[0].u)


def test_own_initializer_can_count_important_channels(tiny_llama):
    model = lb.load_model(tiny_llama)
    config = Config(bits=BITS, init=centered, importance=True)
    lb.quantize_(model, config, torch.arange(70) * 7 % 256, progress=False)
    assert isinstance(model.get_submodule(LAYER), lb.LittleBitLinear)


WRONG = {
    "nothing": (lambda weight, rank: None, r"must return Factors\(u, v, h, ell, g\), got NoneType"),
    "a short tuple": (lambda weight, rank: (weight,), r"must return Factors\(u, v, h, ell, g\), got tuple"),
    "a shape": (
        lambda weight, rank: ones(weight, rank)._replace(u=torch.ones(rank, weight.shape[0] + 1)),
        r"must return u as a tensor of shape \(64, \d+\), got \(\d+, 65\)",
    ),
    "a rank": (lambda weight, rank: ones(weight, rank + 1), r"must return u as a tensor of shape"),
    "a list": (
        lambda weight, rank: ones(weight, rank)._replace(ell=[1.0] * rank),
        r"must return ell as a tensor of shape \(\d+,\), got list",
    ),
    "a dtype": (
        lambda weight, rank: ones(weight, rank)._replace(g=torch.ones(weight.shape[1], dtype=torch.float64)),
        r"must return g as torch\.float32 on cpu, got torch\.float64 on cpu",
    ),
    "NaN": (
        lambda weight, rank: ones(weight * torch.nan, rank)._replace(h=weight[:, 0] * torch.nan),
        "must return finite h",
    ),
}


@pytest.mark.parametrize("kind", WRONG)
def test_wrong_factors_are_refused_and_the_model_stays(tiny_llama, kind):
    """In one line that names the layer, also if the initializer is wrong for the last layer alone."""
    wrong, message = WRONG[kind]
    model, calls = lb.load_model(tiny_llama), []
    last = len(lb.quantize_(lb.load_model(tiny_llama), Config(bits=BITS, paths=1), progress=False))

    def init(weight, rank):
        calls.append(rank)
        return (wrong if len(calls) == last else ones)(weight, rank)

    dense = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    with pytest.raises(ValueError, match=r"layer model\.layers\.\d\.\S+: init \S*init ") as caught:
        lb.quantize_(model, Config(bits=BITS, paths=1, init=init), progress=False)
    assert "\n" not in str(caught.value)
    assert [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)] == dense
    with pytest.raises(ValueError, match=message):
        lb.quantize_(model, Config(bits=BITS, paths=1, init=wrong, include=(LAYER,)), progress=False)


def by_name(problem):
    """More rank for the attention than for the MLP."""
    assert set(problem.weights) == set(problem.shapes)
    return {name: (32,) if "attn" in name else (8, 8) for name in problem.shapes}


def test_own_allocation_chooses_the_ranks(tiny_llama, registries):
    _, results = quantized(tiny_llama, bits=6.0, allocation=by_name)
    assert {name: result.ranks for name, result in results.items()} == {
        name: (32,) if "attn" in name else (8, 8) for name in results
    }
    lb.register_allocation("by name", by_name)
    _, again = quantized(tiny_llama, bits=6.0, allocation="by name")
    assert again == results


@pytest.mark.parametrize(
    ("allocation", "message"),
    [
        (lambda problem: None, "must return a dict of layer name to ranks, got NoneType"),
        (lambda problem: {}, r"layer \S+q_proj: allocation \S+ must return a tuple of ranks, one per path, got None"),
        (lambda problem: dict.fromkeys(problem.shapes, 8), "must return a tuple of ranks, one per path, got 8"),
        (lambda problem: dict.fromkeys([*problem.shapes, "x"], (1,)), "ranks of the selected layers alone, got 'x'"),
        (lambda problem: dict.fromkeys(problem.shapes, (0,)), r"must return ranks of 1 to 64 .* got \(0,\)"),
        (lambda problem: dict.fromkeys(problem.shapes, (65,)), r"must return ranks of 1 to 64 .* got \(65,\)"),
        (lambda problem: dict.fromkeys(problem.shapes, (8.0,)), r"must return ranks of 1 to 64 .* got \(8.0,\)"),
        (lambda problem: dict.fromkeys(problem.shapes, (32, 32)), r"must store at most 2\.5 bits per weight \(bits\)"),
    ],
)
def test_wrong_ranks_are_refused(tiny_llama, allocation, message):
    with pytest.raises(ValueError, match=message):
        quantized(tiny_llama, allocation=allocation)


def test_allocations_are_told_what_was_measured(tiny_llama):
    """By sensitivity with its bound, written as a function of one's own: the same ranks."""
    tokens, seen = torch.arange(600) % 256, []

    def own(problem):
        seen.append(set(problem.moments))
        return ALLOCATIONS["sensitivity"](problem._replace(spread=1.5))

    found = []
    for changes in ({"allocation": "sensitivity", "spread": 1.5}, {"allocation": own}):
        config = Config(bits=BITS, paths=1, init="admm", importance=True, **changes)
        found.append(lb.quantize_(lb.load_model(tiny_llama), config, tokens, progress=False))
    assert {name: result.ranks for name, result in found[0].items()} == {
        name: result.ranks for name, result in found[1].items()
    }
    assert seen == [set(), set(found[0])]


def test_names_that_cannot_be_registered_are_refused(registries):
    for register, kind in ((lb.register_init, "initializer"), (lb.register_allocation, "allocation")):
        with pytest.raises(ValueError, match=f"the name of an {kind} must be a string that is not empty, got ''"):
            register("", ones)
        register("twice", ones)
        with pytest.raises(ValueError, match=f"the name of an {kind} must be new, got 'twice', which is registered"):
            register("twice", ones)


@pytest.mark.parametrize("choice", ["magic", "math:sqrt", None, 3])
def test_unknown_choices_are_refused(tiny_llama, choice):
    """A name with a colon too: a configuration from others must not choose code to import."""
    for key, names in (("init", "dual-svid, itq, admm"), ("allocation", "uniform, sensitivity, official")):
        with pytest.raises(ValueError, match=f"{key} must be one of {names}, or a function, got {choice!r}"):
            quantized(tiny_llama, **{key: choice})


def test_a_function_is_described_by_its_name():
    described = Config(init=functools.partial(centered), allocation=by_name).described()
    assert described["init"] == f"{__name__}:centered"
    assert described["allocation"] == f"{__name__}:by_name"
    assert json.loads(json.dumps(described)) == described | {"include": ["*"], "exclude": []}
    assert choice_name("admm") == "admm"


def test_the_benchmark_of_initializers_takes_a_function_by_name(tiny_llama, tmp_path):
    """From a module in the current folder, beside a registered one; it is called for both paths."""
    source = "import littlebit.fast as lb\n\n\ndef start(weight, rank):\n    return lb.dual_svid(weight, rank)\n"
    (tmp_path / "own.py").write_text(source)
    options = ["--model", tiny_llama, "--blocks", "0", "--bits", str(BITS), "--inits", "dual-svid", "own:start"]
    subprocess.run([sys.executable, BENCHMARK, "out.json", *options], cwd=tmp_path, check=True, capture_output=True)
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert [(row["init"], row["paths"]) for row in rows] == [
        (init, paths) for init in ("dual-svid", "own:start") for paths in (1, 2)
    ]
    assert all(0 < error < 1 for row in rows for error in row["errors"].values())


def test_load_function_finds_modules_in_the_current_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", ["/nowhere"])
    (tmp_path / "my_own_initializers.py").write_text("def start(weight, rank):\n    return rank\n\nnumber = 3\n")
    assert load_function("my_own_initializers:start")(None, 5) == 5
    for wrong in (
        "my_own_initializers:finish",
        "no_such_module_at_all:f",
        "math",
        ":sqrt",
        "my_own_initializers:number",
    ):
        with pytest.raises(ValueError, match="must name a function"):
            load_function(wrong)
