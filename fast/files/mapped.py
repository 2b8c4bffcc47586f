"""Map the tensors of safetensors files into memory, and drop pages that were used.

A mapped tensor occupies memory only where it was read. `release_pages` gives that memory back, so a process can walk
through files that are larger than the memory of the machine.
"""

import mmap
import weakref
from pathlib import Path

#: The maps of this process that `release_pages` may empty.
MAPS: weakref.WeakSet[mmap.mmap] = weakref.WeakSet()


def map_file(path: Path) -> mmap.mmap:
    """Map a file into memory. Whoever holds the map must not write to it: `release_pages` undoes writes."""
    with path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)  # torch warns of memory that is read-only
    MAPS.add(mapped)
    return mapped


def release_pages() -> None:
    """Drop the pages of all mapped files from this process; the next access reads them again."""
    if hasattr(mmap, "MADV_DONTNEED"):  # not on Windows, which drops pages when memory runs short
        for mapped in MAPS:
            mapped.madvise(mmap.MADV_DONTNEED)
