"""Allocation of a budget, then a check of every choice's speed."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any, TypeAlias

import numpy as np

from tensortrain.compression.choose.allocate import Option, allocate, summed
from tensortrain.compression.choose.budget import Budget, Measure
from tensortrain.compression.choose.candidates import Candidate
from tensortrain.compression.choose.candidates import Family as Forms
from tensortrain.compression.choose.clock import Clock, Family, family_of
from tensortrain.compression.choose.cost import LayerCost, spec_cost
from tensortrain.compression.choose.head_widths import HeadWidths
from tensortrain.compression.choose.heights import AS_PREDICTED, Heights
from tensortrain.compression.choose.load import Load
from tensortrain.compression.choose.plan import (
    LayerPlan,
    Narrowed,
    NarrowedHeads,
    NarrowedRecurrent,
    NarrowedWholeHeads,
)
from tensortrain.compression.choose.recurrent_widths import RecurrentWidths
from tensortrain.compression.choose.whole_head_widths import WholeHeadWidths
from tensortrain.compression.choose.why import why_not_other
from tensortrain.compression.choose.widths import JointWidths, Width, Widths
from tensortrain.compression.survey.layers import FoundLayer
from tensortrain.errors import BudgetError
from tensortrain.formats import FactorSpec, get_format

__all__ = ["AnyWidths", "Choice", "Chooser", "Menu"]

_SLACK = 0.01  # of the whole model's time: what a layer, or all together, may lose before they count as slower
# What counts of a squared error where the healing is long, for a weight of full matrix rank: this share of that of the
# best form of the same size, and a little of its own. At 40x on Fashion-MNIST, after seven epochs, trains with a
# relative error of 0.8 in the two large layers ended 0.25 points above low-rank layers of the same size with an error
# of 0.2: long training makes up for any start, but not for what a narrow layer cannot pass on.
_TRAINED_ERROR, _TRAINED_OWN_ERROR = 1 / 3, 0.001

# Among plans of like error the fastest: the sum of squared errors may rise by this share.
_LIKE = 0.1
_STEPS = 9  # of the search for how much time may count
_CHEAPEST, _DEAREST = 1e-3, 1e2  # errors that all of the time is worth, between which it is sought
_TINY = 1e-300
_LIGHT = 0.035  # of all layers' time: which form such a layer takes hardly shows
_SPENT = 0.95  # of the budget
_ID_BYTES, _PLACE_BYTES = 8, 4  # of the number of a row that is kept, of that of a channel's place


Array: TypeAlias = "np.ndarray[Any, Any]"
Pick: TypeAlias = "Candidate | Width | None"
AnyWidths: TypeAlias = JointWidths[Any, Any]


@dataclass(frozen=True)
class Choice:
    """What becomes of the layers, and of the hidden units and attention heads between some of them."""

    layers: Sequence[LayerPlan]
    narrowed: Sequence[Narrowed] = ()
    heads: Sequence[NarrowedHeads] = ()
    recurrent: Sequence[NarrowedRecurrent] = ()
    whole_heads: Sequence[NarrowedWholeHeads] = ()


@dataclass(frozen=True)
class Menu:
    """What can become of one layer.

    Attributes:
        loads: What comes to it with one batch, at every batch size that speed is judged at.
        dense: Its cost as it is.
        weight: What losing it wholly counts.
        reach: What losing it wholly would change of the model's output, a share; None where that is not known.
        item_bytes: Of one number of its weight.
        kept_bytes: What any smaller form holds beside its parameters.
        beside: What the layer as it is holds beside its weight, which is computed: parameters and bytes.
        families: What its smaller forms are made of.
        candidates: The smaller forms.
        widths: What it can be narrowed to, together with other layers.
        heights: How often its smaller forms lose what is predicted of them.
    """

    layer: FoundLayer
    loads: tuple[Load, ...]
    dense: LayerCost
    weight: float
    families: Sequence[Forms] = ()
    candidates: Sequence[Candidate] = ()
    widths: Sequence[Width] = ()
    reach: float | None = None
    item_bytes: int = 4
    kept_bytes: int = 0
    beside: tuple[int, int] = (0, 0)
    heights: Heights = AS_PREDICTED

    @property
    def choices(self) -> tuple[Pick, ...]:
        """All that it can become; None is the layer as it is."""
        return (None, *self.candidates, *self.widths)

    def scaled(self, times: float) -> Menu:
        """The menu of a layer that loses so many times what was predicted of it."""
        return replace(self, weight=self.weight * times, reach=None if self.reach is None else self.reach * times)

    def squared_error(self, rel_error: float) -> float:
        """What a smaller form's error counts as."""
        return self.heights.of(rel_error**2)

    def with_candidates(self, *, growth: float, wide: bool) -> Menu:
        """The menu filled in, ranks growing by such steps."""
        found = [one for family in self.families for one in family.candidates(growth=growth, wide=wide)]
        return replace(self, candidates=found)

    def with_finer(self, pick: Pick, *, growth: float) -> Menu:
        """The menu with more forms of the family that was picked from: larger ones, ranks growing by such steps."""
        if not isinstance(pick, Candidate):
            return self
        finer = [
            one
            for family in self.families
            if family_of(family) == family_of(pick)
            for one in family.candidates(growth=growth)
            if one.point.n_params > pick.point.n_params
        ]
        return replace(self, candidates=[*self.candidates, *finer])

    def expected_errors(self, *, long_healing: bool) -> list[float]:
        """Relative squared errors of the candidates, as far as healing will leave them."""
        own = [self.squared_error(candidate.point.rel_error) for candidate in self.candidates]
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
        hidden: Units, and attention heads, that several layers are narrowed at together; their widths stand on the
            menus.
        banned: Per layer, the families that are too slow from so many parameters on.
        begun: What is chosen already, by layer, where a rest is spent: only forms of the same family that are larger,
            the dense layer and larger widths are looked at.
    """

    menus: Sequence[Menu]
    budget: Budget
    total_params: int
    allow_slower: bool
    long_healing: bool
    beyond_reach: Callable[[], str]
    hidden: Sequence[AnyWidths] = ()
    banned: dict[str, dict[Family, int]] = field(init=False)
    clock: Clock = field(default_factory=Clock)
    known: dict[tuple[str, FactorSpec, int], LayerCost] = field(default_factory=dict)
    total_bytes: int = 0
    picks: list[Pick] = field(default_factory=list)
    begun: Mapping[str, Pick] | None = None

    def __post_init__(self) -> None:
        self.banned = {menu.layer.name: {} for menu in self.menus}

    def choose(self) -> Choice:
        """What fits the budget.

        Raises:
            BudgetError: Even the smallest forms exceed it.
        """
        while True:
            picks = self._allocate()
            if self._may_quicken and self.begun is None:
                picks = self._quickened(picks)
            if not self._struck_off(picks):
                self.picks = picks
                layers = [self._plan(menu, pick) for menu, pick in zip(self.menus, picks, strict=True)]
                return Choice(layers, **self._narrowed(picks))

    def spend_rest(self, growth: float) -> tuple[Chooser, Choice]:
        """Go on from what was chosen in finer steps of the ranks, as far as the budget goes and nothing gets slower.

        Returns:
            The chooser that did, and its choice.
        """
        pairs = list(zip(self.menus, self.picks, strict=True))
        finer = replace(
            self,
            menus=[menu.with_finer(pick, growth=growth) for menu, pick in pairs],
            begun={menu.layer.name: pick for menu, pick in pairs},
        )
        finer.banned = {name: dict(families) for name, families in self.banned.items()}
        return finer, finer.choose()

    def _narrowed(self, picks: Sequence[Pick]) -> dict[str, list[Any]]:
        """What is narrowed together, by the fields of a choice."""
        by_name = {menu.layer.name: pick for menu, pick in zip(self.menus, picks, strict=True)}
        chosen = [(one, pick.n_units) for one in self.hidden if isinstance(pick := by_name[one.reader], Width)]
        return {
            "narrowed": [Narrowed.of(one, n) for one, n in chosen if isinstance(one, Widths)],
            "heads": [NarrowedHeads.of(one, n) for one, n in chosen if isinstance(one, HeadWidths)],
            "recurrent": [NarrowedRecurrent.of(one, n) for one, n in chosen if isinstance(one, RecurrentWidths)],
            "whole_heads": [NarrowedWholeHeads.of(one, n) for one, n in chosen if isinstance(one, WholeHeadWidths)],
        }

    def _struck_off(self, picks: Sequence[Pick]) -> bool:
        """Whether some picks are too slow, which are then banned with all larger ones of their family."""
        slower = [] if self.allow_slower else self._slower(picks)
        if self.begun is not None and slower:
            grown = self._grown(picks)
            slower = [each for each in slower if each in grown] or grown
        for menu, candidate in slower:
            self.banned[menu.layer.name][family_of(candidate)] = self._least_slow(menu, candidate)
        return bool(slower)

    def _grown(self, picks: Sequence[Pick]) -> list[tuple[Menu, Candidate]]:
        """Picks that are others than those begun with, which are never struck off."""
        assert self.begun is not None
        pairs = [(menu, one) for menu, one in zip(self.menus, picks, strict=True) if isinstance(one, Candidate)]
        return [(menu, one) for menu, one in pairs if one is not self.begun[menu.layer.name]]

    def _least_slow(self, menu: Menu, pick: Candidate) -> int:
        """Parameters from which on a family is too slow, as times at a few ranks tell; at most those of a pick."""
        family = _family(menu, pick)
        limits = self._limits(menu)
        columns = [self.clock.all(menu.layer, load, family) for load in menu.loads]
        slow = [
            one.point.n_params
            for one, times in zip(family, zip(*columns, strict=True), strict=True)
            if any(seconds > limit for seconds, limit in zip(times, limits, strict=True))
        ]
        return min(pick.point.n_params, *slow) if slow else pick.point.n_params

    def _limits(self, menu: Menu) -> list[float]:
        """Seconds that a layer may take, one a batch size."""
        return [
            self.clock.dense(menu.layer, load) + _SLACK * whole
            for load, whole in zip(menu.loads, self._whole, strict=True)
        ]

    def spent(self) -> int:
        """What of the budget is used by what was chosen."""
        return self._spent(self.picks)

    def spent_of(self, measure: Measure) -> int:
        """What was chosen uses of a measure, which need not be that of the budget."""
        pairs = zip(self.menus, self.picks, strict=True)
        return self._fixed_in(measure) + sum(self._price_in(menu, pick, measure) for menu, pick in pairs)

    def range_of(self, measure: Measure) -> tuple[int, int]:
        """The least of a measure that any choice spends, speed left aside, and what the model spends as it is."""
        prices = [[self._price_in(menu, each, measure) for each in menu.choices] for menu in self.menus]
        fixed = self._fixed_in(measure)
        return fixed + sum(map(min, prices)), fixed + sum(each[0] for each in prices)

    @property
    def loss(self) -> float:
        """What was chosen is predicted to cost in quality."""
        return self._loss(self.picks)

    @property
    def slower(self) -> list[str]:
        """Layers of which some form was struck off."""
        return [name for name, families in self.banned.items() if families]

    # -- allocation ----------------------------------------------------------------------------------

    def _allocate(self, price_of_time: float = 0.0) -> list[Pick]:
        options = [self._joint(group, price_of_time) for group in self._groups]
        try:
            found = allocate(options, self.budget.limit - self._fixed())
        except BudgetError as error:
            raise self._unreachable(options) from error
        picks: list[Pick] = [None] * len(self.menus)
        for group, option in zip(self._groups, found, strict=True):
            for k, pick in zip(group, option.choice, strict=True):
                picks[k] = pick
        return picks

    @cached_property
    def _groups(self) -> list[tuple[int, ...]]:
        """Places of the menus that are chosen from together."""
        places = {menu.layer.name: k for k, menu in enumerate(self.menus)}
        together = [tuple(places[name] for name in one.names) for one in self.hidden]
        taken = {k for group in together for k in group}
        return [*together, *((k,) for k in range(len(self.menus)) if k not in taken)]

    def _joint(self, group: Sequence[int], price_of_time: float) -> list[Option]:
        """What can become of some layers: a form for each, or one width for all."""
        menus = [self.menus[k] for k in group]
        apart = [self._options(k, menu, price_of_time) for k, menu in zip(group, menus, strict=True)]
        if len(group) == 1:
            return [Option(option.cost, option.loss, (option.choice,)) for option in apart[0]]
        n = len(menus[0].widths)
        costs, losses = _summed(self._costs, group, n), _summed(self._losses, group, n)
        if price_of_time:
            losses = losses + price_of_time * _summed(self._times, group, n)
        at_widths = zip(costs, losses, zip(*(menu.widths for menu in menus), strict=True), strict=True)
        together = [Option(int(cost), float(loss), each) for cost, loss, each in at_widths][self._least_width(group) :]
        return [*summed(apart), *together] if self._is_apart(group) else together

    def _is_apart(self, group: Sequence[int]) -> bool:
        """Whether the layers of a group may have a form each."""
        return self.begun is None or not isinstance(self.begun[self.menus[group[0]].layer.name], Width)

    def _least_width(self, group: Sequence[int]) -> int:
        """Place of the least width of a group that may be taken."""
        menu = self.menus[group[0]]
        if self.begun is None:
            return 0
        pick = self.begun[menu.layer.name]
        return menu.widths.index(pick) if isinstance(pick, Width) else len(menu.widths)

    def _options(self, k: int, menu: Menu, price_of_time: float) -> list[Option]:
        """The forms of a layer that are not banned, by rising cost, without those that cost more and lose no less."""
        costs, losses = self._costs[k], self._losses[k]
        if price_of_time:
            losses = losses + price_of_time * self._times[k]
        allowed = self._allowed(k, menu)
        order = allowed[np.lexsort((losses[allowed], costs[allowed]))]
        falling = losses[order]
        least = np.minimum.accumulate(falling)
        order = order[np.concatenate([[True], falling[1:] < least[:-1]])]
        choices = menu.choices
        return [Option(int(costs[n]), float(losses[n]), choices[n]) for n in order]

    def _allowed(self, k: int, menu: Menu) -> Array:
        """Places of the forms that are not banned: 0 is the dense layer, candidate n is 1 + n."""
        banned = self.banned[menu.layer.name]
        places = range(len(menu.candidates))
        if banned:
            sizes = [(c.point.n_params, banned.get(family_of(c), math.inf)) for c in menu.candidates]
            places = [n for n, (size, limit) in enumerate(sizes) if size < limit]  # type: ignore[assignment]
        if self.begun is None:
            return np.array([0, *(1 + n for n in places)])
        pick = self.begun[menu.layer.name]
        if not isinstance(pick, Candidate):
            return np.array([0])
        larger = {id(one) for one in _family(menu, pick) if one.point.n_params > pick.point.n_params}
        begun = next(n for n, one in enumerate(menu.candidates) if one is pick)
        return np.array([0, 1 + begun, *(1 + n for n in places if id(menu.candidates[n]) in larger)])

    @cached_property
    def _costs(self) -> list[Array]:
        """Of every form in the budget's unit, by menu and place."""
        return [np.array([self._price(menu, each) for each in menu.choices]) for menu in self.menus]

    @cached_property
    def _losses(self) -> list[Array]:
        """What every form is predicted to cost in quality, by menu and place."""
        return [menu.weight * np.array(self._errors(menu)) for menu in self.menus]

    def _errors(self, menu: Menu) -> list[float]:
        expected = menu.expected_errors(long_healing=self.long_healing)
        return [0.0, *expected, *(width.error for width in menu.widths)]

    # -- speed ---------------------------------------------------------------------------------------

    @property
    def _may_quicken(self) -> bool:
        """Whether speed decides between plans of like error: for a budget in size alone, where the inputs are known."""
        known = all(load.seen for menu in self.menus for load in menu.loads)
        of_size = {"params", "bytes"}.issuperset(self.budget.measures)
        return of_size and not self.allow_slower and not self.long_healing and known

    def _quickened(self, picks: list[Pick]) -> list[Pick]:
        """The fastest picks found that spend about as much and whose predicted error is about that of these."""
        most, least = (1 + _LIKE) * self._loss(picks), min(self._spent(picks), _SPENT * self.budget.limit)
        low, high = math.log(_CHEAPEST * most + _TINY), math.log(_DEAREST * most + _TINY)  # of what time is worth
        for _ in range(_STEPS):
            middle = (low + high) / 2
            found = self._allocate(math.exp(middle))
            if self._loss(found) <= most and self._spent(found) >= least:
                low = middle
                picks = found if self._share(found) < self._share(picks) else picks
            else:
                high = middle
        return picks

    def _spent(self, picks: Sequence[Pick]) -> int:
        return self._fixed() + sum(self._price(menu, pick) for menu, pick in zip(self.menus, picks, strict=True))

    def _loss(self, picks: Sequence[Pick]) -> float:
        return sum(float(self._losses[k][self._places[id(pick)]]) for k, pick in enumerate(picks))

    def _share(self, picks: Sequence[Pick]) -> float:
        """Of the time of all layers as they are, the mean over the batch sizes."""
        return sum(float(self._times[k][self._places[id(pick)]]) for k, pick in enumerate(picks))

    @cached_property
    def _places(self) -> dict[int, int]:
        return {id(choice): n for menu in self.menus for n, choice in enumerate(menu.choices)}

    @cached_property
    def _times(self) -> list[Array]:
        """Of every form by menu and place: its share of all layers' time as they are, the mean over batch sizes."""
        return [self._shares_of(menu) for menu in self.menus]

    def _shares_of(self, menu: Menu) -> Array:
        pairs = zip(menu.loads, self._whole, strict=True)
        found: Array = np.mean([np.array(self._seconds(menu, load, whole)) / whole for load, whole in pairs], axis=0)
        return found

    def _seconds(self, menu: Menu, load: Load, whole: float) -> list[float]:
        """Of the dense layer and all candidates, close enough to compare plans by; picks are looked at again."""
        dense = self.clock.dense(menu.layer, load)
        is_light = dense < _LIGHT * whole
        timed = self.clock.all(menu.layer, load, menu.candidates, roughly=True if is_light else None)
        return [dense, *timed, *(dense * width.seconds for width in menu.widths)]

    @cached_property
    def _whole(self) -> list[float]:
        """Seconds of all layers as they are, one a batch size."""
        return [
            sum(self.clock.dense(menu.layer, menu.loads[n]) for menu in self.menus)
            for n in range(min((len(menu.loads) for menu in self.menus), default=0))
        ]

    def _slower(self, picks: Sequence[Pick]) -> list[tuple[Menu, Candidate]]:
        """Picks that lose more than a little of the model's time; where only all together do, the worst of them."""
        chosen = [(menu, pick) for menu, pick in zip(self.menus, picks, strict=True) if isinstance(pick, Candidate)]
        losses = [self._lost_s(menu, pick) for menu, pick in chosen]
        whole = self._whole
        slower = [
            each
            for each, lost in zip(chosen, losses, strict=True)
            if any(one > _SLACK * total for one, total in zip(lost, whole, strict=True))
        ]
        together = [sum(column) for column in zip(*losses, strict=True)]
        if slower or not any(lost > _SLACK * total for lost, total in zip(together, whole, strict=False)):
            return slower
        shares = [max(one / total for one, total in zip(lost, whole, strict=True)) for lost in losses]
        worst = max(range(len(chosen)), key=lambda k: shares[k])
        return [chosen[worst]]

    def _lost_s(self, menu: Menu, pick: Candidate) -> list[float]:
        """Seconds that a pick takes more than the dense layer, one a batch size."""
        family = _family(menu, pick)
        return [
            self.clock.exact(menu.layer, pick, load, family) - self.clock.dense(menu.layer, load) for load in menu.loads
        ]

    # -- costs ---------------------------------------------------------------------------------------

    def _fixed(self) -> int:
        """What the model costs outside the weights that can be chosen."""
        return self.budget.total(self._fixed_in)

    def _fixed_in(self, measure: Measure) -> int:
        if measure in ("flops", "time"):
            return 0
        total = self.total_params if measure == "params" else self.total_bytes
        return total - sum(self._price_in(menu, None, measure) for menu in self.menus)

    def _price(self, menu: Menu, pick: Pick) -> int:
        return self.budget.total(partial(self._price_in, menu, pick))

    def _price_in(self, menu: Menu, pick: Pick, measure: Measure) -> int:
        if measure == "flops":
            return self._flops(menu, pick) or 0
        if measure == "time":
            return self._nanoseconds(menu)[id(pick)]
        n_params = _n_params(menu, pick)
        if measure == "params":
            return n_params + (menu.beside[0] if pick is None else 0)
        return n_params * menu.item_bytes + self._bytes_beside(menu, pick)

    def _bytes_beside(self, menu: Menu, pick: Pick) -> int:
        """What a layer holds beside its numbers."""
        if isinstance(pick, Candidate):
            return menu.kept_bytes + _ID_BYTES * len(pick.hot_ids) + _PLACE_BYTES * pick.order.n_numbers
        return menu.beside[1] if pick is None else pick.index_bytes

    def _flops(self, menu: Menu, pick: Pick) -> int | None:
        if isinstance(pick, Candidate):
            return self._cost(menu, pick).flops
        share = 1.0 if pick is None else pick.share
        return None if menu.dense.flops is None else round(share * menu.dense.flops)

    def _nanoseconds(self, menu: Menu) -> dict[int, int]:
        """Of every form of a layer, by its id, for one batch of the first size that speed is judged at."""
        if menu.layer.name not in self._known_ns:
            seconds = self._seconds(menu, menu.loads[0], self._whole[0])
            self._known_ns[menu.layer.name] = {
                id(form): math.ceil(1e9 * one) for form, one in zip(menu.choices, seconds, strict=True)
            }
        return self._known_ns[menu.layer.name]

    @cached_property
    def _known_ns(self) -> dict[str, dict[int, int]]:
        return {}

    def _cost(self, menu: Menu, candidate: Candidate) -> LayerCost:
        """Milliseconds to predict, so each is predicted once."""
        key = menu.layer.name, candidate.spec, len(candidate.hot_ids)
        if key not in self.known:
            self.known[key] = spec_cost(menu.layer, candidate.spec, menu.loads[0], n_hot=len(candidate.hot_ids))
        return self.known[key]

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

    def _plan(self, menu: Menu, pick: Pick) -> LayerPlan:
        found, n = self._planned(menu, pick), menu.beside[0]
        after = found.params_after + n if pick is None else found.params_after
        return replace(found, params_before=found.params_before + n, params_after=after) if n else found

    def _planned(self, menu: Menu, pick: Pick) -> LayerPlan:
        slow = "every form that fits is predicted slower at this batch size; allow_slower=True admits them"
        why = slow if self.banned[menu.layer.name] else "worth its parameters"
        dense = LayerPlan.of(menu.layer, flops=menu.dense.flops, why=why)
        if pick is None:
            return dense
        if isinstance(pick, Width):
            loss = menu.reach * pick.error if menu.reach is not None and (pick.reads or pick.judges) else None
            return dense.narrowed(pick, flops=self._flops(menu, pick), loss=loss)
        # A budget in flops is only kept if the layer really runs core by core.
        implementation = "factorized" if "flops" in self.budget.measures else "auto"
        return dense.compressed(
            pick.spec,
            flops=self._flops(menu, pick),
            rel_error=pick.point.rel_error,
            implementation=implementation,
            spectra=pick.spectra,
            hot_ids=pick.hot_ids,
            in_order=pick.order.inputs or (),
            out_order=pick.order.outputs or (),
            loss=menu.reach * menu.squared_error(pick.point.rel_error) if menu.reach is not None else None,
            why=why_not_other(
                pick,
                menu.candidates,
                dense_params=menu.layer.weight.n_params,
                reach=menu.reach,
                squared=menu.squared_error,
            ),
        )


def _running_best(sizes: Sequence[int], errors: Sequence[float]) -> list[float]:
    """For every entry the least error of those that are no larger."""
    best, least = [0.0] * len(sizes), math.inf
    for k in sorted(range(len(sizes)), key=lambda k: (sizes[k], errors[k])):
        least = min(least, errors[k])
        best[k] = least
    return best


def _summed(columns: Sequence[Array], group: Sequence[int], n: int) -> Array:
    """Of the last n entries, which stand for widths."""
    found: Array = np.sum([columns[k][-n:] for k in group], axis=0)
    return found


def _n_params(menu: Menu, pick: Pick) -> int:
    if pick is None:
        return menu.layer.weight.n_params
    return pick.n_params if isinstance(pick, Width) else pick.point.n_params


def _family(menu: Menu, pick: Candidate) -> list[Candidate]:
    """The candidates of a layer that differ from one in their ranks alone."""
    return [one for one in menu.candidates if family_of(one) == family_of(pick)]
