"""The order of the house: fast/*.py mirrors reference/*.py, and its folders import only from those to their left."""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("reference", "fast")
FAST = ROOT / "fast"
MIRROR = ""  # the folder of fast/*.py
PRIVATE = "_"  # stands for the files fast/_*.py, which all others may import
# From left to right; folders of one tuple stand side by side and do not import each other, but for the first pair.
ORDER = (
    (PRIVATE,),
    ("files",),
    (MIRROR, "kernels"),
    ("models",),
    ("checkpoints", "training", "evaluation"),
    ("decoding", "integrations"),
    ("bench", "serving"),
    ("cli",),
)
RANK = {folder: rank for rank, folders in enumerate(ORDER) for folder in folders}
TOGETHER = {MIRROR, "kernels"}  # a function of the method calls its kernels, and kernels take its arrays


def is_private(name):
    """Exempt `__init__`, `__main__` and names with a leading underscore."""
    return name.startswith("_")


def modules(package):
    """Find the modules of a package by their dotted names; a folder stands for its `__init__`."""
    paths = {path.relative_to(package).with_suffix(""): path for path in package.rglob("*.py")}
    return {".".join(name.parts).removesuffix(".__init__"): path for name, path in paths.items()}


def folder_of(module, package=FAST):
    """Name the folder of a module: MIRROR or PRIVATE for the files of the package itself."""
    if is_private(module):
        return PRIVATE
    top, _, rest = module.partition(".")
    return top if rest or (package / top).is_dir() else MIRROR


def imports(source, module, known, is_folder=False):
    """List the modules of the package that a module imports, in functions and under conditions too.

    Parameters
    ----------
    source : str
    module : str
        Dotted name of the module inside the package.
    known : collection of str
        Dotted names of all modules of the package.
    is_folder : bool
        The module is the `__init__` of a folder, to which one leading dot refers.
    """
    here = module.split(".") if is_folder else module.split(".")[:-1]
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
            names = [name.removeprefix("littlebit.fast.") for name in targets if name.startswith("littlebit.fast.")]
        elif isinstance(node, ast.ImportFrom):
            base = (node.module or "").split(".") if node.module else []
            if node.level:
                base = here[: len(here) - node.level + 1] + base
            elif base[:2] == ["littlebit", "fast"]:
                base = base[2:]
            else:
                continue
            names = [".".join([*base, alias.name]) for alias in node.names] + [".".join(base)]
            names = [name for name in names if name in known and name]
            names = [name for name in names if not any(other.startswith(f"{name}.") for other in names)]
        else:
            continue
        found.update(name for name in names if name in known)
    return found - {module}


def import_graph():
    """Map each module of fast/ to the modules that it imports, but for the doors `__init__` and `__main__`."""
    paths = modules(FAST)
    return {
        name: imports(path.read_text(encoding="utf-8"), name, paths, path.name == "__init__.py")
        for name, path in paths.items()
        if name not in ("__init__", "__main__")
    }


def wrong_imports(graph):
    """List the imports that do not go to the left, or stay in their own folder."""
    wrong = []
    for module, imported in graph.items():
        for target in imported:
            ours, theirs = folder_of(module), folder_of(target)
            to_the_left = RANK[theirs] < RANK[ours] or ours == theirs or {ours, theirs} == TOGETHER
            if not to_the_left:
                wrong.append(f"{module} imports {target}")
    return sorted(wrong)


def test_fast_files_mirror_reference_files():
    names = [{path.name for path in (ROOT / each).glob("*.py") if not is_private(path.stem)} for each in PACKAGES]
    assert names[0] == names[1]


def test_every_folder_has_a_place_in_the_order():
    folders = {path.parent.name for path in FAST.glob("*/*.py")}
    assert folders == RANK.keys() - {MIRROR, PRIVATE}


def test_folders_import_only_from_the_left():
    assert not wrong_imports(import_graph())


def test_modules_import_each_other_in_no_circle():
    try:
        list(TopologicalSorter(import_graph()).static_order())
    except CycleError as error:
        pytest.fail(f"modules import each other: {' -> '.join(reversed(error.args[1]))}")


KNOWN = {"svd", "kernels", "kernels.cpu", "models.layers", "files.cache", "cli.main"}


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("from ..files.cache import cached", {"files.cache"}),
        ("def late():\n    from ..files import cache", {"files.cache"}),
        ("from . import layers", {"models.layers"}),
        ("from .. import svd", {"svd"}),
        ("from ..kernels import cpu", {"kernels.cpu"}),
        ("from ..kernels import place", {"kernels"}),
        ("if True:\n    import littlebit.fast.svd", {"svd"}),
        ("from littlebit.fast.kernels.cpu import add", {"kernels.cpu"}),
        ("import torch\nfrom numpy import svd", set()),
    ],
)
def test_imports_are_found(source, found):
    assert imports(source, "models.quantize", KNOWN) == found


def test_wrong_imports_are_found():
    assert wrong_imports({"models.layers": {"svd", "kernels.cpu", "files.cache"}, "kernels.cpu": {"svd"}}) == []
    assert wrong_imports({"files.cache": {"svd"}}) == ["files.cache imports svd"]
    assert wrong_imports({"training.trainer": {"checkpoints.saving"}}) == [
        "training.trainer imports checkpoints.saving"
    ]
