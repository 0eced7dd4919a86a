"""What a time means: calls in a row, after one that does not count."""

from __future__ import annotations

import pytest

from tensortrain.system.timing import MOST_IN_A_ROW, calls_in_a_row, seconds_per_call, usual_seconds


class Clock:
    """The first call is long; the others differ."""

    def __init__(self, *seconds: float) -> None:
        self.seconds, self.n_calls = list(seconds), 0

    def __call__(self, call: object) -> float:
        self.n_calls += 1
        return self.seconds.pop(0) if self.seconds else 1.0


def test_the_call_that_wakes_does_not_count() -> None:
    clock = Clock(100.0, 1.0, 2.0, 6.0)
    assert seconds_per_call(None, 3, clock) == 3.0
    assert clock.n_calls == 4


def test_without_a_timer_all_calls_are_made() -> None:
    seen: list[int] = []
    assert seconds_per_call(lambda: seen.append(1), 7) >= 0.0
    assert len(seen) == 1 + 7


@pytest.mark.parametrize(
    ("once", "n"), [(1.0, 1), (1.1e-3, 1), (0.9e-3, 2), (1e-5, MOST_IN_A_ROW), (0.0, MOST_IN_A_ROW)]
)
def test_short_calls_have_company(once: float, n: int) -> None:
    assert calls_in_a_row(once) == n


def test_the_usual_time_is_a_median_not_the_least() -> None:
    clock = Clock(1e-3, 9.0, 1e-3, 9.0, 5e-3, 9.0, 3e-3)  # each turn: one that wakes, one that counts
    assert usual_seconds(None, clock, burst_s=1e-3) == 3e-3


def test_a_long_call_runs_once_more_only() -> None:
    clock = Clock(0.5)
    assert usual_seconds(None, clock) == 0.5
    assert clock.n_calls == 1
