r"""Measure training steps at a published shape: peak memory, tokens per second, and model FLOPs utilization (MFU).

    torchrun --standalone --nproc-per-node 2 book/experiments/training_large.py OUT.json \
        --shape llama2-7b --bits 0.55 --sequence 2048 --steps 20

Masters and teacher are sharded over the processes (FSDP2), and blocks are recomputed in the backward pass. One process
is enough, for one GPU. The teacher's weights, the student's factors and the text are random, so that nothing has to be
loaded: time and memory do not depend on them.

With --state DIR the training's state is saved there, and the same command goes on from it; --die-at-step 10 kills this
process with SIGKILL once the state of step 10 is saved. Losses are then to be compared with a run without it.
"""

import argparse
import os
import signal
import statistics
import sys
from pathlib import Path
from typing import Any

import littlebit.fast as lb
import torch
from littlebit.fast.bench.timing import device_name, save_results
from littlebit.fast.cli.estimate import model_sizes
from littlebit.fast.cli.training_cost import Workload, device_bytes, multiplications_per_token
from littlebit.fast.factors import Factors
from littlebit.fast.models.build import empty_model
from littlebit.fast.models.layers import LittleBitLinear
from littlebit.fast.models.published import published_config
from littlebit.fast.models.quantize import replace_modules, target_layers
from littlebit.fast.models.shared import assign
from littlebit.fast.training.processes import joined_processes, rank_and_world_size
from littlebit.fast.training.resume import Checkpointer

PEAK_TFLOPS = 989.0  # of one H100 SXM in bfloat16, dense, by its data sheet
SCALE = 0.02  # standard deviation of the weights
WARM_STEPS = 2  # left out of the speed


class DyingCheckpointer(Checkpointer):
    """Kill this process with SIGKILL once the state of a step is saved."""

    die_at = 0

    def save(self, step: int, tensors: dict[str, torch.Tensor]) -> None:
        """Save a state."""
        super().save(step, tensors)
        if step == self.die_at:
            os.kill(os.getpid(), signal.SIGKILL)


def random_teacher(config: dict[str, Any], device: str, dtype: torch.dtype) -> Any:
    """Make a dense model of random weights on the device."""
    model: Any = empty_model(config)
    for name, parameter in list(model.named_parameters()):
        values = torch.empty(parameter.shape, dtype=dtype, device=device)
        values = values.fill_(1.0) if values.ndim == 1 else values.normal_(0, SCALE)
        assign(model, name, torch.nn.Parameter(values))
    model.tie_weights()
    return model.to(device)


def random_student(config: dict[str, Any], teacher: Any, bits: float, device: str) -> tuple[Any, Any]:
    """Make a student of random factors whose other parameters are the teacher's, and count its sizes."""
    model: Any = empty_model(config)
    shapes = {name: (layer.out_features, layer.in_features) for name, layer in target_layers(model, lb.Config())}
    ranks = lb.allocate_ranks(shapes, bits, paths=1)
    sizes = model_sizes(model, shapes, ranks)
    layers: dict[str, torch.nn.Module] = {}
    for name, (d_out, d_in) in shapes.items():
        (rank,) = ranks[name]
        u, v = torch.randn(d_out, rank, device=device), torch.randn(d_in, rank, device=device)
        h = torch.full((d_out,), SCALE / rank**0.5, device=device)
        layers[name] = LittleBitLinear(
            [Factors(u, v, h, torch.ones(rank, device=device), torch.ones(d_in, device=device))]
        )
    replace_modules(model, layers)
    for name, parameter in list(model.named_parameters()):
        if parameter.is_meta:
            assign(model, name, torch.nn.Parameter(teacher.get_parameter(name).detach().float()))
    model.tie_weights()
    return model.to(device), sizes


def measure(arguments: argparse.Namespace, device: str) -> None:
    """Train, and save and print what was measured."""
    torch.manual_seed(0)
    rank, world = rank_and_world_size()
    config = published_config(arguments.shape, arguments.blocks)
    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    teacher = random_teacher(config, device, dtype)
    student, sizes = random_student(config, teacher, arguments.bits, device)
    batch = world * arguments.sequences
    training = lb.TrainConfig(
        total_tokens=arguments.steps * batch * arguments.sequence,
        sequence_length=arguments.sequence,
        batch_size=batch,
        hidden_loss_weight=arguments.hidden,
    )
    checkpointer = None
    if arguments.state:
        checkpointer = DyingCheckpointer(arguments.state, arguments.save_minutes)
        checkpointer.die_at = arguments.die_at_step if rank == 0 else 0
    text = torch.randint(0, config["vocab_size"], (training.total_tokens + arguments.sequence,))
    log = lb.train_(
        student,
        teacher,
        text,
        training,
        checkpointer=checkpointer,
        shard=True,
        recompute=True,
        log_steps=1,
        progress=rank == 0,
    )
    if rank:
        return
    speed = statistics.median(entry["tokens_per_s"] for entry in log[WARM_STEPS:] or log)
    work = Workload(training.total_tokens, world, arguments.sequence, arguments.sequences)
    useful = 2 * multiplications_per_token(sizes, work._replace(gpus=0))  # without recomputing
    row = {
        "shape": arguments.shape,
        "blocks": config["num_hidden_layers"],
        "bits": arguments.bits,
        "gpus": world,
        "sequence": arguments.sequence,
        "sequences": arguments.sequences,
        "steps": arguments.steps,
        "tokens_per_s": speed,
        "tflops_per_gpu": useful * speed / world / 1e12,
        "mfu": useful * speed / world / (1e12 * PEAK_TFLOPS),
        "peak_bytes": max(entry["memory_bytes"] for entry in log),
        "planned_bytes": sum(device_bytes(sizes, work).values()),
        "losses": [entry["loss"] for entry in log],
    }
    print(row)
    save_results(arguments.out, [row], " ".join(["torchrun", *sys.argv]), device_name(device))


def main() -> None:
    """Read the arguments and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--shape", default="llama2-7b")
    parser.add_argument("--blocks", type=int, help="decoder blocks (default: all of the shape's)")
    parser.add_argument("--bits", type=float, default=0.55)
    parser.add_argument("--sequence", type=int, default=2048)
    parser.add_argument("--sequences", type=int, default=1, help="sequences on each GPU")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--hidden", type=float, default=lb.TrainConfig.hidden_loss_weight)
    parser.add_argument("--state", type=Path, help="folder for saved states")
    parser.add_argument("--save-minutes", type=float, default=0.0)
    parser.add_argument("--die-at-step", type=int, default=0)
    parser.add_argument("--device", default=None)
    arguments = parser.parse_args()
    with joined_processes(arguments.device) as device:
        measure(arguments, device)


if __name__ == "__main__":
    main()
