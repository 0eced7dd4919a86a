"""What a time means here: of a trial, of the machine's constants, and of the benchmarks alike.

It is seconds per call of a few calls in a row, after one that is not counted: that one wakes the threads and brings
data into the caches, as the layers before do in a model, and as a user's own warm-up does. The least of many calls is
shorter than what anybody sees; a call after a rest is longer by what waking the threads takes.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

__all__ = ["BURST_S", "MOST_IN_A_ROW", "calls_in_a_row", "seconds_per_call", "usual_seconds"]

BURST_S, MOST_IN_A_ROW = 2e-3, 50  # shorter calls run several in a row: one alone shows the clock and cold caches
_LONG_S = 0.02  # what takes longer does so asleep or awake


def calls_in_a_row(once_s: float, burst_s: float = BURST_S) -> int:
    """How many calls of about this length are timed together."""
    return max(1, min(MOST_IN_A_ROW, int(burst_s / max(once_s, 1e-9))))


def seconds_per_call(call: Any, n_in_a_row: int = 1, timer: Callable[[Any], float] | None = None) -> float:
    """The mean of some calls in a row, after one that is not counted.

    Args:
        call: Without arguments, or what ``timer`` takes.
        n_in_a_row: How many count.
        timer: Gives the seconds of one call; by default all of them together are timed.
    """
    if timer is not None:
        timer(call)
        return sum(timer(call) for _ in range(n_in_a_row)) / n_in_a_row
    call()
    start = time.perf_counter()
    for _ in range(n_in_a_row):
        call()
    return (time.perf_counter() - start) / n_in_a_row


def usual_seconds(call: Any, timer: Callable[[Any], float], *, turns: int = 3, burst_s: float = BURST_S) -> float:
    """The median of a few turns of a call that has run before.

    Args:
        call: What ``timer`` takes.
        timer: Gives the seconds of one call.
        turns: How many; one alone of calls so long that nothing wakes during them.
        burst_s: About so long takes one turn.
    """
    once = timer(call)
    if once > _LONG_S:
        return once
    n = calls_in_a_row(once, burst_s)
    return statistics.median_low(seconds_per_call(call, n, timer) for _ in range(turns))
