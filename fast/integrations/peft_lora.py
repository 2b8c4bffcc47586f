"""LoRA adapters of PEFT on packed layers.

`register` tells PEFT of them, and `plugin.py` calls it when PEFT is imported; nothing here has to be called.
"""

import sys
import warnings
from collections.abc import Callable
from typing import Any

import peft.tuners.lora.model as lora_model
from peft.tuners.lora.layer import Linear
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper
from torch import nn

from ..models.embeddings import QuantizedEmbedding, QuantizedHead
from ..models.layers import LittleBitLinear, PackedLinear

#: Initialisers that set an adapter alone. Others take its start out of the layer's own weight.
INITIALISERS = (True, False, "gaussian", "orthogonal", "eva", "mica")
ALL_LINEAR = "all-linear"
FIND_ALL_LINEAR = "_maybe_include_all_linear_layers"  # PEFT's function for it, which several of its modules import


class PackedLora(Linear):
    """PEFT's low-rank adapter beside a packed layer: y = packed(x) + scaling * B (A x)."""

    def __init__(self, *args: Any, **kwargs: Any):
        with warnings.catch_warnings():  # PEFT knows the types of the layers whose sizes it trusts
            warnings.filterwarnings("ignore", message="Unsupported layer type")
            super().__init__(*args, **kwargs)

    def update_layer(self, *args: Any, **kwargs: Any) -> None:
        """Add an adapter, unless its initialiser changes the weight of the layer.

        Raises
        ------
        ValueError
            If it does; it is named.
        """
        check_initialiser(kwargs["config"])
        super().update_layer(*args, **kwargs)

    def merge(self, *args: Any, **kwargs: Any) -> None:
        """Refuse: packed signs cannot take an adapter in.

        Raises
        ------
        ValueError
            Always.
        """
        refuse_to_merge()


def refuse_to_merge() -> None:
    """Raise ValueError."""
    raise ValueError(
        "an adapter cannot be merged into packed signs: keep it beside them (PeftModel.save_pretrained writes it), "
        "or train the layers themselves with littlebit train"
    )


def check_initialiser(config: Any) -> None:
    """Raise ValueError if a LoraConfig asks for an initialiser that assigns the weight of the layer itself."""
    init = config.init_lora_weights
    known = (init.lower() if isinstance(init, str) else init) in INITIALISERS
    given = f"init_lora_weights={init!r}" if not known else "kasa_config"
    if not known or getattr(config, "kasa_config", None):
        raise ValueError(
            f"{given} changes the weight of the layer itself, which packed signs cannot follow: choose "
            f"init_lora_weights among {', '.join(map(repr, INITIALISERS))}"
        )


def dispatch_packed(target: nn.Module, adapter_name: str, config: Any, **kwargs: Any) -> nn.Module | None:
    """The adapter layer for a packed layer, or None for PEFT's own choice.

    Raises
    ------
    ValueError
        If the layer is in training form.
    """
    base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
    if isinstance(base, LittleBitLinear):
        raise ValueError("adapters are added to packed layers, but this model is in training form: pack_ it first")
    return PackedLora(target, adapter_name, config=config, **kwargs) if isinstance(base, PackedLinear) else None


def dispatch_packed_first(default: Callable[..., Any]) -> Callable[..., Any]:
    """A function that chooses an adapter's class as `default` does, but for packed layers."""

    def dispatch(target: nn.Module, adapter_name: str, config: Any, **kwargs: Any) -> Any:
        found = dispatch_packed(target, adapter_name, config, **kwargs)
        return default(target, adapter_name, config=config, **kwargs) if found is None else found

    return dispatch


def find_packed_too(default: Callable[..., Any]) -> Callable[..., Any]:
    """A function that resolves "all-linear" as `default` does, and adds packed layers."""

    def find(peft_config: Any, model: nn.Module) -> Any:
        asked = str(getattr(peft_config, "target_modules", None)).lower() == ALL_LINEAR
        found = default(peft_config, model)
        if asked:
            found.target_modules = {*found.target_modules, *packed_names(model)}
        return found

    return find


def packed_names(model: nn.Module) -> list[str]:
    """Names of a model's packed layers, or of the adapter layers around them."""
    names, inside = [], ()
    for name, module in model.named_modules():
        if name.startswith(inside):
            continue
        tuned = isinstance(module, BaseTunerLayer)
        if isinstance(module.get_base_layer() if tuned else module, PackedLinear):
            names.append(name)
        if tuned:
            inside = (*inside, f"{name}.")
    return names


def check_merge_first(default: Callable[..., Any]) -> Callable[..., Any]:
    """A function that checks, as `default` does, whether a whole model can be merged; one with packed layers cannot."""

    def check(self: Any) -> None:
        if any(isinstance(module, PackedLora) for module in self.model.modules()):
            refuse_to_merge()
        default(self)

    return check


def check_trainable_first(default: Callable[..., Any]) -> Callable[..., Any]:
    """A function that checks, as `default` does, a module of `modules_to_save`; one without parameters is refused."""

    def check(self: Any) -> None:
        module = self.original_module
        if isinstance(module, PackedLinear | QuantizedEmbedding | QuantizedHead):
            raise ValueError(
                f"modules_to_save trains modules whole, but a {type(module).__name__} has nothing to train: leave it "
                "out, or name packed layers in target_modules"
            )
        default(self)

    return check


def register() -> None:
    """Tell PEFT of packed layers: which adapters they take, that "all-linear" means them too, and not to merge.

    Once is enough; after PEFT's module was reloaded, this is to be called again.
    """
    places: list[tuple[Any, str, Callable[..., Any]]] = [
        (lora_model, "dispatch_default", dispatch_packed_first),  # the last of the functions that PEFT's LoRA asks
        (lora_model.LoraModel, "_check_merge_allowed", check_merge_first),
        (ModulesToSaveWrapper, "check_module", check_trainable_first),
    ]
    for name, module in list(sys.modules.items()):
        if name.startswith("peft.") and hasattr(module, FIND_ALL_LINEAR):
            places.append((module, FIND_ALL_LINEAR, find_packed_too))
    for place, name, around in places:
        default = getattr(place, name)
        if default.__module__ != __name__:  # else it is done already
            setattr(place, name, around(default))


register()
