"""Encode and decode text with the package `tokenizers` alone, in a process without transformers.

The tokenizer.json that transformers 5 writes holds all that most of its tokenizers do. Files of other versions, and
tokenizers that do more, are left to transformers.
"""

import datetime
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..files.untrusted import read_json, resolve_inside
from .architecture import NotDecodableError

#: transformers' tokenizer classes that do only what tokenizer.json says.
CLASSES = ("TokenizersBackend", "LlamaTokenizer", "Qwen2Tokenizer", "GPT2Tokenizer")
#: Entries of tokenizer_config.json that do not change how one text is encoded or tokens are decoded.
IGNORED = {"backend", "bos_token", "eos_token", "unk_token", "pad_token", "tokenizer_class", "is_local", "errors"}
IGNORED |= {"local_files_only", "model_max_length", "padding_side", "truncation_side", "chat_template", "legacy"}
IGNORED |= {"add_bos_token", "add_eos_token", "add_prefix_space", "model_specific_special_tokens"}
SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")


class Tokenizer:
    """Encode and decode text like transformers' tokenizers; only the methods that generation uses.

    Parameters
    ----------
    folder : Path
        Directory with tokenizer.json and tokenizer_config.json.

    Raises
    ------
    NotDecodableError
        If the tokenizer needs transformers, or its files cannot be read.
    """

    def __init__(self, folder: Path):
        try:
            from tokenizers import Tokenizer as Backend

            config, file = read_json(folder, "tokenizer_config.json"), resolve_inside(folder, "tokenizer.json")
        except (ImportError, ValueError) as error:
            raise NotDecodableError(f"its tokenizer cannot be read: {error}") from error
        unknown = {key for key, value in config.items() if value} - IGNORED
        if unknown or config.get("backend") != "tokenizers" or config.get("tokenizer_class") not in CLASSES:
            raise NotDecodableError("its tokenizer_config.json has entries that only transformers knows")
        try:
            self.backend = Backend.from_file(str(file))
        except Exception as error:  # tokenizers raises no narrower class
            raise NotDecodableError(f"its tokenizer.json cannot be read: {error}") from error
        if self.backend.truncation or self.backend.padding:
            raise NotDecodableError("its tokenizer.json truncates or pads texts")
        self.special = {name: config[name] for name in SPECIAL_TOKENS if config.get(name)}
        if any(self.backend.token_to_id(str(token)) is None for token in self.special.values()):
            raise NotDecodableError("its special tokens are not in tokenizer.json")
        prefixes = find_prefix_spaces(json.loads(self.backend.to_str())["pre_tokenizer"])
        if config.get("add_prefix_space") in (True, False) and prefixes - {config["add_prefix_space"]}:
            raise NotDecodableError("its tokenizer_config.json contradicts tokenizer.json in add_prefix_space")
        self.template = read_template(folder, config)

    @property
    def eos_token_id(self) -> int | None:
        """Return the number of the token that ends a text, or None."""
        return self.backend.token_to_id(self.special["eos_token"]) if "eos_token" in self.special else None

    @property
    def pad_token_id(self) -> int | None:
        """Return the number of the token that pads finished sequences, or None."""
        return self.backend.token_to_id(self.special["pad_token"]) if "pad_token" in self.special else None

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        """Encode a text: {"input_ids": token numbers}."""
        return {"input_ids": self.backend.encode(text, add_special_tokens=add_special_tokens).ids}

    def decode(self, tokens: Sequence[int], skip_special_tokens: bool = False) -> str:
        """Decode token numbers to text."""
        return self.backend.decode(list(tokens), skip_special_tokens=skip_special_tokens)

    def apply_chat_template(
        self, messages: Sequence[dict[str, str]], tokenize: bool = False, add_generation_prompt: bool = False
    ) -> str:
        """Write chat messages as text in the format that the model was trained on.

        The template is code from the model's author. It runs in Jinja's sandbox, with the functions that transformers
        documents for templates.

        Parameters
        ----------
        messages : sequence of dicts with "role" and "content"
        tokenize : bool
            Ignored: the result is always text.
        add_generation_prompt : bool
            End with the words that begin the model's turn.

        Raises
        ------
        ValueError
            If there is no template, or it raises an error.
        """
        import jinja2
        from jinja2.ext import loopcontrols
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        if self.template is None:
            raise ValueError("the tokenizer has no chat template: leave --chat (chat=True) out")

        def raise_exception(message: str) -> None:
            raise jinja2.TemplateError(message)

        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
        environment.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False, **options)
        environment.globals["raise_exception"] = raise_exception
        environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
        settings = {"add_generation_prompt": add_generation_prompt, "tools": None, "documents": None} | self.special
        try:
            return environment.from_string(self.template).render(messages=messages, **settings)
        except jinja2.TemplateError as error:
            raise ValueError(f"the tokenizer's chat template cannot be used: {error}") from error


def find_prefix_spaces(step: Any) -> set[bool]:
    """Collect, from the description of a pre-tokenizer, whether each step adds a space before a text."""
    if not isinstance(step, dict):
        return set()
    found = set().union(*map(find_prefix_spaces, step.get("pretokenizers") or ()))
    if step.get("type") == "ByteLevel":
        found.add(bool(step.get("add_prefix_space")))
    if step.get("type") == "Metaspace":
        found.add(step.get("prepend_scheme") != "never")
    return found


def read_template(folder: Path, config: dict[str, Any]) -> str | None:
    """Read the chat template of a directory, or return None.

    Raises
    ------
    NotDecodableError
        If there are several, or one uses transformers' own block `generation`.
    """
    file = folder / "chat_template.jinja"
    template = file.read_text(encoding="utf-8") if file.is_file() else config.get("chat_template")
    several = (folder / "additional_chat_templates").exists() or not isinstance(template, str | None)
    if several or re.search(r"{%[-+]?\s*generation\b", template or ""):
        raise NotDecodableError("it has a chat template that only transformers knows")
    return template
