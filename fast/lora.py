"""LoRA adapters of PEFT on packed layers.

Importing this module tells PEFT of them, and `plugin.py` imports it when that is time; nothing here has to be called.
"""

import warnings
from collections.abc import Callable
from typing import Any

import peft.tuners.lora.model as lora_model
from peft.tuners.lora.layer import Linear
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from .layers import PackedLinear


class PackedLora(Linear):
    """PEFT's low-rank adapter beside a packed layer: y = packed(x) + scaling * B (A x)."""

    def __init__(self, *args: Any, **kwargs: Any):
        with warnings.catch_warnings():  # PEFT knows the types of the layers whose sizes it trusts
            warnings.filterwarnings("ignore", message="Unsupported layer type")
            super().__init__(*args, **kwargs)

    def merge(self, *args: Any, **kwargs: Any) -> None:
        """Refuse: packed signs cannot take an adapter in.

        Raises
        ------
        ValueError
            Always.
        """
        raise ValueError(
            "an adapter cannot be merged into packed signs: keep it beside them (PeftModel.save_pretrained writes it), "
            "or train the layers themselves with littlebit train"
        )


def dispatch_packed(target: nn.Module, adapter_name: str, config: Any, **kwargs: Any) -> nn.Module | None:
    """The adapter layer for a packed layer, or None for PEFT's own choice."""
    base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
    return PackedLora(target, adapter_name, config=config, **kwargs) if isinstance(base, PackedLinear) else None


def dispatch_packed_first(default: Callable[..., Any]) -> Callable[..., Any]:
    """A function that chooses an adapter's class as `default` does, but for packed layers."""

    def dispatch(target: nn.Module, adapter_name: str, config: Any, **kwargs: Any) -> Any:
        found = dispatch_packed(target, adapter_name, config, **kwargs)
        return default(target, adapter_name, config=config, **kwargs) if found is None else found

    return dispatch


choices: Any = lora_model  # PEFT's LoRA asks the functions in here, this one last
choices.dispatch_default = dispatch_packed_first(choices.dispatch_default)
