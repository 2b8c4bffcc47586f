"""Write directories and files atomically: after a crash or power cut the output is complete, or as it was before.

1. Create a hidden temporary directory beside the output (`temporary_sibling`) and lock it.
2. Write everything into it.
3. fsync every file and directory in it, because a rename may reach the disk before the data does.
4. Rename it to the output, and fsync the parent directory.

A writer that is killed leaves its temporary directory behind, but the kernel drops its lock. The next writer of the
same output removes every such directory that is not locked.

`check_folder`, `check_file` and `check_room` find out before hours of work whether an output can be written.
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


AT_FDCWD, RENAME_EXCHANGE = -100, 2  # constants of Linux's renameat2

PART = ".part"  # suffix of temporary directories

LONG_NAME = 100  # bytes; longer names are hashed, so that a temporary directory's name stays below the limit of 255


def resolve_output(path: str | Path) -> Path:
    """Resolve the links and dots of an output path.

    Raises
    ------
    OSError
        If its links form a loop, it begins with an unexpanded '~', or it is not UTF-8, which safetensors require.
    """
    path = Path(path)
    if path.parts[:1] == ("~",):
        raise OSError(f"cannot write {path}: the shell did not replace '~'; give the path without quotes, or use $HOME")
    try:
        place = path.resolve()
    except (OSError, RuntimeError) as error:  # a loop of links is a RuntimeError
        why = getattr(error, "strerror", None) or error
        raise OSError(f"cannot write {path}: {why}; choose another path") from error
    try:
        str(place).encode()
    except UnicodeEncodeError as error:
        raise OSError(f"cannot write {str(place)!a}: the path must be UTF-8; choose another name") from error
    return place


def existing_parent(place: Path) -> Path:
    """Return the nearest existing folder above a path, in which the rest of the path can be created.

    Raises
    ------
    OSError
        If that is a file, or a name on the way is too long for its file system.
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
    """Raise OSError unless a directory can be created at a resolved path, and an existing one replaced."""
    base = existing_parent(place)
    if Path.cwd().is_relative_to(place):
        raise OSError(f"cannot replace {place}: this process runs in it; choose a folder inside it")
    with temporary_sibling(base / place.name) as part:
        if not place.exists():
            return
        (part / "inner").mkdir()  # renaming onto a directory that is not empty fails and changes nothing: a safe trial
        try:
            os.rename(place, part)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                why = "it is a mount point" if error.errno == errno.EBUSY else error.strerror
                raise OSError(f"cannot replace {place}: {why}; choose a folder inside it") from error


def check_file(path: str | Path) -> Path:
    """Resolve the path of an output file, and check that it can be written.

    Devices, pipes and the standard streams (/dev/stdout) are returned as they are.

    Raises
    ------
    OSError
        If it is a folder, or its parent cannot be written.
    """
    path = Path(path)
    if standard_stream(path) is not None or (os.path.exists(path) and not path.is_file() and not path.is_dir()):
        return path
    place = resolve_output(path)
    if os.path.isdir(place):
        raise IsADirectoryError(f"cannot write {path}: it is a folder; name a file in it")
    with temporary_sibling(existing_parent(place) / place.name):
        pass
    return place


def standard_stream(path: Path) -> TextIO | None:
    """Return the standard stream of this process that a path such as /dev/stdout names, or None."""
    with contextlib.suppress(OSError, ValueError):
        found = path.stat()
        for stream, descriptor in ((sys.stdout, 1), (sys.stderr, 2)):
            if str(path).startswith(("/dev/", "/proc/")) and os.path.samestat(found, os.fstat(descriptor)):
                return stream
    return None


def write_text(path: str | Path, text: str) -> None:
    """Write a UTF-8 text file atomically.

    Raises
    ------
    OSError
        If it cannot be written; an earlier file is unchanged.
    """
    place = check_file(path)
    if (stream := standard_stream(place)) is not None:
        stream.write(text)
        stream.flush()
        return
    try:
        if place.exists() and not place.is_file():
            place.write_text(text, encoding="utf-8")
            return
        with atomic_file(place) as part:
            part.write_text(text, encoding="utf-8")
    except OSError as error:
        raise OSError(f"cannot write {path}: {error.strerror or error}; an earlier file is unchanged") from error


@contextlib.contextmanager
def atomic_file(place: Path) -> Iterator[Path]:
    """Yield the path of a temporary file; move it to `place` if the block succeeds, else delete it."""
    with temporary_sibling(place) as folder:
        yield folder / place.name
        fsync_path(folder / place.name)
        os.replace(folder / place.name, place)
        fsync_path(place.parent)


