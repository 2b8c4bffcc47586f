"""LoRA adapters of PEFT on packed layers. `plugin.py` tells PEFT of them; nothing here has to be called."""

import warnings
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


def register() -> None:
    """Let PEFT ask `dispatch_packed` before the last of the functions with which it chooses an adapter's class."""
    choices: Any = lora_model
    default = choices.dispatch_default

    def packed_or_default(target: nn.Module, adapter_name: str, config: Any, **kwargs: Any) -> nn.Module | None:
        found = dispatch_packed(target, adapter_name, config, **kwargs)
        return default(target, adapter_name, config=config, **kwargs) if found is None else found

    choices.dispatch_default = packed_or_default
