"""Time the packed layer, the decoder and the latent cache beside others: the `bench` command."""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from ..memory import KV_CACHES
from .arguments import Command, add_json, count, kv_cache, positive, shape
from .models import load_any
from .tables import text_table


class Measurement(NamedTuple):
    """What a benchmark found.

    Attributes
    ----------
    rows : list of dict
        For `--json` and `--save`.
    device : str
        Name of the processor or GPU.
    text : str
        The rows as a table.
    """

    rows: list[dict[str, Any]]
    device: str
    text: str


def add_arguments(sub: argparse.ArgumentParser) -> None:
    """Add the arguments of `littlebit bench`, in groups by benchmark."""
    sub.add_argument(
        "what",
        choices=list(BENCHMARKS),
        help="linear: packed layers; decode: text generation; cache: attention over a latent key-value cache; "
        "agreement: compare greedy texts with transformers",
    )
    sub.add_argument("--model", type=Path, help="decode, agreement: a packed checkpoint, or an included one's name")
    sub.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="linear, decode: where to run")
    sub.add_argument("--threads", type=count, default=1, help="CPU threads to use; decode tries 1 up to this many")
    sub.add_argument(
        "--bits", type=positive, nargs="+", help="bits per weight of random layers (default: several from 0.1 up)"
    )
    sub.add_argument("--paths", type=count, help="low-rank paths of random layers (default: 2, on a GPU 1)")
    sub.add_argument(
        "--batch",
        type=count,
        nargs="+",
        default=[1],
        help="linear: rows of the input, on a GPU one or several numbers; decode on a GPU: sequences",
    )
    sub.add_argument(
        "--model-shape", default="llama2-7b", help="cache, decode without --model: a shape of `littlebit memory`"
    )
    sub.add_argument(
        "--tokens",
        type=count,
        help="decode: tokens to time (default: 64 in a round, 32 under load, 256 on a GPU); agreement: tokens in each "
        "text (default: 64)",
    )
    add_linear(sub)
    add_decode(sub)
    add_gpu_decode(sub)
    add_json(sub)
    sub.add_argument("--save", type=Path, help="also write the rows, with device and commit, to this JSON file")


def add_linear(sub: argparse.ArgumentParser) -> None:
    """Add the options of `littlebit bench linear`."""
    group = sub.add_argument_group("linear")
    group.add_argument("--shape", type=shape, nargs="+", help="layer shapes D_OUTxD_IN (default: several of Llama-2's)")
    group.add_argument(
        "--tune", action="store_true", help="on a GPU: try several launch configurations and keep the fastest"
    )


def add_decode(sub: argparse.ArgumentParser) -> None:
    """Add the options of `littlebit bench decode` on a CPU."""
    group = sub.add_argument_group("decode on a CPU")
    group.add_argument("--dense", default="smollm2", help="dense model that transformers runs in float32")
    group.add_argument("--gguf", type=Path, help="model that llama.cpp runs, if llama_cpp is installed")
    group.add_argument("--llama-python", default=sys.executable, help="Python that has llama_cpp (default: this one)")
    group.add_argument("--prompt", type=count, default=512, help="without --model: tokens of the prompt to time")
    group.add_argument("--rounds", type=count, default=3, help="rounds, in which the engines take turns")
    group.add_argument(
        "--under-load",
        action="store_true",
        help="measure with 1 and more threads, on a quiet machine and beside programs that keep all cores busy",
    )


def add_gpu_decode(sub: argparse.ArgumentParser) -> None:
    """Add the options of `littlebit bench decode` on a GPU; `bench cache` has `--context` too."""
    from ..bench.cache import CONTEXTS

    group = sub.add_argument_group("decode on a GPU")
    group.add_argument(
        "--context",
        type=count,
        nargs="+",
        help=f"tokens in the prompt (default: 128); cache: tokens in it (default: {' '.join(map(str, CONTEXTS))})",
    )
    group.add_argument(
        "--kv-cache",
        type=kv_cache,
        choices=KV_CACHES,
        nargs="+",
        default=["full"],
        help="cache types of the packed model",
    )
    group.add_argument("--no-peers", action="store_true", help="time the packed model alone")
    group.add_argument("--profile", action="store_true", help="also print the time of each part of a step")


