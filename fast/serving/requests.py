"""Read the bodies of API requests: what is asked for, or an error in the API's own form.

A field that would change the answer and is not supported is refused; one that changes nothing is ignored. So no answer
is silently another one than the client asked for.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..models.generation_settings import GenerationConfig, is_token

#: Fields that change no answer.
IGNORED = {"user", "store", "metadata", "service_tier", "parallel_tool_calls", "prompt_cache_key", "safety_identifier"}
IGNORED |= {"prompt_cache_retention", "logprob_start_len"}
#: Fields that would change the answer -> values that do not.
NEUTRAL: dict[str, Sequence[Any]] = {
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "best_of": (1,),
    "suffix": ("",),
    "reasoning_effort": ("none",),
}
SETTINGS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed")  # named as in GenerationConfig
COMMON = {"model", "n", "stop", "stream", "stream_options", "logprobs", "max_tokens", "ignore_eos", *SETTINGS}
FIELDS = {
    "chat": COMMON | {"messages", "top_logprobs", "max_completion_tokens"},
    "completions": COMMON | {"prompt", "echo"},
}
ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
MOST_TEXTS = 16  # of a request: prompts times n
MOST_STOPS = 16
MOST_LOGPROBS = 20
DEFAULT_COMPLETION = 16  # new tokens of a completion unless the client says, as the API defines


class ApiError(Exception):
    """An error in the form of the OpenAI API.

    Parameters
    ----------
    message : str
    status : int
        Status of HTTP.
    param : str, optional
        The field of the request that caused it.
    code : str, optional
        A name for programs.
    kind : str
        The API's `type`.
    """

    def __init__(
        self,
        message: str,
        status: int = 400,
        param: str | None = None,
        code: str | None = None,
        kind: str = "invalid_request_error",
    ):
        super().__init__(message)
        self.status = status
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


@dataclass(frozen=True)
class ApiRequest:
    """What a request asks for.

    Attributes
    ----------
    chat : bool
        A chat completion, or a completion.
    messages : list of dict
        Of a chat: each with "role" and "content".
    prompts : list of str or list of int
        Of a completion: texts, or tokens.
    config : GenerationConfig
        Its max_new_tokens holds only if `limit` is not None. Its seed is the first text's; the others count up.
    limit : int, optional
        New tokens of each text; None for all that the context has room for.
    seeded : bool
        Whether the client chose the seed.
    n : int
        Texts for each prompt.
    stop : list of str
    stream, include_usage, echo : bool
    logprobs : int, optional
        Likeliest tokens to list with each token.
    """

    chat: bool
    messages: list[dict[str, str]]
    prompts: list[str | list[int]]
    config: GenerationConfig
    limit: int | None
    seeded: bool
    n: int
    stop: list[str]
    stream: bool
    include_usage: bool
    echo: bool
    logprobs: int | None


def parse_request(body: bytes, kind: str, models: Sequence[str]) -> ApiRequest:
    """Read the JSON body of a request.

    Parameters
    ----------
    body : bytes
    kind : str
        "chat" or "completions".
    models : sequence of str
        Names of the model that is served.

    Raises
    ------
    ApiError
        If a field is missing, wrong, unknown, or asks for what is not supported.
    """
    try:
        given = json.loads(body, parse_constant=refuse_constant)
    except (ValueError, RecursionError) as error:
        raise ApiError(f"the body must be JSON: {error}", code="invalid_json") from error
    if not isinstance(given, dict):
        raise ApiError(f"the body must be a JSON object, got {type(given).__name__}", code="invalid_json")
    given = {name: value for name, value in given.items() if value is not None}
    check_fields(given, kind)
    model = read(given, "model", str, None)
    if model not in models:
        raise ApiError(
            f"the model must be {models[0]!r}, got {model!r}: this server has no other",
            status=400 if model is None else 404,
            param="model",
            code=None if model is None else "model_not_found",
        )
    chat = kind == "chat"
    messages = read_messages(given.get("messages")) if chat else []
    prompts: list[str | list[int]] = [] if chat else read_prompts(given.get("prompt"))
    n = read_count(given, "n", 1)
    if n * max(len(prompts), 1) > MOST_TEXTS:
        raise ApiError(f"a request may ask for {MOST_TEXTS} texts (prompts times n) at most", param="n")
    options = read(given, "stream_options", dict, {})
    stream = read(given, "stream", bool, False)
    if options and not stream:
        raise ApiError("stream_options needs stream to be true", param="stream_options")
    echo = read(given, "echo", bool, False)
    limit = read_limit(given, echo)
    if limit is None and not chat:
        limit = DEFAULT_COMPLETION
    config = read_config(given)
    return ApiRequest(
        chat=chat,
        messages=messages,
        prompts=prompts,
        config=config,
        limit=limit,
        seeded="seed" in given,
        n=n,
        stop=read_stop(given),
        stream=stream,
        include_usage=read(options, "include_usage", bool, False),
        echo=echo,
        logprobs=read_logprobs(given, chat),
    )


def refuse_constant(name: str) -> None:
    """Refuse NaN and Infinity, which JSON does not have."""
    raise ValueError(f"{name} is not a JSON number")


def check_fields(given: Mapping[str, Any], kind: str) -> None:
    """Raise ApiError for a field that is unknown, or that asks for what is not supported."""
    for name, value in given.items():
        if name in FIELDS[kind] or name in IGNORED:
            continue
        if name not in NEUTRAL:
            raise ApiError(f"unknown field {name!r}", param=name, code="unknown_parameter")
        if value not in NEUTRAL[name]:
            raise ApiError(f"{name} is not supported: leave it out", param=name, code="unsupported_parameter")


def read(given: Mapping[str, Any], name: str, kind: type, default: Any) -> Any:
    """Return a field of one type, or its default where it is missing."""
    value = given.get(name, default)
    if value is default or isinstance(value, kind):
        return value
    raise ApiError(f"{name} must be a {kind.__name__}, got {type(value).__name__}", param=name)


def read_count(given: Mapping[str, Any], name: str, default: Any, low: int = 1) -> Any:
    """Return a field that is a whole number from `low` on, or its default where it is missing."""
    value = given.get(name, default)
    if value is not default and (not is_token(value) or not low <= value < 2**31):
        raise ApiError(f"{name} must be a whole number >= {low}, got {value!r}", param=name)
    return value


def read_limit(given: Mapping[str, Any], echo: bool) -> int | None:
    """Return the most new tokens, under the name of completions or of chats; 0 is allowed with echo."""
    names = [name for name in ("max_tokens", "max_completion_tokens") if name in given]
    if len(names) == 2 and given["max_tokens"] != given["max_completion_tokens"]:
        raise ApiError("give max_completion_tokens or max_tokens, not both", param="max_tokens")
    return read_count(given, names[0], None, low=0 if echo else 1) if names else None


def read_config(given: Mapping[str, Any]) -> GenerationConfig:
    """Read the settings that choose tokens."""
    config = GenerationConfig(stop_tokens=() if read(given, "ignore_eos", bool, False) else None)
    for name in SETTINGS:
        if name in given:
            try:
                config = replace(config, **{name: given[name]})
            except ValueError as error:
                raise ApiError(str(error), param=name) from error
    return config


def read_stop(given: Mapping[str, Any]) -> list[str]:
    """Read the stop strings."""
    stop = given.get("stop", [])
    stop = [stop] if isinstance(stop, str) else stop
    if not isinstance(stop, list) or len(stop) > MOST_STOPS or not all(isinstance(each, str) and each for each in stop):
        raise ApiError(
            f"stop must be a text, or a list of at most {MOST_STOPS} texts, none of them empty", param="stop"
        )
    return stop


def read_logprobs(given: Mapping[str, Any], chat: bool) -> int | None:
    """Read how many likeliest tokens to list with each token, or None for no log-probabilities."""
    if not chat:
        count = read_count(given, "logprobs", None, low=0)
    elif read(given, "logprobs", bool, False):
        count = read_count(given, "top_logprobs", 0, low=0)
    else:
        if given.get("top_logprobs"):
            raise ApiError("top_logprobs needs logprobs to be true", param="top_logprobs")
        return None
    if count is not None and count > MOST_LOGPROBS:
        name = "top_logprobs" if chat else "logprobs"
        raise ApiError(f"{name} must be {MOST_LOGPROBS} at most, got {count}", param=name)
    return count


def read_messages(given: Any) -> list[dict[str, str]]:
    """Read the messages of a chat: text alone, as a string or in parts."""
    if not isinstance(given, list) or not given:
        raise ApiError("messages must be a list of at least one message", param="messages")
    found = []
    for at, message in enumerate(given):
        where = f"messages[{at}]"
        if not isinstance(message, dict):
            raise ApiError(f"{where} must be an object with role and content", param=where)
        role = message.get("role")
        if not isinstance(role, str) or role not in ROLES:
            raise ApiError(f"{where}.role must be one of {', '.join(ROLES)}, got {role!r}", param=f"{where}.role")
        found.append({"role": ROLES[role], "content": read_content(message.get("content"), f"{where}.content")})
    return found


def read_content(given: Any, where: str) -> str:
    """Read the content of a message."""
    if isinstance(given, str):
        return check_text(given, where)
    if not isinstance(given, list) or not given:
        raise ApiError(f"{where} must be a text, or a list of parts of type text", param=where)
    for part in given:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise ApiError(f"{where} must hold parts of type text alone", param=where)
    return check_text("".join(part["text"] for part in given), where)


def check_text(text: str, where: str) -> str:
    """Return a text that UTF-8 can hold."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ApiError(f"{where} must be text that UTF-8 can hold: {error.reason}", param=where) from error
    return text


def read_prompts(given: Any) -> list[str | list[int]]:
    """Read the prompts of a completion: a text, tokens, or a list of either."""
    many = given if isinstance(given, list) and given and not is_token(given[0]) else [given]
    prompts: list[str | list[int]] = []
    for prompt in many:
        if isinstance(prompt, str) and prompt:
            prompts.append(check_text(prompt, "prompt"))
        elif isinstance(prompt, list) and prompt and all(map(is_token, prompt)):
            prompts.append(prompt)
        else:
            raise ApiError(
                "prompt must be a text, a list of token numbers, or a list of either; not empty", param="prompt"
            )
    if len(prompts) > MOST_TEXTS:
        raise ApiError(f"a request may ask for {MOST_TEXTS} texts (prompts times n) at most", param="prompt")
    return prompts
