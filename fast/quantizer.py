"""LittleBit as a quantisation method of transformers, `quant_method: "littlebit"`.

Importing this module registers it with transformers, and `plugin.py` imports it when that is time.
`AutoModelForCausalLM.from_pretrained` then rebuilds packed checkpoints, whose packed layers never exist as dense ones,
`save_pretrained` writes them back, and a LittleBitConfig passed to `from_pretrained` quantises an ordinary model after
it is loaded.
"""

from copy import copy
from pathlib import Path
from typing import Any

import torch
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer
from transformers.utils import logging
from transformers.utils.quantization_config import QuantizationConfigMixin

from .checkpoint import check_values, put_embeddings, put_layers, read_tensors, section
from .headers import (
    WITHOUT_CHECKSUMS,
    CheckpointError,
    check_contents,
    check_layers,
    inside,
    read_headers,
    read_layers,
)
from .layers import LittleBitLinear
from .model import Config, pack_, quantize_

METHOD = "littlebit"
SECTION = "quantization_config"
TO_DO = ("quant_method", "bits", "paths", "init", "include", "exclude", "split_fused", "kv_rank_factor", "seed")
PACKED = ("quant_method", "bits", "format_version", "layers", "embeddings", "fused")


class LittleBitConfig(QuantizationConfigMixin):
    """What transformers keeps about a LittleBit model: how to quantise it, or how a checkpoint's layers are packed.

    Parameters
    ----------
    bits, paths, init, include, exclude, split_fused, kv_rank_factor, seed
        See `Config`: what `from_pretrained` of an ordinary model is to do.
    layers, format_version, embeddings, fused
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
        init: str = Config.init,
        include: tuple[str, ...] = Config.include,
        exclude: tuple[str, ...] = Config.exclude,
        split_fused: bool = Config.split_fused,
        kv_rank_factor: float = Config.kv_rank_factor,
        seed: int = Config.seed,
        layers: dict[str, Any] | None = None,
        format_version: int | None = None,
        embeddings: dict[str, Any] | None = None,
        fused: dict[str, Any] | None = None,
        quant_method: str = METHOD,
    ):
        self.quant_method: Any = quant_method
        self.bits, self.paths, self.init, self.seed = bits, paths, init, seed
        self.include, self.exclude = tuple(include), tuple(exclude)
        self.split_fused, self.kv_rank_factor = split_fused, kv_rank_factor
        self.layers, self.format_version = layers, format_version
        self.embeddings, self.fused = embeddings, fused

    def to_dict(self) -> dict[str, Any]:
        """The `quantization_config` of config.json: what is packed, or else what is to be done."""
        values = {name: getattr(self, name) for name in (PACKED if self.layers else TO_DO)}
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
        put_layers(model, layers, self.quantization_config.fused, SECTION)
        put_embeddings(model, self.quantization_config.embeddings, dtype or torch.get_default_dtype(), SECTION)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        """Quantise and pack a model that was loaded as a dense one."""
        if self.pre_quantized:
            return model
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
            If a layer is still in training form, which no checkpoint holds.
        """
        if any(isinstance(module, LittleBitLinear) for module in model.modules()):
            raise ValueError(
                "save_pretrained writes packed layers, but the model is in training form: call littlebit.fast.pack_ "
                "first, littlebit.fast.save instead, or torch.save(model.state_dict()) to keep the latents"
            )
        self.describe(model)
        model._weight_conversions = []  # else transformers would rename tensors, but not the layers in config.json
        return None, {}

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


def attach(model: Any, described: dict[str, Any]) -> None:
    """Let a transformers model that was quantised or loaded here know its quantiser, so that save_pretrained works."""
    config = LittleBitConfig(**{name: value for name, value in described.items() if name in PACKED})
    model.hf_quantizer = LittleBitQuantizer(config)
    model.config.quantization_config = config


AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD] = LittleBitConfig
AUTO_QUANTIZER_MAPPING[METHOD] = LittleBitQuantizer  # type: ignore[assignment]
