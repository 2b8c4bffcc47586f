"""Generation: text in, text out, as it is written.

Llama-like models on a CPU go through compiled code (decode_cpu.py); on a GPU a step is one CUDA graph (decode_cuda.py);
all else goes through transformers' generate.
"""

import logging
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, overload

from ...reference._renamed import renamed_value
from .._checks import check_number, check_prompts, embedding_rows, flat_tokens, positions_of
from ..memory import KV_CACHES
from ..models.generation_settings import Sampling, check_sampling, settings_of
from .architecture import NotDecodableError
from .cpu_decoder import Decodable, decode

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger(__name__)


@overload
def generate(
    model: Any,
    prompt: str,
    max_new_tokens: int = ...,
    temperature: float | None = ...,
    top_k: int | None = ...,
    top_p: float | None = ...,
    seed: int = ...,
    chat: bool = ...,
    tokenizer: Any = ...,
    kv_cache: str = ...,
) -> str: ...
@overload
def generate(
    model: Any,
    prompt: Sequence[str],
    max_new_tokens: int = ...,
    temperature: float | None = ...,
    top_k: int | None = ...,
    top_p: float | None = ...,
    seed: int = ...,
    chat: bool = ...,
    tokenizer: Any = ...,
    kv_cache: str = ...,
) -> list[str]: ...
def generate(
    model: Any,
    prompt: str | Sequence[str],
    max_new_tokens: int = 64,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    chat: bool = False,
    tokenizer: Any = None,
    kv_cache: str = "full",
) -> str | list[str]:
    """Text that a model writes after a prompt, or after each of several.

    Parameters
    ----------
    model : transformers causal language model, dense or packed, or a Decodable
        A model of PEFT's, or with its adapters inside, is run by transformers.
    prompt : str or sequence of str
        On a GPU up to 16 are decoded at once.
    max_new_tokens : int
        For each prompt.
    temperature : float, optional
        0 for greedy decoding, else sampling at this temperature.
    top_k, top_p : optional
        Sample among the k likeliest tokens (0: all), or the likeliest that hold probability p. For each of these three
        that is None, the model's generation_config decides: its own value, or transformers' default, if its do_sample
        is true; else decoding is greedy, and nothing is cut off that it does not name.
    seed : int
        Of the sampling (NumPy's generator in the compiled decoder, torch's on a GPU and in transformers); global ones
        stay as they were.
    chat : bool
        Put the prompt into the tokenizer's chat template, as the user's turn.
    tokenizer : transformers tokenizer, optional
        By default that of the directory or name the model was loaded from.
    kv_cache : str
        "full", "latent" (float16) or "latent-int8": see `latent_cache`, which takes less memory and more time.

    Returns
    -------
    The new text, without the prompt; a list of texts for a sequence of prompts.

    Raises
    ------
    ValueError
        If a prompt has no tokens or is not text, a setting is out of range, a token has no row in the model's
        embedding, or prompt and new tokens need more positions than the model has (max_position_embeddings).
    """
    kv_cache = renamed_value("kv_cache", kv_cache)
    settings = max_new_tokens, temperature, top_k, top_p, seed
    if isinstance(prompt, str):
        return "".join(stream(model, prompt, *settings, chat, tokenizer, kv_cache))
    model = bare(model)
    tokenizer = tokenizer_of(model, tokenizer)
    tokens = [prompt_tokens(tokenizer, each, chat) for each in prompt]
    new = batch_tokens(model, tokens, *settings, pad_token(tokenizer), kv_cache)
    return ["".join(pieces(tokenizer, iter(each))) for each in new]


def stream(
    model: Any,
    prompt: str,
    max_new_tokens: int = 64,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    chat: bool = False,
    tokenizer: Any = None,
    kv_cache: str = "full",
) -> Iterator[str]:
    """`generate` in pieces, each as soon as it is known: the same arguments, errors and, joined, the same text."""
    model = bare(model)
    kv_cache = renamed_value("kv_cache", kv_cache)
    tokenizer = tokenizer_of(model, tokenizer)
    tokens, pad = prompt_tokens(tokenizer, prompt, chat), pad_token(tokenizer)
    new = stream_tokens(model, tokens, max_new_tokens, temperature, top_k, top_p, seed, pad, kv_cache)
    return pieces(tokenizer, new)


