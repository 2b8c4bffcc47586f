"""Load models for the commands, and set up torch for them."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from ..checkpoints.fetch import resolve
from ..checkpoints.format import is_checkpoint, is_official
from ..files.atomic import resolve_output

if TYPE_CHECKING:
    import torch


def use_torch(threads: int | None = None) -> None:
    """Import torch, set its number of CPU threads if one is given, and silence transformers."""
    import torch

    if threads:
        torch.set_num_threads(threads)
    try:
        from transformers.utils import logging as hf_logging
    except ImportError:
        return
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()


def load_any(source: str | Path, device: str, dtype: "torch.dtype | None" = None) -> "torch.nn.Module":
    """Load a packed checkpoint or a dense model, by default in float32."""
    from ..checkpoints.checkpoint import load
    from ..checkpoints.dense import load_model

    folder = resolve(source)
    packed = is_checkpoint(folder) or is_official(folder)
    reader: Callable[..., torch.nn.Module] = load if packed else load_model
    return reader(folder, device, **({"dtype": dtype} if dtype else {}))


def check_apart(source: str, out: Path) -> None:
    """Raise ValueError if writing `out` would remove the model `source` that it is made from."""
    model, place = Path(source), resolve_output(out)
    if model.exists() and resolve_output(model).is_relative_to(place):
        raise ValueError(
            f"the output must not replace the model that it is made from, but {out} holds the model {source}; choose "
            "another output"
        )
