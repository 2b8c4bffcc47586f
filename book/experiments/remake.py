"""Measure again what a CPU can, by running the command in each results file.

    python book/experiments/remake.py [cpu_linear memory ...]

Files that were measured on a GPU, whose command is a description, or needs a file or a program that is not part of the
repository, are left as they are, and the reason is printed. All together take about half an hour; run them
on a machine that does nothing else. The last lines name the files that are older than the code that they measure.
"""

import json
import subprocess
import sys
from pathlib import Path

import stale

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "book" / "results"
PROGRAMS = {"python": [sys.executable], "littlebit": [sys.executable, "-m", "littlebit.fast"]}


def reason_to_leave(record: dict, words: list[str]) -> str | None:
    """Say why a file cannot be measured again here, or return None."""
    if "NVIDIA" in record["device"]:
        return f"measured on {record['device']}"
    if words[0] not in PROGRAMS or not any(word.startswith("book/results/") for word in words):
        return f"its command is a description: {record['command']}"
    needed = [word for word in words if word.isupper() or word.endswith((".txt", ".gguf"))]
    missing = [word for word in needed if word.isupper() or not (ROOT / word).exists()]
    if missing:
        return f"its command needs {', '.join(missing)}: {record['command']}"
    return None


def main() -> None:
    """Measure the named files again, or all."""
    names = sys.argv[1:] or sorted(path.stem for path in RESULTS.glob("*.json"))
    failed = []
    for name in names:
        record = json.loads((RESULTS / f"{name}.json").read_text())
        words = record["command"].split()
        reason = reason_to_leave(record, words)
        if reason:
            print(f"{name}: left as it is: {reason}")
            continue
        print(f"{name}: {record['command']}", flush=True)
        done = subprocess.run([*PROGRAMS[words[0]], *words[1:]], cwd=ROOT, check=False)
        if done.returncode:
            failed.append(name)
    print(stale.report(names))
    if failed:
        sys.exit(f"not measured again: {', '.join(failed)}")


if __name__ == "__main__":
    main()
