"""Run packed layers in vLLM: its quantization method `littlebit`, with the operator of kernels/torch_op.py.

Tensor parallelism divides packed layers as shards.py says. Only vLLM imports this module, through the entry point that
vllm_plugin.py describes.
"""
# pyright: reportMissingImports=false

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.linear import (
    LinearBase,
    LinearMethodBase,
    QKVParallelLinear,
    RowParallelLinear,
    UnquantizedLinearMethod,
)
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.layers.vocab_parallel_embedding import (
    UnquantizedEmbeddingMethod,
    VocabParallelEmbedding,
)

from ..checkpoints.format import read_layers
from ..kernels import torch_op
from ..models.embeddings import EmbeddingTable
from ..models.packed_shapes import SCALES
from ..packing import PackedFactors, decode_scale
from .shards import input_share, output_share

assert torch_op.library is not None  # importing it registers the operator
QKV = "qkv"  # vLLM names the parts of this joined layer by letters, and the parts of others by numbers


class LittleBitConfig(QuantizationConfig):
    """Read `quantization_config` of a packed checkpoint's config.json.

    Parameters
    ----------
    section : mapping
    """

    def __init__(self, section: Mapping[str, Any]):
        super().__init__()
        self.layers = read_layers(section, "config.json")
        self.embeddings = section.get("embeddings")
        if section.get("fused") or section.get("shared"):
            raise ValueError("vLLM runs no checkpoint whose layers were split or are shared: use `littlebit serve`")

    @classmethod
    def get_name(cls) -> str:
        """Return the name of the method in config.json."""
        return "littlebit"

    @classmethod
    def get_supported_act_dtypes(cls) -> list[torch.dtype]:
        """List the dtypes of activations."""
        return [torch.float32, torch.float16, torch.bfloat16]

    @classmethod
    def get_min_capability(cls) -> int:
        """Return the oldest compute capability of a GPU that runs the kernels, times ten."""
        return 70

    @staticmethod
    def get_config_filenames() -> list[str]:
        """List further configuration files; config.json holds everything."""
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "LittleBitConfig":
        """Make the configuration from the section of config.json."""
        return cls(config)

    def get_quant_method(self, layer: nn.Module, prefix: str) -> Any:
        """Choose the method of a layer: packed where the checkpoint has packed parts, else vLLM's own."""
        if self.embeddings and isinstance(layer, VocabParallelEmbedding):
            return EmbeddingMethod(self.embeddings["bits"])
        if not isinstance(layer, LinearBase):
            return None
        parent, _, name = prefix.rpartition(".")
        parts = [f"{parent}.{part}" for part in self.packed_modules_mapping.get(name, [name])]
        entries = [self.layers[part] for part in parts if part in self.layers]
        if not entries:
            return UnquantizedLinearMethod()
        if len(entries) < len(parts):
            raise ValueError(f"vLLM joins {', '.join(parts)}: all of them must be packed, or none")
        return PackedMethod(entries)


class EmbeddingMethod(UnquantizedEmbeddingMethod):
    """Load a quantized embedding or head, and run it in the dtype of the activations.

    Parameters
    ----------
    bits : int
        8 or 4.
    """

    def __init__(self, bits: int):
        self.bits = bits

    def create_weights(self, layer: Any, *sizes: Any, **attributes: Any) -> None:
        """Give the layer its weight, and an empty parameter for each tensor of the table."""
        super().create_weights(layer, *sizes, **attributes)
        layer.read, layer.table = {}, nn.Module()
        for name in ("codes", "scale", "offset"):
            parameter = nn.Parameter(torch.empty(0), requires_grad=False)
            parameter.weight_loader = partial(self.load, layer, name)  # type: ignore[attr-defined]
            layer.table.register_parameter(name, parameter)

    def load(self, layer: Any, name: str, _: Tensor, loaded: Tensor) -> None:
        """Keep a tensor of the table."""
        layer.read[name] = loaded

    def process_weights_after_loading(self, layer: Any) -> None:
        """Write this process's rows into the weight, which a tied head shares."""
        if layer.read:
            indices = layer.shard_indices
            rows = slice(indices.org_vocab_start_index, indices.org_vocab_end_index)
            entries = EmbeddingTable(self.bits, **layer.read).rows(rows)
            layer.weight.data[: len(entries)].copy_(entries)
        del layer.read, layer.table
        super().process_weights_after_loading(layer)


