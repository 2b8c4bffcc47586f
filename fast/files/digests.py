"""Compute SHA-256 digests of files, JSON values, tensors and whole checkpoints, and of Python code.

checkpoints/format.py specifies which of them a checkpoint stores.
"""

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

TAG_BYTES = 8  # stored per tensor in a checkpoint


def file_digest(path: Path) -> str:
    """Compute the SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def json_digest(value: Any) -> str:
    """Compute the SHA-256 of a value as JSON with sorted keys, in hexadecimal."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def tensor_digest(dtype: str, shape: Sequence[int], chunks: Iterable[bytes | memoryview]) -> str:
    """Compute the SHA-256 of a tensor's dtype, shape and bytes, in hexadecimal.

    Parameters
    ----------
    dtype : str
        As safetensors names it, such as "F16".
    shape : sequence of int
    chunks : iterable of bytes
        The tensor's bytes in the file, in pieces of any length.

    Examples
    --------
    >>> tensor_digest("F16", (2,), [bytes(4)]) == tensor_digest("F16", (2,), [bytes(1), bytes(3)])
    True
    >>> tensor_digest("F16", (2,), [bytes(4)]) == tensor_digest("I16", (2,), [bytes(4)])
    False
    """
    value = hashlib.sha256(f"{dtype} {list(shape)}\n".encode())
    for chunk in chunks:
        value.update(chunk)
    return value.hexdigest()


def digest_tag(name: str, digest: str) -> bytes:
    """Shorten the digest of a named tensor to TAG_BYTES bytes, enough to say which tensor changed."""
    return hashlib.sha256(f"{name} {digest}".encode()).digest()[:TAG_BYTES]


def checkpoint_digest(digests: Mapping[str, str], config: str) -> str:
    """Compute the SHA-256 of a whole checkpoint, from the digests of its tensors and of its config.json.

    Parameters
    ----------
    digests : mapping of str to str
        `tensor_digest` of each tensor of all files, by name.
    config : str
        `json_digest` of config.json.

    Examples
    --------
    >>> checkpoint_digest({"a": "1", "b": "2"}, "0") == checkpoint_digest({"b": "2", "a": "1"}, "0")
    True
    >>> checkpoint_digest({"a": "1", "b": "2"}, "0") == checkpoint_digest({"a": "2", "b": "1"}, "0")
    False
    """
    return json_digest({"config": config, "tensors": dict(digests)})


def code_digest(source: str) -> str:
    r"""Compute a digest of Python code, 12 hexadecimal digits, that ignores comments, docstrings and blanks.

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


def tensors_digest(*tensors: "Tensor") -> str:
    """Compute the SHA-256 of the bytes of torch tensors, one after another, in hexadecimal."""
    value = hashlib.sha256()
    for tensor in tensors:
        value.update(tensor_bytes(tensor))
    return value.hexdigest()


def tensor_bytes(tensor: "Tensor") -> memoryview:
    """Return the bytes of a torch tensor, without a copy if it is contiguous and on the CPU."""
    import torch

    return tensor.detach().contiguous().cpu().view(-1).view(torch.uint8).numpy().data
