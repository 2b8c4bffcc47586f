"""Find the fastest launch configurations of the CUDA kernels on this GPU: the `tune` command."""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..memory import MODEL_SHAPES
from .arguments import Command, add_json, count, positive
from .models import load_any
from .tables import text_table


def add_arguments(sub: argparse.ArgumentParser) -> None:
    """Add the arguments of `littlebit tune`."""
    sub.add_argument("--model", type=Path, help="packed checkpoint to tune for (default: a random model)")
    sub.add_argument(
        "--model-shape", choices=list(MODEL_SHAPES), default="llama2-7b", help="published shape of the random model"
    )
    sub.add_argument(
        "--bits",
        type=positive,
        nargs="+",
        default=[0.55],
        help="bits per weight of the random model, one or several",
    )
    sub.add_argument("--paths", type=count, default=1, help="low-rank paths in each layer of the random model")
    sub.add_argument("--batch", type=count, default=1, help="sequences to decode together")
    sub.add_argument(
        "--table",
        type=Path,
        help="JSON file to add the results to (default: the one in the cache folder, which the kernels read)",
    )
    add_json(sub)


def run(arguments: argparse.Namespace) -> None:
    """Time launch configurations of a model's packed layers, and keep the fastest of each."""
    import torch

    from ..kernels import dispatch

    if not torch.cuda.is_available() or dispatch.cuda_kernels(0) is None:
        raise ValueError("tuning needs an NVIDIA GPU that the kernels support; on a CPU there is nothing to tune")
    from ..bench.tune import keep, tune
    from ..decoding.engines import engine_of
    from ..decoding.graph_decoder import SMALLEST_CAPACITY
    from ..files.atomic import check_file
    from ..kernels.cuda_schedule import own_schedules

    path = arguments.table or own_schedules()
    check_file(path)
    name, rows, device = torch.cuda.get_device_name(), [], torch.device("cuda", 0)
    for model in models_to_tune(arguments):
        with torch.inference_mode():
            found = tune(engine_of(model, arguments.batch, SMALLEST_CAPACITY, device, torch.float16))
        path = keep(found, name, arguments.table)
        rows += found
        del model  # Free its memory before the next one is made.
    if arguments.json:
        print(json.dumps([row | {"device": name, "table": str(path)} for row in rows]))
        return
    table = [
        {"part": row["part"], "before us": f"{row['before_us']:.2f}", "after us": f"{row['after_us']:.2f}"}
        | {"layers": row["sizes"]}
        for row in rows
    ]
    print(text_table(table))
    print(f"saved in {path}")


def models_to_tune(arguments: argparse.Namespace) -> Iterator[Any]:
    """Yield the checkpoint, or a random model for each number of bits, on the GPU."""
    import torch

    from ..bench.decode_cuda import llama_shape, random_model
    from ..decoding.fused_llama import parts_of

    if arguments.model:
        yield parts_of(load_any(arguments.model, "cuda", torch.float16), torch.float16)
        return
    for bits in arguments.bits:
        yield random_model(llama_shape(arguments.model_shape), bits, arguments.paths)


COMMANDS = {
    "tune": Command(
        run,
        add_arguments,
        "Find the fastest launch configurations of a model's packed layers on this GPU, and keep them.",
        ("tune --model out", "tune --model-shape llama2-7b --bits 0.1 0.55 1"),
    )
}
