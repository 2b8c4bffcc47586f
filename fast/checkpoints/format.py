"""What a checkpoint says of itself, without torch: config.json and the headers of its safetensors files, checked.

checkpoint.py says what they hold. Everything that reads a checkpoint reads them here: `load`, `info` and `verify`,
transformers' plug-in, and the decoder that maps the tensors into memory.

The files may come from anyone: nothing in them is believed before it is checked, and nothing in them runs. A file is
opened only if it is an ordinary one that lies in the checkpoint's own directory. JSON and headers are bounded in size;
tensors are mapped, not allocated, and only as large as their file. Whatever is wrong becomes a CheckpointError that
names the file. What a model's configuration asks for is bounded in hf.py.
"""

import base64
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import safe_open

from ..files.digests import TAG_BYTES, entry_digest, json_digest, set_digest, tag
from ..files.untrusted import JSON_BYTES, CheckpointError, checked_json, inside, read_json, readable
from ..models.packed_shapes import ITEM_BYTES, Header, packed_headers

#: The format that `save` writes, and those that are read; checkpoint.py says how they differ.
FORMAT_VERSION = 3


WITHOUT_CHECKSUMS = 1


WITHOUT_SET = 2


FORMATS = (WITHOUT_CHECKSUMS, WITHOUT_SET, FORMAT_VERSION)


WEIGHTS = "model.safetensors"


INDEX = "model.safetensors.index.json"


OFFICIAL = "littlebit_config.json"  # what only a checkpoint of the authors' repository has


#: Sections of config.json that quantised models have, with who writes them if they do not say it, and files beside it.
SECTIONS = {"quantization_config": "another program", "compression_config": "compressed-tensors", "quantization": "mlx"}


FOREIGN_FILES = {"quantize_config.json": "gptq", "quant_config.json": "awq", "hf_quant_config.json": "modelopt"}


#: Most entries of a tensor, an empty size counted as one.
MOST_ENTRIES = 1 << 48


#: The key of a safetensors file's metadata under which its checksums stand, as JSON.
CHECKSUMS = "checksums"


#: What `damaged` names if the checksum of the whole set alone is wrong.
SET = "the list of tensors"


class Checksums(NamedTuple):
    """What safetensors files say about what they and config.json should hold.

    Attributes
    ----------
    tensors : dict of str to str
        `entry_digest` of each tensor: version 2 of the format alone.
    tags : set of bytes
        `tag` of each tensor: from version 3 on.
    config : str
        `json_digest` of config.json.
    whole : str or None
        `set_digest` of the checkpoint, which is the same in all of its files: from version 3 on.
    """

    tensors: dict[str, str]
    tags: set[bytes]
    config: str
    whole: str | None

    def are_right_for(self, name: str, digest: str | None) -> bool:
        """Check that a tensor of this name and `entry_digest` was saved; None stands for a missing tensor."""
        if self.whole is None:
            return self.tensors.get(name) == digest
        return digest is not None and tag(name, digest) in self.tags


def is_checkpoint(path: Path) -> bool:
    """Whether a directory's config.json says that it is a LittleBit checkpoint."""
    try:
        return read_json(path, "config.json")["quantization_config"]["quant_method"] == "littlebit"
    except (ValueError, KeyError, TypeError):
        return False


def is_official(path: Path) -> bool:
    """Whether a folder holds a checkpoint of the authors' repository (see official.py)."""
    return (path / OFFICIAL).is_file()


def foreign_method(config: Mapping[str, Any]) -> str | None:
    """Name the method by which others quantised a model; None for a dense or a packed one.

    Parameters
    ----------
    config : mapping
        config.json. Methods leave a section in it, or in its part for the text model.

    Examples
    --------
    >>> foreign_method({"quantization_config": {"quant_method": "gptq", "bits": 4}})
    'gptq'
    >>> foreign_method({"quantization_config": {"load_in_4bit": True}})
    'bitsandbytes'
    """
    parts = [config, *(part for part in config.values() if isinstance(part, dict))]
    for key, usual in SECTIONS.items():
        for section in (part[key] for part in parts if part.get(key)):
            if not isinstance(section, dict):
                return usual
            method = section.get("quant_method") or section.get("quant_algo")
            if not method and (section.get("load_in_4bit") or section.get("load_in_8bit")):
                return "bitsandbytes"
            if method != "littlebit":
                return str(method or usual)
    return None


def foreign_files(folder: Path) -> str | None:
    """Name the method by which others quantised a folder's model, by the files that only it leaves."""
    return next((method for name, method in FOREIGN_FILES.items() if (folder / name).is_file()), None)


