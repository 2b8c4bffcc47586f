"""Read the headers of GGUF files, and build complete transformers configurations from them.

transformers reads the tensors. Its reader ignores some things without a word: the other parts of a split file, biases,
scaled rotary positions. They are found here in the file's header, and handled or refused.
"""

import math
import struct
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ...reference.arrays import Array
from ..files.untrusted import CheckpointError
from ..models.build import transformers
from .completeness import first_line

VERSIONS = (2, 3)


STRING, ARRAY = 8, 9  # types of metadata
F32 = 0  # type of a tensor

#: Types of metadata that have a fixed width -> their `struct` formats.
FORMATS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}

LONG = 4096  # longer arrays, such as vocabularies, are counted but not kept

ROPE_FACTORS = "rope_freqs.weight"

#: The rotary settings that all Llama 3.1 and 3.2 models share; only the factor differs.
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


class Field(NamedTuple):
    """Hold one entry of a GGUF file's metadata.

    Attributes
    ----------
    type : int
        By GGUF's numbers.
    entry_type : int or None
        For arrays: the type of the entries.
    value : object
        For arrays of more than LONG entries: their number.
    """

    type: int
    entry_type: int | None
    value: Any


class GgufTensor(NamedTuple):
    """Describe a tensor in a GGUF file.

    Attributes
    ----------
    shape : tuple of int
        In torch's order; GGUF's is the reverse.
    type : int
        Quantization type, by GGUF's numbers.
    start : int
        Position of its first byte in the file.
    """

    shape: tuple[int, ...]
    type: int
    start: int


class GgufHeader(NamedTuple):
    """Hold a GGUF file's metadata and the descriptions of its tensors, by name."""

    fields: dict[str, Field]
    tensors: dict[str, GgufTensor]

    def get(self, key: str, default: Any = None) -> Any:
        """Return a value of the metadata; `ARCH` in a key stands for the architecture, such as llama."""
        key = key.replace("ARCH", str(self.fields["general.architecture"].value))
        return self.fields[key].value if key in self.fields else default


class Cursor:
    """Read numbers, strings and metadata fields one after another from bytes."""

    def __init__(self, data: Any):
        self.data, self.at = data, 0

    def numbers(self, form: str, count: int = 1) -> tuple[Any, ...]:
        """Read numbers of one `struct` format; raise struct.error if the bytes end before them."""
        if count * struct.calcsize(f"<{form}") > len(self.data) - self.at:
            raise struct.error("the file ends within its header")
        values = struct.unpack_from(f"<{count}{form}", self.data, self.at)
        self.at += count * struct.calcsize(f"<{form}")
        return values

    def number(self, form: str) -> Any:
        """Read one number."""
        return self.numbers(form)[0]

    def string(self, keep: bool = True) -> str:
        """Read a string, or skip it and return ""."""
        length = self.number("Q")
        first, self.at = self.at, self.at + length
        if self.at > len(self.data):
            raise struct.error("the file ends within a string")
        return bytes(self.data[first : self.at]).decode("utf-8") if keep else ""

    def field(self) -> Field:
        """Read the type and value of a metadata entry."""
        type_ = self.number("I")
        if type_ == STRING:
            return Field(type_, None, self.string())
        if type_ != ARRAY:
            return Field(type_, None, self.number(FORMATS[type_]))
        entry_type, count = self.number("I"), self.number("Q")
        keep = count <= LONG
        if entry_type == STRING:
            values = [self.string(keep) for _ in range(count)]
        else:
            values = list(self.numbers(FORMATS[entry_type], count))
        return Field(type_, entry_type, values if keep else count)


def read_gguf_header(path: Path) -> GgufHeader:
    """Read a GGUF file's metadata and tensor descriptions, in milliseconds, without reading tensors.

    Raises
    ------
    CheckpointError
        If it is not a GGUF file, is shorter than its header says, is one part of several, or is an adapter.
    """
    try:
        data = np.memmap(path, np.uint8, mode="r").data
        header = parse_gguf_header(data)
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


def parse_gguf_header(data: Any) -> GgufHeader:
    """Parse the header at the beginning of a GGUF file's bytes; raise ValueError or struct.error for other bytes."""
    if bytes(data[:4]) != b"GGUF":
        raise ValueError("it does not begin with 'GGUF'")
    cursor = Cursor(data)
    cursor.at = 4
    version, tensors, count = cursor.number("I"), cursor.number("Q"), cursor.number("Q")
    if version not in VERSIONS:
        raise ValueError(f"its version must be 2 or 3, in little-endian order, got {version}")
    fields = {cursor.string(): cursor.field() for _ in range(count)}
    found = {}
    for _ in range(tensors):
        name, dimensions = cursor.string(), cursor.number("I")
        shape = tuple(reversed(cursor.numbers("Q", dimensions)))
        found[name] = GgufTensor(shape, cursor.number("I"), cursor.number("Q"))
    align = fields["general.alignment"].value if "general.alignment" in fields else 32
    start = -(-cursor.at // align) * align
    return GgufHeader(fields, {name: each._replace(start=start + each.start) for name, each in found.items()})


def check_length(header: GgufHeader, size: int) -> None:
    """Raise ValueError if a tensor ends after the end of the file, which has `size` bytes."""
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    for name, (shape, type_, start) in header.tensors.items():
        block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(type_)]
        if start + math.prod(shape) // block * block_bytes > size:
            raise ValueError(f"the file ends at {size:,} bytes, before the end of tensor {name}")


