"""Define what the pages of the book may say between double braces."""

import json
import re
import sys
from pathlib import Path
from typing import Any

BOOK = Path(__file__).parents[1]
sys.path[:0] = [str(BOOK / folder) for folder in ("_ext", "experiments", "figures")]

import jinja2  # noqa: E402 (the path comes first)
import make  # noqa: E402
import reliability  # noqa: E402
import sources  # noqa: E402
import tables  # noqa: E402
from littlebit.conformance import LAWS, broken  # noqa: E402

NOTEBOOKS = BOOK.parent / "notebooks"


def table(name: str, *arguments: Any) -> str:
    """Write a table of tables.py as Markdown."""
    return getattr(tables, name)(*arguments).markdown()


def notebook(number: int, title: str) -> str:
    """Link to the notebook with this number."""
    found = sorted(NOTEBOOKS.glob(f"{number:02}*.ipynb"))
    return f"{{doc}}`{title} <notebooks/{found[0].stem}>`" if found else title


def explored() -> str:
    """Collect the data of the interactive page as JSON: pictures, memory, and measured perplexities."""
    shipped = sources.rows("training_smollm2", stage="shipped")
    points = [{"bits": each["bits"], "perplexity": each["perplexity_packed"]} for each in shipped]
    record = {
        "original": sources.row("explore", what="original"),
        "reconstructions": sources.rows("explore", what="reconstruction"),
        "memory": sources.rows("explore", what="memory"),
        "perplexity": sorted(points, key=lambda each: each["bits"]),
        "dense": sources.row("training_smollm2", name="teacher")["perplexity"],
    }
    return json.dumps(record, separators=(",", ":"))


def laws() -> str:
    """Write the laws of littlebit.conformance as a table, with the mistake that each catches."""
    rows = []
    for law in LAWS:
        cells = (f"`{law.name}`", law.statement, broken.MISTAKES[law.name].what)
        escaped = (re.sub(r"([|*<_\\])", r"\\\1", cell) if cell[0] != "`" else cell for cell in cells)
        rows.append(f"| {' | '.join(escaped)} |")
    return "\n".join(["| law | what must hold | a mistake that it catches |", "|---|---|---|", *rows])


def laws_count() -> int:
    """Count the laws of littlebit.conformance."""
    return len(LAWS)


#: All names that a page may use.
NAMES = {
    "cited": sources.cited,
    "computed": sources.computed,
    "explored": explored,
    "figure": make.shown,
    "laws": laws,
    "laws_count": laws_count,
    "measured": sources.measured,
    "notebook": notebook,
    "publication": sources.publication,
    "reliability": reliability.reliability,
    "repaired": reliability.repaired,
    "results": sources.results,
    "table": table,
}


def filled_in(text: str) -> str:
    """Fill in everything between double braces on a page.

    Raises
    ------
    jinja2.UndefinedError, LookupError
        If a page names what does not exist.
    """
    # Blocks and comments have marks that no page has: a page has values alone, and no logic.
    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
        block_start_string="<%--",
        block_end_string="--%>",
        comment_start_string="<#--",
        comment_end_string="--#>",
    )
    return environment.from_string(text).render(NAMES)
