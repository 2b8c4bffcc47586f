"""Dense models out of GGUF files: read whole, or refused with what is in the way.

transformers reads the tensors. What its reader ignores (parts of a split file, biases, scaled positions, tensors that
it has no name for) is found here, by the file's header, before or after that.
"""

import math
import struct
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..files.untrusted import CheckpointError
from ..models.build import transformers
from .completeness import first_line

VERSIONS = (2, 3)


STRING, ARRAY, F32 = 8, 9, 0


#: How `struct` reads the metadata's types of a fixed width, by their numbers.
FORMATS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}


LONG = 4096  # arrays of more entries, such as vocabularies, are counted and not kept


ROPE_FACTORS = "rope_freqs.weight"


#: low_freq_factor, high_freq_factor and original_max_position_embeddings of all Llama 3.1 and 3.2.
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


class Field(NamedTuple):
    """An entry of a GGUF file's metadata: its type, for an array that of its entries, and its value or length."""

    kind: int
    entries: int | None
    value: Any


class GgufTensor(NamedTuple):
    """Where a tensor lies in a GGUF file: its shape in torch's order, its type, and where its bytes begin."""

    shape: tuple[int, ...]
    kind: int
    start: int


class GgufHeader(NamedTuple):
    """What a GGUF file says of itself before its tensors."""

    fields: dict[str, Field]
    tensors: dict[str, GgufTensor]

    def get(self, key: str, default: Any = None) -> Any:
        """Return a value of the metadata; `ARCH.` in a key stands for the architecture."""
        key = key.replace("ARCH", str(self.fields["general.architecture"].value))
        return self.fields[key].value if key in self.fields else default


class Cursor:
    """Reads numbers and strings one after another from bytes."""

    def __init__(self, data: Any):
        self.data, self.at = data, 0

    def numbers(self, form: str, count: int = 1) -> tuple[Any, ...]:
        """Read numbers of one `struct` format; struct.error if the bytes end before them."""
        if count * struct.calcsize(f"<{form}") > len(self.data) - self.at:
            raise struct.error("the file ends within its header")
        values = struct.unpack_from(f"<{count}{form}", self.data, self.at)
        self.at += count * struct.calcsize(f"<{form}")
        return values

    def number(self, form: str) -> Any:
        """Read one number."""
        return self.numbers(form)[0]

    def string(self, keep: bool = True) -> str:
        """Read a string, or skip it."""
        length = self.number("Q")
        first, self.at = self.at, self.at + length
        if self.at > len(self.data):
            raise struct.error("the file ends within a string")
        return bytes(self.data[first : self.at]).decode("utf-8") if keep else ""

    def field(self) -> Field:
        """Read a value with its type."""
        kind = self.number("I")
        if kind == STRING:
            return Field(kind, None, self.string())
        if kind != ARRAY:
            return Field(kind, None, self.number(FORMATS[kind]))
        entries, count = self.number("I"), self.number("Q")
        keep = count <= LONG
        if entries == STRING:
            values = [self.string(keep) for _ in range(count)]
        else:
            values = list(self.numbers(FORMATS[entries], count))
        return Field(kind, entries, values if keep else count)


