"""Let PEFT add LoRA adapters to packed layers.

`plugin.py` imports this module when PEFT is imported; users need not call anything here. PEFT has no registry for
layer types, so `register` wraps the functions that choose and check adapters.
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

#: Initializers that set only the adapter. The others change the layer's own weight.
INITIALISERS = (True, False, "gaussian", "orthogonal", "eva", "mica")
ALL_LINEAR = "all-linear"
FIND_ALL_LINEAR = "_maybe_include_all_linear_layers"  # PEFT's function that resolves it; several modules import it


class PackedLora(Linear):
    """Compute a packed layer with a low-rank adapter of PEFT: y = packed(x) + scaling * B (A x)."""

    def __init__(self, *args: Any, **kwargs: Any):
        with warnings.catch_warnings():  # PEFT warns about layer types that it does not know
            warnings.filterwarnings("ignore", message="Unsupported layer type")
            super().__init__(*args, **kwargs)

    def update_layer(self, *args: Any, **kwargs: Any) -> None:
        """Add an adapter.

        Raises
        ------
        ValueError
            If its initializer changes the weight of the layer.
        """
        check_initialiser(kwargs["config"])
        super().update_layer(*args, **kwargs)

    def merge(self, *args: Any, **kwargs: Any) -> None:
        """Raise ValueError: an adapter cannot be merged into packed signs."""
        refuse_to_merge()


def refuse_to_merge() -> None:
    """Raise the error for merging an adapter into packed signs."""
    raise ValueError(
        "an adapter cannot be merged into packed signs: keep it beside them (PeftModel.save_pretrained writes it), "
        "or train the layers themselves with littlebit train"
    )


def check_initialiser(config: Any) -> None:
    """Raise ValueError if a LoraConfig asks for an initializer that changes the weight of the layer itself."""
    init = config.init_lora_weights
    known = (init.lower() if isinstance(init, str) else init) in INITIALISERS
    given = f"init_lora_weights={init!r}" if not known else "kasa_config"
    if not known or getattr(config, "kasa_config", None):
        raise ValueError(
            f"{given} changes the weight of the layer itself, which packed signs cannot follow: choose "
            f"init_lora_weights among {', '.join(map(repr, INITIALISERS))}"
        )


def dispatch_packed(target: nn.Module, adapter_name: str, config: Any, **kwargs: Any) -> nn.Module | None:
    """Return the adapter layer for a packed layer, or None for any other layer.

    Raises
    ------
    ValueError
        If the layer is in training form (LittleBitLinear).
    """
    base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
    if isinstance(base, LittleBitLinear):
        raise ValueError("adapters are added to packed layers, but this model is in training form: pack_ it first")
    return PackedLora(target, adapter_name, config=config, **kwargs) if isinstance(base, PackedLinear) else None


def dispatch_packed_first(default: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap the function that chooses an adapter's class, so that it knows packed layers."""

    def dispatch(target: nn.Module, adapter_name: str, config: Any, **kwargs: Any) -> Any:
        found = dispatch_packed(target, adapter_name, config, **kwargs)
        return default(target, adapter_name, config=config, **kwargs) if found is None else found

    return dispatch


def find_packed_too(default: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap the function that resolves "all-linear", so that it adds packed layers."""

    def find(peft_config: Any, model: nn.Module) -> Any:
        asked = str(getattr(peft_config, "target_modules", None)).lower() == ALL_LINEAR
        found = default(peft_config, model)
        if asked:
            found.target_modules = {*found.target_modules, *packed_names(model)}
        return found

    return find


def packed_names(model: nn.Module) -> list[str]:
    """List a model's packed layers by name, or the adapter layers that contain them."""
    names, adapter_prefixes = [], ()
    for name, module in model.named_modules():
        if name.startswith(adapter_prefixes):
            continue
        tuned = isinstance(module, BaseTunerLayer)
        if isinstance(module.get_base_layer() if tuned else module, PackedLinear):
            names.append(name)
        if tuned:
            adapter_prefixes = (*adapter_prefixes, f"{name}.")
    return names


def check_merge_first(default: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap the function that checks whether a model can be merged, so that it refuses packed layers."""

    def check(self: Any) -> None:
        if any(isinstance(module, PackedLora) for module in self.model.modules()):
            refuse_to_merge()
        default(self)

    return check


def check_trainable_first(default: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap the function that checks a module of `modules_to_save`, so that it refuses modules without parameters."""

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
    """Wrap PEFT's functions so that they support packed layers; call it again after PEFT's module was reloaded."""
    wrappers: list[tuple[Any, str, Callable[..., Any]]] = [
        (lora_model, "dispatch_default", dispatch_packed_first),  # the function that LoRA asks last
        (lora_model.LoraModel, "_check_merge_allowed", check_merge_first),
        (ModulesToSaveWrapper, "check_module", check_trainable_first),
    ]
    for name, module in list(sys.modules.items()):
        if name.startswith("peft.") and hasattr(module, FIND_ALL_LINEAR):
            wrappers.append((module, FIND_ALL_LINEAR, find_packed_too))
    for owner, name, wrap in wrappers:
        default = getattr(owner, name)
        if default.__module__ != __name__:  # else it is wrapped already
            setattr(owner, name, wrap(default))


register()
