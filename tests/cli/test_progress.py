"""Progress on a terminal and in a log."""

from __future__ import annotations

import io

import pytest
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from tensortrain.cli import progress
from tensortrain.cli.progress import BarObserver, LineObserver, observing
from tensortrain.system.observer import Observer


def test_a_log_gets_one_line_per_piece_of_work() -> None:
    log = io.StringIO()
    observer = LineObserver(log)
    assert isinstance(observer, Observer)
    observer.message("Hello.")
    observer.on_start("fit", 500)
    for n in range(1, 501):
        observer.on_step(n, loss=1.0 / n)
    observer.on_start("inner", None)
    observer.on_step(3)
    observer.on_end()
    observer.on_end()
    first, inner, fit = log.getvalue().splitlines()
    assert first == "Hello."
    assert inner.startswith("inner: 3 in ")
    assert fit.startswith("fit: 500/500 loss 0.002 in ")


def test_long_work_speaks_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    log = io.StringIO()
    observer = LineObserver(log)
    observer.on_start("fit", 100)
    for n in range(1, 101):
        now[0] += 1.0
        observer.on_step(n)
    assert log.getvalue().splitlines() == [f"fit: {n}/100" for n in range(10, 101, 10)]


def test_bars_on_a_terminal() -> None:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=90)
    columns = TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[figures]}")
    with Progress(*columns, console=console) as bars:
        observer = BarObserver(bars)
        assert isinstance(observer, Observer)
        observer.on_start("fit", 2)
        observer.on_step(2, loss=0.25)
        observer.message("[not markup]")
        observer.on_end()
        observer.on_step(5)  # a stray step after the end moves nothing
        assert bars.tasks[0].completed == 2
    assert "loss 0.25" in screen.getvalue()
    assert "[not markup]" in screen.getvalue()


def test_json_keeps_stdout_free(capsys: pytest.CaptureFixture[str]) -> None:
    with observing(json=True) as observer:
        observer.message("Aside.")
    with observing(json=False) as observer:
        observer.message("Aloud.")
    captured = capsys.readouterr()
    assert captured.err == "Aside.\n"
    assert captured.out == "Aloud.\n"