def run(arguments: argparse.Namespace) -> None:
    """Run one benchmark, save its rows if asked to, and print them."""
    import torch

    from ..bench.timing import save_results
    from ..files.atomic import check_file

    if arguments.save:
        check_file(arguments.save)
    on_gpu = arguments.device == "cuda"
    if on_gpu and not torch.cuda.is_available():
        raise ValueError("--device cuda needs a GPU, but torch sees no GPU: use --device cpu")
    if arguments.model is None and arguments.what == "agreement":
        raise ValueError(f"bench {arguments.what} needs a packed checkpoint: name one with --model")
    found = BENCHMARKS[arguments.what](arguments)
    if arguments.save:
        save_results(arguments.save, found.rows, arguments.command_line, found.device)
    print(json.dumps(found.rows) if arguments.json else found.text)


def measure_linear(arguments: argparse.Namespace) -> Measurement:
    """Time packed layers of random signs beside torch's layers of 16, 8 and 4 bits."""
    chosen = {key: tuple(getattr(arguments, key)) for key in ("shape", "bits") if getattr(arguments, key)}
    if arguments.device == "cuda":
        import torch

        from ..bench.linear_cuda import BITS as CUDA_BITS, SHAPES as CUDA_SHAPES, bench_linear_cuda

        device, error, dense = torch.cuda.get_device_name(), "error", "fp16 us"
        shapes, bits = chosen.get("shape", CUDA_SHAPES), chosen.get("bits", CUDA_BITS)
        rows = bench_linear_cuda(shapes, bits, arguments.paths or 1, arguments.batch, arguments.tune)
    else:
        from ..bench.linear import BITS, SHAPES, bench_linear
        from ..bench.timing import cpu_name

        device, error, dense = cpu_name(), "max_error", "bf16 us"
        shapes, bits = chosen.get("shape", SHAPES), chosen.get("bits", BITS)
        rows = bench_linear(shapes, bits, arguments.batch[0], arguments.threads, arguments.paths or 2)
    more = {"int8_us": "int8 us", "int4_us": "int4 us", "gemlite_us": "gemlite us"}
    more |= {"one_thread_us": "1 thread us", "times_one_thread": "speed-up by threads"}
    more = {key: title for key, title in more.items() if any(row.get(key) is not None for row in rows)}
    table = [
        {"d_out x d_in": f"{row['d_out']} x {row['d_in']}", "bits": f"{row['bits']:.3f}", "rank": row["rank"]}
        | {"batch": row["batch"], "packed us": f"{row['time_us']:.1f}", dense: f"{row['dense_us']:.1f}"}
        | {"speed-up": f"{row['speedup']:.1f}x", "error": f"{row[error]:.1e}"}
        | {title: "" if row[key] is None else f"{row[key]:.2f}" for key, title in more.items()}
        for row in rows
    ]
    return Measurement(rows, device, text_table(table))


def measure_decode(arguments: argparse.Namespace) -> Measurement:
    """Time text generation: on a GPU, on a busy CPU, or beside other engines on a CPU."""
    if arguments.device == "cuda":
        return measure_decode_cuda(arguments)
    if arguments.under_load:
        return measure_decode_under_load(arguments)
    if arguments.model is None:
        return measure_decode_shape(arguments)
    from ..bench.decode import bench_decode
    from ..bench.timing import cpu_name
    from ..checkpoints.checkpoint import info

    stored = info(arguments.model)
    rows = bench_decode(
        arguments.model,
        arguments.dense,
        tuple(range(1, arguments.threads + 1)),
        arguments.tokens or 64,
        arguments.rounds,
        arguments.llama_python,
        arguments.gguf,
    )
    rows = [row | {key: stored[key] for key in ("bits_per_weight", "embedding_bits")} for row in rows]
    table = [
        {"engine": row["engine"], "threads": row["threads"], "ms/token": f"{row['time_ms']:.2f}"}
        | {"tokens/s": f"{row['tokens_per_s']:.1f}", "resident MB": f"{row['memory_bytes'] / 1e6:.0f}"}
        | {"peak MB": f"{row['peak_bytes'] / 1e6:.0f}"}
        for row in rows
    ]
    return Measurement(rows, cpu_name(), text_table(table))


