"""From a model and a budget to a plan; nothing is changed."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tensortrain._version import __version__
from tensortrain.compression.choose.beyond_reach import (
    nothing_to_compress,
    unspent_note,
    what_stands_in_the_way,
)
from tensortrain.compression.choose.budget import Budget, BudgetLike, Measure, read_budget
from tensortrain.compression.choose.candidates import (
    DEFAULT_FORMATS,
    factoring,
    families,
    formats_worth_trying,
    least_params,
)
from tensortrain.compression.choose.chooser import AnyWidths, Choice, Chooser, Menu
from tensortrain.compression.choose.clock import Clock
from tensortrain.compression.choose.cost import dense_cost
from tensortrain.compression.choose.folder import Folder
from tensortrain.compression.choose.goals import Goals, Sizes, read_goals
from tensortrain.compression.choose.load import loads_of
from tensortrain.compression.choose.options import PlanOptions
from tensortrain.compression.choose.plan import CompressionPlan, n_saved
from tensortrain.compression.choose.proving import Proving
from tensortrain.compression.choose.remeasured import Seen, spent_again
from tensortrain.compression.choose.structure import Search
from tensortrain.compression.choose.together import widths_together
from tensortrain.compression.choose.tried import tried
from tensortrain.compression.choose.weights import carried, weigh_layers
from tensortrain.compression.choose.widths import Width
from tensortrain.compression.choose.within import Planned, find_plan
from tensortrain.compression.opened import Opened, opened_for_a_while
from tensortrain.compression.proof import apply_proven
from tensortrain.compression.report.alone import loss_together, losses_alone
from tensortrain.compression.survey.calibrate import are_many, are_parked, calibrate
from tensortrain.compression.survey.layers import FoundLayer, LeftAlone, check_module, count_params, find_layers
from tensortrain.compression.survey.moments import Calibration, LayerMoments
from tensortrain.compression.survey.task import FIRST, first_with_example, task_on_batch
from tensortrain.errors import BudgetError, TTError
from tensortrain.system.checkpoint import start_signature
from tensortrain.system.observer import Observer, Silent
from tensortrain.system.offloading import let_go_of_weights
from tensortrain.system.parking import are_large, let_go, memory_given_back, memory_reused
from tensortrain.system.processes import first_of, n_processes, together
from tensortrain.system.storage import count_bytes
from tensortrain.train.batches import device_of, length_of, take, tensors_in, to_device
from tensortrain.train.evaluation import Evaluate
from tensortrain.train.outputs import Output
from tensortrain.train.preserve import uncompiled
from tensortrain.train.task import Task, TaskName

__all__ = ["check_reachable", "make_plan", "make_plans", "plan_compression"]

# Exponent on a layer's weight when the model is healed: at 80x on Fashion-MNIST, after one epoch, 0.5 gave 90.5 %,
# 1 gave 88.8 % and 0 gave 90.0 %.
_HEALED_REACH = 0.5
# Rank steps to plan with, as shares of the rank: the coarse ones mostly spend the whole budget. In a model with one
# large layer they can leave several per cent of it, and planning is done again with the fine ones.
_GROWTHS = (0.08, 0.01)
_SPENT = 0.95
# What is still left is spent on larger forms of what was chosen, in steps that give round ranks, then in any.
_FINER = (0.02, 0.0)
_ALL_BUT = 0.005
_HELD_BATCHES = 2  # that losses are measured on
_FLOPS_NOT_KNOWN_YET = 10**15


def plan_compression(
    model: nn.Module,
    *,
    budget: BudgetLike,
    data: Iterable[Any] | None = None,
    example_inputs: Any = None,
    formats: Sequence[str] = DEFAULT_FORMATS,
    include: Sequence[str] | str | None = None,
    exclude: Sequence[str] | str | None = None,
    allow_slower: bool = False,
    batch_size: int | None = None,
    n_batches: int = 16,
    will_heal: bool | Literal["long"] = False,
    task: TaskName | Task | None = None,
    output: Output | None = None,
    evaluate: Evaluate | None = None,
    search: Search | None = None,
    observer: Observer | None = None,
    work_dir: str | Path | None = None,
    measure_losses: bool = False,
) -> CompressionPlan:
    """Choose format, modes and ranks of every layer so that the model fits a budget. Changes nothing.

    Every layer brings a menu of candidates with their predicted errors, weighted by the second moments of
    its inputs and by how far the error reaches the model's output where ``data`` is given. One allocation
    over all menus then spends the budget where it lowers the error most.

    Args:
        model: Any module; a bare layer too.
        budget: ``"20x"``, a share, or a dict with one or several of these, which then all hold:

            - ``"params"``: every parameter of the model counts, shared ones once.
            - ``"flops"``: per example, of the layers that can be factorized.
            - ``"bytes"``: parameters and buffers at the size of their dtype, what shares memory once. Weights keep
              their dtype.
            - ``"latency_ms"`` with ``"batch_size"`` (1): measured. Plans are built and timed until the one of least
              predicted loss is found that takes no longer; time is spent where it lowers the error most.
            - ``"max_metric_drop"``: by how much the figure of ``evaluate`` may fall, in its own unit (0.01 of an
              accuracy in [0, 1] is a point). It is measured before any healing, once for every plan that is tried.
              Alone, it asks for the smallest model; beside other limits it has to hold as well.
        data: Calibration batches, as for training (labels are not used).
        example_inputs: A batch to take shapes from, when there is no ``data``.
        formats: Names to choose among; ``"narrow"`` is fewer hidden units, of layers that stay dense. To be asked for:
            ``"recurrent"``, the same of recurrent layers; ``"whole_heads"``, fewer attention heads; ``"heads"``, fewer
            directions of these, or rotary pairs.
        include, exclude: Layer names or fnmatch patterns.
        allow_slower: Take candidates that are slower than the dense layer. Without it a layer, and all together, may
            lose at most 1 % of the whole model's time, and of plans of like error (within 5 %) the fastest is taken.
            Times are predicted; those of convolutions are measured, once on every machine.
        batch_size: Examples to judge speed at; by default the batch size of the data, and one.
        will_heal: The model will be fine-tuned afterwards. Training makes up for errors where they reach far
            more than where they do not, so layers are then weighed more alike (by the square root). ``"long"``, for
            several passes over the training data, prefers forms of high matrix rank over those of small error.
        task: What the model gives: ``"classify"``, ``"multi-label"``, ``"regress"``, ``"causal-lm"``, ``"seq2seq"`` or
            ``"embed"``; found out from the data when None. The plan says which.
        output: What the model is judged by: the name or number of one of its outputs, a callable on what it returns, or
            one on ``(model, batch)``; all tensors that it returns when None.
        evaluate: ``model -> figure``, larger for better models; for ``"max_metric_drop"``.
        search: ``"structure"`` also looks through more mode shapes, and through orders of the channels of linear
            layers, by which such a layer gathers. It takes seconds to a minute for a layer; None is the usual menu.
        work_dir: Folder for what takes long: statistics of the layers, and what their menus are made of. After a kill
            the same call goes on from there and gives the same plan, as does one with another budget.
        measure_losses: Carry the plan out on a copy of the model, measure what each change spoils by itself on two
            further batches of ``data`` (those seen before where there are no more), and plan again with what was seen,
            up to three times; the plan that spoils least in all is taken. It takes a copy of the model, and as long
            as that many compressions. For a budget in one size; in several processes it is left out.

    Returns:
        CompressionPlan: Print it, save it as JSON, or hand it to ``apply_plan_``.

    Raises:
        BudgetError: The budget cannot be read or not be reached; the message says what was.
        FilterError: A pattern matches no layer.
        NonFiniteError: A weight holds NaN or Inf.

    Cost: one pass forward over ``n_batches``, forward and backward over six of them, some ten passes over one batch or
        less; then an eigenvalue problem of each layer's smaller side, and of layers that other formats may suit their
        decompositions. The observer is told of every batch and layer, with the seconds that a layer took. Of a large
        model no more is held than its weights and what one layer needs: large weights are offered low rank alone.
    """
    return make_plan(
        model,
        PlanOptions(
            budget=budget,
            data=data,
            example_inputs=example_inputs,
            formats=formats,
            include=include,
            exclude=exclude,
            allow_slower=allow_slower,
            batch_size=batch_size,
            n_batches=n_batches,
            will_heal=will_heal,
            task=task,
            output=output,
            evaluate=evaluate,
            search=search,
            observer=observer or Silent(),
            work_dir=work_dir,
            measure_losses=measure_losses,
        ),
    )


def make_plan(model: nn.Module, options: PlanOptions) -> CompressionPlan:
    """``plan_compression`` with its keywords as one record."""
    return make_plans(model, options, [options.budget])[0]


def make_plans(model: nn.Module, options: PlanOptions, budgets: Sequence[BudgetLike]) -> list[CompressionPlan]:
    """A plan for each of several budgets, from one calibration; ``options.budget`` is not looked at.

    Raises:
        BudgetError: One of them cannot be read or reached.
    """
    with together():
        check_module(model)
        model = uncompiled(model)
        asked = [_read(model, each, options) for each in budgets]  # before anything that takes long
        options = _adapted(options, asked)
        whole = list(model.parameters())
        with memory_given_back(whole), memory_reused(whole), opened_for_a_while(model) as opened:
            planning = _surveyed(opened, options, budgets)
        planning.opened, planning.left = opened.names, opened.left_alone(planning.left)
        return [_agreed(partial(planning.find, model, each), planning.calibration) for each in budgets]


def _agreed(find: Callable[[], CompressionPlan], calibration: Calibration | None) -> CompressionPlan:
    """The plan of the first of several processes: what was timed may differ from one to the other."""
    if n_processes() == 1:
        return find()
    found: CompressionPlan | TTError
    try:
        found = replace(find(), calibration=None)
    except TTError as error:
        found = error
    found = first_of(found)
    if isinstance(found, TTError):
        raise found
    return replace(found, calibration=calibration)


def _read(model: nn.Module, budget: BudgetLike, options: PlanOptions) -> Goals:
    """What shapes alone tell about a budget, the flops aside."""
    can_run = options.data is not None or options.example_inputs is not None
    now = replace(_sizes(model), flops=_FLOPS_NOT_KNOWN_YET if can_run else None)
    return _goals(budget, now, options)


def _goals(budget: BudgetLike, now: Sizes, options: PlanOptions) -> Goals:
    can_run = options.data is not None or options.example_inputs is not None
    goals = read_goals(
        budget, now, can_evaluate=options.evaluate is not None, can_run=can_run, batch_size=options.batch_size
    )
    return goals.on_the_way(options.way, now)


def _sizes(model: nn.Module) -> Sizes:
    return Sizes(count_params(model), count_bytes((*model.parameters(), *model.buffers())))


def _adapted(options: PlanOptions, asked: Sequence[Goals]) -> PlanOptions:
    """Speed is judged at the batch size of the budget; what is measured before healing is not planned for after it."""
    sizes = {goals.batch_size for goals in asked if goals.latency_ms is not None}
    if len(sizes) > 1:
        raise BudgetError(
            f"budgets of one calibration must be timed at one batch size: found {sorted(sizes)}. Plan each by itself."
        )
    judged = any(goals.metric_drop is not None for goals in asked)
    batch_size = next(iter(sizes), options.batch_size)
    return replace(options, batch_size=batch_size, will_heal=False if judged else options.will_heal)


def _surveyed(opened: Opened, options: PlanOptions, budgets: Sequence[BudgetLike]) -> Planning:
    """What all plans of a model have in common; its layers of several maps stand apart."""
    model, beside = opened.model, opened.beside
    layers, left = _layers(model, options, budgets)
    task, data = _task(model, options)
    folder = _folder(model, layers, data, task, options)
    calibration = _calibration(model, layers, data, task, options, folder)
    menus = _menus(model, layers, calibration, options)
    menus = [replace(menu, beside=beside.get(menu.layer.name, (0, 0))) for menu in menus]
    hidden = widths_together(model, layers, calibration, options, folder)
    flops = sum(menu.dense.flops or 0 for menu in menus) if calibration is not None else None
    now = replace(_sizes(model).with_more(beside.values()), flops=flops)
    for each in budgets:
        _goals(each, now, options)  # flops are known by now
    menus, carry = _with_families(menus, hidden, calibration, options, folder, wide=options.will_heal == "long")
    menus, unseen = _weighed(menus, calibration, carry, options)
    return Planning(
        options,
        now,
        tried(model, menus, hidden, calibration, task, options),
        hidden,
        calibration,
        task,
        partial(what_stands_in_the_way, model, layers, left),
        opened=tuple(opened.names),
        beside=beside,
        left=opened.left_alone(left),
        notes=(*(task.notes if task else ()), *(calibration.notes if calibration else ()), *unseen, *opened.notes),
    )


@dataclass
class Planning:
    """What plans of one model are made from, whatever their budget.

    Attributes:
        now: What the model has.
        menus: With their families.
        hidden: Units and attention heads that can be narrowed at.
        task: How the model is judged.
        beyond_reach: Tells who holds the parameters that no plan reaches.
        opened, left: Layers of several maps and of computed weights, and what is left alone.
        beside: What the latter hold more than their weights, in parameters and bytes.
        notes: On what was not seen.
        made: Plans by their limits; ``slower`` names the layers whose larger forms were struck off for each.
    """

    options: PlanOptions
    now: Sizes
    menus: Sequence[Menu]
    hidden: Sequence[AnyWidths]
    calibration: Calibration | None
    task: Task | None
    beyond_reach: Callable[[], str]
    opened: Sequence[str] = ()
    beside: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    left: Sequence[LeftAlone] = ()
    notes: tuple[str, ...] = ()
    clock: Clock = field(default_factory=Clock)
    filled: dict[float, list[Menu]] = field(default_factory=dict)
    made: dict[Budget, Planned] = field(default_factory=dict)
    slower: dict[Budget, list[str]] = field(default_factory=dict)

    @property
    def observer(self) -> Observer:
        return self.options.observer

    def find(self, model: nn.Module, budget: BudgetLike) -> CompressionPlan:
        """A plan that holds a budget; the model is built where it takes measuring."""
        goals = _goals(budget, self.now, self.options)
        if goals.is_measured or len(goals.counted) > 1:
            return replace(find_plan(self, goals, self._proving(model, goals)), budget=goals.text)
        (limit,) = goals.counted
        measured, note = self._measured(model, limit)
        return measured._within(limit, (note,) if note else ())

    def _within(self, limit: Budget, notes: tuple[str, ...]) -> CompressionPlan:
        found, full = self.plan(limit), {"params": self.now.params, "bytes": self.now.n_bytes}
        note = unspent_note(
            limit,
            found.spent(limit.measure),
            full=full.get(limit.measure, self.now.flops or 0),
            slower=self.slower[limit],
            is_exact=found.loss == 0,
        )
        notes = (*found.plan.notes, *notes, *((note,) if note else ()))
        return replace(found.plan, notes=notes)

    def _measured(self, model: nn.Module, limit: Budget) -> tuple[Planning, str]:
        """The same with menus scaled by losses that were measured, and what to say of it; unchanged without these."""
        batches = self._batches_to_measure_by()
        if not batches:
            return self, ""
        made: dict[tuple[Any, ...], Planning] = {(): self}

        def plans(times: Mapping[str, float], usual: float) -> CompressionPlan:
            return made.setdefault((*times.items(), usual), self._scaled(times, usual)).plan(limit).plan

        def look(plan: CompressionPlan) -> Seen:
            how: dict[str, Any] = {"batches": batches}
            parks = are_large(model.parameters())
            built, plan, _ = apply_proven(model, plan, inplace=False, observer=Silent(), parks=parks)
            asked = model, built, plan, self.options.output, self.task
            return Seen(loss_together(*asked, **how), losses_alone(*asked, **how))

        times, usual, spoiled = spent_again(plans, self.plan(limit).plan, look)
        best = made[(*times.items(), usual) if times else ()]
        if best is self:
            return self, ""
        said = f"it spoils {min(spoiled):.3g} of the output there, the plan by predictions alone {spoiled[0]:.3g}"
        return best, f"Losses of the layers were measured on {len(batches)} batches held back: {said}."

    def _batches_to_measure_by(self) -> Sequence[Any]:
        found = self.calibration
        asked = self.options.measure_losses and found is not None and bool(found.output_grams)
        if not asked or found is None or n_processes() > 1:
            return ()
        return found.held or found.batches

    def _scaled(self, times: Mapping[str, float], usual: float) -> Planning:
        menus = [menu.scaled(times.get(menu.layer.name, usual)) for menu in self.menus]
        return replace(self, menus=menus, filled={}, made={}, slower={})

    def plan(self, budget: Budget) -> Planned:
        """The best plan within one limit.

        Raises:
            BudgetError: There is none.
        """
        if budget not in self.made:
            chooser, choice = self._spend(budget)
            self.made[budget] = Planned(self._as_plan(budget, choice), chooser.loss, chooser.spent_of)
            self.slower[budget] = chooser.slower
        return self.made[budget]

    def range_of(self, measure: Measure) -> tuple[int, int]:
        """The least that any plan spends of a measure, and what the model spends as it is."""
        return self._chooser(_GROWTHS[0], Budget(measure, 0, "")).range_of(measure)

    def _spend(self, budget: Budget) -> tuple[Chooser, Choice]:
        """Choose, in finer steps of the ranks where coarse ones leave some of one size."""
        for growth in _GROWTHS:
            chooser = self._chooser(growth, budget)
            choice = chooser.choose()
            if chooser.spent() >= _SPENT * budget.limit or budget.rates or budget.measure == "time":
                break
        if budget.rates or budget.measure == "time":
            return chooser, choice
        for growth in _FINER:
            if chooser.spent() < (1 - _ALL_BUT) * budget.limit:
                chooser, choice = chooser.spend_rest(growth)
        return chooser, choice

    def _chooser(self, growth: float, budget: Budget) -> Chooser:
        long = self.options.will_heal == "long"
        if growth not in self.filled:
            self.filled[growth] = [menu.with_candidates(growth=growth, wide=long) for menu in self.menus]
        return Chooser(
            self.filled[growth],
            budget,
            self.now.params,
            self.options.allow_slower,
            long,
            self.beyond_reach,
            self.hidden,
            clock=self.clock,
            total_bytes=self.now.n_bytes,
        )

    def _as_plan(self, budget: Budget, choice: Choice) -> CompressionPlan:
        task, total = self.task, self.now.params
        plan = CompressionPlan(
            tuple(choice.layers),
            budget.text,
            total,
            total - n_saved(choice.layers, choice.narrowed),
            tuple(self.left),
            self.calibration,
            str(task) if task else "",
            task.outputs if task else (),
            self.notes,
            narrowed=tuple(choice.narrowed),
            heads=tuple(choice.heads),
            recurrent=tuple(choice.recurrent),
            whole_heads=tuple(choice.whole_heads),
        )
        return plan.with_opened(self.opened, self.left, {name: n for name, (n, _) in self.beside.items()})

    def _proving(self, model: nn.Module, goals: Goals) -> Proving:
        calibration, batch = self.calibration, self.options.example_inputs
        if batch is None and calibration is not None and calibration.batches:
            batch = calibration.batches[0]
        with_labels = calibration is not None and calibration.with_labels
        return Proving(model, self.options.evaluate, batch, goals.batch_size, with_labels, self.observer)


def _layers(
    model: nn.Module, options: PlanOptions, budgets: Sequence[BudgetLike]
) -> tuple[list[FoundLayer], list[LeftAlone]]:
    """What can be compressed and what is left alone; what shapes alone tell against the budgets is raised."""
    layers, left = find_layers(model, include=options.include, exclude=options.exclude)
    if not layers:
        raise nothing_to_compress(model, left)
    if options.data is not None or options.example_inputs is not None:
        for each in budgets:  # before the passes over the data
            _check_goals(model, layers, _read(model, each, options), options.formats, options.search)
    return layers, left


def _menus(
    model: nn.Module, layers: Sequence[FoundLayer], calibration: Calibration | None, options: PlanOptions
) -> list[Menu]:
    """What each layer costs; what it counts, and its candidates, are still to come."""
    loads = [loads_of(layer, calibration, options.batch_size, model) for layer in layers]
    costs = [dense_cost(layer, load[0]) for layer, load in zip(layers, loads, strict=True)]
    return [
        Menu(layer, load, cost, weight=1.0, item_bytes=_item_bytes(layer), kept_bytes=_kept_bytes(layer))
        for layer, load, cost in zip(layers, loads, costs, strict=True)
    ]


def _weighed(
    menus: Sequence[Menu], calibration: Calibration | None, carry: Mapping[str, float], options: PlanOptions
) -> tuple[list[Menu], list[str]]:
    """Menus with what each layer counts, and notes on what was not seen.

    Args:
        carry: What each layer carries of the output.
    """
    reach = _HEALED_REACH if options.will_heal else 1.0
    layers = [menu.layer for menu in menus]
    weights, unseen = weigh_layers(layers, calibration, carry, narrowed=options.output is not None)
    known = calibration is not None and bool(calibration.output_grams)
    pairs = [(menu, weights[menu.layer.name]) for menu in menus]
    return [replace(menu, weight=one**reach, reach=one if known else None) for menu, one in pairs], unseen


def _folder(
    model: nn.Module, layers: Sequence[FoundLayer], data: object, task: Task | None, options: PlanOptions
) -> Folder:
    """Where what is found is kept, with what it depends on."""
    if options.work_dir is None:
        return Folder(None, {}, torch.zeros(0, 2), options.observer)
    first = start_signature(tensors_in(data[:1])) if isinstance(data, (list, tuple)) else length_of(data)
    settings = {
        "version": __version__,
        "layers": [(layer.name, layer.weight, layer.head is not None) for layer in layers],
        "data": first if not isinstance(first, Tensor) else first.tolist(),
        "task": task,
        **{name: getattr(options, name) for name in ("n_batches", "formats", "will_heal", "search")},
        "output": getattr(options.output, "__qualname__", options.output),
    }
    folder = Folder(Path(options.work_dir), settings, start_signature(model.parameters()), options.observer)
    let_go(*model.parameters())
    folder.begin()
    return folder


def _widths_on(menu: Menu, hidden: Sequence[AnyWidths]) -> Sequence[Width]:
    return next((one.menus[menu.layer.name] for one in hidden if menu.layer.name in one.menus), ())


def _item_bytes(layer: FoundLayer) -> int:
    weight: Any = layer.module.weight
    size: int = weight.element_size()
    return size


def _kept_bytes(layer: FoundLayer) -> int:
    """Of the row of an embedding's padding, which stands beside the cores where it is not zero."""
    index = getattr(layer.module, "padding_idx", None)
    if layer.weight.kind != "embedding" or index is None:
        return 0
    row: Any = layer.module.weight[index]  # type: ignore[index]
    return row.numel() * _item_bytes(layer) if bool(row.any()) else 0


