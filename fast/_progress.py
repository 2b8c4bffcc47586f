"""Progress bars that suit where they are shown: drawn over and over on a terminal, a line now and then in a log."""

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import tqdm as library

LOG_SECONDS = 30.0  # between lines in a log


def can_redraw(file: Any) -> bool:
    """Whether what is shown in a file can be drawn over: on a terminal, and in a notebook, which says it is none."""
    return bool(getattr(file, "isatty", bool)()) or "ipykernel" in sys.modules


class Bar(library.tqdm):
    """tqdm's bar; where it cannot be drawn over it is a line every LOG_SECONDS, and one at the end."""

    def __init__(self, *args: Any, **options: Any):
        if not can_redraw(options.get("file") or sys.stderr):
            options = {"mininterval": LOG_SECONDS, "maxinterval": LOG_SECONDS, "ascii": True, "ncols": 100} | options
        super().__init__(*args, **options)

    @staticmethod
    def status_printer(file: Any) -> Callable[[str], None]:
        """What shows a state of the bar in a file."""
        if can_redraw(file):
            return library.tqdm.status_printer(file)

        shown = []

        def line(text: str) -> None:  # a bar that is closed ends its last line itself
            if text.strip():
                file.write("\n" * len(shown[:1]) + text.strip())
                file.flush()
                shown.append(text)

        return line


if TYPE_CHECKING:  # what a bar runs over keeps its type
    tqdm = library.tqdm
else:
    tqdm = Bar
