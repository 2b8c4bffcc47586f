"""Collect the laws as pytest items, run them, and report how many hold."""

import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

from .backend import Backend
from .law import EXAMPLES, Law, check
from .laws import LAWS
from .plugin import HERE

BACKENDS = pytest.StashKey[list[Backend]]()
SKIPS = pytest.StashKey[dict[str, str]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options of the laws."""
    group = parser.getgroup("littlebit.conformance")
    group.addoption("--backend", action="append", default=[], metavar="MODULE", help="module to check; may be repeated")
    group.addoption("--skips", metavar="FILE", help="laws to leave out, one a line: NAME  # REASON")
    group.addoption("--examples", type=int, default=EXAMPLES, help=f"most examples of each law (default {EXAMPLES})")


def pytest_configure(config: pytest.Config) -> None:
    """Import the backends and read the list of skips."""
    sys.path.insert(0, str(config.invocation_params.dir))  # `pytest` alone does not look there
    config.stash[BACKENDS] = load(config.option.backend)
    config.stash[SKIPS] = read_skips(config.option.skips)
    if config.option.examples < 1:
        raise pytest.UsageError(f"--examples must be at least 1, got {config.getoption('--examples')}")


def load(names: list[str]) -> list[Backend]:
    """Import modules, one backend for each device that they declare.

    Raises
    ------
    pytest.UsageError
        If there is no name, or a module cannot be imported or has no function that any law needs.
    """
    if not names:
        raise pytest.UsageError("--backend MODULE is missing: a module with some functions of littlebit.reference")
    found = []
    for name in names:
        try:
            backend = Backend(name)
        except ImportError as error:
            raise pytest.UsageError(f"--backend {name}: {error}; give the name of a module, without .py") from error
        if all(backend.missing(law.functions) for law in LAWS):
            functions = sorted({each for law in LAWS for each in law.functions})
            raise pytest.UsageError(f"{name} must have some of these functions, but has none: {', '.join(functions)}")
        found += [Backend(name, device) for device in backend.declared("DEVICES")]
    return found


def read_skips(file: str | None) -> dict[str, str]:
    """Read laws to leave out, and why.

    Raises
    ------
    pytest.UsageError
        If the file cannot be read, or a line names no law.
    """
    if file is None:
        return {}
    try:
        lines = Path(file).read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise pytest.UsageError(f"--skips {file}: {error}") from error
    found = {}
    for line in lines:
        name, _, reason = (part.strip() for part in line.partition("#"))
        if not name:
            continue
        if name not in {law.name for law in LAWS}:
            raise pytest.UsageError(f"--skips {file}: there is no law {name!r}; run with --collect-only for the names")
        found[name] = reason or "no reason given"
    return found


def pytest_collect_directory(path: Path, parent: pytest.Collector) -> pytest.Collector | None:
    """Collect the laws in place of this package's files."""
    return Laws.from_parent(parent, path=path, name="laws") if path == HERE else None


class Laws(pytest.Directory):
    """Collect one item for each backend and law."""

    def collect(self) -> Iterable[pytest.Item]:
        """List the items."""
        backends = self.config.stash[BACKENDS]
        for backend in backends:
            device = "" if backend.device is None else f"-{backend.device}"
            for law in LAWS:
                yield LawItem.from_parent(self, name=f"{backend.name}{device}::{law.name}", law=law, backend=backend)


class BrokenLawError(Exception):
    """Raise the outcome of a law that does not hold."""


class LawItem(pytest.Item):
    """Check one law for one backend."""

    def __init__(self, law: Law, backend: Backend, **others):
        super().__init__(**others)
        self.law, self.backend = law, backend

    def runtest(self) -> None:
        """Check the law, unless it is to be skipped or the backend lacks a function."""
        missing = self.backend.missing(self.law.functions)
        if missing:
            pytest.skip(f"not offered: {', '.join(missing)}")
        reason = self.config.stash[SKIPS].get(self.law.name)
        if reason:
            pytest.skip(f"skipped: {reason}")
        outcome = check(self.law, self.backend, self.config.option.examples)
        if outcome:
            raise BrokenLawError(str(outcome))

    def repr_failure(self, excinfo, style=None) -> str:
        """Show the outcome without a traceback."""
        if excinfo.errisinstance(BrokenLawError):
            return str(excinfo.value)
        return str(super().repr_failure(excinfo, style))

    def reportinfo(self) -> tuple[Path, int | None, str]:
        """Say what is run: backend and law."""
        return HERE, None, self.name


def pytest_terminal_summary(terminalreporter) -> None:
    """Report how many laws hold, by backend."""
    counts: dict[str, dict[str, list[str]]] = {}
    for category in ("passed", "failed", "error", "skipped"):
        for report in terminalreporter.stats.get(category, []):
            backend, _, law = report.location[2].partition("::")
            reason = report.longrepr[2] if category == "skipped" else ""
            key = "not offered" if "not offered" in reason else category
            counts.setdefault(backend, {}).setdefault(key, []).append(law)
    terminalreporter.section("laws of LittleBit")
    for backend, found in counts.items():
        held, broken = len(found.get("passed", [])), found.get("failed", []) + found.get("error", [])
        skipped, absent = len(found.get("skipped", [])), len(found.get("not offered", []))
        more = f"; {skipped} skipped by the list" if skipped else ""
        more += f"; {absent} need functions that {backend} does not have" if absent else ""
        terminalreporter.line(f"{backend}: {held} of {held + len(broken)} laws hold{more}")
        for law in broken:
            terminalreporter.line(f"  broken: {law}")
