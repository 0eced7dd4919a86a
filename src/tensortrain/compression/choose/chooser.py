"""Allocation of a budget, then a check of every choice's speed."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from tensortrain.compression.choose.allocate import Option, allocate
from tensortrain.compression.choose.budget import Budget
from tensortrain.compression.choose.candidates import Candidate, Family
from tensortrain.compression.choose.cost import LayerCost, Load, spec_cost
from tensortrain.compression.choose.plan import LayerPlan
from tensortrain.compression.survey.layers import FoundLayer
from tensortrain.errors import BudgetError
from tensortrain.formats import FactorSpec, get_format

__all__ = ["Chooser", "Menu"]

_SLACK = 0.01  # of the whole model's time: what a layer may lose before it counts as slower
# What counts of a squared error where the healing is long, for a weight of full matrix rank: this share of that of the
# best form of the same size, and a little of its own. At 40x on Fashion-MNIST, after seven epochs, trains with a
# relative error of 0.8 in the two large layers ended 0.25 points above low-rank layers of the same size with an error
# of 0.2: long training makes up for any start, but not for what a narrow layer cannot pass on.
_TRAINED_ERROR, _TRAINED_OWN_ERROR = 1 / 3, 0.001

Family = tuple[Any, ...]  # format and modes: within them, higher ranks are not faster


@dataclass(frozen=True)
class Menu:
    """What can become of one layer.

    Attributes:
        load: What comes to it with one batch.
        dense: Its cost as it is.
        weight: What losing it wholly would change of the model's output.
        families: What its smaller forms are made of.
        candidates: The smaller forms.
    """

    layer: FoundLayer
    load: Load
    dense: LayerCost
    weight: float
    families: Sequence[Family] = ()
    candidates: Sequence[Candidate] = ()

    def with_candidates(self, *, growth: float, wide: bool) -> Menu:
        """The menu filled in, ranks growing by such steps."""
        found = [one for family in self.families for one in family.candidates(growth=growth, wide=wide)]
        return replace(self, candidates=found)

    def expected_errors(self, *, long_healing: bool) -> list[float]:
        """Relative squared errors of the candidates, as far as healing will leave them."""
        own = [candidate.point.rel_error**2 for candidate in self.candidates]
        if not long_healing:
            return own
        full = min(self.layer.weight.one_group().out_features, self.layer.weight.in_features)
        widths = [get_format(c.spec.format).max_matrix_rank(c.spec) / full for c in self.candidates]
        best = _running_best([candidate.point.n_params for candidate in self.candidates], own)
        return [
            (1 - width) * error + width * (_TRAINED_ERROR * least + _TRAINED_OWN_ERROR * error)
            for width, error, least in zip(widths, own, best, strict=True)
        ]


@dataclass
class Chooser:
    """Allocates, then checks every choice's speed; what fails is struck off its menu, and it goes again.

    Attributes:
        total_params: Of the whole model.
        beyond_reach: Tells who holds the parameters that no plan reaches, for a message.
        banned: Per layer, the families that are too slow from so many parameters on.
    """

    menus: Sequence[Menu]
    budget: Budget
    total_params: int
    allow_slower: bool
    long_healing: bool
    beyond_reach: Callable[[], str]
    banned: dict[str, dict[Family, int]] = field(init=False)
    known: dict[tuple[str, FactorSpec], LayerCost] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.banned = {menu.layer.name: {} for menu in self.menus}

    def choose(self) -> list[LayerPlan]:
        """One entry a layer, within the budget.

        Raises:
            BudgetError: Even the smallest forms exceed it.
        """
        while True:
            picks = self._allocate()
            slower = [] if self.allow_slower else self._slower(picks)
            if not slower:
                return [self._plan(menu, pick) for menu, pick in zip(self.menus, picks, strict=True)]
            for name, candidate in slower:
                self.banned[name][_family(candidate)] = candidate.point.n_params

    def spent(self, plans: Sequence[LayerPlan]) -> int:
        """What of the budget the plans use."""
        if self.budget.measure == "flops":
            return sum(plan.flops_after or 0 for plan in plans)
        return self.total_params - sum(plan.params_before - plan.params_after for plan in plans)

    @property
    def slower(self) -> list[str]:
        """Layers of which some form was struck off."""
        return [name for name, families in self.banned.items() if families]

    def _allocate(self) -> list[Candidate | None]:
        options = [self._options(menu) for menu in self.menus]
        try:
            picks = allocate(options, self.budget.limit - self._fixed())
        except BudgetError as error:
            raise self._unreachable(options) from error
        return [pick.choice for pick in picks]

    def _options(self, menu: Menu) -> list[Option]:
        options = [Option(self._price(menu, None), 0.0, None)]
        errors = menu.expected_errors(long_healing=self.long_healing)
        for candidate, error in zip(menu.candidates, errors, strict=True):
            if candidate.point.n_params < self.banned[menu.layer.name].get(_family(candidate), math.inf):
                options.append(Option(self._price(menu, candidate), menu.weight * error, candidate))
        return options

    def _fixed(self) -> int:
        """What the model costs outside the weights that can be chosen."""
        if self.budget.measure == "flops":
            return 0
        return self.total_params - sum(menu.layer.weight.n_params for menu in self.menus)

    def _price(self, menu: Menu, candidate: Candidate | None) -> int:
        if self.budget.measure == "params":
            return menu.layer.weight.n_params if candidate is None else candidate.point.n_params
        return (menu.dense if candidate is None else self._cost(menu, candidate)).flops or 0

    def _cost(self, menu: Menu, candidate: Candidate) -> LayerCost:
        """Milliseconds to predict, so each is predicted once."""
        key = menu.layer.name, candidate.spec
        if key not in self.known:
            self.known[key] = spec_cost(menu.layer, candidate.spec, menu.load)
        return self.known[key]

    def _slower(self, picks: Sequence[Candidate | None]) -> list[tuple[str, Candidate]]:
        slack = _SLACK * sum(menu.dense.seconds for menu in self.menus)
        return [
            (menu.layer.name, pick)
            for menu, pick in zip(self.menus, picks, strict=True)
            if pick is not None and self._cost(menu, pick).seconds > menu.dense.seconds + slack
        ]

    def _unreachable(self, options: Sequence[Sequence[Option]]) -> BudgetError:
        least = self._fixed() + sum(min(option.cost for option in each) for each in options)
        cause = ""
        if self.slower:
            cause = f" {len(self.slower)} layers would become slower (such as {self.slower[0]!r}); "
            cause += "allow_slower=True admits them."
        return BudgetError(
            f"a budget must be reachable: {self.budget.text} allows {self.budget.limit:,} {self.budget.measure}, but "
            f"the smallest that this model can be made is {least:,}.{cause}{self.beyond_reach()} "
            f"Ask for at least {least:,}."
        )

    def _plan(self, menu: Menu, pick: Candidate | None) -> LayerPlan:
        slow = "every form that fits is predicted slower at this batch size; allow_slower=True admits them"
        why = slow if self.banned[menu.layer.name] else "worth its parameters"
        dense = LayerPlan.of(menu.layer, flops=menu.dense.flops, why=why)
        if pick is None:
            return dense
        # A budget in flops is only kept if the layer really runs core by core.
        implementation = "factorized" if self.budget.measure == "flops" else "auto"
        return dense.compressed(
            pick.spec,
            flops=self._cost(menu, pick).flops,
            rel_error=pick.point.rel_error,
            implementation=implementation,
            spectra=pick.spectra,
        )


def _running_best(sizes: Sequence[int], errors: Sequence[float]) -> list[float]:
    """For every entry the least error of those that are no larger."""
    best, least = [0.0] * len(sizes), math.inf
    for k in sorted(range(len(sizes)), key=lambda k: (sizes[k], errors[k])):
        least = min(least, errors[k])
        best[k] = least
    return best


def _family(candidate: Candidate) -> Family:
    spec = candidate.spec
    return (spec.format, spec.out_modes, spec.in_modes)
