"""The book builds without a warning, shows everything that the packages export, and none of its links lead nowhere."""

import ast
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict, fields
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from littlebit.fast import Config, TrainConfig
from littlebit.fast.training.config import with_new_names
from sphinx.util.inventory import InventoryFile

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "book" / "_ext"))

import check  # noqa: E402 (the path comes first)

needs_browser = pytest.mark.skipif(
    not check.browser_path() or not importlib.util.find_spec("playwright"), reason="needs Chromium and playwright"
)


@pytest.fixture(scope="module")
def book(tmp_path_factory):
    """Build the pages into a folder; BOOK names one that `make book` has just built."""
    if built := os.environ.get("BOOK"):
        return Path(built).resolve()
    folder = tmp_path_factory.mktemp("book")
    options = ["-q", "-W", "--keep-going", "-j", "2", "-d", folder / "cache"]
    options += ["-D", "nb_execution_mode=off", "-D", "browser_models=0"]  # `make notebooks`, `make book`
    command = [sys.executable, "-m", "sphinx", *options, ROOT / "book", folder / "pages"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder / "pages"


@pytest.fixture(scope="module")
def pages(book):
    """Parse each built page."""
    return {path.resolve(): Page(path) for path in book.rglob("*.html")}


class Page(HTMLParser):
    """What a page links to and loads, and the places in it that can be linked to."""

    def __init__(self, path):
        super().__init__()
        self.links, self.loaded, self.anchors = set(), set(), set()
        self.feed(path.read_text())

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.anchors.add(attributes.get("id"))
        if tag == "a" and "href" in attributes:
            self.links.add(attributes["href"])
        elif tag in ("script", "img", "link"):
            self.loaded.add(attributes.get("src") or attributes.get("href"))


def exported(package):
    """Public names that a package's __init__ imports, each with the module that it comes from."""
    tree = ast.parse((ROOT / package / "__init__.py").read_text())
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level == 1]
    return {(node.module, alias.name) for node in imports for alias in node.names if alias.name == alias.asname}


@pytest.mark.parametrize("package", ["reference", "fast"])
def test_every_exported_name_is_in_the_api(book, package):
    inventory = InventoryFile.loads((book / "objects.inv").read_bytes(), uri="").data
    shown = {name for kind in inventory if kind.startswith("py:") for name in inventory[kind]}
    # bits.py and memory.py are one module each, exported twice
    missing = {
        name
        for module, name in exported(package)
        if f"littlebit.{'reference' if module in ('bits', 'memory') else package}.{module}.{name}" not in shown
    }
    assert exported(package)
    assert not missing


def test_internal_links_lead_somewhere(pages):
    broken = []
    for path, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            anchors = pages[target].anchors if target in pages else set()
            if not target.exists() or (parts.fragment and unquote(parts.fragment) not in anchors):
                broken.append(f"{path.name}: {link}")
    assert len(pages) > 20
    assert not broken


def test_pages_load_nothing_from_the_network(pages):
    for path, page in pages.items():
        for source in page.loaded - {None}:
            assert not urlsplit(source).netloc, f"{path.name}: {source}"
            assert (path.parent / unquote(urlsplit(source).path)).exists(), f"{path.name}: {source}"


def test_external_links_are_few_and_known(pages):
    hosts = {urlsplit(link).hostname for page in pages.values() for link in page.links} - {None}
    assert hosts == {"arxiv.org", "github.com"}


def test_equations_have_mathjax(book):
    assert any("mathjax" in source for source in Page(book / "index.html").loaded - {None})


# What TrainConfig said when the second ladder was measured
SECOND_LADDER = {"sequence": 512, "batch": 8, "lr_latents": 6e-3, "lr_scales": 1.5e-3, "lr_others": 4e-4, "hidden": 0.1}


def test_training_ladder_repeats_what_was_measured():
    known = {field.name for kind in (Config, TrainConfig) for field in fields(kind)} | {"weights"}

    def settings(row):
        own = {key: value for key, value in with_new_names(row).items() if key in known}
        return {"bits": 0.55} | own | {"weights": [*own["weights"], 0][:3]}  # a text that is not drawn from

    ladder = {row["name"]: row for row in json.loads((ROOT / "book/experiments/training_ladder.json").read_text())}
    assert all(set(with_new_names(row)) <= known | {"name"} for row in ladder.values())
    results = json.loads((ROOT / "book/results/training_smollm2.json").read_text())["rows"]
    measured = [row for row in results if row["stage"] == "second ladder"]
    assert len(measured) == 11
    for row in measured:
        then = asdict(TrainConfig()) | with_new_names(SECOND_LADDER) | settings(row)
        assert asdict(TrainConfig()) | settings(ladder[row["name"]]) == then, row["name"]


@needs_browser
def test_pages_are_whole_in_a_browser(book):
    assert not check.problems(book)


BROKEN = {
    "script": "<script>throw new Error('broken')</script>",
    "not loaded": "<script src='missing.js'></script>",
    "picture": "<img alt='a picture' src='missing.svg'>",
    "without words": "<img src='data:image/gif;base64,R0lGODlhAQABAAAAACwAAAAAAQABAAA='>",
    "equation": "<p class='math'>\\(x\\)</p>",
    "wider than the screen": "<div style='width: 3000px'>wide</div>",
}


@needs_browser
@pytest.mark.parametrize("kind", BROKEN)
def test_the_check_reports_what_is_broken(kind, tmp_path):
    (tmp_path / "page.html").write_text(f"<!doctype html><title>page</title>{BROKEN[kind]}")
    assert any(kind in problem for problem in check.problems(tmp_path))


@needs_browser
def test_the_check_reports_a_page_that_does_not_react(book, tmp_path):
    shutil.copytree(book / "_static", tmp_path / "_static")
    shutil.copy(book / "explore.html", tmp_path)
    script = tmp_path / "_static" / "explore.js"
    script.write_text(script.read_text().replace('addEventListener("input", draw)', 'addEventListener("never", draw)'))
    assert "does not follow the slider" in " ".join(check.problems(tmp_path))
