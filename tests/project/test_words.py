"""Plain words: phrases that must be read twice occur in no docstring, comment, message or page."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PHRASES = (
    "so many",
    "likewise",
    "as that of",
    "those of",
    "put together",
    "as ever",
    "told",
    "bears",
    "is none",
    "are no",
    "not such",
    "comes to",
)
PATTERN = re.compile(rf"\b(?:{'|'.join(f'[{each[0].upper()}{each[0]}]{each[1:]}' for each in PHRASES)})\b")


def phrases(text):
    """Find the phrases in a text, also where a line ends inside one."""
    joined = re.sub(r'[\s"#]*\n[\s"#f]*', " ", text)
    return PATTERN.findall(joined)


def files(place):
    """List the files of a place: a file itself, the Python files and pages of a folder."""
    root = ROOT / place
    found = [root] if root.is_file() else [*root.rglob("*.py"), *root.glob("*.md")]
    return [path for path in found if not {"_figures", "api"} & set(path.parts)]


@pytest.mark.parametrize("text", ["So many bits", "# as\n    # ever", '"comes "\n    f"to"', "keeps those\nof others"])
def test_phrases_are_found(text):
    assert phrases(text)


@pytest.mark.parametrize("text", ["if x is None", "it is nonexistent", "area now"])
def test_other_words_are_left_alone(text):
    assert not phrases(text)


@pytest.mark.parametrize(
    "place",
    [
        "README.md",
        "CONTRIBUTING.md",
        "SECURITY.md",
        "CHANGELOG.md",
        "book",
        "reference",
        "fast",
        "tests/conformance",
    ],
)
def test_prose_is_plain(place):
    found = {str(path.relative_to(ROOT)): phrases(path.read_text(encoding="utf-8")) for path in files(place)}
    assert not {name: each for name, each in found.items() if each}
