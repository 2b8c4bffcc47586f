"""The `littlebit` command."""

import argparse
import contextlib
import copy
import io
import json
import logging
import os
import shlex
import shutil
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ...reference._renamed import renamed_value
from .._checks import LittleBitWarning, check_number
from ..checkpoints.fetch import fetch, locate_packed, resolve
from ..checkpoints.format import damage, is_checkpoint, is_official
from ..checkpoints.names import known_names
from ..memory import KV_CACHES, MODEL_SHAPES, model_memory
from .completion import SHELLS, completion

if TYPE_CHECKING:
    import torch

    from ..evaluation.zero_shot import BlimpResult
    from ..models.quantize import Config
    from ..training.trainer import TrainConfig

log = logging.getLogger(__name__)
USER_ERROR, INTERRUPTED, CLOSED_PIPE, STOPPED = 2, 130, 141, 143  # the last three: 128 + the signal
LIGHT = ("generate", "completion", "memory", "demo")  # commands that do not import torch, or only if they must
EXIT_CODES = """exit codes:
  0    done
  1    a mistake in littlebit itself, with a traceback; please report it
  2    it could not be done; the message says why, and what to do
  130  stopped by Ctrl-C; no unfinished output is left
  141  whoever read the output closed it, as `head` does
  143  stopped by a signal; no unfinished output is left. If `train` saved its state, the same command goes on
"""
EXAMPLES = {
    "fetch": ["fetch smollm2", "fetch smollm2-0.55bit --json"],
    "quantize": [
        "quantize smollm2 out --bits 0.55 --init admm --paths 1",
        "quantize smollm2 out --bits 0.55 --dry-run",
        "quantize MODEL out --bits 1 --exclude '*.down_proj' --report report.html",
    ],
    "train": [
        "train tiny out --bits 1.5 --tokens 500000 --sequence 128 --batch 16",
        "train smollm2 out --bits 0.55 --tokens 40000000 --data texts/*.txt",
    ],
    "eval": ["eval out --text some.txt", "eval smollm2-0.55bit --json", "eval out --blimp blimp.zip --blimp-items 20"],
    "generate": [
        "generate smollm2-0.55bit --prompt 'Once upon a time'",
        "generate out --prompt Hi --chat --temperature 0.8",
    ],
    "info": ["info out", "info smollm2-0.55bit --json"],
    "verify": ["verify out", "verify smollm2-0.55bit --json"],
    "export": ["export out theirs --to official --unpacked", "export out model.gguf --to gguf --precision q8_0"],
    "memory": ["memory llama2-7b --bits 0.3 0.1 --context 4096"],
    "demo": ["demo --out build/demo"],
    "bench": [
        "bench linear --shape 4096x11008 --bits 0.1",
        "bench decode --model out --threads 2",
        "bench decode --under-load --json",
        "bench decode --device cuda --model-shape llama2-7b --bits 0.1 0.55 1",
        "bench cache --bits 0.1",
    ],
    "tune": ["tune --model out", "tune --model-shape llama2-7b --bits 0.1 0.55 1"],
    "completion": ["completion bash > ~/.local/share/bash-completion/completions/littlebit"],
}


class Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Help with defaults, and with examples as they are written."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Returns one of EXIT_CODES, after a message on standard error if it is not 0.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a letter that the terminal's encoding lacks
    try:
        with terminable(), quiet_libraries():
            arguments = parser(argv[0] if argv else "").parse_args(argv)
            arguments.typed = shlex.join(["littlebit", *argv])
            if arguments.command not in LIGHT:
                use_torch(getattr(arguments, "threads", None))
            code = arguments.run(arguments) or 0
            sys.stdout.flush()
            return code
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
        return failed(error)
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and "can't allocate memory" not in str(error):  # torch's, on a CPU
            raise
        return failed(MemoryError("out of memory; --dry-run says how much is needed"))


def failed(error: Exception) -> int:
    """Say on standard error why it could not be done; returns the exit code of that."""
    print(f"littlebit: error: {' '.join(str(error).splitlines())}", file=sys.stderr)
    return USER_ERROR


class Terminated(BaseException):
    """SIGTERM, as an exception that cleans up on its way."""


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """While active, SIGTERM raises Terminated."""

    def stop(number: int, frame: Any) -> None:
        raise Terminated

    try:
        before = signal.signal(signal.SIGTERM, stop)
    except ValueError:  # only the main thread may
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)  # None: not set by Python


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """While active, warnings of libraries are not shown, and this package's own take one line of standard error."""

    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        print(f"littlebit: warning: {message}", file=sys.stderr)

    for library in ("transformers", "huggingface_hub", "lm_eval"):
        logging.getLogger(library).setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", LittleBitWarning)
        warnings.showwarning = show
        yield


def discard_output() -> None:
    """Send what is still to be written to standard output nowhere: its reader is gone."""
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


def use_torch(threads: int | None = None) -> None:
    """Set the number of CPU threads, if it is given, and quieten transformers."""
    import torch

    if threads:
        torch.set_num_threads(threads)
    try:
        from transformers.utils import logging as hf_logging
    except ImportError:
        return
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()


def parser(only: str | None = None) -> argparse.ArgumentParser:
    """The command's arguments; those of the one subcommand alone, if it is named, as others' would import torch."""
    top = argparse.ArgumentParser(
        prog="littlebit",
        description="Sub-1-bit quantisation of language models.",
        epilog=EXIT_CODES,
        formatter_class=Formatter,
    )
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (run, add_arguments, text) in COMMANDS.items():
        examples = "examples:\n" + "".join(f"  littlebit {example}\n" for example in EXAMPLES[name])
        sub = commands.add_parser(name, help=text, description=text, epilog=examples, formatter_class=Formatter)
        sub.set_defaults(run=run)
        if only in (None, name):
            add_arguments(sub)
    return top


def model_help() -> str:
    """What a model can be given as."""
    return f"a known name ({', '.join(known_names())}), a directory, a .gguf file or a hub id"


def fetch_arguments(sub: argparse.ArgumentParser) -> None:
    """Arguments of `littlebit fetch`."""
    sub.add_argument("name", help=f"one of: {', '.join(known_names())}")
    add_json(sub)


def quantize_arguments(sub: argparse.ArgumentParser) -> None:
    """Arguments of `littlebit quantize`."""
    sub.add_argument("model", help=model_help())
    sub.add_argument("out", type=Path, help="directory to write")
    add_quantisation(sub)
    sub.add_argument(
        "--embedding-bits", type=int, choices=[16, 8, 4], default=16, help="bits of an entry of embedding and head"
    )
    sub.add_argument("--overwrite", action="store_true", help="replace an existing checkpoint")
    sub.add_argument("--device", type=device, default="cpu", help="a torch device, such as cpu or cuda")
    sub.add_argument("--report", type=Path, metavar="HTML", help="also write a page with the table and pictures")
    add_answer(sub)


