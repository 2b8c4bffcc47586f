"""Models inside other objects: torch.compile, data parallelism and PEFT. Nothing here imports PEFT."""

import sys
from typing import Any

from torch import nn

PARALLEL = (nn.DataParallel, nn.parallel.DistributedDataParallel)


def unwrapped(model: Any) -> Any:
    """Take torch.compile and data parallelism off a model; PEFT stays."""
    while True:
        if isinstance(model, nn.Module) and "_orig_mod" in model._modules:  # torch.compile
            model = model._orig_mod
        elif isinstance(model, PARALLEL):
            model = model.module
        else:
            return model


def peft_classes() -> dict[str, type]:
    """Classes of PEFT that mark adapters, by name; none if nothing has imported PEFT, as then no model has any."""
    places = {
        "PeftModel": "peft.peft_model",
        "BaseTunerLayer": "peft.tuners.tuners_utils",
        "AuxiliaryTrainingWrapper": "peft.utils.other",
    }
    found = {name: getattr(sys.modules.get(module), name, None) for name, module in places.items()}
    return {name: kind for name, kind in found.items() if kind is not None}


def has_adapters(model: nn.Module) -> bool:
    """Whether a model is PEFT's, or a module in it is an adapter of PEFT's."""
    kinds = tuple(peft_classes().values())
    return bool(kinds) and any(isinstance(module, kinds) for module in model.modules())


def has_hooks(model: nn.Module) -> bool:
    """Whether a forward hook may change what a module of the model computes; transformers' own only look on."""
    dictionaries = (hooks for each in model.modules() for hooks in (each._forward_hooks, each._forward_pre_hooks))
    hooks = (hook for each in dictionaries for hook in each.values())
    return any(not str(getattr(hook, "__module__", "")).startswith("transformers.") for hook in hooks)


def without_adapters(model: Any, action: str) -> Any:
    """Take torch.compile and data parallelism off a model that must not have adapters.

    Parameters
    ----------
    model : torch.nn.Module
    action : str
        What is to be done, for the message.

    Raises
    ------
    ValueError
        If the model has adapters.
    """
    model = unwrapped(model)
    if has_adapters(model):
        raise ValueError(
            f"{action} needs a model without adapters, but this one has adapters of PEFT: take them off first "
            "(model.unload(), or merge_and_unload() if all of its layers are dense); adapters are saved alone, with "
            "PeftModel.save_pretrained, and are added to the quantised model"
        )
    return model


def to_change(model: Any, action: str) -> Any:
    """Take torch.compile off a model whose layers or parameters are to be replaced.

    Raises
    ------
    ValueError
        If data parallelism keeps track of its parameters, or the model has adapters.
    """
    if any(isinstance(each, PARALLEL) for each in (model, getattr(model, "_orig_mod", None))):
        raise ValueError(
            f"{action} replaces parameters, of which {type(model).__name__} keeps track: pass model.module, and wrap "
            "the result again"
        )
    return without_adapters(model, action)


def with_adapters_inside(model: Any) -> Any:
    """Take all wrappers off a model, so that adapters are found in its layers and nowhere else.

    Raises
    ------
    ValueError
        If PEFT adds tokens to the prompt, which no layer holds.
    """
    model = unwrapped(model)
    kind = peft_classes().get("PeftModel")
    if kind is None or not isinstance(model, kind):
        return model
    if model.active_peft_config.is_prompt_learning:
        raise ValueError(
            "PEFT puts learned tokens before the prompt of this model, which only its own forward and generate do: use "
            "those, with the ordinary cache"
        )
    return unwrapped(model.get_base_model())
