"""Register LittleBit with transformers as a quantization method, `quant_method: "littlebit"`.

`plugin.py` imports this module when transformers is imported. After that

    AutoModelForCausalLM.from_pretrained(packed)                                         loads a packed checkpoint
    AutoModelForCausalLM.from_pretrained(dense, quantization_config=LittleBitConfig())   quantizes a dense model
    model.save_pretrained(folder)                                                        writes a packed checkpoint

Packed layers of a checkpoint never exist as dense weights.
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

from ..checkpoints.checksums import check_contents
from ..checkpoints.completeness import check_complete
from ..checkpoints.format import NO_CHECKSUMS, check_layers, read_headers, read_layers
from ..checkpoints.loading import check_values, install_embeddings, install_packed_layers, read_tensors
from ..checkpoints.saving import quantization_section
from ..files.untrusted import CheckpointError, resolve_inside
from ..models.embeddings import settle_ties
from ..models.layers import LittleBitLinear
from ..models.quantize import OBSERVERS, Config, pack_, packed_layers, quantize_
from ..models.registry import choice_name
from ..models.selection import as_patterns
from ..models.shared import assign, lookup, share, share_checked, shared_names
from ..models.wrappers import has_adapters

METHOD = "littlebit"
SECTION = "quantization_config"

#: Fields of LittleBitConfig that ask for a quantization, and fields that describe a packed checkpoint.
REQUESTED_FIELDS = (
    "quant_method",
    "bits",
    "paths",
    "init",
    "include",
    "exclude",
    "split_fused",
    "kv_rank_factor",
    "seed",
)
PACKED_FIELDS = ("quant_method", "bits", "format_version", "layers", "embeddings", "fused", "shared")


class LittleBitConfig(QuantizationConfigMixin):
    """Configure how transformers quantizes a dense model, or describe a packed one.

    Parameters
    ----------
    bits, paths, init, include, exclude, split_fused, kv_rank_factor, seed
        How to quantize a dense model; see `Config`.
    layers, format_version, embeddings, fused, shared
        What a packed checkpoint holds; see checkpoints/format.py. Saving sets them.

    Raises
    ------
    TypeError
        For any other keyword. `importance`, for one, needs calibration text: use `quantize_`.
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
        """Return the `quantization_config` of config.json: of a packed model, or else the request."""
        values = {name: getattr(self, name) for name in (PACKED_FIELDS if self.layers else REQUESTED_FIELDS)}
        values |= {} if self.layers else {"init": choice_name(self.init)}
        return {name: value for name, value in values.items() if value is not None or name in ("bits", "paths")}

    def config(self) -> Config:
        """Return the request as a Config for `quantize_`."""
        bits = Config.bits if self.bits is None else self.bits
        rest = {name: getattr(self, name) for name in REQUESTED_FIELDS[2:]}
        return Config(bits=bits, **rest)


