"""Benchmarks of decoding: beside transformers and llama.cpp, each in a process of its own, and on a busy machine."""

import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._progress import tqdm
from ..checkpoints.fetch import resolve

if TYPE_CHECKING:
    from ..decoding.cpu_decoder import Decoder

PROMPT = "Once upon a time, in a small town by the sea, there lived"
ENGINES = ("littlebit", "transformers", "llama.cpp")
START_S = 0.3  # in which programs that keep the machine busy have started
#: Share of a core below which a thread that always has work was kept from it by other programs.
QUIET_SHARE = 0.9

# Runs in a Python that may lack this package: llama.cpp's bindings can live in an environment of their own
LLAMA = """
import json, sys, time
import llama_cpp
path, threads, tokens, prompt = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
model = llama_cpp.Llama(path, n_ctx=512, n_threads=threads, n_threads_batch=threads, verbose=False)
model.eval(model.tokenize(prompt.encode()))
times = []
for _ in range(tokens):
    token = model.sample(temp=0.0)
    start = time.perf_counter()
    model.eval([token])
    times.append(time.perf_counter() - start)
memory = {key: int(value.split()[0]) * 1024 for key, value in
          (line.split(":") for line in open("/proc/self/status") if line.startswith(("VmRSS", "VmHWM")))}
print(json.dumps({"times": times, "memory": memory.get("VmRSS", 0), "peak": memory.get("VmHWM", 0)}))
"""


def bench_decode(
    model: str | Path,
    dense: str = "smollm2",
    threads: tuple[int, ...] = (1, 2),
    tokens: int = 64,
    rounds: int = 3,
    llama_python: str = sys.executable,
    gguf: str | Path | None = None,
    progress: bool = True,
) -> list[dict[str, Any]]:
    """Time greedy decoding at batch 1, one token after another.

    Every engine runs in its own process, and the engines take turns `rounds` times, so that all see the same machine.
    A figure is the median over all tokens of all rounds; sampling and detokenising are left out for all three.

    Parameters
    ----------
    model : str or Path
        A packed checkpoint.
    dense : str
        What transformers runs, in float32.
    threads : tuple of int
    tokens : int
        New tokens in a round.
    rounds : int
    llama_python : str
        A Python that can import llama_cpp; llama.cpp is left out if it cannot.
    gguf : str or Path, optional
        What llama.cpp runs; it is left out otherwise.
    progress : bool

    Returns
    -------
    One dict per engine and number of threads: engine, threads, time_ms (a token), tokens_per_s, memory_bytes (resident
    at the end), peak_bytes (most that was resident), rounds, tokens.
    """
    runs: dict[tuple[str, int], list[dict[str, Any]]] = {}
    plan = [(engine, count) for _ in range(rounds) for count in threads for engine in ENGINES]
    for engine, count in tqdm(plan, desc="bench decode", disable=not progress):
        found = run(engine, str(model), dense, count, tokens, llama_python, gguf)
        if found is not None:
            runs.setdefault((engine, count), []).append(found)
    return [summary(engine, count, tokens, found) for (engine, count), found in runs.items()]