class PackedMethod(LinearMethodBase):
    """Hold and run a packed layer, or several that vLLM has joined.

    Parameters
    ----------
    entries : sequence of dict
        What config.json says about each part: d_out, d_in, ranks and bias.
    """

    def __init__(self, entries: Sequence[Mapping[str, Any]]):
        self.entries = entries

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        *_: Any,
        **__: Any,
    ) -> None:
        """Give the layer an empty parameter for each tensor's name, whose loader takes this process's share."""
        layer.shares = [[{} for _ in entry["ranks"]] for entry in self.entries]
        layer.inputs, layer.outputs = input_size_per_partition, output_partition_sizes
        layer.paths = nn.ModuleList()
        for order in range(max(len(entry["ranks"]) for entry in self.entries)):
            path = nn.Module()
            for name in (*PackedFactors._fields, "peaks"):
                parameter = nn.Parameter(torch.empty(0), requires_grad=False)
                parameter.weight_loader = partial(self.load, layer, order, name)  # type: ignore[attr-defined]
                path.register_parameter(name, parameter)
            layer.paths.append(path)

    def load(
        self, layer: Any, order: int, name: str, parameter: Tensor, loaded: Tensor, shard: str | int | None = None
    ) -> None:
        """Keep this process's share of a tensor of the checkpoint.

        Parameters
        ----------
        layer : vLLM's layer
        order : int
            Number of the path.
        name : str
            Name of the tensor in the checkpoint, a field of PackedFactors or "peaks".
        parameter : Tensor
            The empty parameter.
        loaded : Tensor
            The whole tensor.
        shard : str or int, optional
            The part of a joined layer.
        """
        part = QKV.index(shard) if isinstance(shard, str) else shard or 0
        entry, rank = self.entries[part], layer.tp_rank
        if isinstance(layer, QKVParallelLinear) and shard in ("k", "v"):
            rank //= layer.num_kv_head_replicas
        if name == "peaks":
            pass  # of whole vectors
        elif isinstance(layer, RowParallelLinear):
            loaded = input_share(name, loaded, entry["d_in"], rank * layer.inputs, layer.inputs)
        else:
            loaded = output_share(name, loaded, rank * layer.outputs[part], layer.outputs[part])
        layer.shares[part][order][name] = loaded.to(parameter.device).contiguous()

    def process_weights_after_loading(self, layer: Any) -> None:
        """Check that all tensors have arrived, and keep them as buffers, in the operator's order."""
        for part, paths in enumerate(layer.shares):
            for order, path in enumerate(paths):
                if missing := set(PackedFactors._fields) - path.keys():
                    raise ValueError(
                        f"{layer.prefix}: the checkpoint has no {', '.join(sorted(missing))} of path {order}"
                    )
                if "peaks" in path:
                    path |= {
                        key: decode_scale(path[key], peak) for key, peak in zip(SCALES, path["peaks"], strict=True)
                    }
                for name in PackedFactors._fields:
                    layer.register_buffer(f"packed_{part}_{order}_{name}", path[name], persistent=False)
        layer.shares = [
            [f"packed_{part}_{order}_{name}" for order in range(len(paths)) for name in PackedFactors._fields]
            for part, paths in enumerate(layer.shares)
        ]

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Compute the outputs of all parts side by side: x (..., inputs) to (..., outputs)."""
        rows = x.reshape(-1, x.shape[-1])
        parts = [
            torch.ops.littlebit.packed_linear(rows, [getattr(layer, name) for name in names]) for names in layer.shares
        ]
        y = parts[0] if len(parts) == 1 else torch.cat(parts, -1)
        y = y.to(x.dtype).reshape(*x.shape[:-1], y.shape[-1])
        return y if bias is None else y + bias
