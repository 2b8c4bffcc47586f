"""Build empty transformers models from a configuration, without running foreign code."""

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

from torch import nn

# Settings that are not the model's own: some name code on a hub, which transformers would fetch and run
CODE = ("quantization_config", "auto_map", "custom_pipelines", "use_kernels", "name_or_path", "_name_or_path")


CODE += ("attn_implementation", "_attn_implementation", "_attn_implementation_internal")


CODE += ("experts_implementation", "_experts_implementation", "_experts_implementation_internal")


COUNTED = ("num_", "n_layer", "n_head")  # what names of settings begin with that count things


MOST = 1 << 16


def transformers() -> Any:
    """The transformers package, imported when first needed.

    Raises
    ------
    ImportError
        If it is not installed; the message says what to do.
    """
    try:
        import transformers
    except ImportError as error:
        raise ImportError("this needs transformers: pip install 'littlebit[hf]'") from error
    return transformers


def empty_model(config: dict[str, Any], most_parameters: int | None = None) -> nn.Module:
    """A causal language model built from a config, its parameters without memory (on the meta device).

    Buffers, which checkpoints do not hold (the frequencies of rotary embeddings, say), are real. No code is run but
    transformers' own, whatever the config names.

    Parameters
    ----------
    config : dict
        As in config.json.
    most_parameters : int, optional
        How many parameters the model may register: a config may ask for any number of layers.

    Raises
    ------
    ValueError
        If transformers does not know the model, or it asks for too much.
    """
    hf = transformers()
    config = {key: value for key, value in plain_settings(config).items() if key not in ("dtype", "torch_dtype")}
    if config.get("model_type") not in hf.CONFIG_MAPPING:
        raise ValueError(
            f"config.json: model_type {config.get('model_type')!r} is unknown to the installed transformers"
        )
    with parameters_on_meta(most_parameters):
        settings = hf.AutoConfig.for_model(**config)
        return hf.AutoModelForCausalLM.from_config(settings, trust_remote_code=False).eval()


def plain_settings(config: Any) -> Any:
    """A config, or a part of one, without what names code to fetch or to run, and with counts of a sane size.

    transformers writes infinity as {"__float__": "Infinity"}.
    """
    if isinstance(config, list):
        return [plain_settings(value) for value in config]
    if not isinstance(config, dict):
        return config
    if set(config) == {"__float__"}:
        return float(config["__float__"])
    for key, value in config.items():
        if isinstance(value, int) and key.startswith(COUNTED) and value > MOST:
            raise ValueError(f"config.json: {key} is {value}, but no model has more than {MOST}")
    return {key: plain_settings(value) for key, value in config.items() if key not in CODE}


BUILDING = threading.RLock()


@contextlib.contextmanager
def parameters_on_meta(most: int | None = None) -> Iterator[None]:
    """While active, every parameter that a module of this thread registers goes to the meta device, uninitialised.

    One thread at a time builds; what the others register meanwhile stays as it is. More than `most` parameters are
    refused.
    """
    count, builder = 0, threading.get_ident()

    def register_on_meta(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        nonlocal count
        if param is not None and threading.get_ident() == builder:
            count += 1
            if most is not None and count > most:
                raise ValueError(f"config.json asks for more than {most} parameters, but the files hold fewer")
            param = nn.Parameter(param.to("meta"), requires_grad=param.requires_grad)
        register(self, name, param)

    with BUILDING:
        register = nn.Module.register_parameter
        nn.Module.register_parameter = register_on_meta  # type: ignore[method-assign]
        try:
            yield
        finally:
            nn.Module.register_parameter = register  # type: ignore[method-assign]
