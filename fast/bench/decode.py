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
import tempfile
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


def bench_shape(
    shape: str = "llama2-7b",
    bits: Sequence[float] = (0.1, 0.55, 1.0),
    embedding_bits: int = 4,
    threads: Sequence[int] = (1, 2),
    tokens: int = 16,
    prompt: int = 512,
    rounds: int = 3,
    progress: bool = True,
) -> list[dict[str, Any]]:
    """Time prefill and greedy decoding of random packed models of a published shape, and dense prefill beside them.

    Each measurement runs in its own process, which loads the checkpoint as `littlebit generate` does.

    Parameters
    ----------
    shape : str
        A name in MODEL_SHAPES.
    bits : sequence of float
        Most stored bits per weight of the packed layers.
    embedding_bits : int
        Bits of an entry of the embedding and the head.
    threads : sequence of int
        Numbers of threads to measure.
    tokens : int
        New tokens in a round.
    prompt : int
        Tokens of the prompt that prefill reads.
    rounds : int
        Processes for each number of bits and threads.
    progress : bool
        Show a progress bar.

    Returns
    -------
    list of dict
        One for each number of bits and threads, with these columns:

        - engine, shape, bits, embedding_bits, threads, rounds, tokens, prompt
        - time_ms: milliseconds of a token; tokens_per_s = 1000 / time_ms
        - prefill_tokens_per_s
        - packed_bytes: all tensors of the file; memory_bytes, peak_bytes: resident memory of the process

        Then one for each number of threads with engine "torch bfloat16", whose prefill is the time of the linear
        layers of one block, times the number of blocks.
    """
    from ..checkpoints.checkpoint import info
    from .random_model import random_checkpoint

    runs: dict[tuple[float, int], list[dict[str, Any]]] = {}
    stored: dict[float, dict[str, Any]] = {}
    plan = [(target, count) for target in bits for _ in range(rounds) for count in threads]
    with tempfile.TemporaryDirectory(prefix="littlebit-bench-") as folder:
        for target, count in tqdm(plan, desc="bench decode", disable=not progress):
            path = Path(folder, f"{target:g}")
            if target not in stored:
                random_checkpoint(path, shape, target, embedding_bits=embedding_bits)
                stored[target] = info(path)
            found = run_engine("littlebit", str(path), "", count, tokens, sys.executable, None, prompt)
            assert found is not None
            runs.setdefault((target, count), []).append(found)
    common = {"shape": shape, "embedding_bits": embedding_bits, "prompt": prompt}
    rows = [
        common
        | summary("littlebit", count, tokens, found)
        | {"bits": stored[target]["bits_per_weight"], "packed_bytes": stored[target]["file_bytes"]}
        | {"prefill_tokens_per_s": prompt / statistics.median(one["prefill_s"] for one in found)}
        for (target, count), found in runs.items()
    ]
    for count in threads:
        seconds = statistics.median(dense_prefill_seconds(shape, prompt, count) for _ in range(rounds))
        row = {"engine": "torch bfloat16", "threads": count, "rounds": rounds, "bits": 16.0}
        rows.append(common | row | {"prefill_tokens_per_s": prompt / seconds})
    return rows


def dense_prefill_seconds(shape: str, prompt: int, threads: int) -> float:
    """Time torch's bfloat16 linear layers of one block of a shape on a prompt, and multiply by the number of blocks."""
    import torch
    from torch.nn import functional

    from ..memory import MODEL_SHAPES, linear_shapes

    one = MODEL_SHAPES[shape]._replace(layers=1)
    weights = [torch.randn(*size, dtype=torch.bfloat16) for size in linear_shapes(one).values()]
    inputs = [torch.randn(prompt, weight.shape[1], dtype=torch.bfloat16) for weight in weights]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        start = 0.0
        for _ in range(2):  # The first pass chooses kernels; the second is timed.
            start = time.perf_counter()
            for x, weight in zip(inputs, weights, strict=True):
                functional.linear(x, weight)
        return MODEL_SHAPES[shape].layers * (time.perf_counter() - start)
    finally:
        torch.set_num_threads(before)


def run_engine(
    engine: str,
    model: str,
    dense: str,
    threads: int,
    tokens: int,
    llama_python: str,
    gguf: str | Path | None,
    prompt: int = 0,
) -> dict[str, Any] | None:
    """Measure one engine in a new process; None if llama.cpp is not installed or has no model.

    With `prompt`, littlebit reads a prompt of this many random tokens in place of PROMPT.

    Returns
    -------
    dict with the seconds of each token (times), of the prompt for littlebit (prefill_s), and the resident bytes of the
    process (memory, peak).

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
        command = [sys.executable, "-m", "littlebit.fast.bench.decode", engine, source]
        command += [str(threads), str(tokens), str(prompt)]
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


def measure(engine: str, source: str, threads: int, tokens: int, prompt: int = 0) -> dict[str, Any]:
    """Measure littlebit or transformers in this process: seconds of prompt and tokens, and resident bytes.

    Raises
    ------
    NotDecodableError
        If the torch-free decoder, which `littlebit generate` uses, does not support the model.
    """
    found: dict[str, Any] = {}
    if engine == "littlebit":
        found["times"] = token_times(prefilled_decoder(source, threads, tokens), tokens)
        found |= resident()
        if prompt:  # last, because its keys and values take memory
            found["prefill_s"] = prefill_seconds(prefilled_decoder(source, threads, prompt), prompt)
        return found
    found["times"] = dense_times(source, threads, tokens)
    return found | resident()


def resident() -> dict[str, int]:
    """Read the resident bytes of this process, now and at their peak."""
    return {"memory": memory_bytes("VmRSS"), "peak": memory_bytes("VmHWM")}


def prefill_seconds(decoder: "Decoder", count: int) -> float:
    """Time a decoder that reads `count` random tokens at once."""
    import numpy as np

    tokens = np.random.default_rng(0).integers(0, 256, count)
    start = time.perf_counter()
    decoder(tokens)
    return time.perf_counter() - start


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
    print(json.dumps(measure(sys.argv[1], sys.argv[2], *map(int, sys.argv[3:]))))
