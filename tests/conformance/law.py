"""Define laws, and check that one holds for a backend: draw examples, and shrink the first that breaks it."""

import inspect
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from hypothesis import HealthCheck, Phase, given, settings, strategies as st

from .backend import Backend, as_python

HERE = Path(__file__).parent
EXAMPLES = 100
SLOW = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]  # no mistakes of a backend

#: Draw a value from a strategy.
Draw = Callable[[st.SearchStrategy], Any]


class Law(NamedTuple):
    """Hold a law: what must hold for every input, which functions it needs, and where it is written.

    Attributes
    ----------
    name : str
        LEVEL.NAME, as reports and lists of skips write it.
    functions : tuple of str
        Functions of the backend that it calls.
    source : str
        Section of the specification, or paper and equation.
    check : callable
        (backend, draw): draw inputs, call the backend, and raise AssertionError if the law is broken.
    """

    name: str
    functions: tuple[str, ...]
    source: str
    check: Callable[[Backend, Draw], None]

    @property
    def level(self) -> str:
        """Return the part of the method that the law belongs to."""
        return self.name.split(".")[0]

    @property
    def statement(self) -> str:
        """Return what must hold, in one paragraph."""
        return " ".join((inspect.getdoc(self.check) or "").split("\n\n")[0].split())


class Outcome(NamedTuple):
    """Hold how a law was broken.

    Attributes
    ----------
    law : Law
    found : str
        What was wrong with the smallest example.
    example : str
        The calls that show it, as Python.
    """

    law: Law
    found: str
    example: str

    def __str__(self) -> str:
        """Write law, source, finding and example, for a report."""
        code = "".join(f"\n    {line}".rstrip(" ") for line in self.example.splitlines())
        return (
            f"{self.law.name}: {self.law.statement}\n  source: {self.law.source}\n  found: {self.found}\n"
            f"  smallest example:\n{code}\n"
        )


def laws_of(level: str) -> tuple[list[Law], Callable]:
    """Make a list for the laws of a level, and the decorator that appends to it."""
    laws: list[Law] = []

    def law(*functions: str, source: str) -> Callable:
        def add(check: Callable[[Backend, Draw], None]) -> Callable[[Backend, Draw], None]:
            laws.append(Law(f"{level}.{check.__name__}", functions, source, check))
            return check

        return add

    return laws, law


def check(law: Law, backend: Backend, examples: int = EXAMPLES, shrink: bool = True) -> Outcome | None:
    """Check a law with random examples of a fixed seed; return how it was broken, or None if it holds.

    Parameters
    ----------
    law : Law
    backend : Backend
        Has all of the law's functions.
    examples : int
        Most examples to draw.
    shrink : bool
        Look for the smallest example that breaks the law; otherwise report the first.
    """
    phases = [Phase.generate, Phase.shrink] if shrink else [Phase.generate]

    @settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        database=None,
        phases=phases,
        report_multiple_bugs=False,
        suppress_health_check=SLOW,
    )
    @given(st.data())
    def holds(data: st.DataObject) -> None:
        backend.calls.clear()
        law.check(backend, data.draw)

    try:
        holds()
    except Exception as error:  # a backend may raise anything
        return Outcome(law, finding(error), as_python(backend))
    return None


def finding(error: Exception) -> str:
    """Say what an exception means: a broken assertion in its own words, another error with the line that raised it."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    if is_ours(last.filename):
        return str(error)
    return f"{type(error).__name__}: {error} ({last.filename}, line {last.lineno})"


def is_ours(file: str) -> bool:
    """Tell whether a file is a module of this package, examples aside."""
    path = Path(file)
    return HERE in path.parents and path.parent.name != "examples"
