"""The cells that readers write: solutions pass, known mistakes get their hint, and an empty cell is no error."""

import inspect

import nbformat
import numpy as np
import pytest
from littlebit.notebooks import checks, small_example
from littlebit.notebooks.solutions import written
from test_notebooks import PATHS, functions, sources

SOLUTIONS = {name: each for name, each in vars(written).items() if inspect.isfunction(each)}
MISTAKES = [(name, at) for name, each in checks.EXERCISES.items() for at in range(len(each.mistakes))]


def named(name, function):
    """Give a function the name of an exercise."""
    function.__name__ = name
    return function


def test_every_exercise_has_a_solution_that_passes(capsys):
    assert SOLUTIONS.keys() == checks.EXERCISES.keys()
    for name, solution in SOLUTIONS.items():
        checks.check(solution, trials=50)
        assert capsys.readouterr().out == f"{name}: right, in 50 trials\n"


@pytest.mark.parametrize(("name", "at"), MISTAKES, ids=str)
def test_a_known_mistake_gets_its_hint(name, at):
    mistake, hint = checks.EXERCISES[name].mistakes[at]
    with pytest.raises(AssertionError) as raised:
        checks.check(named(name, lambda *arguments: mistake(*arguments)), trials=50)
    assert hint in str(raised.value) or "shape" in str(raised.value)


def test_a_cell_that_is_not_written_is_not_an_error(capsys):
    checks.check(named("best_scale", lambda w: None))
    assert capsys.readouterr().out == "best_scale: not written yet\n"


def test_each_notebook_has_two_cells_to_write_and_no_answer_beside_them():
    found = []
    for path in PATHS:
        notebook = nbformat.read(path, as_version=nbformat.NO_CONVERT)
        mine = [each for each in functions(notebook) if each.name in checks.EXERCISES]
        assert len(mine) == 2, path.stem
        for function in mine:
            assert len(function.body) == 2, "a docstring, and three dots"
            assert any(f"check({function.name})" in source for source in sources(notebook, "code"))
        found += [function.name for function in mine]
    assert found == list(SOLUTIONS)


def test_the_small_example_scores_as_stored():
    teacher, (x, p) = small_example.network(), small_example.held_out()
    assert small_example.nats(x @ teacher.weight.T, p, teacher) < 0.7 * np.log(p.shape[1])