def _with_families(
    menus: Sequence[Menu],
    hidden: Sequence[AnyWidths],
    calibration: Calibration | None,
    options: PlanOptions,
    folder: Folder,
    *,
    wide: bool,
) -> tuple[list[Menu], dict[str, float]]:
    """Menus with the families of the layers' smaller forms; and what each layer carries of the output."""
    formats = factoring(options.formats)  # an unknown name is an error before the work starts
    filled, carry = [], {}
    is_scarce = calibration is not None and are_many([menu.layer for menu in menus])
    options.observer.on_start("candidates", len(menus))
    for k, menu in enumerate(menus):
        moments = calibration.of(menu.layer.name) if calibration is not None else LayerMoments()
        began = perf_counter()
        few = formats_worth_trying(menu.layer, formats, scarce=is_scarce and not wide)
        how: dict[str, Any] = {"formats": few, "structure": moments.structure, "wide": wide, "search": options.search}
        if calibration is not None:  # products with the moments serve the families, too
            carry[menu.layer.name] = carried(menu.layer, calibration)
        if not moments.parks:
            moments.weighting.keep_directions()  # for the layer that may be made of them
        found = folder.families(k, partial(families, menu.layer, weighting=moments.weighting, **how))
        moments.forget_shapes()
        let_go_of_weights(menu.layer.module)
        filled.append(replace(menu, families=found, widths=_widths_on(menu, hidden)))
        options.observer.on_step(k + 1, seconds=perf_counter() - began)
    options.observer.on_end()
    return filled, carry


