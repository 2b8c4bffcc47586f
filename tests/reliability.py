"""The record of the last full runs of `make fuzz`, `make faults` and `make soak`: book/results/reliability.json."""

import datetime
import json
import subprocess
from pathlib import Path

ROOT = Path(__file__).parent.parent
RECORD = ROOT / "book" / "results" / "reliability.json"


def record(name, found):
    """Put what a run found into the record, with its date and the commit that it ran on."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True)
    kept = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    date = datetime.datetime.now(datetime.UTC).date().isoformat()
    kept[name] = {"date": date, "commit": commit.stdout.strip()} | found
    RECORD.write_text(json.dumps(kept, indent=1, sort_keys=True) + "\n")
