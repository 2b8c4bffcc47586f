"""Write the tables of reliability.md: `{{ reliability("fuzz") }}` and its relatives."""

from sources import Table, number, rows

FILE = "reliability"
OUTCOMES = {
    "refused": "refused",
    "loaded": "loaded as saved",
    "loaded, sealed": "loaded, sealed",
    "findings": "findings",
}


def found(run: str) -> list[dict]:
    """Select what the last full run of a command found, without what was fixed."""
    return [row for row in rows(FILE, run=run) if "fixed" not in row]


def runs() -> Table:
    """List when each command last ran in full, and at which commit."""
    last = {run: found(run)[0] for run in ("fuzz", "faults", "soak")}
    return Table(
        ["run", "date", "commit"], [[f"`make {run}`", row["date"], row["commit"]] for run, row in last.items()], [FILE]
    )


def fuzz() -> Table:
    """Count cases by how they were drawn and by outcome."""
    counts = {row["drawn"]: [row["cases"], *(row.get(key, 0) for key in OUTCOMES)] for row in found("fuzz")}
    counts["together"] = [sum(column) for column in zip(*counts.values(), strict=True)]
    lines = [[drawn, *map(number, count)] for drawn, count in counts.items()]
    return Table(["drawn", "cases", *OUTCOMES.values()], lines, [FILE])


def faults() -> Table:
    """Count the faults that commands were put through."""
    counts = {row["fault"]: row["times"] for row in found("faults")}
    counts["together"] = sum(counts.values())
    return Table(["what happened", "times"], [[what, number(count)] for what, count in counts.items()], [FILE])


def reliability(part: str) -> str:
    """Write one of the tables above as Markdown."""
    return {"runs": runs, "fuzz": fuzz, "faults": faults}[part]().markdown()


def repaired(run: str) -> str:
    """List what a command found and was then fixed."""
    return "\n".join(f"- {row['fixed']}" for row in rows(FILE, run=run) if "fixed" in row)
