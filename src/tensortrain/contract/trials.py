"""Running likely ways in turns, and what such trials found on this machine.

Whoever chooses by a trial needs the same few things: to know whether anything may be timed now, the best time of
several calls that take turns, and a file in which later processes find the result.
"""

from __future__ import annotations

import hashlib
import math
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

from tensortrain.contract.cost import is_measured
from tensortrain.system.machine import Watch, device_key, known_file, read_json, write_json
from tensortrain.system.native import library
from tensortrain.system.timing import calls_in_a_row, seconds_per_call
from tensortrain.system.tracing import is_traced, is_transformed

__all__ = [
    "Notebook",
    "best_seconds",
    "can_time",
    "digest",
    "duel",
    "roughly_in_use",
    "seconds_in_use",
    "timed",
    "train_once",
    "trial_key",
]

_MOST_ROUNDS, _LEAST_ROUNDS = 12, 3
_ENOUGH_S = 0.05  # after a few rounds, no new one begins later than this
_ENOUGH_BESIDE_OTHERS_S = 0.2
_FAR_BEHIND = 4.0  # times the fastest in the turn that warms up
_BEHIND = 1.6  # times the fastest, and a call is not tried again
_MOST_TURNS, _BURST_S = 3, 1e-3  # of calls in a row
_NEARLY = 1.15  # the last turn is for those within this factor of the fastest
_DUEL_ROUNDS, _DUEL_S = 7, 0.06  # of two calls, and no new one begins later than this after the second
_LONG_S = 0.02  # what takes longer does so asleep or awake
_MOST_REST_S = 0.05


def can_time(device: torch.device) -> bool:
    """Whether a trial may run now and would say something about later calls."""
    if device.type not in ("cpu", "cuda") or not is_measured() or torch.are_deterministic_algorithms_enabled():
        return False
    if is_traced() or is_transformed() or _get_current_dispatch_mode() is not None:
        return False
    return device.type != "cuda" or not torch.cuda.is_current_stream_capturing()


