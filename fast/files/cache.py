"""Keep downloads, converted models and compiled kernels in the user's cache folder.

The folder is LITTLEBIT_CACHE if that is set, else littlebit/ in XDG_CACHE_HOME, ~/.cache/littlebit, or a folder of this
user in the temporary directory: the first that can be written.
"""

import contextlib
import functools
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from .atomic import atomic_directory


def build_once(folder: Path, make: Callable[[Path], None]) -> Path:
    """Create a directory with `make` unless it exists; processes that start together share the first result.

    Parameters
    ----------
    folder : Path
        The directory, usually from `cache_path`.
    make : callable
        Fills the temporary directory that it is given, which is then renamed to `folder`.
    """
    if not folder.exists():
        try:
            with atomic_directory(folder) as part:
                make(part)
        except OSError:
            if not folder.exists():
                raise
    return folder


NAME = "littlebit"
VARIABLE = "LITTLEBIT_CACHE"
PROBE_BYTES = 4096  # written to a folder to see whether its disk is full


def cache_path(*names: str, room: int = 0) -> Path:
    """Return the path of a cache entry: its present one, or one in the first folder with room for it.

    Parameters
    ----------
    names : str
        Path of the entry inside the cache folder.
    room : int
        Bytes that must be free for a new entry.

    Raises
    ------
    OSError
        If no folder can be written; the message names the variable to set.
    """
    for folder in candidate_folders():
        if folder.joinpath(*names).exists():
            return folder.joinpath(*names)
    return first_writable_folder(tuple(candidate_folders()), room).joinpath(*names)


def candidate_folders() -> Iterator[Path]:
    """Yield the folders that may be the cache, the preferred first."""
    if asked := os.environ.get(VARIABLE):
        yield Path(asked).absolute()
        return
    for variable, folder in (("XDG_CACHE_HOME", NAME), ("HOME", f".cache/{NAME}")):
        if os.path.isabs(base := os.environ.get(variable, "")):  # the XDG standard says to ignore relative paths
            yield Path(base, folder)
    if "HOME" not in os.environ:
        with contextlib.suppress(RuntimeError):  # the system does not know this user's home
            yield Path.home() / ".cache" / NAME
    if (shared := private_temporary_folder()) is not None:
        yield shared


def private_temporary_folder() -> Path | None:
    """Return a folder in the temporary directory that only this user can write, or None.

    The cache holds compiled kernels. Code from a folder that another user can write must never run.
    """
    user = os.getuid() if hasattr(os, "getuid") else os.environ.get("USERNAME", "")
    try:
        folder = Path(tempfile.gettempdir(), f"{NAME}-{user}")
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
    except OSError:
        return None
    others = found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    mine = not hasattr(os, "getuid") or (found.st_uid == os.getuid() and not others)
    return folder if stat.S_ISDIR(found.st_mode) and mine else None


@functools.lru_cache
def first_writable_folder(folders: tuple[Path, ...], room: int) -> Path:
    """Return the first folder that can be written and has `room` bytes free; the answer is cached."""
    reasons = []
    for folder in folders:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder) as file:
                file.write(bytes(PROBE_BYTES))
                file.flush()
            if (free := shutil.disk_usage(folder).free) < room:
                raise OSError(f"only {free:,} bytes are free there")
        except OSError as error:
            reasons.append(f"{folder}: {error.strerror or error}")
        else:
            return folder
    raise OSError(f"no cache folder can be written ({'; '.join(reasons)}): set {VARIABLE} to a writable folder")
