"""Everything that needs transformers: loading dense models and tokenizers, and building empty ones for checkpoints."""

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from ..files.untrusted import JSON_BYTES, CheckpointError, checked_json, inside, readable
from ..models.build import transformers
from ..models.embeddings import settle_ties
from .fetch import resolve
from .format import INDEX, WEIGHTS, foreign_files, foreign_method, is_checkpoint, is_official
from .whole import check_whole, first_line


def load_model(source: str | Path, device: str = "cpu", dtype: torch.dtype = torch.float32) -> nn.Module:
    """A dense causal language model, ready for `quantize_`.

    Parameters
    ----------
    source : str or Path
        A name that `fetch` knows ("smollm2", "tiny"), a .gguf file, a directory, or a hub id.
    device : str
    dtype : torch.dtype
        Of the parameters; GGUF weights are dequantised.

    Returns
    -------
    transformers model in eval mode.

    Raises
    ------
    CheckpointError
        If there is no such model, it is quantised already, or its files are not the whole of it: a tensor or file that
        is missing, left over or of another shape is named.
    """
    folder = resolve(source)
    check_dense(folder, source)
    check_files(folder)
    try:
        model, found = transformers().AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,  # they are found, and named, by `check_whole`
            output_loading_info=True,
        )
    except (ImportError, MemoryError):
        raise
    except Exception as error:  # transformers raises anything at all on files that make no sense
        raise CheckpointError(f"{source} does not hold a model that can be read: {first_line(error)}") from error
    check_whole(folder, found)
    settle_ties(model)
    return model.to(device).eval()


def check_dense(folder: Path, source: str | Path) -> None:
    """Check by its small files that a folder holds a dense model: not a packed or quantised one, nor an adapter.

    Raises
    ------
    CheckpointError
        If it holds something else; a method that quantised it is named.
    """
    config = dense_json(folder / "config.json")
    section = config.get("quantization_config")
    if is_official(folder) or (isinstance(section, dict) and section.get("quant_method") == "littlebit"):
        raise CheckpointError(
            f"{source} is already quantised, by LittleBit: load it with littlebit.fast.load, or take its dense model"
        )
    if method := foreign_method(config) or foreign_files(folder):
        raise CheckpointError(
            f"{source} is already quantised, by {method}: start from the model as it was before that, in 16 or 32 bits"
        )
    if (folder / "adapter_config.json").is_file():
        raise CheckpointError(
            f"{source} holds an adapter of PEFT beside the model: merge it (merge_and_unload) and save the result, or "
            "remove adapter_config.json"
        )


def dense_json(file: Path) -> dict[str, Any]:
    """Read the object in a JSON file of a dense model, which may be a link to an ordinary file anywhere."""
    try:
        if not file.is_file():
            raise OSError("not an ordinary file")
        with file.open("rb") as opened:
            return checked_json(opened.read(JSON_BYTES + 1))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} is damaged ({error}); copy or download it again") from error


def check_files(folder: Path) -> None:
    """Check that the safetensors files of a dense model are all there, and as long as their headers say.

    Raises
    ------
    CheckpointError
        If one is missing or damaged; it is named.
    """
    names = [WEIGHTS]
    if not (folder / WEIGHTS).exists() and (folder / INDEX).exists():
        places = dense_json(folder / INDEX).get("weight_map")
        if not isinstance(places, dict) or not places:
            raise CheckpointError(f"{folder / INDEX} must have a 'weight_map' of tensors to files; download it again")
        names = sorted(set(map(str, places.values())))
    for name in names:
        if not (folder / name).is_file():
            pickled = any(folder.glob("*.bin")) or any(folder.glob("*.pt*"))
            advice = "pickled weights are not read: save the model as safetensors" if pickled else "copy or download it"
            raise CheckpointError(f"{folder} does not hold the whole model: there is no {name}; {advice}")
        with readable(folder / name), safe_open(folder / name, framework="numpy"):
            pass  # its header is checked against the length of the file


def load_tokenizer(source: str | Path) -> Any:
    """The tokenizer of anything that `load_model` or `load` accepts.

    Raises
    ------
    ValueError
        If there is none, or a packed checkpoint has a link that leads out of its directory.
    """
    folder = resolve(source, weights=False)
    if is_checkpoint(folder) or is_official(folder):
        for file in filter(Path.is_symlink, folder.iterdir()):
            inside(folder, file.name)
    try:
        return transformers().AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (ImportError, MemoryError):
        raise
    except Exception as error:  # transformers and tokenizers raise anything at all on files that make no sense
        raise CheckpointError(f"{source} has no tokenizer that can be read: {first_line(error)}") from error
