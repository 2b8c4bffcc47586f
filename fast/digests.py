"""SHA-256 of files, of tensors and of what JSON holds."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


def file_digest(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def json_digest(value: Any) -> str:
    """SHA-256 of a value as JSON, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def entry_digest(dtype: str, shape: Sequence[int], pieces: Iterable[bytes | memoryview]) -> str:
    """SHA-256 of a tensor: its dtype as safetensors names it, its shape and its bytes, so that none changes unseen.

    Examples
    --------
    >>> entry_digest("F16", (2,), [bytes(4)]) == entry_digest("F16", (2,), [bytes(1), bytes(3)])
    True
    >>> entry_digest("F16", (2,), [bytes(4)]) == entry_digest("I16", (2,), [bytes(4)])
    False
    """
    value = hashlib.sha256(f"{dtype} {list(shape)}\n".encode())
    for piece in pieces:
        value.update(piece)
    return value.hexdigest()


def digest(*tensors: "Tensor") -> str:
    """SHA-256 of the contents of torch tensors."""
    value = hashlib.sha256()
    for tensor in tensors:
        value.update(contents(tensor))
    return value.hexdigest()


def contents(tensor: "Tensor") -> memoryview:
    """The bytes of a torch tensor, without a copy where it lies in one piece on the CPU."""
    import torch

    return tensor.detach().contiguous().cpu().view(-1).view(torch.uint8).numpy().data