def gguf_config(path: Path, header: GgufHeader) -> Any:
    """Build the transformers configuration of a GGUF file from its header, in a fraction of a second.

    transformers' reader is slow because of the vocabulary, so it gets a small file with all other metadata. Head sizes,
    biases and the scaled positions of Llama 3.1, which it leaves out, are added.

    Raises
    ------
    CheckpointError
        If transformers does not know the architecture, or positions are scaled in an unsupported way.
    """
    config_of = transformers().AutoConfig.from_pretrained
    with tempfile.TemporaryDirectory() as folder:
        write_stub(Path(folder) / "stub.gguf", header)
        try:
            try:
                config = config_of(folder, gguf_file="stub.gguf")
            except (KeyError, TypeError):  # some readers need the vocabulary, and so the whole file
                config = config_of(path.parent, gguf_file=path.name)
        except Exception as error:  # gguf and transformers raise anything on invalid files
            raise CheckpointError(f"{path} cannot be read as a GGUF model: {first_line(error)}") from error
    config.name_or_path = str(path)
    complete_config(config, header)
    scale_positions(path, config, header)
    return config


def write_stub(path: Path, header: GgufHeader) -> None:
    """Write a small GGUF file with the metadata and tensor names of another, without its long arrays."""
    import gguf

    writer = gguf.GGUFWriter(path, header.get("general.architecture"))
    fields = {key: field for key, field in header.fields.items() if key != "general.architecture"}
    for key, (type_, entry_type, value) in fields.items():
        if type_ != ARRAY or (isinstance(value, list) and value):
            subtype = None if entry_type is None else gguf.GGUFValueType(entry_type)
            writer.add_key_value(key, value, gguf.GGUFValueType(type_), subtype)
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
    """Add the head size and biases that transformers' reader leaves out of a configuration."""
    query, size = header.tensors.get("blk.0.attn_q.weight"), header.get("ARCH.attention.key_length")
    heads = getattr(config, "num_attention_heads", 0)
    known = getattr(config, "head_dim", None) or config.hidden_size // max(heads, 1)
    if query is not None and size not in (None, known) and query.shape[0] == heads * size:
        config.head_dim = size
    for setting, tensor in {"attention_bias": "blk.0.attn_q.bias", "mlp_bias": "blk.0.ffn_up.bias"}.items():
        if tensor in header.tensors and getattr(config, setting, None) is False:
            setattr(config, setting, True)


def scale_positions(path: Path, config: Any, header: GgufHeader) -> None:
    """Add the scaling of rotary positions, which transformers' reader ignores, to a configuration.

    Raises
    ------
    CheckpointError
        If they are scaled, but not as in Llama 3.1.
    """
    rope = dict(getattr(config, "rope_parameters", None) or {})
    if rope.get("rope_type", "default") != "default":
        return  # transformers' reader knows the scaling of this architecture
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


def rope_factors(path: Path, header: GgufHeader) -> Array | None:
    """Read the divisors of the rotary frequencies from a GGUF file; return None if it has none."""
    tensor = header.tensors.get(ROPE_FACTORS)
    if tensor is None or tensor.type != F32:
        return None
    return np.fromfile(path, "<f4", math.prod(tensor.shape), offset=tensor.start)


def llama3_factors(theta: float, size: int, factor: float) -> Array:
    """Compute the divisors of Llama 3.1's rotary frequencies.

    The divisor is `factor` for wavelengths above the original context, and 1 for those below a quarter of it. Between
    the two its inverse is linear in the number of waves that fit into the original context.

    Parameters
    ----------
    theta : float
        Base of the rotary frequencies.
    size : int
        Entries of a head.
    factor : float

    Returns
    -------
    (size / 2,) float64 array
    """
    waves = LLAMA3["original_max_position_embeddings"] * theta ** (-np.arange(0, size, 2) / size) / (2 * np.pi)
    low, high = LLAMA3["low_freq_factor"], LLAMA3["high_freq_factor"]
    smooth = np.clip((waves - low) / (high - low), 0, 1)
    return 1 / ((1 - smooth) / factor + smooth)
