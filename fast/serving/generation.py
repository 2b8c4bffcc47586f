"""Generate the texts that a request asks for, and give them out as events in the server's event loop."""

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from ..decoding.batching import Batcher, Choice, Job, QueueFullError
from ..decoding.generate import TextDecoder, apply_chat_template
from .requests import ApiError, ApiRequest


class Event(NamedTuple):
    """Progress of one text.

    Attributes
    ----------
    index : int
    text : str
        New text, possibly empty.
    choices : sequence of Choice
        The tokens that were chosen since the last event.
    finish : str, optional
        "stop" or "length" in the last event of a text.
    """

    index: int
    text: str
    choices: Sequence[Choice]
    finish: str | None


class ClientLeftError(Exception):
    """Report that nobody waits for the answer any more."""


class Model(NamedTuple):
    """A model that is served.

    Attributes
    ----------
    names : sequence of str
        Names that requests may give it; the first is listed.
    tokenizer : Tokenizer, or transformers tokenizer
    batcher : Batcher
    """

    names: Sequence[str]
    tokenizer: Any
    batcher: Batcher


class Generation:
    """Hold the texts of one request; iterate over it once, for objects of the class `Event`.

    Parameters
    ----------
    model : Model
    request : ApiRequest
    timeout : float
        Seconds from now until the request is given up.

    Attributes
    ----------
    prompts : list of list of int
        The prompts' tokens.
    prompt_tokens, new_tokens : int
        Tokens read and chosen so far.
    first_token_s : float, optional
        Seconds from the beginning to the first token.

    Raises
    ------
    ApiError
        If a prompt cannot be encoded or does not fit the context, or there are more texts than the queue could hold.
    """

    def __init__(self, model: Model, request: ApiRequest, timeout: float):
        self.model, self.request = model, request
        self.begin, self.timeout = time.monotonic(), timeout
        self.queue: asyncio.Queue[tuple[int, Choice | str | Exception]] = asyncio.Queue()
        self.prompts = [self.encode(prompt) for prompt in request.prompts] if not request.chat else [self.encode_chat()]
        self.prompt_tokens, self.new_tokens = sum(map(len, self.prompts)), 0
        self.first_token_s: float | None = None
        self.jobs = self.make_jobs()
        self.texts = [TextDecoder(model.tokenizer, request.stop) for _ in self.jobs]
        self.unscored = [len(job.prompt) - 1 if job.score_prompt else 0 for job in self.jobs]
        self.watcher: asyncio.Future[None] | None = None

    def encode(self, prompt: str | list[int]) -> list[int]:
        """Return the tokens of a completion's prompt."""
        return prompt if isinstance(prompt, list) else list(self.model.tokenizer(prompt)["input_ids"])

    def encode_chat(self) -> list[int]:
        """Return the tokens of a chat, which end where the model's turn begins."""
        try:
            text = apply_chat_template(self.model.tokenizer, self.request.messages)
        except ValueError as error:
            raise ApiError(f"{error}; /v1/completions needs no template", param="messages") from error
        return list(self.model.tokenizer(text, add_special_tokens=False)["input_ids"])

    def make_jobs(self) -> list[Job]:
        """Make a job for each text: `n` for each prompt."""
        request, loop = self.request, asyncio.get_running_loop()
        seed = request.config.seed if request.seeded else secrets.randbelow(2**62)
        scores = request.echo and request.logprobs is not None
        if scores and not self.model.batcher.slots.scores_prompts:
            raise ApiError("echo with logprobs needs a model on the CPU: leave echo out", param="echo")
        most, count = self.model.batcher.capacity(), len(self.prompts) * request.n
        if count > most:
            raise ApiError(f"the request asks for {count} texts, but this server holds {most} at most", param="n")
        jobs: list[Job] = []
        for prompt in self.prompts:
            limit = self.limit(prompt)
            for _ in range(request.n):
                config = replace(request.config, max_new_tokens=max(limit, 1), seed=(seed + len(jobs)) % 2**63)
                emit = self.emitter(loop, len(jobs))
                jobs.append(Job(prompt, config, emit, request.logprobs, scores, limit > 0))
        return jobs

    def limit(self, prompt: list[int]) -> int:
        """Return the most new tokens after a prompt, after checking that they fit the context."""
        context, limit = self.model.batcher.slots.context, self.request.limit
        name = "messages" if self.request.chat else "prompt"
        if limit is None:
            limit = max(context - len(prompt), 1)
        try:
            self.model.batcher.check(prompt, max(limit, 1))
        except ValueError as error:
            code = "context_length_exceeded" if len(prompt) + limit > context else None
            raise ApiError(str(error), param=name, code=code) from error
        return limit

    def emitter(self, loop: asyncio.AbstractEventLoop, index: int) -> Callable[[Choice | str | Exception], None]:
        """Make the function that hands a job's events from the batcher's thread to the event loop."""

        def emit(event: Choice | str | Exception) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(self.queue.put_nowait, (index, event))

        return emit

    def start(self, leaves: Awaitable[None]) -> None:
        """Put the jobs into the queue.

        Parameters
        ----------
        leaves : awaitable
            Ends when the client leaves; the jobs are then cancelled.

        Raises
        ------
        ApiError
            With status 429, if the queue is full.
        """
        self.watcher = asyncio.ensure_future(self.watch(leaves))
        try:
            self.model.batcher.submit(self.jobs)
        except QueueFullError as error:
            self.close()
            raise ApiError(
                f"the server is busy: {error}; try again later", 429, None, "rate_limit_exceeded", "rate_limit_error"
            ) from error

    async def watch(self, leaves: Awaitable[None]) -> None:
        """Cancel the jobs when the client leaves."""
        await leaves
        for job in self.jobs:
            job.cancel()
        self.queue.put_nowait((0, ClientLeftError("the client left")))

    def close(self) -> None:
        """Cancel the jobs that still run."""
        for job in self.jobs:
            job.cancel()
        if self.watcher is not None:
            self.watcher.cancel()

    async def __aiter__(self) -> AsyncIterator[Event]:
        """Yield events until every text has ended.

        Raises
        ------
        ApiError
            If the time is over, or the model failed.
        ClientLeftError
            If the client left.
        """
        open_texts = set(range(len(self.jobs)))
        try:
            async with asyncio.timeout(max(self.begin + self.timeout - time.monotonic(), 0)):
                while open_texts:
                    index, event = await self.queue.get()
                    if isinstance(event, ClientLeftError):
                        raise event
                    if isinstance(event, Exception):
                        raise ApiError(f"the model failed: {event}", 500, None, "internal_error", "server_error")
                    if index in open_texts:
                        found = self.progress(index, event)
                        if found.finish:
                            open_texts.remove(index)
                        yield found
        except TimeoutError as error:
            message = f"the answer took longer than {self.timeout:g} s: ask for fewer tokens (max_tokens)"
            raise ApiError(message, 504, None, "timeout", "server_error") from error
        finally:
            self.close()

    def progress(self, index: int, event: Choice | str) -> Event:
        """Turn what a job emitted into text."""
        text = self.texts[index]
        if isinstance(event, str):
            rest = text.finish()
            return Event(index, rest, (), "stop" if text.stopped else event)
        job = self.jobs[index]
        if self.unscored[index]:
            self.unscored[index] -= 1
            return Event(index, "", (event,), None)
        self.new_tokens += 1
        if self.first_token_s is None:
            self.first_token_s = time.monotonic() - self.begin
        chunk = text.push(event.token)
        if text.stopped:
            job.cancel()
        return Event(index, chunk, (event,), "stop" if text.stopped else None)
