"""Download models from the Hugging Face hub, or find them in its cache.

The package huggingface_hub does the work, so that its environment variables apply: HF_HUB_CACHE, HF_HUB_OFFLINE,
HF_ENDPOINT, HF_TOKEN and others.
"""

import re
from pathlib import Path
from typing import Any

from ..files.untrusted import CheckpointError, read_json
from .format import INDEX, WEIGHTS

#: Form of a hub id: OWNER/NAME or, for the oldest models in a cache, NAME.
HUB_ID = re.compile(r"(?!\.)[\w.-]+(/(?!\.)[\w.-]+)?", re.ASCII)
SMALL_FILES = ["*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken"]  # what a model needs besides its weights
OTHER_FORMATS = ["onnx/*", "original/*", "openvino/*", "coreml/*"]  # the same model for other programs


def hub_folder(name: str, weights: bool = True) -> Path:
    """Return a model's folder in the hub's cache, after downloading what is missing.

    If the hub cannot be reached, the model is taken from the cache; nothing is tried twice. A name without an owner is
    looked up in the cache only.

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
        raise OSError("a hub id has the form OWNER/NAME")
    try:
        import huggingface_hub
    except ImportError as error:
        raise OSError("models of the hub need transformers: pip install 'littlebit[hf]'") from error
    options: dict[str, Any] = {"local_files_only": "/" not in name}
    try:
        folder = Path(
            huggingface_hub.snapshot_download(
                name, allow_patterns=SMALL_FILES, ignore_patterns=OTHER_FORMATS, **options
            )
        )
        if weights:
            huggingface_hub.snapshot_download(name, allow_patterns=weight_names(folder), **options)
    except CheckpointError:
        raise
    except Exception as error:  # huggingface_hub passes on any error of its HTTP client
        raise OSError(hub_failure(name, error)) from error
    return folder


def weight_names(folder: Path) -> list[str]:
    """List the safetensors files of a model: those that its index names, or model.safetensors."""
    if not (folder / INDEX).exists():
        return [WEIGHTS]
    weight_map = read_json(folder, INDEX).get("weight_map")
    return sorted(set(map(str, weight_map.values()))) if isinstance(weight_map, dict) else [WEIGHTS]


def hub_failure(name: str, error: Exception) -> str:
    """Explain in one line why a model could not be downloaded."""
    if "/" not in name:
        return "hub ids have the form OWNER/NAME"
    kind = type(error).__name__
    if kind in ("RepositoryNotFoundError", "GatedRepoError"):
        return "the hub has no such model, or it is private: log in with `hf auth login`"
    if kind in ("LocalEntryNotFoundError", "IncompleteSnapshotError", "OfflineModeIsEnabled"):
        return "the hub cannot be reached, and its cache does not hold the model"
    return f"the hub raised {kind}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no reason'}"
