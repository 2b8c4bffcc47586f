"""Trained checkpoints that come with the package.

Shipped is only what training made: packed factors and norms, in one safetensors file a model. The rest, embeddings
above all, is taken from the model that `fetch` knows, and both are put together in the cache on first use.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from ..files.cache import cached, made_once
from ..files.digests import file_digest
from ..files.untrusted import CheckpointError
from .download import DATA, fetch_base
from .format import FORMAT_VERSION, WEIGHTS


def shipped(name: str) -> Path:
    """Directory of a shipped checkpoint, put together from its file and its base on first use."""
    return made_once(place(name), lambda part: put_together(DATA / f"{name}.safetensors", part))


def place(name: str) -> Path:
    """Directory that a shipped checkpoint has, or will have."""
    return cached("shipped", f"{name}-{file_digest(DATA / f'{name}.safetensors')[:12]}-{FORMAT_VERSION}")


def put_together(file: Path, folder: Path) -> None:
    """Write the whole checkpoint that a shipped file and its base make into a folder."""
    from safetensors.torch import load_file

    from ..models.build import transformers
    from .convert import converted
    from .saving import write_tensors

    with safe_open(file, framework="numpy") as opened:
        note = json.loads((opened.metadata() or {})["littlebit"])
    base = converted(fetch_base(note["base"]))
    trained = load_file(file)
    quantised = tuple(f"{layer}.weight" for layer in note["quantization_config"]["layers"])
    tensors = {name: t for name, t in load_file(base / WEIGHTS).items() if name not in quantised} | trained
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    section = note["quantization_config"] | {"format_version": FORMAT_VERSION}
    config |= {"dtype": "float16", "quantization_config": section}
    (folder / "config.json").write_text(json.dumps(config, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    write_tensors(tensors, folder, config=config)
    (folder / "training.json").write_text(json.dumps(note["training"], indent=1) + "\n", encoding="utf-8")
    transformers().AutoTokenizer.from_pretrained(base).save_pretrained(folder)


def ship(checkpoint: Path, base: str, file: Path, training: dict[str, Any]) -> None:
    """Write what a trained checkpoint has beyond its base into one file.

    Parameters
    ----------
    checkpoint : Path
        A directory that `save` wrote.
    base : str
        Name of the model that it was made from, as `fetch` knows it.
    file : Path
        NAMEbit.safetensors.
    training : dict
        How it was trained, for the record.

    Raises
    ------
    CheckpointError
        If the checkpoint lacks a tensor of its base, so that it was made from another.
    """
    from .convert import converted

    before, after = load_file(converted(fetch_base(base)) / WEIGHTS), load_file(checkpoint / WEIGHTS)
    section = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    quantised = {f"{layer}.weight" for layer in section["layers"]}
    if missing := sorted(before.keys() - after.keys() - quantised):
        raise CheckpointError(f"{checkpoint} was not made from {base}: it lacks {missing[0]}")
    changed = {name: t for name, t in after.items() if name not in before or not np.array_equal(t, before[name])}
    note = {"base": base, "quantization_config": section, "training": training}
    save_file(changed, file, metadata={"littlebit": json.dumps(note)})
