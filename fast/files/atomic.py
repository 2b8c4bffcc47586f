"""Directories and files that are written whole or not at all, whatever happens to the process or the machine meanwhile.

A directory is written under a hidden name beside its place, brought to the disk, and renamed. Its writer holds a lock
on it; what a writer that was killed left behind has none, and the next writer of the same place removes it.

Whether an output path can be written is found out before the work: `check_folder`, `check_file` and `check_room`.
"""

import contextlib
import ctypes
import errno
import glob
import hashlib
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from safetensors import SafetensorError

try:
    import fcntl
except ImportError:  # on Windows
    fcntl = None


AT_FDCWD, RENAME_EXCHANGE = -100, 2  # of Linux


PART = ".part"  # what the name of a directory that is being written ends in


LONG_NAME = 100  # bytes of a name that would leave too little for those of temporary directories


def place_of(path: str | Path) -> Path:
    """Follow the links and dots of an output path to the place that will be written.

    Raises
    ------
    OSError
        If it leads nowhere, or its name cannot be written into a checkpoint's files.
    """
    path = Path(path)
    if path.parts[:1] == ("~",):
        raise OSError(f"cannot write {path}: the shell did not replace '~'; give the path without quotes, or use $HOME")
    try:
        place = path.resolve()
    except (OSError, RuntimeError) as error:  # links that lead to each other
        why = getattr(error, "strerror", None) or error
        raise OSError(f"cannot write {path}: {why}; choose another path") from error
    try:
        str(place).encode()
    except UnicodeEncodeError as error:  # safetensors and tokenizers take UTF-8 alone
        raise OSError(f"cannot write {str(place)!a}: the path must be UTF-8; choose another name") from error
    return place


def existing_parent(place: Path) -> Path:
    """Find the nearest folder above a place; it and its missing parents can be made there.

    Raises
    ------
    OSError
        If a file stands in the way, or a name is too long.
    """
    base = next(parent for parent in place.parents if os.path.lexists(parent))
    if not base.is_dir():
        raise OSError(f"cannot write {place}: {base} is not a folder; choose a folder that can be written")
    longest = os.pathconf(base, "PC_NAME_MAX") if hasattr(os, "pathconf") else 255
    for name in place.relative_to(base).parts:
        if len(os.fsencode(name)) > longest:
            raise OSError(f"cannot write {place}: a name has at most {longest} bytes here; choose a shorter one")
    return base


def check_folder(place: Path) -> None:
    """Raise OSError unless a directory can be put in a place (see `place_of`), and what is there moved away."""
    base = existing_parent(place)
    if Path.cwd().is_relative_to(place):
        raise OSError(f"cannot replace {place}: this process runs in it; choose a folder inside it")
    with temporary_beside(base / place.name) as part:
        if not place.exists():
            return
        (part / "inner").mkdir()  # a directory is never renamed to one that is not empty
        try:
            os.rename(place, part)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                why = "it is a mount point" if error.errno == errno.EBUSY else error.strerror
                raise OSError(f"cannot replace {place}: {why}; choose a folder inside it") from error


def check_file(path: str | Path) -> Path:
    """The place of a file that is to be written, or the path of a device, a pipe or an output of this process.

    Raises
    ------
    OSError
        If it cannot be written.
    """
    path = Path(path)
    if stream_of(path) is not None or (os.path.exists(path) and not path.is_file() and not path.is_dir()):
        return path
    place = place_of(path)
    if os.path.isdir(place):
        raise IsADirectoryError(f"cannot write {path}: it is a folder; name a file in it")
    with temporary_beside(existing_parent(place) / place.name):
        pass
    return place


def stream_of(path: Path) -> TextIO | None:
    """The standard stream of this process that a path such as /dev/stdout leads to."""
    with contextlib.suppress(OSError, ValueError):
        found = path.stat()
        for stream, descriptor in ((sys.stdout, 1), (sys.stderr, 2)):
            if str(path).startswith(("/dev/", "/proc/")) and os.path.samestat(found, os.fstat(descriptor)):
                return stream
    return None


def write_text(path: str | Path, text: str) -> None:
    """Write a UTF-8 text file; complete, or not at all.

    Raises
    ------
    OSError
        If it cannot be written; what was there before stays.
    """
    place = check_file(path)
    if (stream := stream_of(place)) is not None:
        stream.write(text)
        stream.flush()
        return
    try:
        if place.exists() and not place.is_file():
            place.write_text(text, encoding="utf-8")
            return
        with file_whole(place) as part:
            part.write_text(text, encoding="utf-8")
    except OSError as error:
        raise OSError(f"cannot write {path}: {error.strerror or error}; what was there is as it was") from error


@contextlib.contextmanager
def file_whole(place: Path) -> Iterator[Path]:
    """The path of a temporary file that takes a place if the block succeeds and vanishes if it does not."""
    with temporary_beside(place) as folder:
        yield folder / place.name
        synchronise(folder / place.name)
        os.replace(folder / place.name, place)
        synchronise(place.parent)


def check_room(place: Path, size: int) -> None:
    """Raise OSError unless about so many bytes are free where a place is to be written."""
    free = shutil.disk_usage(existing_parent(place)).free
    if free < size:
        raise OSError(
            f"cannot write {place}: it takes about {size:,} bytes, but {free:,} are free; make room, or choose another "
            "disk"
        )


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
    path = place_of(path)
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
        name = path.name
        if len(os.fsencode(name)) > LONG_NAME:
            name = hashlib.sha256(os.fsencode(name)).hexdigest()
        for left in path.parent.glob(f".{glob.escape(name)}-????????{PART}"):
            remove_unlocked(left)
        part, lock = locked_directory(path.parent, f".{name}-")
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
