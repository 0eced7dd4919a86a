"""Spending one budget over many layers: each parameter goes where it lowers the error most.

Every layer brings a menu of options (format, modes, ranks) with a cost and an error. Minimising the sum of
errors under a budget on the sum of costs is a knapsack. Taking the steepest descent of any layer first walks
down the lower convex hulls of the menus, which is optimal up to the last step (Lagrangian duality). Where a
step no longer fits, the layer goes on with the steepest one that does, so that a single large step (such as the
one to the dense layer) does not keep it from ranks that it needs.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tensortrain.errors import BudgetError

__all__ = ["Option", "allocate", "summed"]


@dataclass(frozen=True)
class Option:
    """One way to store one layer.

    Attributes:
        cost: In the budget's unit (parameters or flops).
        loss: What the choice is predicted to cost in quality; any additive figure.
        choice: What it stands for.
    """

    cost: int
    loss: float
    choice: Any = None


def allocate(menus: Sequence[Sequence[Option]], budget: int) -> list[Option]:
    """Pick one option per menu with the least total loss found within the budget.

    Args:
        menus: At least one option each.
        budget: Largest total cost.

    Returns:
        list: One option per menu, in order.

    Raises:
        BudgetError: Even the cheapest options cost more than the budget.

    Cost: a sort of the menus; where a step no longer fits, a look at its layer's menu.
    """
    cleaned = [_efficient(menu) for menu in menus]
    smallest = sum(menu[0].cost for menu in cleaned)
    if smallest > budget:
        raise BudgetError(
            f"a budget must be reachable: the layers need at least {smallest:,}, expected at most {max(budget, 0):,}. "
            "Allow a larger budget or more formats, or exclude fewer layers."
        )
    return _descend(cleaned, budget - smallest)


def summed(menus: Sequence[Sequence[Option]]) -> list[Option]:
    """One menu of several layers that are chosen together: ``choice`` is a tuple of theirs.

    Of all sums those that walking down the menus together comes by, which hold the corners of their lower convex hull.

    Cost: a sort of all options.
    """
    cleaned = [_efficient(menu) for menu in menus]
    picks = [menu[0] for menu in cleaned]
    steps = [_steepest_steps(menu) for menu in cleaned]
    found = [_sum_of(picks)]
    while True:
        ways = [(_slope(picks[k], step), k, step) for k in range(len(picks)) if (step := steps[k].get(picks[k].cost))]
        if not ways:
            return found
        _, k, step = min(ways, key=lambda way: way[:2])
        picks[k] = step
        found.append(_sum_of(picks))


def _sum_of(picks: Sequence[Option]) -> Option:
    cost, loss = sum(pick.cost for pick in picks), sum(pick.loss for pick in picks)
    return Option(cost, loss, tuple(pick.choice for pick in picks))


def _efficient(menu: Sequence[Option]) -> list[Option]:
    """Options by rising cost, without those that cost more and lose no less."""
    kept: list[Option] = []
    for option in sorted(menu, key=lambda o: (o.cost, o.loss)):
        if not kept or option.loss < kept[-1].loss:
            kept.append(option)
    return kept


def _descend(menus: Sequence[Sequence[Option]], left: int) -> list[Option]:
    """From the cheapest options down, always by the steepest step that fits into what is left."""
    picks = [menu[0] for menu in menus]
    steps = [_steepest_steps(menu) for menu in menus]
    queue: list[tuple[float, int, Option]] = []  # one step per menu, so options are never compared

    def consider(k: int) -> None:
        step = steps[k].get(picks[k].cost)
        if step is not None and step.cost - picks[k].cost > left:
            step = _steepest(menus[k], picks[k], left)
        if step is not None:
            heapq.heappush(queue, (_slope(picks[k], step), k, step))

    for k in range(len(menus)):
        consider(k)
    while queue:
        _, k, option = heapq.heappop(queue)
        extra = option.cost - picks[k].cost
        if extra <= left:
            picks[k], left = option, left - extra
        consider(k)
    return picks


def _steepest_steps(menu: Sequence[Option]) -> dict[int, Option]:
    """For every option, by its cost, the one with the largest gain for its extra cost; none for the last.

    It is the next corner of the lower convex hull of the options from there on, so one walk backwards finds all.
    """
    steps: dict[int, Option] = {}
    hull: list[Option] = []
    for option in reversed(menu):
        while len(hull) > 1 and _slope(option, hull[-2]) < _slope(option, hull[-1]):
            hull.pop()
        if hull:
            steps[option.cost] = hull[-1]
        hull.append(option)
    return steps


def _steepest(menu: Sequence[Option], here: Option, left: int) -> Option | None:
    """The option with the largest gain for its extra cost, of those that can be paid."""
    better = [option for option in menu if here.cost < option.cost <= here.cost + left]
    return min(better, key=lambda option: _slope(here, option), default=None)


def _slope(a: Option, b: Option) -> float:
    return (b.loss - a.loss) / (b.cost - a.cost)
