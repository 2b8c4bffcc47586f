r"""Write and compare the SHA-256 checksums of packed checkpoints.

Version 1 of the format has no checksums. From version 2 on, the metadata of each safetensors file holds JSON under the
key `checksums`. Digests are in hexadecimal, in lower case:

    digest(tensor) = hex(SHA-256(dtype + " " + shape + "\n" + the tensor's bytes in the file))
                     dtype as in the safetensors header, such as I32; shape as in [1536, 18]
    json(value)    = JSON with sorted keys, separators ", " and ": ", \u escapes for all non-ASCII characters, and
                     numbers as Python's json module writes them
    config         = hex(SHA-256(json(content of config.json)))

Version 2 stores, with the digests of the file's own tensors,

    {"config": config, "tensors": {name: digest, ...}}

Version 3 stores {"config": config, "set": set, "tensors": tags} with

    set  = hex(SHA-256(json({"config": config, "tensors": {name: digest, ...}})))    over the tensors of all files
    tag  = the first 8 bytes of SHA-256(name + " " + digest)
    tags = base64 of the tags of the file's own tensors, in ascending order

Since `set` covers the whole checkpoint, files of two checkpoints cannot be mixed. The tags, 11 characters a tensor, say
which tensor changed.
"""

import base64
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import safe_open

from ..files.digests import TAG_BYTES, checkpoint_digest, digest_tag, json_digest, tensor_digest
from ..files.untrusted import CheckpointError, open_errors, parse_json_object
from ..models.packed_shapes import Header
from .format import NO_CHECKSUMS, PER_TENSOR_CHECKSUMS, byte_ranges, check_size

#: The key of a safetensors file's metadata that holds its checksums.
CHECKSUMS = "checksums"

#: What `corrupt_tensors` names if every tensor is right but the set of tensors is not.
SET = "the list of tensors"


class Checksums(NamedTuple):
    """Hold the checksums that safetensors files store about themselves and config.json.

    Attributes
    ----------
    tensors : dict of str to str
        `tensor_digest` of each tensor, in version 2; else empty.
    tags : set of bytes
        `digest_tag` of each tensor, in version 3; else empty.
    config : str
        `json_digest` of config.json.
    checkpoint : str or None
        `checkpoint_digest` of the whole checkpoint, the same in all of its files, in version 3; else None.
    """

    tensors: dict[str, str]
    tags: set[bytes]
    config: str
    checkpoint: str | None

    def match(self, name: str, digest: str | None) -> bool:
        """Tell whether a tensor of this name was saved with this `tensor_digest`; None means it is missing now."""
        if self.checkpoint is None:
            return self.tensors.get(name) == digest
        return digest is not None and digest_tag(name, digest) in self.tags


def make_checksums(shards: Sequence[Mapping[str, str]], config: Mapping[str, Any]) -> list[dict[str, str]]:
    """Make the checksums of a checkpoint's safetensors files, in the newest version.

    Parameters
    ----------
    shards : sequence of mappings
        For each file the `tensor_digest` of its tensors, by name.
    config : mapping
        Content of config.json.

    Returns
    -------
    list of dict
        For each file the metadata to store: {CHECKSUMS: JSON}.
    """
    settings = json_digest(json.loads(json.dumps(config)))  # JSON turns keys that are numbers into strings
    whole = checkpoint_digest({name: digest for shard in shards for name, digest in shard.items()}, settings)
    made = []
    for shard in shards:
        tags = b"".join(sorted(digest_tag(name, digest) for name, digest in shard.items()))
        described = {"config": settings, "set": whole, "tensors": base64.b64encode(tags).decode()}
        made.append({CHECKSUMS: json.dumps(described)})
    return made


def read_checksums(files: Sequence[Path]) -> Checksums | None:
    """Read the checksums of a checkpoint's safetensors files; return None if no file has checksums.

    Raises
    ------
    CheckpointError
        If the checksums of a file are malformed, missing from this file only, or of another checkpoint.
    """
    found = [read_file_checksums(file) for file in files]
    if found == [None] * len(files):
        return None
    first = found[0]
    for file, checksums in zip(files, found, strict=True):
        if checksums is None or first is None:
            raise CheckpointError(
                f"{file.parent}: some files have no checksums; copy all files of the checkpoint again"
            )
        if (checksums.config, checksums.checkpoint) != (first.config, first.checkpoint):
            raise CheckpointError(
                f"{file} and {files[0].name} were not saved together: their checksums belong to two checkpoints; copy "
                "all files again from one of them"
            )
    known = [checksums for checksums in found if checksums is not None]
    tensors = {name: digest for checksums in known for name, digest in checksums.tensors.items()}
    return known[0]._replace(tensors=tensors, tags=set().union(*(checksums.tags for checksums in known)))


