"""Record the last full runs of `make fuzz`, `make faults` and `make soak` in book/results/reliability.json."""

import datetime
import json
from pathlib import Path

RECORD = Path(__file__).parents[2] / "book" / "results" / "reliability.json"
COMMAND = "make fuzz faults soak SAVE=1, each with a BUDGET of its own"


def record(run, *rows):
    """Replace a run's rows in the record, with today's date and commit; keep the rows of defects that were fixed."""
    from littlebit.fast.bench.timing import commit, cpu_name, save_results

    kept = [row for row in json.loads(RECORD.read_text())["rows"] if row["run"] != run or "fixed" in row]
    when = {"run": run, "date": datetime.datetime.now(datetime.UTC).date().isoformat(), "commit": commit()}
    save_results(RECORD, sorted(kept + [when | row for row in rows], key=lambda row: row["run"]), COMMAND, cpu_name())
