"""Generation: text in, text out, as it is written.

Llama-like models on a CPU go through compiled code (decode_cpu.py), all others through transformers' generate.
"""

import logging
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .decode_cpu import decode, why_not
from .latent_cache import LATENT_TYPES, latent_cache
from .memory import KV_CACHES

log = logging.getLogger(__name__)

# Settings of a generation_config that change which token is chosen, and their values that do not
NEUTRAL = {"repetition_penalty": (None, 1.0), "no_repeat_ngram_size": (None, 0), "min_length": (None, 0)}
NEUTRAL |= {"min_new_tokens": (None, 0), "bad_words_ids": (None,), "suppress_tokens": (None,), "num_beams": (None, 1)}


def generate(
    model: nn.Module,
    prompt: str,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    chat: bool = False,
    tokenizer: Any = None,
    kv_cache: str = "ordinary",
) -> str:
    """Text that a model writes after a prompt.

    Parameters
    ----------
    model : transformers causal language model, dense or packed
    prompt : str
    max_new_tokens : int
    temperature : float
        0 for greedy decoding, else sampling at this temperature.
    top_k, top_p : optional
        Sample among the k likeliest tokens, or the likeliest that hold probability p.
    seed : int
        Of the sampling; the global generator is left as it was.
    chat : bool
        Put the prompt into the tokenizer's chat template, as the user's turn.
    tokenizer : transformers tokenizer, optional
        By default that of the directory or name the model was loaded from.
    kv_cache : str
        "ordinary", "latent" (float16) or "latent-int8": see `latent_cache`, which takes less memory and more time.

    Returns
    -------
    The new text, without the prompt.

    Raises
    ------
    ValueError
        If the prompt has no tokens, or a setting is out of range.
    """
    return "".join(stream(model, prompt, max_new_tokens, temperature, top_k, top_p, seed, chat, tokenizer, kv_cache))


def stream(
    model: nn.Module,
    prompt: str,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    chat: bool = False,
    tokenizer: Any = None,
    kv_cache: str = "ordinary",
) -> Iterator[str]:
    """`generate` in pieces, each as soon as it is known: the same arguments, errors and, joined, the same text."""
    from .hf import load_tokenizer

    tokenizer = tokenizer or load_tokenizer(model.name_or_path)  # type: ignore[arg-type]
    if chat:
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
        )
    tokens = tokenizer(prompt, return_tensors="pt")["input_ids"]  # (1, length)
    if tokens.shape[1] == 0:
        raise ValueError("the prompt is empty: give at least one character")
    new = stream_tokens(
        model, tokens[0], max_new_tokens, temperature, top_k, top_p, seed, pad_token(tokenizer), kv_cache
    )
    return pieces(tokenizer, new)


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
    model: nn.Module,
    tokens: Tensor,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    pad: int | None = None,
    kv_cache: str = "ordinary",
) -> Tensor:
    """New tokens, (1, at most max_new_tokens), after the prompt `tokens`, (1, length); see `generate`.

    Raises
    ------
    ValueError
        If a setting is out of range.
    """
    new = stream_tokens(model, tokens[0], max_new_tokens, temperature, top_k, top_p, seed, pad, kv_cache)
    return torch.tensor([list(new)], dtype=torch.int64, device=next(model.parameters()).device)


def stream_tokens(
    model: nn.Module,
    tokens: Tensor,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    pad: int | None = None,
    kv_cache: str = "ordinary",
) -> Iterator[int]:
    """New tokens after the prompt `tokens`, (length,), one by one; see `generate`.

    Raises
    ------
    ValueError
        If a setting is out of range.
    """
    if max_new_tokens < 1 or temperature < 0:
        raise ValueError(f"need max_new_tokens >= 1 and temperature >= 0, not {max_new_tokens} and {temperature}")
    if (top_k is not None and top_k < 0) or (top_p is not None and not 0 < top_p <= 1):
        raise ValueError(f"need top_k >= 0 and 0 < top_p <= 1, not {top_k} and {top_p}")
    if kv_cache not in KV_CACHES:
        raise ValueError(f"kv_cache must be one of {', '.join(KV_CACHES)}, not {kv_cache!r}")
    if kv_cache != "ordinary":
        cache = latent_cache(model, LATENT_TYPES[kv_cache])
        return iter(through_transformers(model, tokens, max_new_tokens, temperature, top_k, top_p, seed, pad, cache))
    reason = why_not(model) or special_settings(model)
    if reason is None:
        return decode(model, tokens.cpu(), max_new_tokens, temperature, top_k, top_p, seed, stop_tokens(model))
    log.warning("littlebit: transformers generates for this model, not the compiled decoder: %s", reason)
    return iter(through_transformers(model, tokens, max_new_tokens, temperature, top_k, top_p, seed, pad))


def stop_tokens(model: Any) -> tuple[int, ...]:
    """The tokens after which a model says no more."""
    settings = getattr(model, "generation_config", None) or model.config
    stop = settings.eos_token_id
    return () if stop is None else (stop,) if isinstance(stop, int) else tuple(stop)


def special_settings(model: Any) -> str | None:
    """The first setting of a model's generation_config that only transformers honours, in a few words."""
    settings = getattr(model, "generation_config", None)
    for name, neutral in NEUTRAL.items():
        value = getattr(settings, name, None)
        if value not in neutral:
            return f"its generation_config sets {name} to {value}"
    return None


def through_transformers(
    model: Any,
    tokens: Tensor,
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    seed: int,
    pad: int | None,
    cache: Any = None,
) -> list[int]:
    """`stream_tokens` by transformers' generate, all at once, with a key-value cache of its own or the given one."""
    sampling = {"do_sample": True, "temperature": temperature, "top_k": top_k or 0, "top_p": top_p or 1.0}
    greedy = {"do_sample": False, "temperature": None, "top_k": None, "top_p": None}
    tokens = tokens[None].to(next(model.parameters()).device)
    with torch.random.fork_rng(), torch.inference_mode():
        torch.manual_seed(seed)
        output = model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=max_new_tokens,
            pad_token_id=pad,
            past_key_values=cache,
            **(sampling if temperature else greedy),
        )
    return output[0, tokens.shape[1] :].tolist()


def pad_token(tokenizer: Any) -> int | None:
    """The token that fills up finished sequences."""
    return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
