"""Models of the Hugging Face hub as folders: of its cache, or downloaded into it.

The cache and its environment variables (HF_HUB_CACHE, HF_HUB_OFFLINE, HF_ENDPOINT, HF_TOKEN and the rest) are those of
the package huggingface_hub, which transformers uses too.
"""

import re
from pathlib import Path
from typing import Any

from ..files.untrusted import CheckpointError, read_json
from .format import INDEX, WEIGHTS

#: What a hub id looks like: OWNER/NAME or, for the oldest models in a cache, NAME.
HUB_ID = re.compile(r"(?!\.)[\w.-]+(/(?!\.)[\w.-]+)?", re.ASCII)
#: Small files that a model needs besides its weights; patterns of their names.
SMALL = ["*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken"]
ELSEWHERE = ["onnx/*", "original/*", "openvino/*", "coreml/*"]  # the same model for other programs


def hub_folder(name: str, weights: bool = True) -> Path:
    """Return the folder in the hub's cache that holds a model, after downloading what is missing.

    Nothing is tried twice: if the hub cannot be reached, what the cache holds is taken. A name without an owner is
    looked up in the cache alone.

    Parameters
    ----------
    name : str
        OWNER/NAME.
    weights : bool
        Whether the weights are needed, or only the configuration and the tokenizer.

    Raises
    ------
    OSError
        If neither the hub nor the cache has the model; the message is one line.
    """
    if not HUB_ID.fullmatch(name):
        raise OSError("it is not of the form OWNER/NAME, so it is no hub id")
    try:
        import huggingface_hub
    except ImportError as error:
        raise OSError("models of the hub need transformers: pip install 'littlebit[hf]'") from error
    options: dict[str, Any] = {"local_files_only": "/" not in name}
    try:
        folder = Path(
            huggingface_hub.snapshot_download(name, allow_patterns=SMALL, ignore_patterns=ELSEWHERE, **options)
        )
        if weights:
            huggingface_hub.snapshot_download(name, allow_patterns=weight_names(folder), **options)
    except CheckpointError:
        raise
    except Exception as error:  # the package raises whatever its HTTP client does
        raise OSError(reason(name, error)) from error
    return folder


def weight_names(folder: Path) -> list[str]:
    """Names of the safetensors files that a model consists of, by its index if it has one."""
    if not (folder / INDEX).exists():
        return [WEIGHTS]
    places = read_json(folder, INDEX).get("weight_map")
    return sorted(set(map(str, places.values()))) if isinstance(places, dict) else [WEIGHTS]


def reason(name: str, error: Exception) -> str:
    """Say in one line why the hub did not give a model."""
    if "/" not in name:
        return "hub ids have the form OWNER/NAME"
    kind = type(error).__name__
    if kind in ("RepositoryNotFoundError", "GatedRepoError"):
        return "the hub has no such model, or it is private: log in with `hf auth login`"
    if kind in ("LocalEntryNotFoundError", "IncompleteSnapshotError", "OfflineModeIsEnabled"):
        return "the hub cannot be reached, and its cache does not hold the model"
    return f"the hub gave {kind}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no reason'}"
