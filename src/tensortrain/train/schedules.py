"""How the learning rate goes up and down over a run: step, total, warmup -> share of the largest rate."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

__all__ = ["SCHEDULES", "ScheduleName"]

ScheduleName = Literal["cosine", "onecycle", "constant"]

_ONECYCLE_RISE, _ONECYCLE_START = 0.3, 1 / 25


def _cosine(step: int, total: int, warmup: float) -> float:
    rise = round(warmup * total)
    if step < rise:
        return (step + 1) / (rise + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, total - rise)))


def _onecycle(step: int, total: int, warmup: float) -> float:
    rise = _ONECYCLE_RISE * total
    if step < rise:
        return _ONECYCLE_START + (1 - _ONECYCLE_START) * 0.5 * (1 - math.cos(math.pi * step / rise))
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / (total - rise)))


def _constant(step: int, total: int, warmup: float) -> float:
    return min(1.0, (step + 1) / (round(warmup * total) + 1))


SCHEDULES: dict[str, Callable[[int, int, float], float]] = {
    "cosine": _cosine,
    "onecycle": _onecycle,
    "constant": _constant,
}