def train_arguments(sub: argparse.ArgumentParser) -> None:
    """Arguments of `littlebit train`."""
    from ..evaluation.perplexity import TRAINING_TEXT

    sub.add_argument("model", help=model_help())
    sub.add_argument("out", type=Path, help="directory to write; OUT.training keeps the state, to go on from")
    sub.add_argument(
        "--data", type=Path, nargs="+", default=[TRAINING_TEXT], help="UTF-8 texts (.xz allowed), or tokens (.npy)"
    )
    sub.add_argument(
        "--weights", type=not_negative, nargs="+", help="how often each text is drawn from; by default its length"
    )
    add_quantisation(sub)
    sub.set_defaults(init="admm", paths="1")
    add_training(sub)
    sub.add_argument("--device", help="cpu or cuda; by default cuda where there is one")
    sub.add_argument("--threads", type=count, help="CPU threads; torch's default if not given")
    sub.add_argument("--no-compile", action="store_true", help="do not compile on a GPU")
    sub.add_argument("--shard", action="store_true", help="divide masters and teacher over the processes (FSDP2)")
    sub.add_argument("--save-minutes", type=not_negative, default=5.0, help="time between saved states")
    sub.add_argument("--log-steps", type=count, default=20, help="steps between entries of the log")
    sub.add_argument("--overwrite", action="store_true", help="replace an existing checkpoint")
    add_answer(sub)


def eval_arguments(sub: argparse.ArgumentParser) -> None:
    """Arguments of `littlebit eval`."""
    sub.add_argument("model", help=f"a packed checkpoint, or a dense model: {model_help()}")
    sub.add_argument("--text", type=Path, help="UTF-8 text file; if no task is asked for either, an included one")
    sub.add_argument(
        "--window",
        type=number(int, low=2),
        help="tokens in a window, of which the first is not scored; by default 2048, or all positions of a model that "
        "has fewer",
    )
    sub.add_argument("--max-windows", type=count, help="stop after so many windows")
    sub.add_argument("--blimp", type=Path, metavar="ZIP", help="accuracy on the minimal pairs in this archive of BLiMP")
    sub.add_argument("--blimp-items", type=count, help="only the first so many pairs of each paradigm")
    sub.add_argument("--lm-eval", metavar="TASK[,TASK]", help="run tasks of the lm-evaluation-harness")
    sub.add_argument("--lm-eval-include", type=Path, metavar="DIR", help="folder with YAML files of more such tasks")
    add_compute(sub)


def generate_arguments(sub: argparse.ArgumentParser) -> None:
    """Arguments of `littlebit generate`."""
    sub.add_argument("model", help=f"a packed checkpoint, or a dense model: {model_help()}")
    sub.add_argument("--prompt", type=utf8, required=True)
    sub.add_argument("--max-new-tokens", type=count, default=64)
    said = "by default what the model's generation_config.json says"
    sub.add_argument("--temperature", type=not_negative, help=f"0 for greedy decoding; {said}, else 0")
    sub.add_argument("--top-k", type=number(int, low=0), help=f"sample among the likeliest, 0 for all; {said}")
    sub.add_argument("--top-p", type=number(float, above=0, high=1), help=f"and among those that hold it; {said}")
    sub.add_argument(
        "--min-p",
        type=number(float, low=0, high=1),
        help=f"sample tokens this probable, relative to the likeliest; {said}",
    )
    sub.add_argument(
        "--repetition-penalty",
        type=number(float, low=0.001, high=1000),
        help=f"divides positive logits of tokens in the text; {said}",
    )
    sub.add_argument("--seed", type=seed, default=0)
    sub.add_argument("--chat", action="store_true", help="put the prompt into the model's chat template")
    sub.add_argument(
        "--kv-cache",
        type=kv_cache,
        choices=KV_CACHES,
        default="full",
        help="full (keys and values), or latents, which take less memory and more time",
    )
    add_compute(sub)


def info_arguments(sub: argparse.ArgumentParser) -> None:
    """Arguments of `littlebit info` and `verify`."""
    sub.add_argument("model", help="a packed checkpoint, ours or the authors'")
    add_json(sub)


def export_arguments(sub: argparse.ArgumentParser) -> None:
    """Arguments of `littlebit export`."""
    from ..checkpoints.gguf import PRECISIONS

    sub.add_argument("model", help="a packed checkpoint, ours or the authors'")
    sub.add_argument("out", type=Path, help="what to write")
    sub.add_argument(
        "--to", choices=list(EXPORTS), required=True, help="official: the authors' format; gguf: dense, for llama.cpp"
    )
    sub.add_argument("--precision", choices=PRECISIONS, default=PRECISIONS[0], help="gguf: how weights are stored")
    sub.add_argument(
        "--unpacked",
        action="store_true",
        help="official: write signs as float16, 16 times the size, which every version of the authors' code reads; one "
        "of them reads packed signs wrongly",
    )
    sub.add_argument("--overwrite", action="store_true", help="replace an existing checkpoint")
    add_json(sub)


def completion_arguments(sub: argparse.ArgumentParser) -> None:
    """Arguments of `littlebit completion`."""
    sub.add_argument("shell", choices=SHELLS)


def memory_arguments(sub: argparse.ArgumentParser) -> None:
    """Arguments of `littlebit memory`."""
    sub.add_argument("shape", nargs="*", default=list(MODEL_SHAPES), help=f"among {', '.join(MODEL_SHAPES)}")
    sub.add_argument("--bits", type=positive, nargs="*", default=[0.55, 0.3, 0.1], help="beside float16")
    sub.add_argument("--paths", type=count, default=2, help="of each quantised layer")
    sub.add_argument(
        "--embedding-bits", type=int, nargs="+", choices=[16, 8, 4], default=[16, 8, 4], help="of embedding and head"
    )
    sub.add_argument("--context", type=count, default=4096, help="tokens in the key-value cache")
    sub.add_argument("--kv-cache", type=kv_cache, choices=KV_CACHES, default="latent", help="of the quantised models")
    add_json(sub)


def demo_arguments(sub: argparse.ArgumentParser) -> None:
    """Arguments of `littlebit demo`."""
    sub.add_argument("--out", type=Path, default=Path("build/demo"), help="folder for the models and the picture")


