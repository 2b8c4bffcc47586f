"""The packages: complete, importable with little, documented by examples that run."""

import doctest
import importlib
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text())
MODULES = sorted(
    "littlebit." + ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for folder in ("reference", "fast")
    for path in (ROOT / folder).rglob("*.py")
)


def test_every_folder_with_modules_is_packaged():
    folders = {path.parent.relative_to(ROOT) for top in ("reference", "fast") for path in (ROOT / top).rglob("*.py")}
    expected = {"littlebit." + ".".join(folder.parts) for folder in folders}
    assert set(SETTINGS["tool"]["setuptools"]["packages"]) == expected


@pytest.mark.parametrize("module", MODULES)
def test_doctests_pass(module):
    failed, _ = doctest.testmod(importlib.import_module(module), verbose=False)
    assert failed == 0


def modules_loaded_by(statement):
    code = f"import sys; {statement}; print(*sorted(m.split('.')[0] for m in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_reference_imports_numpy_alone():
    third_party = modules_loaded_by("import littlebit.reference") - set(sys.stdlib_module_names)
    assert {name for name in third_party if not name.startswith("_")} <= {"numpy", "littlebit"}


def test_fast_imports_neither_transformers_nor_matplotlib():
    assert not modules_loaded_by("import littlebit.fast") & {"transformers", "matplotlib", "gguf", "tokenizers"}


@pytest.mark.parametrize("package", ["reference", "fast"])
def test_importing_the_folder_itself_says_what_to_import(package):
    done = subprocess.run(
        [sys.executable, "-c", f"import {package}"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode != 0
    assert f"import littlebit.{package}" in done.stderr.replace("\n", " ")


def test_reference_modules_have_twins_in_fast():
    assert {path.name for path in (ROOT / "reference").glob("*.py")} <= {
        path.name for path in (ROOT / "fast").glob("*.py")
    }
