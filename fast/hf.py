"""Everything that needs transformers: loading dense models and tokenizers, and building empty ones for checkpoints."""

import contextlib
import lzma
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from .fetch import cache_folder, known_names, resolve
from .headers import CheckpointError, inside, is_checkpoint, is_official
from .hf_names import dense_gguf
from .writing import made_once

CAUSAL = "littlebit_causal"  # the name under which transformers knows `causal`
# Settings that are not the model's own: some name code on a hub, which transformers would fetch and run
CODE = ("quantization_config", "auto_map", "custom_pipelines", "use_kernels", "name_or_path", "_name_or_path")
CODE += ("attn_implementation", "_attn_implementation", "_attn_implementation_internal")
CODE += ("experts_implementation", "_experts_implementation", "_experts_implementation_internal")
COUNTED = ("num_", "n_layer", "n_head")  # what names of settings begin with that count things
MOST = 1 << 16


def transformers() -> Any:
    """The transformers package, imported when first needed.

    Raises
    ------
    ImportError
        If it is not installed; the message says what to do.
    """
    try:
        import transformers
    except ImportError as error:
        raise ImportError("this needs transformers: pip install 'littlebit[hf]'") from error
    return transformers


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
    ValueError
        If there is no such model, or it is already a LittleBit checkpoint.
    """
    folder = resolve(source)
    try:
        config = transformers().AutoConfig.from_pretrained(folder, trust_remote_code=False)
        if getattr(config, "quantization_config", None) or is_official(Path(folder)):
            raise ValueError(f"{source} is already quantised; load a LittleBit checkpoint with littlebit.fast.load")
        model = transformers().AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, use_safetensors=True, trust_remote_code=False
        )
    except OSError as error:
        raise unknown_model(source, error) from error
    except (ValueError, ImportError, MemoryError):
        raise
    except Exception as error:  # transformers raises anything at all on files that make no sense
        raise CheckpointError(f"{source} does not hold a model that can be read: {error!r}; copy it again") from error
    return model.to(device).eval()


def load_tokenizer(source: str | Path) -> Any:
    """The tokenizer of anything that `load_model` or `load` accepts.

    Raises
    ------
    ValueError
        If there is none, or a packed checkpoint has a link that leads out of its directory.
    """
    found = resolve(source)
    folder = Path(found)
    if is_checkpoint(folder) or is_official(folder):
        for file in filter(Path.is_symlink, folder.iterdir()):
            inside(folder, file.name)
    try:
        return transformers().AutoTokenizer.from_pretrained(found, trust_remote_code=False)
    except OSError as error:
        raise unknown_model(source, error) from error
    except (ValueError, ImportError, MemoryError):
        raise
    except Exception as error:  # tokenizers raises plain Exceptions on files that make no sense
        raise CheckpointError(f"{source} has no tokenizer that can be read: {error!r}; copy it again") from error


def text_tokens(tokenizer: Any, path: Path) -> torch.Tensor:
    """Tokens (n,) of a whole UTF-8 text file, with the special tokens that the tokenizer adds to a text.

    Files that end in .xz are decompressed.

    Raises
    ------
    ValueError
        If the file is not UTF-8 text.
    """
    try:
        content = path.read_bytes()
        text = (lzma.decompress(content) if path.suffix == ".xz" else content).decode("utf-8")
    except (UnicodeDecodeError, lzma.LZMAError) as error:
        raise ValueError(f"{path} is not a UTF-8 text file: {error}") from error
    return torch.tensor(tokenizer(text, verbose=False)["input_ids"], dtype=torch.int64)


def unknown_model(source: str | Path, error: Exception) -> ValueError:
    """The error for a model that cannot be found."""
    reason = str(error).strip().splitlines()[0]
    return ValueError(
        f"cannot load a model from {str(source)!r}: it is not a directory with config.json, a .gguf file, a known name "
        f"({', '.join(known_names())}) or a reachable hub id ({reason})"
    )


def converted(gguf: Path) -> Path:
    """A directory with the dequantised float16 model and tokenizer of a GGUF file, made on first use.

    transformers parses a GGUF file's metadata again for every part of it (half a minute); safetensors load at once.
    """
    size, changed = gguf.stat().st_size, int(gguf.stat().st_mtime)
    folder = cache_folder() / "converted" / f"{gguf.stem}-{size}-{changed}"
    return made_once(folder, lambda part: convert(gguf, part))


def convert(gguf: Path, folder: Path) -> None:
    """Write a GGUF file's model (float16) and tokenizer into a folder."""
    hf = transformers()
    where = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    try:
        model = hf.AutoModelForCausalLM.from_pretrained(**where, **dense_gguf(), dtype=torch.float32)
        tokenizer = hf.AutoTokenizer.from_pretrained(**where)
    except (ImportError, MemoryError):
        raise
    except Exception as error:  # gguf and transformers raise anything at all on damaged files
        raise CheckpointError(f"{gguf} cannot be read as a GGUF model: {error}") from error
    model.to(torch.float16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


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


def empty_model(config: dict[str, Any], most_parameters: int | None = None) -> nn.Module:
    """A causal language model built from a config, its parameters without memory (on the meta device).

    Buffers, which checkpoints do not hold (the frequencies of rotary embeddings, say), are real. No code is run but
    transformers' own, whatever the config names.

    Parameters
    ----------
    config : dict
        As in config.json.
    most_parameters : int, optional
        How many parameters the model may register: a config may ask for any number of layers.

    Raises
    ------
    ValueError
        If transformers does not know the model, or it asks for too much.
    """
    hf = transformers()
    config = {key: value for key, value in plain_settings(config).items() if key not in ("dtype", "torch_dtype")}
    if config.get("model_type") not in hf.CONFIG_MAPPING:
        raise ValueError(
            f"config.json: model_type {config.get('model_type')!r} is unknown to the installed transformers"
        )
    with parameters_on_meta(most_parameters):
        settings = hf.AutoConfig.for_model(**config)
        return hf.AutoModelForCausalLM.from_config(settings, trust_remote_code=False).eval()


def plain_settings(config: Any) -> Any:
    """A config, or a part of one, without what names code to fetch or to run, and with counts of a sane size."""
    if isinstance(config, list):
        return [plain_settings(value) for value in config]
    if not isinstance(config, dict):
        return config
    for key, value in config.items():
        if isinstance(value, int) and key.startswith(COUNTED) and value > MOST:
            raise ValueError(f"config.json: {key} is {value}, but no model has more than {MOST}")
    return {key: plain_settings(value) for key, value in config.items() if key not in CODE}


BUILDING = threading.RLock()


@contextlib.contextmanager
def parameters_on_meta(most: int | None = None) -> Iterator[None]:
    """While active, every parameter that a module of this thread registers goes to the meta device, uninitialised.

    One thread at a time builds; what the others register meanwhile stays as it is. More than `most` parameters are
    refused.
    """
    count, builder = 0, threading.get_ident()

    def register_on_meta(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        nonlocal count
        if param is not None and threading.get_ident() == builder:
            count += 1
            if most is not None and count > most:
                raise ValueError(f"config.json asks for more than {most} parameters, but the files hold fewer")
            param = nn.Parameter(param.to("meta"), requires_grad=param.requires_grad)
        register(self, name, param)

    with BUILDING:
        register = nn.Module.register_parameter
        nn.Module.register_parameter = register_on_meta  # type: ignore[method-assign]
        try:
            yield
        finally:
            nn.Module.register_parameter = register  # type: ignore[method-assign]