def bench_arguments(sub: argparse.ArgumentParser) -> None:
    """Arguments of `littlebit bench`."""
    from ..bench.cache import CONTEXTS

    sub.add_argument("what", choices=["linear", "decode", "cache", "agreement"])
    sub.add_argument("--model", type=Path, help="decode, agreement: a packed checkpoint, or the name of a shipped one")
    sub.add_argument("--dense", default="smollm2", help="decode: what transformers runs in float32")
    sub.add_argument("--gguf", type=Path, help="decode: what llama.cpp runs, if llama_cpp can be imported")
    sub.add_argument("--llama-python", default=sys.executable, help="decode: a Python that can import llama_cpp")
    sub.add_argument(
        "--tokens",
        type=count,
        help="decode: that are timed (by default 64 in a round, on a GPU 256); agreement: of a text",
    )
    sub.add_argument("--rounds", type=count, default=3, help="decode: rounds")
    sub.add_argument(
        "--under-load",
        action="store_true",
        help="decode on a CPU: one and several threads, quiet and beside programs that keep all cores busy",
    )
    sub.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="linear, decode: cuda for a GPU")
    sub.add_argument("--tune", action="store_true", help="linear on a GPU: try several launch plans, take the fastest")
    sub.add_argument("--shape", type=shape, nargs="+", help="D_OUTxD_IN; by default those of Llama-2's layers")
    sub.add_argument("--bits", type=positive, nargs="+", help="by default several from 0.1 up")
    sub.add_argument("--paths", type=count, help="by default 2, on a GPU 1")
    sub.add_argument(
        "--model-shape", default="llama2-7b", help="cache, decode on a GPU: a name that `littlebit memory` knows"
    )
    sub.add_argument(
        "--context",
        type=count,
        nargs="+",
        help=f"cache: tokens in it (by default {' '.join(map(str, CONTEXTS))}); decode on a GPU: of prompts (128)",
    )
    sub.add_argument(
        "--kv-cache",
        type=kv_cache,
        choices=KV_CACHES,
        nargs="+",
        default=["full"],
        help="decode on a GPU: of packed models",
    )
    sub.add_argument("--no-peers", action="store_true", help="decode on a GPU: the packed model alone")
    sub.add_argument("--profile", action="store_true", help="decode on a GPU: also say where a token's time goes")
    sub.add_argument(
        "--batch",
        type=count,
        nargs="+",
        default=[1],
        help="linear: rows of the input, on a GPU one or several; decode: sequences",
    )
    sub.add_argument("--threads", type=count, default=1)
    add_json(sub)
    sub.add_argument("--save", type=Path, help="also write the figures, with device and commit, to this JSON file")


def add_json(sub: argparse.ArgumentParser) -> None:
    """The option of the commands that have something to tell."""
    sub.add_argument("--json", action="store_true", help="print the result as JSON")


def add_answer(sub: argparse.ArgumentParser) -> None:
    """Arguments of the commands that write a checkpoint."""
    sub.add_argument("--dry-run", action="store_true", help="say what it will take, in bits, memory and time, and stop")
    add_json(sub)


def add_quantisation(sub: argparse.ArgumentParser) -> None:
    """Arguments of the commands that quantise a model."""
    from ..evaluation.perplexity import TRAINING_TEXT
    from ..models.quantize import ALLOCATIONS, INITS, Config

    sub.add_argument("--bits", type=positive, default=Config.bits, help="ceiling in stored bits per weight")
    sub.add_argument(
        "--paths",
        choices=["auto", "1", "2"],
        default=str(Config.paths),
        help="2 for primary and residual; auto chooses for each layer",
    )
    sub.add_argument("--init", choices=INITS, default=Config.init, help="how factors are found")
    sub.add_argument("--allocation", choices=ALLOCATIONS, default=Config.allocation, help="how ranks are divided")
    sub.add_argument(
        "--spread", type=number(float, low=1), help="sensitivity: largest factor between rank and uniform rank"
    )
    sub.add_argument("--importance", action="store_true", help="weigh channels by calibration (with --init admm)")
    sub.add_argument("--calibration", type=Path, default=TRAINING_TEXT, help="UTF-8 text to calibrate on")
    sub.add_argument("--calibration-tokens", type=number(int, low=2), default=8192, help="tokens of it to use")
    sub.add_argument("--include", nargs="+", default=list(Config.include), help="patterns of layer names")
    sub.add_argument("--exclude", nargs="+", default=list(Config.exclude), help="patterns of layer names")
    sub.add_argument("--split-fused", action="store_true", help="quantise the parts of fused projections one by one")
    sub.add_argument(
        "--kv-rank-factor",
        type=positive,
        default=1.0,
        help="rank of k_proj and v_proj in models with grouped queries, times",
    )
    sub.add_argument("--seed", type=seed, default=Config.seed)


def add_training(sub: argparse.ArgumentParser) -> None:
    """Arguments that become a TrainConfig."""
    from ..signs import RULES
    from ..training.student import TRAINABLE
    from ..training.trainer import OPTIMIZERS, TrainConfig

    sub.add_argument("--tokens", type=count, default=TrainConfig.tokens, help="training tokens in all")
    sub.add_argument("--sequence", type=count, default=TrainConfig.sequence, help="tokens in a sequence")
    sub.add_argument("--batch", type=count, default=TrainConfig.batch, help="sequences in a step, over all processes")
    sub.add_argument(
        "--micro-batch", type=count, help="sequences that a process handles at once; by default all of its"
    )
    sub.add_argument(
        "--lr-latents", type=not_negative, default=TrainConfig.lr_latents, help="highest learning rate of u, v"
    )
    sub.add_argument("--lr-scales", type=not_negative, default=TrainConfig.lr_scales, help="that of h, ell, g")
    sub.add_argument("--lr-others", type=not_negative, default=TrainConfig.lr_others, help="that of norms and the rest")
    sub.add_argument("--train", choices=TRAINABLE, default=TrainConfig.train, help="which other parameters are trained")
    sub.add_argument("--rule", choices=list(RULES), default=TrainConfig.rule, help="derivative of a sign")
    sub.add_argument("--hidden", type=not_negative, default=TrainConfig.hidden, help="weight of the hidden-state loss")
    sub.add_argument(
        "--block-tokens",
        type=number(int, low=0),
        default=0,
        help="of the tokens, those that train block by block first",
    )
    whole = number(int, low=0)
    sub.add_argument("--long-tokens", type=whole, default=0, help="of the tokens, the last ones, in longer sequences")
    sub.add_argument("--long-sequence", type=count, default=TrainConfig.long_sequence, help="tokens in such a sequence")
    sub.add_argument(
        "--frozen-tokens", type=whole, default=0, help="of the tokens, the last ones, which move no latent"
    )
    sub.add_argument(
        "--label-weight",
        type=number(float, low=0, high=1),
        default=0.0,
        help="share of the text's own next token in the target",
    )
    sub.add_argument(
        "--latent-scale", type=not_negative, default=0.0, help="root mean square of the latents at the start"
    )
    sub.add_argument("--optimizer", choices=OPTIMIZERS, default=TrainConfig.optimizer, help="what moves the latents")
    sub.add_argument(
        "--warmup",
        type=number(float, low=0, below=1),
        default=TrainConfig.warmup,
        help="part of the schedule that warms up",
    )
    sub.add_argument(
        "--final", type=not_negative, default=TrainConfig.final, help="last learning rates over the highest"
    )
    sub.add_argument(
        "--clip", type=not_negative, default=TrainConfig.clip, help="largest norm of the gradients; 0 for none"
    )


