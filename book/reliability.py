"""What the page on reliability says of the last full runs: `{{ reliability("fuzz") }}` in reliability.md."""

import json
from pathlib import Path
from typing import Any

RECORD = Path(__file__).parent / "results" / "reliability.json"


def table(head: list[str], rows: list[list[Any]]) -> str:
    """A table in Markdown; numbers have commas."""
    lines = [
        head,
        ["---"] * len(head),
        *([f"{each:,}" if isinstance(each, int) else each for each in row] for row in rows),
    ]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def listed(texts: list[str]) -> str:
    """A list in Markdown."""
    return "\n".join(f"- {text}" for text in texts)


def runs(record: dict[str, Any]) -> str:
    """When each command ran in full, and on what."""
    rows = [
        [f"`make {name}`", record[name]["date"], f"`{record[name]['commit'][:10]}`"]
        for name in ("fuzz", "faults", "soak")
    ]
    return table(["run", "date", "commit"], rows)


def fuzz(record: dict[str, Any]) -> str:
    """Cases by how they were drawn and what became of them."""
    keys = ("refused", "loaded", "loaded, sealed", "findings")
    found = {how: each for how, each in record["fuzz"].items() if how in ("random", "guided")}
    rows = [[how, each["cases"], *(each["outcomes"].get(key, 0) for key in keys)] for how, each in found.items()]
    rows.append(["together", *(sum(row[at] for row in rows) for at in range(1, len(rows[0])))])
    return table(["drawn", "cases", "refused", "loaded as saved", "loaded, sealed", "findings"], rows)


def faults(record: dict[str, Any]) -> str:
    """How often what happened to a command."""
    rows = [[what, count] for what, count in record["faults"]["outcomes"].items()]
    return table(["what happened", "times"], [*rows, ["together", record["faults"]["rounds"]]])


def soak(record: dict[str, Any]) -> str:
    """What the soak did, and the memory before and after."""
    found = record["soak"]
    first, last = (found[f"resident_bytes_{when}"] / 2**20 for when in ("first", "last"))
    return (
        f"{found['seconds'] / 60:.0f} minutes in which a model wrote {found['tokens']:,} tokens, with each key-value "
        f"cache, and {found['shapes']:,} layers of random shapes, ranks, dtypes and batches were computed. Resident "
        f"memory went from {first:.1f} MiB after the first tenth to {last:.1f} MiB at the end, {found['growth']:+.2%}."
    )


def reliability(part: str) -> str:
    """One of the above, or `fixed-NAME`: what was found and fixed."""
    record = json.loads(RECORD.read_text())
    if part.startswith("fixed-"):
        return listed(record["fixed"][part.removeprefix("fixed-")])
    return {"runs": runs, "fuzz": fuzz, "faults": faults, "soak": soak}[part](record)
