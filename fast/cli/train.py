"""Quantize a model and train it against its full-precision outputs: the `train` command."""

import argparse
import json
import os
import shutil
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING

from .arguments import Command, add_dry_run, count, fraction, model_help, not_negative, not_negative_int, number
from .dry_run import print_dry_run
from .exits import STOPPED, report_error
from .models import check_apart
from .quantize import add_quantization, calibration_tokens, quantization_config
from .tables import checkpoint_summary

if TYPE_CHECKING:
    from ..training.config import TrainConfig


def add_arguments(sub: argparse.ArgumentParser) -> None:
    """Add the arguments of `littlebit train`."""
    from ..evaluation.perplexity import TRAINING_TEXT

    sub.add_argument("model", help=model_help())
    sub.add_argument("out", type=Path, help="directory to write the checkpoint to; OUT.training keeps the saved states")
    sub.add_argument(
        "--data",
        type=Path,
        nargs="+",
        default=[TRAINING_TEXT],
        help="UTF-8 texts (.xz allowed) or token arrays (.npy) to train on (default: an included text)",
    )
    sub.add_argument(
        "--weights",
        type=not_negative,
        nargs="+",
        help="relative frequency of each text in the batches (default: its length)",
    )
    add_quantization(sub)
    sub.set_defaults(init="admm", paths="1")
    add_schedule(sub)
    add_optimization(sub)
    sub.add_argument("--device", help="cpu or cuda (default: cuda if there is a GPU)")
    sub.add_argument("--threads", type=count, help="CPU threads to use (default: torch's choice)")
    sub.add_argument("--no-compile", action="store_true", help="run eagerly on a GPU, without torch.compile")
    sub.add_argument(
        "--shard", action="store_true", help="shard the trained weights and the teacher over the processes (FSDP2)"
    )
    sub.add_argument(
        "--recompute",
        action="store_true",
        help="with --shard: keep only the blocks' inputs and compute each block again in the backward pass",
    )
    sub.add_argument("--save-minutes", type=not_negative, default=5.0, help="minutes between saved states")
    sub.add_argument("--log-steps", type=count, default=20, help="steps between entries of the log")
    add_dry_run(sub)


def add_schedule(sub: argparse.ArgumentParser) -> None:
    """Add the options of a `TrainConfig` that say how many tokens are trained, and in which phases."""
    from ..training.config import TrainConfig

    group = sub.add_argument_group("schedule")
    group.add_argument(
        "--tokens", type=count, default=TrainConfig.total_tokens, help="tokens to train on, over all steps"
    )
    group.add_argument("--sequence", type=count, default=TrainConfig.sequence_length, help="tokens in a sequence")
    group.add_argument(
        "--batch", type=count, default=TrainConfig.batch_size, help="sequences in a step, over all processes together"
    )
    group.add_argument(
        "--micro-batch",
        type=count,
        help="sequences that a process runs at once, accumulating gradients (default: all of its sequences)",
    )
    group.add_argument(
        "--block-tokens",
        type=not_negative_int,
        default=TrainConfig.block_tokens,
        help="use this many of the first training tokens to train each transformer block against the teacher's block",
    )
    group.add_argument(
        "--long-tokens",
        type=not_negative_int,
        default=TrainConfig.long_tokens,
        help="read this many of the last training tokens in longer sequences",
    )
    group.add_argument(
        "--long-sequence", type=count, default=TrainConfig.long_sequence, help="tokens in a longer sequence"
    )
    group.add_argument(
        "--frozen-tokens",
        type=not_negative_int,
        default=TrainConfig.frozen_tokens,
        help="train without changing signs on this many of the last training tokens",
    )


def add_optimization(sub: argparse.ArgumentParser) -> None:
    """Add the options of a `TrainConfig` that concern the loss and the optimizer."""
    from ..signs import RULES
    from ..training.config import OPTIMIZERS, TrainConfig
    from ..training.student import TRAINABLE

    def add_float(name: str, default: float, text: str, **limits: float) -> None:
        group.add_argument(name, type=number(float, **({"low": 0} | limits)), default=default, help=text)

    group = sub.add_argument_group("optimization")
    add_float("--lr-latents", TrainConfig.lr_latents, "peak learning rate of the latent factors u and v")
    add_float("--lr-scales", TrainConfig.lr_scales, "peak learning rate of the scales h, ell and g")
    add_float("--lr-others", TrainConfig.lr_others, "peak learning rate of all other trained parameters")
    group.add_argument(
        "--train",
        choices=TRAINABLE,
        default=TrainConfig.train,
        help="train these parameters outside the quantized layers too; norms includes biases",
    )
    group.add_argument(
        "--rule",
        choices=list(RULES),
        default=TrainConfig.rule,
        help="surrogate for the derivative of the sign function in the backward pass",
    )
    add_float("--hidden", TrainConfig.hidden_loss_weight, "weight of the loss on hidden states; 0 leaves it out")
    group.add_argument(
        "--label-weight",
        type=fraction,
        default=TrainConfig.label_weight,
        help="weight of the text's next token in the target, beside the teacher's distribution",
    )
    add_float(
        "--latent-scale",
        TrainConfig.latent_scale,
        "scale the initial latent factors to this root mean square; 0 leaves them as they are",
    )
    group.add_argument(
        "--optimizer", choices=OPTIMIZERS, default=TrainConfig.optimizer, help="optimizer of the latent factors"
    )
    add_float("--warmup", TrainConfig.warmup, "fraction of the steps in which the learning rates rise", below=1)
    add_float("--final", TrainConfig.final_lr_fraction, "learning rates at the end, as a fraction of their peaks")
    add_float("--clip", TrainConfig.max_grad_norm, "largest gradient norm before clipping; 0 turns clipping off")


