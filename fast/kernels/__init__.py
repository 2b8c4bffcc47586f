"""Multiply by packed signs: the kernels of the packed layer, a CPU ladder and a CUDA ladder.

Open first: cpu.py. It computes one layer in four ways, from a loop that a reader of the paper knows at sight to lookup
tables in SIMD registers. Each header says what its file adds to the one before, how many bytes it reads, what limits it
(arithmetic or memory bandwidth: a roofline), and how fast it was measured.

CPU ladder, each file on top of the ones before:

1. cpu.py: four GEMV kernels for one thread, in SIMD vectors that cpu_simd.py adds to Numba (AVX-512, AVX2, NEON)
2. cpu_dense.py: attention, the embedding and the head, which have no packed signs
3. cpu_threads.py: divide these kernels among threads that spin, then sleep, without a barrier
4. cpu_decode.py: a whole decoding step in one compiled call
5. cpu_layer.py: the layer of torch tensors; batches that are large enough go to a dense GEMM

CUDA ladder:

1. cuda_plain.py: the simple kernels, one warp for each row
2. cuda_gemv.py: the GEMV for one to four vectors, with instructions that cuda_intrinsics.py adds to Numba CUDA
3. cuda_gemm.py: the GEMM for batches, on tensor cores (fragments and tiles in cuda_mma.py)
4. cuda_unpack.py: unpack to 16-bit matrices, for batches so large that cuBLAS is faster
5. cuda_decode.py and cuda_latent_attention.py: what else a decoded token needs
6. cuda_layer.py: the layer of torch tensors; cuda_schedule.py chooses launch configurations, cuda_driver.py compiles
   and launches

dispatch.py chooses a kernel for a tensor, unpacked.py multiplies without any, and torch_op.py makes an operator of it
for torch.compile.

cpu.py, cpu_simd.py, cpu_dense.py, cpu_threads.py and cpu_decode.py need Numba alone; the other files need torch.
"""

import contextlib
import hashlib
import shutil
from pathlib import Path

import numba

from ..files.cache import cache_path

CODE_BYTES = 1 << 25  # upper bound on the size of all compiled kernels


def probe() -> None:
    """Do nothing: a function to ask Numba for its cache folder."""


def place_compiled_code() -> None:
    """Choose a folder for compiled kernels if none of Numba's own choices can be written or has room.

    Numba tries NUMBA_CACHE_DIR, then the folder of the sources, then the user's cache folder. On a read-only system all
    of them can fail, and kernels could not run.

    Raises
    ------
    OSError
        If no folder can be written, or none has CODE_BYTES free.
    """
    try:
        folder = numba.njit(cache=True)(probe).stats.cache_path or ""
        if shutil.disk_usage(folder).free >= CODE_BYTES:
            return
    except RuntimeError:  # Numba found no folder
        pass
    try:
        numba.config.CACHE_DIR = str(cache_path("kernels", room=CODE_BYTES))  # type: ignore[attr-defined]
    except OSError as error:
        raise OSError(f"{error}, with {CODE_BYTES >> 20} MiB free for compiled kernels") from error


place_compiled_code()

from . import cpu  # noqa: E402 - its decorators need the folder


def drop_stale_code() -> None:
    """Delete compiled kernels from Numba's cache if any source file of this folder has changed.

    Numba compiles a function again if its own file has changed. It does not check the files of the functions that it
    calls, whose code is inlined. So the digest of all sources is kept in the cache.
    """
    sources = sorted(Path(__file__).parent.glob("*.py"))
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()
    folder = Path(cpu.layer_rows.stats.cache_path or sources[0].parent)
    record = folder / "littlebit-kernels.sha256"
    with contextlib.suppress(OSError):  # a folder that cannot be written holds no code of ours
        if record.exists() and record.read_text(encoding="utf-8") == digest:
            return
        folder.mkdir(parents=True, exist_ok=True)
        for path in folder.glob("*.nb[ci]"):
            path.unlink(missing_ok=True)
        record.write_text(digest, encoding="utf-8")


drop_stale_code()
