"""Text to tokens and back with the package `tokenizers` alone, for a process that does without transformers.

What `save_pretrained` of transformers 5 writes into tokenizer.json is all that its own tokenizers encode and decode
with; files of other versions, and tokenizers that do more than that, are left to transformers.
"""

import datetime
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..files.untrusted import read_json, resolve_inside
from .architecture import NotDecodableError

#: Classes of transformers that add nothing of their own to tokenizer.json.
CLASSES = ("TokenizersBackend", "LlamaTokenizer", "Qwen2Tokenizer", "GPT2Tokenizer")
#: Entries of tokenizer_config.json that change nothing about how one text is encoded and tokens are decoded.
HARMLESS = {"backend", "bos_token", "eos_token", "unk_token", "pad_token", "tokenizer_class", "is_local", "errors"}
HARMLESS |= {"local_files_only", "model_max_length", "padding_side", "truncation_side", "chat_template", "legacy"}
HARMLESS |= {"add_bos_token", "add_eos_token", "add_prefix_space", "model_specific_special_tokens"}
SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token")


class Tokenizer:
    """The tokenizer of a directory, with as much of transformers' interface as generation uses.

    Parameters
    ----------
    folder : Path

    Raises
    ------
    NotDecodableError
        If only transformers knows what this tokenizer does.
    """

    def __init__(self, folder: Path):
        try:
            from tokenizers import Tokenizer as Backend

            config, file = read_json(folder, "tokenizer_config.json"), resolve_inside(folder, "tokenizer.json")
        except (ImportError, ValueError) as error:
            raise NotDecodableError(f"its tokenizer cannot be read: {error}") from error
        harmless = not {key for key, value in config.items() if value} - HARMLESS
        if not harmless or config.get("backend") != "tokenizers" or config.get("tokenizer_class") not in CLASSES:
            raise NotDecodableError("its tokenizer_config.json has entries that only transformers knows")
        try:
            self.backend = Backend.from_file(str(file))
        except Exception as error:  # tokenizers raises nothing more special
            raise NotDecodableError(f"its tokenizer.json cannot be read: {error}") from error
        if self.backend.truncation or self.backend.padding:
            raise NotDecodableError("its tokenizer.json cuts or pads texts")
        self.special = {name: config[name] for name in SPECIAL if config.get(name)}
        if any(self.backend.token_to_id(str(token)) is None for token in self.special.values()):
            raise NotDecodableError("its special tokens are not in tokenizer.json")
        prefixes = prefixing(json.loads(self.backend.to_str())["pre_tokenizer"])
        if config.get("add_prefix_space") in (True, False) and prefixes - {config["add_prefix_space"]}:
            raise NotDecodableError("its tokenizer_config.json changes add_prefix_space of tokenizer.json")
        self.template = read_template(folder, config)

    @property
    def eos_token_id(self) -> int | None:
        """The token that ends a text, if there is one."""
        return self.backend.token_to_id(self.special["eos_token"]) if "eos_token" in self.special else None

    @property
    def pad_token_id(self) -> int | None:
        """The token that fills up finished sequences, if there is one."""
        return self.backend.token_to_id(self.special["pad_token"]) if "pad_token" in self.special else None

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        """The tokens of a text, as `input_ids`."""
        return {"input_ids": self.backend.encode(text, add_special_tokens=add_special_tokens).ids}

    def decode(self, tokens: Sequence[int], skip_special_tokens: bool = False) -> str:
        """The text of tokens."""
        return self.backend.decode(list(tokens), skip_special_tokens=skip_special_tokens)

    def apply_chat_template(
        self, messages: Sequence[dict[str, str]], tokenize: bool = False, add_generation_prompt: bool = False
    ) -> str:
        """Messages as the text that the model was trained on.

        Templates are code of whoever made the model, and run in Jinja's sandbox, with the functions that transformers
        documents for them.

        Raises
        ------
        ValueError
            If there is no template, or it refuses the messages.
        """
        import jinja2
        from jinja2.ext import loopcontrols
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        if self.template is None:
            raise ValueError("the tokenizer has no chat template: leave --chat (chat=True) out")

        def refuse(message: str) -> None:
            raise jinja2.TemplateError(message)

        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
        environment.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False, **options)
        environment.globals["raise_exception"] = refuse
        environment.globals["strftime_now"] = lambda text: datetime.datetime.now().strftime(text)
        settings = {"add_generation_prompt": add_generation_prompt, "tools": None, "documents": None} | self.special
        try:
            return environment.from_string(self.template).render(messages=messages, **settings)
        except jinja2.TemplateError as error:
            raise ValueError(f"the tokenizer's chat template cannot be used: {error}") from error


def prefixing(step: Any) -> set[bool]:
    """Find out from a pre-tokenizer's description whether its steps put a space before a text."""
    if not isinstance(step, dict):
        return set()
    found = set().union(*map(prefixing, step.get("pretokenizers") or ()))
    if step.get("type") == "ByteLevel":
        found.add(bool(step.get("add_prefix_space")))
    if step.get("type") == "Metaspace":
        found.add(step.get("prepend_scheme") != "never")
    return found


def read_template(folder: Path, config: dict[str, Any]) -> str | None:
    """The chat template of a directory, if it has one.

    Raises
    ------
    NotDecodableError
        If there are several, or it has blocks that Jinja does not know.
    """
    file = folder / "chat_template.jinja"
    template = file.read_text(encoding="utf-8") if file.is_file() else config.get("chat_template")
    several = (folder / "additional_chat_templates").exists() or not isinstance(template, str | None)
    if several or re.search(r"{%[-+]?\s*generation\b", template or ""):
        raise NotDecodableError("it has a chat template that only transformers knows")
    return template
