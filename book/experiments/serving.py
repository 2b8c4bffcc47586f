"""Measure servers of the OpenAI API side by side, with 1, 4 and 16 clients, on one machine's CPU.

    python book/experiments/serving.py book/results/serving.json --dense DIR --vllm VLLM_PYTHON
        --transformers TRANSFORMERS --llama LLAMA_PYTHON --gguf GGUF

DIR holds the original in bfloat16. The others are interpreters and a program in environments of their own: VLLM_PYTHON
has vLLM and this package, TRANSFORMERS is the command of transformers with its extra `serving`, and LLAMA_PYTHON has
`xllamacpp`, which brings llama.cpp's server for the file GGUF. Servers that are not given are left out.

All are started first. Then, for one server after the other, while the others are paused, every client asks for one text
after another, as a stream, in greedy decoding. All servers get the same prompts, and no two prompts begin alike, so
that no cache of prompts helps.

Run it on a machine that does nothing else: `other_cores` of a row is the number of cores that other programs kept busy
meanwhile. Where it is above LOUD, the row is measured again, at most TRIES times, and the quietest try is kept.
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import count, islice
from pathlib import Path
from typing import Any, NamedTuple

import littlebit.fast as lb
import numpy as np
from littlebit.fast.bench.timing import cpu_name, save_results
from littlebit.fast.serving import app  # the results record the digest of its code

CLIENTS, REQUESTS = (1, 4, 16), (8, 16, 32)
TOKENS, WARM_UP = 64, 8  # tokens of an answer, and of the answers before each measurement
CHARACTERS, STRIDE = 400, 97  # of a prompt; between the beginnings of two prompts
LOUD, TRIES, START_S = 0.2, 2, 1800
TICKS = os.sysconf("SC_CLK_TCK")
NAME = "smollm2-0.55bit"
COMMAND = "python book/experiments/serving.py book/results/serving.json --dense DIR --vllm VLLM_PYTHON"
COMMAND += " --transformers TRANSFORMERS --llama LLAMA_PYTHON --gguf GGUF"
LLAMA = """
import sys, threading, xllamacpp

parameters = xllamacpp.CommonParams()
parameters.model.path = sys.argv[1]
parameters.n_ctx, parameters.n_parallel, threads, parameters.port = map(int, sys.argv[2:])
parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = threads
print(xllamacpp.get_system_info())
server = xllamacpp.Server(parameters)
threading.Event().wait()
"""
LOGS = Path(__file__).resolve().parents[2] / "build" / "serving"
assert app


class Engine(NamedTuple):
    """A server: its name in the results, port, command, further fields of each request, and environment variables."""

    name: str
    port: int
    command: list[str]
    fields: dict[str, Any]
    environment: dict[str, str]


def engines(arguments: argparse.Namespace) -> Iterator[Engine]:
    """List the servers whose programs were given."""
    ports, threads, packed = count(arguments.port), str(arguments.threads), lb.fetch(NAME)
    environment = {"OMP_NUM_THREADS": threads, "HF_HUB_OFFLINE": "1"}
    whole, port = {"ignore_eos": True}, next(ports)
    ours = [sys.executable, "-m", "littlebit.fast", "serve", packed, "--name", "m", "--threads", threads]
    yield Engine("littlebit", port, [*ours, "--port", str(port)], whole, environment)
    if arguments.vllm:
        cores = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": f"0-{arguments.threads - 1}"}
        for name, folder, dtype in (("vllm plug-in", packed, "float32"), ("vllm", arguments.dense, "bfloat16")):
            port = next(ports)
            command = [arguments.vllm, "-m", "vllm.entrypoints.openai.api_server", "--model", folder, "--dtype", dtype]
            command += ["--max-model-len", "2048", "--served-model-name", "m", "--port", str(port)]
            yield Engine(name, port, command, whole, environment | cores)
    if arguments.transformers:
        # there is no field for the least number of tokens, but one for a GenerationConfig
        fields = {"generation_config": json.dumps({"min_new_tokens": TOKENS, "do_sample": False})}
        for name, more in (("transformers", []), ("transformers batching", ["--continuous-batching"])):
            port = next(ports)
            command = [arguments.transformers, "serve", arguments.dense, "--device", "cpu", "--port", str(port), *more]
            yield Engine(name, port, command, fields | {"model": arguments.dense}, environment)
    if arguments.llama:
        port = next(ports)
        sizes = [str(size) for size in (1024 * max(CLIENTS), max(CLIENTS), threads, port)]
        yield Engine("llama.cpp", port, [arguments.llama, "-c", LLAMA, arguments.gguf, *sizes], whole, environment)


@contextlib.contextmanager
def running(engine: Engine) -> Iterator[subprocess.Popen]:
    """Start a server in a session of processes of its own, and stop it when the block ends."""
    LOGS.mkdir(parents=True, exist_ok=True)
    with (LOGS / f"{engine.name}.log").open("w") as out:
        process = subprocess.Popen(
            engine.command, env=os.environ | engine.environment, stdout=out, stderr=out, start_new_session=True
        )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@contextlib.contextmanager
def paused(sessions: Sequence[int]) -> Iterator[None]:
    """Let the processes of idle servers wait, which otherwise look for work again and again."""
    for session in sessions:
        os.killpg(session, signal.SIGSTOP)
    try:
        yield
    finally:
        for session in sessions:
            os.killpg(session, signal.SIGCONT)


def wait_until_ready(engine: Engine, process: subprocess.Popen) -> None:
    """Ask a server until it answers."""
    end = time.monotonic() + START_S
    while process.poll() is None and time.monotonic() < end:
        try:
            ask(engine, "Hello")
            return
        except OSError:
            time.sleep(1)
    raise RuntimeError(f"{engine.name} does not answer: see its output in {LOGS}")


def session_seconds(session: int) -> float:
    """Add up the processor time of a session's processes, and of their children that have ended."""
    ticks = 0
    for each in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = each.read_text().rpartition(")")[2].split()
            if int(fields[3]) == session:
                ticks += sum(map(int, fields[11:15]))
    return ticks / TICKS


