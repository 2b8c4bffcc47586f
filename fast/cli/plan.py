"""Plan the quantization and the training of a model from its shape: the `plan` command."""

import argparse

from ..memory import MODEL_SHAPES
from .arguments import Command, add_json, count, not_negative, not_negative_int, positive
from .dry_run import print_estimate
from .quantize import add_quantization, quantization_config
from .training_cost import GPU_TFLOPS, Workload


def add_arguments(sub: argparse.ArgumentParser) -> None:
    """Add the arguments of `littlebit plan`."""
    sub.add_argument(
        "model", help=f"a shape ({', '.join(MODEL_SHAPES)}), a directory, a config.json, a .gguf file or a hub id"
    )
    add_quantization(sub)
    sub.set_defaults(init="admm", paths="1")
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
    print_estimate(arguments.model, quantization_config(arguments), None, arguments.json, work, arguments.price)


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
