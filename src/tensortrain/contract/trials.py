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
from tensortrain.system.tracing import is_traced, is_transformed

__all__ = ["Notebook", "best_seconds", "can_time", "digest", "seconds_in_use", "timed", "train_once", "trial_key"]

_MOST_ROUNDS, _LEAST_ROUNDS = 12, 3
_ENOUGH_S = 0.05  # after a few rounds, no new one begins later than this
_ENOUGH_BESIDE_OTHERS_S = 0.2
_FAR_BEHIND = 4.0  # times the fastest in the turn that warms up
_BEHIND, _MOST_AHEAD = 1.6, 4  # times the fastest in a row; and how many are then tried after a rest
_RESTED_TURNS, _LEAST_RESTED, _BEHIND_RESTED = 5, 2, 1.25
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
    """Seconds that each of several calls takes after other code, or none: its threads asleep, its caches cold.

    Calls in a row find everything awake, and are up to three times as fast. The first call stands for what the others
    have to beat: it is tried to the end unless it is far behind.

    Args:
        calls: What ``timer`` takes.
        timer: Gives the seconds of one call.

    Returns:
        list: Medians of a few calls after a rest. Those clearly behind are told by their calls in a row, and what
        waking up costs the others; those far behind are infinite.

    Cost: a few calls of each, and some 10 ms for each of at most 25 rests.
    """
    best = _in_a_row(calls, timer)
    limit = _BEHIND * min(best)
    ahead = sorted((k for k in range(len(calls)) if best[k] <= limit), key=lambda k: best[k])[:_MOST_AHEAD]
    ahead += [0] if 0 not in ahead and best[0] <= 2 * limit else []
    if min(best) > _LONG_S or not _RESTED_TURNS:
        return best
    rested = _after_rests({k: calls[k] for k in ahead}, timer)
    woken = statistics.median(max(0.0, rested[k] - best[k]) for k in ahead)
    return [rested.get(k, best[k] + woken) for k in range(len(calls))]


def _in_a_row(calls: Sequence[Any], timer: Callable[[Any], float]) -> list[float]:
    """The best of two or three turns after one that warms up, which those far behind do not survive."""
    warm = [timer(call) for call in calls]
    start, least = time.perf_counter(), min(warm)
    limit = least * (_FAR_BEHIND if least < _LONG_S else _BEHIND)  # making kernels ready is a small part of long calls
    best = [seconds if limit < seconds <= _FAR_BEHIND * least else math.inf for seconds in warm]
    for turn in range(3):
        close = _BEHIND * min(best)
        for k, call in enumerate(calls):
            if warm[k] <= limit and (turn == 0 or best[k] <= close):
                best[k] = min(best[k], timer(call))
        if time.perf_counter() - start > _ENOUGH_BESIDE_OTHERS_S:
            break
    return best


def _after_rests(calls: dict[int, Any], timer: Callable[[Any], float]) -> dict[int, float]:
    """Medians of turns with a rest before each; those behind drop out."""
    seconds: dict[int, list[float]] = {k: [] for k in calls}
    for turn in range(_RESTED_TURNS):
        limit = math.inf if turn < _LEAST_RESTED else _BEHIND_RESTED * min(map(statistics.median, seconds.values()))
        for k, call in calls.items():
            if turn == 0 or statistics.median(seconds[k]) <= limit:
                rest()
                seconds[k].append(timer(call))
    return {k: statistics.median_low(some) for k, some in seconds.items()}


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
