"""Write answers in the form of the OpenAI API: objects, and chunks of a stream."""

import json
import secrets
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any

from ..decoding.batching import Choice
from .generation import Generation


class Answer:
    """The answer to one request, whole or in chunks.

    Parameters
    ----------
    generation : Generation
    """

    def __init__(self, generation: Generation):
        self.generation, self.request = generation, generation.request
        chat = self.request.chat
        self.tokenizer = generation.model.tokenizer
        self.head = {
            "id": ("chatcmpl-" if chat else "cmpl-") + secrets.token_hex(12),
            "object": "chat.completion" if chat else "text_completion",
            "created": int(time.time()),
            "model": generation.model.names[0],
        }
        self.stop_tokens = [set(job.config.stop_tokens or ()) for job in generation.jobs]
        self.offsets = [0] * len(generation.jobs)  # of the next token in a completion's text

    def usage(self) -> dict[str, int]:
        """Count the tokens of prompts and texts."""
        prompt, new = self.generation.prompt_tokens, self.generation.new_tokens
        return {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}

    async def whole(self) -> dict[str, Any]:
        """Wait for all texts, and write them as one object."""
        count = len(self.generation.jobs)
        texts = [self.echoed(index) for index in range(count)]
        choices: list[list[Choice]] = [[] for _ in range(count)]
        finish: list[str | None] = [None] * count
        async for event in self.generation:
            texts[event.index] += event.text
            choices[event.index] += event.choices
            finish[event.index] = event.finish or finish[event.index]
        found = []
        for index in range(count):
            body: dict[str, Any] = {"index": index}
            if self.request.chat:
                body["message"] = {"role": "assistant", "content": texts[index], "refusal": None}
            else:
                body["text"] = texts[index]
            found.append(body | self.ending(index, choices[index], finish[index], first=True))
        return self.head | {"choices": found, "usage": self.usage()}

    async def chunks(self) -> AsyncIterator[dict[str, Any]]:
        """Yield the texts as chunks of a stream of server-sent events."""
        head = self.head | ({"object": "chat.completion.chunk"} if self.request.chat else {})
        if self.request.include_usage:
            head["usage"] = None
        for index in range(len(self.generation.jobs)):
            if self.request.chat:
                yield head | {"choices": [self.chunk(index, {"role": "assistant", "content": ""}, (), None)]}
            elif text := self.echoed(index):
                yield head | {"choices": [self.chunk(index, text, (), None, first=True)]}
        pending: list[list[Choice]] = [[] for _ in self.generation.jobs]
        async for event in self.generation:
            pending[event.index] += event.choices
            if not event.text and not event.finish:
                continue
            text = ({"content": event.text} if event.text else {}) if self.request.chat else event.text
            yield head | {"choices": [self.chunk(event.index, text, pending[event.index], event.finish)]}
            pending[event.index] = []
        if self.request.include_usage:
            yield head | {"choices": [], "usage": self.usage()}

    def chunk(
        self, index: int, text: Any, choices: Sequence[Choice], finish: str | None, first: bool = False
    ) -> dict[str, Any]:
        """Write one text's part of a chunk."""
        return {"index": index, "delta" if self.request.chat else "text": text} | self.ending(
            index, choices, finish, first
        )

    def echoed(self, index: int) -> str:
        """Return the prompt's text if the request asks for it."""
        if not self.request.echo:
            return ""
        prompt = self.request.prompts[index // self.request.n]
        return prompt if isinstance(prompt, str) else self.tokenizer.decode(prompt)

    def ending(self, index: int, choices: Sequence[Choice], finish: str | None, first: bool = False) -> dict[str, Any]:
        """Write log-probabilities, if the request asks for them, and the reason for which a text ended."""
        logprobs: Any = None
        if self.request.logprobs is not None:
            chat = self.request.chat
            logprobs = self.chat_logprobs(index, choices) if chat else self.token_logprobs(index, choices, first)
        return {"logprobs": logprobs, "finish_reason": finish}

    def chat_logprobs(self, index: int, choices: Sequence[Choice]) -> dict[str, Any]:
        """Write log-probabilities in the form of chats, which leaves out the stop token."""

        def entry(token: int, logprob: float | None) -> dict[str, Any]:
            text = self.tokenizer.decode([token])
            return {"token": text, "logprob": logprob, "bytes": list(text.encode())}

        content = [
            entry(each.token, each.logprob) | {"top_logprobs": [entry(*other) for other in each.top]}
            for each in choices
            if each.token not in self.stop_tokens[index]
        ]
        return {"content": content, "refusal": None}

    def token_logprobs(self, index: int, choices: Sequence[Choice], first: bool) -> dict[str, Any]:
        """Write log-probabilities in the form of completions, a row for each token that the usage counts.

        A stop token is one of them, though the text lacks it. lm-evaluation-harness relies on that. An echoed prompt's
        first token has no probability.
        """
        rows = list(choices)
        if first and self.request.echo:
            rows.insert(0, Choice(self.generation.jobs[index].prompt[0]))
        found: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for each in rows:
            text = self.tokenizer.decode([each.token])
            top: dict[str, float] = {}
            for token, logprob in each.top:
                top.setdefault(self.tokenizer.decode([token]), logprob)  # the likeliest of tokens with equal texts
            found["tokens"].append(text)
            found["token_logprobs"].append(each.logprob)
            found["top_logprobs"].append(None if each.logprob is None else top)
            found["text_offset"].append(self.offsets[index])
            self.offsets[index] += len(text)
        return found


def server_sent(data: Any) -> bytes:
    """Write an object as a server-sent event."""
    text = data if isinstance(data, str) else json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    return f"data: {text}\n\n".encode()


def listed(names: Sequence[str], created: int, context: int) -> Iterator[dict[str, Any]]:
    """Describe the served model under each of its names."""
    for name in names:
        yield {"id": name, "object": "model", "created": created, "owned_by": "littlebit", "max_model_len": context}
