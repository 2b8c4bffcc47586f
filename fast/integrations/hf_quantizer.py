"""LittleBit as a quantisation method of transformers, `quant_method: "littlebit"`.

`register` tells transformers of it, and `plugin.py` calls it when transformers is imported.
`AutoModelForCausalLM.from_pretrained` then rebuilds packed checkpoints, whose packed layers never exist as dense ones,
`save_pretrained` writes them back, and a LittleBitConfig passed to `from_pretrained` quantises an ordinary model after
it is loaded.
"""

from collections.abc import Callable, Sequence
from copy import copy
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer
from transformers.utils import logging
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..checkpoints.format import WITHOUT_CHECKSUMS, check_contents, check_layers, read_headers, read_layers
from ..checkpoints.loading import check_values, put_embeddings, put_layers, read_tensors
from ..checkpoints.saving import section
from ..checkpoints.whole import check_whole
from ..files.untrusted import CheckpointError, inside
from ..models.embeddings import settle_ties
from ..models.layers import LittleBitLinear
from ..models.quantize import OBSERVERS, Config, pack_, quantize_
from ..models.registry import choice_name
from ..models.selection import as_patterns
from ..models.shared import assign, lookup, share, share_checked, shared_names
from ..models.wrappers import has_adapters

METHOD = "littlebit"
SECTION = "quantization_config"
TO_DO = ("quant_method", "bits", "paths", "init", "include", "exclude", "split_fused", "kv_rank_factor", "seed")
PACKED = ("quant_method", "bits", "format_version", "layers", "embeddings", "fused", "shared")


class LittleBitConfig(QuantizationConfigMixin):
    """What transformers keeps about a LittleBit model: how to quantise it, or how a checkpoint's layers are packed.

    Parameters
    ----------
    bits, paths, init, include, exclude, split_fused, kv_rank_factor, seed
        See `Config`: what `from_pretrained` of an ordinary model is to do.
    layers, format_version, embeddings, fused, shared
        See checkpoint.py: what a packed checkpoint holds. They are written, not chosen.

    Raises
    ------
    TypeError
        If there is another keyword, such as `importance`, which needs calibration text: use `quantize_` for it.
    """

    def __init__(
        self,
        bits: float | None = Config.bits,
        paths: int | None = Config.paths,
        init: str | Callable[..., Any] = Config.init,
        include: str | Sequence[str] = Config.include,
        exclude: str | Sequence[str] = Config.exclude,
        split_fused: bool = Config.split_fused,
        kv_rank_factor: float = Config.kv_rank_factor,
        seed: int = Config.seed,
        layers: dict[str, Any] | None = None,
        format_version: int | None = None,
        embeddings: dict[str, Any] | None = None,
        fused: dict[str, Any] | None = None,
        shared: dict[str, str] | None = None,
        quant_method: str = METHOD,
    ):
        self.quant_method: Any = quant_method
        self.bits, self.paths, self.init, self.seed = bits, paths, init, seed
        self.include, self.exclude = as_patterns("include", include), as_patterns("exclude", exclude)
        self.split_fused, self.kv_rank_factor = split_fused, kv_rank_factor
        self.layers, self.format_version = layers, format_version
        self.embeddings, self.fused, self.shared = embeddings, fused, shared

    def to_dict(self) -> dict[str, Any]:
        """The `quantization_config` of config.json: what is packed, or else what is to be done."""
        values = {name: getattr(self, name) for name in (PACKED if self.layers else TO_DO)}
        values |= {} if self.layers else {"init": choice_name(self.init)}
        return {name: value for name, value in values.items() if value is not None or name in ("bits", "paths")}

    def config(self) -> Config:
        """What `quantize_` is asked for."""
        bits = Config.bits if self.bits is None else self.bits
        rest = {name: getattr(self, name) for name in TO_DO[2:]}
        return Config(bits=bits, **rest)


