"""The project's measurements: one JSON file for each, with the values, the command, the commit and the machine."""

import json
from pathlib import Path
from typing import Any


def read(name: str) -> dict[str, Any]:
    """Read the measurements `name`.json.

    Parameters
    ----------
    name : str
        Such as "cpu_linear".

    Raises
    ------
    FileNotFoundError
        If nothing was measured under that name.
    """
    return json.loads(Path(__file__).with_name(f"{name}.json").read_text(encoding="utf-8"))
