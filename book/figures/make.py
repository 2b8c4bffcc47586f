"""Draw the book's figures and write its tables.

    make figures
    python book/figures/make.py [figure3 table1 ...]

Every script beside this one has CAPTION and SOURCES; figures have `alt()` and `draw(theme)`, tables `table()`. They
become files of book/_figures/, which git ignores.
"""

import hashlib
import importlib
import sys
from pathlib import Path
from types import ModuleType

FIGURES = Path(__file__).parent
BOOK = FIGURES.parent
sys.path[:0] = [str(BOOK / folder) for folder in ("figures", "_ext", "experiments")]

import style  # noqa: E402 (the path comes first)
from sources import origin  # noqa: E402

OUT = BOOK / "_figures"
STAMP = OUT / "made-from.txt"
README = BOOK.parent / "README.md"
README_PICTURE = "readme"  # git keeps this one, for those who read on the web
BEGIN, END = "<!-- made by `make figures` -->\n", "<!-- end -->\n"


def names() -> list[str]:
    """List the figures and tables that have a script."""
    return sorted(path.stem for path in FIGURES.glob("*.py") if path.stem not in ("make", "style", README_PICTURE))


def script(name: str) -> ModuleType:
    """Import the script of a figure or table."""
    return importlib.import_module(name)


def write(name: str) -> None:
    """Draw a figure, in every theme, or write a table."""
    module = script(name)
    OUT.mkdir(exist_ok=True)
    if hasattr(module, "table"):
        (OUT / f"{name}.md").write_text(module.table().markdown() + "\n")
        return
    folder = BOOK if name == README_PICTURE else OUT
    for theme in style.THEMES:
        with style.themed(theme):
            metadata = {"Date": None, "Title": name, "Description": module.alt()}
            module.draw(theme).savefig(folder / f"{name}-{theme.name}.svg", metadata=metadata)


def readme_with_results(text: str) -> str:
    """Put the present results into the README: the table, and the words for its picture."""
    head, rest = text.split(BEGIN)
    module = script(README_PICTURE)
    picture = (
        "<picture>\n"
        f'  <source media="(prefers-color-scheme: dark)" srcset="book/{README_PICTURE}-dark.svg">\n'
        f'  <img src="book/{README_PICTURE}-light.svg" alt="{module.alt()}">\n'
        "</picture>\n"
    )
    return f"{head}{BEGIN}{picture}\n{module.table_of_results()}\n{END}{rest.split(END)[1]}"


def inputs() -> list[Path]:
    """List the files that figures, tables and numbers of the book are made from."""
    modules = [*(BOOK / "_ext").glob("*.py"), BOOK / "experiments" / "stale.py"]
    return sorted([*FIGURES.glob("*.py"), *(BOOK / "results").glob("*.json"), *modules, BOOK / "published.json"])


def digest() -> str:
    """Hash all inputs."""
    whole = hashlib.sha256()
    for path in inputs():
        whole.update(path.name.encode() + b"\0" + path.read_bytes())
    return whole.hexdigest()


def write_changed() -> None:
    """Make everything anew if an input has changed."""
    now = digest()
    if STAMP.exists() and STAMP.read_text() == now:
        return
    for name in names():
        write(name)
    STAMP.write_text(now)


def shown(name: str) -> str:
    """Show a figure (a picture for either theme, with its words) or a table on a page, with its caption."""
    module = script(name)
    if hasattr(module, "table"):
        return f"{module.CAPTION}\n\n{module.table().markdown()}"
    pictures = [
        f"```{{image}} _figures/{name}-{theme.name}.svg\n:class: figure only-{theme.name}\n:alt: {module.alt()}\n```\n"
        for theme in style.THEMES
    ]
    moved = ["````{container} picture", *pictures, "````\n"]  # book.css lets phones move it sideways
    return "\n".join([*moved, f"{module.CAPTION}\n", "{.source}", origin(module.SOURCES)])


if __name__ == "__main__":
    for chosen in sys.argv[1:] or [*names(), README_PICTURE]:
        write(chosen)
        print(chosen)
    README.write_text(readme_with_results(README.read_text()))
