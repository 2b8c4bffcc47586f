"""Talk with a model in the terminal: the `chat` command."""

import argparse
import json
import queue
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..files.atomic import write_text
from ..files.cache import cache_path
from ..models.generation_settings import GenerationConfig
from .arguments import Command, add_device, count, model_help, utf8
from .generate import add_sampling, generation_config, load_slots

if TYPE_CHECKING:
    from ..decoding.batching import Batcher

HELP = """/system TEXT   give the model other instructions, and begin again
/clear         forget the conversation
/save FILE     write the conversation to a new file, as JSON
/speed         show tokens per second after each answer, or no longer
/help          show this
/exit, Ctrl-D  leave
Ctrl-C stops an answer. Alt-Enter begins a new line."""


def add_arguments(sub: argparse.ArgumentParser) -> None:
    """Add the arguments of `littlebit chat`."""
    sub.add_argument("model", help=f"a packed checkpoint, or a dense model: {model_help()}")
    sub.add_argument("--system", type=utf8, help="instructions for the model (default: the chat template's)")
    sub.add_argument("--file", type=Path, help="answer this file's text, as one message, and end; - is standard input")
    sub.add_argument("--context", type=count, default=8192, help="most tokens of the conversation")
    sub.add_argument("--speed", action="store_true", help="show tokens per second after each answer")
    add_sampling(sub, 512)
    add_device(sub)


class Conversation:
    """Keep the messages of a chat, and let a model answer.

    Parameters
    ----------
    batcher : Batcher
        Its cache keeps the keys and values of the turns before.
    tokenizer : Tokenizer, or transformers tokenizer
    config : GenerationConfig
    stop : list of str
    system : str, optional
    """

    def __init__(
        self, batcher: "Batcher", tokenizer: Any, config: GenerationConfig, stop: list[str], system: str | None
    ):
        self.batcher, self.tokenizer, self.config, self.stop = batcher, tokenizer, config, stop
        self.turns = 0
        self.begin(system)

    def begin(self, system: str | None) -> None:
        """Forget all messages, and set the instructions."""
        self.system = system
        self.messages = [] if system is None else [{"role": "system", "content": system}]
        self.tokens, self.seconds = 0, 0.0  # of the last answer, the prompt's time not included

    def answer(self, text: str) -> Iterator[str]:
        """Yield the answer to a message in chunks; what was yielded is kept if the caller stops early.

        Raises
        ------
        ValueError
            If there is no chat template, or the conversation exceeds the context.
        """
        from ..decoding.batching import Choice, Job
        from ..decoding.generate import TextDecoder, apply_chat_template

        messages = [*self.messages, {"role": "user", "content": text}]
        prompt = self.tokenizer(apply_chat_template(self.tokenizer, messages), add_special_tokens=False)["input_ids"]
        context = self.batcher.slots.context
        room = context - len(prompt)
        if room < 1:
            raise ValueError(
                f"the conversation takes {len(prompt)} tokens, but the context has {context}: /clear it, or begin "
                "with a larger --context if the model has one"
            )
        events: queue.SimpleQueue[Choice | str | Exception] = queue.SimpleQueue()
        seed = (self.config.seed + self.turns) % 2**63
        self.turns += 1
        config = replace(self.config, seed=seed, max_new_tokens=min(self.config.max_new_tokens, room))
        job = Job(prompt, config, events.put)
        self.batcher.submit([job])
        written, self.tokens, first = "", 0, 0.0
        decoder = TextDecoder(self.tokenizer, self.stop)
        try:
            while not decoder.stopped:
                event = events.get()
                if isinstance(event, Exception):
                    raise RuntimeError("the decoder failed") from event
                if isinstance(event, Choice):
                    first = first or time.perf_counter()
                    self.tokens, self.seconds = self.tokens + 1, time.perf_counter() - first
                chunk = decoder.finish() if isinstance(event, str) else decoder.push(event.token)
                written += chunk
                if chunk:
                    yield chunk
                if isinstance(event, str):
                    break
        finally:
            job.cancel()
            if written:
                self.messages = [*messages, {"role": "assistant", "content": written}]

    def speed(self) -> str:
        """Say how fast the last answer was, from its first token on."""
        if self.tokens < 2:
            return f"{self.tokens} tokens"
        return f"{self.tokens} tokens, {(self.tokens - 1) / self.seconds:.1f} tokens/s"


