"""Keep the packed layers of an unfinished quantization on the disk, so that a killed run goes on from them.

A file holds one layer. Its name is a digest of everything that determines the layer: the weight, the ranks, the
initializer, the seed, the bits of a scale and, with importance, the second moments. A layer of other settings is never
found.
"""

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..bits import Ranks
from ..files.atomic import atomic_file
from ..files.digests import json_digest, tensor_bytes, tensor_digest
from ..packing import PackedFactors, to_half
from .config import Config
from .layers import PackedLinear
from .results import LayerResult

RESULT = "result"  # key of the metadata


class LayerStore:
    """Save and find packed layers in a folder.

    Parameters
    ----------
    folder : Path
        Made when the first layer is saved.
    """

    def __init__(self, folder: Path):
        self.folder = folder

    def find(self, key: str, bias: Tensor | None, scale_bits: int) -> tuple[PackedLinear, LayerResult] | None:
        """Read the layer that was saved under a key; None if it is not there, or its file is corrupt.

        Parameters
        ----------
        key : str
            From `layer_key`.
        bias : (d_out,) tensor, optional
            Of the dense layer; the packed one stores it in float16.
        scale_bits : int
            Stored bits of a scale, as in the key.
        """
        try:
            with safe_open(self.path(key), framework="pt") as opened:
                described = json.loads(opened.metadata()[RESULT])
                tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (not a dict)
            result = LayerResult(**described | {"ranks": tuple(described["ranks"])})
            paths = [
                PackedFactors(*(tensors[f"{at}.{field}"] for field in PackedFactors._fields))
                for at in range(len(result.ranks))
            ]
        except (OSError, SafetensorError, KeyError, TypeError, ValueError):
            return None
        stored_bias = None if bias is None else to_half("bias", bias.detach())
        return PackedLinear(paths, stored_bias, scale_bits), result

    def save(self, key: str, layer: PackedLinear, result: LayerResult) -> None:
        """Save a layer, atomically."""
        tensors = {
            f"{at}.{field}": tensor.contiguous()
            for at, path in enumerate(layer.factors())
            for field, tensor in path._asdict().items()
        }
        with atomic_file(self.path(key)) as part:
            save_file(tensors, part, metadata={RESULT: json.dumps(asdict(result))})

    def count(self) -> int:
        """Count the saved layers."""
        return sum(1 for _ in self.folder.glob("*.safetensors"))

    def remove(self) -> None:
        """Delete the folder, once the checkpoint is complete."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def path(self, key: str) -> Path:
        """Return the file of a key."""
        return self.folder / f"{key}.safetensors"


def layer_key(weight: Tensor, ranks: Ranks, config: Config, moments: Sequence[Tensor]) -> str:
    """Compute a digest of everything that determines a packed layer.

    Parameters
    ----------
    weight : (d_out, d_in) tensor, as it is stored
    ranks : tuple of int
    config : Config
        Its initializer, seed and bits of a scale count.
    moments : sequence of tensors
        The layer's second moments with `importance`, else empty.
    """
    described: dict[str, Any] = {key: config.described()[key] for key in ("init", "seed", "scale_bits")}
    digests = [
        tensor_digest(str(each.dtype), each.shape, [tensor_bytes(each.contiguous().cpu())])
        for each in (weight, *moments)
    ]
    return json_digest(described | {"ranks": list(ranks), "tensors": digests})