def bare(model: Any) -> Any:
    """Take torch.compile and data parallelism off a model, which decode one sequence no faster."""
    if isinstance(model, Decodable):
        return model
    from ..models.wrappers import unwrapped

    return unwrapped(model)


def tokenizer_of(model: Any, tokenizer: Any = None) -> Any:
    """Return a tokenizer, by default that of the directory or name the model was loaded from.

    Raises
    ------
    ValueError
        If the model was not loaded from a place that has one.
    """
    if tokenizer is not None:
        return tokenizer
    from ..checkpoints.dense import load_tokenizer

    place = getattr(model, "name_or_path", "")
    if not place:
        raise ValueError("the model was not loaded from a directory, so its tokenizer must be passed: tokenizer=...")
    try:
        return load_tokenizer(place)
    except ValueError as error:
        raise ValueError(f"{error}; or pass a tokenizer: tokenizer=...") from error


def prompt_tokens(tokenizer: Any, prompt: str, chat: bool) -> list[int]:
    """Tokenise a prompt; as the user's turn of a chat, it gets the special tokens of the chat template alone.

    Raises
    ------
    ValueError
        If there are no tokens, the prompt cannot be written as UTF-8, or the chat template cannot be used.
    """
    if not isinstance(prompt, str):
        raise ValueError(f"a prompt must be a str, got {type(prompt).__name__}: give tokens to generate_tokens instead")
    try:
        prompt.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"the prompt must be text that UTF-8 can hold: {error}") from error
    if chat:
        prompt = in_chat_template(tokenizer, prompt)
    tokens = list(tokenizer(prompt, add_special_tokens=not chat)["input_ids"])
    if not tokens:
        raise ValueError("the prompt is empty: give at least one character")
    return tokens


def in_chat_template(tokenizer: Any, prompt: str) -> str:
    """Put a prompt into the tokenizer's chat template, as the user's turn.

    Raises
    ------
    ValueError
        If there is no template, or it refuses.
    """
    from jinja2 import TemplateError

    try:
        return tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
        )
    except (TemplateError, TypeError) as error:
        raise ValueError(f"the tokenizer's chat template cannot be used: {error}") from error


def pieces(tokenizer: Any, tokens: Iterator[int]) -> Iterator[str]:
    """Text of tokens, as soon as it cannot change: a token may hold only a part of a character.

    What is new is the difference of two decodings that begin at the same token, one of those already written, since
    some tokenizers write a first token without its space.
    """
    known: list[int] = []
    start = written = 0  # known[start:written] is text that is out already

    def text(stop: int | None) -> str:
        return tokenizer.decode(known[start:stop], skip_special_tokens=True)

    for token in tokens:
        known.append(token)
        before, now = text(written), text(None)
        if len(now) > len(before) and not now.endswith("\ufffd"):
            yield now[len(before) :]
            start, written = written, len(known)
    rest = text(None)[len(text(written)) :]
    if rest:
        yield rest


def generate_tokens(
    model: Any,
    tokens: "Tensor",
    max_new_tokens: int = 64,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    pad: int | None = None,
    kv_cache: str = "full",
) -> "Tensor":
    """Generate (1, at most max_new_tokens) tokens after the prompt `tokens`, (length,) or (1, length); see `generate`.

    Raises
    ------
    ValueError
        If a setting is out of range, or the tokens have another shape.
    """
    import torch

    prompt = flat_tokens(tokens, model).tolist()
    new = stream_tokens(model, prompt, max_new_tokens, temperature, top_k, top_p, seed, pad, kv_cache)
    return torch.tensor([list(new)], dtype=torch.int64, device=next(model.parameters()).device)


