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
from ..models.generation_settings import Sampling, settings_of
from ..models.quantize import device_of
from .engines import Engine, engine_for

log = logging.getLogger(__name__)


#: Tokens that a cache has room for at first, if no prompt is longer.
SMALLEST_CAPACITY = 256


#: Sequences that are decoded at once, at most.
LARGEST_BATCH = 16


def choose(logits: Tensor, sampling: Sampling, uniform: Tensor) -> Tensor:
    """The next token of each sequence, (batch,) int64, without waiting for the device.

    The tokens are put in order, the likeliest first, and the one is taken where the sum of the chances that are left by
    top_k and top_p passes `uniform` times all of it.

    Parameters
    ----------
    logits : (batch, vocabulary) float tensor
    sampling : Sampling
    uniform : (batch,) float32 tensor
        Of numbers from 0 up to 1; not read at temperature 0.
    """
    if sampling.temperature == 0:
        return logits.argmax(-1)
    count = min(sampling.top_k or logits.shape[-1], logits.shape[-1])
    scores, order = logits.float().topk(count)
    chances = (scores.double() / sampling.temperature).softmax(-1)
    if sampling.top_p is not None:
        before = chances.cumsum(-1) - chances  # of the tokens that are likelier
        chances = torch.where(before < sampling.top_p, chances, 0.0)
    reached = chances.cumsum(-1)
    place = torch.searchsorted(reached, uniform[:, None] * reached[:, -1:], right=True)
    return order.gather(-1, place.clamp(max=count - 1))[:, 0]


class Loop:
    """An engine that goes on by itself: each step takes the tokens that the one before has chosen.

    Parameters
    ----------
    engine : Engine
    sampling : Sampling
    seed : int
        Of torch's generator on the engine's device.
    """

    def __init__(self, engine: Engine, sampling: Sampling = Sampling(), seed: int = 0):  # noqa: B008
        self.engine, self.sampling = engine, sampling
        self.generator = torch.Generator(engine.device).manual_seed(seed)
        self.tokens = torch.zeros(engine.batch, dtype=torch.int64, device=engine.device)
        self.uniform = torch.zeros(engine.batch, device=engine.device)
        self.length = 0  # tokens of the longest sequence in the cache
        self.captures = engine.device.type == "cuda"
        self.warm = False  # whether a step has run with the cache as it is
        self.graph: Any = None

    def start(self, prompts: Sequence[Sequence[int]]) -> None:
        """Read the prompts, and choose the first tokens."""
        logits = self.engine.prefill(prompts)
        self.length = max(map(len, prompts))
        self.draw()
        self.tokens.copy_(choose(logits, self.sampling, self.uniform))

    def draw(self) -> None:
        """New random numbers for the next choice."""
        if self.sampling.temperature > 0:
            self.uniform.uniform_(generator=self.generator)

    def step(self) -> None:
        """Read the tokens, and put those that come next into their place."""
        self.tokens.copy_(choose(self.engine.step(self.tokens), self.sampling, self.uniform))

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


def decode_batch(
    model: Any,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    kv_cache: str = "full",
) -> Iterator[list[int | None]]:
    """New tokens after several prompts, all sequences at once; the next step runs while a token is looked at.

    Parameters
    ----------
    model : transformers causal language model, on one device
    prompts : sequence of sequences of int
        1 to 16, of any lengths.
    max_new_tokens, temperature, top_k, top_p, seed, kv_cache
        See `decode.generate`.

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
    check_prompts(prompts, max_new_tokens, embedding_rows(model), positions_of(model))
    longest = max(map(len, prompts))
    capacity = max(SMALLEST_CAPACITY, 1 << longest.bit_length())
    engine = engine_for(model, len(prompts), capacity, kv_cache)
    loop = Loop(engine, Sampling(temperature, top_k, top_p), seed)
    return stream(loop, prompts, max_new_tokens, settings_of(model).stop)


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
