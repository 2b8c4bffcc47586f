"""The packages: complete, importable with little, documented by examples that run."""

import ast
import compileall
import doctest
import importlib
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import mutants
import pytest

ROOT = Path(__file__).parents[2]
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text())
PACKAGES = ("reference", "fast", "tests/conformance")
SOURCES = [(path, (ROOT / top).parent) for top in PACKAGES for path in (ROOT / top).rglob("*.py")]
PACKAGED = SOURCES + [
    (path, (ROOT / top).parent) for top in ("notebooks", "book/results") for path in (ROOT / top).rglob("*.py")
]
MODULES = sorted(
    "littlebit." + ".".join(path.relative_to(above).with_suffix("").parts).removesuffix(".__init__")
    for path, above in SOURCES
)
#: Modules that need what may be missing.
OPTIONAL = {
    "littlebit.conformance.examples.jax_kernel": "jax",
    "littlebit.conformance.examples.triton_kernel": "triton",
    "littlebit.fast.integrations.vllm_method": "vllm",
}


def test_every_folder_with_modules_is_packaged():
    expected = {"littlebit." + ".".join(path.parent.relative_to(above).parts) for path, above in PACKAGED}
    assert set(SETTINGS["tool"]["setuptools"]["packages"]) == expected


@pytest.mark.parametrize("module", MODULES)
def test_doctests_pass(module):
    if module.endswith(".peft_lora"):
        pytest.importorskip("peft")
    if module in OPTIONAL:
        pytest.importorskip(OPTIONAL[module])
    failed, _ = doctest.testmod(importlib.import_module(module), verbose=False)
    assert failed == 0


def test_wheel_holds_the_modules_and_nothing_stale(tmp_path):
    copy = tmp_path / "littlebit"
    ignored = shutil.ignore_patterns(".venv", ".git", "build", "dist", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, copy, ignore=ignored)
    stale = copy / "build" / "lib" / "littlebit" / "fast" / "removed_long_ago.py"
    stale.parent.mkdir(parents=True)
    stale.write_text("")
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", tmp_path, copy]
    subprocess.run(command, check=True, capture_output=True, env=os.environ | {"PIP_DISABLE_PIP_VERSION_CHECK": "1"})
    (wheel,) = tmp_path.glob("*.whl")
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info" not in name}
    packaged = {f"littlebit/{path.relative_to(above)}" for path, above in PACKAGED}
    assert {name for name in names if name.endswith(".py")} == packaged
    assert {Path(name).suffix for name in names} <= {
        ".py",
        ".txt",
        ".md",
        ".html",
        ".json",
        ".ipynb",
        ".safetensors",
        ".typed",
        ".jinja",
        ".npz",
        "",  # matplotlibrc
    }  # nothing compiled
    assert wheel.name.endswith("-py3-none-any.whl")
    assert {"littlebit/fast/data/roosevelt_1901.txt", "littlebit/fast/data/lincoln_1862.txt"} <= names
    golden = (ROOT / "tests" / "conformance" / "golden").rglob("*.*")
    assert {f"littlebit/conformance/{path.relative_to(ROOT / 'tests' / 'conformance')}" for path in golden} <= names


def test_mutants_are_mistakes_in_code_that_is_there():
    texts = {file: (ROOT / file).read_text() for file in {mutant.file for mutant in mutants.MUTANTS}}
    assert [mutant for mutant in mutants.MUTANTS if mutant.old not in texts[mutant.file]] == []
    for file in texts:
        assert mutants.tests_of(file), file


def test_mutants_run_the_tests_that_import_their_module_first():
    def chosen(file):
        return [str(path.relative_to(ROOT / "tests")) for path in mutants.tests_of(file)]

    assert chosen("fast/training/muon.py")[0] == "training/test_muon.py"
    assert {"training/test_trainer.py", "training/test_resume.py"} < set(chosen("fast/training/muon.py"))
    assert (
        "decoding/test_decode.py" in chosen("fast/kernels/cpu_decode.py")[:2]
    )  # through the decoder, which imports it
    assert chosen("reference/bits.py")[0] == "method/test_bits.py"
    assert "method/test_distill.py" in chosen("reference/distill.py")[:2]  # calls its functions as ref.NAME
    assert chosen("reference/kv_cache.py")[0] == "method/test_laws.py"


def test_the_oldest_dependencies_are_those_that_are_allowed():
    """But for torch, whose wheels of another version a machine may not get."""
    allowed = dict(re.match(r"([\w-]+)>=([\d.]+)", each).groups() for each in SETTINGS["project"]["dependencies"])
    lines = (ROOT / "constraints-oldest.txt").read_text().splitlines()
    oldest = dict(line.split(" ;")[0].split("==") for line in lines if re.match(r"[\w-]+==", line))
    for name, version in allowed.items():
        assert name == "torch" or f"{oldest[name]}.".startswith(f"{version}."), name
    assert all("<" in each for each in SETTINGS["project"]["dependencies"])


