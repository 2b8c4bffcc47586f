"""Generate text from a prompt, at once or as a stream, with the fastest decoder that runs the model.

| model | decoder |
|---|---|
| Llama-like, on the CPU | compiled code (cpu_decoder.py) |
| on a GPU | one CUDA graph for each token (graph_decoder.py) |
| any other | transformers' `generate` |
"""

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, overload

from ...reference._renamed import renamed_value
from .._checks import check_prompts, embedding_rows, flat_tokens, positions_of
from ..models.generation_settings import GenerationConfig
from .architecture import NotDecodableError
from .cpu_decoder import Decodable, decode

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger(__name__)


@overload
def generate(model: Any, prompt: str, *settings: Any, **keywords: Any) -> str: ...
@overload
def generate(model: Any, prompt: Sequence[str], *settings: Any, **keywords: Any) -> list[str]: ...
def generate(
    model: Any,
    prompt: str | Sequence[str],
    max_new_tokens: int | None = None,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    chat: bool = False,
    tokenizer: Any = None,
    kv_cache: str | None = None,
    *,
    min_p: float | None = None,
    repetition_penalty: float | None = None,
    stop: Sequence[str] = (),
    config: GenerationConfig | None = None,
) -> str | list[str]:
    """Generate the text that follows a prompt, or each of several prompts.

    A setting that is None has the value in `config`. If it is None there too, the model's generation_config decides:
    with `do_sample` it samples with its own values and transformers' defaults, otherwise it decodes greedily.

    Parameters
    ----------
    model : transformers causal language model, dense or packed, or a Decodable
        transformers runs a model with adapters of PEFT.
    prompt : str or sequence of str
        A GPU decodes up to 16 prompts at once.
    max_new_tokens : int, optional
        Tokens to generate for each prompt; by default 64.
    temperature, top_k, top_p, min_p, repetition_penalty : optional
        How each token is chosen: see `GenerationConfig`.
    seed : int, optional
        Seed of the sampling, by default 0: of NumPy's generator on a CPU, of torch's on a GPU and in transformers.
        Global generators keep their state.
    chat : bool
        Put the prompt into the tokenizer's chat template, as the user's turn.
    tokenizer : transformers tokenizer, optional
        By default the one in the directory or repository that the model was loaded from.
    kv_cache : str, optional
        "full" (the default), "latent" (float16) or "latent-int8". A latent cache takes less memory and more time: see
        `latent_cache`.
    stop : sequence of str
        End the text before the first of these strings.
    config : GenerationConfig, optional
        All settings but `chat`, `tokenizer` and `stop` in one object, and the stop tokens.

    Returns
    -------
    The new text, without the prompt; a list of texts for a sequence of prompts.

    Raises
    ------
    ValueError
        If a prompt has no tokens or is not text, a setting is out of range, a token has no row in the model's
        embedding, or prompt and new tokens need more positions than the model has (max_position_embeddings).
    """
    given = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_k": top_k, "top_p": top_p}
    given |= {"seed": seed, "kv_cache": renamed_value("kv_cache", kv_cache)}
    config = merge(config, **given, min_p=min_p, repetition_penalty=repetition_penalty)
    if isinstance(prompt, str):
        return "".join(stream(model, prompt, chat=chat, tokenizer=tokenizer, stop=stop, config=config))
    model = unwrap(model)
    tokenizer = find_tokenizer(model, tokenizer)
    tokens = [prompt_tokens(tokenizer, each, chat) for each in prompt]
    new = batch_tokens(model, tokens, config, pad_token(tokenizer))
    return ["".join(text_chunks(tokenizer, each, stop)) for each in new]


def stream(
    model: Any,
    prompt: str,
    max_new_tokens: int | None = None,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    chat: bool = False,
    tokenizer: Any = None,
    kv_cache: str | None = None,
    *,
    min_p: float | None = None,
    repetition_penalty: float | None = None,
    stop: Sequence[str] = (),
    config: GenerationConfig | None = None,
) -> Iterator[str]:
    """Generate text and yield each chunk as soon as it is complete; joined, they are the text of `generate`.

    Parameters and errors are the same as in `generate`.
    """
    given = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_k": top_k, "top_p": top_p}
    given |= {"seed": seed, "kv_cache": renamed_value("kv_cache", kv_cache)}
    config = merge(config, **given, min_p=min_p, repetition_penalty=repetition_penalty)
    model = unwrap(model)
    tokenizer = find_tokenizer(model, tokenizer)
    tokens = prompt_tokens(tokenizer, prompt, chat)
    return text_chunks(tokenizer, stream_tokens(model, tokens, config, pad_token(tokenizer)), stop)