def read_config(path: Path) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """config.json and its entries for the packed layers, checked."""
    config = read_json(path, "config.json")
    return config, read_layers(config.get("quantization_config"), path / "config.json")


def read_layers(described: Any, where: Path | str) -> dict[str, dict[str, Any]]:
    """The packed layers that a `quantization_config` describes, checked."""
    if described is None:
        raise CheckpointError(
            f"{where} describes a dense model, not a packed checkpoint: make one with littlebit quantize MODEL OUT"
        )
    try:
        if described["quant_method"] != "littlebit":
            raise CheckpointError(
                f"{where}: quant_method is {described['quant_method']!r}, not 'littlebit': others quantised this model"
            )
        version, layers = described["format_version"], described["layers"]
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{where} is not the configuration of a LittleBit checkpoint: {error!r}") from error
    if type(version) is not int or version not in FORMATS:
        known = ", ".join(map(str, FORMATS))
        raise CheckpointError(
            f"{where}: format_version is {version!r}, but this version of littlebit reads {known}; update it"
        )
    check_bits(described.get("bits"), "bits", where)
    if not isinstance(layers, dict) or not layers:
        raise CheckpointError(f"{where}: 'layers' must name at least one layer")
    for name, entry in layers.items():
        check_entry(where, name, entry)
    return layers


def check_bits(bits: Any, name: str, where: Path | str) -> None:
    """Raise CheckpointError unless a target is none, or a positive number."""
    if bits is not None and (type(bits) not in (int, float) or not 0 < bits < math.inf):
        raise CheckpointError(f"{where}: {name!r} is {bits!r}, which is no number of bits")


def check_entry(file: Path | str, name: str, entry: Any) -> None:
    """Raise CheckpointError unless a layer's entry holds positive sizes, feasible ranks and a flag for the bias."""

    def whole(value: Any, most: float = float("inf")) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= most

    good = isinstance(entry, dict) and set(entry) == {"d_out", "d_in", "ranks", "bias"}
    good = good and whole(entry["d_out"]) and whole(entry["d_in"]) and isinstance(entry["bias"], bool)
    good = good and isinstance(entry["ranks"], list) and len(entry["ranks"]) > 0
    if not good or not all(whole(rank, min(entry["d_out"], entry["d_in"])) for rank in entry["ranks"]):
        raise CheckpointError(f"{file}: layer {name} has the entry {entry!r}, which describes no layer")


def read_headers(files: Sequence[Path]) -> dict[str, Header]:
    """Shape and dtype of every tensor in some safetensors files; the tensors themselves are not read.

    Raises
    ------
    CheckpointError
        If a file is damaged, or two hold tensors of one name.
    """
    headers: dict[str, Header] = {}
    for file in files:
        with readable(file):
            check_size(file)
            with safe_open(file, framework="numpy") as opened:
                for name in opened.keys():  # noqa: SIM118 (not a dict)
                    part = opened.get_slice(name)
                    header = Header(tuple(part.get_shape()), part.get_dtype())
                    check_header(name, header, headers)
                    headers[name] = header
    return headers


def check_size(file: Path) -> None:
    """Raise ValueError if the header that a safetensors file begins with is too large to be parsed."""
    with file.open("rb") as opened:
        claimed = int.from_bytes(opened.read(8), "little")
    if claimed > JSON_BYTES:
        raise ValueError(f"it claims a header of {claimed:,} bytes")


def check_header(name: str, header: Header, seen: Mapping[str, Header]) -> None:
    """Raise ValueError unless a tensor's dtype is one that is read, its sizes are sane, and its name is new.

    An empty tensor may claim any other size, and be in a file of any length; torch would overflow.
    """
    if header.dtype not in ITEM_BYTES:
        raise ValueError(f"tensor {name} has the dtype {header.dtype}, which is not read here")
    if math.prod(max(size, 1) for size in header.shape) > MOST_ENTRIES:
        raise ValueError(f"tensor {name} claims the sizes {list(header.shape)[:4]}")
    if name in seen:
        raise ValueError(f"another file holds a tensor {name} too")


def weight_files(path: Path) -> list[Path]:
    """The safetensors files of a checkpoint: one, or the shards that its index lists.

    Raises
    ------
    CheckpointError
        If one is missing, or lies elsewhere.
    """
    if not (path / INDEX).exists():
        return [inside(path, WEIGHTS)]
    try:
        names = sorted(set(read_json(path, INDEX)["weight_map"].values()))
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path / INDEX} is damaged ({error!r}); copy or download it again") from error
    if not names or not all(isinstance(name, str) for name in names):
        raise CheckpointError(f"{path / INDEX} must name files beside it, not {names[:3]}")
    return [inside(path, name) for name in names]