def session_bytes(session: int) -> int:
    """Add up the memory of a session's processes, shared pages divided among those that share them."""
    total = 0
    for each in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if int((each / "stat").read_text().rpartition(")")[2].split()[3]) == session:
                lines = (each / "smaps_rollup").read_text().splitlines()
                total += 1024 * next(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return total


def machine_seconds() -> float:
    """Return the seconds that this machine's processors were busy, added up."""
    user, nice, system, _, _, *interrupts = map(int, Path("/proc/stat").read_text().split("\n")[0].split()[1:9])
    return (user + nice + system + sum(interrupts)) / TICKS


class Answer(NamedTuple):
    """Seconds until the first piece of text, seconds until the end, and the number of tokens of an answer."""

    first_s: float
    total_s: float
    tokens: int


def ask(engine: Engine, prompt: str, tokens: int = TOKENS) -> Answer:
    """Ask for one text as a stream."""
    asked = {"model": "m", "prompt": prompt, "max_tokens": tokens, "temperature": 0, "stream": True}
    body = json.dumps(asked | {"stream_options": {"include_usage": True}} | engine.fields).encode()
    headers = {"Content-Type": "application/json", "Authorization": "Bearer none"}
    request = urllib.request.Request(f"http://127.0.0.1:{engine.port}/v1/completions", body, headers)
    begin, first, found = time.perf_counter(), None, None
    with urllib.request.urlopen(request, timeout=600) as answer:
        for line in answer:
            if not line.startswith(b"data: {"):
                continue
            chunk = json.loads(line[6:])
            if first is None and any(choice["text"] for choice in chunk["choices"]):
                first = time.perf_counter() - begin
            if chunk.get("usage"):
                found = chunk["usage"]["completion_tokens"]
    if first is None or found is None:
        raise RuntimeError(f"the answer to {prompt!r} has no text or no usage")
    return Answer(first, time.perf_counter() - begin, found)


def measure(engine: Engine, session: int, clients: int, texts: Sequence[str]) -> dict[str, Any]:
    """Let `clients` clients ask for continuations of all texts between them."""
    before, own, begin = machine_seconds(), session_seconds(session) + sum(os.times()[:2]), time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        answers = list(pool.map(lambda text: ask(engine, text), texts))
    seconds = time.perf_counter() - begin
    others = machine_seconds() - before - (session_seconds(session) + sum(os.times()[:2]) - own)
    row = {"clients": clients, "requests": len(texts), "tokens": sum(answer.tokens for answer in answers)}
    row |= {"requests_per_s": len(texts) / seconds, "tokens_per_s": row["tokens"] / seconds}
    for name, values in (("first_token", [a.first_s for a in answers]), ("latency", [a.total_s for a in answers])):
        for percent in (50, 99):
            row[f"{name}_p{percent}_s"] = float(np.percentile(values, percent))
    return row | {"memory_bytes": session_bytes(session), "other_cores": max(others / seconds, 0.0)}


def prompts() -> Iterator[str]:
    """Yield pieces of a text that comes with the package, no two of which begin alike."""
    text = (Path(lb.__file__).parent / "data" / "lincoln_1862.txt").read_text(encoding="utf-8")
    for piece in count():
        start = STRIDE * piece
        assert start + CHARACTERS <= len(text), "the text has too few prompts"
        yield text[start : start + CHARACTERS]


def measure_all(engine: Engine, session: int) -> Iterator[dict[str, Any]]:
    """Measure a server with each number of clients, and again where other programs disturbed it."""
    texts = prompts()
    for clients, requests in zip(CLIENTS, REQUESTS, strict=True):
        with ThreadPoolExecutor(clients) as pool:
            list(pool.map(lambda text: ask(engine, text, WARM_UP), islice(texts, clients)))
        tries = []
        while not tries or (tries[-1]["other_cores"] > LOUD and len(tries) < TRIES):
            row = measure(engine, session, clients, list(islice(texts, requests)))
            tries.append({"engine": engine.name} | row)
            print(tries[-1], flush=True)
        yield min(tries, key=lambda row: row["other_cores"])


def main() -> None:
    """Measure every server and save the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    for option in ("dense", "vllm", "transformers", "llama", "gguf"):
        parser.add_argument(f"--{option}")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--port", type=int, default=8401, help="the first of six ports")
    parser.add_argument("--pause", action="store_true", help="wait for the Enter key before each server is measured")
    arguments, rows = parser.parse_args(), []
    with contextlib.ExitStack() as stack:
        started = [(engine, stack.enter_context(running(engine))) for engine in engines(arguments)]
        for engine, process in started:
            wait_until_ready(engine, process)
            print(f"{engine.name} is ready", flush=True)
        for engine, process in started:
            if arguments.pause:
                input(f"press Enter to measure {engine.name}\n")
            with paused([other.pid for _, other in started if other is not process]):
                rows.extend(measure_all(engine, process.pid))
            save_results(arguments.out, rows, COMMAND, cpu_name())


if __name__ == "__main__":
    main()