class LittleBitQuantizer(HfQuantizer):
    """Packed layers for dense ones before a checkpoint is read, or quantisation after it is."""

    requires_calibration = False
    quantization_config: LittleBitConfig

    def __init__(self, quantization_config: LittleBitConfig, **kwargs: Any):
        super().__init__(copy(quantization_config), **kwargs)  # the caller's own stays as it is

    def _process_model_before_weight_loading(
        self, model: Any, dtype: torch.dtype | None = None, checkpoint_files: Any = None, **kwargs: Any
    ) -> None:
        """Check a packed checkpoint's files, their checksums included, and make its layers, on the meta device.

        transformers would fill a tensor that is missing with whatever lies in memory.
        """
        if not self.pre_quantized:
            self.found = reports(model)
            return
        layers = read_layers(self.quantization_config.to_dict(), SECTION)
        files = [Path(file) for file in checkpoint_files or []]
        if not files or any(file.suffix != ".safetensors" for file in files):
            raise CheckpointError(
                f"a LittleBit model is loaded from its safetensors files, not from {checkpoint_files}"
            )
        files = [inside(file.parent, file.name) for file in files]
        headers = read_headers(files)
        check_layers(layers, headers)
        check_contents(files, headers, self.quantization_config.format_version or WITHOUT_CHECKSUMS)
        check_values(layers, read_tensors(files))
        shared = share_checked(model, self.quantization_config.shared, SECTION)
        fused = named_as_in(model, self.quantization_config.fused or {})
        put_layers(model, named_as_in(model, layers), fused, SECTION)
        put_embeddings(model, self.quantization_config.embeddings, dtype or torch.get_default_dtype(), SECTION)
        self.leave_out(model, shared)

    def leave_out(self, model: Any, shared: dict[str, str]) -> None:
        """Leave modules in further places out while weights are read: transformers would take them for missing.

        Parameters are tied as transformers ties them; ties of weights that are packed now are forgotten.
        """
        tied = dict(model.all_tied_weights_keys)
        for name, first in shared.items():
            if isinstance(lookup(model, name), nn.Parameter):
                tied[name] = first
            else:
                assign(model, name, nn.Identity())
        known = {name for name, _ in model.named_parameters(remove_duplicate=False)}
        model.all_tied_weights_keys = {name: first for name, first in tied.items() if {name, first} <= known}

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        """Quantise and pack a model that was loaded as a dense one."""
        if self.pre_quantized:
            share(model, self.quantization_config.shared or {})
            return model
        for found in self.found:
            check_whole(model.name_or_path, found)
        settle_ties(model)
        devices = set((getattr(model, "hf_device_map", None) or {}).values())
        if len(devices) > 1:
            raise ValueError(
                f"a model that is spread over {sorted(map(str, devices))} cannot be quantised; load it on one device "
                "(device_map='cpu'), save_pretrained it, and load that with the device_map"
            )
        quantize_(model, self.quantization_config.config(), progress=logging.is_progress_bar_enabled())
        self.describe(pack_(model))
        return model

    def describe(self, model: Any) -> None:
        """Let the configurations say what the packed model holds; transformers writes it without checksums."""
        self.quantization_config = LittleBitConfig(**section(model, self.quantization_config.bits))
        self.quantization_config.format_version = WITHOUT_CHECKSUMS
        model.config.quantization_config = self.quantization_config

    def get_state_dict_and_metadata(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        """For `save_pretrained`: the model's own state dict, and a description that is up to date.

        Raises
        ------
        ValueError
            If a layer is still in training form, which no checkpoint holds, or layers have adapters of PEFT.
        """
        if has_adapters(model) and not getattr(model, "_hf_peft_config_loaded", False):
            raise ValueError(
                "the layers have adapters of PEFT inside: save those with PeftModel.save_pretrained, or take them off "
                "first (unload())"
            )
        if any(isinstance(module, LittleBitLinear) for module in model.modules()):
            raise ValueError(
                "save_pretrained writes packed layers, but the model is in training form: call littlebit.fast.pack_ "
                "first, littlebit.fast.save instead, or torch.save(model.state_dict()) to keep the latents"
            )
        self.describe(model)
        model._weight_conversions = []  # else transformers would rename tensors, but not the layers in config.json
        shared = tuple(shared_names(model))
        if not shared:
            return None, {}
        inside = tuple(f"{name}." for name in shared)
        state = model.state_dict().items()
        return {name: tensor for name, tensor in state if name not in shared and not name.startswith(inside)}, {}

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        """Packed models can be saved."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Adapters on packed layers can be trained; their signs cannot."""
        return True

    @property
    def is_compileable(self) -> bool:
        """torch.compile takes the packed layers whole."""
        return True


def reports(model: Any) -> list[dict[str, Any]]:
    """Collect what transformers finds missing or left over while it loads a model, which it only logs.

    `from_pretrained` tells its caller, but not a quantiser. The list is filled when the weights have been read.
    """
    found: list[dict[str, Any]] = []
    adjust = model._adjust_missing_and_unexpected_keys

    def adjust_and_keep(info: Any, *args: Any) -> Any:
        result = adjust(info, *args)
        del model._adjust_missing_and_unexpected_keys  # of the instance; the class's own is there again
        if hasattr(info, "to_dict"):
            found.append(info.to_dict())
        return result

    model._adjust_missing_and_unexpected_keys = adjust_and_keep
    return found


def attach(model: Any, described: dict[str, Any]) -> None:
    """Let a transformers model that was quantized or loaded here know its quantizer, so that save_pretrained works."""
    if not hasattr(model, "save_pretrained"):
        return
    config = LittleBitConfig(**{name: value for name, value in described.items() if name in PACKED})
    model.hf_quantizer = LittleBitQuantizer(config)
    model.config.quantization_config = config


def named_as_in(model: Any, described: dict[str, Any]) -> dict[str, Any]:
    """Name what a section describes as in a model whose head is less than the saved one's, or more.

    As transformers does it for tensors: `AutoModel` of a language model has layers.0 where that has model.layers.0. A
    layer of a head that the model lacks is left out.
    """
    prefix = f"{model.base_model_prefix}."
    inside = any(name.startswith(prefix) for name in described)
    if hasattr(model, model.base_model_prefix) == inside or prefix == ".":
        return described
    if inside:
        return {name.removeprefix(prefix): each for name, each in described.items() if name.startswith(prefix)}
    return {prefix + name: each for name, each in described.items()}


def register() -> None:
    """Put LittleBit into transformers' lists; again, if their module was reloaded."""
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD] = LittleBitConfig
    auto.AUTO_QUANTIZER_MAPPING[METHOD] = LittleBitQuantizer  # type: ignore[assignment]
    if attach not in OBSERVERS:
        OBSERVERS.append(attach)


register()
