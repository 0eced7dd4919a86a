"""Trials: who takes turns how long, and what is noted of them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from tensortrain.contract import trials
from tensortrain.contract.trials import Notebook, best_seconds, seconds_in_use, trial_key

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
    """Calls of which the first after one of another takes longer: threads wake up, and caches fill."""

    def __init__(self, awake: Sequence[float], waking: float) -> None:
        super().__init__(*awake)
        self.waking, self.last = waking, -1

    def __call__(self, k: int) -> float:
        woken, self.last = k != self.last, k
        return super().__call__(k) + (self.waking if woken else 0.0)


@pytest.fixture
def _turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trials, "_MOST_TURNS", 3)


@pytest.mark.usefixtures("_turns")
def test_seconds_in_use_do_not_count_the_call_that_wakes() -> None:
    clock = SleepyClock((4e-4, 4.2e-4, 5.5e-4, 9e-4, 9.0), 1e-4)
    found = trials.seconds_in_use(range(5), clock)
    assert found == [*map(pytest.approx, (4e-4, 4.2e-4, 5.5e-4, 9e-4)), float("inf")]
    # Each turn is a call that wakes and, at half a millisecond, one or two that count; two calls came before.
    assert clock.counts[4] == 1  # far behind
    assert clock.counts[3] < clock.counts[2] < clock.counts[1]  # one turn, two, three


@pytest.mark.usefixtures("_turns")
def test_the_first_call_is_tried_to_the_end() -> None:
    clock = SleepyClock((9e-4, 4e-4, 9e-4), 0.0)
    assert trials.seconds_in_use(range(3), clock) == [*map(pytest.approx, (9e-4, 4e-4, 9e-4))]
    assert clock.counts[0] > clock.counts[2]


@pytest.mark.usefixtures("_turns")
def test_long_calls_need_nobody_to_wake_them() -> None:
    clock = SleepyClock((1.0, 1.2, 9.0), 0.0)
    assert trials.seconds_in_use(range(3), clock) == [1.0, 1.2, float("inf")]
    assert clock.counts[0] == 1 + 3


class LuckyClock(Clock):
    """Calls of known lengths, some of which show less at first."""

    def __init__(self, seconds: Sequence[float], lucky: dict[int, Sequence[float]]) -> None:
        super().__init__(*seconds)
        self.lucky = lucky

    def __call__(self, k: int) -> float:
        self.counts[k] += 1
        early = self.lucky.get(k, ())
        return early[self.counts[k] - 1] if self.counts[k] <= len(early) else self.seconds[k]


@pytest.mark.usefixtures("_turns")
def test_one_turn_is_enough_where_luck_may_decide() -> None:
    clock = SleepyClock((1.0, 1.2, 9.0), 0.0)
    assert trials.roughly_in_use(range(3), clock) == [1.0, 1.2, float("inf")]
    assert clock.counts[0] == 1 + 1


def test_a_first_call_that_pays_for_the_start_of_the_process_is_tried_once_more() -> None:
    cold = iter([9.0, 0.1, 0.1, 0.1])
    seconds = seconds_in_use([0, 1], lambda k: next(cold) if k == 0 else 0.15)
    assert seconds == [0.1, 0.15]


def test_a_duel_is_told_by_the_medians() -> None:
    assert trials.duel(1, 0, Clock(1e-3, 6e-4)) == (pytest.approx(6e-4), pytest.approx(1e-3))
    assert trials.duel(0, 1, Clock(1e-3, 6e-4)) == (pytest.approx(1e-3), pytest.approx(6e-4))


def test_a_duel_is_told_by_the_least_times_where_they_say_less_for_the_first() -> None:
    # The other one was woken late in most turns, as beside other programs.
    clock = LuckyClock((0.03, 0.04), {1: [0.025] * 2})
    assert trials.duel(0, 1, clock) == (0.03, 0.025)


def test_a_duel_of_long_calls_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trials, "_DUEL_S", -1.0)
    clock = Clock(1.0, 2.0)
    assert trials.duel(0, 1, clock) == (1.0, 2.0)
    assert clock.counts == [3, 3]


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