def places(file: Path) -> dict[str, tuple[int, int]]:
    """Where in a safetensors file, whose header was read before, the bytes of each tensor begin and end."""
    with file.open("rb") as opened:
        size = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(size))
    header.pop("__metadata__", None)
    return {name: tuple(8 + size + at for at in entry["data_offsets"]) for name, entry in header.items()}


def check_contents(
    files: Sequence[Path], headers: Mapping[str, Header], version: int, config: Mapping[str, Any] | None = None
) -> None:
    """Raise CheckpointError unless files hold what was saved, by the checksums of their format's version.

    Parameters
    ----------
    files, headers
        Safetensors files, and what `read_headers` found in them.
    version : int
        `format_version`; one without checksums has nothing to compare.
    config : mapping, optional
        config.json.
    """
    if wrong := damaged(files, headers, version, config):
        raise damage(files[0].parent, wrong)


def damage(path: Path, wrong: Sequence[str]) -> CheckpointError:
    """The error for tensors, or config.json, that are not what was saved."""
    more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
    return CheckpointError(
        f"{path} is damaged: {', '.join(wrong[:3])}{more} changed since it was saved, by the SHA-256 checksums; copy "
        "it again or, if it was changed on purpose, load it with verify=False and save it again"
    )


def damaged(
    files: Sequence[Path], headers: Mapping[str, Header], version: int, config: Mapping[str, Any] | None = None
) -> list[str]:
    """Name the tensors that are not what was saved; see `check_contents`.

    config.json is among them if it changed, and `SET` if the set of tensors changed and no tensor can be named: one is
    missing. The files are read, not mapped, so that what is only compared does not stay in memory.

    Raises
    ------
    CheckpointError
        If there are no checksums of the format's version, or the files come from several checkpoints.
    """
    checksums = read_checksums(files)
    bound = checksums is not None and checksums.whole is not None
    if not {WITHOUT_CHECKSUMS: True, WITHOUT_SET: checksums is not None}.get(version, bound):
        raise CheckpointError(f"{files[0]}: the checksums that format {version} has are missing; copy the files again")
    if checksums is None:
        return []
    found = {}
    for file in files:
        with readable(file):
            found |= file_digests(file, headers)
    wrong = [name for name in {**checksums.tensors, **found} if not checksums.are_right_for(name, found.get(name))]
    if config is not None and json_digest(config) != checksums.config:
        wrong.append("config.json")
    if not wrong and bound and set_digest(found, checksums.config) != checksums.whole:
        wrong.append(SET)
    return wrong


def file_digests(file: Path, headers: Mapping[str, Header]) -> dict[str, str]:
    """`entry_digest` of each tensor of a safetensors file."""
    found = {}
    with file.open("rb", buffering=0) as opened:
        for name, (first, last) in places(file).items():
            opened.seek(first)
            found[name] = entry_digest(headers[name].dtype, headers[name].shape, pieces(opened, last - first))
    return found


def pieces(opened: Any, left: int) -> Iterator[bytes]:
    """The next bytes of a file, a piece at a time."""
    while left:
        piece = opened.read(min(left, 1 << 20))
        if not piece:
            raise ValueError("it is shorter than its header says")
        left -= len(piece)
        yield piece


def read_checksums(files: Sequence[Path]) -> Checksums | None:
    """Read the checksums of some safetensors files; None if no file has any.

    Raises
    ------
    CheckpointError
        If a file's checksums are damaged, are missing from one file alone, or belong to another checkpoint.
    """
    found = [file_checksums(file) for file in files]
    if found == [None] * len(files):
        return None
    first = found[0]
    for file, checksums in zip(files, found, strict=True):
        if checksums is None or first is None:
            raise CheckpointError(
                f"{file.parent}: some files have no checksums; copy all files of the checkpoint again"
            )
        if (checksums.config, checksums.whole) != (first.config, first.whole):
            raise CheckpointError(
                f"{file} and {files[0].name} were not saved together: their checksums belong to two checkpoints; copy "
                "all files again from one of them"
            )
    known = [checksums for checksums in found if checksums is not None]
    tensors = {name: digest for checksums in known for name, digest in checksums.tensors.items()}
    return known[0]._replace(tensors=tensors, tags=set().union(*(checksums.tags for checksums in known)))


def file_checksums(file: Path) -> Checksums | None:
    """Read the checksums of one safetensors file; None if it has none."""
    with readable(file):
        check_size(file)
        with safe_open(file, framework="numpy") as opened:
            text = (opened.metadata() or {}).get(CHECKSUMS)
        return None if text is None else parsed_checksums(checked_json(text.encode("utf-8")))


