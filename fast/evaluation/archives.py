"""Read untrusted .jsonl files from a folder or a zip archive."""

import zipfile
from collections.abc import Callable, Container, Iterator
from pathlib import Path, PurePosixPath
from typing import TypeVar

from .._checks import check_number

Row = TypeVar("Row")

LARGEST = 1 << 26  # bytes of text in an archive or folder; BLiMP holds 30 MB


def read_files(
    path: str | Path,
    items: int | None,
    read: Callable[[bytes, str, str], Row],
    what: str,
    wanted: Container[str] | None = None,
) -> dict[str, list[Row]]:
    """Read the first `items` lines of each file NAME.jsonl of a folder or archive, by name.

    Parameters
    ----------
    path : str or Path
    items : int, optional
        By default all.
    read : callable
        Maps a line, its file's NAME and its place, for errors, to what it holds.
    what : str
        What the lines hold, for errors.
    wanted : container of str, optional
        Names to read; others are ignored. By default all.

    Raises
    ------
    ValueError
        If the archive is corrupt, a name is there twice, a file is empty, `items` is not positive, or `read` raises it.
    """
    if items is not None:
        check_number("items", items, low=1, whole=True)
    found: dict[str, list[Row]] = {}
    for member, lines in read_members(path):
        name = PurePosixPath(member).stem
        if wanted is not None and name not in wanted:
            continue
        if name in found:
            raise ValueError(f"{path} holds two files {name}.jsonl; remove one of them")
        if not lines:
            raise ValueError(f"{path}: {member} holds no {what}; remove it, or fill it")
        found[name] = [read(line, name, f"{path}: {member}, line {number}") for number, line in lines[:items]]
    return found


def read_members(path: str | Path) -> Iterator[tuple[str, list[tuple[int, bytes]]]]:
    """Yield the path of each .jsonl file in an archive or folder, and its lines that are not blank, with their numbers.

    Hidden files, which macOS adds, are left out.

    Raises
    ------
    ValueError
        If `path` is neither a folder nor a zip archive that can be read, or holds more than LARGEST bytes.
    """
    left, place = LARGEST, Path(path)
    try:
        for name, data in files_in_folder(place) if place.is_dir() else files_in_archive(place):
            left -= len(data)
            if left < 0:
                raise zipfile.BadZipFile(f"its text is larger than {LARGEST:,} bytes")
            yield name, [(number, line) for number, line in enumerate(data.splitlines(), 1) if line.strip()]
    except Exception as error:  # zipfile, zlib and struct raise many types of error for corrupt archives.
        raise ValueError(
            f"{path} cannot be read as a folder or zip archive ({error}); copy or download it again"
        ) from error


def files_in_folder(folder: Path) -> Iterator[tuple[str, bytes]]:
    """Yield names and contents of the .jsonl files in a folder."""
    for file in sorted(folder.glob("*.jsonl")):
        if not file.name.startswith("."):
            with file.open("rb") as opened:
                yield file.name, opened.read(LARGEST + 1)


def files_in_archive(path: Path) -> Iterator[tuple[str, bytes]]:
    """Yield paths and contents of the .jsonl files in a zip archive."""
    with zipfile.ZipFile(path) as archive:
        for member in sorted(archive.infolist(), key=lambda member: member.filename):
            name = PurePosixPath(member.filename)
            if name.suffix != ".jsonl" or name.name.startswith("."):
                continue
            if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise zipfile.BadZipFile(f"{name} is compressed by method {member.compress_type}, not deflate")
            with archive.open(member) as file:
                yield member.filename, file.read(LARGEST + 1)  # The size in the header may be wrong.
