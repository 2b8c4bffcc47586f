"""What is kept of a training run, so that it can go on after anything: its state and its log.

A folder holds `step-N/` for the last two saved states, each a directory with state.safetensors and run.json, written
under a temporary name and renamed, and log.jsonl. A state that is damaged is passed over for the one before it.
"""

import contextlib
import json
import shutil
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from .._checks import LittleBitWarning, check_number
from ..files.atomic import atomic_directory, lock_directory, unlock
from ..files.digests import file_digest, json_digest

STATE, RUN, LOG = "state.safetensors", "run.json", "log.jsonl"
KEPT = 2  # states


class Keeper:
    """Keeps the state and the log of a training run in a folder.

    Parameters
    ----------
    folder : str or Path
        Made if it does not exist.
    minutes : float
        Time between states.
    run : dict, optional
        What identifies the run beside its training settings: the model and how it was quantised, say.
    """

    def __init__(self, folder: str | Path, minutes: float = 5.0, run: dict[str, Any] | None = None):
        check_number("minutes", minutes, low=0)
        self.folder, self.minutes, self.run = Path(folder).absolute(), minutes, dict(run or {})
        self.folder.mkdir(parents=True, exist_ok=True)
        self.saved = time.monotonic()

    def check(self, run: dict[str, Any]) -> None:
        """Note what else identifies the run, or raise ValueError if the folder holds states of another."""
        self.run = json.loads(json.dumps(self.run | run))
        for path in self.states():
            before = described(path).get("run")
            if before is not None and before != self.run:
                keys = sorted(key for key in {*before, *self.run} if before.get(key) != self.run.get(key))
                raise ValueError(
                    f"{self.folder} holds the state of another run, which differs in {', '.join(keys)}: give the same "
                    "settings to go on with it, or delete the folder to begin anew"
                )

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """While active, no other process trains with the states of this folder.

        Raises
        ------
        OSError
            If another does already.
        """
        try:
            lock = lock_directory(self.folder)
        except BlockingIOError as error:
            raise OSError(
                f"another process is training with {self.folder}: wait for it to end, or choose another output"
            ) from error
        try:
            yield
        finally:
            unlock(lock)

    def states(self) -> list[Path]:
        """Directories of the saved states, newest first."""
        found = [path for path in self.folder.glob("step-*") if path.is_dir()]
        return sorted(found, key=lambda path: int(path.name.split("-")[1]), reverse=True)

    def is_time(self) -> bool:
        """Whether a state should be saved again."""
        return time.monotonic() - self.saved >= 60 * self.minutes

    def save(self, step: int, tensors: dict[str, Tensor]) -> None:
        """Save a state; if there is no room for it, warn and keep the one before."""
        self.saved = time.monotonic()
        path = self.folder / f"step-{step}"
        if path.exists():
            return
        try:
            with atomic_directory(path) as part:
                save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, part / STATE)
                description = {"run": self.run, "step": step, "sha256": file_digest(part / STATE)}
                (part / RUN).write_text(
                    json.dumps(description | {"check": json_digest(description)}, indent=1) + "\n", encoding="utf-8"
                )
        except OSError as error:
            warnings.warn(
                f"the state of step {step} was not saved, the one before it stays: {error}",
                LittleBitWarning,
                stacklevel=1,
            )
            return
        for old in self.states()[KEPT:]:
            shutil.rmtree(old, ignore_errors=True)

    def newest(self) -> Path | None:
        """The newest state that is whole, or None; newer ones are damaged, named in a warning and removed."""
        for path in self.states():
            try:
                if described(path).get("sha256") == file_digest(path / STATE):
                    return path
                error = "its checksum is wrong"
            except OSError as missing:
                error = str(missing)
            warnings.warn(
                f"{path} is damaged and passed over ({error}); going on from before it", LittleBitWarning, stacklevel=1
            )
            shutil.rmtree(path, ignore_errors=True)
        return None

    def last(self) -> tuple[int, dict[str, Tensor], list[dict[str, float]]] | None:
        """Step, tensors and log of the newest state that is whole, or None."""
        path = self.newest()
        if path is None:
            return None
        step = described(path)["step"]
        return step, load_file(path / STATE), self.entries(step)

    def log(self, entry: dict[str, float]) -> None:
        """Add an entry to the log."""
        with (self.folder / LOG).open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")

    def entries(self, step: int) -> list[dict[str, float]]:
        """The log's entries up to a step; what comes after it will be done again."""
        path, entries = self.folder / LOG, []
        for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
            try:
                entries.append(json.loads(line))
            except ValueError:  # the last line of a process that was killed
                break
        return [entry for entry in entries if entry["step"] <= step]

    def begin(self, entries: list[dict[str, float]]) -> None:
        """Begin with these entries of the log, and without what processes that were killed left unfinished."""
        for left in self.folder.glob(".step-*"):
            shutil.rmtree(left, ignore_errors=True)
        part = self.folder / f"{LOG}.part"
        part.write_text("".join(json.dumps(entry) + "\n" for entry in entries), encoding="utf-8")
        part.replace(self.folder / LOG)


def described(path: Path) -> dict[str, Any]:
    """What run.json says of a saved state; nothing if it is damaged."""
    try:
        description = json.loads((path / RUN).read_text(encoding="utf-8"))
        check = description.pop("check")
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return {}
    return description if check == json_digest(description) else {}
