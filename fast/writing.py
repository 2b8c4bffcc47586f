"""Directories that are written whole or not at all, whatever happens to the process or the machine meanwhile.

A directory is written under a hidden name beside its place, brought to the disk, and renamed. Its writer holds a lock
on it; what a writer that was killed left behind has none, and the next writer of the same place removes it.
"""

import contextlib
import ctypes
import glob
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from safetensors import SafetensorError

try:
    import fcntl
except ImportError:  # on Windows
    fcntl = None

AT_FDCWD, RENAME_EXCHANGE = -100, 2  # of Linux
PART = ".part"  # what the name of a directory that is being written ends in


@contextlib.contextmanager
def written_whole(path: Path, overwrite: bool = False) -> Iterator[Path]:
    """A temporary directory beside `path` that becomes `path` if the block succeeds and vanishes if it does not.

    Parameters
    ----------
    path : Path
    overwrite : bool
        Whether a directory that is there by then gives way; else the first of two writers wins.

    Raises
    ------
    OSError
        If it cannot be written, or another is there; what was there before stays.
    """
    path = path.absolute()
    with temporary_beside(path) as part:
        try:
            part.chmod(0o755)
            yield part
            bring_to_disk(part)
            put_in_place(part, path, overwrite)
            synchronise(path.parent)
        except SafetensorError as error:
            raise OSError(f"cannot write {path}: {error}; nothing was left there") from error
        except OSError as error:
            raise OSError(f"cannot write {path}: {error.strerror or error}; nothing was left there") from error


@contextlib.contextmanager
def temporary_beside(path: Path) -> Iterator[Path]:
    """A new directory in the folder that `path` is in, locked, and removed at the end; those of killed writers too.

    Raises
    ------
    OSError
        If there can be none; the message says why.
    """
    path = path.absolute()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for left in path.parent.glob(f".{glob.escape(path.name)}-????????{PART}"):
            remove_unlocked(left)
        part, lock = locked_directory(path.parent, f".{path.name}-")
    except OSError as error:
        raise OSError(f"cannot write {path}: {error.strerror}; choose a folder that can be written") from error
    try:
        yield part
    finally:
        shutil.rmtree(part, ignore_errors=True)
        unlock(lock)


def locked_directory(parent: Path, prefix: str) -> tuple[Path, int | None]:
    """A new directory and the descriptor that holds its lock."""
    while True:
        part = Path(tempfile.mkdtemp(dir=parent, prefix=prefix, suffix=PART))
        with contextlib.suppress(FileNotFoundError, BlockingIOError):  # another writer found it before it was locked
            lock = locked(part)
            if part.exists():
                return part, lock
            unlock(lock)


def locked(folder: Path) -> int | None:
    """A descriptor that holds the lock on a directory until it is closed, or its process ends.

    None where directories cannot be locked: on Windows and some network file systems.

    Raises
    ------
    BlockingIOError
        If another one holds it.
    """
    if fcntl is None:
        return None
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def unlock(lock: int | None) -> None:
    """Give a lock back."""
    if lock is not None:
        os.close(lock)


def remove_unlocked(folder: Path) -> None:
    """Remove a temporary directory whose writer is gone."""
    with contextlib.suppress(OSError):  # its writer is still at work, or is done with it
        lock = locked(folder)
        if lock is not None:
            shutil.rmtree(folder, ignore_errors=True)
            os.close(lock)


def bring_to_disk(folder: Path) -> None:
    """Wait until everything in a folder is on the disk: a rename may get there before what was written first."""
    for directory, _, names in os.walk(folder):
        for name in names:
            synchronise(Path(directory) / name)
        synchronise(Path(directory))


def synchronise(path: Path) -> None:
    """Wait until a file, or the list of a directory's names, is on the disk."""
    if fcntl is None and path.is_dir():
        return  # Windows opens no directories
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def put_in_place(part: Path, path: Path, overwrite: bool) -> None:
    """Rename `part` to `path`; what was there goes once its successor stands, and comes back if that fails.

    Where the file system can, both change places in one step, so that `path` is never missing. Without `overwrite` a
    rename fails if something is there.
    """
    if not (overwrite and path.exists()):
        os.rename(part, path)
        return
    if exchange(part, path):
        return  # the old one goes with the temporary directory
    old = part.with_name(part.name + "-old")
    os.rename(path, old)
    try:
        os.rename(part, path)
    except OSError:
        os.rename(old, path)
        raise
    shutil.rmtree(old, ignore_errors=True)


def exchange(one: Path, other: Path) -> bool:
    """Let two directories change places in one step; False where that cannot be done."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError):
        return False
    return renameat2(AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), RENAME_EXCHANGE) == 0


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
