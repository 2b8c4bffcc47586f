"""Build the trained checkpoints that come with the package, and export new ones.

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
from ..files.untrusted import CheckpointError
from .checksums import make_checksums
from .download import DATA, fetch_base
from .format import FORMAT_VERSION, WEIGHTS, order_metadata

BASES = DATA  # has a folder for each base model
SECTION = "quantization_config"
FILE_BYTES = 16 << 20  # most bytes of a file in the package
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


def export_base(name: str, folder: Path, bits: int = 8) -> None:
    """Write what all bundled checkpoints of a base model share: quantized embeddings, configuration and tokenizer.

    Parameters
    ----------
    name : str
        One of `download.ARTIFACTS`.
    folder : Path
        Output, BASES / NAME for the package.
    bits : int
        Bits of an entry of the embedding and of the output head, 8 or 4.
    """
    from ..models.embeddings import quantize_embeddings_
    from .dense import load_model
    from .saving import embedding_section

    dense, model = dense_folder(name), load_model(name)
    quantize_embeddings_(model, bits)
    folder.mkdir(parents=True)
    config = json.loads((dense / "config.json").read_text(encoding="utf-8")) | {SECTION: embedding_section(model)}
    (folder / "config.json").write_text(json.dumps(config, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    for path in dense.iterdir():
        if path.suffix != ".safetensors" and path.name != "config.json":
            shutil.copyfile(path, folder / path.name)
    count = 0
    for key, tensor in model.state_dict().items():
        if ".table." in key and not key.startswith("lm_head"):
            rows = np.array_split(tensor.numpy(), -(-tensor.nbytes // FILE_BYTES))
            for at, part in enumerate(rows):
                save_file({f"{key}{PART}{at}": np.ascontiguousarray(part)}, folder / f"embedding-{count}.safetensors")
                count += 1


def dense_folder(base: str) -> Path:
    """Return the folder of the dense model of this name, downloaded and converted on first use."""
    from .convert import converted_folder

    path = fetch_base(base)
    return path if path.is_dir() else converted_folder(path)


def export_delta(checkpoint: Path, base: str, file: Path, training: dict[str, Any]) -> None:
    """Write the tensors in which a trained checkpoint differs from its base model into one file.

    Parameters
    ----------
    checkpoint : Path
        A directory that `save` wrote.
    base : str
        Name of the model that it was quantized from: "tiny", or one of `download.ARTIFACTS`.
    file : Path
        Output, NAMEbit.safetensors.
    training : dict
        How it was trained; stored with it.

    Raises
    ------
    CheckpointError
        If the checkpoint lacks a tensor of the base, and so was made from another model.
    """
    before, after = load_file(dense_folder(base) / WEIGHTS), load_file(checkpoint / WEIGHTS)
    section = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    quantized = {f"{layer}.weight" for layer in section["layers"]}
    if missing := sorted(before.keys() - after.keys() - quantized):
        raise CheckpointError(
            f"{checkpoint} must hold every tensor of its base {base}, but lacks {missing[0]}: name the model that it "
            "was made from"
        )
    changed = {name: t for name, t in after.items() if name not in before or not np.array_equal(t, before[name])}
    note = {"base": base, "quantization_config": section, "training": training}
    save_file(changed, file, metadata={"littlebit": json.dumps(note)})
