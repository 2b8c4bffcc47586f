"""Run `littlebit eval` with the lm-evaluation-harness, which needs the network for nothing."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def evaluated_beside_harness(arguments: Sequence[Any], folder: Path) -> dict[str, Any]:
    """Run `littlebit eval` with these arguments in a process of its own, and return the JSON that it prints."""
    done = subprocess.run(
        [sys.executable, "-m", "littlebit.fast", "eval", *map(str, arguments), "--json"],
        capture_output=True,
        text=True,
        env=os.environ | {"HF_HOME": str(folder / "cache"), "HF_DATASETS_OFFLINE": "1", "HF_HUB_OFFLINE": "1"},
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)
