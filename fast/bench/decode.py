"""Benchmark decoding on a CPU: against transformers and llama.cpp, and on a machine that other programs keep busy.

`bench_decode` compares engines, each in its own process. `bench_load` shows what other programs cost: decoding with
several threads is a sequence of short parallel jobs, and a thread that does not run delays each of them.
"""

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
START_S = 0.3  # time to wait until the busy programs have started
#: A thread that always has work gets at least this share of a core, unless other programs take it.
QUIET_SHARE = 0.9

# This script runs in the Python that has llama.cpp's bindings, which may lack this package.
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
    """Time greedy decoding at batch 1 in littlebit, transformers and llama.cpp.

    Each engine runs in its own process, and the engines take turns `rounds` times, so that all see the same machine. A
    figure is the median over all tokens of all rounds. Choosing and detokenizing a token is not timed.

    Parameters
    ----------
    model : str or Path
        A packed checkpoint, for littlebit.
    dense : str
        The model that transformers runs, in float32.
    threads : tuple of int
        Numbers of threads to measure.
    tokens : int
        New tokens in a round.
    rounds : int
        Processes for each engine and number of threads.
    llama_python : str
        Path of a Python that can import llama_cpp; without it, llama.cpp is left out.
    gguf : str or Path, optional
        The model that llama.cpp runs; without it, llama.cpp is left out.
    progress : bool
        Show a progress bar.

    Returns
    -------
    list of dict
        One for each engine and number of threads, with these columns:

        - engine, threads, rounds, tokens
        - time_ms: milliseconds of a token; tokens_per_s = 1000 / time_ms
        - memory_bytes: resident memory of the process at its end; peak_bytes: the most it ever had
    """
    runs: dict[tuple[str, int], list[dict[str, Any]]] = {}
    plan = [(engine, count) for _ in range(rounds) for count in threads for engine in ENGINES]
    for engine, count in tqdm(plan, desc="bench decode", disable=not progress):
        found = run_engine(engine, str(model), dense, count, tokens, llama_python, gguf)
        if found is not None:
            runs.setdefault((engine, count), []).append(found)
    return [summary(engine, count, tokens, found) for (engine, count), found in runs.items()]


def run_engine(
    engine: str, model: str, dense: str, threads: int, tokens: int, llama_python: str, gguf: str | Path | None
) -> dict[str, Any] | None:
    """Measure one engine in a new process; None if llama.cpp is not installed or has no model.

    Returns
    -------
    dict with the seconds of each token (times) and the resident bytes of the process (memory, peak).

    Raises
    ------
    OSError
        If the process fails.
    """
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
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise OSError(f"{engine} must decode {tokens} tokens, but its process exited with {done.returncode}: {last}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def summary(engine: str, threads: int, tokens: int, found: list[dict[str, Any]]) -> dict[str, Any]:
    """Compute one row of `bench_decode` from all its rounds."""
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
    """Measure littlebit or transformers in this process: seconds of each token, and resident bytes."""
    times = (packed_times if engine == "littlebit" else dense_times)(source, threads, tokens)
    return {"times": times, "memory": memory_bytes("VmRSS"), "peak": memory_bytes("VmHWM")}


def packed_times(source: str, threads: int, tokens: int) -> list[float]:
    """Time each token of the torch-free decoder, which `littlebit generate` uses; in seconds.

    Raises
    ------
    NotDecodableError
        If the torch-free decoder does not support the model.
    """
    return token_times(prefilled_decoder(source, threads, tokens), tokens)


def prefilled_decoder(source: str | Path, threads: int | None, tokens: int) -> "Decoder":
    """Load a decoder, prefill it with PROMPT, and leave room for `tokens` more tokens in its cache."""
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
    """Decode greedily, and return the seconds of each token."""
    import numpy as np

    times = []
    for _ in range(tokens):
        token = np.array([decoder.logits.argmax()])
        start = time.perf_counter()
        decoder(token)
        times.append(time.perf_counter() - start)
    return times


def bench_load(
    model: str | Path, threads: Sequence[int] = (1, 2), tokens: int = 32, rounds: int = 9, progress: bool = True
) -> list[dict[str, Any]]:
    """Time greedy decoding on a quiet machine, and while other programs keep all of its cores busy.

    In each round the numbers of threads take turns, first without other programs, then with one busy program for each
    core. Every other round takes them in reverse, so that none always comes after the same one. A figure is the median
    over rounds of tokens / seconds. Single tokens are not used, because on a busy machine few of them take most of the
    time.

    Parameters
    ----------
    model : str or Path
        A checkpoint, or a known name.
    threads : sequence of int
        Numbers of threads to measure.
    tokens : int
        New tokens in a round.
    rounds : int
        Measurements of each load and number of threads.
    progress : bool
        Show a progress bar.

    Returns
    -------
    list of dict
        One for each load and number of threads, with these columns:

        - load ("quiet" or "busy"), busy (number of other programs), threads, rounds, tokens
        - tokens_per_s, and times_one_thread: its ratio to the first number of threads at the same load
        - core_share: processor time of the decoding thread / elapsed time. Below QUIET_SHARE, other programs kept it
          waiting
    """
    decoders = {count: prefilled_decoder(model, count, 2 * rounds * tokens) for count in threads}
    speeds: dict[tuple[int, int], list[float]] = {}
    shares: dict[tuple[int, int], list[float]] = {}
    turns = [(programs, count) for programs in (0, cores()) for count in threads]
    turns = [turn for number in range(rounds) for turn in (turns if number % 2 == 0 else turns[::-1])]
    for programs, count in tqdm(turns, desc="bench decode --under-load", disable=not progress):
        with busy_programs(programs):
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
    """Count the cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextlib.contextmanager
def busy_programs(count: int) -> Iterator[None]:
    """Keep cores busy with `count` other programs inside a `with` block."""
    running = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        time.sleep(START_S if count else 0)
        yield
    finally:
        for program in running:
            program.kill()
            program.wait()


def dense_times(source: str, threads: int, tokens: int) -> list[float]:
    """Time each token of transformers, in float32 with its dynamic cache; in seconds."""
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
    """Read the resident bytes of this process: VmRSS now, VmHWM the peak; 0 if the system does not report them."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return 0
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(name)), 0)


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))))
