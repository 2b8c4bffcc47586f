"""Everything that needs transformers: loading dense models and tokenizers, and building empty ones for checkpoints."""

import contextlib
import lzma
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn import functional

from .fetch import resolve
from .files.cache import cached, made_once
from .files.digests import file_digest, json_digest
from .files.untrusted import JSON_BYTES, CheckpointError, checked_json, inside, readable
from .headers import INDEX, WEIGHTS, foreign_files, foreign_method, is_checkpoint, is_official
from .models.build import transformers
from .models.embeddings import settle_ties

CAUSAL = "littlebit_causal"  # the name under which transformers knows `causal`


LONG_TEXT = 1 << 20  # characters from which a training text is tokenised in pieces of that length, once


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


#: What wrappers put before the names of a model's tensors, and what to do about them.
WRAPPERS = {
    "_orig_mod.": "torch.compile: save model._orig_mod",
    "module.": "DataParallel or DDP: save model.module",
    "base_model.model.": "PEFT: save model.merge_and_unload()",
    "_forward_module.": "Fabric: save model.module",
    "_fsdp_wrapped_module.": "FSDP: save its full state dict",
}


def check_whole(place: Path | str, found: Mapping[str, Any]) -> None:
    """Check what transformers reports after loading a model: each tensor of the model was read, and each of the files.

    Parameters
    ----------
    place : Path
        The folder or file that the model comes from.
    found : mapping
        What `from_pretrained(..., output_loading_info=True)` returns beside the model.

    Raises
    ------
    CheckpointError
        If tensors are missing, left over, or of another shape; the first of them are named.
    """
    missing, left = sorted(found["missing_keys"]), sorted(found["unexpected_keys"])
    wrong = []
    for verb, names in (("is missing", missing), ("is left over", left)):
        if names:
            more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
            wrong.append(f"tensor {names[0]}{more} {verb}")
    for name, stored, wanted in sorted(found["mismatched_keys"]):
        wrong.append(f"tensor {name} is {tuple(stored)}, not {tuple(wanted)}")
    if not wrong:
        return
    advice = "copy or download it again, or mend config.json"
    for prefix, wrapper in WRAPPERS.items():
        if left and all(name.startswith(prefix) or f".{prefix}" in name for name in left):
            advice = f"the names have {prefix!r} of a wrapper ({wrapper})"
    if any(".lora_" in name for name in left):
        advice = "it holds a LoRA adapter that is not merged: merge it (merge_and_unload) and save the result"
    if missing == ["lm_head.weight"]:
        advice = "if the head is the embedding, set tie_word_embeddings to true in config.json"
    more = f"; and {len(wrong) - 3} more" if len(wrong) > 3 else ""
    raise CheckpointError(
        f"{place} does not fit the model that its configuration describes: {'; '.join(wrong[:3])}{more}; {advice}"
    )


def first_line(error: Exception) -> str:
    """Return the first line of an error's message."""
    return (str(error).strip() or repr(error)).splitlines()[0]


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


def text_tokens(tokenizer: Any, path: Path) -> torch.Tensor:
    """Tokens (n,) of a whole UTF-8 text file, with the special tokens that the tokenizer adds to a text.

    Files that end in .xz are decompressed.

    Raises
    ------
    ValueError
        If the file is not UTF-8 text.
    """
    return torch.tensor(tokenizer(read_text(path), verbose=False)["input_ids"], dtype=torch.int64)


def read_text(path: Path) -> str:
    """Read a UTF-8 text file, decompressed if it ends in .xz; raise ValueError if it is not UTF-8 text."""
    try:
        content = path.read_bytes()
        return (lzma.decompress(content) if path.suffix == ".xz" else content).decode("utf-8")
    except (UnicodeDecodeError, lzma.LZMAError) as error:
        raise ValueError(f"{path} is not a UTF-8 text file: {error}") from error


def training_tokens(tokenizer: Any, path: Path) -> Tensor:
    """Read the tokens of a training text, of any length.

    A .npy file holds tokens already. Short texts are tokenised whole, as by `text_tokens`. Texts of LONG_TEXT bytes
    and more are tokenised in pieces that end with a blank line, without special tokens; their tokens are kept in the
    cache folder, by the contents of the text and of the tokenizer.

    Parameters
    ----------
    tokenizer : of transformers
    path : Path
        UTF-8 text (.xz allowed), or integers in a .npy file.

    Returns
    -------
    (n,) integer tensor.

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
            raise ValueError(f"{path} must hold tokens, one row of integers, not {tokens.dtype} of {tokens.shape}")
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

    kept = made_once(cached("tokens", key[:32]), make) / "tokens.npy"
    return torch.from_numpy(np.load(kept).astype(np.int64))


def text_pieces(text: str, size: int) -> Iterator[str]:
    r"""Cut a text into pieces of at least `size` characters that end with a blank line; the last may be shorter.

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


@contextlib.contextmanager
def causal_attention(model: nn.Module) -> Iterator[None]:
    """While active, a transformers model attends causally without a mask, so that its forward can be captured.

    transformers looks at the positions to see whether it needs a mask: a look that no CUDA graph can hold. For whole
    sequences without padding the answer is known.
    """
    hf = transformers()
    hf.AttentionInterface.register(CAUSAL, causal)
    before = model.config._attn_implementation  # type: ignore[union-attr]
    model.set_attn_implementation(CAUSAL)  # type: ignore[operator]
    try:
        yield
    finally:
        model.set_attn_implementation(before)  # type: ignore[operator]


def causal(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **unused: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers calls it: (batch, heads, sequence, d) in, (batch, sequence, heads, d) out."""
    grouped = query.shape[1] != key.shape[1]
    out = functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=grouped)
    return out.transpose(1, 2).contiguous(), None


def is_plainly_causal(model: nn.Module, length: int) -> bool:
    """Whether `causal` says all of the model's attention for sequences of a length: no short window, no soft cap."""
    config = model.config  # type: ignore[union-attr]
    window = getattr(config, "sliding_window", None)
    return (window is None or window >= length) and not getattr(config, "attn_logit_softcapping", None)
