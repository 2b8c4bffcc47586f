"""Serve a model over HTTP: the `serve` command."""

import argparse
import os
from pathlib import Path

from .arguments import Command, add_device, count, model_help, number, positive
from .generate import add_kv_cache, load_slots

KEY_VARIABLE = "LITTLEBIT_API_KEY"
STOP_S = 5  # seconds that requests have to end when the server stops


def add_arguments(sub: argparse.ArgumentParser) -> None:
    """Add the arguments of `littlebit serve`."""
    sub.add_argument("model", help=f"a packed checkpoint, or a dense model: {model_help()}")
    sub.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 for all of this machine's")
    sub.add_argument("--port", type=number(int, low=0, below=65536), default=8000, help="port; 0 for any free one")
    sub.add_argument("--name", help="name that requests give the model (default: MODEL, or its folder's name)")
    sub.add_argument(
        "--api-key-file",
        type=Path,
        help=f"file with the key that clients must send (default: the variable {KEY_VARIABLE}, or no key)",
    )
    sub.add_argument("--batch", type=number(int, low=1, high=16), default=16, help="most texts at once")
    sub.add_argument("--queue", type=number(int, low=0), default=64, help="most texts that wait; more get status 429")
    sub.add_argument("--context", type=count, default=8192, help="most tokens of a prompt with its answer")
    sub.add_argument("--timeout", type=positive, default=600.0, help="seconds after which a request is given up")
    sub.add_argument("--log-requests", action="store_true", help="print a line of JSON for each request")
    add_kv_cache(sub)
    add_device(sub)


def run(arguments: argparse.Namespace) -> None:
    """Load the model, and serve it until Ctrl-C or SIGTERM."""
    try:
        import uvicorn

        from ..serving.app import Options, Server, is_loopback
        from ..serving.generation import Model
    except ImportError as error:
        raise ImportError(f"serve needs the extra 'serve' ({error}): pip install 'littlebit[serve]'") from error
    from ..decoding.batching import Batcher

    key = read_key(arguments.api_key_file)
    slots, tokenizer = load_slots(arguments, arguments.batch)
    batcher = Batcher(slots, arguments.queue)
    name = arguments.name or (Path(arguments.model).name if Path(arguments.model).exists() else arguments.model)
    options = Options(key, arguments.timeout, arguments.log_requests, arguments.host)
    app = Server(Model([name], tokenizer, batcher), options).app()
    config = uvicorn.Config(
        app,
        host=arguments.host,
        port=arguments.port,
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=STOP_S,
        server_header=False,
    )
    if key is None and not is_loopback(arguments.host):
        print(
            f"littlebit: warning: anyone who reaches {arguments.host} can use this server: set {KEY_VARIABLE}",
            flush=True,
        )

    class Announced(uvicorn.Server):
        """A server that says where it listens as soon as it does."""

        async def startup(self, sockets: list | None = None) -> None:
            await super().startup(sockets)
            if self.started:
                port = self.servers[0].sockets[0].getsockname()[1]
                host = f"[{arguments.host}]" if ":" in arguments.host else arguments.host
                print(f"littlebit: serving {name} at http://{host}:{port}/v1 (page: http://{host}:{port}/)", flush=True)

    server = Announced(config)
    try:
        server.run()
    finally:
        batcher.close()
    if not server.started:
        raise ValueError(f"cannot listen on {arguments.host} port {arguments.port}: choose another --port")


def read_key(file: Path | None) -> str | None:
    """Read the API key from a file or from the environment."""
    key = os.environ.get(KEY_VARIABLE) if file is None else file.read_text(encoding="utf-8")
    if key is None:
        return None
    if not key.strip():
        raise ValueError(f"the API key must not be empty: write it to {file or KEY_VARIABLE}")
    return key.strip()


COMMANDS = {
    "serve": Command(
        run,
        add_arguments,
        "Serve a model to clients of the OpenAI API.",
        ("serve smollm2-0.55bit", "serve out --host 0.0.0.0 --api-key-file key.txt --log-requests"),
    )
}