def add_compute(sub: argparse.ArgumentParser) -> None:
    """Arguments of the commands that run a model."""
    sub.add_argument("--device", type=device, default="cpu", help="a torch device, such as cpu or cuda")
    sub.add_argument("--threads", type=count, help="CPU threads; by default OMP_NUM_THREADS, or all")
    add_json(sub)


def number(kind: type[int] | type[float], **limits: float) -> Callable[[str], Any]:
    """Make a reader of numbers within `checks.check_number`'s limits, for argparse."""

    def read(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError as error:
            wanted = "whole number" if kind is int else "number"
            raise argparse.ArgumentTypeError(f"{text!r} is not a {wanted}") from error
        try:
            check_number("it", value, **limits, whole=kind is int)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error
        return value

    return read


count = number(int, low=1)
positive = number(float, above=0)
not_negative = number(float, low=0)
seed = number(int, low=0, below=2**63)


def utf8(text: str) -> str:
    """Read an argument as UTF-8, whatever encoding the locale names."""
    try:
        return os.fsencode(text).decode("utf-8")
    except UnicodeDecodeError as error:
        raise argparse.ArgumentTypeError(f"it is not UTF-8 text ({error})") from error


def shape(text: str) -> tuple[int, int]:
    """'4096x11008' as (4096, 11008)."""
    try:
        d_out, d_in = (count(part) for part in text.lower().split("x"))
    except (ValueError, argparse.ArgumentTypeError) as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not D_OUTxD_IN, such as 4096x11008") from error
    return d_out, d_in


def kv_cache(text: str) -> str:
    """Give the type of a key-value cache its present name: "ordinary" was what is "full" now."""
    return renamed_value("kv_cache", text)


def device(text: str) -> str:
    """The name of a device that torch can use here."""
    if text == "cpu":
        return text
    import torch

    try:
        torch.empty(0, device=text)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise argparse.ArgumentTypeError(f"torch cannot use {text!r} here ({reason}); try cpu") from error
    return text


def run_fetch(arguments: argparse.Namespace) -> None:
    """Run `littlebit fetch`."""
    path = fetch(arguments.name)
    print(json.dumps({"name": arguments.name, "path": str(path)}) if arguments.json else path)


def chosen(arguments: argparse.Namespace) -> "Config":
    """The Config that the arguments say."""
    from ..models.quantize import Config

    return Config(
        bits=arguments.bits,
        paths=None if arguments.paths == "auto" else int(arguments.paths),
        init=arguments.init,
        allocation=arguments.allocation,
        spread=arguments.spread,
        importance=arguments.importance,
        include=tuple(arguments.include),
        exclude=tuple(arguments.exclude),
        split_fused=arguments.split_fused,
        kv_rank_factor=arguments.kv_rank_factor,
        seed=arguments.seed,
    )


def quantisation(arguments: argparse.Namespace, tokenizer: Any) -> "tuple[Config, torch.Tensor | None]":
    """The Config that the arguments say, and the calibration tokens if it, or a 4-bit embedding, needs any."""
    from ..checkpoints.texts import text_tokens

    config, tokens = chosen(arguments), None
    if config.needs_calibration() or getattr(arguments, "embedding_bits", 16) == 4:
        tokens = text_tokens(tokenizer, arguments.calibration)[: arguments.calibration_tokens]
    return config, tokens


def run_quantize(arguments: argparse.Namespace) -> None:
    """Run `littlebit quantize`."""
    from ..checkpoints.checkpoint import info
    from ..checkpoints.dense import load_model, load_tokenizer
    from ..checkpoints.saving import check_target, save
    from ..files.atomic import check_file, check_room, place_of
    from ..models.embeddings import check_embeddings, quantize_embeddings_
    from ..models.quantize import quantize_, stored_bytes
    from .report import html_report, kind_table, kinds_of

    check_target(arguments.out, arguments.overwrite)
    check_apart(arguments.model, arguments.out)
    if arguments.report:
        check_file(arguments.report)
    if arguments.dry_run:
        return dry_run(arguments)
    tokenizer = load_tokenizer(arguments.model)
    config, tokens = quantisation(arguments, tokenizer)
    model = load_model(arguments.model, arguments.device)
    check_room(place_of(arguments.out), stored_bytes(model, config, arguments.embedding_bits))
    check_embeddings(model, arguments.embedding_bits)  # before hours of work
    results = quantize_(model, config, tokens)
    quantize_embeddings_(model, arguments.embedding_bits, tokens)
    save(model, arguments.out, tokenizer, config.bits, results, arguments.overwrite)
    stored = info(arguments.out)
    if arguments.report:
        html_report(arguments.report, f"{arguments.model} at {config.bits:g} bits", summary(stored), results)
    if arguments.json:
        rows = {name: asdict(result) for name, result in results.items()}
        print(json.dumps(stored | {"results": rows, "dense": dict(results.dense)}))
        return
    print(kind_table(kinds_of(results)))
    print(f"{arguments.out}: {summary(stored)}")
    print(f"next: littlebit eval {arguments.out}; or littlebit train {arguments.model} OUT --bits {config.bits:g}")


def check_apart(source: str, out: Path) -> None:
    """Raise ValueError if writing an output would remove the model that it is made from."""
    from ..files.atomic import place_of

    model, place = Path(source), place_of(out)
    if model.exists() and place_of(model).is_relative_to(place):
        raise ValueError(f"{out} holds the model {source} that is to be read; choose another output")


def dry_run(arguments: argparse.Namespace) -> None:
    """Say what `littlebit quantize` or `train` will take, and the recipe of a training."""
    from ..training.trainer import check_config
    from .estimate import estimate
    from .report import kind_table

    found = estimate(arguments.model, chosen(arguments), getattr(arguments, "tokens", 0))
    if "tokens" in arguments:
        training = training_config(arguments)
        check_config(training, int(os.environ.get("WORLD_SIZE", "1")))
        found |= {"training": asdict(training), "recipe": recipe(training)}
    if arguments.json:
        print(json.dumps(found))
        return
    rows = [
        {"kind": kind, "layers": row["layers"], "d_out x d_in": f"{row['d_out']} x {row['d_in']}"}
        | {"rank": "+".join(map(str, row["ranks"])), "bits": f"{row['bits']:.3f}"}
        for kind, row in found["kinds"].items()
    ]
    print(kind_table(rows))
    print(
        f"{found['bits_per_weight']:.4f} bits per weight in {found['layers']} layers, {found['linear_bytes']:,} bytes "
        f"of linear weights, about {found['file_bytes']:,} bytes in all"
    )
    for line in found.get("recipe", []):
        print(line)
    training = f", {duration(found['train_s'])} to train" if found["train_s"] else ""
    print(
        f"about {found['memory_bytes'] / 2**30:.2f} GiB of memory; on this CPU about {duration(found['quantise_s'])} "
        f"to quantise{training}; nothing was written"
    )


def training_config(arguments: argparse.Namespace) -> "TrainConfig":
    """The TrainConfig that the arguments of `littlebit train` say."""
    from ..training.trainer import TrainConfig

    return TrainConfig(
        **{field.name: getattr(arguments, field.name) for field in fields(TrainConfig) if field.name in arguments}
    )


def recipe(config: "TrainConfig") -> list[str]:
    """Say what a training will do: a line for each phase, and the settings that are not the defaults."""
    from ..training.trainer import TrainConfig, phases

    lines = []
    for phase in phases(config):
        kind = "each block by itself" if phase.blocks else "scales alone, signs frozen" if phase.frozen else "all"
        lines.append(
            f"steps {phase.first} to {phase.last}: {kind}, {config.step_tokens // phase.sequence} sequences of "
            f"{phase.sequence} tokens a step"
        )
    changed = {key: value for key, value in asdict(config).items() if value != getattr(TrainConfig, key)}
    lines.append("settings: " + (", ".join(f"{key} {value}" for key, value in changed.items()) or "the defaults"))
    return lines


def duration(seconds: float) -> str:
    """A time in the unit that suits it."""
    for size, unit in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(seconds, 1):.0f} s"