def _task(model: nn.Module, options: PlanOptions) -> tuple[Task | None, Iterable[Any] | None]:
    """How the model is judged, None without data; and the data, complete again where it can be read only once."""
    data = options.data
    if data is None or isinstance(options.task, Task):
        return options.known_task, data
    seen = take(data, FIRST)
    first = first_of(first_with_example(seen))
    if isinstance(data, Iterator):
        data = itertools.chain(seen, data)
    if first is None:
        return None, data  # the calibration says what is wrong
    return task_on_batch(model, first, task=options.task, output=options.output), data


def check_reachable(
    model: nn.Module, layers: Sequence[FoundLayer], budget: BudgetLike, formats: Sequence[str] = DEFAULT_FORMATS
) -> None:
    """Raise now what shapes alone tell about a budget.

    Raises:
        BudgetError: The budget cannot be read, or has fewer parameters than the smallest form of the model.
    """
    limit = read_budget(budget, params=count_params(model), flops=_FLOPS_NOT_KNOWN_YET)
    _check_goals(model, layers, Goals((limit,), limit.text), formats)


def _check_goals(
    model: nn.Module,
    layers: Sequence[FoundLayer],
    goals: Goals,
    formats: Sequence[str],
    search: Search | None = None,
) -> None:
    """Raise where a limit on parameters or bytes is below the smallest form of the model."""
    taken = [(layer, layer.weight.n_params - least_params(layer.weight, formats, search)) for layer in layers]
    for limit in goals.counted:
        if limit.measure == "params":
            least, unit = count_params(model) - sum(n for _, n in taken), "parameters"
        elif limit.measure == "bytes":
            least, unit = _sizes(model).n_bytes - sum(n * _item_bytes(layer) for layer, n in taken), "bytes"
        else:
            continue
        if limit.limit < least:
            raise BudgetError(
                f"a budget must be reachable: {limit.text} allows {limit.limit:,} {unit}, but no form of this model "
                f"has fewer than {least:,}.{what_stands_in_the_way(model, layers)} Ask for more."
            )


def _calibration(
    model: nn.Module,
    layers: Sequence[FoundLayer],
    data: Iterable[Any] | None,
    task: Task | None,
    options: PlanOptions,
    folder: Folder,
) -> Calibration | None:
    if data is not None:
        make = partial(
            calibrate,
            model,
            layers,
            data,
            n_batches=options.n_batches,
            output=options.output,
            with_labels=task is not None and task.with_labels,
            task=task,
            observer=options.observer,
            n_held=0 if options.will_heal else _HELD_BATCHES,
        )
        found = folder.calibration(make, parks=are_parked(model, layers))
        found.batches, found.held = (
            [to_device(batch, device_of(model)) for batch in some] for some in (found.batches, found.held)
        )
        found.task = task
        return found
    if options.example_inputs is not None:
        example = [options.example_inputs]
        return calibrate(model, layers, example, n_batches=1, grams=False, observer=options.observer)
    return None
