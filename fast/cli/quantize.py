"""Quantize a model: the `quantize` command, and the options that `train` shares with it."""

import argparse
import contextlib
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .arguments import Command, add_dry_run, device, model_help, number, positive, seed
from .dry_run import print_dry_run
from .models import check_apart
from .tables import checkpoint_summary, text_table

if TYPE_CHECKING:
    import torch

    from ..models.layer_store import LayerStore
    from ..models.quantize import Config


def add_arguments(sub: argparse.ArgumentParser) -> None:
    """Add the arguments of `littlebit quantize`."""
    sub.add_argument("model", help=model_help())
    sub.add_argument("out", type=Path, help="directory to write the checkpoint to")
    add_quantization(sub)
    sub.add_argument(
        "--embedding-bits",
        type=int,
        choices=[16, 8, 4],
        default=16,
        help="store each entry of the embedding and the output head in this many bits",
    )
    sub.add_argument("--device", type=device, default="cpu", help="torch device to factorize on, such as cpu or cuda")
    sub.add_argument("--report", type=Path, metavar="HTML", help="also write a page with the table and charts")
    add_dry_run(sub)


def add_quantization(sub: argparse.ArgumentParser) -> None:
    """Add the options that become a `Config`, and the calibration text."""
    from ..models.allocation import ALLOCATIONS
    from ..models.config import Config
    from ..models.initializers import INITS

    group = sub.add_argument_group("quantization")
    group.add_argument(
        "--bits",
        type=positive,
        default=Config.bits,
        help="store at most this many bits per weight, averaged over the quantized layers",
    )
    group.add_argument(
        "--paths",
        choices=["auto", "1", "2"],
        default=str(Config.paths),
        help="low-rank paths in each layer: 2 adds a residual path to the primary one, auto chooses for each layer",
    )
    group.add_argument(
        "--init",
        choices=list(INITS),
        default=Config.init,
        help="initialize the factors as in the paper (dual-svid), after a rotation (itq), or by optimization (admm)",
    )
    group.add_argument(
        "--allocation",
        choices=list(ALLOCATIONS),
        default=Config.allocation,
        help="divide the ranks among the layers: equal bits, by sensitivity on the calibration text, or by the "
        "authors' formula, which may exceed --bits",
    )
    group.add_argument(
        "--spread",
        type=number(float, low=1),
        help="with --allocation sensitivity: keep each rank within this factor of the uniform one (default: no limit)",
    )
    group.add_argument(
        "--importance",
        action="store_true",
        help="with --init admm: weight channels by their second moments on the calibration text",
    )
    group.add_argument(
        "--scale-bits",
        type=int,
        choices=(16, 8),
        default=Config.scale_bits,
        help="bits of a scale (default: %(default)s); 8 leave more bits to signs, which pays at 0.3 bits and below",
    )
    group.add_argument(
        "--kv-rank-factor",
        type=positive,
        default=Config.kv_rank_factor,
        help="with grouped-query attention: give k_proj and v_proj this many times the bits per weight of other layers",
    )
    add_layer_choice(group)
    group.add_argument("--seed", type=seed, default=Config.seed, help="seed of the random decompositions and rotations")


def add_layer_choice(group: argparse._ActionsContainer) -> None:
    """Add the options that choose the layers, and the text that calibrates them."""
    from ..evaluation.perplexity import TRAINING_TEXT
    from ..models.quantize import Config

    group.add_argument(
        "--include",
        nargs="+",
        metavar="PATTERN",
        default=list(Config.include),
        help="quantize the linear layers whose names match one of these shell patterns (default: all)",
    )
    group.add_argument(
        "--exclude",
        nargs="+",
        metavar="PATTERN",
        default=list(Config.exclude),
        help="leave out the layers whose names match one of these shell patterns (default: none)",
    )
    group.add_argument(
        "--split-fused",
        action="store_true",
        help="quantize the parts of a fused projection (QKV, gate-up) as separate layers",
    )
    group.add_argument(
        "--calibration",
        type=Path,
        metavar="TEXT",
        default=TRAINING_TEXT,
        help="UTF-8 text to calibrate on (default: an included one)",
    )
    group.add_argument(
        "--calibration-tokens", type=number(int, low=2), default=8192, help="number of tokens to calibrate on"
    )


