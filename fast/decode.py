"""Generation: text in, text out, as it is written.

Llama-like models on a CPU go through compiled code (decode_cpu.py); on a GPU a step is one CUDA graph (decode_cuda.py);
all else goes through transformers' generate.
"""

import logging
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from .decode_cpu import Decodable, NotDecodableError, decode
from .memory import KV_CACHES

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger(__name__)


def generate(
    model: Any,
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
    model : transformers causal language model, dense or packed, or a Decodable
    prompt : str
    max_new_tokens : int
    temperature : float
        0 for greedy decoding, else sampling at this temperature.
    top_k, top_p : optional
        Sample among the k likeliest tokens, or the likeliest that hold probability p.
    seed : int
        Of the sampling (NumPy's generator in the compiled decoder, torch's on a GPU and in transformers); global ones
        stay as they were.
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
    model: Any,
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
    if tokenizer is None:
        from .hf import load_tokenizer

        tokenizer = load_tokenizer(model.name_or_path)
    if chat:
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
        )
    tokens = tokenizer(prompt)["input_ids"]
    if not tokens:
        raise ValueError("the prompt is empty: give at least one character")
    pad = pad_token(tokenizer)
    new = stream_tokens(model, tokens, max_new_tokens, temperature, top_k, top_p, seed, pad, kv_cache)
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
    model: Any,
    tokens: "Tensor",
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    pad: int | None = None,
    kv_cache: str = "ordinary",
) -> "Tensor":
    """New tokens, (1, at most max_new_tokens), after the prompt `tokens`, (1, length); see `generate`.

    Raises
    ------
    ValueError
        If a setting is out of range.
    """
    import torch

    new = stream_tokens(model, tokens[0].tolist(), max_new_tokens, temperature, top_k, top_p, seed, pad, kv_cache)
    return torch.tensor([list(new)], dtype=torch.int64, device=next(model.parameters()).device)


def stream_tokens(
    model: Any,
    tokens: Sequence[int],
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    pad: int | None = None,
    kv_cache: str = "ordinary",
) -> Iterator[int]:
    """New tokens after the prompt `tokens`, one by one; see `generate`.

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
    settings = max_new_tokens, temperature, top_k, top_p, seed
    if isinstance(model, Decodable):
        if kv_cache != "ordinary":
            raise ValueError(f"a cache of kind {kv_cache!r} needs a model that `load` made")
        return decode(model, tokens, *settings)
    from .decode_loaded import check_settings, decodable, through_transformers

    try:
        check_settings(model)
        if next(model.parameters()).device.type == "cuda":
            from .decode_cuda import decode_batch

            steps = decode_batch(model, [tokens], *settings, kv_cache)
            return (token for (token,) in steps if token is not None)
        if kv_cache == "ordinary":
            return decode(decodable(model), tokens, *settings)
    except NotDecodableError as reason:
        log.warning("littlebit: transformers generates for this model, not its decoder: %s", reason)
    return iter(through_transformers(model, tokens, *settings, pad, kv_cache))


def pad_token(tokenizer: Any) -> int | None:
    """The token that fills up finished sequences."""
    return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
