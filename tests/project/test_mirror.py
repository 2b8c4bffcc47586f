"""reference/ and fast/ say the same: modules, functions, parameters, defaults, documented shapes and error texts."""

import ast
import importlib
import inspect
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SHARED = ("bits", "memory")  # one module each, exported twice
MODULES = sorted(path.stem for path in (ROOT / "reference").glob("*.py") if not path.stem.startswith("_"))

# What only one side has, and why.
ONLY_REFERENCE = {
    "svd": {  # the decomposition itself, which fast takes from torch
        *("bidiagonalize", "reflector", "reflect", "product", "diagonalize", "sort_values", "step", "sweep"),
        *("wilkinson_shift", "clear_row", "givens", "apply_givens"),
    },
    "linear": {"path_linear", "path_vjp"},  # fast folds all paths into one pair of factors
    # the backward pass by hand, which autograd does in fast
    "train": {
        "forward",
        "backward",
        "littlebit_layer",
        "littlebit_layer_vjp",
        "dense",
        "dense_vjp",
        "cross_entropy_vjp",
    },
}
ONLY_FAST = {
    "linear": {"folded"},
    "distill": {"kl_rows"},  # what a trainer compiles of the loss
}
# these are differentiated in fast, so they need the rule that the reference gives to their vjp
EXTRA_PARAMETERS = {("linear", "linear"): {"rule"}, ("train", "mlp"): {"rule"}}
# a plain summary differs where one side iterates and the other calls torch
OTHER_WORDS = {("svd", "svd")}


def public(package, module):
    """Functions and classes that a module defines, by name."""
    loaded = importlib.import_module(f"littlebit.{package}.{module}")
    return {
        name: value
        for name, value in vars(loaded).items()
        if not name.startswith("_")
        and (inspect.isfunction(value) or inspect.isclass(value))
        and value.__module__ == f"littlebit.{package}.{module}"
    }


PAIRS = [
    (module, name)
    for module in MODULES
    if module not in SHARED
    for name in sorted(set(public("reference", module)) & set(public("fast", module)))
]


def both(module, name):
    return public("reference", module)[name], public("fast", module)[name]


@pytest.mark.parametrize("module", [module for module in MODULES if module not in SHARED])
def test_modules_define_the_same_names(module):
    reference, fast = set(public("reference", module)), set(public("fast", module))
    assert reference - fast == ONLY_REFERENCE.get(module, set())
    fast_private = {name for name in fast - reference if inspect.isclass(public("fast", module)[name])}
    assert fast - reference - fast_private == ONLY_FAST.get(module, set())


@pytest.mark.parametrize(
    ("module", "names"),
    [
        ("bits", ["allocate_ranks", "kv_cache_bytes", "layer_bits", "model_bits", "path_bits", "rank_for_bits"]),
        ("memory", ["MODEL_SHAPES", "ModelMemory", "ModelShape", "model_memory"]),
    ],
)
def test_a_shared_module_is_one_module(module, names):
    reference, fast = (importlib.import_module(f"littlebit.{package}.{module}") for package in ("reference", "fast"))
    for name in names:
        assert getattr(fast, name) is getattr(reference, name)


def test_packages_export_the_same_names():
    reference, fast = (importlib.import_module(f"littlebit.{package}") for package in ("reference", "fast"))
    exported = {name for name in vars(reference) if not name.startswith("_")}
    assert exported <= set(dir(fast))


@pytest.mark.parametrize(("module", "name"), PAIRS)
def test_parameters_and_defaults_are_the_same(module, name):
    reference, fast = both(module, name)
    if inspect.isclass(reference):
        assert getattr(reference, "_fields", None) == getattr(fast, "_fields", None)
        return
    mine, theirs = (list(inspect.signature(function).parameters.values()) for function in (fast, reference))
    mine = [each for each in mine if each.name not in EXTRA_PARAMETERS.get((module, name), set())]
    assert [each.name for each in mine] == [each.name for each in theirs]
    for one, other in zip(mine, theirs, strict=True):
        if callable(other.default) and other.default is not inspect.Parameter.empty:
            assert one.default.__name__ == other.default.__name__
        else:
            assert one.default == other.default


def plain(text):
    """Strip what may differ between docstrings: batch axes and the array type."""
    text = re.sub(r"\(\.\.\., ", "(", text)
    text = re.sub(r" of \(\.\.\.\)| or \(\.\.\.[^)]*\)", "", text)
    text = re.sub(r"\((\w+),\)", r"(\1)", text)
    return re.sub(r"\b(array|tensor)(s?)\b", r"array\2", text).strip()


def sections(function):
    """Headings of a docstring's sections, and the documented shapes of the parameters by name."""
    doc = inspect.getdoc(function) or ""
    headings = re.findall(r"^(\w+)\n-+$", doc, re.M)
    block = re.search(r"^Parameters\n-+\n(.*?)(?=^\w+\n-+$|\Z)", doc, re.M | re.S)
    lines = re.findall(r"^(\w[\w, ]*?) : (.*)$", block.group(1), re.M) if block else []
    return headings, {name: re.findall(r"\([^()]*\)", plain(kind))[:1] for name, kind in lines}


EXPORTED = vars(importlib.import_module("littlebit.reference"))


@pytest.mark.parametrize(("module", "name"), [pair for pair in PAIRS if pair[1] in EXPORTED])
def test_docstrings_say_the_same(module, name):
    reference, fast = both(module, name)
    first = [plain((inspect.getdoc(each) or "").split("\n\n")[0]) for each in (reference, fast)]
    assert first[0], f"{name} has no docstring"
    if (module, name) not in OTHER_WORDS and not inspect.isclass(reference):
        assert first[0].split(",")[0].split(";")[0][:40] == first[1].split(",")[0].split(";")[0][:40]
    (headings, shapes), (fast_headings, fast_shapes) = sections(reference), sections(fast)
    assert headings == fast_headings
    extra = EXTRA_PARAMETERS.get((module, name), set())
    assert shapes == {key: value for key, value in fast_shapes.items() if key not in extra}


def messages(package, module):
    """Texts of all raised errors by function, with what is filled in left out."""
    tree = ast.parse((ROOT / package / f"{module}.py").read_text())
    found = {}
    for function in ast.walk(tree):
        if isinstance(function, ast.FunctionDef):
            for node in ast.walk(function):
                if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
                    found.setdefault(function.name, []).append((node.exc.func.id, template(node.exc.args[0])))
    return found


def template(node):
    if isinstance(node, ast.JoinedStr):
        return "".join(part.value if isinstance(part, ast.Constant) else "{}" for part in node.values)
    return node.value if isinstance(node, ast.Constant) else ast.dump(node)


@pytest.mark.parametrize("module", [module for module in MODULES if module not in SHARED])
def test_error_texts_are_the_same(module):
    reference, fast = messages("reference", module), messages("fast", module)
    only_reference = ONLY_REFERENCE.get(module, set())
    everything = {text for function, texts in reference.items() if function not in only_reference for text in texts}
    assert everything == {text for texts in fast.values() for text in texts}
