"""Kernels that compute with packed signs; dispatch.py chooses among them.

cpu.py, cpu_dense.py, cpu_threads.py, cpu_decode.py and lanes.py need Numba alone, the others torch.
"""

import contextlib
import hashlib
import shutil
from pathlib import Path

import numba

from ..files.cache import cache_path

CODE_BYTES = 1 << 25  # of compiled kernels, at most


def probe() -> None:
    """Show where Numba would keep this function."""


def place_compiled_code() -> None:
    """Choose a folder for compiled kernels where Numba finds none with room, so that a read-only system runs them.

    Numba looks at NUMBA_CACHE_DIR, then beside the sources, then in the user's cache folder.

    Raises
    ------
    OSError
        If no folder can be written.
    """
    try:
        place = numba.njit(cache=True)(probe).stats.cache_path or ""
        if shutil.disk_usage(place).free >= CODE_BYTES:
            return
    except RuntimeError:  # none
        pass
    try:
        numba.config.CACHE_DIR = str(cache_path("kernels", room=CODE_BYTES))  # type: ignore[attr-defined]
    except OSError as error:
        raise OSError(f"{error}, with {CODE_BYTES >> 20} MiB free for compiled kernels") from error


place_compiled_code()

from . import cpu  # noqa: E402 - decorating its functions asks for the folder


def drop_stale_code() -> None:
    """Delete compiled kernels that were made from other sources.

    Numba looks at the file of a function to see whether its cached code is good, but not at those of the functions
    that it calls, which that code contains.
    """
    sources = sorted(Path(__file__).parent.glob("*.py"))
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()
    place = Path(cpu.layer_rows.stats.cache_path or sources[0].parent)
    note = place / "littlebit-kernels.sha256"
    with contextlib.suppress(OSError):  # a cache that cannot be written cannot be stale for long
        if note.exists() and note.read_text(encoding="utf-8") == digest:
            return
        place.mkdir(parents=True, exist_ok=True)
        for path in place.glob("*.nb[ci]"):
            path.unlink(missing_ok=True)
        note.write_text(digest, encoding="utf-8")


drop_stale_code()