def run_train(arguments: argparse.Namespace) -> int | None:
    """Run `littlebit train`, in one process or as one of torchrun's."""
    from ..checkpoints.saving import check_target
    from ..training.trainer import TrainingError, TrainingStopped, joined_processes

    check_target(arguments.out, arguments.overwrite)
    check_apart(arguments.model, arguments.out)
    if arguments.dry_run:
        return dry_run(arguments)
    try:
        with joined_processes(arguments.device) as device:
            train(arguments, device)
    except TrainingStopped as stopped:
        print(f"littlebit: {stopped}", file=sys.stderr)
        return STOPPED
    except TrainingError as error:
        return failed(error)


def train(arguments: argparse.Namespace, device: str) -> None:
    """Quantise, train and save; only the first process writes and prints."""
    from ..checkpoints.checkpoint import info
    from ..checkpoints.dense import load_model, load_tokenizer
    from ..checkpoints.saving import save
    from ..checkpoints.texts import training_tokens
    from ..files.atomic import place_of
    from ..files.digests import digest
    from ..models.quantize import quantize_
    from ..training.resume import Keeper
    from ..training.trainer import check_config, checked_text, longest, process, train_

    tokenizer = load_tokenizer(arguments.model)
    texts = [training_tokens(tokenizer, path) for path in arguments.data]
    training = training_config(arguments)
    config, calibration = quantisation(arguments, tokenizer)
    out = place_of(arguments.out)
    state = out.with_name(out.name + ".training")
    measured = None if calibration is None else digest(calibration)
    keeper = Keeper(state, arguments.save_minutes, {"model": arguments.model, "calibration": measured} | asdict(config))
    if keeper.newest() is not None:  # what was trained takes the place of all factors, so the cheapest ones will do
        config = replace(config, init="dual-svid", importance=False)
    teacher = load_model(arguments.model, device)
    check_config(training, process()[1])  # before the model is quantised
    texts = [checked_text(text, teacher, longest(training)) for text in texts]
    model = copy.deepcopy(teacher)
    quantize_(model, config, calibration, progress=process()[0] == 0)
    log = train_(
        model,
        teacher,
        texts,
        training,
        arguments.weights,
        keeper,
        compile=not arguments.no_compile,
        shard=arguments.shard,
        log_steps=arguments.log_steps,
    )
    if process()[0] > 0:
        return
    save(model.cpu(), arguments.out, tokenizer, config.bits, overwrite=arguments.overwrite, log=log)
    shutil.rmtree(state, ignore_errors=True)
    stored = info(arguments.out)
    if arguments.json:
        print(json.dumps(stored | {"training": log[-1] if log else None}))
        return
    print(f"{arguments.out}: {summary(stored)}")
    if log:
        print(f"last loss {log[-1]['loss']:.4f} nats after {log[-1]['tokens']:,} tokens; the log is in training.jsonl")


def summary(stored: dict[str, Any]) -> str:
    """One line of `info`."""
    return (
        f"{stored['bits_per_weight']:.4f} bits per weight stored in {stored['layers']} layers "
        f"({stored['described_bits_per_weight']:.4f} with the names, checksums and config.json beside them), "
        f"{stored['linear_bytes']:,} bytes of linear weights, {stored['file_bytes']:,} bytes in all "
        f"({stored['file_bits_per_parameter']:.3f} bits per parameter; embeddings of {stored['embedding_bits']} bits)"
    )


def load_any(source: str, device: str, dtype: "torch.dtype | None" = None) -> "torch.nn.Module":
    """A packed checkpoint or a dense model, by default in float32."""
    from ..checkpoints.checkpoint import load
    from ..checkpoints.dense import load_model

    folder = resolve(source)
    packed = is_checkpoint(folder) or is_official(folder)
    reader: Callable[..., torch.nn.Module] = load if packed else load_model
    return reader(folder, device, **({"dtype": dtype} if dtype else {}))


def run_eval(arguments: argparse.Namespace) -> None:
    """Run `littlebit eval`."""
    from ..checkpoints.dense import load_tokenizer
    from ..checkpoints.texts import text_tokens
    from ..evaluation.perplexity import SAMPLE_TEXT, perplexity
    from ..evaluation.zero_shot import blimp, harness, lm_eval

    tokenizer = load_tokenizer(arguments.model)
    text = arguments.text or (None if arguments.blimp or arguments.lm_eval else SAMPLE_TEXT)
    tokens = text and text_tokens(tokenizer, text)
    if arguments.lm_eval:
        lm_eval()  # find out that it is missing before the work
    model = load_any(arguments.model, arguments.device)
    results: dict[str, Any] = {}
    reports = []
    if arguments.blimp:
        pairs = blimp(model, tokenizer, arguments.blimp, arguments.blimp_items)
        results["blimp"] = pairs._asdict()
        reports.append(blimp_table(pairs))
    if text and tokens is not None:
        whole = perplexity(model, tokens, arguments.window, arguments.max_windows)
        results |= whole._asdict() | {"text": str(text)}
        reports.append(
            f"perplexity {whole.perplexity:.4g} on {text.name} "
            f"({whole.windows} windows of {whole.window} tokens, {whole.scored} tokens scored)"
        )
    if arguments.lm_eval:
        tasks = harness(model, tokenizer, arguments.lm_eval.split(","), arguments.lm_eval_include)
        results["lm_eval"] = tasks.results
        reports.append(tasks.table)
    print(json.dumps(results) if arguments.json else "\n".join(reports))


