"""Run the `littlebit` command: read the arguments, run the subcommand, return its exit code.

Each group of subcommands has a file of its own, which lists them in COMMANDS.
"""

import argparse
import contextlib
import io
import logging
import shlex
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from .._checks import LittleBitWarning
from . import bench, chat, demo, evaluate, files, generate, memory, plan, quantize, serve, train, tune
from .arguments import Command, Formatter
from .exits import (
    CLOSED_PIPE,
    EXIT_CODES,
    INTERRUPTED,
    STOPPED,
    Terminated,
    discard_output,
    report_error,
    sigterm_raises,
)
from .models import use_torch

SHELLS = ("bash", "fish", "tcsh", "zsh")
# Starting torch takes seconds, so these commands import it only where they need it.
TORCH_FREE_COMMANDS = ("generate", "chat", "serve", "completion", "memory", "plan", "demo")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line, given without `littlebit`, and return its exit code (see EXIT_CODES).

    An error is one line on standard error. A bug raises, so that Python prints its traceback.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # The terminal's encoding may lack a letter.
    try:
        with sigterm_raises(), silence_libraries():
            return run(argv)
    except Terminated:
        print("littlebit: stopped by SIGTERM; no unfinished output is left", file=sys.stderr)
        return STOPPED
    except KeyboardInterrupt:
        print("littlebit: stopped by Ctrl-C; no unfinished output is left", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        discard_output()
        return CLOSED_PIPE
    except (ValueError, OSError, ImportError) as error:
        return report_error(error)
    except (MemoryError, RuntimeError) as error:  # On a CPU, torch raises RuntimeError.
        if not isinstance(error, MemoryError) and "can't allocate memory" not in str(error):
            raise
        return report_error(MemoryError("out of memory; --dry-run of quantize and train says how much is needed"))


def run(argv: list[str]) -> int:
    """Parse a command line and run its subcommand."""
    arguments = build_parser(argv[0] if argv else "").parse_args(argv)
    arguments.command_line = shlex.join(["littlebit", *argv])
    if arguments.command not in TORCH_FREE_COMMANDS:
        use_torch(getattr(arguments, "threads", None))
    code = arguments.run(arguments) or 0
    sys.stdout.flush()
    return code


@contextlib.contextmanager
def silence_libraries() -> Iterator[None]:
    """Hide the warnings of libraries while the block runs, and print this package's own as one line each."""

    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        print(f"littlebit: warning: {message}", file=sys.stderr)

    for library in ("transformers", "huggingface_hub", "lm_eval"):
        logging.getLogger(library).setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", LittleBitWarning)
        warnings.showwarning = show
        yield


def build_parser(only: str | None = None) -> argparse.ArgumentParser:
    """Build the parser of all subcommands.

    Parameters
    ----------
    only : str, optional
        Add the arguments of this subcommand alone, because reading the others' defaults imports torch. None adds all.
    """
    parser = argparse.ArgumentParser(
        prog="littlebit",
        description="Quantize language models to less than one bit per weight, and run them.",
        epilog=EXIT_CODES,
        formatter_class=Formatter,
    )
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        examples = "examples:\n" + "".join(f"  littlebit {example}\n" for example in command.examples)
        sub = subparsers.add_parser(
            name, help=command.text, description=command.text, epilog=examples, formatter_class=Formatter
        )
        sub.set_defaults(run=command.run)
        if only in (None, name):
            command.add_arguments(sub)
    return parser


def subcommands(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """Return the parsers of the subcommands by name."""
    (action,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    return dict(action.choices)


def add_completion_arguments(sub: argparse.ArgumentParser) -> None:
    """Add the arguments of `littlebit completion`."""
    sub.add_argument("shell", choices=SHELLS, help="shell to write the script for")


def run_completion(arguments: argparse.Namespace) -> None:
    """Print the completion script that shtab makes from the parser."""
    try:
        import shtab
    except ImportError as error:
        raise ImportError("completion needs the package shtab: pip install 'littlebit[completion]'") from error
    parser = build_parser()
    for sub in subcommands(parser).values():
        for action in sub._actions:
            if action.type is Path or action.dest == "model":
                action.complete = shtab.FILE  # type: ignore[attr-defined]
    print(shtab.complete(parser, arguments.shell))


COMMANDS = (
    files.COMMANDS
    | quantize.COMMANDS
    | train.COMMANDS
    | evaluate.COMMANDS
    | generate.COMMANDS
    | chat.COMMANDS
    | serve.COMMANDS
    | memory.COMMANDS
    | plan.COMMANDS
    | demo.COMMANDS
    | bench.COMMANDS
    | tune.COMMANDS
    | {
        "completion": Command(
            run_completion,
            add_completion_arguments,
            "Print a script that completes the command in a shell.",
            ("completion bash > ~/.local/share/bash-completion/completions/littlebit",),
        )
    }
)
