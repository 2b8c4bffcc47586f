"""Convert a GGUF file to safetensors, once, in the cache folder."""

import functools
from pathlib import Path
from typing import Any

import torch

from ..files.cache import cached, made_once
from ..files.digests import file_digest
from ..files.untrusted import CheckpointError
from ..models.build import transformers
from ..models.hf_names import dense_gguf
from .gguf_reader import ROPE_FACTORS, GgufHeader, gguf_config, read_gguf_header
from .whole import check_whole, first_line

CONVERSION = 1  # raised when the same file would be converted into something else


def converted(gguf: Path) -> Path:
    """Return a folder with the dequantised float16 model and tokenizer of a GGUF file, made on first use.

    A folder is returned as it is.

    transformers parses a GGUF file's metadata again for every part of it (half a minute); safetensors load at once.
    The folder is found by the file's content: names, sizes and times are copied along with other contents (cp -p,
    rsync, archives). Hashing takes 3 s a GB, less than loading what was converted.
    """
    if gguf.is_dir():
        return gguf
    read_gguf_header(gguf)  # a part of a model is refused before it is hashed
    state = gguf.stat()
    digest = content_digest(gguf, state.st_ino, state.st_size, state.st_mtime_ns, state.st_ctime_ns)
    folder = cached("converted", f"{gguf.stem}-{digest[:16]}-{CONVERSION}")
    return made_once(folder, lambda part: convert(gguf, part))


@functools.lru_cache(maxsize=8)
def content_digest(gguf: Path, *state: int) -> str:
    """Return the SHA-256 of a file, once in a process for each state: a command asks for its model several times."""
    return file_digest(gguf)


def convert(gguf: Path, folder: Path) -> None:
    """Write a GGUF file's model (float16, or float32 if that is too narrow) and tokenizer into a folder.

    Raises
    ------
    CheckpointError
        If the file cannot be read whole.
    """
    hf, header = transformers(), read_gguf_header(gguf)
    where = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    config = gguf_config(gguf, header)
    try:
        model, found = hf.AutoModelForCausalLM.from_pretrained(
            **where,
            config=config,
            **dense_gguf(),
            dtype=torch.float32,
            ignore_mismatched_sizes=True,  # they are found, and named, by `check_whole`
            output_loading_info=True,
        )
        tokenizer = hf.AutoTokenizer.from_pretrained(**where)
    except (ImportError, MemoryError):
        raise
    except Exception as error:  # gguf and transformers raise anything at all on damaged files
        raise CheckpointError(f"{gguf} cannot be read as a GGUF model: {first_line(error)}") from error
    check_whole(gguf, found | {"unexpected_keys": {*found["unexpected_keys"], *unread(header, model)} - {ROPE_FACTORS}})
    half = all(torch.isfinite(tensor.half()).all() for tensor in model.state_dict().values())
    model.to(torch.float16 if half else torch.float32).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def unread(header: GgufHeader, model: Any) -> set[str]:
    """Return the names of a GGUF file's tensors that transformers' older reader skips: it has no parameter for them.

    The newer reader, of some architectures, reports them itself. Experts are stored together under a name of their own.
    """
    import gguf

    try:
        from transformers.integrations.gguf.utils import is_gguf_arch_supported
    except ImportError:
        pass
    else:
        if is_gguf_arch_supported(header.get("general.architecture")):
            return set()
    kind = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == header.get("general.architecture"))
    names = gguf.get_tensor_name_map(kind, model.config.num_hidden_layers)
    state = model.state_dict()
    inner = (name.partition(".")[2] for name in state)  # some files hold the model without its head
    known = {names.get_name(name, try_suffixes=(".weight", ".bias")) for name in (*state, *inner)}
    return {name for name in header.tensors if name not in known and "_exps." not in name}
