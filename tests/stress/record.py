"""The record of the last full runs of `make fuzz`, `make faults` and `make soak`: book/results/reliability.json."""

import datetime
import json
from pathlib import Path

RECORD = Path(__file__).parents[2] / "book" / "results" / "reliability.json"
COMMAND = "make fuzz faults soak SAVE=1, each with a BUDGET of its own"


def record(run, *rows):
    """Put what a run found into the record, with its date and the commit that it ran on; what was fixed stays."""
    from littlebit.fast.bench.timing import commit, cpu_name, save_results

    kept = [row for row in json.loads(RECORD.read_text())["rows"] if row["run"] != run or "fixed" in row]
    when = {"run": run, "date": datetime.datetime.now(datetime.UTC).date().isoformat(), "commit": commit()}
    save_results(RECORD, sorted(kept + [when | row for row in rows], key=lambda row: row["run"]), COMMAND, cpu_name())
