"""What a checkpoint says of generation: stop tokens, sampling, and what only transformers can do. Without torch.

generation_config.json says it or, where there is none, config.json, as in transformers' from_pretrained. Everything
that loads or generates asks here.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from .._checks import check_number
from ..files.untrusted import CheckpointError, read_json

FILE = "generation_config.json"
#: Settings that every decoder follows, and what transformers takes for them where a checkpoint samples
SAMPLING = {"temperature": 1.0, "top_k": 50, "top_p": 1.0}
#: Settings that change which token comes next, and their values that do not; None never does
NEUTRAL: dict[str, Any] = {
    "repetition_penalty": 1.0,
    "encoder_repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "min_length": 0,
    "min_new_tokens": 0,
    "num_beams": 1,
    "num_beam_groups": 1,
    "num_return_sequences": 1,
    "diversity_penalty": 0.0,
    "min_p": 0.0,
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
#: Settings that change no token of one text whose length is asked for
HARMLESS = {"do_sample", "eos_token_id", "bos_token_id", "pad_token_id", "decoder_start_token_id", "max_length"}
HARMLESS |= {"max_new_tokens", "use_cache", "cache_implementation", "cache_config", "max_cache_len", "early_stopping"}
HARMLESS |= {"length_penalty", "renormalize_logits", "return_dict_in_generate", "output_attentions", "output_scores"}
HARMLESS |= {"output_hidden_states", "output_logits", "compile_config", "disable_compile", "prefill_chunk_size"}
HARMLESS |= {"is_assistant", "num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold"}
HARMLESS |= {"max_matching_ngram_size", "assistant_early_exit", "assistant_lookbehind", "target_lookbehind"}
HARMLESS |= {"assistant_ensemble_weight", "low_memory", "transformers_version", "trust_remote_code"}


class Sampling(NamedTuple):
    """How the next token is chosen: the likeliest at temperature 0, else one drawn (see `decode_cpu.sample`)."""

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None


class GenerationSettings(NamedTuple):
    """What a checkpoint says of generation.

    Attributes
    ----------
    stop : tuple of int
        The tokens after which the model says no more.
    sampling : Sampling
        How it samples unless it is told otherwise.
    beyond : str, optional
        A setting that only transformers follows, with its value.
    """

    stop: tuple[int, ...] = ()
    sampling: Sampling = Sampling()
    beyond: str | None = None

    def chosen(self, temperature: float | None, top_k: int | None, top_p: float | None) -> Sampling:
        """Take what the caller gives, and the checkpoint's own for what is None."""
        given = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
        return self.sampling._replace(**{name: value for name, value in given.items() if value is not None})


def read_generation(folder: Path) -> dict[str, Any]:
    """Read the settings of generation in a directory.

    Raises
    ------
    CheckpointError
        If the file that has them is damaged.
    """
    if (folder / FILE).is_file():
        return read_json(folder, FILE)
    known = HARMLESS | NEUTRAL.keys() | SAMPLING.keys()
    return {name: value for name, value in read_json(folder, "config.json").items() if name in known}


def generation_settings(said: Mapping[str, Any]) -> GenerationSettings:
    """Interpret settings of generation as generation_config.json holds them.

    Where `do_sample` is true, what is missing of temperature, top_k and top_p is transformers' default; else the
    likeliest token is taken.

    Raises
    ------
    CheckpointError
        If a stop token or a setting of sampling makes no sense.

    Examples
    --------
    >>> generation_settings({"eos_token_id": [2, 7], "do_sample": True, "top_p": 0.9})[:2]
    ((2, 7), Sampling(temperature=1.0, top_k=50, top_p=0.9))
    """
    stop = said.get("eos_token_id")
    stop = [] if stop is None else stop if isinstance(stop, list | tuple) else [stop]
    if not all(isinstance(token, int) and not isinstance(token, bool) for token in stop):
        raise CheckpointError(f"{FILE}: eos_token_id must be a token or a list of tokens, got {said['eos_token_id']!r}")
    samples = said.get("do_sample") is True
    found: Any = {name: said.get(name) for name in SAMPLING}
    if samples:
        found = {name: SAMPLING[name] if value is None else value for name, value in found.items()}
        try:
            check_sampling(**found)
        except ValueError as error:
            raise CheckpointError(f"{FILE}: {error}; mend the file") from error
    sampling = Sampling(**(found if samples else found | {"temperature": 0.0}))
    understood = HARMLESS | SAMPLING.keys()
    others = {name: value for name, value in said.items() if name not in understood and not name.startswith("_")}
    beyond = [f"{name} to {value}" for name, value in others.items() if value not in (None, NEUTRAL.get(name, False))]
    return GenerationSettings(tuple(stop), sampling, beyond[0] if beyond else None)


def settings_of(model: Any) -> GenerationSettings:
    """Interpret a loaded model's generation_config."""
    config = getattr(model, "generation_config", None)
    return GenerationSettings() if config is None else generation_settings(config.to_dict())


def check_sampling(temperature: float | None, top_k: int | None, top_p: float | None) -> None:
    """Raise ValueError if a setting of sampling is out of range; None is allowed for each."""
    if temperature is not None:
        check_number("temperature", temperature, low=0)
    if top_k is not None:
        check_number("top_k", top_k, low=0, whole=True)
    if top_p is not None:
        check_number("top_p", top_p, above=0, high=1)
