"""Convert a GGUF file to a safetensors model, once, in the cache folder."""

import functools
from pathlib import Path
from typing import Any

import torch

from ..files.cache import build_once, cache_path
from ..files.digests import file_digest
from ..files.untrusted import CheckpointError
from ..models.build import transformers
from ..models.hf_names import dense_gguf
from .completeness import check_complete, first_line
from .gguf_reader import ROPE_FACTORS, GgufHeader, gguf_config, read_gguf_header

CONVERSION = 1  # increase it when the conversion of the same file changes


def converted_folder(gguf: Path) -> Path:
    """Return a folder with the dequantized model and tokenizer of a GGUF file, converted on first use.

    transformers takes half a minute to parse a GGUF file, but loads safetensors at once. The folder's name holds a hash
    of the file's content, because another file can have the same name, size and time (cp -p, rsync, archives). Hashing
    takes 3 s per GB.
    """
    read_gguf_header(gguf)  # refuses unusable files before they are hashed
    state = gguf.stat()
    digest = content_digest(gguf, state.st_ino, state.st_size, state.st_mtime_ns, state.st_ctime_ns)
    folder = cache_path("converted", f"{gguf.stem}-{digest[:16]}-{CONVERSION}")
    return build_once(folder, lambda part: convert(gguf, part))


@functools.lru_cache(maxsize=8)
def content_digest(gguf: Path, *state: int) -> str:
    """Compute the SHA-256 of a file; cached for as long as `state`, its inode, size and times, stays the same."""
    return file_digest(gguf)


def convert(gguf: Path, folder: Path) -> None:
    """Write a GGUF file's model and tokenizer into a folder; float32 if a value does not fit float16.

    Raises
    ------
    CheckpointError
        If transformers cannot read the file, or does not read all of it.
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
            ignore_mismatched_sizes=True,  # `check_complete` reports them by name
            output_loading_info=True,
        )
        tokenizer = hf.AutoTokenizer.from_pretrained(**where)
    except (ImportError, MemoryError):
        raise
    except Exception as error:  # gguf and transformers raise anything on corrupt files
        raise CheckpointError(f"{gguf} cannot be read as a GGUF model: {first_line(error)}") from error
    check_complete(
        gguf, found | {"unexpected_keys": {*found["unexpected_keys"], *ignored_tensors(header, model)} - {ROPE_FACTORS}}
    )
    half = all(torch.isfinite(tensor.half()).all() for tensor in model.state_dict().values())
    model.to(torch.float16 if half else torch.float32).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def ignored_tensors(header: GgufHeader, model: Any) -> set[str]:
    """List the tensors of a GGUF file that transformers' older reader skips, because no parameter has their name.

    The newer reader, which serves some architectures, reports them itself. Experts have GGUF names of their own and are
    left out here.
    """
    import gguf

    try:
        from transformers.integrations.gguf.utils import is_gguf_arch_supported
    except ImportError:
        pass
    else:
        if is_gguf_arch_supported(header.get("general.architecture")):
            return set()
    known_names = gguf.MODEL_ARCH_NAMES.items()
    architecture = next(key for key, name in known_names if name == header.get("general.architecture"))
    names = gguf.get_tensor_name_map(architecture, model.config.num_hidden_layers)
    state = model.state_dict()
    inner = (name.partition(".")[2] for name in state)  # some files hold the model without a head
    known = {names.get_name(name, try_suffixes=(".weight", ".bias")) for name in (*state, *inner)}
    return {name for name in header.tensors if name not in known and "_exps." not in name}
