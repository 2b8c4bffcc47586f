"""Rebuild the trained checkpoints that come with the package, and export new ones.

The package holds only what training changed: packed layers and norms, one safetensors file for each model, with a note
in its metadata that names the base model. All other tensors, above all the embedding, come from that base model, which
is downloaded on first use. The result is kept in the cache.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from ..files.cache import build_once, cache_path
from ..files.digests import file_digest
from ..files.untrusted import CheckpointError
from .download import DATA, fetch_base
from .format import FORMAT_VERSION, WEIGHTS


def bundled(name: str) -> Path:
    """Return the directory of a bundled checkpoint, reassembled from its file and its base on first use."""
    return build_once(bundled_folder(name), lambda part: reassemble(DATA / f"{name}.safetensors", part))


def bundled_folder(name: str) -> Path:
    """Return the cache directory of a bundled checkpoint, whether it exists or not."""
    return cache_path("bundled", f"{name}-{file_digest(DATA / f'{name}.safetensors')[:12]}-{FORMAT_VERSION}")


def dense_folder(base: str) -> Path:
    """Return the folder of the dense model of this name, downloaded and converted on first use."""
    from .convert import converted_folder

    path = fetch_base(base)
    return path if path.is_dir() else converted_folder(path)


def reassemble(file: Path, folder: Path) -> None:
    """Write the complete checkpoint of a file that `export_delta` wrote into a folder."""
    from safetensors.torch import load_file

    from ..models.build import transformers
    from .saving import write_tensors

    with safe_open(file, framework="numpy") as opened:
        note = json.loads((opened.metadata() or {})["littlebit"])
    base = dense_folder(note["base"])
    trained = load_file(file)
    quantized = tuple(f"{layer}.weight" for layer in note["quantization_config"]["layers"])
    tensors = {name: t for name, t in load_file(base / WEIGHTS).items() if name not in quantized} | trained
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    section = note["quantization_config"] | {"format_version": FORMAT_VERSION}
    config |= {"dtype": "float16", "quantization_config": section}
    (folder / "config.json").write_text(json.dumps(config, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    write_tensors(tensors, folder, config=config)
    (folder / "training.json").write_text(json.dumps(note["training"], indent=1) + "\n", encoding="utf-8")
    transformers().AutoTokenizer.from_pretrained(base).save_pretrained(folder)


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
