"""Save the state and the log of a training run, so that it can resume after any interruption.

A folder holds `step-N/` for the last two saved states, and log.jsonl. Each state is a directory with state.safetensors
and run.json. It is written under a temporary name and then renamed. Where a state is corrupt, the run resumes from the
one before.
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
from .config import with_new_names

STATE, RUN, LOG = "state.safetensors", "run.json", "log.jsonl"
KEPT_STATES = 2


class Checkpointer:
    """Save the state and the log of a training run in a folder.

    Parameters
    ----------
    folder : str or Path
        Made if it does not exist.
    minutes : float
        Time between states.
    run : dict, optional
        JSON values that identify the run beside its training settings, such as the model and how it was quantized.
    """

    def __init__(self, folder: str | Path, minutes: float = 5.0, run: dict[str, Any] | None = None):
        check_number("minutes", minutes, low=0)
        self.folder, self.minutes, self.run = Path(folder).absolute(), minutes, dict(run or {})
        self.folder.mkdir(parents=True, exist_ok=True)
        self.saved = time.monotonic()

    def check_run(self, run: dict[str, Any]) -> None:
        """Record what else identifies the run, and check that the saved states belong to it.

        Raises
        ------
        ValueError
            If the folder holds a state of another run. The message names the settings that differ.
        """
        self.run = json.loads(json.dumps(self.run | run))
        wanted = with_new_names(self.run)
        for path in self.states():
            saved = read_description(path).get("run")
            if saved is None:
                continue
            saved = with_new_names(saved)
            differing = sorted(key for key in {*saved, *wanted} if saved.get(key) != wanted.get(key))
            if differing:
                raise ValueError(
                    f"{self.folder} holds the state of another run, which differs in {', '.join(differing)}: give the "
                    "same settings to resume it, or delete the folder to start anew"
                )

    @contextlib.contextmanager
    def exclusive(self) -> Iterator[None]:
        """Lock the folder against other processes, while the context is active.

        Raises
        ------
        OSError
            If another process has locked it.
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
        """List the directories of the saved states, newest first."""
        found = [path for path in self.folder.glob("step-*") if path.is_dir()]
        return sorted(found, key=lambda path: int(path.name.split("-")[1]), reverse=True)

    def is_due(self) -> bool:
        """Tell whether the time between states has passed."""
        return time.monotonic() - self.saved >= 60 * self.minutes

    def save(self, step: int, tensors: dict[str, Tensor]) -> None:
        """Save a state, and delete all but the newest ones; on a full disk, warn and keep the state before."""
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
                f"the state of step {step} was not saved; the state before it is kept: {error}",
                LittleBitWarning,
                stacklevel=1,
            )
            return
        for old in self.states()[KEPT_STATES:]:
            shutil.rmtree(old, ignore_errors=True)

    def newest(self) -> Path | None:
        """Find the newest intact state; remove newer corrupt ones with a warning.

        Returns
        -------
        Its directory, or None if there is no intact state.
        """
        for path in self.states():
            try:
                if read_description(path).get("sha256") == file_digest(path / STATE):
                    return path
                error = "its checksum is wrong"
            except OSError as missing:
                error = str(missing)
            warnings.warn(
                f"{path} is corrupt ({error}) and was removed; training resumes from the state before it",
                LittleBitWarning,
                stacklevel=1,
            )
            shutil.rmtree(path, ignore_errors=True)
        return None

    def load(self) -> tuple[int, dict[str, Tensor], list[dict[str, float]]] | None:
        """Load step, tensors and log of the newest intact state; return None without such a state."""
        path = self.newest()
        if path is None:
            return None
        step = read_description(path)["step"]
        return step, load_file(path / STATE), self.read_log(step)

    def append_log(self, entry: dict[str, float]) -> None:
        """Append an entry to the log."""
        with (self.folder / LOG).open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")

    def read_log(self, step: int) -> list[dict[str, float]]:
        """Read the log's entries up to a step; the run will repeat the steps after it."""
        path, entries = self.folder / LOG, []
        for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
            try:
                entries.append(json.loads(line))
            except ValueError:  # A killed process may leave an incomplete last line.
                break
        return [entry for entry in entries if entry["step"] <= step]

    def start_log(self, entries: list[dict[str, float]]) -> None:
        """Replace the log by these entries, and remove the unfinished states of killed processes."""
        for left in self.folder.glob(".step-*"):
            shutil.rmtree(left, ignore_errors=True)
        part = self.folder / f"{LOG}.part"
        part.write_text("".join(json.dumps(entry) + "\n" for entry in entries), encoding="utf-8")
        part.replace(self.folder / LOG)


def read_description(path: Path) -> dict[str, Any]:
    """Read run.json of a saved state; an empty dict if it is missing or corrupt."""
    try:
        description = json.loads((path / RUN).read_text(encoding="utf-8"))
        check = description.pop("check")
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return {}
    return description if check == json_digest(description) else {}
