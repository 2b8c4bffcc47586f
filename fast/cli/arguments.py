"""Define what the commands share: their record, the options that several take, and checked option values."""

import argparse
import os
from collections.abc import Callable
from typing import Any, NamedTuple

from ...reference._renamed import renamed_value
from .._checks import check_number
from ..checkpoints.names import known_names


class Command(NamedTuple):
    """One subcommand of `littlebit`.

    Attributes
    ----------
    run : callable
        Does the work, given the parsed arguments. Returns an exit code, or None for 0.
    add_arguments : callable
        Adds the options to the subcommand's parser. It may import torch, to show a default.
    text : str
        What the command does, in one sentence.
    examples : tuple of str
        Command lines without the leading `littlebit`.
    """

    run: Callable[[argparse.Namespace], int | None]
    add_arguments: Callable[[argparse.ArgumentParser], None]
    text: str
    examples: tuple[str, ...]


class Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Show defaults in the help, unless the text names it, and keep the examples' lines."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or action.default is False or "default" in (action.help or ""):
            return action.help
        if isinstance(action.default, list):
            return f"{action.help} (default: {' '.join(map(str, action.default))})"
        return super()._get_help_string(action)


def model_help() -> str:
    """List the ways to name a model."""
    return f"a known name ({', '.join(known_names())}), a directory, a .gguf file or a hub id"


def add_json(sub: argparse._ActionsContainer) -> None:
    """Add `--json`, which prints a result for scripts."""
    sub.add_argument("--json", action="store_true", help="print the result as JSON")


def add_dry_run(sub: argparse._ActionsContainer) -> None:
    """Add the options of the commands that write a checkpoint."""
    sub.add_argument("--overwrite", action="store_true", help="replace an existing checkpoint")
    sub.add_argument(
        "--dry-run", action="store_true", help="print the stored bits, the memory and the time to expect, and stop"
    )
    add_json(sub)


def add_compute(sub: argparse._ActionsContainer) -> None:
    """Add the options of the commands that run a model and print a result."""
    add_device(sub)
    add_json(sub)


def add_device(sub: argparse._ActionsContainer) -> None:
    """Add the options that say where a model runs."""
    sub.add_argument("--device", type=device, default="cpu", help="torch device to run on, such as cpu or cuda")
    sub.add_argument("--threads", type=count, help="CPU threads to use (default: OMP_NUM_THREADS, or all cores)")


def number(convert: type[int] | type[float], **limits: float) -> Callable[[str], Any]:
    """Make an argparse type that reads numbers within the limits of `check_number`."""

    def read(text: str) -> Any:
        try:
            value = convert(text)
        except ValueError as error:
            wanted = "whole number" if convert is int else "number"
            raise argparse.ArgumentTypeError(f"the value must be a {wanted}, got {text!r}") from error
        try:
            check_number("the value", value, **limits, whole=convert is int)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error
        return value

    return read


count = number(int, low=1)
positive = number(float, above=0)
not_negative = number(float, low=0)
not_negative_int = number(int, low=0)
fraction = number(float, low=0, high=1)
seed = number(int, low=0, below=2**63)


def utf8(text: str) -> str:
    """Read an argument as UTF-8, whatever encoding the locale names."""
    try:
        return os.fsencode(text).decode("utf-8")
    except UnicodeDecodeError as error:
        raise argparse.ArgumentTypeError(f"the text must be UTF-8: {error}") from error


def shape(text: str) -> tuple[int, int]:
    """Read a matrix shape (d_out, d_in), such as '4096x11008'."""
    try:
        d_out, d_in = (count(part) for part in text.lower().split("x"))
    except (ValueError, argparse.ArgumentTypeError) as error:
        raise argparse.ArgumentTypeError(f"the shape must be D_OUTxD_IN, such as 4096x11008, got {text!r}") from error
    return d_out, d_in


def kv_cache(text: str) -> str:
    """Read the type of a key-value cache, under its present or its old name."""
    return renamed_value("kv_cache", text)


def device(text: str) -> str:
    """Read the name of a torch device that works on this machine."""
    if text == "cpu":
        return text
    import torch

    try:
        torch.empty(0, device=text)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise argparse.ArgumentTypeError(f"torch cannot use {text!r} here ({reason}); try cpu") from error
    return text