class LittleBitQuantizer(HfQuantizer):
    """Replace dense layers by packed ones before transformers reads weights, or quantize after it has."""

    requires_calibration = False
    quantization_config: LittleBitConfig

    def __init__(self, quantization_config: LittleBitConfig, **kwargs: Any):
        self.requested_dtype: torch.dtype | None = None
        super().__init__(copy(quantization_config), **kwargs)  # the caller's object is not changed

    def _process_model_before_weight_loading(
        self, model: Any, dtype: torch.dtype | None = None, checkpoint_files: Any = None, **kwargs: Any
    ) -> None:
        """Check a packed checkpoint's files and checksums, and create its packed layers on the meta device.

        Without these checks transformers would leave a missing tensor uninitialized.
        """
        if not self.pre_quantized:
            self.reports = loading_reports(model)
            return
        layers = read_layers(self.quantization_config.to_dict(), SECTION)
        files = [Path(file) for file in checkpoint_files or []]
        if not files or any(file.suffix != ".safetensors" for file in files):
            raise CheckpointError(f"a LittleBit model is loaded from safetensors files, got {checkpoint_files}")
        files = [resolve_inside(file.parent, file.name) for file in files]
        headers = read_headers(files)
        check_layers(layers, headers)
        check_contents(files, headers, self.quantization_config.format_version or NO_CHECKSUMS)
        check_values(layers, read_tensors(files))
        shared = share_checked(model, self.quantization_config.shared, SECTION)
        fused = named_as_in(model, self.quantization_config.fused or {})
        install_packed_layers(model, named_as_in(model, layers), fused, SECTION)
        install_embeddings(model, self.quantization_config.embeddings, dtype or torch.get_default_dtype(), SECTION)
        self.remove_shared(model, shared)

    def remove_shared(self, model: Any, shared: dict[str, str]) -> None:
        """Replace shared modules by empty ones while weights are read, because transformers would miss their tensors.

        Shared parameters are tied as transformers ties them. Ties of weights that are now packed are dropped.
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
        """Quantize and pack a model that was loaded as a dense one."""
        if self.pre_quantized:
            for layer in packed_layers(model).values():
                layer.decode_scales()
            share(model, self.quantization_config.shared or {})
            if self.requested_dtype:  # The first releases of transformers 5 leave some tensors as they are stored.
                cast_up(model, self.requested_dtype)
            return model
        for report in self.reports:
            check_complete(model.name_or_path, report)
        settle_ties(model)
        devices = set((getattr(model, "hf_device_map", None) or {}).values())
        if len(devices) > 1:
            raise ValueError(
                f"a model to be quantized must be on one device, got {sorted(map(str, devices))}: load it with "
                "device_map='cpu', save_pretrained it, and load that with the device_map"
            )
        quantize_(model, self.quantization_config.config(), progress=logging.is_progress_bar_enabled())
        self.update_config(pack_(model))
        return model

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Remember the dtype that `from_pretrained` was asked for."""
        self.requested_dtype = dtype if isinstance(dtype, torch.dtype) else None
        return dtype

    def update_config(self, model: Any) -> None:
        """Describe the packed model in its configuration; version 1, since transformers writes no checksums."""
        self.quantization_config = LittleBitConfig(**quantization_section(model, self.quantization_config.bits))
        self.quantization_config.format_version = NO_CHECKSUMS
        model.config.quantization_config = self.quantization_config

    def get_state_dict_and_metadata(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        """Prepare `save_pretrained`: update the configuration, and leave out shared tensors.

        Raises
        ------
        ValueError
            If a layer is still in training form, or has an adapter of PEFT.
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
        self.update_config(model)
        model._weight_conversions = []  # else transformers renames tensors, but not the layers in config.json
        shared = tuple(shared_names(model))
        if not shared:
            return None, {}
        prefixes = tuple(f"{name}." for name in shared)
        state = model.state_dict().items()
        return {name: tensor for name, tensor in state if name not in shared and not name.startswith(prefixes)}, {}

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        """Tell transformers that packed models can be saved."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Tell transformers that adapters on packed layers can be trained; the signs cannot."""
        return True

    @property
    def is_compileable(self) -> bool:
        """Tell transformers that torch.compile supports packed layers."""
        return True


def loading_reports(model: Any) -> list[dict[str, Any]]:
    """Return a list that receives transformers' loading report, which a quantizer is not given.

    The report names missing and unexpected tensors. It arrives when the weights have been read.
    """
    found: list[dict[str, Any]] = []
    adjust = model._adjust_missing_and_unexpected_keys

    def adjust_and_keep(info: Any, *args: Any) -> Any:
        result = adjust(info, *args)
        del model._adjust_missing_and_unexpected_keys  # of the instance, so that the class's method is back
        if hasattr(info, "to_dict"):
            found.append(info.to_dict())
        else:  # the first releases of transformers 5 give and take two sets, and raise for tensors of another shape
            missing, unexpected = result
            found.append({"missing_keys": missing, "unexpected_keys": unexpected, "mismatched_keys": ()})
        return result

    model._adjust_missing_and_unexpected_keys = adjust_and_keep
    return found


def cast_up(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast narrower floating-point parameters to a dtype; tensors of packed layers are buffers and keep theirs."""
    for parameter in model.parameters():
        if parameter.is_floating_point() and parameter.dtype.itemsize < dtype.itemsize:
            parameter.data = parameter.data.to(dtype)


def attach(model: Any, described: dict[str, Any]) -> None:
    """Give a model that `quantize_` or `load` made its quantizer, so that `save_pretrained` works."""
    if not hasattr(model, "save_pretrained"):
        return
    config = LittleBitConfig(**{name: value for name, value in described.items() if name in PACKED_FIELDS})
    model.hf_quantizer = LittleBitQuantizer(config)
    model.config.quantization_config = config


def named_as_in(model: Any, described: dict[str, Any]) -> dict[str, Any]:
    """Add or remove the base model's prefix in layer names, where the model and the checkpoint differ in it.

    transformers does the same for tensors: `AutoModel` has layers.0 where the language model has model.layers.0.
    Layers of a head that the model lacks are left out.
    """
    prefix = f"{model.base_model_prefix}."
    has_prefix = any(name.startswith(prefix) for name in described)
    if hasattr(model, model.base_model_prefix) == has_prefix or prefix == ".":
        return described
    if has_prefix:
        return {name.removeprefix(prefix): each for name, each in described.items() if name.startswith(prefix)}
    return {prefix + name: each for name, each in described.items()}


def register() -> None:
    """Add LittleBit to transformers' quantization methods; call it again after their module was reloaded."""
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD] = LittleBitConfig
    auto.AUTO_QUANTIZER_MAPPING[METHOD] = LittleBitQuantizer  # type: ignore[assignment]
    if attach not in OBSERVERS:
        OBSERVERS.append(attach)


register()