def parsed_checksums(described: Mapping[str, Any]) -> Checksums:
    """Read the checksums in a file's metadata; ValueError unless they are in the form of one of the versions."""
    keys, tensors = set(described), described.get("tensors")
    good = all(isinstance(described[key], str) for key in keys - {"tensors"})
    if good and keys == {"tensors", "config"} and isinstance(tensors, dict):
        if all(isinstance(each, str) for each in tensors.values()):
            return Checksums(tensors, set(), described["config"], None)
    elif good and keys == {"tensors", "config", "set"} and isinstance(tensors, str):
        data = base64.b64decode(tensors, validate=True)
        if len(data) % TAG_BYTES == 0:
            tags = {data[at : at + TAG_BYTES] for at in range(0, len(data), TAG_BYTES)}
            return Checksums({}, tags, described["config"], described["set"])
    raise ValueError(
        f"its checksums must be strings: 'config', 'set' and, {TAG_BYTES} bytes a tensor in base64 as 'tensors'; found "
        f"the keys {sorted(described)[:4]}"
    )


def make_checksums(shards: Sequence[Mapping[str, str]], config: Mapping[str, Any]) -> list[dict[str, str]]:
    """Make the metadata of a checkpoint's safetensors files, in the form of the newest version.

    Parameters
    ----------
    shards : sequence of mappings
        For each file `entry_digest` of its tensors by name.
    config : mapping
        What config.json will hold.

    Returns
    -------
    One mapping for each file: `CHECKSUMS` to JSON.
    """
    settings = json_digest(json.loads(json.dumps(config)))  # keys are strings in the file
    whole = set_digest({name: digest for shard in shards for name, digest in shard.items()}, settings)
    made = []
    for shard in shards:
        tags = b"".join(sorted(tag(name, digest) for name, digest in shard.items()))
        described = {"config": settings, "set": whole, "tensors": base64.b64encode(tags).decode()}
        made.append({CHECKSUMS: json.dumps(described)})
    return made


def check_layers(layers: Mapping[str, dict[str, Any]], headers: Mapping[str, Header]) -> None:
    """Raise CheckpointError unless every packed layer has its tensors, in the right shapes and dtypes."""
    for layer, name, wanted in packed_tensors(layers):
        if name not in headers:
            raise CheckpointError(f"layer {layer}: tensor {name} is missing from the checkpoint")
        found = headers[name]
        if found != wanted:
            raise CheckpointError(
                f"layer {layer}: tensor {name} is {found.shape} {found.dtype}, but config.json asks for "
                f"{wanted.shape} {wanted.dtype}; it is damaged, or another version of littlebit wrote it: quantise the "
                "model again"
            )


def packed_tensors(layers: Mapping[str, dict[str, Any]]) -> Iterator[tuple[str, str, Header]]:
    """(layer, tensor name, shape and dtype) of every tensor that the packed layers store, biases excepted."""
    for layer, entry in layers.items():
        for order, rank in enumerate(entry["ranks"]):
            for kind, header in packed_headers(entry["d_out"], entry["d_in"], rank).items():
                yield layer, f"{layer}.paths.{order}.{kind}", header


def check_path(place: str, arrays: Mapping[str, np.ndarray]) -> None:
    """Raise CheckpointError if a scale of a packed path is not finite, or a pad bit of its words is set.

    Parameters
    ----------
    place : str
        What the names of the path's tensors begin with: LAYER.paths.K.
    arrays : mapping
        Those tensors, as `packed_headers` describes them.
    """
    signs = {"u_words": len(arrays["ell"]), "v_words": len(arrays["g"])}
    for kind, array in arrays.items():
        wrong = None
        if kind in signs:
            wrong = "a pad bit is set" if has_pad_bits(array, signs[kind]) else None
        elif not np.isfinite(array).all():
            wrong = "there is NaN or infinity"
        if wrong:
            raise CheckpointError(f"tensor {place}.{kind} is damaged ({wrong}); copy the file again")


def has_pad_bits(words: np.ndarray, count: int) -> bool:
    """Whether a bit is set behind the last of `count` signs in a row of words."""
    width = 8 * words.itemsize
    used = count - (words.shape[-1] - 1) * width  # bits of the last word
    last = words.view(f"u{words.itemsize}")[..., -1]
    return used < width and bool((last >> last.dtype.type(used)).any())


def check_embeddings(described: Any, size: int, where: Path | str) -> None:
    """Raise CheckpointError unless `embeddings` of a section describes tables with rows of `size` entries."""
    if not isinstance(described, dict) or described.get("bits") not in (8, 4) or described.get("group") not in (32, 64):
        raise CheckpointError(f"{where}: 'embeddings' is {described!r}, which describes no embedding")
    if size % described["group"]:
        raise CheckpointError(f"{where}: groups of {described['group']} do not divide rows of {size}")