def blimp_table(result: "BlimpResult") -> str:
    """Accuracy by paradigm and in the mean, as text."""
    lines = [f"{name:<54}{accuracy:>8.3f}" for name, accuracy in result.paradigms.items()]
    mean = f"BLiMP accuracy {result.accuracy:.4f} (mean of {len(lines)} paradigms, {result.pairs} pairs)"
    return "\n".join([*lines, mean])


def load_to_generate(arguments: argparse.Namespace) -> tuple[Any, Any]:
    """A model and its tokenizer: mapped into memory, where the compiled decoder can run it so, else in torch."""
    if arguments.device == "cpu" and arguments.kv_cache == "full":
        from ..decoding.architecture import NotDecodableError
        from ..decoding.mapped_weights import map_model
        from ..decoding.tokenizer import Tokenizer

        try:
            folder = resolve(arguments.model)
            return map_model(folder, arguments.threads), Tokenizer(folder)
        except NotDecodableError as reason:
            log.debug("littlebit: %s is loaded by torch: %s", arguments.model, reason)
    from ..checkpoints.dense import load_tokenizer

    use_torch(arguments.threads)
    return load_any(arguments.model, arguments.device), load_tokenizer(arguments.model)


def run_generate(arguments: argparse.Namespace) -> None:
    """Run `littlebit generate`."""
    from ..decoding.generate import generate, stream

    model, tokenizer = load_to_generate(arguments)
    if arguments.json:  # the first token loads the kernels, which is not decoding
        generate(model, arguments.prompt, 1, chat=arguments.chat, tokenizer=tokenizer, kv_cache=arguments.kv_cache)
    start = time.perf_counter()
    pieces = stream(
        model,
        arguments.prompt,
        arguments.max_new_tokens,
        arguments.temperature,
        arguments.top_k,
        arguments.top_p,
        arguments.seed,
        arguments.chat,
        tokenizer,
        arguments.kv_cache,
        min_p=arguments.min_p,
        repetition_penalty=arguments.repetition_penalty,
    )
    if arguments.json:
        text = "".join(pieces)
        seconds = time.perf_counter() - start
        count = len(tokenizer(text, add_special_tokens=False)["input_ids"])
        row = {"prompt": arguments.prompt, "text": text, "new_tokens": count, "seconds": seconds}
        print(json.dumps(row | {"tokens_per_s": count / seconds}))
        return
    for piece in pieces:
        print(piece, end="", flush=True)
    print()


def run_verify(arguments: argparse.Namespace) -> None:
    """Run `littlebit verify`; exit with 2 if something changed since it was saved."""
    from ..checkpoints.checkpoint import verify

    folder = locate_packed(arguments.model)
    found = verify(folder)
    if arguments.json:
        print(json.dumps(found))
    if found["damaged"]:
        raise damage(folder, found["damaged"])
    if not arguments.json:
        as_saved = "as they were saved (SHA-256)" if found["checksums"] else "consistent; it has no checksums"
        print(f"{arguments.model}: {found['tensors']} tensors of {found['tensor_bytes']:,} bytes are {as_saved}")


def run_info(arguments: argparse.Namespace) -> None:
    """Run `littlebit info`."""
    from ..checkpoints.checkpoint import info

    stored = info(arguments.model)
    if arguments.json:
        print(json.dumps(stored))
        return
    print(f"{arguments.model}: {summary(stored)}")
    width = 2 + max(map(len, ["q" * 10, *stored["kinds"]]))
    print(f"{'kind':<{width}}{'layers':>7}{'weights':>14}{'bytes':>12}{'bits':>8}")
    for name, kind in stored["kinds"].items():
        print(
            f"{name:<{width}}{kind['layers']:>7}{kind['weights']:>14,}{kind['linear_bytes']:>12,}"
            f"{kind['bits_per_weight']:>8.3f}"
        )


