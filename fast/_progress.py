"""Show progress: a bar that is redrawn on terminals and in notebooks, and occasional lines in log files."""

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import tqdm as library

LOG_SECONDS = 30.0  # between lines in a log


def can_redraw(file: Any) -> bool:
    """Tell whether output to a file can be redrawn, as on a terminal or in a notebook."""
    return bool(getattr(file, "isatty", bool)()) or "ipykernel" in sys.modules


class Bar(library.tqdm):
    """Draw tqdm's bar, or print a line every LOG_SECONDS and one at the end where it cannot be redrawn."""

    def __init__(self, *args: Any, **options: Any):
        if not can_redraw(options.get("file") or sys.stderr):
            options = {"mininterval": LOG_SECONDS, "maxinterval": LOG_SECONDS, "ascii": True, "ncols": 100} | options
        super().__init__(*args, **options)

    @staticmethod
    def status_printer(file: Any) -> Callable[[str], None]:
        """Return the function that prints a state of the bar to a file."""
        if can_redraw(file):
            return library.tqdm.status_printer(file)

        printed = []

        def print_line(text: str) -> None:  # without a newline at the end: tqdm adds it when the bar closes
            if text.strip():
                file.write("\n" * len(printed[:1]) + text.strip())
                file.flush()
                printed.append(text)

        return print_line


if TYPE_CHECKING:  # keeps the type of what a bar iterates over
    tqdm = library.tqdm
else:
    tqdm = Bar