def measure_decode_shape(arguments: argparse.Namespace) -> Measurement:
    """Time prefill and decoding of random models of a published shape on a CPU."""
    from ..bench.decode import bench_shape
    from ..bench.timing import cpu_name

    rows = bench_shape(
        arguments.model_shape,
        arguments.bits or (0.1, 0.55, 1.0),
        threads=range(1, arguments.threads + 1),
        tokens=arguments.tokens or 16,
        prompt=arguments.prompt,
        rounds=arguments.rounds,
    )
    table = [
        {"engine": row["engine"], "bits": f"{row['bits']:.3f}", "threads": row["threads"]}
        | {"tokens/s": f"{row['tokens_per_s']:.1f}" if "tokens_per_s" in row else ""}
        | {"prefill tokens/s": f"{row['prefill_tokens_per_s']:.1f}"}
        | {"packed MB": f"{row['packed_bytes'] / 1e6:.0f}" if "packed_bytes" in row else ""}
        | {"resident MB": f"{row['memory_bytes'] / 1e6:.0f}" if "memory_bytes" in row else ""}
        for row in rows
    ]
    return Measurement(rows, cpu_name(), text_table(table))


def measure_decode_under_load(arguments: argparse.Namespace) -> Measurement:
    """Time text generation on a quiet CPU, and beside programs that keep all cores busy."""
    from ..bench.decode import QUIET_SHARE, bench_load, cores
    from ..bench.timing import cpu_name

    most = max(arguments.threads, min(2, cores()))
    model = arguments.model or "smollm2-0.55bit"
    rows = bench_load(model, range(1, most + 1), arguments.tokens or 32, arguments.rounds)
    table = [
        {"machine": f"{row['busy']} other busy programs" if row["busy"] else "quiet", "threads": row["threads"]}
        | {"tokens/s": f"{row['tokens_per_s']:.1f}", "speed-up by threads": f"{row['times_one_thread']:.2f}"}
        | {"core share": f"{row['core_share']:.0%}"}
        for row in rows
    ]
    text = text_table(table)
    if any(row["core_share"] < QUIET_SHARE for row in rows if not row["busy"]):
        text += "\nThe machine was not quiet: other programs took processor time, so all speeds are too low."
    return Measurement(rows, cpu_name(), text)


def measure_decode_cuda(arguments: argparse.Namespace) -> Measurement:
    """Time text generation on a GPU: a checkpoint, or random models of a published shape."""
    import torch

    from ..bench.decode_cuda import bench_checkpoint_cuda, bench_decode_cuda
    from ..checkpoints.checkpoint import info

    common = {"contexts": arguments.context or [128], "tokens": arguments.tokens or 256, "batch": arguments.batch[0]}
    common |= {"profile": arguments.profile, "kv_caches": arguments.kv_cache}
    if arguments.model:
        rows = bench_checkpoint_cuda(load_any(arguments.model, "cuda", torch.float16), **common)
        stored = info(arguments.model)["bits_per_weight"]
        rows = [{"model": str(arguments.model), "bits": stored} | row for row in rows]
    else:
        chosen = {key: getattr(arguments, key) for key in ("bits", "paths") if getattr(arguments, key)}
        rows = bench_decode_cuda(arguments.model_shape, peers=not arguments.no_peers, **common, **chosen)
    table = [
        {"engine": row["engine"], "bits": f"{row['bits']:.3f}", "batch": row["batch"], "context": row["context"]}
        | {"cache": row["kv_cache"], "ms/step": f"{row['time_ms']:.3f}", "tokens/s": f"{row['tokens_per_s']:.1f}"}
        | {"weights GB": f"{row['weights_bytes'] / 1e9:.3f}", "of copy speed": f"{row['fraction_of_copy']:.1%}"}
        | {"peak GB": f"{row['peak_bytes'] / 1e9:.2f}"}
        for row in rows
    ]
    head, *lines = text_table(table).splitlines()
    text = [head]
    for line, row in zip(lines, rows, strict=True):
        text.append(line)
        for part in row.get("parts", []):
            text.append(
                f"    {part['part']:<14}{part['calls']:>4} x {part['time_us']:>8.2f} us = {part['step_us']:>9.1f} us"
            )
    return Measurement(rows, torch.cuda.get_device_name(), "\n".join(text))


