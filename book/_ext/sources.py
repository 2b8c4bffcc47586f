"""Look up the numbers of the book: measured ones in results/*.json, cited ones in published.json.

No measured number is typed into a page. A page says `{{ measured("cpu_linear", "speedup", d_out=28672) }}` or
`{{ table("cpu_linear") }}`, and pages.py fills in the number and its source.
"""

import html
import json
import math
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import stale

BOOK = Path(__file__).parents[1]
RESULTS, PUBLISHED = BOOK / "results", BOOK / "published.json"


@cache
def results(name: str) -> dict[str, Any]:
    """Read a results file, named without its ending: rows, and how they were measured."""
    return json.loads((RESULTS / f"{name}.json").read_text())


def rows(file: str, /, **where: Any) -> list[dict[str, Any]]:
    """Select the rows of a results file that have these values."""
    return [row for row in results(file)["rows"] if all(row.get(key) == value for key, value in where.items())]


def row(file: str, /, **where: Any) -> dict[str, Any]:
    """Select the one row that has these values.

    Raises
    ------
    LookupError
        If no row or more than one has them.
    """
    found = rows(file, **where)
    if len(found) != 1:
        raise LookupError(f"results/{file}.json has {len(found)} rows with {where}, not one")
    return found[0]


@cache
def publications() -> list[dict[str, Any]]:
    """Read what others published: model, method, bits per weight, metric, value, table, source and status."""
    return json.loads(PUBLISHED.read_text())


def publication(
    metric: str, model: str, method: str, bits: float | None = None, table: str = ""
) -> dict[str, Any] | None:
    """Find the published figure with these names: the first where tables repeat it, None where it is missing."""
    for each in publications():
        names = (each["metric"], each["model"], each["method"]) == (metric, model, method)
        if names and (bits is None or each.get("bpw") == bits) and each["table"].startswith(table):
            return each
    return None


def number(value: float | None, digits: int | None = 3) -> str:
    """Format a number to `digits` significant digits, with commas; integers in full, None as an empty string."""
    if value is None:
        return ""
    if isinstance(value, int) or digits is None:
        return f"{value:,}"
    rounded = float(f"{value:.{digits}g}")
    exponent = math.floor(math.log10(abs(rounded))) if rounded else 0
    if not -4 < exponent < 7:
        return f"{value:.{digits - 1}e}"
    return f"{rounded:,.{max(0, digits - 1 - exponent)}f}"


def fixed(value: float | None, decimals: int = 1) -> str:
    """Format a number with a fixed number of decimals, with commas; None as an empty string."""
    return "" if value is None else f"{value:,.{decimals}f}"


def as_published(value: float) -> str:
    """Format a published number with commas and all its digits."""
    return f"{value:,.9g}"


def said(text: str, source: str) -> str:
    """Mark up a number on a page, so that hovering over it shows its source."""
    return f'<span class="sourced" title="{html.escape(source, quote=True)}">{text}</span>'


def measured(file: str, key: str, digits: int | None = 3, scale: float = 1, /, **where: Any) -> str:
    """Show a measured number: column `key` of the one row with these values, times `scale`."""
    value = row(file, **where)[key]
    source = f"measured: results/{file}.json, {results(file)['device']}"
    return said(number(value if scale == 1 else value * scale, digits), source)


def cited(metric: str, model: str, method: str, bits: float | None = None, table: str = "") -> str:
    """Show a number that others published.

    Raises
    ------
    LookupError
        If published.json does not hold it.
    """
    found = publication(metric, model, method, bits, table)
    if found is None:
        raise LookupError(f"published.json has no {metric} of {method} for {model} at {bits} bits")
    return said(as_published(found["value"]), f"published: {found['source']}, {found['table']} ({found['status']})")


def computed(value: float, source: str, digits: int | None = 3) -> str:
    """Show a number that follows from others by arithmetic."""
    return said(number(value, digits), f"computed from {source}")


class Table(NamedTuple):
    """A table of a page.

    Attributes
    ----------
    head : sequence of str
    rows : sequence of sequences of str
        One cell for each word of the head.
    sources : sequence of str
        Files of results/ without their ending, or "published".
    note : str
        Goes before the sources, below the table.
    """

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    sources: Sequence[str]
    note: str = ""

    def markdown(self) -> str:
        """Write the table as Markdown, and a line that says where its numbers come from."""
        width = len(self.head)
        if any(len(cells) != width for cells in self.rows):
            raise ValueError(f"a row does not have one cell for each of {list(self.head)}")
        numeric = [all(is_numeric(cells[at]) for cells in self.rows) and at > 0 for at in range(width)]
        rule = "|".join("---:" if right else "---" for right in numeric)
        lines = ["| " + " | ".join(cells) + " |" for cells in self.rows]
        return "\n".join(
            [
                f"| {' | '.join(self.head)} |",
                f"|{rule}|",
                *lines,
                "",
                "{.source}",
                f"{self.note} {origin(self.sources)}".strip(),
            ]
        )


def is_numeric(cell: str) -> bool:
    """Check that a cell is empty or begins with a digit, so that its column is aligned to the right."""
    bare = cell.strip("* ")
    return not bare or bare[0].isdigit()


def origin(names: Iterable[str]) -> str:
    """Link the files that numbers come from, with the machine and the code that changed since (stale.py)."""
    parts = []
    for name in names:
        if name == "published":
            parts.append("{download}`published.json`")
        else:
            old = stale.changed(name)
            since = f"; measured before changes in {', '.join(f'`{module}`' for module in old)}" if old else ""
            parts.append(f"{{download}}`results/{name}.json` ({results(name)['device']}{since})")
    return f"Source: {'; '.join(parts)}."