def read_gguf_header(path: Path) -> GgufHeader:
    """Read a GGUF file's metadata and where its tensors lie, in milliseconds; no tensor is read.

    Raises
    ------
    CheckpointError
        If it is no GGUF file, is shorter than its header says, or is one part of several.
    """
    try:
        data = np.memmap(path, np.uint8, mode="r").data
        if bytes(data[:4]) != b"GGUF":
            raise ValueError("it does not begin with 'GGUF'")
        cursor = Cursor(data)
        cursor.at = 4
        version, tensors, count = cursor.number("I"), cursor.number("Q"), cursor.number("Q")
        if version not in VERSIONS:
            raise ValueError(f"its version is {version}, but 2 and 3, in little-endian order, are read")
        fields = {cursor.string(): cursor.field() for _ in range(count)}
        found = {}
        for _ in range(tensors):
            name, dimensions = cursor.string(), cursor.number("I")
            shape = tuple(reversed(cursor.numbers("Q", dimensions)))
            found[name] = GgufTensor(shape, cursor.number("I"), cursor.number("Q"))
        align = fields["general.alignment"].value if "general.alignment" in fields else 32
        start = -(-cursor.at // align) * align
        header = GgufHeader(fields, {name: each._replace(start=start + each.start) for name, each in found.items()})
        check_length(header, len(data))
        header.get("general.architecture")
    except KeyError as error:
        raise CheckpointError(f"{path} is damaged: its metadata lack or misuse {error}; download it again") from error
    except (ValueError, OSError, struct.error, ZeroDivisionError, TypeError, OverflowError, MemoryError) as error:
        raise CheckpointError(f"{path} is damaged or no GGUF file: {error}; download it again") from error
    parts = header.get("split.count", 1)
    if parts > 1:
        raise CheckpointError(
            f"{path} is part {header.get('split.no', 0) + 1} of {parts} of a split GGUF file: merge the parts first "
            "(llama-gguf-split --merge FIRST_PART OUT.gguf)"
        )
    if header.get("general.type", "model") != "model":
        raise CheckpointError(
            f"{path} holds an {header.get('general.type')}, not a model: merge it into its model first"
        )
    return header


def check_length(header: GgufHeader, size: int) -> None:
    """Raise ValueError if a tensor ends behind the end of the file."""
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    for name, (shape, kind, start) in header.tensors.items():
        block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
        if start + math.prod(shape) // block * block_bytes > size:
            raise ValueError(f"the file ends at {size:,} bytes, before the end of tensor {name}")


def gguf_config(path: Path, header: GgufHeader) -> Any:
    """Build the transformers configuration of a GGUF file from its header, in a fraction of a second.

    transformers' reader takes its time for the vocabulary, so it is given a small file with the same metadata but that.
    What it leaves out is added: sizes of heads, biases, and the scaled positions of Llama 3.1.

    Raises
    ------
    CheckpointError
        If transformers does not know the architecture, or positions are scaled in a way that it does not read.
    """
    config_of = transformers().AutoConfig.from_pretrained
    with tempfile.TemporaryDirectory() as folder:
        write_stub(Path(folder) / "stub.gguf", header)
        try:
            try:
                config = config_of(folder, gguf_file="stub.gguf")
            except (KeyError, TypeError):  # a reader that wants the vocabulary: it has the whole file
                config = config_of(path.parent, gguf_file=path.name)
        except Exception as error:  # gguf and transformers raise anything at all
            raise CheckpointError(f"{path} cannot be read as a GGUF model: {first_line(error)}") from error
    config.name_or_path = str(path)
    complete_config(config, header)
    scale_positions(path, config, header)
    return config


def write_stub(path: Path, header: GgufHeader) -> None:
    """Write a GGUF file with another's metadata, but for long arrays, and the names of its tensors."""
    import gguf

    writer = gguf.GGUFWriter(path, header.get("general.architecture"))
    fields = {key: field for key, field in header.fields.items() if key != "general.architecture"}
    for key, (kind, entries, value) in fields.items():
        if kind != ARRAY or (isinstance(value, list) and value):
            subtype = None if entries is None else gguf.GGUFValueType(entries)
            writer.add_key_value(key, value, gguf.GGUFValueType(kind), subtype)
    tokens = header.get("tokenizer.ggml.tokens")
    if header.get("ARCH.vocab_size") is None and tokens is not None:
        writer.add_vocab_size(len(tokens) if isinstance(tokens, list) else tokens)
    for name in header.tensors:
        writer.add_tensor(name, np.zeros(1, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def complete_config(config: Any, header: GgufHeader) -> None:
    """Add to a configuration what transformers' reader leaves out, where the tensors say it: head sizes and biases."""
    query, size = header.tensors.get("blk.0.attn_q.weight"), header.get("ARCH.attention.key_length")
    heads = getattr(config, "num_attention_heads", 0)
    known = getattr(config, "head_dim", None) or config.hidden_size // max(heads, 1)
    if query is not None and size not in (None, known) and query.shape[0] == heads * size:
        config.head_dim = size
    for setting, tensor in {"attention_bias": "blk.0.attn_q.bias", "mlp_bias": "blk.0.ffn_up.bias"}.items():
        if tensor in header.tensors and getattr(config, setting, None) is False:
            setattr(config, setting, True)


def scale_positions(path: Path, config: Any, header: GgufHeader) -> None:
    """Let a configuration say how rotary positions are scaled, which transformers' reader ignores.

    Raises
    ------
    CheckpointError
        If they are scaled in another way than Llama 3.1's.
    """
    rope = dict(getattr(config, "rope_parameters", None) or {})
    if rope.get("rope_type", "default") != "default":
        return  # the reader knows the architecture's scaling
    scaling = header.get("ARCH.rope.scaling.type", "none"), header.get("ARCH.rope.scale_linear", 1.0)
    factors = rope_factors(path, header)
    if scaling[0] not in ("none", "") or scaling[1] != 1:
        raise CheckpointError(
            f"{path}: positions are scaled ({scaling[0]}), which is not read from GGUF files; use the safetensors files"
        )
    if factors is None or np.all(factors == 1):
        return
    if not np.allclose(factors, llama3_factors(rope["rope_theta"], 2 * len(factors), float(factors.max())), rtol=1e-5):
        raise CheckpointError(
            f"{path}: positions are scaled by {ROPE_FACTORS} in another way than Llama 3.1's, which is not read from "
            "GGUF files; use the safetensors files"
        )
    config.rope_parameters = rope | {"rope_type": "llama3", "factor": float(factors.max())} | LLAMA3


def rope_factors(path: Path, header: GgufHeader) -> np.ndarray | None:
    """Read what a GGUF file divides the frequencies of its positions by, if it does."""
    tensor = header.tensors.get(ROPE_FACTORS)
    if tensor is None or tensor.kind != F32:
        return None
    return np.fromfile(path, "<f4", math.prod(tensor.shape), offset=tensor.start)


def llama3_factors(theta: float, size: int, factor: float) -> np.ndarray:
    """Compute what Llama 3.1 divides the frequency of each pair of a head's `size` entries by.

    Waves longer than the original context are `factor` times as long, those shorter than a quarter of it stay, and
    between the two the inverse of the divisor goes over linearly in the number of waves in the original context.
    """
    waves = LLAMA3["original_max_position_embeddings"] * theta ** (-np.arange(0, size, 2) / size) / (2 * np.pi)
    low, high = LLAMA3["low_freq_factor"], LLAMA3["high_freq_factor"]
    smooth = np.clip((waves - low) / (high - low), 0, 1)
    return 1 / ((1 - smooth) / factor + smooth)