def training_config(arguments: argparse.Namespace) -> "TrainConfig":
    """Make the `TrainConfig` that the arguments ask for."""
    from ..training.config import TrainConfig, with_new_names

    given = with_new_names(vars(arguments))
    return TrainConfig(**{field.name: given[field.name] for field in fields(TrainConfig) if field.name in given})


def run(arguments: argparse.Namespace) -> int | None:
    """Run `littlebit train`, in one process or as one of torchrun's processes."""
    from ..checkpoints.saving import check_target
    from ..training.config import check_config
    from ..training.processes import joined_processes
    from ..training.trainer import TrainingError, TrainingStopped

    check_target(arguments.out, arguments.overwrite)
    check_apart(arguments.model, arguments.out)
    if arguments.dry_run:
        training = training_config(arguments)
        check_config(training, int(os.environ.get("WORLD_SIZE", "1")))
        return print_dry_run(arguments.model, quantization_config(arguments), training, arguments.json)
    try:
        with joined_processes(arguments.device) as device:
            train_and_save(arguments, device)
    except TrainingStopped as stopped:
        print(f"littlebit: {stopped}", file=sys.stderr)
        return STOPPED
    except TrainingError as error:
        return report_error(error)


def train_and_save(arguments: argparse.Namespace, device: str) -> None:
    """Quantize, train and save a model; only the first process writes and prints."""
    import torch

    from ..checkpoints.checkpoint import info, save
    from ..checkpoints.dense import load_tokenizer
    from ..checkpoints.mapped_model import in_memory, load_mapped
    from ..checkpoints.texts import training_tokens
    from ..files.atomic import resolve_output
    from ..files.digests import tensors_digest
    from ..models.quantize import quantize_
    from ..training.config import check_config
    from ..training.phases import longest_sequence
    from ..training.processes import rank_and_world_size
    from ..training.resume import Checkpointer
    from ..training.trainer import train_
    from ..training.windows import checked_text

    tokenizer = load_tokenizer(arguments.model)
    texts = [training_tokens(tokenizer, path) for path in arguments.data]
    training, config = training_config(arguments), quantization_config(arguments)
    calibration = calibration_tokens(arguments, config, tokenizer)
    out = resolve_output(arguments.out)
    state = out.with_name(out.name + ".training")
    measured = None if calibration is None else tensors_digest(calibration)
    described = {"model": arguments.model, "calibration": measured} | config.described()
    checkpointer = Checkpointer(state, arguments.save_minutes, described)
    if (
        checkpointer.newest() is not None
    ):  # The saved state replaces all factors, so the cheapest initialization will do.
        config = replace(config, init="dual-svid", importance=False)
    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    teacher = in_memory(load_mapped(arguments.model), device, dtype)
    check_config(training, rank_and_world_size()[1])  # before the model is quantized
    texts = [checked_text(text, teacher, longest_sequence(training)) for text in texts]
    model = load_mapped(arguments.model)
    quantize_(model, config, calibration, progress=rank_and_world_size()[0] == 0, device=device)
    model = in_memory(model, device, torch.float32)
    log = train_(
        model,
        teacher,
        texts,
        training,
        arguments.weights,
        checkpointer,
        compile=not arguments.no_compile,
        shard=arguments.shard,
        recompute=arguments.recompute,
        log_steps=arguments.log_steps,
    )
    if rank_and_world_size()[0] > 0:
        return
    save(model.cpu(), arguments.out, tokenizer, config.bits, overwrite=arguments.overwrite, log=log)
    shutil.rmtree(state, ignore_errors=True)
    stored = info(arguments.out)
    if arguments.json:
        print(json.dumps(stored | {"training": log[-1] if log else None}))
        return
    print(f"{arguments.out}: {checkpoint_summary(stored)}")
    if log:
        print(f"last loss {log[-1]['loss']:.4f} nats after {log[-1]['tokens']:,} tokens; the log is in training.jsonl")


COMMANDS = {
    "train": Command(
        run,
        add_arguments,
        "Quantize a model, train it on its own full-precision outputs, and write a packed checkpoint.",
        (
            "train tiny out --bits 1.5 --tokens 500000 --sequence 128 --batch 16",
            "train smollm2 out --bits 0.55 --tokens 40000000 --data texts/*.txt",
        ),
    )
}
