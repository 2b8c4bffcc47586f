"""Generate for several requests at once, in a thread of its own, and hand out each token as soon as it is chosen.

`Batcher` keeps a queue of jobs, admits them to the running batch, chooses each sequence's next token by its own
settings, and drops jobs that are cancelled. Two kinds of slots run the model:

| slots | model | when a waiting job joins |
|---|---|---|
| `CpuSlots` | one that the compiled CPU decoder runs | at the next step, beside the sequences that are running |
| `EngineSlots` | any that an engine of engines.py runs, on a GPU or a CPU | when the running batch has ended |

On a CPU a step holds one token of each running sequence and fills up with tokens of prompts (continuous batching, Orca,
OSDI 2022), and a new prompt takes over the cached keys and values of an earlier text with the same beginning. Neither
changes a result: a row is computed in the same way whatever else is in the step.
"""

import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from ...reference.arrays import Array
from .._checks import check_prompts
from ..models.generation_settings import GenerationConfig, GenerationDefaults, generation_defaults
from .architecture import NotDecodableError
from .cpu_decoder import BLOCK, Cache, Compiled, Decodable
from .sampling import choose_token

log = logging.getLogger(__name__)

#: Most sequences of a batch.
LARGEST_BATCH = 16
#: Most tokens of a sequence unless the caller asks for more: each takes memory in the cache.
CONTEXT = 8192
ROUND = 256  # capacities of caches are multiples of this
KEPT_CONTEXTS = 2  # finished caches are kept for new prompts as long as they hold at most this many contexts


class QueueFullError(Exception):
    """Report that too many jobs wait."""


class Choice(NamedTuple):
    """One token of a text.

    Attributes
    ----------
    token : int
    logprob : float, optional
        Natural logarithm of the model's probability, before temperature and penalties; None where it was not asked for.
    top : sequence of (token, logprob)
        The likeliest tokens, best first.
    """

    token: int
    logprob: float | None = None
    top: Sequence[tuple[int, float]] = ()


class Job:
    """A text to generate.

    Parameters
    ----------
    prompt : sequence of int
    config : GenerationConfig
    emit : callable
        Takes each `Choice`, and at the end "stop" (a stop token), "length" (max_new_tokens) or an exception. It is
        called in the batcher's thread and must return at once.
    logprobs : int, optional
        Likeliest tokens to report with each token; 0 for the token's own probability alone.
    score_prompt : bool
        Also emit the tokens of the prompt with their probabilities, before the first new token.
    new : bool
        False for no new tokens: the job ends after the prompt, with "length".
    """

    def __init__(
        self,
        prompt: Sequence[int],
        config: GenerationConfig,
        emit: Callable[[Choice | str | Exception], None],
        logprobs: int | None = None,
        score_prompt: bool = False,
        new: bool = True,
    ):
        self.prompt, self.config, self.emit, self.logprobs = list(prompt), config, emit, logprobs
        self.score_prompt, self.new, self.cancelled = score_prompt, new, False
        self.tokens = list(prompt)  # of prompt and answer
        self.generator = np.random.default_rng(config.seed)
        self.seen: Any = None  # (vocabulary,) bool array

    def cancel(self) -> None:
        """Stop before the next token; nothing more is emitted after that."""
        self.cancelled = True

    def score(self, logits: Array, token: int) -> Choice:
        """Describe a token with its log-probability and the likeliest ones, as far as they were asked for."""
        if self.logprobs is None:
            return Choice(token)
        exact = logits.astype(np.float64)
        most = exact.max()
        total = float(most + np.log(np.exp(exact - most).sum()))
        best = np.argpartition(logits, -self.logprobs)[-self.logprobs :] if self.logprobs else np.empty(0, np.int64)
        best = best[np.lexsort((best, -logits[best]))]
        return Choice(token, float(logits[token]) - total, [(int(each), float(logits[each]) - total) for each in best])

    def choose(self, logits: Array) -> bool:
        """Choose and emit the next token; return whether the text goes on."""
        if self.seen is None:
            self.seen = np.zeros(len(logits), bool)
            self.seen[self.tokens] = True
        raw = logits if self.logprobs is None else logits.copy()  # a repetition penalty changes the logits
        token = choose_token(logits, self.config, self.seen, self.generator)
        self.tokens.append(token)
        self.emit(self.score(raw, token))
        if token in (self.config.stop_tokens or ()):
            self.emit("stop")
            return False
        if len(self.tokens) - len(self.prompt) == self.config.max_new_tokens:
            self.emit("length")
            return False
        return True