def quantization_config(arguments: argparse.Namespace) -> "Config":
    """Make the `Config` that the arguments ask for."""
    from ..models.quantize import Config

    return Config(
        bits=arguments.bits,
        paths=None if arguments.paths == "auto" else int(arguments.paths),
        init=arguments.init,
        allocation=arguments.allocation,
        spread=arguments.spread,
        importance=arguments.importance,
        include=tuple(arguments.include),
        exclude=tuple(arguments.exclude),
        split_fused=arguments.split_fused,
        kv_rank_factor=arguments.kv_rank_factor,
        scale_bits=arguments.scale_bits,
        seed=arguments.seed,
    )


def calibration_tokens(
    arguments: argparse.Namespace, config: "Config", tokenizer: Any, embedding_bits: int = 16
) -> "torch.Tensor | None":
    """Read the calibration text if the layers or a 4-bit embedding need it; int64 tokens of shape (n,), or None."""
    from ..checkpoints.texts import text_tokens

    if config.needs_calibration() or embedding_bits == 4:
        return text_tokens(tokenizer, arguments.calibration)[: arguments.calibration_tokens]
    return None


@contextlib.contextmanager
def kept_layers(out: Path) -> "Iterator[LayerStore]":
    """Keep finished layers beside the output until it is complete; say where they are if the work is interrupted."""
    from ..models.layer_store import LayerStore

    store = LayerStore(out.with_name(out.name + ".layers"))
    try:
        yield store
    except BaseException:
        if count := store.count():
            print(
                f"littlebit: {count} finished layers are kept in {store.folder} for the same command", file=sys.stderr
            )
        raise
    store.remove()


def run(arguments: argparse.Namespace) -> None:
    """Quantize a model layer by layer, and write a packed checkpoint.

    The dense weights stay in their files. Finished layers are kept in OUT.layers, from which the same command goes on.
    """
    import torch

    from ..checkpoints.checkpoint import info, save
    from ..checkpoints.dense import load_tokenizer
    from ..checkpoints.loading import cast_dense
    from ..checkpoints.mapped_model import load_mapped
    from ..checkpoints.saving import check_target
    from ..files.atomic import check_file, check_room, resolve_output
    from ..models.embeddings import check_embeddings, quantize_embeddings_
    from ..models.quantize import quantize_, stored_bytes
    from .report import html_report, summarize_layer_types

    check_target(arguments.out, arguments.overwrite)
    check_apart(arguments.model, arguments.out)
    if arguments.report:
        check_file(arguments.report)
    config = quantization_config(arguments)
    if arguments.dry_run:
        return print_dry_run(arguments.model, config, None, arguments.json)
    tokenizer = load_tokenizer(arguments.model)
    tokens = calibration_tokens(arguments, config, tokenizer, arguments.embedding_bits)
    model = load_mapped(arguments.model)
    out = resolve_output(arguments.out)
    check_room(out, 2 * stored_bytes(model, config, arguments.embedding_bits))
    check_embeddings(model, arguments.embedding_bits)  # before hours of work
    with kept_layers(out) as store:
        results = quantize_(model, config, tokens, device=arguments.device, store=store)
        if arguments.embedding_bits == 4:
            cast_dense(model, torch.float32)  # The head's input is measured by running the packed model.
        quantize_embeddings_(model, arguments.embedding_bits, tokens)
        save(model, arguments.out, tokenizer, config.bits, results, arguments.overwrite)
    stored = info(arguments.out)
    summary = checkpoint_summary(stored)
    if arguments.report:
        html_report(arguments.report, f"{arguments.model} at {config.bits:g} bits", summary, results)
    if arguments.json:
        rows = {name: asdict(result) for name, result in results.items()}
        print(json.dumps(stored | {"results": rows, "dense": dict(results.dense)}))
        return
    print(text_table(summarize_layer_types(results)))
    print(f"{arguments.out}: {summary}")
    print(f"next: littlebit eval {arguments.out}; or littlebit train {arguments.model} OUT --bits {config.bits:g}")


COMMANDS = {
    "quantize": Command(
        run,
        add_arguments,
        "Quantize a model and write a packed checkpoint.",
        (
            "quantize smollm2 out --bits 0.55 --init admm --paths 1",
            "quantize smollm2 out --bits 0.55 --dry-run",
            "quantize MODEL out --bits 1 --exclude '*.down_proj' --report report.html",
        ),
    )
}
