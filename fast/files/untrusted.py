"""Read files that anyone may have written: inside one folder, of bounded size, named in errors."""

import contextlib
import json
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

#: Most bytes of a JSON file, and of a safetensors header: a million tensors have names of 30 characters in one.
JSON_BYTES = 1 << 25


class CheckpointError(ValueError):
    """A checkpoint that cannot be read as what it claims to be."""


def inside(folder: Path, name: str) -> Path:
    """Path of an ordinary file that lies in a folder.

    Links may lead to other places in the folder or, in the cache of the hub, to the blobs of the same model.

    Raises
    ------
    CheckpointError
        If there is no such file, it is not an ordinary one, or it lies elsewhere.
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
    """The object in a JSON file of a folder.

    Raises
    ------
    CheckpointError
        If there is no such file, or it holds something else.
    """
    file = inside(folder, name)
    try:
        with file.open("rb") as opened:
            data = opened.read(JSON_BYTES + 1)
        return checked_json(data)
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} is damaged ({error}); copy or download it again") from error


def checked_json(data: bytes) -> dict[str, Any]:
    """The object that some JSON holds; ValueError or RecursionError if there is none."""
    if len(data) > JSON_BYTES:
        raise ValueError(f"it is larger than {JSON_BYTES:,} bytes")
    value = json.loads(data.decode("utf-8"))
    if not isinstance(value, dict):
        raise ValueError(f"it holds a {type(value).__name__}, not an object")
    json.dumps(value, ensure_ascii=False).encode("utf-8")  # refuses halves of surrogate pairs
    return value


@contextlib.contextmanager
def readable(file: Path) -> Iterator[None]:
    """Turns what goes wrong when a safetensors file is read into a CheckpointError that names it."""
    try:
        yield
    except FileNotFoundError as error:
        raise CheckpointError(f"{file.parent} is not a checkpoint: there is no {file.name}") from error
    except CheckpointError:
        raise
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise CheckpointError(f"{file} is damaged or incomplete ({error}); copy or download it again") from error