def timed(call: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def best_seconds(calls: Sequence[Any], timer: Callable[[Any], float]) -> list[float]:
    """The best time of each of several calls that take turns; those far behind the best drop out.

    Args:
        calls: What ``timer`` takes.
        timer: Gives the seconds of one call.
    """
    best, watch, start = [math.inf] * len(calls), Watch(), time.perf_counter()
    for turn in range(_MOST_ROUNDS):
        limit = 2.0 * min(best)
        for k, call in enumerate(calls):
            if turn == 0:
                timer(call)
            elif best[k] <= limit or turn == 1:
                best[k] = min(best[k], timer(call))
        # Other programs make single calls slow at random: beside them more rounds are taken.
        enough_s = _ENOUGH_S if watch.is_alone() else _ENOUGH_BESIDE_OTHERS_S
        if turn + 1 >= _LEAST_ROUNDS and time.perf_counter() - start > enough_s:
            break
    return best


def seconds_in_use(calls: Sequence[Any], timer: Callable[[Any], float]) -> list[float]:
    """Seconds per call of each of several calls, as benchmarks and a model at work see them.

    Each has turns of a few calls in a row, of which the first, that wakes threads and fills caches, does not count. The
    first of the calls stands for what the others have to beat: it has all turns unless it is far behind.

    Args:
        calls: What ``timer`` takes.
        timer: Gives the seconds of one call.

    Returns:
        list: Medians of the turns; those far behind are infinite.

    Cost: a few calls of each, about three milliseconds for each of those near the fastest.
    """
    once = _once(calls, timer)
    turns: dict[int, list[float]] = {k: [seconds] if seconds > _LONG_S else [] for k, seconds in once.items()}
    start = time.perf_counter()
    for turn in range(_MOST_TURNS):
        for k in once:
            if turn == 0 or _is_near(turns, k, _BEHIND if turn == 1 else _NEARLY):
                turns[k].append(_one_turn(calls[k], once[k], timer))
        if time.perf_counter() - start > _ENOUGH_BESIDE_OTHERS_S:
            break
    return [statistics.median_low(turns[k]) if k in turns else math.inf for k in range(len(calls))]


def roughly_in_use(calls: Sequence[Any], timer: Callable[[Any], float]) -> list[float]:
    """The same from one turn of each call, or from one call of those that are as long as a turn."""
    found = [math.inf] * len(calls)
    for k, once in _once(calls, timer).items():
        found[k] = once if _BURST_S < once <= _LONG_S else _one_turn(calls[k], once, timer)
    return found


def duel(call: Any, other: Any, timer: Callable[[Any], float]) -> tuple[float, float]:
    """Seconds per call of one that is thought to be faster than another, and of that one, in turns of the two alone.

    Of many calls that are timed a few times each, the one with the least time is often the one with the most luck; and
    beside other programs, a call that wakes a thread may take a hundred times as long.

    Args:
        call: Thought to be faster; what ``timer`` takes.
        other: What it has to beat.
        timer: Gives the seconds of one call.

    Returns:
        tuple: Medians of the turns, or the least times where these say less for the first call.

    Cost: at most 14 turns of about a millisecond, or two of each call where calls are long.
    """
    pair = call, other
    once = [timer(each) for each in pair]
    turns: tuple[list[float], list[float]] = ([], [])
    start = time.perf_counter()
    for turn in range(_DUEL_ROUNDS):
        for k in (0, 1) if turn % 2 else (1, 0):
            turns[k].append(_one_turn(pair[k], once[k], timer))
        if turn and time.perf_counter() - start > _DUEL_S:
            break
    pairs = [(judge(turns[0]), judge(turns[1])) for judge in (statistics.median_low, min)]
    return max(pairs, key=lambda pair: pair[0] / pair[1])


def _once(calls: Sequence[Any], timer: Callable[[Any], float]) -> dict[int, float]:
    """Seconds of one call of each that is not far behind, after one that makes kernels ready."""
    warm = [timer(call) for call in calls]
    if warm[0] > _FAR_BEHIND * min(warm):
        warm[0] = timer(calls[0])  # whoever is first pays for what only the first call of a process needs
    least = min(warm)
    if least > _LONG_S:  # making ready is a small part of long calls
        return {k: seconds for k, seconds in enumerate(warm) if seconds <= _FAR_BEHIND * least}
    return {k: timer(call) for k, call in enumerate(calls) if warm[k] <= _FAR_BEHIND * least}


def _is_near(turns: dict[int, list[float]], k: int, factor: float) -> bool:
    best = min(statistics.median_low(some) for some in turns.values() if some)
    return statistics.median_low(turns[k]) <= (factor if k else 2 * _BEHIND) * best


def _one_turn(call: Any, once: float, timer: Callable[[Any], float]) -> float:
    """A long call neither needs company nor one to wake it."""
    if once > _LONG_S:
        return timer(call)
    return seconds_per_call(call, calls_in_a_row(once, _BURST_S), timer)


def rest(most_s: float = _MOST_REST_S) -> None:
    """Sleep until this process is idle: its pools of threads spin for a while after their work."""
    start = time.perf_counter()
    while time.perf_counter() - start < most_s:
        used = time.process_time()  # of all threads
        time.sleep(4e-3)
        if time.process_time() - used < 4e-4:
            return


def train_once(run: Callable[[], Tensor], leaves: Sequence[Tensor], seed: Tensor) -> None:
    """Forward and backward on numbers of a trial."""
    # Hooks of the caller on saved tensors, those of activation checkpointing for instance, are not for a trial.
    unseen = torch.autograd.graph.saved_tensors_hooks(_same, _same)
    with torch.inference_mode(False), torch.enable_grad(), unseen:
        y = run()
        torch.autograd.grad(y, leaves, seed.to(y.dtype))


def _same(tensor: Tensor) -> Tensor:
    return tensor


def digest(value: Any) -> str:
    """A short name of what prints the same in every process."""
    return hashlib.sha256(repr(value).encode()).hexdigest()[:20]


def trial_key(device: torch.device, *told: Any) -> tuple[Any, ...]:
    """What the result of a trial holds for.

    Args:
        device: On which it was made.
        told: What was tried, in values that print the same in every process.
    """
    kernels = library() if device.type == "cpu" else None
    built = "" if kernels is None else Path(kernels.__file__).parent.name  # with other kernels, other times
    return (*told, str(device), torch.get_num_threads(), built)


class Notebook:
    """What trials of one kind found, kept from one process to the next beside the constants of the machine.

    Args:
        name: Of the kind, with a number that rises when its entries change their meaning.
    """

    def __init__(self, name: str) -> None:
        self.name = name

    def read(self, key: Any, device: torch.device) -> Any:
        """What was noted under a key; ``None`` where nothing was."""
        return self._entries(device).get(digest(key))

    def write(self, key: Any, device: torch.device, found: Any) -> None:
        """Note what was found; the entries of other keys stay."""
        write_json(self._file(device), {**self._entries(device), digest(key): found})

    def _entries(self, device: torch.device) -> dict[str, Any]:
        found = read_json(self._file(device))
        return found if isinstance(found, dict) else {}

    def _file(self, device: torch.device) -> Path:
        return known_file(self.name, device_key(device))
