"""Ctrl-C while the command line is still being imported: one line and exit code 130, as at any later moment.

Nothing happens where the package is imported by another program.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from pathlib import PurePath
from types import FrameType

__all__ = ["INTERRUPTED", "is_command", "leave_quietly_on_interrupt"]

INTERRUPTED = 130  # what shells give a process that SIGINT has ended


def is_command() -> bool:
    """Whether this process was started as ``tensortrain`` or ``python -m tensortrain``."""
    path = PurePath(sys.argv[0] if sys.argv else "")
    if path.name == "-m":  # while python -m still looks for the module
        given = sys.orig_argv
        return "-m" in given and given[given.index("-m") + 1 :][:1] == ["tensortrain"]
    return path.stem == "tensortrain" or path.parts[-2:] == ("tensortrain", "__main__.py")


def leave_quietly_on_interrupt() -> None:
    """End the process at once on Ctrl-C, unless somebody else handles or ignores it.

    An exception would not do: extension modules turn it into another one while they are imported, and the
    interpreter prints those of its last moments.
    """
    with contextlib.suppress(ValueError):  # not in the main thread
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, _leave)


def _leave(number: int, frame: FrameType | None) -> None:
    with contextlib.suppress(OSError):
        os.write(2, b"interrupted\n")
    os._exit(INTERRUPTED)


if is_command():
    leave_quietly_on_interrupt()
