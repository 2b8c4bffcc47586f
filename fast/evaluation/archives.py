"""Read untrusted .jsonl files from a folder or a zip archive."""

import zipfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

LARGEST = 1 << 26  # bytes of text in an archive or folder; BLiMP holds 30 MB


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
