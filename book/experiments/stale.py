"""List the results that are older than the code that they measure.

    python book/experiments/stale.py [cuda_decode ...]

A results file records under `code` a digest of each module of littlebit.fast that was loaded when it was measured.
Comments, docstrings and layout do not count, and a module that was only renamed still has its digest. A list, not a
failure: measuring again takes the machine that the file names. `make results` ends with this list, and the book says
the same below each table.
"""

import json
import sys
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path

from littlebit.fast.files.digests import code_digest

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "book" / "results"

CPU = ("kernels.cpu", "kernels.lanes", "kernels.plan")
CUDA = ("kernels.cuda", *(f"kernels.cuda_{part}" for part in ("batch", "lanes", "launch", "tiles", "unpacked")))
CUDA_DECODE = (*CUDA, "kernels.cuda_decode", "kernels.steps", "decode_cuda", "fused_engine")
STARTS = ("admm", "alignment", "dual_svid", "residual", "svd")
#: Patterns of the modules that each file of results measures; files that are not here measure no code of these.
MEASURES = {
    "cpu_agreement": (*CPU, "kernels.cpu_decode", "decode_cpu", "decode_loaded"),
    "cpu_cache_llama2": ("kv_cache", "latent_cache"),
    "cpu_cache_llama3": ("kv_cache", "latent_cache"),
    "cpu_decode": (*CPU, "kernels.cpu_decode", "decode_cpu", "decode_loaded"),
    "cpu_ladder": CPU,
    "cpu_linear": CPU,
    "cpu_linear_threads": CPU,
    "cuda_batches": CUDA,
    "cuda_cache": (*CUDA_DECODE, "kernels.cuda_latent", "latent_engine"),
    "cuda_decode": CUDA_DECODE,
    "cuda_decode_70b": CUDA_DECODE,
    "cuda_decode_smollm2": CUDA_DECODE,
    "cuda_linear": CUDA,
    "cuda_linear_two_paths": CUDA,
    "embeddings_smollm2": ("embeddings",),
    "initialisation_smollm2": STARTS,
    "untrained_smollm2": STARTS,
}


@cache
def digests_now() -> frozenset[str]:
    """Compute the digests of all modules of littlebit.fast as they are."""
    return frozenset(code_digest(path.read_text()) for path in (ROOT / "fast").rglob("*.py"))


def changed(name: str) -> list[str]:
    """Name the modules that a file of results measures and that changed since."""
    code = json.loads((RESULTS / f"{name}.json").read_text()).get("code", {})
    old = [module for module, digest in code.items() if digest not in digests_now()]
    return sorted(module for module in old if any(fnmatchcase(module, pattern) for pattern in MEASURES.get(name, ())))


def report(names: list[str]) -> str:
    """List stale files of results, a line each."""
    lines = [f"{name} is older than changes in {', '.join(found)}" for name in names if (found := changed(name))]
    return "\n".join(lines or ["no results are older than the code that they measure"])


if __name__ == "__main__":
    print(report(sys.argv[1:] or sorted(path.stem for path in RESULTS.glob("*.json"))))