def check_room(place: Path, size: int) -> None:
    """Raise OSError unless at least `size` bytes are free on the disk of an output."""
    free = shutil.disk_usage(existing_parent(place)).free
    if free < size:
        raise OSError(
            f"cannot write {place}: it needs about {size:,} bytes, but {free:,} are free; make room, or choose another "
            "disk"
        )


@contextlib.contextmanager
def atomic_directory(path: Path, overwrite: bool = False) -> Iterator[Path]:
    """Yield a temporary directory; rename it to `path` if the block succeeds, else delete it.

    Parameters
    ----------
    path : Path
    overwrite : bool
        Replace a directory that exists when the block ends. Without it the first of two writers wins.

    Raises
    ------
    OSError
        If it cannot be written, or another directory exists; that one is unchanged.
    """
    path = resolve_output(path)
    with temporary_sibling(path) as part:
        try:
            part.chmod(0o755)
            yield part
            fsync_tree(part)
            rename_into_place(part, path, overwrite)
            fsync_path(path.parent)
        except SafetensorError as error:
            raise OSError(f"cannot write {path}: {error}; nothing was left there") from error
        except OSError as error:
            raise OSError(f"cannot write {path}: {error.strerror or error}; nothing was left there") from error


@contextlib.contextmanager
def temporary_sibling(path: Path) -> Iterator[Path]:
    """Yield a new, locked directory beside `path`, and delete it at the end.

    Directories that killed writers of the same path left behind are deleted first.

    Raises
    ------
    OSError
        If the folder of `path` cannot be written; the message says why.
    """
    path = path.absolute()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        name = path.name
        if len(os.fsencode(name)) > LONG_NAME:
            name = hashlib.sha256(os.fsencode(name)).hexdigest()
        for left in path.parent.glob(f".{glob.escape(name)}-????????{PART}"):
            remove_unlocked(left)
        part, lock = new_locked_directory(path.parent, f".{name}-")
    except OSError as error:
        raise OSError(f"cannot write {path}: {error.strerror}; choose a folder that can be written") from error
    try:
        yield part
    finally:
        shutil.rmtree(part, ignore_errors=True)
        unlock(lock)


def new_locked_directory(parent: Path, prefix: str) -> tuple[Path, int | None]:
    """Create a directory; return it and the descriptor that holds its lock."""
    while True:
        part = Path(tempfile.mkdtemp(dir=parent, prefix=prefix, suffix=PART))
        with contextlib.suppress(FileNotFoundError, BlockingIOError):  # another writer deleted it before it was locked
            lock = lock_directory(part)
            if part.exists():
                return part, lock
            unlock(lock)


def lock_directory(folder: Path) -> int | None:
    """Lock a directory; return the descriptor that holds the lock until it is closed or the process ends.

    Returns None where directories cannot be locked: on Windows and on some network file systems.

    Raises
    ------
    BlockingIOError
        If another process, or another descriptor of this one, holds the lock.
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
    """Release the lock that `lock_directory` returned."""
    if lock is not None:
        os.close(lock)


def remove_unlocked(folder: Path) -> None:
    """Delete a temporary directory whose writer is gone."""
    with contextlib.suppress(OSError):  # its writer is still at work, or has just finished
        lock = lock_directory(folder)
        if lock is not None:
            shutil.rmtree(folder, ignore_errors=True)
            os.close(lock)


def fsync_tree(folder: Path) -> None:
    """Flush every file and directory below a folder to the disk."""
    for directory, _, names in os.walk(folder):
        for name in names:
            fsync_path(Path(directory) / name)
        fsync_path(Path(directory))


def fsync_path(path: Path) -> None:
    """Flush a file, or the list of names in a directory, to the disk."""
    if fcntl is None and path.is_dir():
        return  # Windows cannot open directories
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def rename_into_place(part: Path, path: Path, overwrite: bool) -> None:
    """Rename `part` to `path`, and delete the directory that it replaces.

    Where the file system supports it, the two are exchanged in one step, so that `path` exists at every moment.
    Elsewhere the old directory is moved away first, and moved back if the rename fails. Without `overwrite` the rename
    fails if `path` exists and is not empty.
    """
    if not (overwrite and path.exists()):
        os.rename(part, path)
        return
    if exchange(part, path):
        return  # the old directory is now at `part`, which the caller deletes
    old = part.with_name(part.name + "-old")
    os.rename(path, old)
    try:
        os.rename(part, path)
    except OSError:
        os.rename(old, path)
        raise
    shutil.rmtree(old, ignore_errors=True)


def exchange(one: Path, other: Path) -> bool:
    """Exchange two directories in one step (Linux's renameat2); return False where that is not supported."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError):
        return False
    return renameat2(AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), RENAME_EXCHANGE) == 0
