"""Read files from untrusted sources: only ordinary files inside one folder, of bounded size.

Every problem becomes a CheckpointError that names the file and says what to do.
"""

import contextlib
import json
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

#: Largest JSON file and safetensors header, in bytes: room for a million tensors with names of 30 characters.
JSON_BYTES = 1 << 25


class CheckpointError(ValueError):
    """Report a checkpoint that is incomplete, corrupt, inconsistent or unsupported."""


def resolve_inside(folder: Path, name: str) -> Path:
    """Return the path of a file in a folder, after checking that it is an ordinary file and really inside.

    A symbolic link may point to another file in the folder or, in the Hugging Face hub's cache, to a blob of the same
    model.

    Raises
    ------
    CheckpointError
        If the file does not exist, is not an ordinary file, or is outside the folder.
    """
    file = folder / name
    if "\0" in name or Path(name).name != name:
        raise CheckpointError(f"{folder}: {name!r} is not the name of a file in it; download the checkpoint again")
    try:
        real, home = file.resolve(strict=True), folder.resolve(strict=True)
        ordinary = stat.S_ISREG(real.stat().st_mode)
    except FileNotFoundError as error:
        raise CheckpointError(f"{folder} is not a checkpoint: there is no {name}") from error
    except (OSError, RuntimeError) as error:  # a loop of links is a RuntimeError
        raise CheckpointError(f"{file} cannot be read ({error}); copy or download it again") from error
    homes = [home]
    if home.parent.name == "snapshots" and home.parents[1].name.startswith("models--"):
        homes.append(home.parents[1] / "blobs")
    if not any(real.is_relative_to(place) for place in homes):
        raise CheckpointError(f"{file} is a link that leads out of its directory, to {real}; copy the file itself")
    if not ordinary:
        raise CheckpointError(f"{file} is not an ordinary file; copy or download it again")
    return file


def read_json(folder: Path, name: str) -> dict[str, Any]:
    """Read a JSON file in a folder; its top-level value must be an object.

    Raises
    ------
    CheckpointError
        If the file is missing, too large, or not a JSON object.
    """
    file = resolve_inside(folder, name)
    try:
        with file.open("rb") as opened:
            data = opened.read(JSON_BYTES + 1)
        return parse_json_object(data)
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} is damaged ({error}); copy or download it again") from error


def parse_json_object(data: bytes) -> dict[str, Any]:
    """Parse a JSON object of at most JSON_BYTES bytes; raise ValueError or RecursionError for anything else."""
    if len(data) > JSON_BYTES:
        raise ValueError(f"it is larger than {JSON_BYTES:,} bytes")
    value = json.loads(data.decode("utf-8"))
    if not isinstance(value, dict):
        raise ValueError(f"it holds a {type(value).__name__}, not an object")
    json.dumps(value, ensure_ascii=False).encode("utf-8")  # raises for lone surrogates, which no file name can hold
    return value


@contextlib.contextmanager
def open_errors(file: Path) -> Iterator[None]:
    """Turn any error while a safetensors file is read into a CheckpointError that names the file."""
    try:
        yield
    except FileNotFoundError as error:
        raise CheckpointError(f"{file.parent} is not a checkpoint: there is no {file.name}") from error
    except CheckpointError:
        raise
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise CheckpointError(f"{file} is damaged or incomplete ({error}); copy or download it again") from error
