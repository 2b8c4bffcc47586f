"""Generation on a GPU: a step of the model and the choice of the next token, captured in one CUDA graph and replayed.

What a step is, an engine says: fused_engine.py for Llama-like models, static_engine.py for all others that transformers
can run with a cache of fixed size. A graph reads and writes the same memory each time, so tokens, positions and the
cache stay where they are; when the cache is full, a larger one is made and the next step captured anew.

On a CPU everything runs as it is written, without graphs: that is how it is tested.
"""

import logging
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .._checks import check_prompts, embedding_rows, positions_of
from ..models.generation_settings import GenerationConfig, generation_defaults
from ..models.quantize import device_of
from .engines import Engine, engine_for

log = logging.getLogger(__name__)


#: Tokens that a cache has room for at first, if no prompt is longer.
SMALLEST_CAPACITY = 256


#: Sequences that are decoded at once, at most.
LARGEST_BATCH = 16


def choose(logits: Tensor, sampling: GenerationConfig, uniform: Tensor) -> Tensor:
    """The next token of each sequence, (batch,) int64, without waiting for the device.

    The tokens are put in order, the likeliest first, and the one is taken where the sum of the chances that are left by
    top_k and top_p passes `uniform` times all of it.

    Parameters
    ----------
    logits : (batch, vocabulary) float tensor
    sampling : GenerationConfig
    uniform : (batch,) float32 tensor
        Of numbers from 0 up to 1; not read at temperature 0.
    """
    if not sampling.temperature:
        return logits.argmax(-1)
    count = min(sampling.top_k or logits.shape[-1], logits.shape[-1])
    scores, order = logits.float().topk(count)
    chances = (scores.double() / sampling.temperature).softmax(-1)
    if sampling.top_p is not None:
        before = chances.cumsum(-1) - chances  # of the tokens that are likelier
        chances = torch.where(before < sampling.top_p, chances, 0.0)
    if sampling.min_p is not None:
        chances = torch.where(chances >= sampling.min_p * chances[:, :1], chances, 0.0)
    reached = chances.cumsum(-1)
    place = torch.searchsorted(reached, uniform[:, None] * reached[:, -1:], right=True)
    return order.gather(-1, place.clamp(max=count - 1))[:, 0]


