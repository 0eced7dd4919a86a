"""Losses of a plan's changes measured in place of predicted, and a plan made again with what was seen.

What is predicted of a change takes the positions of an example for independent. Where a model means over them, an error
that is alike at all of them adds up: behind the last layer of a sentence encoder 146 times what was predicted was seen.
So every change of a plan is tried by itself, on batches that the plan has not seen, its layer's menu is scaled by what
came out, and the budget is spent again. A new plan is taken only if all of it together spoils less than the one before.

Source of the idea: predicted curves, each scaled by one measured divergence, as in github.com/lems-svd/lems.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from tensortrain.compression.choose.plan import CompressionPlan
from tensortrain.compression.choose.proving import what_it_does
from tensortrain.errors import TTError

__all__ = ["Seen", "spent_again"]

_ROUNDS = 3  # plans that are built and measured
_MOST, _LEAST = 1e3, 1 / 16  # times what is usual of the measured layers: beyond it is chance
_TINY = 1e-300


@dataclass(frozen=True)
class Seen:
    """Shares of the original's output that are spoiled: by a whole plan, and by each of its changes alone.

    Attributes:
        alone: By name of the layer; of layers that are narrowed together, of those that losses are predicted of.
    """

    together: float
    alone: Mapping[str, float]


class Plans(Protocol):
    """What makes plans of one model and one budget, by how often each layer loses what is predicted of it."""

    def __call__(self, times: Mapping[str, float], usual: float) -> CompressionPlan: ...


def spent_again(
    plans: Plans, first: CompressionPlan, look: Callable[[CompressionPlan], Seen]
) -> tuple[dict[str, float], float, list[float]]:
    """How often each layer loses what is predicted of it, with which the best plan was made.

    Args:
        first: The plan for no scales.
        look: Builds a plan and measures it.

    Returns:
        The scales of that plan, that of all other layers, and what every plan spoiled in all.
    """
    plan, times, usual = first, dict[str, float](), 1.0
    best, spoiled = (times, usual), list[float]()
    known: list[CompressionPlan] = []
    while len(known) < _ROUNDS and _is_new(plan, known):
        known.append(plan)
        seen = look(plan)
        spoiled.append(seen.together)
        if not seen.together > min(spoiled):
            best = dict(times), usual
        times, usual = scaled(plan, seen.alone, times, usual)
        if not times:
            break
        try:
            plan = plans(times, usual)
        except TTError:  # no form of these sizes is fast enough
            break
    return *best, spoiled


def scaled(
    plan: CompressionPlan, alone: Mapping[str, float], times: Mapping[str, float], usual: float
) -> tuple[dict[str, float], float]:
    """Scales with what a plan's changes were seen to spoil; ``usual`` is that of layers of which nothing was seen.

    Args:
        times, usual: Those that the plan was made with.
    """
    found = dict(times)
    for layer in plan.layers:
        if layer.name in alone and layer.loss and math.isfinite(alone[layer.name]):
            ratio = max(alone[layer.name], _TINY) / max(layer.loss, _TINY)
            found[layer.name] = ratio * times.get(layer.name, usual)
    if not found:
        return {}, usual
    middle = sorted(found.values())[len(found) // 2]
    return {name: min(max(one, _LEAST * middle), _MOST * middle) for name, one in found.items()}, middle


def _is_new(plan: CompressionPlan, known: Sequence[CompressionPlan]) -> bool:
    return all(what_it_does(plan) != what_it_does(one) for one in known)
