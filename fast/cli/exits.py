"""Turn interruptions and errors into exit codes and one line on standard error."""

import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from typing import Any

USER_ERROR = 2
INTERRUPTED, CLOSED_PIPE, STOPPED = 130, 141, 143  # 128 + the number of SIGINT, SIGPIPE and SIGTERM
EXIT_CODES = """exit codes:
  0    done
  1    a bug in littlebit, with a traceback; please report it
  2    the command could not do it; the message says why, and what to do
  130  stopped by Ctrl-C; no unfinished output is left
  141  the reader of the output closed it, as `head` does
  143  stopped by a signal; no unfinished output is left. If `train` saved its state, the same command continues
"""


class Terminated(BaseException):
    """SIGTERM as an exception, so that `finally` blocks remove unfinished output."""


def report_error(error: Exception) -> int:
    """Print why the command could not do its work, in one line on standard error; return the exit code."""
    print(f"littlebit: error: {' '.join(str(error).splitlines())}", file=sys.stderr)
    return USER_ERROR


@contextlib.contextmanager
def sigterm_raises() -> Iterator[None]:
    """Raise `Terminated` on SIGTERM while the block runs."""

    def stop(number: int, frame: Any) -> None:
        raise Terminated

    try:
        before = signal.signal(signal.SIGTERM, stop)
    except ValueError:  # Only the main thread may set a handler.
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)  # None means a handler that Python did not set


def discard_output() -> None:
    """Redirect standard output to the null device, because its reader is gone."""
    with contextlib.suppress(OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)
