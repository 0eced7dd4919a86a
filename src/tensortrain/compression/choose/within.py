"""From goals to a plan that holds all of them: sizes by weighing them against each other, the rest by measuring.

The plans of one search differ in one limit: predicted time where a time is asked for, parameters where only the user's
figure is. It is halved (in ratios) between what is too much and too little, and every plan that decides is built.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol

from tensortrain.compression.choose.budget import Budget, Measure
from tensortrain.compression.choose.goals import Goals
from tensortrain.compression.choose.plan import CompressionPlan
from tensortrain.compression.choose.proving import Proving
from tensortrain.errors import BudgetError
from tensortrain.system.observer import Observer

__all__ = ["Planned", "Planner", "find_plan"]

_SCALE = 10**9  # of a limit on several measures weighed against each other
_ROUNDS, _WEIGHINGS = 12, 6  # plans that are looked at; how many of them move the weights
_NEARLY = 0.98  # of the limit that binds: no better plan is looked for
_LITTLE = 1e-6  # of a limit: no weight is nothing
_STEPS, _CLOSE = 8, 1.02  # plans that are built beside the two ends, and the ratio of two limits that is close enough
_TIMINGS, _LEEWAY = 3, 0.97  # of what a search found; how much less is asked for after one that took too long
_ROOM = 1.02

Verdict = Literal["holds", "too large", "too small"]


@dataclass(frozen=True)
class Planned:
    """A plan, what it is predicted to cost in quality, and what it spends of a measure."""

    plan: CompressionPlan
    loss: float
    spent: Callable[[Measure], int]


class Planner(Protocol):
    """What makes plans of one model, from one calibration."""

    @property
    def observer(self) -> Observer: ...

    def plan(self, budget: Budget) -> Planned:
        """The best plan within a budget.

        Raises:
            BudgetError: There is none.
        """

    def range_of(self, measure: Measure) -> tuple[int, int]:
        """The least that any plan spends of a measure, and what the model spends as it is."""


def find_plan(planner: Planner, goals: Goals, proving: Proving) -> CompressionPlan:
    """A plan that holds all goals: of those found, the one with the least predicted loss; the smallest where only the
    user's figure bounds it.

    Raises:
        BudgetError: None was found; the message says what was reached.
    """
    if goals.latency_ms is not None:
        return _fast_enough(planner, goals, proving)
    if goals.counted:
        found = _plan_within(planner, goals.counted)
        return found.plan if goals.metric_drop is None else _good_enough(found.plan, goals, proving)
    return _smallest_good_enough(planner, goals, proving)


# -- sizes -------------------------------------------------------------------------------------------


def _plan_within(planner: Planner, limits: Sequence[Budget]) -> Planned:
    """The best plan found that keeps several limits."""
    found = [planner.plan(each) for each in limits]  # an error where one alone cannot be kept
    keep = [one for one in found if not _over(one, limits)]
    return _least_loss(keep) if keep else _weighed(planner, limits)


def _weighed(planner: Planner, limits: Sequence[Budget]) -> Planned:
    """Plans for a weighted sum of what they spend, the weights moved to the limits that were not kept.

    Whoever keeps all limits keeps every such sum, so that no plan is lost; the best weights are those at which the
    best plan for the sum keeps the limits one by one.
    """
    weights, room, tried = [1.0 / len(limits)] * len(limits), 1.0, list[Planned]()
    for n in range(_ROUNDS):
        try:
            tried.append(planner.plan(_blend(limits, weights, room)))
        except BudgetError:  # less than the smallest forms have
            break
        shares = [tried[-1].spent(each.measure) / each.limit for each in limits]
        if _NEARLY <= max(shares) <= 1:
            break
        if n >= _WEIGHINGS:
            room /= max(shares)  # so much less, or more, to spend at these weights
            continue
        raised = [weight * max(share, _LITTLE) for weight, share in zip(weights, shares, strict=True)]
        weights = [weight / sum(raised) for weight in raised]
    kept = [one for one in tried if not _over(one, limits)]
    if not kept:
        raise _not_together(limits, tried)
    return _least_loss(kept)


def _not_together(limits: Sequence[Budget], tried: Sequence[Planned]) -> BudgetError:
    asked, reached = " and ".join(each.text for each in limits), ""
    if tried:
        amounts = " and ".join(f"{tried[-1].spent(each.measure):,} {each.measure}" for each in limits)
        reached = f" The last plan tried has {amounts}."
    return BudgetError(
        f"a budget must be reachable: no plan was found that keeps {asked} at once.{reached} Allow more of one of them."
    )


def _blend(limits: Sequence[Budget], weights: Sequence[float], room: float = 1.0) -> Budget:
    rates = tuple((each.measure, _SCALE * w / each.limit) for each, w in zip(limits, weights, strict=True))
    return Budget(limits[0].measure, math.floor(_SCALE * room), " and ".join(each.text for each in limits), rates)


def _over(found: Planned, limits: Sequence[Budget]) -> bool:
    return any(found.spent(each.measure) > each.limit for each in limits)


def _least_loss(found: Sequence[Planned]) -> Planned:
    return min(found, key=lambda one: one.loss)


# -- what is measured --------------------------------------------------------------------------------


def _fast_enough(planner: Planner, goals: Goals, proving: Proving) -> CompressionPlan:
    """The plan of the least predicted loss whose measured time is short enough.

    The search times models of the right shapes, without decompositions; what it finds is then built and timed.
    """
    assert goals.latency_ms is not None
    for budget in goals.counted:
        planner.plan(budget)  # what cannot be kept without the time is said without it
    aim = goals.latency_ms
    for _ in range(_TIMINGS):
        found = _fast_enough_by_shapes(planner, goals, proving, aim)
        reached = proving.latency_ms(found)
        if reached <= goals.latency_ms:
            break
        aim *= _LEEWAY * goals.latency_ms / reached
    else:
        raise _too_slow(goals, proving, [reached])
    note = (
        f"Measured: {reached:.4g} ms at batch size {goals.batch_size}, {proving.original_ms:.4g} ms before "
        f"({proving.n_built} plans were built)."
    )
    found = replace(found, notes=(*found.notes, note))
    return found if goals.metric_drop is None else _good_enough(found, goals, proving)


def _fast_enough_by_shapes(planner: Planner, goals: Goals, proving: Proving, aim: float) -> CompressionPlan:
    least, most = planner.range_of("time")
    tried: list[float] = []

    def attempt(limit: float) -> tuple[Verdict, CompressionPlan | None]:
        try:
            budget = Budget("time", math.floor(limit), goals.text)
            plan = _plan_within(planner, [*goals.counted, budget]).plan
        except BudgetError:
            return "too small", None
        tried.append(proving.sketched_ms(plan))
        return ("holds" if tried[-1] <= aim else "too large"), plan

    # Times are rounded up layer by layer, so that the ends leave a little.
    ends = _ROOM * least + 1, _ROOM * most + 1
    found = _search(attempt, *ends, wanted="large", observer=planner.observer)
    if found is None:
        raise _too_slow(goals, proving, tried)
    return found


def _too_slow(goals: Goals, proving: Proving, tried: Sequence[float]) -> BudgetError:
    best = f"the fastest of {len(tried)} plans takes {min(tried):.4g} ms" if tried else ""
    best = best or "no plan keeps the other limits as well"
    return BudgetError(
        f"a budget must be reachable: {goals.text} allows {goals.latency_ms:g} ms at batch size {goals.batch_size}, "
        f"but {best}, where the model as it is takes {proving.original_ms:.4g} ms. Allow more time."
    )


def _smallest_good_enough(planner: Planner, goals: Goals, proving: Proving) -> CompressionPlan:
    """The plan of the fewest parameters whose measured figure falls by no more than allowed."""
    assert goals.metric_drop is not None
    least, most = planner.range_of("params")
    drops: list[tuple[int, float]] = []

    def attempt(limit: float) -> tuple[Verdict, CompressionPlan | None]:
        try:
            plan = planner.plan(Budget("params", math.floor(limit), goals.text)).plan
        except BudgetError:  # forms that small were struck off as slower
            return "too small", None
        drop = proving.original_figure - proving.figure(plan)
        drops.append((plan.params_after, drop))
        return ("holds" if _is_allowed(drop, goals) else "too small"), plan

    found = _search(attempt, least, most - 1, wanted="small", observer=planner.observer)
    if found is None:
        n_params, drop = max(drops, default=(most, 0.0))
        raise BudgetError(
            f"a budget must be reachable: {goals.text} is allowed before healing, but of {len(drops)} plans the one "
            f"that takes least away ({n_params:,} of {most:,} parameters) makes the figure fall by {drop:.4g}. Allow "
            "a larger drop, or pass a size and heal."
        )
    return _figured(found, goals, proving)


def _good_enough(plan: CompressionPlan, goals: Goals, proving: Proving) -> CompressionPlan:
    """The same plan, if its measured figure is."""
    drop = proving.original_figure - proving.figure(plan)
    if not _is_allowed(drop, goals):
        raise BudgetError(
            f"a budget must be reachable: {goals.text} was asked for, but the plan that keeps the rest "
            f"({plan.params_after:,} parameters) makes the figure fall by {drop:.4g} before healing, from "
            f"{proving.original_figure:.4g} to {proving.figure(plan):.4g}. Allow a larger drop, or a larger model."
        )
    return _figured(plan, goals, proving)


def _is_allowed(drop: float, goals: Goals) -> bool:
    assert goals.metric_drop is not None
    return drop <= goals.metric_drop  # false for a figure that is no number


def _figured(plan: CompressionPlan, goals: Goals, proving: Proving) -> CompressionPlan:
    note = (
        f"Measured before healing: the figure is {proving.figure(plan):.6g}, {proving.original_figure:.6g} before; it "
        f"may fall by {goals.metric_drop:g} ({proving.n_built} plans were built)."
    )
    return replace(plan, notes=(*plan.notes, note))


def _search(
    attempt: Callable[[float], tuple[Verdict, CompressionPlan | None]],
    low: float,
    high: float,
    *,
    wanted: Literal["large", "small"],
    observer: Observer,
) -> CompressionPlan | None:
    """The plan at the largest, or smallest, limit found that holds; ``None`` where none does.

    The wanted end is tried first, then the other, then what lies between them, in ratios.
    """
    first, other = (high, low) if wanted == "large" else (low, high)
    observer.on_start("build plans", _STEPS + 2)
    try:
        verdict, best = attempt(first)
        if verdict == "holds":
            return best
        observer.on_step(1)
        verdict, best = attempt(other)
        best = best if verdict == "holds" else None
        if best is None and verdict == _FAULT[wanted]:
            return None  # even the end that asks least of the model is too much
        for n in range(_STEPS):
            observer.on_step(2 + n)
            if high <= _CLOSE * low:
                break
            middle = math.sqrt(low * high)
            verdict, plan = attempt(middle)
            if verdict == "holds":
                best = plan
            if (verdict == "too large") or (verdict == "holds" and wanted == "small"):
                high = middle
            else:
                low = middle
    finally:
        observer.on_end()
    return best


# At the end away from the wanted one: what says that nothing in between can do.
_FAULT: Mapping[str, Verdict] = {"large": "too large", "small": "too small"}
