"""Continue a prompt: the `generate` command."""

import argparse
import json
import logging
import time
from typing import TYPE_CHECKING, Any

from ..checkpoints.fetch import resolve
from ..memory import KV_CACHES
from ..models.generation_settings import GenerationConfig
from .arguments import (
    Command,
    add_compute,
    count,
    kv_cache,
    model_help,
    not_negative,
    not_negative_int,
    number,
    seed,
    utf8,
)
from .models import load_any, use_torch

if TYPE_CHECKING:
    from ..decoding.batching import Slots

log = logging.getLogger(__name__)


def add_arguments(sub: argparse.ArgumentParser) -> None:
    """Add the arguments of `littlebit generate`."""
    sub.add_argument("model", help=f"a packed checkpoint, or a dense model: {model_help()}")
    sub.add_argument("--prompt", type=utf8, required=True, help="text to continue, in UTF-8")
    add_sampling(sub, 64)
    sub.add_argument("--chat", action="store_true", help="wrap the prompt in the model's chat template")
    add_compute(sub)


def add_sampling(sub: argparse.ArgumentParser, max_new_tokens: int) -> None:
    """Add the options that say how tokens are chosen, and where the text ends."""
    sub.add_argument("--max-new-tokens", type=count, default=max_new_tokens, help="write at most this many tokens")
    given = "the value in the model's generation_config.json"
    sub.add_argument(
        "--temperature",
        type=not_negative,
        help=f"divide the logits by this; 0 is greedy decoding (default: {given}, or 0)",
    )
    sub.add_argument(
        "--top-k", type=not_negative_int, help=f"sample from the k likeliest tokens; 0 for all (default: {given})"
    )
    sub.add_argument(
        "--top-p",
        type=number(float, above=0, high=1),
        help=f"sample from the likeliest tokens whose probabilities add up to p (default: {given})",
    )
    sub.add_argument(
        "--min-p",
        type=number(float, low=0, high=1),
        help=f"sample from tokens at least this probable, relative to the likeliest (default: {given})",
    )
    sub.add_argument(
        "--repetition-penalty",
        type=number(float, low=0.001, high=1000),
        help="divide positive logits of tokens in prompt and answer by this, and multiply negative ones (default: "
        f"{given}, or 1)",
    )
    sub.add_argument("--seed", type=seed, default=0, help="seed of the sampling")
    sub.add_argument(
        "--stop", type=utf8, action="append", default=[], help="end the text before this string; may be given again"
    )
    add_kv_cache(sub)


def add_kv_cache(sub: argparse.ArgumentParser) -> None:
    """Add the option that says what is cached."""
    sub.add_argument(
        "--kv-cache",
        type=kv_cache,
        choices=KV_CACHES,
        default="full",
        help="keep keys and values (full), or their low-rank latents, which take less memory and more time",
    )


def run(arguments: argparse.Namespace) -> None:
    """Write the text as it is decoded, or all of it with its speed as JSON."""
    from ..decoding.generate import generate, stream

    model, tokenizer = load_to_generate(arguments)
    if arguments.json:  # The first token compiles or loads the kernels, so it is not part of the measured time.
        generate(model, arguments.prompt, 1, chat=arguments.chat, tokenizer=tokenizer, kv_cache=arguments.kv_cache)
    start = time.perf_counter()
    pieces = stream(
        model,
        arguments.prompt,
        chat=arguments.chat,
        tokenizer=tokenizer,
        stop=arguments.stop,
        config=generation_config(arguments),
    )
    if arguments.json:
        text = "".join(pieces)
        seconds = time.perf_counter() - start
        tokens = len(tokenizer(text, add_special_tokens=False)["input_ids"])
        row = {"prompt": arguments.prompt, "text": text, "new_tokens": tokens, "seconds": seconds}
        print(json.dumps(row | {"tokens_per_s": tokens / seconds}))
        return
    for piece in pieces:
        print(piece, end="", flush=True)
    print()


def generation_config(arguments: argparse.Namespace) -> GenerationConfig:
    """Make the settings of generation that the options of `add_sampling` ask for."""
    return GenerationConfig(
        max_new_tokens=arguments.max_new_tokens,
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        top_p=arguments.top_p,
        min_p=arguments.min_p,
        repetition_penalty=arguments.repetition_penalty,
        seed=arguments.seed,
        kv_cache=arguments.kv_cache,
    )


def load_slots(arguments: argparse.Namespace, size: int) -> tuple["Slots", Any]:
    """Load a model that decodes up to `size` texts together, and its tokenizer.

    Raises
    ------
    ValueError
        If no decoder of this package runs the model.
    """
    from ..decoding.architecture import NotDecodableError
    from ..decoding.batching import slots_for

    model, tokenizer = load_to_generate(arguments)
    try:
        return slots_for(model, size, arguments.context, arguments.kv_cache), tokenizer
    except NotDecodableError as reason:
        raise ValueError(
            f"no decoder of this package runs {arguments.model}: {reason}; transformers may: "
            "`python -m littlebit.fast.integrations.transformers_cli serve MODEL`"
        ) from reason


def load_to_generate(arguments: argparse.Namespace) -> tuple[Any, Any]:
    """Load a model and its tokenizer, without torch if the compiled CPU decoder supports the model."""
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


COMMANDS = {
    "generate": Command(
        run,
        add_arguments,
        "Continue a prompt with a model.",
        (
            "generate smollm2-0.55bit --prompt 'Once upon a time'",
            "generate out --prompt Hi --chat --temperature 0.8",
        ),
    )
}
