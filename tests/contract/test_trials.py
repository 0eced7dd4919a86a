"""Trials: who takes turns how long, and what is noted of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tensortrain.contract import trials
from tensortrain.contract.trials import Notebook, best_seconds

CPU = torch.device("cpu")


class Clock:
    """Calls of known lengths."""

    def __init__(self, *seconds: float) -> None:
        self.seconds, self.counts = seconds, [0] * len(seconds)

    def __call__(self, k: int) -> float:
        self.counts[k] += 1
        return self.seconds[k] * (2.0 if self.counts[k] == 1 else 1.0)


@pytest.mark.parametrize("hurries", [False, True])
def test_the_first_turn_does_not_count(hurries: bool) -> None:
    clock = Clock(1.0, 2.0)
    assert best_seconds([0, 1], clock, hurries=hurries) == [1.0, 2.0]
    assert clock.counts[0] == 12


def test_those_far_behind_drop_out() -> None:
    clock = Clock(1.0, 1.2, 3.0, 9.0)
    assert best_seconds(range(4), clock)[:3] == [1.0, 1.2, 3.0]
    assert clock.counts == [12, 12, 2, 2]
    clock = Clock(1.0, 1.2, 3.0, 9.0)
    assert best_seconds(range(4), clock, hurries=True) == [1.0, 1.2, 3.0, float("inf")]
    assert clock.counts == [12, 12, 2, 1]


def test_long_calls_have_few_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trials, "_ENOUGH_S", -1.0)
    for hurries, least in ((False, 3), (True, 4)):
        clock = Clock(1.0)
        best_seconds([0], clock, hurries=hurries)
        assert clock.counts == [least]


@pytest.fixture
def file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setattr(trials, "known_file", lambda name, key: tmp_path / f"{name}.json")
    return tmp_path / "some-1.json"


def test_notes_are_read_by_another_process(file: Path) -> None:
    Notebook("some-1").write(("a", 1), CPU, {"way": "b"})
    Notebook("some-1").write(("a", 2), CPU, [1.5])
    assert Notebook("some-1").read(("a", 1), CPU) == {"way": "b"}
    assert Notebook("some-1").read(("a", 2), CPU) == [1.5]
    assert Notebook("some-1").read(("a", 3), CPU) is None
    assert file.exists()


@pytest.mark.parametrize("text", ["", "[]", "{", "null", "3"])
def test_a_damaged_file_holds_no_notes(file: Path, text: str) -> None:
    file.write_text(text)
    assert Notebook("some-1").read("key", CPU) is None
    Notebook("some-1").write("key", CPU, 1)
    found: Any = Notebook("some-1").read("key", CPU)
    assert found == 1
