"""What is known of the machine, and whether a measurement had it to itself."""

from __future__ import annotations

import pytest

from tensortrain.system import machine
from tensortrain.system.machine import Watch, memory_bytes


def test_memory_is_that_of_this_machine() -> None:
    assert 2**28 < memory_bytes() < 2**50


@pytest.mark.parametrize(("interruptions", "was_alone"), [(0, True), (9, True), (500, False)])
def test_interruptions_tell_of_other_programs(
    monkeypatch: pytest.MonkeyPatch, interruptions: int, was_alone: bool
) -> None:
    counts = iter([1000, 1000 + interruptions])
    monkeypatch.setattr(machine, "_times_interrupted", lambda: next(counts))
    monkeypatch.setattr(machine, "_seconds_used", lambda: None)
    assert Watch().is_alone() is was_alone


@pytest.mark.parametrize(
    ("by_all", "by_this", "n_processors", "was_alone"),
    [(2.0, 2.0, 2, True), (2.1, 2.0, 2, True), (2.0, 1.0, 2, False), (3.0, 1.0, 64, True), (64.0, 1.0, 64, False)],
)
def test_work_of_others_tells_of_them_where_no_processor_is_left(
    monkeypatch: pytest.MonkeyPatch, by_all: float, by_this: float, n_processors: int, was_alone: bool
) -> None:
    clock, used = iter([0.0, 1.0]), iter([(100.0, 7.0), (100.0 + by_all, 7.0 + by_this)])
    monkeypatch.setattr(machine.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(machine, "_times_interrupted", lambda: 0)
    monkeypatch.setattr(machine, "_seconds_used", lambda: next(used))
    monkeypatch.setattr(machine.os, "cpu_count", lambda: n_processors)
    monkeypatch.setattr(machine.torch, "get_num_threads", lambda: 2)
    assert Watch().is_alone() is was_alone


def test_a_system_that_does_not_tell_is_taken_for_a_quiet_one(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 1.0])
    monkeypatch.setattr(machine.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(machine, "_times_interrupted", lambda: 0)
    monkeypatch.setattr(machine, "_seconds_used", lambda: None)
    assert Watch().is_alone()
