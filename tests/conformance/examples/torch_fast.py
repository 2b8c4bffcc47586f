"""Check `littlebit.fast` at every level on the CPU.

It shows what a backend may declare: dtypes, devices, and how NumPy arrays become its own.

    pytest --pyargs littlebit.conformance --backend littlebit.conformance.examples.torch_fast
"""

import json
from pathlib import Path

import littlebit.fast as lb
import numpy as np
import torch
from littlebit.fast import (
    Factors as Factors,
    Latents as Latents,
    PackedFactors as PackedFactors,
    allocate_ranks as allocate_ranks,
    apply_rope as apply_rope,
    compensate as compensate,
    dual_svid as dual_svid,
    kv_cache_bytes as kv_cache_bytes,
    latent_attention as latent_attention,
    latents as latents,
    linear as linear,
    linear_vjp as linear_vjp,
    pack_factors as pack_factors,
    pack_signs as pack_signs,
    packed_linear as packed_linear,
    path_bits as path_bits,
    rank_for_bits as rank_for_bits,
    refit_scales as refit_scales,
    smooth_sign_vjp as smooth_sign_vjp,
    straight_through_vjp as straight_through_vjp,
    unpack_factors as unpack_factors,
    unpack_signs as unpack_signs,
    up_projection as up_projection,
)
from littlebit.fast.checkpoints.checkpoint import read_checkpoint
from littlebit.fast.checkpoints.format import FORMAT_VERSION
from littlebit.fast.checkpoints.saving import write_tensors

DTYPES = ("float32", "float64", "float16")
DEVICES = ("cpu",)
SIGNED = {np.dtype(np.uint16): np.int16, np.dtype(np.uint32): np.int32}  # torch cannot shift unsigned words


def to_backend(array: np.ndarray, device: str) -> torch.Tensor:
    """Copy an array to a tensor with the same strides, words as signed integers."""
    array = array.view(SIGNED.get(array.dtype, array.dtype))
    tensor = torch.empty_strided(array.shape, [step // array.itemsize for step in array.strides], dtype=dtype_of(array))
    return tensor.copy_(torch.from_numpy(array.copy())).to(device)


def dtype_of(array: np.ndarray) -> torch.dtype:
    """Return torch's dtype of the same name."""
    return getattr(torch, str(array.dtype))


def from_backend(tensor: torch.Tensor) -> np.ndarray:
    """Return a tensor as an array."""
    return tensor.detach().cpu().numpy()


def round_latents(latent: torch.Tensor, dtype: str) -> Latents:
    """Round latents to a dtype that is given by name."""
    return lb.round_latents(latent, getattr(torch, dtype))


def read_layers(folder: Path) -> dict:
    """Read the packed layers of a checkpoint, after comparing its checksums."""
    _, layers, tensors = read_checkpoint(folder, verify=True)
    return {
        name: (
            [
                PackedFactors(*(tensors[f"{name}.paths.{k}.{field}"] for field in PackedFactors._fields))
                for k in range(len(entry["ranks"]))
            ],
            tensors[f"{name}.bias"] if entry["bias"] else None,
        )
        for name, entry in layers.items()
    }


def write_layers(folder: Path, layers: dict) -> None:
    """Write packed layers as a checkpoint."""
    entries, tensors = {}, {}
    for name, (paths, bias) in layers.items():
        for k, path in enumerate(paths):
            tensors |= {f"{name}.paths.{k}.{field}": tensor.cpu() for field, tensor in path._asdict().items()}
        if bias is not None:
            tensors[f"{name}.bias"] = bias.cpu()
        d_out, d_in, ranks = len(paths[0].h), len(paths[0].g), [path.rank for path in paths]
        entries[name] = {"d_out": d_out, "d_in": d_in, "ranks": ranks, "bias": bias is not None}
    section = {"quant_method": "littlebit", "format_version": FORMAT_VERSION, "bits": None, "layers": entries}
    config = {"quantization_config": section}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    write_tensors(tensors, folder, config=config)
