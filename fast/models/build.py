"""Build empty transformers models from a configuration, without running code from a checkpoint."""

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

from torch import nn

#: Settings to ignore. Some of them name code on a hub, which transformers would download and run.
IGNORED_SETTINGS = (
    *("quantization_config", "auto_map", "custom_pipelines", "use_kernels", "name_or_path", "_name_or_path"),
    *("attn_implementation", "_attn_implementation", "_attn_implementation_internal"),
    *("experts_implementation", "_experts_implementation", "_experts_implementation_internal"),
)
COUNT_PREFIXES = ("num_", "n_layer", "n_head")  # Names of settings that count something begin so.
LARGEST_COUNT = 1 << 16


def transformers() -> Any:
    """Import the transformers package when it is first needed.

    Raises
    ------
    ImportError
        If it is not installed. The message says what to install.
    """
    try:
        import transformers
    except ImportError as error:
        raise ImportError("this needs transformers: pip install 'littlebit[hf]'") from error
    return transformers


def empty_model(config: dict[str, Any], most_parameters: int | None = None) -> nn.Module:
    """Build a causal language model from a config, with its parameters on the meta device, which takes no memory.

    Buffers get real values, because checkpoints do not hold them (rotary frequencies, for instance). Only transformers'
    own code runs, even if the config names other code.

    Parameters
    ----------
    config : dict
        The contents of config.json.
    most_parameters : int, optional
        Largest number of parameters that the model may register, because a config may ask for any number of layers.

    Raises
    ------
    ValueError
        If transformers does not know the model, or it has too many parameters.
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
    """Remove settings that name code from a config or a part of one, and check its counts.

    transformers writes infinity as {"__float__": "Infinity"}.
    """
    if isinstance(config, list):
        return [plain_settings(value) for value in config]
    if not isinstance(config, dict):
        return config
    if set(config) == {"__float__"}:
        return float(config["__float__"])
    for key, value in config.items():
        if isinstance(value, int) and key.startswith(COUNT_PREFIXES) and value > LARGEST_COUNT:
            raise ValueError(f"config.json: {key} must be at most {LARGEST_COUNT}, got {value}")
    return {key: plain_settings(value) for key, value in config.items() if key not in IGNORED_SETTINGS}


BUILDING = threading.RLock()  # One thread at a time builds a model.


@contextlib.contextmanager
def parameters_on_meta(most: int | None = None) -> Iterator[None]:
    """Move each parameter that this thread registers to the meta device, while the context is active.

    Parameters of other threads stay as they are. A ValueError refuses more than `most` parameters.
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
