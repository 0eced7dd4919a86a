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
    assert Watch().is_alone() is was_alone
