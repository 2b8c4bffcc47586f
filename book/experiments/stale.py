"""List the results that are older than the code that they measure.

    python book/experiments/stale.py [cuda_decode ...]

A results file records under `code` a digest of each module of littlebit.fast that was loaded during the measurement.
Comments, docstrings and layout do not enter the digest, and a file that was only renamed keeps it. Being in this list
is no failure: measuring again takes the machine that the file names. `make results` ends with this list, and the book
repeats it below each table.
"""

import json
import sys
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path

from littlebit.fast.files.digests import code_digest

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "book" / "results"

CPU = ("kernels.cpu", "kernels.cpu_simd", "kernels.cpu_layer", "kernels.cpu_threads")
CPU_DECODE = (
    *CPU,
    *("kernels.cpu_dense", "kernels.cpu_decode"),
    *("decoding.cpu_decoder", "decoding.sampling", "decoding.torch_weights"),
)
CUDA_PARTS = "plain gemv gemm unpack elements intrinsics mma layer launch schedule driver"
CUDA = tuple(f"kernels.cuda_{part}" for part in CUDA_PARTS.split())
CUDA_DECODE = (
    *CUDA,
    "kernels.cuda_decode",
    *("decoding.ops", "decoding.cuda_ops", "decoding.torch_ops"),
    *("decoding.graph_decoder", "decoding.fused_llama"),
)
INITIALIZERS = ("admm", "alignment", "dual_svid", "residual", "svd")
#: Patterns of the modules that each results file measures. A file that is not listed measures no code of the package.
MEASURES = {
    "cpu_agreement": CPU_DECODE,
    "cpu_cache_llama2": ("kv_cache", "decoding.latent_cache"),
    "cpu_cache_llama3": ("kv_cache", "decoding.latent_cache"),
    "cpu_decode": CPU_DECODE,
    "cpu_decode_shape": CPU_DECODE,
    "cpu_ladder": CPU,
    "cpu_linear": CPU,
    "cpu_linear_threads": CPU,
    "cuda_batches": CUDA,
    "cuda_cache": (*CUDA_DECODE, "kernels.cuda_latent_attention", "decoding.fused_llama_latent"),
    "cuda_decode": CUDA_DECODE,
    "cuda_decode_70b": CUDA_DECODE,
    "cuda_decode_smollm2": CUDA_DECODE,
    "cuda_linear": CUDA,
    "cuda_linear_two_paths": CUDA,
    "embeddings_smollm2": ("models.embeddings",),
    "initialisation_smollm2": INITIALIZERS,
    "quantize_large_cpu": INITIALIZERS,
    "quantize_large_gpu": INITIALIZERS,
    "serving": (*CPU_DECODE, "decoding.batching", "serving.app", "serving.generation", "serving.responses"),
    "training_large": ("training.student", "training.trainer"),
    "untrained_smollm2": INITIALIZERS,
}
#: Names that modules had when the older results were recorded -> where that code is now.
MOVED = {
    "decode_cpu": "decoding.cpu_decoder",
    "decode_cuda": "decoding.graph_decoder",
    "decode_loaded": "decoding.torch_weights",
    "embeddings": "models.embeddings",
    "fused_engine": "decoding.fused_llama",
    "latent_cache": "decoding.latent_cache",
    "latent_engine": "decoding.fused_llama_latent",
    "kernels.cuda": "kernels.cuda_gemv",
    "kernels.cuda_batch": "kernels.cuda_gemm",
    "kernels.cuda_lanes": "kernels.cuda_intrinsics",
    "kernels.cuda_latent": "kernels.cuda_latent_attention",
    "kernels.cuda_launch": "kernels.cuda_layer",
    "kernels.cuda_tiles": "kernels.cuda_mma",
    "kernels.cuda_unpacked": "kernels.cuda_unpack",
    "kernels.lanes": "kernels.cpu_simd",
    "kernels.plan": "kernels.cpu_layer",
    "kernels.steps": "decoding.ops",
}


@cache
def digests_now() -> frozenset[str]:
    """Compute the digests of all modules of littlebit.fast as they are."""
    return frozenset(code_digest(path.read_text()) for path in (ROOT / "fast").rglob("*.py"))


def measured_code(name: str) -> dict[str, str]:
    """Read the digests of the modules that a results file measures, by the modules' present names."""
    code = json.loads((RESULTS / f"{name}.json").read_text()).get("code", {})
    # A recent file has both names: the old name of cuda_layer is now the name of another module, cuda_launch.
    code = {
        module if MOVED.get(module) in code else MOVED.get(module, module): digest for module, digest in code.items()
    }
    patterns = MEASURES.get(name, ())
    return {module: digest for module, digest in code.items() if any(fnmatchcase(module, each) for each in patterns)}


def changed(name: str) -> list[str]:
    """Name the modules that a results file measures and that changed since."""
    return sorted(module for module, digest in measured_code(name).items() if digest not in digests_now())


def report(names: list[str]) -> str:
    """List stale results files, one a line."""
    lines = [f"{name} is older than changes in {', '.join(found)}" for name in names if (found := changed(name))]
    return "\n".join(lines or ["no results are older than the code that they measure"])


if __name__ == "__main__":
    print(report(sys.argv[1:] or sorted(path.stem for path in RESULTS.glob("*.json"))))
