"""Keep files that are made once in the user's cache folder."""

import contextlib
import functools
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from .atomic import written_whole


def made_once(folder: Path, make: Callable[[Path], None]) -> Path:
    """A directory that `make` fills on first use; if several processes are first, all get what one of them made."""
    if not folder.exists():
        try:
            with written_whole(folder) as part:
                make(part)
        except OSError:
            if not folder.exists():
                raise
    return folder


NAME = "littlebit"


VARIABLE = "LITTLEBIT_CACHE"


PROBE_BYTES = 4096


def cached(*names: str, room: int = 0) -> Path:
    """Find the place of a cache entry: where it is already, or the first folder with room for it.

    Parameters
    ----------
    names : str
        Path of the entry in the cache folder.
    room : int
        Free bytes that a folder must have for a new entry.

    Raises
    ------
    OSError
        If no folder can be written; the message names the variable to set.
    """
    for folder in candidates():
        if folder.joinpath(*names).exists():
            return folder.joinpath(*names)
    return first_writable(tuple(candidates()), room).joinpath(*names)


def candidates() -> Iterator[Path]:
    """List the folders that may be the cache, the preferred first."""
    if asked := os.environ.get(VARIABLE):
        yield Path(asked).absolute()
        return
    for variable, folder in (("XDG_CACHE_HOME", NAME), ("HOME", f".cache/{NAME}")):
        if os.path.isabs(base := os.environ.get(variable, "")):  # others are to be ignored, says the XDG standard
            yield Path(base, folder)
    if "HOME" not in os.environ:
        with contextlib.suppress(RuntimeError):  # this user is not in the system's list
            yield Path.home() / ".cache" / NAME
    if (shared := temporary_folder()) is not None:
        yield shared


def temporary_folder() -> Path | None:
    """Find or make a folder of this user alone among the temporary ones; None if there can be none.

    Compiled kernels are code: a folder that another user may write to is not used.
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
def first_writable(folders: tuple[Path, ...], room: int) -> Path:
    """Find the first of some folders that can be written and has room; the answer is kept."""
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
    raise OSError(f"no cache folder can be written ({'; '.join(reasons)}): set {VARIABLE} to a folder that can be")
