"""What stands between a command and its terminal: streams that take any text, and errors that are one line.

Whatever goes wrong in a command ends here. Its text goes to stderr as one line, the exit code is 2, and the
traceback is kept for those who set ``TENSORTRAIN_TRACEBACK``.
"""

from __future__ import annotations

import codecs
import contextlib
import io
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import typer

from tensortrain._command import INTERRUPTED, leave_quietly_on_interrupt
from tensortrain.errors import TTError

__all__ = ["FAILED", "guarded", "one_line", "ready_streams"]

FAILED = 2
_TRACEBACK = "TENSORTRAIN_TRACEBACK"
_WIDTHS = range(20, 1001)  # of terminals; outside these a width is a mistake, and tables need room
_MOST_CHARACTERS = 1000  # of a message: arguments in it may be of any length

# What our own tables and sentences are made of, for terminals that know less than Unicode.
_PLAIN = {
    "→": "->", "×": "x", "·": ".", "–": "-", "−": "-", "—": "-", "µ": "u", "…": "...", "•": "*", "±": "+-",
    "─": "-", "━": "-", "│": "|", "┃": "|", "═": "=", "╸": "-", "╺": "-", "⁻": "-", "’": "'", "‘": "'", "“": '"',
    "”": '"', "\N{NO-BREAK SPACE}": " ",
}  # fmt: skip

# The classes of typer's errors have moved between releases; their names have not.
_UsageError: type[Any] = next(cls for cls in typer.BadParameter.__mro__ if cls.__name__ == "ClickException")


class _Interrupts:
    """Ctrl-C raises KeyboardInterrupt, and is remembered: code on its way may turn that into another error."""

    def __init__(self) -> None:
        self.seen = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self.seen = True
        raise KeyboardInterrupt


def guarded(command: Callable[[], Any]) -> int:
    """Run a command; say in one line what went wrong.

    Returns:
        int: What the command returned where that is a number, else 0; 2 after an error, 130 after Ctrl-C.
    """
    with _interruptible() as interrupts:
        try:
            code = _run(command, interrupts)
            _flush()
        except OSError as error:
            code = _output_failed(error)
    if interrupts.seen:  # said here, as some releases of typer take the exception for themselves
        _fail("interrupted", prefix="")
        return INTERRUPTED
    return code


def _run(command: Callable[[], Any], interrupts: _Interrupts) -> int:
    try:
        code = command()
        return code if isinstance(code, int) else 0
    except BrokenPipeError:
        raise
    except BaseException as error:
        if interrupts.seen or isinstance(error, KeyboardInterrupt):
            interrupts.seen = True
            return INTERRUPTED
        if isinstance(error, SystemExit):
            return _exit_code(error)
        if os.environ.get(_TRACEBACK):
            raise
        return _fail(_said(error))


def _exit_code(error: SystemExit) -> int:
    if isinstance(error.code, int):
        return error.code
    return 0 if error.code is None else _fail(str(error.code))


def one_line(text: str) -> str:
    """Text without line breaks and control characters, and not longer than a screen."""
    text = " ".join(text.split())
    text = "".join(c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode() for c in text)
    if len(text) <= _MOST_CHARACTERS:
        return text
    return f"{text[: _MOST_CHARACTERS // 2]} ... {text[-_MOST_CHARACTERS // 2 :]}"


def _said(error: BaseException) -> str:
    """What to tell a user about an error."""
    if isinstance(error, _UsageError):
        return error.format_message()
    if isinstance(error, TTError):
        return str(error)
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename!s}" if error.filename is not None else error.strerror
    reason = f"{type(error).__name__}: {error}".rstrip(": ")
    if isinstance(error, MemoryError) or "allocate memory" in reason:
        return f"there must be memory enough: {_wanted(error)}. Ask for smaller sizes, batches or models."
    written = re.search(r"I/O error: (.*?) \(os error \d+\)", reason)  # in the words of safetensors
    if written:
        return f"{written[1]}: a file could not be written."
    if isinstance(error, typer.Abort):
        return "the input ended before the command was done."
    return f"the command cannot go on: {reason}. Check its arguments; {_TRACEBACK}=1 shows where it stopped."


def _wanted(error: BaseException) -> str:
    """What there was no memory for, as far as the error says."""
    wanted = re.search(r"allocate ([\d.]+ ?[A-Za-z]+)", str(error))
    return f"{wanted[1]} in one piece were refused" if wanted else "the machine has no more"


def _fail(message: str, *, prefix: str = "error: ") -> int:
    with contextlib.suppress(OSError, ValueError):  # nobody may be listening
        print(prefix + one_line(message), file=sys.stderr, flush=True)
    return FAILED


def _output_failed(error: OSError) -> int:
    """The reader has gone, or the disk behind stdout is full: what is left is said to nobody."""
    code = 0 if isinstance(error, BrokenPipeError) else _fail(_said(error))
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            stream.flush()
            continue
        with contextlib.suppress(OSError, ValueError, AttributeError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())  # or Python fails on it once more at its end
    return code


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        stream.flush()


@contextlib.contextmanager
def _interruptible() -> Iterator[_Interrupts]:
    """Ctrl-C stops the command in order; before and after that the process is simply left."""
    interrupts = _Interrupts()
    before = signal.getsignal(signal.SIGINT)
    own = getattr(before, "__module__", None) == leave_quietly_on_interrupt.__module__
    if not own and before is not signal.default_int_handler:
        yield interrupts
        return
    try:
        signal.signal(signal.SIGINT, interrupts)
    except ValueError:  # not in the main thread
        yield interrupts
        return
    hook, sys.unraisablehook = sys.unraisablehook, _unraisable(sys.unraisablehook)
    try:
        yield interrupts
    finally:
        sys.unraisablehook = hook
        signal.signal(signal.SIGINT, before)


def _unraisable(usual: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Ctrl-C in a place that cannot raise, such as a finalizer, is raised again at the next one that can."""

    def hook(report: Any) -> None:
        if issubclass(report.exc_type, KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        else:
            usual(report)

    return hook


# -- streams -----------------------------------------------------------------------------------------


def ready_streams() -> None:
    """Make the streams of this process take any text, closed ones too, and put the terminal's width in order."""
    _open_closed_ones()
    codecs.register_error("tensortrain", _in_plain_letters)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="tensortrain")
    for name in ("COLUMNS", "LINES", "TERMINAL_WIDTH"):
        value = os.environ.get(name)
        if value is not None and not (value.isascii() and value.isdigit() and int(value[:9]) in _WIDTHS):
            del os.environ[name]


def _open_closed_ones() -> None:
    """Without this the next file to be opened would get the number of a closed stream, and its output."""
    for number, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        try:
            os.fstat(number)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)
            if opened != number:
                os.dup2(opened, number)
                os.close(opened)
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115


def _in_plain_letters(error: UnicodeError) -> tuple[str, int]:
    """What cannot be written in a stream's encoding: the nearest ASCII, else its number."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    letters = error.object[error.start : error.end]
    plain = (_PLAIN.get(c) or c.encode("ascii", "backslashreplace").decode() for c in letters)
    return "".join(plain), error.end
