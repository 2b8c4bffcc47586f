"""Load dense models and tokenizers with transformers."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..files.untrusted import CheckpointError, resolve_inside
from ..models.build import transformers
from ..models.embeddings import settle_ties
from .completeness import check_complete, first_line
from .dense_files import check_dense, dense_files
from .fetch import resolve
from .format import is_checkpoint, is_official


def load_model(source: str | Path, device: str = "cpu", dtype: torch.dtype = torch.float32) -> nn.Module:
    """Load a dense causal language model, ready for `quantize_`.

    Parameters
    ----------
    source : str or Path
        A name that `fetch` knows ("smollm2", "tiny"), a .gguf file, a directory, or a Hugging Face hub id.
    device : str
    dtype : torch.dtype
        Of the parameters; GGUF weights are dequantized.

    Returns
    -------
    transformers model in eval mode

    Raises
    ------
    CheckpointError
        If there is no such model, it is quantized already, or its files are incomplete: the message names a tensor or
        file that is missing, left over or of the wrong shape.
    """
    folder = resolve(source)
    check_dense(folder, source)
    dense_files(folder)
    try:
        model, found = transformers().AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,  # `check_complete` reports them by name
            output_loading_info=True,
        )
    except (ImportError, MemoryError):
        raise
    except Exception as error:  # transformers raises anything on invalid files
        raise CheckpointError(f"{source} does not hold a model that can be read: {first_line(error)}") from error
    check_complete(folder, found)
    settle_ties(model)
    return model.to(device).eval()


#: Files of which a tokenizer has at least one. The first releases of transformers 5 make an empty one without them.
TOKENIZER_FILES = ("tokenizer*", "vocab*", "*.model", "*.tiktoken", "*.vocab", "merges.txt")


def load_tokenizer(source: str | Path) -> Any:
    """Load the tokenizer of anything that `load_model` or `load` accepts.

    Raises
    ------
    CheckpointError
        If there is no tokenizer, or a packed checkpoint has a link that leads out of its directory.
    """
    folder = resolve(source, weights=False)
    if is_checkpoint(folder) or is_official(folder):
        for file in filter(Path.is_symlink, folder.iterdir()):
            resolve_inside(folder, file.name)
    if not any(any(folder.glob(pattern)) for pattern in TOKENIZER_FILES):
        raise CheckpointError(
            f"{source} has no tokenizer: none of {', '.join(TOKENIZER_FILES)} is there; copy it again"
        )
    try:
        return transformers().AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (ImportError, MemoryError):
        raise
    except Exception as error:  # transformers and tokenizers raise anything on invalid files
        raise CheckpointError(f"{source} has no tokenizer that can be read: {first_line(error)}") from error
