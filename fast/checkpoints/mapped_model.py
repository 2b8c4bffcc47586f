"""Build a dense model whose weights stay in its files, mapped into memory, in the dtype in which they are stored."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..files.mapped import map_file, release_pages
from ..files.untrusted import open_errors
from ..models.build import empty_model, transformers
from ..models.embeddings import settle_ties
from ..models.generation_settings import FILE as GENERATION
from .dense import load_model
from .dense_files import check_dense, dense_files
from .fetch import resolve
from .format import byte_ranges, read_headers
from .loading import check_state, fill, generation_config, untie_separate_head
from .saving import DTYPE_NAMES


def load_mapped(source: str | Path) -> nn.Module:
    """Load a dense causal language model without reading its weights.

    A weight occupies memory where it was read, until `files.mapped.release_pages`. The weights must not be written to,
    and the files must not change while the model is in use. A model whose files do not hold the tensors that its class
    has, such as a mixture of experts that transformers fuses, is read into memory by `load_model`.

    Parameters
    ----------
    source : str or Path
        As for `load_model`.

    Raises
    ------
    CheckpointError
        As `load_model`.
    """
    folder = resolve(source)
    check_dense(folder, source)
    files = dense_files(folder)
    hf = transformers()
    try:
        config = hf.AutoConfig.from_pretrained(folder, trust_remote_code=False).to_dict()
        tensors = map_tensors(files)
        with torch.device("meta"):
            expected: Any = empty_model(config)
        untie_separate_head(expected, tensors)
        expected.tie_weights()
        check_state(expected, tensors, folder)
    except (ImportError, MemoryError):
        raise
    except Exception:  # transformers raises anything on invalid files; its own loader reads the others, or explains
        return load_model(source)
    model: Any = empty_model(config)
    untie_separate_head(model, tensors)
    fill(model, tensors, folder, {})
    settle_ties(model)
    if (folder / GENERATION).is_file():
        model.generation_config = generation_config(folder)
    model.name_or_path = str(folder)
    return model.eval()


def in_memory(model: nn.Module, device: str, dtype: torch.dtype) -> nn.Module:
    """Copy the floating-point parameters of a model out of its files, to a device and dtype, in place."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(device, dtype, copy=True)
    release_pages()
    return model.to(device)


def map_tensors(files: list[Path]) -> dict[str, Tensor]:
    """Map the tensors of safetensors files into memory, by name.

    Raises
    ------
    CheckpointError
        If a file is corrupt.
    """
    headers = read_headers(files)
    dtypes = {name: dtype for dtype, name in DTYPE_NAMES.items()}
    tensors = {}
    for file in files:
        with open_errors(file):
            mapped = map_file(file)
            for name, (first, _) in byte_ranges(file).items():
                shape, dtype = headers[name].shape, dtypes[headers[name].dtype]
                count = headers[name].nbytes // dtype.itemsize
                flat = (
                    torch.frombuffer(mapped, dtype=dtype, count=count, offset=first)
                    if count
                    else torch.empty(0, dtype=dtype)
                )
                tensors[name] = flat.view(shape)
    return tensors
