"""Read text files and turn them into tokens, for evaluation and training."""

import lzma
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..files.cache import build_once, cache_path
from ..files.digests import file_digest, json_digest

LONG_TEXT = 1 << 20  # a training text of this many bytes is tokenized in pieces of this many characters, and cached


def text_tokens(tokenizer: Any, path: Path) -> torch.Tensor:
    """Tokenize a whole UTF-8 text file, with the special tokens that the tokenizer adds.

    Parameters
    ----------
    tokenizer : transformers tokenizer
    path : Path
        A file that ends in .xz is decompressed.

    Returns
    -------
    (n,) int64 tensor

    Raises
    ------
    ValueError
        If the file is not UTF-8 text.
    """
    return torch.tensor(tokenizer(read_text(path), verbose=False)["input_ids"], dtype=torch.int64)


def read_text(path: Path) -> str:
    """Read a UTF-8 text file, and decompress it if it ends in .xz; raise ValueError if it is not UTF-8."""
    try:
        content = path.read_bytes()
        return (lzma.decompress(content) if path.suffix == ".xz" else content).decode("utf-8")
    except (UnicodeDecodeError, lzma.LZMAError) as error:
        raise ValueError(f"{path} is not a UTF-8 text file: {error}") from error


def training_tokens(tokenizer: Any, path: Path) -> Tensor:
    """Read the tokens of a training text of any length.

    A short text is tokenized whole, as by `text_tokens`. A text of LONG_TEXT bytes or more is tokenized in pieces that
    end with a blank line, without special tokens. Its tokens are cached by the content of the text and the tokenizer.

    Parameters
    ----------
    tokenizer : transformers tokenizer
    path : Path
        UTF-8 text (.xz allowed), or a .npy file of token ids.

    Returns
    -------
    (n,) int64 tensor

    Raises
    ------
    ValueError
        If the file is neither.
    """
    if path.suffix == ".npy":
        try:
            tokens = np.load(path)
        except (ValueError, EOFError) as error:
            raise ValueError(f"{path} is not an array that NumPy can read: {error}") from error
        if tokens.ndim != 1 or not np.issubdtype(tokens.dtype, np.integer):
            raise ValueError(f"{path} must hold token ids, integers of shape (n,), got {tokens.dtype} {tokens.shape}")
        return torch.from_numpy(tokens.astype(np.int64))
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if path.stat().st_size < LONG_TEXT or backend is None:
        return text_tokens(tokenizer, path)
    key = json_digest([file_digest(path), path.suffix == ".xz", backend.to_str()])

    def make(folder: Path) -> None:
        pieces = [
            np.asarray(tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"], np.uint32)
            for piece in text_pieces(read_text(path), LONG_TEXT)
        ]
        np.save(folder / "tokens.npy", np.concatenate(pieces))

    kept = build_once(cache_path("tokens", key[:32]), make) / "tokens.npy"
    return torch.from_numpy(np.load(kept).astype(np.int64))


def text_pieces(text: str, size: int) -> Iterator[str]:
    r"""Cut a text after blank lines into pieces of at least `size` characters; the last may be shorter.

    Examples
    --------
    >>> list(text_pieces("one\n\ntwo\n\n\nthree", 4))
    ['one\n\ntwo\n\n\n', 'three']
    """
    start = 0
    while start < len(text):
        end = text.find("\n\n", start + size)
        end = len(text) if end < 0 else end
        while end < len(text) and text[end] == "\n":
            end += 1
        yield text[start:end]
        start = end
