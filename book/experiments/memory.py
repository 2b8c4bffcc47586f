"""Compute Tables 3 and 4 of the paper from the models' shapes, and extend them to smaller embeddings and heads.

    python book/experiments/memory.py book/results/memory.json

Every row has what the paper published for it, if it did, beside what is counted here. `weights_like_paper_GB` adds what
the paper's float16 figure has beyond two bytes a parameter (13, 28 and 87 MB), which the paper does not explain.
"""

import argparse
import statistics
from pathlib import Path
from typing import Any

from littlebit.fast.bench.timing import save_results
from littlebit.reference.memory import LATENT_BYTES, MODEL_SHAPES, latent_widths, linear_shapes, model_memory

SOURCE = "LittleBit, arXiv 2506.13771"
# GB of weights by shape and bits (None: float16), Table 3
PUBLISHED_GB: dict[tuple[str, float | None], float] = {
    ("llama2-7b", None): 13.49,
    ("llama2-7b", 0.3): 0.79,
    ("llama2-7b", 0.1): 0.63,
    ("llama2-13b", None): 26.06,
    ("llama2-13b", 0.1): 0.84,
    ("llama2-70b", None): 138.04,
    ("llama2-70b", 0.1): 1.98,
}
PUBLISHED_REDUCTION = {("llama2-7b", 0.1): 21.3}  # of the cache, Table 4
BITS = (None, 1.0, 0.8, 0.55, 0.3, 0.1)
CONTEXT = 4096


def weights_row(name: str, bits: float | None, embedding_bits: int) -> dict[str, Any]:
    """Count one row of Table 3, or of its extension."""
    shape = MODEL_SHAPES[name]
    ours = model_memory(shape, bits, embedding_bits=embedding_bits)
    published = PUBLISHED_GB.get((name, bits)) if embedding_bits == 16 else None
    row: dict[str, Any] = {"table": "weights", "shape": name, "bits": bits or 16, "embedding_bits": embedding_bits}
    row |= {"published_GB": published, "published_source": f"{SOURCE}, Table 3" if published else None}
    row |= {f"{part}_GB": getattr(ours, part) / 1e9 for part in ("weights", "linear", "embeddings", "other")}
    row["bits_per_weight"] = 8 * ours.linear / sum(d_out * d_in for d_out, d_in in linear_shapes(shape).values())
    if ours.ranks:
        row["ranks_of_first_block"] = {key[2:]: list(each) for key, each in ours.ranks.items() if key.startswith("0.")}
    dense = PUBLISHED_GB.get((name, None))
    if published and dense:
        row["unpadded_weights_GB"] = model_memory(shape, bits, word_bits=1).weights / 1e9
        beyond = dense - model_memory(shape).weights / 1e9
        row["ratio_to_published"] = ours.weights / 1e9 / published
        row["weights_like_paper_GB"] = ours.weights / 1e9 + beyond
        row["like_paper_ratio_to_published"] = row["weights_like_paper_GB"] / published
    return row


def cache_row(name: str, bits: float, kind: str) -> dict[str, Any]:
    """Count one row of Table 4, or of its extension: bytes of a latent cache, and how much larger the full cache is."""
    shape = MODEL_SHAPES[name]
    full, latent = (model_memory(shape, bits, context=CONTEXT, kv_cache=each) for each in ("full", kind))
    published = PUBLISHED_REDUCTION.get((name, bits)) if kind == "latent" else None
    widths = latent_widths(latent.ranks)
    return {
        "table": "kv_cache",
        "shape": name,
        "bits": bits,
        "kind": kind,
        "context": CONTEXT,
        "published_reduction": published,
        "published_source": f"{SOURCE}, Table 4" if published else None,
        "mean_rank": statistics.mean(widths),
        "reduction_without_scales": full.kv_cache / (CONTEXT * sum(widths) * LATENT_BYTES[kind]),
        "reduction": full.kv_cache / latent.kv_cache,
        "bytes_per_token": latent.kv_cache // CONTEXT,
        "ordinary_bytes_per_token": full.kv_cache // CONTEXT,
        "ordinary_GB": full.kv_cache / 1e9,
        "latent_GB": latent.kv_cache / 1e9,
        "activations_GB": latent.activations / 1e9,
    }


def main() -> None:
    """Write all rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    rows = [
        weights_row(name, bits, embedding_bits)
        for name in MODEL_SHAPES
        for bits in BITS
        for embedding_bits in (16, 8, 4)
    ]
    rows += [
        cache_row(name, bits, kind)
        for name in MODEL_SHAPES
        for bits in BITS
        if bits is not None
        for kind in LATENT_BYTES
    ]
    save_results(
        arguments.out, rows, "python book/experiments/memory.py book/results/memory.json", "none: arithmetic alone"
    )


if __name__ == "__main__":
    main()
