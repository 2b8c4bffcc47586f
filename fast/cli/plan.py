"""Plan the quantization and the training of a model from its shape: the `plan` command."""

import argparse
from typing import Any

from ..bits import SCALE_BITS, allocate_ranks
from ..checkpoints.dense_files import dense_json, locate_dense
from ..memory import MODEL_SHAPES, ModelShape, linear_shapes, model_memory
from ..models.published import config_shape, is_published
from .arguments import Command, add_json, count, not_negative, not_negative_int, positive
from .dry_run import print_costs
from .quantization_cost import INITS, costs, trained_sizes
from .training_cost import GPU_TFLOPS, HALF_BYTES, Workload


def add_arguments(sub: argparse.ArgumentParser) -> None:
    """Add the arguments of `littlebit plan`."""
    sub.add_argument(
        "model", help=f"a shape ({', '.join(MODEL_SHAPES)}), a directory, a config.json, a .gguf file or a hub id"
    )
    group = sub.add_argument_group("quantization", "`quantize --dry-run` knows more options, and takes longer.")
    group.add_argument(
        "--bits", type=positive, default=0.55, help="most stored bits per weight of the quantized layers"
    )
    group.add_argument("--paths", choices=["auto", "1", "2"], default="1", help="low-rank paths in each layer")
    group.add_argument("--init", choices=list(INITS), default="admm", help="initializer of the factors")
    group.add_argument("--scale-bits", type=int, choices=(16, 8), default=SCALE_BITS, help="bits of a scale")
    group = sub.add_argument_group("training")
    group.add_argument("--tokens", type=not_negative_int, default=0, help="tokens to train on; 0 plans no training")
    group.add_argument("--gpus", type=not_negative_int, default=1, help="GPUs to train on; 0 is the CPU")
    group.add_argument("--sequence", type=count, default=2048, help="tokens in a sequence")
    group.add_argument("--sequences", type=count, default=1, help="sequences that a GPU computes at once")
    group.add_argument(
        "--tflops", type=positive, default=GPU_TFLOPS, help="10^12 operations per second that a GPU reaches in bfloat16"
    )
    group.add_argument("--price", type=not_negative, help="price of a GPU for an hour, in any currency")
    add_json(sub)


def run(arguments: argparse.Namespace) -> None:
    """Print what quantizing and training a model store and take."""
    work = Workload(arguments.tokens, arguments.gpus, arguments.sequence, arguments.sequences, arguments.tflops)
    paths = None if arguments.paths == "auto" else int(arguments.paths)
    shape = find_shape(arguments.model)
    if shape is not None:
        found = shape_costs(shape, arguments.bits, paths, arguments.init, arguments.scale_bits, work)
    else:
        from ..models.config import Config
        from .estimate import estimate

        config = Config(bits=arguments.bits, paths=paths, init=arguments.init, scale_bits=arguments.scale_bits)
        found = estimate(arguments.model, config, work)
    print_costs(found, work, arguments.json, arguments.price)


def find_shape(source: str) -> ModelShape | None:
    """Find the shape of a published or dense model without importing torch; None if transformers must build the model.

    Raises
    ------
    CheckpointError
        If there is no such model, or it is quantized already.
    """
    if is_published(source):
        return MODEL_SHAPES[source]
    found = locate_dense(source)
    return config_shape(dense_json(found / "config.json")) if found.is_dir() else None  # None: a GGUF file


def shape_costs(
    shape: ModelShape, bits: float, paths: int | None, init: str, scale_bits: int, work: Workload
) -> dict[str, Any]:
    """Estimate bits, memory, time of quantizing all layers of a shape, and of training; see `estimate.estimate`."""
    shapes = linear_shapes(shape)
    ranks = allocate_ranks(shapes, bits, paths, scale_bits=scale_bits)
    dense = model_memory(shape)  # 16 bits each
    tables = (dense.embeddings + dense.other) // HALF_BYTES
    sizes = trained_sizes(shapes, ranks, tables, shape.layers, shape.hidden, shape.vocabulary)
    return costs(shapes, ranks, sizes, work, init, scale_bits) | {"dense": {}, "dense_share": 0.0}


COMMANDS = {
    "plan": Command(
        run,
        add_arguments,
        "Plan a quantization and a training from a model's shape: stored bits, memory, time and cost.",
        (
            "plan llama2-7b --bits 0.55 --tokens 200000000 --gpus 2 --price 2.5",
            "plan path/to/config.json --bits 0.1 --json",
        ),
    )
}
