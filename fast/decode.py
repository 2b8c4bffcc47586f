"""Generation: text in, text out."""

from typing import Any

import torch
from torch import Tensor, nn


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
) -> str:
    """Text that a model writes after a prompt, through transformers' generate with its key-value cache.

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

    Returns
    -------
    The new text, without the prompt.

    Raises
    ------
    ValueError
        If the prompt has no tokens, or a setting is out of range.
    """
    from .hf import load_tokenizer

    tokenizer = tokenizer or load_tokenizer(model.name_or_path)  # type: ignore[arg-type]
    if chat:
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
        )
    tokens = tokenizer(prompt, return_tensors="pt")["input_ids"]  # (1, length)
    if tokens.shape[1] == 0:
        raise ValueError("the prompt is empty: give at least one character")
    new = generate_tokens(model, tokens, max_new_tokens, temperature, top_k, top_p, seed, pad_token(tokenizer))
    return tokenizer.decode(new[0], skip_special_tokens=True)


def generate_tokens(
    model: nn.Module,
    tokens: Tensor,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    pad: int | None = None,
) -> Tensor:
    """New tokens, (1, at most max_new_tokens), after the prompt `tokens`, (1, length); see `generate`.

    Raises
    ------
    ValueError
        If a setting is out of range.
    """
    if max_new_tokens < 1 or temperature < 0:
        raise ValueError(f"need max_new_tokens >= 1 and temperature >= 0, not {max_new_tokens} and {temperature}")
    sampling = {"do_sample": True, "temperature": temperature, "top_k": top_k or 0, "top_p": top_p or 1.0}
    greedy = {"do_sample": False, "temperature": None, "top_k": None, "top_p": None}
    tokens = tokens.to(next(model.parameters()).device)
    with torch.random.fork_rng(), torch.inference_mode():
        torch.manual_seed(seed)
        output = model.generate(  # type: ignore[operator]
            tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=max_new_tokens,
            pad_token_id=pad,
            **(sampling if temperature else greedy),
        )
    return output[:, tokens.shape[1] :]


def pad_token(tokenizer: Any) -> int | None:
    """The token that fills up finished sequences."""
    return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
