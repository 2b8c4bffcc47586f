"""Kernels that compute with packed signs; dispatch.py chooses among them.

cpu.py, cpu_decode.py and lanes.py need Numba alone, the others torch.
"""

import contextlib
import hashlib
from pathlib import Path

from . import cpu


def drop_stale_code() -> None:
    """Delete compiled kernels that were made from other sources.

    Numba looks at the file of a function to see whether its cached code is good, but not at those of the functions
    that it calls, which that code contains.
    """
    sources = sorted(Path(__file__).parent.glob("*.py"))
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()
    place = Path(cpu.layer.stats.cache_path or sources[0].parent)
    note = place / "littlebit-kernels.sha256"
    with contextlib.suppress(OSError):  # a cache that cannot be written cannot be stale for long
        if note.exists() and note.read_text(encoding="utf-8") == digest:
            return
        place.mkdir(parents=True, exist_ok=True)
        for path in place.glob("*.nb[ci]"):
            path.unlink(missing_ok=True)
        note.write_text(digest, encoding="utf-8")


drop_stale_code()
