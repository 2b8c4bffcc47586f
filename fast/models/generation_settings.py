"""Hold the settings of text generation, and read a checkpoint's own ones from its generation_config.json.

Every decoder takes one `GenerationConfig`. A setting that is None is left to the checkpoint. As in transformers'
`from_pretrained`, the checkpoint's settings come from generation_config.json or, where that file is missing, from
config.json. This module imports no torch.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from .._checks import check_number
from ..files.untrusted import CheckpointError, read_json
from ..memory import KV_CACHES

FILE = "generation_config.json"
#: Sampling settings that every decoder follows, and transformers' default for each where a checkpoint samples.
SAMPLING_DEFAULTS = {"temperature": 1.0, "top_k": 50, "top_p": 1.0, "min_p": None}
#: Settings that every decoder follows, greedy or not.
SUPPORTED = {*SAMPLING_DEFAULTS, "repetition_penalty", "eos_token_id", "do_sample"}
#: Settings that only transformers follows -> the value that changes no token; None never changes one.
NEUTRAL_VALUES: dict[str, Any] = {
    "encoder_repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "min_length": 0,
    "min_new_tokens": 0,
    "num_beams": 1,
    "num_beam_groups": 1,
    "num_return_sequences": 1,
    "diversity_penalty": 0.0,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "guidance_scale": 1.0,
    "remove_invalid_values": False,
    "token_healing": False,
    **dict.fromkeys(("bad_words_ids", "suppress_tokens", "begin_suppress_tokens", "forced_bos_token_id")),
    **dict.fromkeys(("forced_eos_token_id", "exponential_decay_length_penalty", "sequence_bias", "stop_strings")),
    **dict.fromkeys(("max_time", "top_h", "watermarking_config", "prompt_lookup_num_tokens", "constraints")),
    **dict.fromkeys(("force_words_ids", "penalty_alpha", "dola_layers")),
}
#: Settings that change no token of a single text whose length the caller gives.
IGNORED = {"bos_token_id", "pad_token_id", "decoder_start_token_id", "max_length", "max_new_tokens", "use_cache"}
IGNORED |= {"cache_implementation", "cache_config", "max_cache_len", "early_stopping", "length_penalty"}
IGNORED |= {"renormalize_logits", "return_dict_in_generate", "output_attentions", "output_scores"}
IGNORED |= {"output_hidden_states", "output_logits", "compile_config", "disable_compile", "prefill_chunk_size"}
IGNORED |= {"is_assistant", "num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold"}
IGNORED |= {"max_matching_ngram_size", "assistant_early_exit", "assistant_lookbehind", "target_lookbehind"}
IGNORED |= {"assistant_ensemble_weight", "low_memory", "transformers_version", "trust_remote_code"}

#: Limits of each setting, as `check_number` takes them. The penalty's keep float32 logits finite.
LIMITS: dict[str, dict[str, Any]] = {
    "max_new_tokens": {"low": 1, "whole": True},
    "temperature": {"low": 0},
    "top_k": {"low": 0, "whole": True},
    "top_p": {"above": 0, "high": 1},
    "min_p": {"low": 0, "high": 1},
    "repetition_penalty": {"low": 0.001, "high": 1000},
    "seed": {"low": 0, "below": 2**63, "whole": True},
}


def is_token(value: Any) -> bool:
    """Decide whether a value is an integer, and no bool."""
    return isinstance(value, int) and not isinstance(value, bool)


@dataclass(frozen=True)
class GenerationConfig:
    """Hold the settings of text generation; a setting that is None is left to the checkpoint.

    The next token is chosen as in transformers: the repetition penalty changes the logits; then, unless decoding is
    greedy, they are divided by the temperature, and top_k, top_p and min_p remove unlikely tokens, in this order.

    Attributes
    ----------
    max_new_tokens : int
        At least 1.
    temperature : float, optional
        0 for greedy decoding, which takes the likeliest token; above 0 for sampling.
    top_k : int, optional
        Sample from the k likeliest tokens; 0 for all.
    top_p : float, optional
        Sample from the fewest likeliest tokens with a total probability of at least p (nucleus sampling, Holtzman et
        al., arXiv 1904.09751); in (0, 1], 1 for all.
    min_p : float, optional
        Sample from tokens at least min_p times as probable as the likeliest one (Nguyen et al., arXiv 2407.01082); in
        [0, 1], 0 for all.
    repetition_penalty : float, optional
        Divide the positive logits of all tokens in prompt and answer by it, and multiply the negative ones (Keskar et
        al., arXiv 1909.05858); in [0.001, 1000], 1 for no penalty.
    seed : int
        Seed of the sampling, from 0 to 2^63 - 1.
    stop_tokens : tuple of int, optional
        Tokens that end the text; an empty tuple for none.
    kv_cache : str
        "full", "latent" or "latent-int8": see `latent_cache`.

    Raises
    ------
    ValueError
        If a setting is out of range.

    Examples
    --------
    >>> GenerationConfig(top_p=1.5)
    Traceback (most recent call last):
    ...
    ValueError: top_p must be a finite number > 0 and <= 1, got 1.5
    """

    max_new_tokens: int = 64
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    seed: int = 0
    stop_tokens: tuple[int, ...] | None = None
    kv_cache: str = "full"

    def __post_init__(self) -> None:
        for name, limits in LIMITS.items():
            value = getattr(self, name)
            if value is not None or name in ("max_new_tokens", "seed"):
                check_number(name, value, **limits)
        if self.stop_tokens is not None:
            if not isinstance(self.stop_tokens, list | tuple) or not all(map(is_token, self.stop_tokens)):
                raise ValueError(f"stop_tokens must be a tuple of token numbers, got {self.stop_tokens!r}")
            object.__setattr__(self, "stop_tokens", tuple(self.stop_tokens))
        if self.kv_cache not in KV_CACHES:
            raise ValueError(f"kv_cache must be one of {', '.join(KV_CACHES)}, not {self.kv_cache!r}")

    def with_defaults(self, defaults: "GenerationConfig") -> "GenerationConfig":
        """Replace each setting that is None by the one of `defaults`.

        Examples
        --------
        >>> given, checkpoint = GenerationConfig(temperature=0.7), GenerationConfig(temperature=1.0, top_k=20)
        >>> chosen = given.with_defaults(checkpoint)
        >>> chosen.temperature, chosen.top_k
        (0.7, 20)
        """
        return replace(self, **{name: getattr(defaults, name) for name, value in vars(self).items() if value is None})

    def described(self) -> str:
        """List the settings that choose tokens and are not None, as text."""
        chosen = {name: value for name, value in asdict(self).items() if name in SUPPORTED and value is not None}
        return ", ".join(f"{name} {value}" for name, value in chosen.items())


#: What a checkpoint without settings does: greedy decoding that no token ends.
GREEDY = GenerationConfig(temperature=0.0, stop_tokens=())


class GenerationDefaults(NamedTuple):
    """Hold a checkpoint's own settings of generation.

    Attributes
    ----------
    config : GenerationConfig
        Its stop tokens, and its sampling unless the caller gives other settings. The temperature is never None.
    unsupported : str, optional
        A setting that only transformers follows, with its value, such as "num_beams to 4".
    """

    config: GenerationConfig = GREEDY
    unsupported: str | None = None


def read_generation_config(folder: Path) -> dict[str, Any]:
    """Read the settings of generation in a checkpoint's directory.

    Raises
    ------
    CheckpointError
        If the file that holds them is not readable JSON.
    """
    if (folder / FILE).is_file():
        return read_json(folder, FILE)
    known = IGNORED | NEUTRAL_VALUES.keys() | SUPPORTED
    return {name: value for name, value in read_json(folder, "config.json").items() if name in known}


def parse_generation_config(settings: Mapping[str, Any]) -> GenerationDefaults:
    """Turn the entries of a generation_config.json into defaults for the decoders.

    Where `do_sample` is true, a missing temperature, top_k or top_p gets transformers' default. Otherwise the
    checkpoint decodes greedily; its other sampling settings then serve a caller who gives a temperature, and
    those that are out of range are dropped, as transformers does not look at them.

    Raises
    ------
    CheckpointError
        If a stop token is not an integer, or a setting that is used is out of range.

    Examples
    --------
    >>> config, _ = parse_generation_config({"eos_token_id": [2, 7], "do_sample": True, "top_p": 0.9})
    >>> config.stop_tokens, config.temperature, config.top_k, config.top_p
    ((2, 7), 1.0, 50, 0.9)
    """
    stop = settings.get("eos_token_id")
    stop = [] if stop is None else stop if isinstance(stop, list | tuple) else [stop]
    if not all(map(is_token, stop)):
        raise CheckpointError(
            f"{FILE}: eos_token_id must be a token number or a list of them, got {settings['eos_token_id']!r}"
        )
    found: dict[str, Any] = {name: settings.get(name) for name in SAMPLING_DEFAULTS}
    if settings.get("do_sample") is True:
        found = {name: SAMPLING_DEFAULTS[name] if value is None else value for name, value in found.items()}
    else:
        found = {name: value for name, value in found.items() if in_range(name, value)} | {"temperature": 0.0}
    try:
        config = GenerationConfig(
            **found, repetition_penalty=settings.get("repetition_penalty"), stop_tokens=tuple(stop)
        )
    except ValueError as error:
        raise CheckpointError(f"{FILE}: {error}; correct the file") from error
    return GenerationDefaults(config, unsupported_setting(settings))


def in_range(name: str, value: Any) -> bool:
    """Decide whether a setting has a value that GenerationConfig accepts."""
    try:
        GenerationConfig(**{name: value})
    except ValueError:
        return False
    return True


def unsupported_setting(settings: Mapping[str, Any]) -> str | None:
    """Find a setting that changes tokens and that only transformers follows: "NAME to VALUE", or None."""
    for name, value in settings.items():
        if name in SUPPORTED | IGNORED or name.startswith("_"):
            continue
        if value not in (None, NEUTRAL_VALUES.get(name, False)):
            return f"{name} to {value}"
    return None


def generation_defaults(model: Any) -> GenerationDefaults:
    """Read the settings of generation of a loaded transformers model."""
    config = getattr(model, "generation_config", None)
    return GenerationDefaults() if config is None else parse_generation_config(config.to_dict())