def merge(config: GenerationConfig | None, **given: Any) -> GenerationConfig:
    """Replace settings of a config by those keyword arguments that are not None."""
    return replace(config or GenerationConfig(), **{name: value for name, value in given.items() if value is not None})


def unwrap(model: Any) -> Any:
    """Remove torch.compile and data parallelism from a model; they decode a single sequence no faster."""
    if isinstance(model, Decodable):
        return model
    from ..models.wrappers import unwrapped

    return unwrapped(model)


def find_tokenizer(model: Any, tokenizer: Any = None) -> Any:
    """Return the given tokenizer or, by default, load the one that was saved with the model.

    Raises
    ------
    ValueError
        If there is no tokenizer where the model was loaded from.
    """
    if tokenizer is not None:
        return tokenizer
    from ..checkpoints.dense import load_tokenizer

    source = getattr(model, "name_or_path", "")
    if not source:
        raise ValueError("the model was not loaded from a directory, so its tokenizer must be passed: tokenizer=...")
    try:
        return load_tokenizer(source)
    except ValueError as error:
        raise ValueError(f"{error}; or pass a tokenizer: tokenizer=...") from error


def pad_token(tokenizer: Any) -> int | None:
    """Return the token that transformers appends to finished sequences."""
    return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id


def prompt_tokens(tokenizer: Any, prompt: str, chat: bool) -> list[int]:
    """Tokenize a prompt; in a chat only the chat template adds special tokens.

    Raises
    ------
    ValueError
        If the prompt has no tokens or cannot be written as UTF-8, or the chat template cannot be used.
    """
    if not isinstance(prompt, str):
        raise ValueError(f"a prompt must be a str, got {type(prompt).__name__}: give tokens to generate_tokens instead")
    try:
        prompt.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"the prompt must be text that UTF-8 can hold: {error}") from error
    if chat:
        prompt = apply_chat_template(tokenizer, [{"role": "user", "content": prompt}])
    tokens = list(tokenizer(prompt, add_special_tokens=not chat)["input_ids"])
    if not tokens:
        raise ValueError("the prompt is empty: give at least one character")
    return tokens


def apply_chat_template(tokenizer: Any, messages: Sequence[dict[str, str]]) -> str:
    """Put messages, each with "role" and "content", into the tokenizer's chat template.

    Raises
    ------
    ValueError
        If there is no template, or it raises an error.
    """
    from jinja2 import TemplateError

    try:
        return tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
    except (TemplateError, TypeError) as error:
        raise ValueError(f"the tokenizer's chat template cannot be used: {error}") from error


def text_chunks(tokenizer: Any, tokens: Iterable[int], stop: Sequence[str] = ()) -> Iterator[str]:
    """Decode tokens into chunks of text, each as soon as no later token can change it.

    Parameters
    ----------
    tokenizer
    tokens : iterable of int
    stop : sequence of str
        End the text before the first of these strings.
    """
    text = TextDecoder(tokenizer, stop)
    for token in tokens:
        if chunk := text.push(token):
            yield chunk
        if text.stopped:
            return
    if rest := text.finish():
        yield rest