def run(arguments: argparse.Namespace) -> None:
    """Answer standard input or a file, or talk in the terminal."""
    from ..decoding.batching import Batcher

    piped = arguments.file is not None or not sys.stdin.isatty()
    ask = None if piped else prompter()
    text = read_message(arguments.file) if piped else ""
    slots, tokenizer = load_slots(arguments, 1)
    batcher = Batcher(slots)
    try:
        config = generation_config(arguments)
        conversation = Conversation(batcher, tokenizer, config, arguments.stop, arguments.system)
        if ask is None:
            write_answer(conversation, text, arguments.speed)
        else:
            print(f"{arguments.model}. /help lists the commands.")
            talk(conversation, ask, arguments.speed)
    finally:
        batcher.close()


def read_message(file: Path | None) -> str:
    """Read a message from a file, or from standard input."""
    data = sys.stdin.buffer.read() if file is None or str(file) == "-" else file.read_bytes()
    try:
        text = data.decode("utf-8").strip("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file or 'standard input'} must be UTF-8: {error}") from error
    if not text.strip():
        raise ValueError(f"{file or 'standard input'} must hold a message, but it is empty")
    return text


def prompter() -> Callable[[], str]:
    """Make the function that asks for a line, with editing keys and a history that is kept between runs."""
    try:
        from prompt_toolkit import PromptSession
        from prompt_toolkit.history import FileHistory, InMemoryHistory
        from prompt_toolkit.key_binding import KeyBindings
    except ImportError as error:
        raise ImportError("chat needs the package prompt_toolkit: pip install 'littlebit[chat]'") from error
    try:
        file = cache_path("chat_history")
        file.touch(mode=0o600)
        history = FileHistory(str(file))
    except OSError:
        history = InMemoryHistory()
    keys = KeyBindings()
    keys.add("escape", "enter")(lambda event: event.current_buffer.insert_text("\n"))
    session: Any = PromptSession(history=history, key_bindings=keys)
    return lambda: session.prompt("> ")


def talk(conversation: Conversation, ask: Callable[[], str], speed: bool) -> None:
    """Answer messages and commands until the user leaves."""
    while True:
        try:
            text = ask().strip()
        except KeyboardInterrupt:  # empties the line
            continue
        except EOFError:
            return
        command, _, rest = text.partition(" ")
        try:
            if not text:
                continue
            if command in ("/exit", "/quit"):
                return
            if command == "/speed":
                speed = not speed
            elif command.startswith("/"):
                print(obey(conversation, command, rest.strip()))
            else:
                write_answer(conversation, text, speed)
        except (ValueError, OSError) as error:
            print(f"littlebit: error: {error}", file=sys.stderr)


def obey(conversation: Conversation, command: str, rest: str) -> str:
    """Run a command of the conversation; return what to print."""
    if command == "/clear":
        conversation.begin(conversation.system)
        return "The conversation is forgotten."
    if command == "/system":
        conversation.begin(rest or None)
        return "The conversation begins again with these instructions." if rest else "No instructions."
    if command == "/save":
        if not rest:
            raise ValueError("/save needs the name of a new file")
        if Path(rest).expanduser().exists():
            raise ValueError(f"{rest} exists already: choose another name")
        write_text(Path(rest).expanduser(), json.dumps(conversation.messages, ensure_ascii=False, indent=1) + "\n")
        return f"{len(conversation.messages)} messages are in {rest}."
    if command == "/help":
        return HELP
    raise ValueError(f"no command is called {command}: /help lists them")


def write_answer(conversation: Conversation, text: str, speed: bool) -> None:
    """Write an answer as it is decoded; Ctrl-C stops it."""
    chunks = conversation.answer(text)
    try:
        for chunk in chunks:
            print(chunk, end="", flush=True)
    except KeyboardInterrupt:
        if not sys.stdin.isatty():
            raise
        print(" [stopped]", end="")
    finally:
        chunks.close()  # type: ignore[attr-defined]
    print()
    if speed:
        print(f"[{conversation.speed()}]", file=sys.stderr)


COMMANDS = {
    "chat": Command(
        run,
        add_arguments,
        "Talk with a model in the terminal.",
        ("chat smollm2-0.55bit --temperature 0.6", "chat out --system 'Answer in one sentence.' < question.txt"),
    )
}
