"""What a person sees while long work runs: bars on a terminal, a few plain lines elsewhere."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from tensortrain.system.observer import Observer

__all__ = ["BarObserver", "LineObserver", "observing"]

_SECONDS_BETWEEN_LINES = 10.0


@contextlib.contextmanager
def observing(*, json: bool) -> Iterator[Observer]:
    """Give the observer that suits the output: on stderr where stdout is to hold JSON alone."""
    stream = sys.stderr if json else sys.stdout
    if not stream.isatty():
        yield LineObserver(stream)
        return
    with _bars(stream) as bars:
        yield BarObserver(bars)


class BarObserver:
    """One bar per piece of work; pieces may lie within one another."""

    def __init__(self, bars: Progress) -> None:
        self.bars = bars
        self.open: list[TaskID] = []

    def on_start(self, name: str, total: int | None) -> None:
        """Add a bar; it pulses when the total is not known."""
        self.open.append(self.bars.add_task(name, total=total, figures=""))

    def on_step(self, n: int, **figures: float) -> None:
        """Move the innermost bar."""
        if self.open:
            self.bars.update(self.open[-1], completed=n, figures=_figures_text(figures))

    def on_end(self) -> None:
        """Leave the bar as it is; a new one goes below."""
        if self.open:
            self.bars.stop_task(self.open.pop())

    def message(self, text: str) -> None:
        """Print a sentence above the bars."""
        self.bars.console.print(text, markup=False, highlight=False)


class LineObserver:
    """Lines for logs and pipes: at most one in ten seconds, and one at the end of each piece of work."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self.open: list[_Work] = []

    def on_start(self, name: str, total: int | None) -> None:
        """Remember the work; short pieces give a single line at their end."""
        self.open.append(_Work(name, total))

    def on_step(self, n: int, **figures: float) -> None:
        """Say where the work is, now and then."""
        if not self.open:
            return
        work = self.open[-1]
        work.n, work.figures = n, _figures_text(figures)
        if time.monotonic() - work.said >= _SECONDS_BETWEEN_LINES:
            work.said = time.monotonic()
            self._say(str(work))

    def on_end(self) -> None:
        """Say how far the work came."""
        if self.open:
            work = self.open.pop()
            self._say(f"{work} in {time.monotonic() - work.began:.1f} s")

    def message(self, text: str) -> None:
        """Print a sentence."""
        self._say(text)

    def _say(self, text: str) -> None:
        print(text, file=self.stream, flush=True)


class _Work:
    """A piece of work under way."""

    def __init__(self, name: str, total: int | None) -> None:
        self.name, self.total = name, total
        self.n, self.figures = 0, ""
        self.began = self.said = time.monotonic()

    def __str__(self) -> str:
        share = str(self.n) if self.total is None else f"{self.n}/{self.total}"
        return " ".join(filter(None, (f"{self.name}: {share}", self.figures)))


def _bars(stream: TextIO) -> Progress:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    return Progress(
        TextColumn("{task.description:<12}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(elapsed_when_finished=True),
        TextColumn("{task.fields[figures]}", style="dim"),
        console=Console(file=stream),
    )


def _figures_text(figures: dict[str, float]) -> str:
    return "  ".join(f"{name} {value:.4g}" for name, value in figures.items())
