"""What the benchmarks share: rates of the machine, contestants taking turns, peak memory."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import math
import random
import statistics
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from tensortrain.contract.trials import rest
from tensortrain.system.timing import seconds_per_call

__all__ = ["BARE_ALLOCATOR", "MOST_REST_S", "Rates", "Turns", "measured", "p90", "rest", "take_turns"]

# Every large block comes from the system and goes back to it, so that what a call needs shows in the resident set;
# MKL keeps no buffers of its own. This costs time, so memory is measured in a process of its own.
BARE_ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0", "MKL_DISABLE_FAST_MM": "1"}


MOST_REST_S = 0.5  # until the pools of whoever came before have fallen asleep


@dataclass
class Turns:
    """Wall seconds of one contestant.

    Attributes:
        run: The timed call.
        n_rounds: Rounds it takes part in, spread evenly over all of them.
        enter: Called before each turn, not timed.
        n_in_a_row: Calls of one turn; their mean counts. More than one for calls so short that the clock, and caches
            left cold by the others, would hide them.
    """

    run: Callable[[], Any]
    n_rounds: int
    enter: Callable[[], None] | None = None
    n_in_a_row: int = 1
    seconds: list[float] = field(default_factory=list)

    @property
    def median_s(self) -> float:
        return statistics.median(self.seconds)

    def facts(self) -> dict[str, Any]:
        """For the record."""
        seconds = self.seconds
        facts = {"median_ms": self.median_s * 1e3, "p90_ms": p90(seconds) * 1e3}
        return {**facts, "n_turns": len(seconds), "n_in_a_row": self.n_in_a_row}

    def take_one(self) -> float:
        """Seconds per call of one turn; whoever came before has fallen asleep, and this one has woken up.

        To wake a pool of threads takes up to 8 ms where the system lets both threads wait for the same processor. It
        would hide all that is shorter, and it falls on whoever uses threads at all.
        """
        if self.enter is not None:
            self.enter()
        rest(MOST_REST_S)
        return seconds_per_call(self.run, self.n_in_a_row)


def take_turns(contestants: Mapping[str, Turns], seed: int = 0) -> None:
    """Time all contestants, round after round, so that other work on the machine falls on all of them."""
    order, n_rounds = random.Random(seed), max((entry.n_rounds for entry in contestants.values()), default=0)
    gc.collect()
    gc.disable()
    try:
        for turn in range(n_rounds):
            # In a fixed order, whoever follows the dense layer would always find a cold cache.
            for name in order.sample(list(contestants), len(contestants)):
                entry = contestants[name]
                if (turn + 1) * entry.n_rounds // n_rounds > turn * entry.n_rounds // n_rounds:
                    entry.seconds.append(entry.take_one())
    finally:
        gc.enable()


def p90(seconds: Sequence[float]) -> float:
    """The 90th percentile."""
    return sorted(seconds)[math.ceil(0.9 * len(seconds)) - 1]


class Rates:
    """Bandwidth and GEMM rate of this machine with this number of threads, the best of a few tries."""

    def __init__(self, quick: bool) -> None:
        self._quick = quick
        self._gemm: dict[torch.dtype, float] = {}
        source = torch.ones((1 << 22) if quick else (1 << 25), dtype=torch.float64)
        target = torch.empty_like(source)
        size = source.numel() * 8
        # A copy moves every byte twice. Reading alone may be faster; a floor must take the higher rate.
        self.bandwidth = max(2 * size / _best(lambda: target.copy_(source)), size / _best(source.sum))

    def of(self, dtype: torch.dtype) -> float:
        """Flops per second of the dtype in a square product; one multiply-add is two."""
        if dtype not in self._gemm:
            n = 512 if self._quick else 2048
            a = torch.randn(n, n, dtype=dtype)
            self._gemm[dtype] = 2 * n**3 / _best(lambda: a @ a)
        return self._gemm[dtype]

    def as_dict(self) -> dict[str, Any]:
        gemm = {str(dtype).removeprefix("torch."): rate for dtype, rate in self._gemm.items()}
        return {"bandwidth_bytes_per_s": self.bandwidth, "gemm_flops_per_s": gemm}


def _best(run: Callable[[], Any], tries: int = 5) -> float:
    run()
    seconds = []
    for _ in range(tries):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def measured(run: Callable[[], Any]) -> tuple[Any, float, int | None]:
    """The result, wall seconds, and peak resident bytes above those before the call (result included)."""
    gc.collect()
    _trim()
    peak = _Peak()
    start = time.perf_counter()
    result = run()
    seconds = time.perf_counter() - start
    return result, seconds, peak.stop()


class _Peak:
    """The kernel's high-water mark, set back at the start; where it cannot be, samples of the resident set."""

    def __init__(self) -> None:
        self._before = _status("VmRSS")
        self._exact = self._before is not None
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            self._exact = False
        self._highest = self._before or 0
        self._done = threading.Event()
        self._sampler = threading.Thread(target=self._sample, daemon=True)
        if not self._exact and self._before is not None:
            self._sampler.start()

    def stop(self) -> int | None:
        if self._before is None:
            return None
        if self._exact:
            return max(0, (_status("VmHWM") or 0) - self._before)
        self._done.set()
        self._sampler.join()
        return self._highest - self._before

    def _sample(self) -> None:
        while not self._done.wait(1e-3):
            self._highest = max(self._highest, _status("VmRSS") or 0)


def _status(key: str) -> int | None:
    """Bytes of one line of /proc/self/status, or None elsewhere than on Linux."""
    try:
        with open("/proc/self/status", encoding="ascii") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith(key))
    except (OSError, StopIteration):
        return None


def _trim() -> None:
    """Give free memory back to the system; only glibc knows how."""
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)