def read_file_checksums(file: Path) -> Checksums | None:
    """Read the checksums of one safetensors file; return None if it has none."""
    with open_errors(file):
        check_size(file)
        with safe_open(file, framework="numpy") as opened:
            text = (opened.metadata() or {}).get(CHECKSUMS)
        return None if text is None else parse_checksums(parse_json_object(text.encode("utf-8")))


def parse_checksums(described: Mapping[str, Any]) -> Checksums:
    """Parse the JSON object of a file's checksums; raise ValueError unless it has the form of version 2 or 3."""
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
        f"its checksums must hold the strings 'config', 'set' and 'tensors' (base64, {TAG_BYTES} bytes a tensor), got "
        f"the keys {sorted(described)[:4]}"
    )


def check_contents(
    files: Sequence[Path], headers: Mapping[str, Header], version: int, config: Mapping[str, Any] | None = None
) -> None:
    """Raise CheckpointError unless every tensor, and config.json, matches its checksum.

    Parameters
    ----------
    files : sequence of Path
        All safetensors files of the checkpoint.
    headers : mapping of str to Header
        From `read_headers`.
    version : int
        `format_version`. Version 1 has no checksums to compare.
    config : mapping, optional
        Content of config.json, to be compared too.
    """
    if wrong := corrupt_tensors(files, headers, version, config):
        raise corrupt_error(files[0].parent, wrong)


def corrupt_error(path: Path, wrong: Sequence[str]) -> CheckpointError:
    """Make the error for tensors, or config.json, that changed since they were saved."""
    more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
    return CheckpointError(
        f"{path} is damaged: {', '.join(wrong[:3])}{more} changed since it was saved (SHA-256 checksums); copy it "
        "again or, if the change was on purpose, load it with verify=False and save it again"
    )


def corrupt_tensors(
    files: Sequence[Path], headers: Mapping[str, Header], version: int, config: Mapping[str, Any] | None = None
) -> list[str]:
    """List the tensors that changed since they were saved; takes the arguments of `check_contents`.

    The list has "config.json" if that changed, and `SET` if a tensor is missing, whose name nobody knows. The files are
    read, not memory-mapped, so that they do not stay in memory.

    Raises
    ------
    CheckpointError
        If the checksums that the version requires are missing, or the files come from different checkpoints.
    """
    checksums = read_checksums(files)
    bound = checksums is not None and checksums.checkpoint is not None
    if not {NO_CHECKSUMS: True, PER_TENSOR_CHECKSUMS: checksums is not None}.get(version, bound):
        raise CheckpointError(
            f"{files[0]} must hold checksums, as its format_version is {version}, but has none of that version; copy "
            "all files again"
        )
    if checksums is None:
        return []
    found = {}
    for file in files:
        with open_errors(file):
            found |= file_digests(file, headers)
    wrong = [name for name in {**checksums.tensors, **found} if not checksums.match(name, found.get(name))]
    if config is not None and json_digest(config) != checksums.config:
        wrong.append("config.json")
    if not wrong and bound and checkpoint_digest(found, checksums.config) != checksums.checkpoint:
        wrong.append(SET)
    return wrong


def file_digests(file: Path, headers: Mapping[str, Header]) -> dict[str, str]:
    """Compute the `tensor_digest` of each tensor in a safetensors file."""
    found = {}
    with file.open("rb", buffering=0) as opened:
        for name, (first, last) in byte_ranges(file).items():
            opened.seek(first)
            found[name] = tensor_digest(headers[name].dtype, headers[name].shape, read_chunks(opened, last - first))
    return found


def read_chunks(opened: Any, left: int) -> Iterator[bytes]:
    """Yield the next `left` bytes of a file, at most 1 MiB at a time."""
    while left:
        piece = opened.read(min(left, 1 << 20))
        if not piece:
            raise ValueError("it is shorter than its header says")
        left -= len(piece)
        yield piece
