"""Get, inspect and convert checkpoints: the commands `fetch`, `info`, `verify` and `export`."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..checkpoints.checksums import corrupt_error
from ..checkpoints.fetch import fetch, locate_packed
from ..checkpoints.names import known_names
from .arguments import Command, add_json
from .models import check_apart
from .tables import checkpoint_summary, text_table

PACKED = "a packed checkpoint of littlebit or of the paper's authors"


def add_fetch_arguments(sub: argparse.ArgumentParser) -> None:
    """Add the arguments of `littlebit fetch`."""
    sub.add_argument("name", help=f"one of: {', '.join(known_names())}")
    add_json(sub)


def run_fetch(arguments: argparse.Namespace) -> None:
    """Print the path of a known model, downloaded or rebuilt on first use."""
    path = fetch(arguments.name)
    print(json.dumps({"name": arguments.name, "path": str(path)}) if arguments.json else path)


def add_packed_arguments(sub: argparse.ArgumentParser) -> None:
    """Add the arguments of `littlebit info` and `littlebit verify`."""
    sub.add_argument("model", help=PACKED)
    add_json(sub)


def run_info(arguments: argparse.Namespace) -> None:
    """Print what a packed checkpoint stores, counted from its files, in all and by layer type."""
    from ..checkpoints.checkpoint import info

    stored = info(arguments.model)
    if arguments.json:
        print(json.dumps(stored))
        return
    print(f"{arguments.model}: {checkpoint_summary(stored)}")
    rows = [
        {
            "layer type": layer_type,
            "layers": row["layers"],
            "weights": f"{row['weights']:,}",
            "bytes": f"{row['linear_bytes']:,}",
            "bits per weight": f"{row['bits_per_weight']:.3f}",
        }
        for layer_type, row in stored["kinds"].items()
    ]
    if rows:
        print(text_table(rows))


def run_verify(arguments: argparse.Namespace) -> None:
    """Compare a packed checkpoint with its stored checksums; raise CheckpointError if a tensor differs."""
    from ..checkpoints.checkpoint import verify

    folder = locate_packed(arguments.model)
    found = verify(folder)
    if arguments.json:
        print(json.dumps(found))
    if found["damaged"]:
        raise corrupt_error(folder, found["damaged"])
    if not arguments.json:
        state = "as they were saved (SHA-256)" if found["checksums"] else "consistent; the files hold no checksums"
        print(f"{arguments.model}: {found['tensors']} tensors of {found['tensor_bytes']:,} bytes are {state}")


def add_export_arguments(sub: argparse.ArgumentParser) -> None:
    """Add the arguments of `littlebit export`."""
    from ..checkpoints.gguf import PRECISIONS

    sub.add_argument("model", help=PACKED)
    sub.add_argument("out", type=Path, help="directory (official) or file (gguf) to write")
    sub.add_argument(
        "--to",
        choices=list(EXPORTS),
        required=True,
        help="official: packed, in the authors' format; gguf: dense weights, for llama.cpp",
    )
    sub.add_argument("--precision", choices=PRECISIONS, default=PRECISIONS[0], help="gguf: dtype of the weights")
    sub.add_argument(
        "--unpacked",
        action="store_true",
        help="official: write signs as float16, 16 times the size. Every version of the authors' program reads these; "
        "one version misreads packed signs",
    )
    sub.add_argument("--overwrite", action="store_true", help="replace an existing checkpoint")
    add_json(sub)


def run_export(arguments: argparse.Namespace) -> None:
    """Write a packed checkpoint in the format of another program."""
    if arguments.unpacked and arguments.to != "official":
        raise ValueError(f"--unpacked needs --to official, got --to {arguments.to}: leave --unpacked out")
    check_apart(arguments.model, arguments.out)
    row, text = EXPORTS[arguments.to](arguments)
    print(json.dumps({"path": str(arguments.out)} | row) if arguments.json else f"{arguments.out}: {text}")


def export_official(arguments: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Write the authors' format; return what was stored, as a row for JSON and as text."""
    from ..checkpoints.checkpoint import info, load
    from ..checkpoints.dense import load_tokenizer
    from ..checkpoints.official import save_official
    from ..checkpoints.saving import check_target

    check_target(arguments.out, arguments.overwrite)
    model, tokenizer = load(arguments.model), load_tokenizer(arguments.model)
    bits = info(arguments.model)["target_bits"]
    save_official(model, arguments.out, tokenizer, bits, arguments.overwrite, packed=not arguments.unpacked)
    stored = info(arguments.out)
    return stored, checkpoint_summary(stored)


def export_gguf(arguments: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Write the equivalent dense model as GGUF; return what was stored, as a row for JSON and as text."""
    from ..checkpoints.checkpoint import load
    from ..checkpoints.dense import load_tokenizer
    from ..checkpoints.gguf import check_gguf, save_gguf

    check_gguf(arguments.out, arguments.overwrite)
    model, tokenizer = load(arguments.model), load_tokenizer(arguments.model)
    size = save_gguf(model, arguments.out, tokenizer, arguments.precision, arguments.overwrite).stat().st_size
    row = {"format": "gguf", "precision": arguments.precision, "file_bytes": size}
    return row, f"{size:,} bytes; dense weights in {arguments.precision}, not packed"


EXPORTS: dict[str, Callable[[argparse.Namespace], tuple[dict[str, Any], str]]] = {
    "official": export_official,
    "gguf": export_gguf,
}

COMMANDS = {
    "fetch": Command(
        run_fetch,
        add_fetch_arguments,
        "Print the path of a known model, after downloading or rebuilding it on first use.",
        ("fetch smollm2", "fetch smollm2-0.55bit --json"),
    ),
    "info": Command(
        run_info,
        add_packed_arguments,
        "Count the bits that a packed checkpoint stores.",
        ("info out", "info smollm2-0.55bit --json"),
    ),
    "verify": Command(
        run_verify,
        add_packed_arguments,
        "Compare a packed checkpoint with the checksums that were saved with it.",
        ("verify out", "verify smollm2-0.55bit --json"),
    ),
    "export": Command(
        run_export,
        add_export_arguments,
        "Write a packed checkpoint in the format of another program.",
        (
            "export out theirs --to official --unpacked",
            "export out model.gguf --to gguf --precision q8_0",
        ),
    ),
}
