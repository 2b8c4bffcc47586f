"""Make the files from which bundled.py builds the checkpoints that come with the package."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from ..files.untrusted import CheckpointError
from ..models.embeddings import quantize_embeddings_
from .bundled import PART, SECTION
from .convert import converted_folder
from .dense import load_model
from .download import fetch_base
from .format import WEIGHTS
from .saving import embedding_section

FILE_BYTES = 16 << 20  # most bytes of a file in the package


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