def penalize_repetition(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Apply a repetition penalty to the logits of seen tokens, without waiting for the device: see `sampling`.

    Parameters
    ----------
    logits : (batch, vocabulary) float tensor
    seen : (batch, vocabulary) bool tensor
    penalty : float

    Returns
    -------
    (batch, vocabulary) float32 tensor.
    """
    logits = logits.float()
    return torch.where(seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)


class Loop:
    """An engine that goes on by itself: each step takes the tokens that the one before has chosen.

    Parameters
    ----------
    engine : Engine
    sampling : GenerationConfig
        Its seed is for torch's generator on the engine's device.
    """

    def __init__(self, engine: Engine, sampling: GenerationConfig = GenerationConfig()):  # noqa: B008
        self.engine, self.sampling = engine, sampling
        self.generator = torch.Generator(engine.device).manual_seed(sampling.seed)
        self.tokens = torch.zeros(engine.batch, dtype=torch.int64, device=engine.device)
        self.uniform = torch.zeros(engine.batch, device=engine.device)
        self.seen: Any = None  # (batch, vocabulary) bool: tokens of prompt and answer, for the repetition penalty
        self.length = 0  # tokens of the longest sequence in the cache
        self.captures = engine.device.type == "cuda"
        self.warm = False  # whether a step has run with the cache as it is
        self.graph: Any = None

    def start(self, prompts: Sequence[Sequence[int]]) -> None:
        """Read the prompts, and choose the first tokens."""
        logits = self.engine.prefill(prompts)
        self.length = max(map(len, prompts))
        if self.sampling.repetition_penalty not in (None, 1):
            self.mark_seen(prompts, logits.shape)
        self.draw()
        self.choose_next(logits)

    def mark_seen(self, prompts: Sequence[Sequence[int]], shape: Sequence[int]) -> None:
        """Mark the tokens of the prompts as seen; a captured graph keeps the address of the tensor."""
        if self.seen is None:
            self.seen = torch.zeros(*shape, dtype=torch.bool, device=self.engine.device)
        self.seen.zero_()
        for row, prompt in zip(self.seen, prompts, strict=True):
            row[list(prompt)] = True

    def choose_next(self, logits: Tensor) -> None:
        """Choose the next token of each sequence, and mark it as seen."""
        if self.seen is not None:
            logits = penalize_repetition(logits, self.seen, self.sampling.repetition_penalty)  # type: ignore[arg-type]
        self.tokens.copy_(choose(logits, self.sampling, self.uniform))
        if self.seen is not None:
            self.seen.scatter_(1, self.tokens[:, None], True)

    def draw(self) -> None:
        """New random numbers for the next choice."""
        if self.sampling.temperature:
            self.uniform.uniform_(generator=self.generator)

    def step(self) -> None:
        """Read the tokens, and put those that come next into their place."""
        self.choose_next(self.engine.step(self.tokens))

    def advance(self) -> None:
        """A step, as a graph where there can be one: the first with a cache warms up, the second is captured."""
        if self.length == self.engine.capacity:
            self.graph, self.warm = None, False  # frees what the graph kept
            self.engine.grow(self.engine.larger)
        self.draw()
        if self.captures and self.warm and self.graph is None:
            self.capture()
        if self.graph is None:
            self.step()
        else:
            self.graph.replay()
        self.length, self.warm = self.length + 1, True

    def capture(self) -> None:
        """Capture a step; if that cannot be done, say so and go on without."""
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                self.step()
        except RuntimeError as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            reason = str(error).splitlines()[0]
            log.warning("littlebit: steps run one kernel at a time, since no graph can be captured: %s", reason)
            self.captures = False
        else:
            self.graph = graph


def decode_batch(model: Any, prompts: Sequence[Sequence[int]], config: GenerationConfig) -> Iterator[list[int | None]]:
    """New tokens after several prompts, all sequences at once; the next step runs while a token is looked at.

    Parameters
    ----------
    model : transformers causal language model, on one device
    prompts : sequence of sequences of int
        1 to 16, of any lengths.
    config : GenerationConfig

    Returns
    -------
    Iterator of lists: the new token of each sequence, which may be the model's last one, and None after that.

    Raises
    ------
    NotDecodableError
        If the model cannot be run with such a cache of fixed size.
    ValueError
        If there are too many prompts, or tokens are not the model's, or the context exceeds what it knows, or the
        cache does not fit the GPU, or the model is spread over several devices.
    """
    device_of(model)
    check_batch(prompts)
    check_prompts(prompts, config.max_new_tokens, embedding_rows(model), positions_of(model))
    longest = max(map(len, prompts))
    capacity = max(SMALLEST_CAPACITY, 1 << longest.bit_length())
    config = config.with_defaults(generation_defaults(model).config)
    loop = Loop(engine_for(model, len(prompts), capacity, config.kv_cache), config)
    return stream(loop, prompts, config.max_new_tokens, config.stop_tokens or ())


def check_batch(prompts: Sequence[Sequence[int]]) -> None:
    """Raise ValueError unless the prompts can be decoded at once."""
    if not 1 <= len(prompts) <= LARGEST_BATCH or not all(prompts):
        raise ValueError(f"give 1 to {LARGEST_BATCH} prompts of at least one token, not {len(prompts)}")


def stream(
    loop: Loop, prompts: Sequence[Sequence[int]], max_new_tokens: int, stop: Sequence[int]
) -> Iterator[list[int | None]]:
    """What `decode_batch` returns."""
    ended = [False] * len(prompts)
    try:
        with torch.inference_mode():
            loop.start(prompts)
        for left in range(max_new_tokens - 1, -1, -1):
            arrived = sent(loop.tokens)
            if left:
                with torch.inference_mode():
                    loop.advance()
            tokens = arrived()
            yield [None if end else token for token, end in zip(tokens, ended, strict=True)]
            ended = [end or token in stop for token, end in zip(tokens, ended, strict=True)]
            if all(ended):
                return
    except torch.OutOfMemoryError as error:
        raise ValueError(
            f"the GPU has no memory left after {loop.length} tokens of {len(prompts)} sequences: give fewer or shorter "
            f"prompts, ask for fewer new tokens, or load the model in float16 ({str(error).splitlines()[0]})"
        ) from error


def sent(tokens: Tensor) -> Any:
    """Begin to send tokens to the host; what is returned waits for them, and for nothing that comes later."""
    if tokens.device.type != "cuda":
        kept = tokens.tolist()
        return lambda: kept
    host = torch.empty(tokens.shape, dtype=tokens.dtype, pin_memory=True)
    host.copy_(tokens, non_blocking=True)
    event = torch.cuda.Event()
    event.record()

    def arrived() -> list[int]:
        event.synchronize()
        return host.tolist()

    return arrived
