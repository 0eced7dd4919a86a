"""The search among plans: how it weighs limits, how it halves, and how few plans it asks for."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import pytest

from tensortrain.compression import CompressionPlan
from tensortrain.compression.choose.budget import Budget, Measure
from tensortrain.compression.choose.goals import Goals, Sizes
from tensortrain.compression.choose.within import Planned, find_plan
from tensortrain.errors import BudgetError
from tensortrain.system.observer import Silent

FULL = 100_000


@dataclass
class Mixture:
    """A model of two halves, one with the parameters and one with the flops, each as large as a plan makes it.

    The loss is the sum of what is missing of each half, squared.
    """

    observer: Silent = field(default_factory=Silent)
    asked: list[Budget] = field(default_factory=list)

    def plan(self, budget: Budget) -> Planned:
        self.asked.append(budget)
        best: tuple[float, int, int] | None = None
        for a in range(101):
            for b in range(101):
                spent = self.amounts(a, b)
                if budget.total(lambda measure: spent[measure]) <= budget.limit:  # noqa: B023
                    best = min(best or (math.inf, 0, 0), (self.loss(a, b), a, b))
        if best is None:
            raise BudgetError("a budget must be reachable")
        loss, a, b = best
        amounts = self.amounts(a, b)
        plan = CompressionPlan((), budget.text, FULL, amounts["params"])
        return Planned(plan, loss, lambda measure: amounts[measure])

    def loss(self, a: int, b: int) -> float:
        return (1 - a / 100) ** 2 + (1 - b / 100) ** 2

    def amounts(self, a: int, b: int) -> dict[Measure, int]:
        n_params = 1000 + 900 * a + 90 * b
        return {"params": n_params, "bytes": 4 * n_params, "flops": 1000 + 90 * a + 900 * b, "time": 500 + 5 * (a + b)}

    def range_of(self, measure: Measure) -> tuple[int, int]:
        return self.amounts(0, 0)[measure], self.amounts(100, 100)[measure]


class Measured:
    """What plans give, by their parameters."""

    original_ms, original_figure, n_built = 10.0, 1.0, 0

    def __init__(self, slower_built: float = 1.0) -> None:
        self.seen: list[int] = []
        self.slower_built = slower_built

    def sketched_ms(self, plan: CompressionPlan) -> float:
        self.seen.append(plan.params_after)
        return 0.5 + plan.params_after / 10_000

    def latency_ms(self, plan: CompressionPlan) -> float:
        return self.slower_built * (0.5 + plan.params_after / 10_000)

    def figure(self, plan: CompressionPlan) -> float:
        self.seen.append(plan.params_after)
        return 1 - (1 - plan.params_after / FULL) ** 2


def goals(counted: dict[Measure, int] | None = None, **more: Any) -> Goals:
    limits = tuple(Budget(measure, limit, f"{limit} {measure}") for measure, limit in (counted or {}).items())
    return Goals(limits, "this", **more)


@pytest.mark.parametrize(
    "counted",
    [
        {"params": 40_000, "flops": 40_000},
        {"params": 60_000, "flops": 25_000},
        {"params": 30_000, "flops": 30_000, "bytes": 110_000},
        {"params": 58_494, "flops": 63_125, "bytes": 50_612},
        {"params": 41_936, "flops": 75_013, "time": 1200},
    ],
)
def test_several_limits_are_kept_at_nearly_the_least_loss(counted: dict[Measure, int]) -> None:
    planner = Mixture()
    found = find_plan(planner, goals(counted), Measured())  # type: ignore[arg-type]
    assert len(planner.asked) <= 3 + 12
    kept = [
        (planner.loss(a, b), amounts["params"])
        for a in range(101)
        for b in range(101)
        if all((amounts := planner.amounts(a, b))[measure] <= limit for measure, limit in counted.items())
    ]
    losses = [loss for loss, n_params in kept if n_params == found.params_after]
    assert losses, "a limit is not kept"
    assert min(losses) <= 1.06 * min(kept)[0]


def test_limits_that_cannot_be_kept_together_are_an_error() -> None:
    with pytest.raises(BudgetError, match="must be reachable"):
        find_plan(Mixture(), goals({"params": 99_000, "flops": 900}), Measured())  # type: ignore[arg-type]


@pytest.mark.parametrize("drop", [0.01, 0.1, 0.5])
def test_a_figure_is_halved_towards(drop: float) -> None:
    measured = Measured()
    found = find_plan(Mixture(), goals(metric_drop=drop), measured)  # type: ignore[arg-type]
    smallest = FULL * (1 - math.sqrt(drop))
    assert smallest <= found.params_after <= 1.05 * smallest
    assert len(measured.seen) <= 14  # the same plan may be asked for again, and is known then


@pytest.mark.parametrize("slower_built", [1.0, 1.1])
def test_a_time_holds_for_what_is_built(slower_built: float) -> None:
    """Models of the right shapes may be a little faster than those with the right numbers."""
    measured = Measured(slower_built)
    found = find_plan(Mixture(), goals(latency_ms=5.0), measured)  # type: ignore[arg-type]
    assert 4.3 <= measured.latency_ms(found) <= 5.0


def test_a_time_that_what_is_built_never_keeps_is_an_error() -> None:
    class Worse(Measured):
        def latency_ms(self, plan: CompressionPlan) -> float:
            return 50.0

    with pytest.raises(BudgetError, match=r"takes (50|0\.\d+) ms"):
        find_plan(Mixture(), goals(latency_ms=5.0), Worse())  # type: ignore[arg-type]


@pytest.mark.parametrize("way, params", [(1.0, 1000), (0.5, 10_000), (0.25, 31_622)])
def test_the_way_to_a_size_is_of_equal_ratios(way: float, params: int) -> None:
    asked = goals({"params": 1000, "flops": 100}, metric_drop=0.1).on_the_way(way, Sizes(100_000, 400_000, 10_000))
    assert [each.limit for each in asked.counted] == [params, round(10_000 * 0.01**way)]
    assert asked.is_measured is (way == 1.0)
