"""Generate on a GPU by replaying one CUDA graph, which holds a step of the model and the sampling.

engines.py says which engine runs the steps of a model. A graph reads and writes the same memory at each replay, so
tokens, positions and the cache stay where they are. When the cache is full, a larger one is made, and the next step is
captured again.

On a CPU the steps run without graphs; the tests use that.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .._checks import check_prompts, embedding_rows, positions_of
from ..models.generation_settings import GenerationConfig, generation_defaults
from ..models.quantize import device_of
from .engines import Engine, choose_engine

log = logging.getLogger(__name__)


#: Capacity of the first cache, in tokens, if no prompt is longer.
SMALLEST_CAPACITY = 256


#: Most sequences that are decoded at once.
LARGEST_BATCH = 16


def sample(logits: Tensor, sampling: GenerationConfig, uniform: Tensor) -> Tensor:
    """Choose the next token of each sequence on the device, without waiting for it.

    Inverse transform sampling: tokens are sorted by probability, largest first, top_k and top_p cut off the tail, and
    the token is taken at which the cumulative probability passes `uniform` times the total.

    Parameters
    ----------
    logits : (batch, vocabulary) float tensor
    sampling : GenerationConfig
    uniform : (batch,) float32 tensor
        Random numbers in [0, 1); ignored at temperature 0.

    Returns
    -------
    (batch,) int64 tensor.
    """
    if not sampling.temperature:
        return logits.argmax(-1)
    count = min(sampling.top_k or logits.shape[-1], logits.shape[-1])
    scores, order = logits.float().topk(count)
    chances = (scores.double() / sampling.temperature).softmax(-1)
    if sampling.top_p is not None:
        before = chances.cumsum(-1) - chances  # probability of the likelier tokens
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


class DecodeLoop:
    """Run an engine on its own samples: each step reads the tokens that the step before has chosen.

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
        self.warm = False  # whether a step has run with this cache, which a capture needs
        self.graph: Any = None

    def start(self, prompts: Sequence[Sequence[int]]) -> None:
        """Prefill the prompts, and sample the first tokens."""
        logits = self.engine.prefill(prompts)
        self.length = max(map(len, prompts))
        if self.sampling.repetition_penalty not in (None, 1):
            self.mark_seen(prompts, logits.shape)
        self.draw_uniform()
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
        self.tokens.copy_(sample(logits, self.sampling, self.uniform))
        if self.seen is not None:
            self.seen.scatter_(1, self.tokens[:, None], True)

    def draw_uniform(self) -> None:
        """Draw the random numbers of the next sample, outside the graph."""
        if self.sampling.temperature:
            self.uniform.uniform_(generator=self.generator)

    def step(self) -> None:
        """Replace the tokens by the next ones: what a graph captures."""
        self.choose_next(self.engine.step(self.tokens))

    def advance(self) -> None:
        """Run a step; with graphs, the first on a cache warms up, and the second is captured and then replayed."""
        if self.length == self.engine.capacity:
            self.graph, self.warm = None, False  # frees the graph's memory
            self.engine.grow(self.engine.next_capacity)
        self.draw_uniform()
        if self.captures and self.warm and self.graph is None:
            self.capture()
        if self.graph is None:
            self.step()
        else:
            self.graph.replay()
        self.length, self.warm = self.length + 1, True

    def capture(self) -> None:
        """Capture a step; if torch cannot, log a warning and go on without graphs."""
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


class HostDecodeLoop(DecodeLoop):
    """Run an engine on tokens that the host chooses: the caller writes `tokens` before each `advance`.

    Attributes
    ----------
    logits : (batch, vocabulary) tensor
        After the last token of each sequence.
    """

    logits: Any = None

    def choose_next(self, logits: Tensor) -> None:
        """Keep the logits, at one address for captured graphs."""
        if self.logits is None:
            self.logits = torch.empty_like(logits)
        self.logits.copy_(logits)


def decode_batch(model: Any, prompts: Sequence[Sequence[int]], config: GenerationConfig) -> Iterator[list[int | None]]:
    """Generate new tokens after several prompts, all sequences at once.

    The host reads a token while the device already computes the next one.

    Parameters
    ----------
    model : transformers causal language model, on one device
    prompts : sequence of sequences of int
        1 to 16, of any lengths.
    config : GenerationConfig

    Returns
    -------
    Iterator with a list for each step: each sequence's new token, and None after its stop token.

    Raises
    ------
    NotDecodableError
        If no engine can run the model with this type of cache.
    ValueError
        If there are too many prompts, a token is not in the vocabulary, the context exceeds the model's positions, the
        cache does not fit the GPU, or the model is spread over several devices.
    """
    device_of(model)
    check_batch(prompts)
    check_prompts(prompts, config.max_new_tokens, embedding_rows(model), positions_of(model))
    longest = max(map(len, prompts))
    capacity = max(SMALLEST_CAPACITY, 1 << longest.bit_length())
    config = config.with_defaults(generation_defaults(model).config)
    loop = DecodeLoop(choose_engine(model, len(prompts), capacity, config.kv_cache), config)
    return decode_steps(loop, prompts, config.max_new_tokens, config.stop_tokens or ())


def check_batch(prompts: Sequence[Sequence[int]]) -> None:
    """Raise ValueError unless the prompts can be decoded at once."""
    if not 1 <= len(prompts) <= LARGEST_BATCH:
        raise ValueError(f"a batch must hold 1 to {LARGEST_BATCH} prompts, got {len(prompts)}: split it")
    if not all(prompts):
        raise ValueError("each prompt must have at least one token, got an empty one: leave it out")


def decode_steps(
    loop: DecodeLoop, prompts: Sequence[Sequence[int]], max_new_tokens: int, stop: Sequence[int]
) -> Iterator[list[int | None]]:
    """Run a loop until every sequence has yielded a stop token, or max_new_tokens; see `decode_batch`."""
    ended = [False] * len(prompts)
    try:
        with torch.inference_mode():
            loop.start(prompts)
        for left in range(max_new_tokens - 1, -1, -1):
            arrived = copy_to_host_async(loop.tokens)
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


def copy_to_host_async(tokens: Tensor) -> Callable[[], list[int]]:
    """Begin to copy tokens to the host.

    Returns
    -------
    Function that waits for this copy alone, not for later work on the device, and returns the tokens.
    """
    if tokens.device.type != "cuda":
        copied = tokens.tolist()
        return lambda: copied
    host = torch.empty(tokens.shape, dtype=tokens.dtype, pin_memory=True)
    host.copy_(tokens, non_blocking=True)
    event = torch.cuda.Event()
    event.record()

    def arrived() -> list[int]:
        event.synchronize()
        return host.tolist()

    return arrived