class TextDecoder:
    """Decode tokens into text, one by one, and end it before a stop string.

    A token may hold only a part of a character; then its text has to wait for the next token. A chunk is the difference
    of two decodings that begin at the same token, because some tokenizers drop the space before the first token. Text
    that may be the beginning of a stop string waits too.

    Parameters
    ----------
    tokenizer
    stop : sequence of str

    Attributes
    ----------
    stopped : bool
        Whether a stop string has ended the text.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()):
        self.tokenizer, self.stop, self.stopped = tokenizer, [each for each in stop if each], False
        self.known: list[int] = []
        self.start = self.written = 0  # the chunks so far hold known[:written]; decoding begins at the chunk before
        self.held = ""  # may be the beginning of a stop string

    def text(self, stop: int | None) -> str:
        """Decode the known tokens from the last chunk but one up to `stop`."""
        return self.tokenizer.decode(self.known[self.start : stop], skip_special_tokens=True)

    def push(self, token: int) -> str:
        """Return the text that a token completes, possibly none."""
        self.known.append(token)
        before, now = self.text(self.written), self.text(None)
        if len(now) <= len(before) or now.endswith("\ufffd"):
            return ""
        self.start, self.written = self.written, len(self.known)
        return self.release(now[len(before) :])

    def finish(self) -> str:
        """Return the text that waited for more tokens."""
        if self.stopped:
            return ""
        rest = self.release(self.text(None)[len(self.text(self.written)) :])
        held, self.held = self.held, ""
        return rest if self.stopped else rest + held

    def release(self, new: str) -> str:
        """Append text to what is held, and return what cannot belong to a stop string."""
        text, self.held = self.held + new, ""
        found = [at for at in (text.find(each) for each in self.stop) if at >= 0]
        if found:
            self.stopped = True
            return text[: min(found)]
        longest = max((len(each) - 1 for each in self.stop), default=0)
        for length in range(min(longest, len(text)), 0, -1):
            if any(each.startswith(text[-length:]) for each in self.stop):
                self.held = text[-length:]
                return text[:-length]
        return text


def generate_tokens(model: Any, tokens: "Tensor", config: GenerationConfig, pad: int | None = None) -> "Tensor":
    """Generate the tokens that follow a prompt of tokens.

    Parameters
    ----------
    model
        See `generate`.
    tokens : (length,) or (1, length) integer tensor
    config : GenerationConfig
    pad : int, optional
        The token that transformers appends to finished sequences.

    Returns
    -------
    (1, n) int64 tensor on the model's device, n at most config.max_new_tokens.

    Raises
    ------
    ValueError
        If the tokens have another shape or no row in the embedding, or the text needs too many positions.
    """
    import torch

    prompt = flat_tokens(tokens, model).tolist()
    new = list(stream_tokens(model, prompt, config, pad))
    return torch.tensor([new], dtype=torch.int64, device=next(model.parameters()).device)


def stream_tokens(model: Any, tokens: Sequence[int], config: GenerationConfig, pad: int | None = None) -> Iterator[int]:
    """Generate the tokens that follow a prompt of tokens, and yield them one by one.

    Parameters and errors are the same as in `generate_tokens`.
    """
    check_prompts([tokens], config.max_new_tokens, *vocabulary_and_positions(model))
    if isinstance(model, Decodable):
        if config.kv_cache != "full":
            raise ValueError(
                f"a model mapped into memory decodes with kv_cache='full', not {config.kv_cache!r}: load it with `load`"
            )
        return decode(model, tokens, config)
    from .torch_weights import check_settings, decodable, through_transformers

    try:
        check_settings(model)
        if on_gpu(model):
            from .graph_decoder import decode_batch

            return (token for (token,) in decode_batch(model, [tokens], config) if token is not None)
        if config.kv_cache == "full":
            return decode(decodable(model), tokens, config)
    except NotDecodableError as reason:
        log.warning("littlebit: transformers generates for this model, not its decoder: %s", reason)
    return iter(through_transformers(model, tokens, config, pad))


def batch_tokens(
    model: Any, prompts: Sequence[Sequence[int]], config: GenerationConfig, pad: int | None = None
) -> list[list[int]]:
    """Generate the tokens that follow each of several prompts: on a GPU in batches, else one prompt after the other.

    Parameters and errors are the same as in `generate_tokens`.
    """
    check_prompts(prompts, config.max_new_tokens, *vocabulary_and_positions(model))
    if on_gpu(model):
        from .graph_decoder import LARGEST_BATCH, decode_batch
        from .torch_weights import check_settings

        try:
            check_settings(model)
            new: list[list[int]] = []
            for first in range(0, len(prompts), LARGEST_BATCH):
                rows = zip(*decode_batch(model, prompts[first : first + LARGEST_BATCH], config), strict=True)
                new += [[token for token in row if token is not None] for row in rows]
        except NotDecodableError:
            pass  # stream_tokens logs the reason
        else:
            return new
    return [list(stream_tokens(model, tokens, config, pad)) for tokens in prompts]


def on_gpu(model: Any) -> bool:
    """Decide whether a model is a torch module on an NVIDIA GPU."""
    return not isinstance(model, Decodable) and next(model.parameters()).device.type == "cuda"


def vocabulary_and_positions(model: Any) -> tuple[int | None, int | None]:
    """Count the rows of a model's embedding and the positions it has; None where there is no limit."""
    if isinstance(model, Decodable):
        return model.sizes.vocabulary, model.sizes.positions
    return embedding_rows(model), positions_of(model)
