"""Processes that start at once: forked from a server that has imported everything, so that many can be killed."""

import multiprocessing
import os
import socket
import sys
from pathlib import Path

TIMEOUT_S = 240


def littlebit(arguments, output=os.devnull, environment=None):
    """A process that runs the `littlebit` command; what it prints is added to a file."""
    arguments = [str(argument) for argument in arguments]
    process = context().Process(target=command, args=(arguments, Path(output), environment or {}), daemon=True)
    process.start()
    return process


def context():
    """How processes are started."""
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["littlebit.fast.cli.main", "transformers.models.llama.modeling_llama"])
    return server


def command(arguments, output, environment):
    """Run the command in this process."""
    os.environ.update(environment)
    file = output.open("a")
    os.dup2(file.fileno(), 1)
    os.dup2(file.fileno(), 2)
    import torch
    from littlebit.fast.cli.main import main

    torch.set_num_threads(1)
    sys.exit(main(arguments))


def group(commands, outputs):
    """Processes that are joined as torchrun joins them, each with a command and an output."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": str(len(outputs)), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks = [common | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(len(outputs))]
    return [littlebit(*each) for each in zip(commands, outputs, ranks, strict=True)]


def ended(process):
    """Exit code of a process, once it has ended."""
    process.join(TIMEOUT_S)
    if process.is_alive():
        process.kill()
        raise AssertionError(f"the process still ran after {TIMEOUT_S} s")
    return process.exitcode
