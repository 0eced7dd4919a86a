"""Running likely ways in turns, and what such trials found on this machine.

Whoever chooses by a trial needs the same few things: to know whether anything may be timed now, the best time of
several calls that take turns, and a file in which later processes find the result.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

from tensortrain.contract.cost import is_measured
from tensortrain.system.machine import Watch, device_key, known_file, read_json, write_json
from tensortrain.system.tracing import is_traced, is_transformed

__all__ = ["Notebook", "best_seconds", "can_time", "digest", "timed", "train_once"]

_MOST_ROUNDS = 12
_ENOUGH_S = 0.05  # after a few rounds, no new one begins later than this
_ENOUGH_BESIDE_OTHERS_S = 0.2
_FAR_BEHIND = 4.0  # times the fastest in the turn that warms up


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


def best_seconds(calls: Sequence[Any], timer: Callable[[Any], float], *, hurries: bool = False) -> list[float]:
    """The best time of each of several calls that take turns; those far behind the best drop out.

    Args:
        calls: What ``timer`` takes.
        timer: Gives the seconds of one call.
        hurries: Whether those far behind drop out after the first turn, which warms up and counts for nothing else, so
            that the others, where each takes long, get more turns.
    """
    best, warm, watch = [math.inf] * len(calls), [0.0] * len(calls), Watch()
    start, close, least = time.perf_counter(), 1.5 if hurries else 2.0, 4 if hurries else 3
    for turn in range(_MOST_ROUNDS):
        limit = close * min(best)
        for k, call in enumerate(calls):
            if turn == 0:
                warm[k] = timer(call)
            elif (best[k] <= limit or turn == 1) and not (hurries and warm[k] > _FAR_BEHIND * min(warm)):
                best[k] = min(best[k], timer(call))
        # Other programs make single calls slow at random: beside them more rounds are taken.
        enough_s = _ENOUGH_S if watch.is_alone() else _ENOUGH_BESIDE_OTHERS_S
        if turn + 1 >= least and time.perf_counter() - start > enough_s:
            break
    return best


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