def run(
    engine: str, model: str, dense: str, threads: int, tokens: int, llama_python: str, gguf: str | Path | None
) -> dict[str, Any] | None:
    """Times of each token, in seconds, and resident bytes of one engine's process; None if it is not there."""
    if engine == "llama.cpp":
        if gguf is None:
            return None
        command = [llama_python, "-c", LLAMA, str(gguf), str(threads), str(tokens), PROMPT]
    else:
        source = model if engine == "littlebit" else dense
        command = [sys.executable, "-m", "littlebit.fast.bench.decode", engine, source, str(threads), str(tokens)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        if engine == "llama.cpp" and "No module named" in done.stderr:
            return None
        raise OSError(f"{engine} failed: {done.stderr.strip().splitlines()[-1:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def summary(engine: str, threads: int, tokens: int, found: list[dict[str, Any]]) -> dict[str, Any]:
    """One row of `bench_decode`."""
    time_s = statistics.median([each for one in found for each in one["times"]])
    return {
        "engine": engine,
        "threads": threads,
        "time_ms": 1e3 * time_s,
        "tokens_per_s": 1 / time_s,
        "memory_bytes": statistics.median(one["memory"] for one in found),
        "peak_bytes": statistics.median(one["peak"] for one in found),
        "rounds": len(found),
        "tokens": tokens,
    }


def measure(engine: str, source: str, threads: int, tokens: int) -> dict[str, Any]:
    """What one process measures."""
    times = (packed_times if engine == "littlebit" else dense_times)(source, threads, tokens)
    return {"times": times, "memory": memory_bytes("VmRSS"), "peak": memory_bytes("VmHWM")}


def packed_times(source: str, threads: int, tokens: int) -> list[float]:
    """Seconds of each token through the compiled decoder, as `littlebit generate` runs it: without torch.

    Raises
    ------
    NotDecodableError
        If it cannot run the model.
    """
    return token_times(prompted(source, threads, tokens), tokens)


def prompted(source: str | Path, threads: int | None, tokens: int) -> "Decoder":
    """A decoder that has read PROMPT and has room for more tokens."""
    import numpy as np

    from ..decoding.cpu_decoder import Decoder
    from ..decoding.mapped_weights import map_model
    from ..decoding.tokenizer import Tokenizer

    folder = resolve(source)
    prompt = Tokenizer(folder)(PROMPT)["input_ids"]
    decoder = Decoder(map_model(folder, threads), len(prompt) + tokens)
    decoder(np.array(prompt))
    return decoder


def token_times(decoder: "Decoder", tokens: int) -> list[float]:
    """Seconds of each of the next greedy tokens."""
    import numpy as np

    times = []
    for _ in range(tokens):
        token = np.array([decoder.logits.argmax()])
        start = time.perf_counter()
        decoder(token)
        times.append(time.perf_counter() - start)
    return times


def bench_load(
    model: str | Path, threads: Sequence[int] = (1, 2), tokens: int = 32, rounds: int = 5, progress: bool = True
) -> list[dict[str, Any]]:
    """Time greedy decoding while the machine does nothing else, and while other programs keep all of its cores busy.

    Numbers of threads take turns within each round, first on the machine as it is, then beside as many busy programs as
    it has cores. A figure is the median over rounds of tokens by seconds: on a busy machine a few tokens wait long.

    Parameters
    ----------
    model : str or Path
        A checkpoint, or a known name.
    threads : sequence of int
    tokens : int
        In a round.
    rounds : int
    progress : bool

    Returns
    -------
    One dict for each load and number of threads: load ("quiet" or "busy"), busy (programs), threads, tokens_per_s,
    times_one_thread (over the first number of threads at the same load), core_share (processor time over time of the
    thread that decodes: below QUIET_SHARE other programs kept it waiting), rounds, tokens.
    """
    decoders = {count: prompted(model, count, 2 * rounds * tokens) for count in threads}
    speeds: dict[tuple[int, int], list[float]] = {}
    shares: dict[tuple[int, int], list[float]] = {}
    turns = [(programs, count) for _ in range(rounds) for programs in (0, cores()) for count in threads]
    for programs, count in tqdm(turns, desc="bench decode --under-load", disable=not progress):
        with busy(programs):
            start, begun = time.perf_counter(), time.thread_time()
            token_times(decoders[count], tokens)
            seconds, worked = time.perf_counter() - start, time.thread_time() - begun
        speeds.setdefault((programs, count), []).append(tokens / seconds)
        shares.setdefault((programs, count), []).append(worked / seconds)
    found = {key: statistics.median(each) for key, each in speeds.items()}
    return [
        {
            "load": "busy" if programs else "quiet",
            "busy": programs,
            "threads": count,
            "tokens_per_s": speed,
            "times_one_thread": speed / found[programs, threads[0]],
            "core_share": statistics.median(shares[programs, count]),
            "rounds": rounds,
            "tokens": tokens,
        }
        for (programs, count), speed in found.items()
    ]


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextlib.contextmanager
def busy(programs: int) -> Iterator[None]:
    """While active, so many other programs compute."""
    running = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(programs)]
    try:
        time.sleep(START_S if programs else 0)
        yield
    finally:
        for program in running:
            program.kill()
            program.wait()


def dense_times(source: str, threads: int, tokens: int) -> list[float]:
    """Seconds of each token through transformers, in float32 with its dynamic cache."""
    import torch

    from ..checkpoints.dense import load_model, load_tokenizer
    from ..models.build import transformers
    from ..models.hf_names import cache_argument

    torch.set_num_threads(threads)
    prompt = load_tokenizer(source)(PROMPT, return_tensors="pt")["input_ids"]
    model, times = load_model(source), []
    past = cache_argument(transformers().DynamicCache(config=model.config), model.forward)
    with torch.inference_mode():
        output = model(prompt, use_cache=True, **past)
        for _ in range(tokens):
            token = output.logits[:, -1:].argmax(-1)
            start = time.perf_counter()
            output = model(token, use_cache=True, **past)
            times.append(time.perf_counter() - start)
    return times


def memory_bytes(name: str) -> int:
    """Resident memory of this process, VmRSS now and VmHWM at most so far; 0 where the system does not say."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return 0
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(name)), 0)


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))))
