"""The notebooks keep to their rules: one idea in few cells, and code that comes from the packages."""

import ast
import builtins
import re
import subprocess
import sys
from pathlib import Path

import littlebit.fast
import littlebit.reference
import nbformat
import pytest

FOLDER = Path(__file__).parents[2] / "notebooks"
PATHS = sorted(FOLDER.glob("*.ipynb"))
PACKAGES = {"ref": littlebit.reference, "lb": littlebit.fast}
MOST_CELLS, MOST_LINES = 30, 10
MAGIC = re.compile(r"^%.*$", re.MULTILINE)
INSTALL = """import importlib.util

if not importlib.util.find_spec("littlebit"):  # from the repository that this folder lies in; or name a wheel
    get_ipython().run_line_magic("pip", 'install -q "..[hf,plot]"')"""
EXERCISE = re.compile(r"\*\*\d\.\*\*.+?<details>\n<summary>Answer</summary>\n\n.+?</details>", re.DOTALL)


@pytest.fixture(params=PATHS, ids=lambda path: path.stem)
def notebook(request):
    return nbformat.read(request.param, as_version=nbformat.NO_CONVERT)


def sources(notebook, kind):
    return [cell.source for cell in notebook.cells if cell.cell_type == kind]


def tree(notebook):
    """Parse the code of all cells, without magic commands."""
    return ast.parse("\n".join(MAGIC.sub("", source) for source in sources(notebook, "code")))


def functions(notebook):
    return [node for node in ast.walk(tree(notebook)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


def module_names():
    """Every name that a module of the packages defines."""
    folders = [Path(package.__file__).parent for package in PACKAGES.values()]
    trees = [ast.parse(path.read_text()) for folder in folders for path in folder.rglob("*.py")]
    kinds = (ast.FunctionDef, ast.ClassDef)
    return {node.name for each in trees for node in each.body if isinstance(node, kinds)}


def test_notebooks_are_numbered_without_a_gap():
    numbers = [int(path.name[:2]) for path in PATHS]
    assert numbers == list(range(1, len(PATHS) + 1))


def test_outputs_are_stripped(notebook):
    assert (notebook.nbformat, notebook.nbformat_minor) == (4, 5)
    assert notebook.metadata.kernelspec.name == "python3"
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert not cell.outputs
            assert cell.execution_count is None


def test_cell_ids_are_unique(notebook):
    ids = [cell.id for cell in notebook.cells]
    assert len(set(ids)) == len(ids)


def test_cells_are_few_and_functions_short(notebook):
    assert len(notebook.cells) <= MOST_CELLS
    for function in functions(notebook):
        assert function.end_lineno - function.lineno < MOST_LINES, function.name
    assert not any(isinstance(node, ast.ClassDef) for node in ast.walk(tree(notebook)))


def test_question_comes_first(notebook):
    first = notebook.cells[0]
    assert first.cell_type == "markdown"
    assert re.match(r"# \d\d · .+\n\n> \*\*Question\.\*\* [^\n]+(\n> [^\n]+)*\?(\n|$)", first.source)


def test_first_code_installs_the_package_where_it_is_missing(notebook):
    first = next(cell for cell in notebook.cells if cell.cell_type == "code")
    assert first.source == INSTALL
    assert first.metadata.tags == ["remove-cell"]


def test_two_exercises_have_folded_answers(notebook):
    last = notebook.cells[-1].source
    assert last.startswith("## Exercises\n")
    assert len(EXERCISE.findall(last)) == 2
    assert last.count("<details>") == last.count("</details>") == 2


def test_pictures_have_alternative_text_and_labels(notebook):
    drawn = [cell for cell in notebook.cells if cell.cell_type == "code" and "plt.show()" in cell.source]
    assert drawn
    for cell in drawn:
        assert len(cell.metadata.get("mystnb", {}).get("image", {}).get("alt", "")) > 40
        called = [ast.unparse(function) for function in functions(notebook) if f"{function.name}(" in cell.source]
        assert "label" in "".join([cell.source, *called])


def test_code_is_imported_from_the_packages(notebook):
    imported = {
        alias.asname or alias.name
        for node in ast.walk(tree(notebook))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    }
    used = [node for node in ast.walk(tree(notebook)) if isinstance(node, ast.Attribute)]
    mine = [node for node in used if isinstance(node.value, ast.Name) and node.value.id in PACKAGES]
    assert imported & PACKAGES.keys()
    assert {node.value.id for node in mine} == imported & PACKAGES.keys()
    for node in mine:
        assert hasattr(PACKAGES[node.value.id], node.attr), f"{node.value.id}.{node.attr}"
    assert not {function.name for function in functions(notebook)} & module_names()


def test_no_name_of_python_is_hidden(notebook):
    assigned = {node.id for node in ast.walk(tree(notebook)) if isinstance(node, ast.Name) and is_stored(node)}
    assert not {name for name in assigned & set(dir(builtins)) if name != "_"}  # displayhook sets it


def is_stored(node):
    return isinstance(node.ctx, ast.Store)


def write(folder, code, answer="1"):
    """Write a notebook of one cell and one answer."""
    prose = f"<details>\n<summary>Answer</summary>\n\n```python\n{answer}\n```\n\n</details>"
    cells = [nbformat.v4.new_code_cell(code, id="a"), nbformat.v4.new_markdown_cell(prose, id="b")]
    path = folder / "nb.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
    return path


RUN = "import run, sys; from pathlib import Path; print(run.execute(Path(sys.argv[1])).nb.cells)"


@pytest.mark.parametrize(
    ("code", "answer", "error"),
    [("x = 20 + 22\nx", "assert x == 42", ""), ("x = 1", "assert x == 2", "AssertionError")],
)
def test_execute_runs_cells_and_answers(tmp_path, code, answer, error):
    path = write(tmp_path, code, answer)
    before = path.read_bytes()
    command = [sys.executable, "-c", RUN, path]
    done = subprocess.run(command, cwd=FOLDER, capture_output=True, text=True, check=False)
    assert ("'42'" in done.stdout) == (not error)
    assert error in done.stderr
    assert ("in nb.ipynb" in done.stderr) == bool(error)
    assert path.read_bytes() == before