def stream_tokens(
    model: Any,
    tokens: Sequence[int],
    max_new_tokens: int = 64,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    pad: int | None = None,
    kv_cache: str = "full",
) -> Iterator[int]:
    """New tokens after the prompt `tokens`, one by one; see `generate`.

    Raises
    ------
    ValueError
        If a setting is out of range.
    """
    check_generation(max_new_tokens, temperature, top_k, top_p, seed, kv_cache)
    check_prompts([tokens], max_new_tokens, *rows_and_positions(model))
    temperature, top_k, top_p = chosen_sampling(model, temperature, top_k, top_p)
    settings = max_new_tokens, temperature, top_k, top_p, seed
    if isinstance(model, Decodable):
        if kv_cache != "full":
            raise ValueError(f"a cache of kind {kv_cache!r} needs a model that `load` made")
        return decode(model, tokens, *settings)
    from .torch_weights import check_settings, decodable, through_transformers

    try:
        check_settings(model)
        if on_gpu(model):
            from .graph_decoder import decode_batch

            steps = decode_batch(model, [tokens], *settings, kv_cache)
            return (token for (token,) in steps if token is not None)
        if kv_cache == "full":
            return decode(decodable(model), tokens, *settings)
    except NotDecodableError as reason:
        log.warning("littlebit: transformers generates for this model, not its decoder: %s", reason)
    return iter(through_transformers(model, tokens, *settings, pad, kv_cache))


def batch_tokens(
    model: Any,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int = 64,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    pad: int | None = None,
    kv_cache: str = "full",
) -> list[list[int]]:
    """New tokens after each of several prompts; see `generate`.

    Raises
    ------
    ValueError
        If a setting is out of range.
    """
    check_generation(max_new_tokens, temperature, top_k, top_p, seed, kv_cache)
    check_prompts(prompts, max_new_tokens, *rows_and_positions(model))
    temperature, top_k, top_p = chosen_sampling(model, temperature, top_k, top_p)
    settings = max_new_tokens, temperature, top_k, top_p, seed
    if on_gpu(model):
        from .graph_decoder import LARGEST_BATCH, decode_batch
        from .torch_weights import check_settings

        try:
            check_settings(model)
            new: list[list[int]] = []
            for at in range(0, len(prompts), LARGEST_BATCH):
                steps = decode_batch(model, prompts[at : at + LARGEST_BATCH], *settings, kv_cache)
                rows = zip(*steps, strict=True)
                new += [[token for token in row if token is not None] for row in rows]
        except NotDecodableError:
            pass  # for each prompt alone, `stream_tokens` says who generates
        else:
            return new
    return [list(stream_tokens(model, tokens, *settings, pad, kv_cache)) for tokens in prompts]


def on_gpu(model: Any) -> bool:
    """Whether a model that was loaded lies on an NVIDIA GPU."""
    return not isinstance(model, Decodable) and next(model.parameters()).device.type == "cuda"


def rows_and_positions(model: Any) -> tuple[int | None, int | None]:
    """Count the rows of a model's embedding and the positions that it has; None for what has no limit."""
    if isinstance(model, Decodable):
        return model.sizes.vocabulary, model.sizes.positions
    return embedding_rows(model), positions_of(model)


def chosen_sampling(model: Any, temperature: float | None, top_k: int | None, top_p: float | None) -> Sampling:
    """Take the caller's sampling, and the checkpoint's own for what is None."""
    generation = model.generation if isinstance(model, Decodable) else settings_of(model)
    chosen = generation.chosen(temperature, top_k, top_p)
    check_sampling(*chosen)
    return chosen


def check_generation(
    max_new_tokens: int, temperature: float | None, top_k: int | None, top_p: float | None, seed: int, kv_cache: str
) -> None:
    """Raise ValueError if a setting is out of range."""
    check_number("max_new_tokens", max_new_tokens, low=1, whole=True)
    check_sampling(temperature, top_k, top_p)
    check_number("seed", seed, low=0, below=2**63, whole=True)
    if kv_cache not in KV_CACHES:
        raise ValueError(f"kv_cache must be one of {', '.join(KV_CACHES)}, not {kv_cache!r}")


def pad_token(tokenizer: Any) -> int | None:
    """The token that fills up finished sequences."""
    return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
