"""SHA-256 of files, of tensors and of what JSON holds."""

import ast
import hashlib
import io
import json
import tokenize
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

TAG_BYTES = 8  # of a tensor's digest that a checkpoint stores


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


def tag(name: str, digest: str) -> bytes:
    """Shorten the digest of a named tensor to TAG_BYTES bytes: enough to say which one changed."""
    return hashlib.sha256(f"{name} {digest}".encode()).digest()[:TAG_BYTES]


def set_digest(digests: Mapping[str, str], config: str) -> str:
    """Compute the SHA-256 of a whole checkpoint: of the digests of all its tensors and of its config.json.

    Examples
    --------
    >>> set_digest({"a": "1", "b": "2"}, "0") == set_digest({"b": "2", "a": "1"}, "0")
    True
    >>> set_digest({"a": "1", "b": "2"}, "0") == set_digest({"a": "2", "b": "1"}, "0")
    False
    """
    return json_digest({"config": config, "tensors": dict(digests)})


def code_digest(source: str) -> str:
    r"""Compute a short digest of Python code, whatever its comments, docstrings and blanks.

    Examples
    --------
    >>> code_digest("x = 1") == code_digest("# Of a module.\n'It holds x.'\nx  =  1  # one")
    True
    >>> code_digest("x = 1") == code_digest("x = 2")
    False
    """
    lines = source.splitlines()
    for node in ast.walk(ast.parse(source)):
        documented = isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))
        if documented and ast.get_docstring(node, clean=False) is not None:
            first, last = node.body[0].lineno, node.body[0].end_lineno or 0
            lines[first - 1 : last] = [""] * (last - first + 1)
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column]
    return hashlib.sha256("".join("".join(lines).split()).encode()).hexdigest()[:12]


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
