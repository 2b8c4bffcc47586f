"""Unwrap models from torch.compile, data parallelism and PEFT, without importing PEFT."""

import sys
from typing import Any

from torch import nn

PARALLEL = (nn.DataParallel, nn.parallel.DistributedDataParallel)


def unwrapped(model: Any) -> Any:
    """Unwrap a model from torch.compile and data parallelism, but not from PEFT."""
    while True:
        if isinstance(model, nn.Module) and "_orig_mod" in model._modules:  # torch.compile
            model = model._orig_mod
        elif isinstance(model, PARALLEL):
            model = model.module
        else:
            return model


def peft_classes() -> dict[str, type]:
    """Map names to PEFT's classes of adapters; empty if PEFT is not imported, because then no model has adapters."""
    places = {
        "PeftModel": "peft.peft_model",
        "BaseTunerLayer": "peft.tuners.tuners_utils",
        "AuxiliaryTrainingWrapper": "peft.utils.other",
    }
    found = {name: getattr(sys.modules.get(module), name, None) for name, module in places.items()}
    return {name: kind for name, kind in found.items() if kind is not None}


def has_adapters(model: nn.Module) -> bool:
    """Tell whether a model is a PEFT model, or a module in it is a PEFT adapter."""
    kinds = tuple(peft_classes().values())
    return bool(kinds) and any(isinstance(module, kinds) for module in model.modules())


def has_hooks(model: nn.Module) -> bool:
    """Tell whether a forward hook may change a module's output; transformers' own hooks do not."""
    dictionaries = (hooks for each in model.modules() for hooks in (each._forward_hooks, each._forward_pre_hooks))
    hooks = (hook for each in dictionaries for hook in each.values())
    return any(not str(getattr(hook, "__module__", "")).startswith("transformers.") for hook in hooks)


def without_adapters(model: Any, action: str) -> Any:
    """Unwrap a model from torch.compile and data parallelism, and check that it has no adapters.

    Parameters
    ----------
    model : torch.nn.Module
    action : str
        Name of the function that needs the model, for the message.

    Raises
    ------
    ValueError
        If the model has adapters.
    """
    model = unwrapped(model)
    if has_adapters(model):
        raise ValueError(
            f"{action} needs a model without adapters, but this one has adapters of PEFT: remove them first "
            "(model.unload(), or merge_and_unload() if all layers are dense); save adapters separately with "
            "PeftModel.save_pretrained, and add them to the quantized model"
        )
    return model


def to_change(model: Any, action: str) -> Any:
    """Unwrap a model from torch.compile, to replace its layers or parameters.

    Raises
    ------
    ValueError
        If the model is data-parallel, because the wrapper holds the old parameters, or has adapters.
    """
    if any(isinstance(each, PARALLEL) for each in (model, getattr(model, "_orig_mod", None))):
        raise ValueError(
            f"{action} replaces parameters, but {type(model).__name__} holds the old ones: pass model.module, and wrap "
            "the result again"
        )
    return without_adapters(model, action)


def with_adapters_inside(model: Any) -> Any:
    """Unwrap a model completely; adapters stay in its layers.

    Raises
    ------
    ValueError
        If the adapter adds learned tokens to the prompt, which no layer holds.
    """
    model = unwrapped(model)
    kind = peft_classes().get("PeftModel")
    if kind is None or not isinstance(model, kind):
        return model
    if model.active_peft_config.is_prompt_learning:
        raise ValueError(
            "PEFT puts learned tokens before the prompt of this model, which only its own forward and generate do: use "
            "them, with the full cache"
        )
    return unwrapped(model.get_base_model())
