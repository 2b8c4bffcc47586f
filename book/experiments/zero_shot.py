"""Measure the seven zero-shot tasks of the paper, and BLiMP, for SmolLM2 and its shipped students.

    python book/experiments/zero_shot.py OUT.json --tasks zero-shot.zip [--blimp blimp.zip] [--device cuda]

Prompts and scores are the lm-evaluation-harness's (fast/evaluation/tasks.py). On a GPU, models compute in bfloat16.
Results are written after each task; rows of other models in OUT.json are kept. With --items, only the first items of
each task are scored.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import littlebit.fast as lb
import torch
from littlebit.fast.bench.timing import device_name, save_results
from littlebit.fast.checkpoints.names import bundled_names
from littlebit.fast.cli.models import load_any
from littlebit.fast.evaluation.tasks import read_tasks, score_task

ORIGINAL = "smollm2"


def main() -> None:
    """Measure every model on every task, and save the rows after each."""
    students = [name for name in bundled_names() if name.startswith(ORIGINAL)]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument(
        "--tasks", type=Path, required=True, help="folder or zip archive with a .jsonl file of each task"
    )
    parser.add_argument("--blimp", type=Path, help="zip archive of BLiMP")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--items", type=int, help="score this many items of each task (default: all)")
    parser.add_argument("--blimp-items", type=int, help="score this many pairs of each paradigm (default: all)")
    parser.add_argument("--models", nargs="+", default=[ORIGINAL, *students])
    parser.add_argument("--original", default=ORIGINAL, help="folder of the original, where it cannot be fetched")
    arguments = parser.parse_args()
    dtype, device = torch.bfloat16 if "cuda" in arguments.device else torch.float32, device_name(arguments.device)
    command = f"python book/experiments/zero_shot.py book/results/zero_shot.json --tasks {arguments.tasks.name}"
    command += f" --blimp {arguments.blimp.name}" if arguments.blimp else ""
    command += f" --items {arguments.items}" if arguments.items else ""
    command += f" --blimp-items {arguments.blimp_items}" if arguments.blimp_items else ""
    command += f" --device {arguments.device}"
    read = read_tasks(arguments.tasks, arguments.items)
    kept = json.loads(arguments.out.read_text())["rows"] if arguments.out.exists() else []
    rows = [row for row in kept if row["model"] not in arguments.models]

    def add(row: dict[str, Any]) -> None:
        rows.append(row | {"dtype": str(dtype).removeprefix("torch."), "seconds": time.perf_counter() - start})
        print(json.dumps(rows[-1]), flush=True)
        save_results(arguments.out, rows, command, device)

    for name in arguments.models:
        source = arguments.original if name == ORIGINAL else name
        tokenizer, model = lb.load_tokenizer(source), load_any(source, arguments.device, dtype)
        for task, items in read.items():
            start = time.perf_counter()
            score = score_task(model, tokenizer, task, items, progress=False)
            add({"model": name, "task": task} | score._asdict())
        if arguments.blimp:
            start = time.perf_counter()
            found = lb.blimp(model, tokenizer, arguments.blimp, arguments.blimp_items, progress=False)
            add({"model": name, "task": "blimp", "acc": found.accuracy, "chance": 0.5, "items": found.pairs})


if __name__ == "__main__":
    main()
