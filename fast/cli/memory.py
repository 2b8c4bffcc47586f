"""Calculate the memory that a model of a published shape needs: the `memory` command."""

import argparse
import json
from typing import Any

from ..memory import KV_CACHES, MODEL_SHAPES, model_memory
from .arguments import Command, add_json, count, kv_cache, positive
from .tables import text_table


def add_arguments(sub: argparse.ArgumentParser) -> None:
    """Add the arguments of `littlebit memory`."""
    sub.add_argument(
        "shape", nargs="*", default=list(MODEL_SHAPES), help=f"some of {', '.join(MODEL_SHAPES)} (default: all)"
    )
    sub.add_argument(
        "--bits",
        type=positive,
        nargs="*",
        default=[0.55, 0.3, 0.1],
        help="bits per weight to compare with float16",
    )
    sub.add_argument("--paths", type=count, default=2, help="low-rank paths in each quantized layer")
    sub.add_argument(
        "--embedding-bits",
        type=int,
        nargs="+",
        choices=[16, 8, 4],
        default=[16, 8, 4],
        help="bits per entry of the embedding and the output head",
    )
    sub.add_argument("--context", type=count, default=4096, help="tokens in the key-value cache")
    sub.add_argument(
        "--kv-cache", type=kv_cache, choices=KV_CACHES, default="latent", help="cache type of the quantized models"
    )
    add_json(sub)


def run(arguments: argparse.Namespace) -> None:
    """Print the bytes of weights, key-value cache and activations, in float16 and at each number of bits."""
    rows = [
        memory_row(name, bits, embedding_bits, arguments)
        for name in arguments.shape
        for bits in (None, *arguments.bits)
        for embedding_bits in arguments.embedding_bits
    ]
    if arguments.json:
        print(json.dumps(rows))
        return
    parts = ("linear", "embeddings", "other", "weights", "kv_cache", "activations", "total")
    print(f"GB (10^9 bytes), {arguments.context} tokens in the cache")
    print(
        text_table(
            [
                {"shape": row["shape"], "bits": f"{row['bits'] or 16:g}", "embedding": row["embedding_bits"]}
                | {"cache": row["kv_kind"]}
                | {part: f"{row[part] / 1e9:.4f}" for part in parts}
                for row in rows
            ]
        )
    )


def memory_row(name: str, bits: float | None, embedding_bits: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Count the bytes of one model; `bits` None means a dense float16 model with a full cache."""
    if name not in MODEL_SHAPES:
        raise ValueError(f"the shape must be one of {', '.join(MODEL_SHAPES)}, got {name!r}")
    cache_type = "full" if bits is None else arguments.kv_cache
    found = model_memory(MODEL_SHAPES[name], bits, arguments.paths, embedding_bits, arguments.context, cache_type)
    row = {"shape": name, "bits": bits, "embedding_bits": embedding_bits, "context": arguments.context}
    row |= {"kv_kind": cache_type} | {key: value for key, value in found._asdict().items() if key != "ranks"}
    return row | {"weights": found.weights, "total": found.total}


COMMANDS = {
    "memory": Command(
        run,
        add_arguments,
        "Calculate the memory that a model of a published shape needs: weights, key-value cache, activations.",
        ("memory llama2-7b --bits 0.3 0.1 --context 4096",),
    )
}