def measure_cache(arguments: argparse.Namespace) -> Measurement:
    """Time one layer's attention for one token, with a latent and with a full key-value cache."""
    from ..bench.cache import CONTEXTS, bench_cache, crossover
    from ..bench.linear import BITS
    from ..bench.timing import cpu_name

    contexts = tuple(arguments.context or CONTEXTS)
    rows = [row for bits in arguments.bits or BITS for row in bench_cache(arguments.model_shape, bits, contexts)]
    table = [
        {"bits": f"{row['bits']:g}", "cache": row["kind"], "context": row["context"], "us": f"{row['time_us']:.0f}"}
        | {"full us": f"{row['ordinary_us']:.0f}", "speed": f"{row['speed']:.2f}x"}
        | {"bytes": f"{row['bytes_per_token']:.0f}", "full bytes": f"{row['ordinary_bytes_per_token']:.0f}"}
        for row in rows
    ]
    lines = [f"{arguments.model_shape}: time of one token in one layer; bytes of one token in all layers.", ""]
    lines += [
        "Speed = time with the full cache / time with the latent cache. The full cache's bytes are in float16.",
        "",
    ]
    lines.append(text_table(table))
    for bits, cache_type in dict.fromkeys((row["bits"], row["kind"]) for row in rows):
        tokens = crossover([row for row in rows if (row["bits"], row["kind"]) == (bits, cache_type)])
        faster = "slower than the full cache at each of these" if tokens is None else f"faster from {tokens:.0f} tokens"
        lines.append(f"{bits:g} bits, {cache_type}: {faster}")
    return Measurement(rows, cpu_name(), "\n".join(lines))


def measure_agreement(arguments: argparse.Namespace) -> Measurement:
    """Compare greedy texts and logits of the CPU decoder with transformers."""
    from ..bench.timing import cpu_name
    from ..checkpoints.checkpoint import load
    from ..checkpoints.dense import load_tokenizer
    from ..decoding.parity import measure_parity

    rows = measure_parity(load(arguments.model), load_tokenizer(arguments.model), count=arguments.tokens or 64)
    table = [
        {"prompt": row["prompt"].splitlines()[0], "equal tokens": f"{row['same']} / {row['tokens']}"}
        | {"smallest gap": f"{row['gap']:.1e}", "error": f"{row['error']:.1e}"}
        | {"transformers' error": f"{row['transformers_error']:.1e}", "of bound": f"{row['bound_share']:.1e}"}
        for row in rows
    ]
    return Measurement(rows, cpu_name(), text_table(table))


BENCHMARKS: dict[str, Callable[[argparse.Namespace], Measurement]] = {
    "linear": measure_linear,
    "decode": measure_decode,
    "cache": measure_cache,
    "agreement": measure_agreement,
}

COMMANDS = {
    "bench": Command(
        run,
        add_arguments,
        "Time packed layers, text generation or a latent cache beside others, or compare texts with transformers.",
        (
            "bench linear --shape 4096x11008 --bits 0.1",
            "bench decode --model out --threads 2",
            "bench decode --model-shape llama2-7b --bits 0.1 0.55 1 --threads 2",
            "bench decode --under-load --json",
            "bench decode --device cuda --model-shape llama2-7b --bits 0.1 0.55 1",
            "bench cache --bits 0.1",
        ),
    )
}