class Slots(Protocol):
    """Run the sequences of a batch.

    Attributes
    ----------
    defaults : GenerationDefaults
        The model's own settings.
    vocabulary, context : int
        Rows of the embedding, and most tokens of a sequence.
    scores_prompts : bool
        Whether it runs jobs with `score_prompt`.
    """

    defaults: GenerationDefaults
    vocabulary: int
    context: int
    scores_prompts: bool

    def room(self, running: int) -> int:
        """Count the jobs that can join now, with this many running."""
        ...

    def join(self, jobs: Sequence[Job]) -> None:
        """Let jobs join the batch."""
        ...

    def leave(self, job: Job) -> None:
        """Remove a job from the batch."""
        ...

    def step(self, jobs: Sequence[Job]) -> list[tuple[Job, Array]]:
        """Run one step; return the jobs whose next token can be chosen, with logits (vocabulary,) float32."""
        ...


class CpuSlots:
    """Run sequences with the compiled CPU decoder; implements `Slots`.

    Parameters
    ----------
    model : Decodable
    size : int
        Most sequences at once, at most BLOCK.
    context : int
        Most tokens of a sequence.
    """

    scores_prompts = True

    def __init__(self, model: Decodable, size: int = LARGEST_BATCH, context: int = CONTEXT):
        self.sizes, self.size, self.context = model.sizes, min(size, BLOCK), min(context, model.sizes.positions)
        self.defaults, self.vocabulary = model.generation, model.sizes.vocabulary
        self.compiled = Compiled(model, self.context)
        self.caches: dict[Job, Cache] = {}
        self.logits = np.empty((self.size, self.vocabulary), np.float32)
        self.kept: list[tuple[list[int], Cache]] = []  # of finished jobs, the oldest first

    def room(self, running: int) -> int:  # noqa: D102
        return self.size - running

    def join(self, jobs: Sequence[Job]) -> None:  # noqa: D102
        for job in jobs:
            self.caches[job] = self.cache_for(job)

    def cache_for(self, job: Job) -> Cache:
        """Take over the kept cache with the longest common beginning, or make one."""
        needed = min(-(-(len(job.prompt) + job.config.max_new_tokens) // ROUND) * ROUND, self.context)
        if job.score_prompt or not self.kept:
            return Cache(self.sizes, needed)
        shared = [common_length(tokens, job.prompt[:-1]) for tokens, _ in self.kept]
        best = max(range(len(shared)), key=shared.__getitem__)
        if not shared[best]:
            return Cache(self.sizes, needed)
        tokens, cache = self.kept[best]
        if shared[best] < len(tokens) // 2 or cache.capacity < needed:  # others may still continue it
            return cache.copy(self.sizes, needed, shared[best])
        self.kept.pop(best)
        cache.position = shared[best]
        return cache

    def leave(self, job: Job) -> None:  # noqa: D102
        cache = self.caches.pop(job, None)
        if cache is not None and cache.position:
            self.kept.append((job.tokens[: cache.position], cache))
        while len(self.kept) > self.size or sum(len(tokens) for tokens, _ in self.kept) > KEPT_CONTEXTS * self.context:
            self.kept.pop(0)

    def step(self, jobs: Sequence[Job]) -> list[tuple[Job, Array]]:  # noqa: D102
        pending = {job: job.tokens[self.caches[job].position :] for job in jobs}
        counts = dict.fromkeys(jobs, 1)
        left = BLOCK - len(jobs)
        for job in jobs:  # the oldest prompt first
            more = 0 if job.score_prompt else min(left, len(pending[job]) - 1)
            counts[job], left = 1 + more, left - more
        parts: list[tuple[Cache, Sequence[int], Array | None]] = []
        ready: list[tuple[Job, Array]] = []
        for logits, job in zip(self.logits, jobs, strict=False):
            last = counts[job] == len(pending[job])
            wanted = last or job.score_prompt
            parts.append((self.caches[job], pending[job][: counts[job]], logits if wanted else None))
            if wanted:
                ready.append((job, logits))
        self.compiled.step(parts)
        chosen = []
        for job, logits in ready:
            position = self.caches[job].position
            if position < len(job.tokens):  # a prompt whose tokens are scored
                token = job.tokens[position]
                job.emit(job.score(logits, token))
            else:
                chosen.append((job, logits))
        return chosen


def common_length(first: Sequence[int], second: Sequence[int]) -> int:
    """Count the tokens at which two sequences begin alike."""
    for at, (mine, yours) in enumerate(zip(first, second, strict=False)):
        if mine != yours:
            return at
    return min(len(first), len(second))


class EngineSlots:
    """Run batches with an engine of engines.py, with CUDA graphs on a GPU; implements `Slots`.

    Parameters
    ----------
    model : transformers causal language model, on one device
    size : int
        Most sequences at once, at most LARGEST_BATCH.
    context : int
        Most tokens of a sequence.
    kv_cache : str
        A type of cache in memory.KV_CACHES.

    Raises
    ------
    NotDecodableError
        If no engine can run the model.
    """

    scores_prompts = False

    def __init__(self, model: Any, size: int = LARGEST_BATCH, context: int = CONTEXT, kv_cache: str = "full"):
        from .._checks import embedding_rows, positions_of
        from .engines import choose_engine
        from .torch_weights import check_settings

        check_settings(model)
        choose_engine(model, 1, ROUND, kv_cache)  # raises now if none can
        self.model, self.size, self.kv_cache = model, min(size, LARGEST_BATCH), kv_cache
        self.context = min(context, positions_of(model) or context)
        self.vocabulary = embedding_rows(model) or 0
        self.defaults = generation_defaults(model)
        self.jobs: list[Job] = []  # one for each row of the engine, also those that have left
        self.loop: Any = None
        self.started = False

    def room(self, running: int) -> int:  # noqa: D102
        return 0 if running else self.size

    def join(self, jobs: Sequence[Job]) -> None:  # noqa: D102
        from .engines import choose_engine
        from .graph_decoder import SMALLEST_CAPACITY, HostDecodeLoop

        longest = max(len(job.prompt) for job in jobs)
        capacity = max(SMALLEST_CAPACITY, 1 << longest.bit_length())
        self.loop = None  # frees the last batch's cache first
        self.loop = HostDecodeLoop(choose_engine(self.model, len(jobs), capacity, self.kv_cache))
        self.jobs, self.started = list(jobs), False

    def leave(self, job: Job) -> None:
        """Leave a job's row in the batch, unread."""

    def step(self, jobs: Sequence[Job]) -> list[tuple[Job, Array]]:  # noqa: D102
        import torch

        with torch.inference_mode():
            if not self.started:
                self.loop.start([job.prompt for job in self.jobs])
                self.started = True
            else:
                self.loop.tokens.copy_(torch.tensor([job.tokens[-1] for job in self.jobs]))
                self.loop.advance()
            logits = self.loop.logits.float().cpu().numpy()
        return [(job, row) for job, row in zip(self.jobs, logits, strict=True) if job in jobs]


def slots_for(model: Any, size: int = LARGEST_BATCH, context: int = CONTEXT, kv_cache: str = "full") -> Slots:
    """Make slots for a model: the compiled CPU decoder's if it can run the model, else an engine's.

    Raises
    ------
    NotDecodableError
        If no decoder of this package can run the model.
    """
    if not isinstance(model, Decodable) and kv_cache == "full":
        from .torch_weights import check_settings, decodable

        try:
            check_settings(model)
            model = decodable(model)
        except NotDecodableError as reason:
            log.debug("littlebit: an engine runs this model: %s", reason)
    if isinstance(model, Decodable):
        return CpuSlots(model, size, context)
    return EngineSlots(model, size, context, kv_cache)


class Batcher:
    """Run jobs in a thread of its own.

    Parameters
    ----------
    slots : Slots
    queue_limit : int
        Most jobs that may wait for a place in the batch.
    """

    def __init__(self, slots: Slots, queue_limit: int = 64):
        self.slots, self.queue_limit = slots, queue_limit
        self.waiting: deque[Job] = deque()
        self.running: list[Job] = []
        self.changed = threading.Condition()
        self.closed = False
        self.thread = threading.Thread(target=self.run, name="littlebit-batcher", daemon=True)
        self.thread.start()

    def check(self, prompt: Sequence[int], new: int) -> None:
        """Raise ValueError unless a prompt's tokens are in the vocabulary, and fit the context with `new` others."""
        check_prompts([prompt], new, self.slots.vocabulary, self.slots.context)

    def capacity(self) -> int:
        """Count the jobs that an idle batcher takes: those that run at once, and those that wait."""
        return self.slots.room(0) + self.queue_limit

    def submit(self, jobs: Sequence[Job]) -> None:
        """Add jobs to the queue, all or none.

        Raises
        ------
        QueueFullError
            If there is no room for all of them.
        """
        with self.changed:
            if self.closed:
                raise QueueFullError("the server is stopping")
            self.waiting = deque(job for job in self.waiting if not job.cancelled)
            free = max(self.slots.room(len(self.running)), 0)
            if len(self.waiting) + len(jobs) > self.queue_limit + free:
                raise QueueFullError(f"{len(self.running)} texts are being generated and {len(self.waiting)} wait")
            for job in jobs:
                job.config = job.config.with_defaults(self.slots.defaults.config)
            self.waiting.extend(jobs)
            self.changed.notify()

    def close(self) -> None:
        """End the thread after its present step; the jobs that are left get a RuntimeError."""
        with self.changed:
            self.closed = True
            self.changed.notify()
        self.thread.join()

    def run(self) -> None:
        """Admit, step and choose until closed."""
        while True:
            with self.changed:
                while not (self.closed or self.running or self.waiting):
                    self.changed.wait()
                if self.closed:
                    break
            try:
                self.advance()
            except Exception as error:  # one that no job has caused alone: all end, the batcher lives on
                if not isinstance(error, ValueError):
                    log.exception("littlebit: a step of the batch failed")
                self.fail(error)
        for job in [*self.running, *self.waiting]:
            job.emit(RuntimeError("the server is stopping"))

    def advance(self) -> None:
        """Drop cancelled jobs, admit waiting ones, and run one step."""
        for job in [job for job in self.running if job.cancelled]:
            self.remove(job)
        with self.changed:
            self.waiting = deque(job for job in self.waiting if not job.cancelled)
            count = min(self.slots.room(len(self.running)), len(self.waiting))
            joining = [self.waiting.popleft() for _ in range(count)]
            self.running.extend(joining)
        if joining:
            self.slots.join(joining)
        if not self.running:
            return
        for job, logits in self.slots.step(self.running):
            if not job.new:
                job.emit("length")
            if job.cancelled or not job.new or not job.choose(logits):
                self.remove(job)

    def remove(self, job: Job) -> None:
        """Remove a job from the batch."""
        self.running.remove(job)
        self.slots.leave(job)

    def fail(self, error: Exception) -> None:
        """End all running jobs with an error."""
        running, self.running = self.running, []
        for job in running:
            self.slots.leave(job)
            job.emit(error)
