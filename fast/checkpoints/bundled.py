"""Build the trained checkpoints that come with the package; bundling.py makes their files.

The package holds them in two parts, so that they share what training did not change:

- For each checkpoint NAMEbit.safetensors: packed layers and norms. A note in its metadata names the base model.
- For each base model a folder: config.json, tokenizer, and the remaining tensors. SmolLM2's are the embedding, which is
  the output head too, in 8 bits (`export_base`). `tiny` is a whole dense model.

`bundled` puts both together in the cache, without torch, transformers or a network.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from ..files.cache import build_once, cache_path
from ..files.digests import file_digest, tensor_digest
from .checksums import make_checksums
from .download import DATA
from .format import FORMAT_VERSION, WEIGHTS, order_metadata

BASES = DATA  # has a folder for each base model
SECTION = "quantization_config"
PART = ".part"  # NAME.part0, NAME.part1, ... are the rows of a tensor that is too large for one file
ASSEMBLY = 1  # increase it when files of a base model change
DTYPES = {"F16": "<f2", "I32": "<i4", "I16": "<i2", "I8": "i1", "U8": "u1"}  # names in safetensors -> NumPy's


def bundled(name: str) -> Path:
    """Return the directory of a bundled checkpoint, built from the package's files on first use."""
    return build_once(bundled_folder(name), lambda part: reassemble(DATA / f"{name}.safetensors", part))


def bundled_folder(name: str) -> Path:
    """Return the cache directory of a bundled checkpoint, whether it exists or not."""
    return cache_path("bundled", f"{name}-{file_digest(DATA / f'{name}.safetensors')[:12]}-{FORMAT_VERSION}.{ASSEMBLY}")


def reassemble(file: Path, folder: Path) -> None:
    """Write the complete checkpoint of a file that `export_delta` wrote into a folder."""
    with safe_open(file, framework="numpy") as opened:
        note = json.loads((opened.metadata() or {})["littlebit"])
    base = BASES / note["base"]
    packed = {f"{layer}.weight" for layer in note[SECTION]["layers"]}
    tensors = {name: tensor for name, tensor in base_tensors(base).items() if name not in packed} | load_file(file)
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    section = config.get(SECTION, {}) | note[SECTION] | {"format_version": FORMAT_VERSION}
    config |= {"dtype": "float16", SECTION: section}
    for path in base.iterdir():
        if path.suffix != ".safetensors":
            shutil.copyfile(path, folder / path.name)
    (folder / "config.json").write_text(json.dumps(config, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    (folder / "training.json").write_text(json.dumps(note["training"], indent=1) + "\n", encoding="utf-8")
    write_arrays(tensors, folder / WEIGHTS, config)


def base_tensors(base: Path) -> dict[str, np.ndarray]:
    """Read all tensors of a base model's folder, and join those that are stored in parts."""
    tensors = {name: each for file in sorted(base.glob("*.safetensors")) for name, each in load_file(file).items()}
    parts: dict[str, list[np.ndarray]] = {}
    for name in sorted(name for name in tensors if PART in name):
        parts.setdefault(name.rpartition(PART)[0], []).append(tensors.pop(name))
    return tensors | {name: np.concatenate(rows) for name, rows in parts.items()}


def write_arrays(arrays: Mapping[str, np.ndarray], file: Path, config: Mapping[str, Any]) -> None:
    """Write all tensors of a checkpoint into one safetensors file, with the checksums of FORMAT_VERSION."""
    names = {np.dtype(kind): name for name, kind in DTYPES.items()}
    digests = {name: tensor_digest(names[each.dtype], each.shape, [each.tobytes()]) for name, each in arrays.items()}
    [checksums] = make_checksums([digests], config)
    save_file(dict(arrays), file, metadata={"format": "pt"} | checksums)
    order_metadata(file)
    file.chmod(0o644)
