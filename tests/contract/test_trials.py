"""Trials: who takes turns how long, and what is noted of them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from tensortrain.contract import trials
from tensortrain.contract.trials import Notebook, best_seconds, trial_key

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _twelve_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trials, "_MOST_ROUNDS", 12)


class Clock:
    """Calls of known lengths."""

    def __init__(self, *seconds: float) -> None:
        self.seconds, self.counts = seconds, [0] * len(seconds)

    def __call__(self, k: int) -> float:
        self.counts[k] += 1
        return self.seconds[k] * (2.0 if self.counts[k] == 1 else 1.0)


def test_the_first_turn_does_not_count() -> None:
    clock = Clock(1.0, 2.0)
    assert best_seconds([0, 1], clock) == [1.0, 2.0]
    assert clock.counts[0] == 12


def test_those_far_behind_drop_out() -> None:
    clock = Clock(1.0, 1.2, 3.0, 9.0)
    assert best_seconds(range(4), clock) == [1.0, 1.2, 3.0, 9.0]
    assert clock.counts == [12, 12, 2, 2]


def test_long_calls_have_few_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trials, "_ENOUGH_S", -1.0)
    clock = Clock(1.0)
    best_seconds([0], clock)
    assert clock.counts == [3]


class SleepyClock(Clock):
    """Calls that take longer after a rest, each by a time of its own."""

    def __init__(self, awake: Sequence[float], asleep: Sequence[float]) -> None:
        super().__init__(*awake)
        self.asleep, self.rested, self.n_rests = asleep, False, 0

    def rest(self) -> None:
        self.rested, self.n_rests = True, self.n_rests + 1

    def __call__(self, k: int) -> float:
        rested, self.rested = self.rested, False
        return self.asleep[k] if rested and self.counts[k] else super().__call__(k)


@pytest.fixture
def _rests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trials, "_RESTED_TURNS", 5)


@pytest.mark.usefixtures("_rests")
def test_seconds_in_use_are_those_after_a_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SleepyClock((1e-3, 1.1e-3, 1.5e-3, 3e-3, 9e-3), (3e-3, 2e-3, 2.6e-3, 9.0, 9.0))
    monkeypatch.setattr(trials, "rest", clock.rest)
    found = trials.seconds_in_use(range(5), clock)
    # The fourth is told by what waking up costs the others, the median of 2, 0.9 and 1.1; the last is far behind.
    assert found == [3e-3, 2e-3, 2.6e-3, pytest.approx(4.1e-3), float("inf")]
    assert clock.n_rests == 2 + 5 + 2  # the first and the third drop out after two turns
    assert clock.counts == [4, 4, 4, 2, 1]


@pytest.mark.usefixtures("_rests")
def test_the_first_call_is_tried_to_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SleepyClock((2e-3, 1e-3), (1e-3, 5e-3))  # awake twice as slow as the other, yet faster asleep
    monkeypatch.setattr(trials, "rest", clock.rest)
    assert trials.seconds_in_use(range(2), clock) == [1e-3, 5e-3]


@pytest.mark.usefixtures("_rests")
def test_long_calls_need_no_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SleepyClock((1.0, 1.2), (9.0, 9.0))
    monkeypatch.setattr(trials, "rest", clock.rest)
    assert trials.seconds_in_use(range(2), clock) == [1.0, 1.2]
    assert clock.n_rests == 0


def test_a_rest_ends_though_the_process_is_busy(monkeypatch: pytest.MonkeyPatch) -> None:
    used = iter(range(10**6))
    monkeypatch.setattr(trials.time, "process_time", lambda: float(next(used)))
    start = time.perf_counter()
    trials.rest(0.03)
    assert 0.03 <= time.perf_counter() - start < 10


def test_a_key_tells_devices_and_what_was_tried_apart() -> None:
    key = trial_key(CPU, "a", 1)
    assert key == trial_key(CPU, "a", 1)
    assert key[:3] == ("a", 1, "cpu")
    assert len({key, trial_key(CPU, "a", 2), trial_key(torch.device("meta"), "a", 1)}) == 3


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
