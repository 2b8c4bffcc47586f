"""List the names of models that `fetch` knows, and suggest the right one for a misspelt name."""

import difflib
from pathlib import Path

from ..files.untrusted import CheckpointError
from .download import ARTIFACTS, DATA, TINY

BUNDLED_SUFFIX = "bit.safetensors"


def bundled_names() -> list[str]:
    """List the names of the bundled checkpoints, such as smollm2-0.55bit."""
    return sorted(path.stem for path in DATA.glob(f"*{BUNDLED_SUFFIX}"))


def known_names() -> list[str]:
    """List all names that `fetch` knows."""
    return sorted([*ARTIFACTS, TINY, *bundled_names()])


def folder_hint(path: Path) -> str:
    """Suggest what to do about a directory without config.json, for an error message."""
    if not path.is_dir():
        return ""
    if (path / "adapter_config.json").is_file():
        return " but an adapter of PEFT: merge it into its base model (merge_and_unload), and save that"
    files = sorted(file.name for file in path.glob("*.gguf"))
    return f"; name the file itself: {path / files[0]}" if files else ""


def did_you_mean(source: str | Path) -> str:
    """Suggest known names, and files beside a path, that resemble a misspelt source, for an error message."""
    path = Path(source)
    try:
        neighbours = [each.name for each in path.parent.iterdir()] if path.name else []
    except OSError:
        neighbours = []
    found = difflib.get_close_matches(path.name.lower(), known_names(), 3, 0.6)
    found += [str(path.with_name(name)) for name in difflib.get_close_matches(path.name, neighbours, 3, 0.75)]
    return f"; did you mean {' or '.join(found)}?" if found else ""


def unknown_model(source: str | Path, reason: str) -> CheckpointError:
    """Make the error for a model that cannot be found."""
    return CheckpointError(
        f"cannot load a model from {str(source)!r}: it is not a directory with config.json, a .gguf file, a known name "
        f"({', '.join(known_names())}) or a reachable hub id ({reason}){did_you_mean(source)}"
    )