def export_official(arguments: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Write the authors' format; what was written, and the same in words."""
    from ..checkpoints.checkpoint import info, load
    from ..checkpoints.dense import load_tokenizer
    from ..checkpoints.official import save_official
    from ..checkpoints.saving import check_target

    check_target(arguments.out, arguments.overwrite)
    model, tokenizer = load(arguments.model), load_tokenizer(arguments.model)
    bits = info(arguments.model)["target_bits"]
    save_official(model, arguments.out, tokenizer, bits, arguments.overwrite, packed=not arguments.unpacked)
    stored = info(arguments.out)
    return stored, summary(stored)


def export_gguf(arguments: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Write the dense model that the packed one stands for; what was written, and the same in words."""
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


def run_export(arguments: argparse.Namespace) -> None:
    """Run `littlebit export`."""
    if arguments.unpacked and arguments.to != "official":
        raise ValueError(f"--unpacked is a variant of --to official, not of {arguments.to}: leave it out")
    check_apart(arguments.model, arguments.out)
    written, words = EXPORTS[arguments.to](arguments)
    print(json.dumps({"path": str(arguments.out)} | written) if arguments.json else f"{arguments.out}: {words}")


def run_completion(arguments: argparse.Namespace) -> None:
    """Run `littlebit completion`."""
    print(completion(parser(), arguments.shell), end="")


def run_memory(arguments: argparse.Namespace) -> None:
    """Run `littlebit memory`."""
    rows = []
    for name in arguments.shape:
        if name not in MODEL_SHAPES:
            raise ValueError(f"no shape {name!r} is known, only {', '.join(MODEL_SHAPES)}")
        for bits in (None, *arguments.bits):
            kind = "full" if bits is None else arguments.kv_cache
            for embedding_bits in arguments.embedding_bits:
                found = model_memory(MODEL_SHAPES[name], bits, arguments.paths, embedding_bits, arguments.context, kind)
                row = {"shape": name, "bits": bits, "embedding_bits": embedding_bits, "context": arguments.context}
                row |= {"kv_kind": kind} | {key: value for key, value in found._asdict().items() if key != "ranks"}
                rows.append(row | {"weights": found.weights, "total": found.total})
    if arguments.json:
        print(json.dumps(rows))
        return
    parts = ("linear", "embeddings", "other", "weights", "kv_cache", "activations", "total")
    print(f"GB (10^9 bytes), {arguments.context} tokens in the cache")
    print(f"{'shape':<12}{'bits':>6}{'embedding':>10}{'cache':>12}" + "".join(f"{part:>12}" for part in parts))
    for row in rows:
        numbers = "".join(f"{row[part] / 1e9:>12.4f}" for part in parts)
        print(f"{row['shape']:<12}{row['bits'] or 16:>6g}{row['embedding_bits']:>10}{row['kv_kind']:>12}{numbers}")


def run_demo(arguments: argparse.Namespace) -> None:
    """Run `littlebit demo`: the model writes before torch is imported."""
    from .demo import check_out, measure, speak

    check_out(arguments.out)
    speak()
    use_torch()
    print(measure(arguments.out))


def run_bench(arguments: argparse.Namespace) -> None:
    """Run `littlebit bench`."""
    import torch

    from ..bench.linear import BITS, SHAPES, bench_linear
    from ..bench.timing import cpu_name
    from ..files.atomic import check_file

    if arguments.save:
        check_file(arguments.save)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device cuda was asked for, but torch sees no GPU: use --device cpu")
    if arguments.what == "decode" and arguments.device == "cuda":
        return run_bench_decode_cuda(arguments)
    if arguments.what == "decode" and arguments.under_load:
        return run_bench_load(arguments)
    if arguments.what in ("decode", "agreement") and arguments.model is None:
        raise ValueError(f"bench {arguments.what} needs a packed checkpoint: name one with --model")
    if arguments.what == "decode":
        return run_bench_decode(arguments)
    if arguments.what == "cache":
        return run_bench_cache(arguments)
    if arguments.what == "agreement":
        return run_bench_agreement(arguments)
    chosen = {key: tuple(getattr(arguments, key)) for key in ("shape", "bits") if getattr(arguments, key)}
    if arguments.device == "cuda":
        from ..bench.linear_cuda import BITS as CUDA_BITS, SHAPES as CUDA_SHAPES, bench_linear_cuda

        device, error, other = torch.cuda.get_device_name(), "error", "fp16 us"
        shapes, bits = chosen.get("shape", CUDA_SHAPES), chosen.get("bits", CUDA_BITS)
        rows = bench_linear_cuda(shapes, bits, arguments.paths or 1, arguments.batch, arguments.tune)
    else:
        device, error, other = cpu_name(), "max_error", "bf16 us"
        shapes, bits = chosen.get("shape", SHAPES), chosen.get("bits", BITS)
        rows = bench_linear(shapes, bits, arguments.batch[0], arguments.threads, arguments.paths or 2)
    if answered(arguments, rows, device):
        return
    columns = f"{'bits':>8}{'rank':>6}{'batch':>6}{'packed us':>12}{other:>12}{'speed-up':>10}{'error':>11}"
    further = {"int8_us": "int8 us", "int4_us": "int4 us", "gemlite_us": "gemlite us"}
    further |= {"one_thread_us": "1 thread us", "times_one_thread": "times that"}
    further = {key: title for key, title in further.items() if any(row.get(key) is not None for row in rows)}
    print(f"{'d_out x d_in':>15}{columns}{''.join(f'{title:>13}' for title in further.values())}")
    for row in rows:
        size = f"{row['d_out']} x {row['d_in']}"
        more = "".join(" " * 13 if row[key] is None else f"{row[key]:>13.2f}" for key in further)
        print(
            f"{size:>15}{row['bits']:>8.3f}{row['rank']:>6}{row['batch']:>6}{row['time_us']:>12.1f}{row['dense_us']:>12.1f}"
            f"{row['speedup']:>9.1f}x{row[error]:>11.1e}{more}"
        )


def answered(arguments: argparse.Namespace, rows: list[dict[str, Any]], device: str) -> bool:
    """Save a benchmark's rows if they are to be kept; whether JSON was asked for, which is then printed."""
    if arguments.save:
        from ..bench.timing import save_results

        save_results(arguments.save, rows, arguments.typed, device)
    if arguments.json:
        print(json.dumps(rows))
    return arguments.json


def run_bench_decode(arguments: argparse.Namespace) -> None:
    """Run `littlebit bench decode`."""
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
    if answered(arguments, rows, cpu_name()):
        return
    print(f"{'engine':<14}{'threads':>8}{'ms a token':>12}{'tokens/s':>10}{'resident MB':>13}{'peak MB':>9}")
    for row in rows:
        print(
            f"{row['engine']:<14}{row['threads']:>8}{row['time_ms']:>12.2f}{row['tokens_per_s']:>10.1f}"
            f"{row['memory_bytes'] / 1e6:>13.0f}{row['peak_bytes'] / 1e6:>9.0f}"
        )


def run_bench_load(arguments: argparse.Namespace) -> None:
    """Run `littlebit bench decode --under-load`."""
    from ..bench.decode import QUIET_SHARE, bench_load, cores
    from ..bench.timing import cpu_name

    most = max(arguments.threads, min(2, cores()))
    model = arguments.model or "smollm2-0.55bit"
    rows = bench_load(model, range(1, most + 1), arguments.tokens or 32, arguments.rounds)
    if answered(arguments, rows, cpu_name()):
        return
    print(f"{'machine':<24}{'threads':>8}{'tokens/s':>10}{'times one thread':>18}{'core share':>12}")
    for row in rows:
        machine = f"{row['busy']} other busy programs" if row["busy"] else "nothing else"
        print(
            f"{machine:<24}{row['threads']:>8}{row['tokens_per_s']:>10.1f}{row['times_one_thread']:>18.2f}"
            f"{row['core_share']:>12.0%}"
        )
    if any(row["core_share"] < QUIET_SHARE for row in rows if not row["busy"]):
        print("The machine was not quiet: other programs took processor time, so all figures are too low.")


def run_bench_decode_cuda(arguments: argparse.Namespace) -> None:
    """Run `littlebit bench decode --device cuda`."""
    import torch

    from ..bench.decode_cuda import bench_checkpoint_cuda, bench_decode_cuda
    from ..checkpoints.checkpoint import info

    common = {"contexts": arguments.context or [128], "tokens": arguments.tokens or 256, "batch": arguments.batch[0]}
    common |= {"profile": arguments.profile, "kv_caches": arguments.kv_cache}
    if arguments.model:
        rows = bench_checkpoint_cuda(load_any(str(arguments.model), "cuda", torch.float16), **common)
        stored = info(arguments.model)["bits_per_weight"]
        rows = [{"model": str(arguments.model), "bits": stored} | row for row in rows]
    else:
        chosen = {key: getattr(arguments, key) for key in ("bits", "paths") if getattr(arguments, key)}
        rows = bench_decode_cuda(arguments.model_shape, peers=not arguments.no_peers, **common, **chosen)
    if answered(arguments, rows, torch.cuda.get_device_name()):
        return
    print(
        f"{'engine':<14}{'bits':>7}{'batch':>6}{'context':>9}{'cache':>13}{'ms a step':>11}{'tokens/s':>10}{'GB':>9}"
        f"{'of copy':>9}{'peak GB':>9}"
    )
    for row in rows:
        print(
            f"{row['engine']:<14}{row['bits']:>7.3f}{row['batch']:>6}{row['context']:>9}{row['kv_cache']:>13}"
            f"{row['time_ms']:>11.3f}{row['tokens_per_s']:>10.1f}{row['weights_bytes'] / 1e9:>9.3f}"
            f"{row['fraction_of_copy']:>8.1%}{row['peak_bytes'] / 1e9:>9.2f}"
        )
        for part in row.get("parts", []):
            print(f"    {part['part']:<14}{part['calls']:>4} x {part['time_us']:>8.2f} us = {part['step_us']:>9.1f} us")


def tune_arguments(sub: argparse.ArgumentParser) -> None:
    """Arguments of `littlebit tune`."""
    sub.add_argument("--model", type=Path, help="a packed checkpoint")
    sub.add_argument(
        "--model-shape", choices=list(MODEL_SHAPES), default="llama2-7b", help="or a random model of a published shape"
    )
    sub.add_argument("--bits", type=positive, nargs="+", default=[0.55], help="of the random model's layers")
    sub.add_argument("--paths", type=count, default=1, help="of the random model's layers")
    sub.add_argument("--batch", type=count, default=1, help="sequences that are decoded together")
    sub.add_argument(
        "--table", type=Path, help="JSON file to add to; by default one in the cache folder, which is used"
    )
    add_json(sub)


def run_tune(arguments: argparse.Namespace) -> None:
    """Run `littlebit tune`."""
    import torch

    from ..kernels import dispatch

    if not torch.cuda.is_available() or dispatch.cuda_kernels(0) is None:
        raise ValueError("tuning needs an NVIDIA GPU that the kernels can use; on a CPU there is nothing to tune")
    from ..bench.decode_cuda import llama_shape, random_model
    from ..bench.tune import keep, tune
    from ..decoding.engines import engine_of
    from ..decoding.fused_llama import parts_of
    from ..decoding.graph_decoder import SMALLEST_CAPACITY
    from ..files.atomic import check_file
    from ..kernels.cuda_schedule import own_schedules

    check_file(arguments.table or own_schedules())

    name, rows = torch.cuda.get_device_name(), []
    for bits in [None] if arguments.model else arguments.bits:
        if bits is None:
            model = parts_of(load_any(str(arguments.model), "cuda", torch.float16), torch.float16)
        else:
            model = random_model(llama_shape(arguments.model_shape), bits, arguments.paths)
        with torch.inference_mode():
            device = torch.device("cuda", 0)
            found = tune(engine_of(model, arguments.batch, SMALLEST_CAPACITY, device, torch.float16))
        table = keep(found, name, arguments.table)
        rows += found
        del model
    if arguments.json:
        print(json.dumps([row | {"device": name, "table": str(table)} for row in rows]))
        return
    print(f"{'':<10}{'before us':>11}{'after us':>10}  layers")
    for row in rows:
        print(f"{row['part']:<10}{row['before_us']:>11.2f}{row['after_us']:>10.2f}  {row['sizes']}")
    print(f"kept in {table}")


def run_bench_agreement(arguments: argparse.Namespace) -> None:
    """Run `littlebit bench agreement`."""
    from ..bench.timing import cpu_name
    from ..checkpoints.checkpoint import load
    from ..checkpoints.dense import load_tokenizer
    from ..decoding.parity import agreement

    rows = agreement(load(arguments.model), load_tokenizer(arguments.model), count=arguments.tokens or 64)
    if answered(arguments, rows, cpu_name()):
        return
    print(f"{'prompt':<48}{'equal tokens':>14}{'least gap':>11}{'error':>9}{'of transformers':>17}{'of bound':>10}")
    for row in rows:
        print(
            f"{row['prompt'].splitlines()[0]:<48}{row['same']:>8} / {row['tokens']}{row['gap']:>11.1e}"
            f"{row['error']:>9.1e}{row['transformers_error']:>17.1e}{row['bound_share']:>10.1e}"
        )


def run_bench_cache(arguments: argparse.Namespace) -> None:
    """Run `littlebit bench cache`."""
    from ..bench.cache import CONTEXTS, bench_cache, crossover
    from ..bench.linear import BITS
    from ..bench.timing import cpu_name

    rows = [
        row
        for bits in arguments.bits or BITS
        for row in bench_cache(arguments.model_shape, bits, tuple(arguments.context or CONTEXTS))
    ]
    if answered(arguments, rows, cpu_name()):
        return
    print(
        f"{arguments.model_shape}: one token in one layer; bytes a token in all layers, the ordinary cache in float16"
    )
    print(
        f"{'bits':>6}{'cache':>13}{'context':>9}{'us':>10}{'ordinary us':>13}{'speed':>8}{'bytes':>9}{'ordinary':>10}"
    )
    for row in rows:
        print(
            f"{row['bits']:>6g}{row['kind']:>13}{row['context']:>9}{row['time_us']:>10.0f}{row['ordinary_us']:>13.0f}"
            f"{row['speed']:>7.2f}x{row['bytes_per_token']:>9.0f}{row['ordinary_bytes_per_token']:>10.0f}"
        )
    for bits, kind in dict.fromkeys((row["bits"], row["kind"]) for row in rows):
        tokens = crossover([row for row in rows if (row["bits"], row["kind"]) == (bits, kind)])
        found = (
            "not the quicker one at any of these" if tokens is None else f"the quicker one from {tokens:.0f} tokens on"
        )
        print(f"{bits:g} bits, {kind}: {found}")


class Command(NamedTuple):
    """A subcommand: what runs it, what adds its arguments, and what it does."""

    run: Callable[[argparse.Namespace], int | None]
    add_arguments: Callable[[argparse.ArgumentParser], None]
    text: str


COMMANDS = {
    "fetch": Command(
        run_fetch, fetch_arguments, "Print the path of a known model; download it or put it together on first use."
    ),
    "quantize": Command(run_quantize, quantize_arguments, "Quantise a model and write a packed checkpoint."),
    "train": Command(
        run_train,
        train_arguments,
        "Quantise a model, train it on its own full-precision outputs, and write a packed checkpoint.",
    ),
    "eval": Command(
        run_eval, eval_arguments, "Measure a model's perplexity on a text, or how it does on tasks, zero-shot."
    ),
    "generate": Command(run_generate, generate_arguments, "Let a model continue a prompt."),
    "info": Command(run_info, info_arguments, "Say what a packed checkpoint really stores."),
    "verify": Command(
        run_verify, info_arguments, "Compare a packed checkpoint with the checksums that were saved with it."
    ),
    "export": Command(run_export, export_arguments, "Write a packed checkpoint in the format of another program."),
    "completion": Command(
        run_completion, completion_arguments, "Print a script that completes the command in a shell."
    ),
    "memory": Command(
        run_memory, memory_arguments, "Say what a model of a published shape takes: weights, cache, activations."
    ),
    "tune": Command(
        run_tune, tune_arguments, "Find the fastest launches of a model's packed layers on this GPU, and keep them."
    ),
    "demo": Command(
        run_demo,
        demo_arguments,
        "Let a trained SmolLM2 of 0.55 bits write, then measure four models.",
    ),
    "bench": Command(
        run_bench,
        bench_arguments,
        "Time the packed layer beside torch's, decoding beside other engines' or a latent cache beside an "
        "ordinary one, or compare greedy texts with transformers' (agreement).",
    ),
}