def modules_loaded_by(statement):
    code = "import sys; before = set(sys.modules)"  # a distribution's Python may begin with some of its own
    code += f"; {statement}; print(*sorted(m.split('.')[0] for m in set(sys.modules) - before))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_reference_imports_numpy_alone():
    third_party = modules_loaded_by("import littlebit.reference") - set(sys.stdlib_module_names)
    assert {name for name in third_party if not name.startswith("_")} <= {"numpy", "littlebit"}


def test_fast_imports_nothing_until_it_is_needed():
    loaded = modules_loaded_by("import littlebit.fast") - set(sys.stdlib_module_names)
    assert {name for name in loaded if not name.startswith("_")} == {"littlebit"}
    loaded = modules_loaded_by("import littlebit.fast as lb; lb.quantize_, lb.load, lb.generate")
    assert "torch" in loaded
    assert not loaded & {"transformers", "matplotlib", "gguf", "tokenizers"}


def test_the_table_of_exports_equals_the_imports_for_type_checkers():
    """Of littlebit.fast, which imports no module before its first use; no other import of it may be missing there."""
    import littlebit.fast as lb

    tree = ast.parse((ROOT / "fast" / "__init__.py").read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    assert all(isinstance(node, ast.ImportFrom) and node.level == 1 for node in block.body)
    assert all(name.asname == name.name for node in block.body for name in node.names)  # `as` re-exports it
    imported = {node.module: [name.name for name in node.names] for node in block.body}
    assert {module: names.split() for module, names in lb.EXPORTS.items()} == imported
    assert lb.__all__ == list(lb.exports)
    assert len(lb.exports) == sum(map(len, imported.values()))


@pytest.mark.parametrize("packed", [False, True], ids=["folder", "zip"])
def test_fast_works_without_its_source(packed, tmp_path):
    """In a folder or a zip file of .pyc files. Kernels are left out: Numba finds its cache by their source files."""
    package = tmp_path / "packages" / "littlebit"
    for name in ("reference", "fast"):
        shutil.copytree(ROOT / name, package / name, ignore=shutil.ignore_patterns("__pycache__"))
    assert compileall.compile_dir(package, quiet=2, legacy=True)
    for source in package.rglob("*.py"):
        source.unlink()
    place = package.parent
    if packed:
        place = Path(shutil.make_archive(str(tmp_path / "packages"), "zip", package.parent))
    code = (
        f"import sys; sys.path[:0] = [{str(place)!r}]; import littlebit.fast as lb"  # -S leaves editable installs out
    )
    code += f"; assert lb.__file__.startswith({str(place)!r}) and lb.__file__.endswith('.pyc')"
    code += f"; sys.path += {[path for path in sys.path if path.endswith('-packages')]}; lb.svd, lb.CheckpointError"
    subprocess.run([sys.executable, "-S", "-c", code], check=True, cwd=tmp_path)


def test_type_checkers_find_the_packages_from_any_script(tmp_path):
    """In an environment that `make setup` made: static checkers cannot follow the import hook of editable installs."""
    pytest.importorskip("pyright")
    if not Path(sys.prefix, ".ok").exists():
        pytest.skip("`make setup` did not make this environment")
    lb, ref = (importlib.import_module(f"littlebit.{name}") for name in ("fast", "reference"))
    script = tmp_path / "script.py"
    exported = [f"ref.{name}" for name in vars(ref) if callable(getattr(ref, name)) and not name.startswith("_")]
    exported += [f"lb.{name}" for names in lb.EXPORTS.values() for name in names.split()]
    lines = ["import littlebit.fast as lb", "import littlebit.reference as ref"]
    script.write_text("\n".join(lines + [f"reveal_type({name})" for name in exported]))
    command = [sys.executable, "-m", "pyright", "--pythonpath", sys.executable, script]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stdout
    assert '"type[Config]"' in done.stdout
    assert "(name: str) -> Path" in done.stdout
    assert "Unknown" not in done.stdout


def test_exported_names_are_themselves_whatever_is_imported_first():
    """Also those that a module is called like, which Python would put in their place."""
    import littlebit.fast as lb

    names = [name for name, module in lb.exports.items() if name == module]
    assert {"admm", "svd", "linear"} <= set(names)
    modules = ", ".join(f"littlebit.fast.{name}" for name in names)
    code = f"import {modules}; import littlebit.fast as lb; assert all(callable(getattr(lb, n)) for n in {names})"
    code += "; from littlebit.fast import *; assert callable(svd) and save.__module__.endswith('.checkpoint')"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert set(lb.exports) <= set(dir(lb))
    for name, module in lb.exports.items():
        assert getattr(lb, name) is getattr(importlib.import_module(f"littlebit.fast.{module}"), name)
    with pytest.raises(AttributeError, match="has no attribute 'no_such_name'"):
        _ = lb.no_such_name


@pytest.mark.parametrize("order", ["littlebit.fast, torch", "torch, littlebit.fast"])
def test_torch_learns_the_operator_in_any_order(order):
    """A program that torch.export saved may need it before any other name is used."""
    code = f"import {order}; torch.ops.littlebit.packed_linear.default"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("package", ["reference", "fast"])
def test_importing_the_folder_itself_says_what_to_import(package):
    done = subprocess.run(
        [sys.executable, "-c", f"import {package}"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode != 0
    assert f"import littlebit.{package}" in done.stderr.replace("\n", " ")
