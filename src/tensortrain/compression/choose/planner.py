"""From a model and a budget to a plan; nothing is changed."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal

from torch import nn

from tensortrain.compression.choose.beyond_reach import (
    nothing_to_compress,
    unspent_note,
    what_stands_in_the_way,
)
from tensortrain.compression.choose.budget import Budget, BudgetLike, read_budget
from tensortrain.compression.choose.candidates import DEFAULT_FORMATS, families, least_params
from tensortrain.compression.choose.chooser import Chooser, Menu
from tensortrain.compression.choose.clock import Clock
from tensortrain.compression.choose.cost import dense_cost
from tensortrain.compression.choose.load import loads_of
from tensortrain.compression.choose.options import PlanOptions
from tensortrain.compression.choose.plan import CompressionPlan, LayerPlan
from tensortrain.compression.choose.weights import weigh_layers
from tensortrain.compression.opened import opened_for_a_while
from tensortrain.compression.survey.calibrate import calibrate
from tensortrain.compression.survey.layers import FoundLayer, LeftAlone, count_params, find_layers
from tensortrain.compression.survey.moments import Calibration, LayerMoments
from tensortrain.compression.survey.task import FIRST, first_with_example, task_on_batch
from tensortrain.errors import BudgetError
from tensortrain.formats import get_format
from tensortrain.system.observer import Observer, Silent
from tensortrain.train.batches import take
from tensortrain.train.outputs import Output
from tensortrain.train.preserve import uncompiled
from tensortrain.train.task import Task, TaskName

__all__ = ["check_reachable", "make_plan", "plan_compression"]

# Exponent on a layer's weight when the model is healed: at 80x on Fashion-MNIST, after one epoch, 0.5 gave 90.5 %,
# 1 gave 88.8 % and 0 gave 90.0 %.
_HEALED_REACH = 0.5
# Rank steps to plan with, as shares of the rank: the coarse ones mostly spend the whole budget. In a model with one
# large layer they can leave several per cent of it, and planning is done again with the fine ones.
_GROWTHS = (0.08, 0.01)
_SPENT = 0.95
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
    observer: Observer | None = None,
) -> CompressionPlan:
    """Choose format, modes and ranks of every layer so that the model fits a budget. Changes nothing.

    Every layer brings a menu of candidates with their predicted errors, weighted by the second moments of
    its inputs and by how far the error reaches the model's output where ``data`` is given. One allocation
    over all menus then spends the budget where it lowers the error most.

    Args:
        model: Any module; a bare layer too.
        budget: ``"20x"``, a share, ``{"params": n}`` or ``{"flops": n}``; every parameter of the model
            counts, shared ones once.
        data: Calibration batches, as for training (labels are not used).
        example_inputs: A batch to take shapes from, when there is no ``data``.
        formats: Names to choose among.
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

    Returns:
        CompressionPlan: Print it, save it as JSON, or hand it to ``apply_plan_``.

    Raises:
        BudgetError: The budget cannot be read or not be reached.
        FilterError: A pattern matches no layer.
        NonFiniteError: A weight holds NaN or Inf.

    Cost: singular values of every candidate matricization, plus ``n_batches`` forward passes and one per layer.
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
            observer=observer or Silent(),
        ),
    )


def make_plan(model: nn.Module, options: PlanOptions) -> CompressionPlan:
    """``plan_compression`` with its keywords as one record."""
    with opened_for_a_while(uncompiled(model)) as opened:
        plan = _plan_opened(opened.model, options)
    return plan.with_opened(opened.names, opened.left_alone(plan.left_alone))


def _plan_opened(model: nn.Module, options: PlanOptions) -> CompressionPlan:
    """The plan of a model whose layers of several maps stand apart."""
    layers, left = _layers(model, options)
    task, data = _task(model, options)
    calibration = _calibration(model, layers, data, task, options)
    menus, unseen = _menus(layers, calibration, options)
    flops = sum(menu.dense.flops or 0 for menu in menus) if calibration is not None else None
    total = count_params(model)
    budget = read_budget(options.budget, params=total, flops=flops)
    beyond_reach = partial(what_stands_in_the_way, model, layers, left)
    plans, unspent = _spend(menus, calibration, budget, total, options, beyond_reach)
    return CompressionPlan(
        tuple(plans),
        budget.text,
        total,
        total - sum(layer.params_before - layer.params_after for layer in plans),
        tuple(left),
        calibration,
        str(task) if task else "",
        task.outputs if task else (),
        (*(task.notes if task else ()), *(calibration.notes if calibration else ()), *unseen, *unspent),
    )


def _layers(model: nn.Module, options: PlanOptions) -> tuple[list[FoundLayer], list[LeftAlone]]:
    """What can be compressed and what is left alone; what shapes alone tell against the budget is raised."""
    layers, left = find_layers(model, include=options.include, exclude=options.exclude)
    if not layers:
        raise nothing_to_compress(model, left)
    if options.data is not None or options.example_inputs is not None:
        check_reachable(model, layers, options.budget, options.formats)  # before the passes over the data
    return layers, left


def _menus(
    layers: Sequence[FoundLayer], calibration: Calibration | None, options: PlanOptions
) -> tuple[list[Menu], list[str]]:
    """What each layer costs and counts, candidates still to come; and notes on what was not seen."""
    reach = _HEALED_REACH if options.will_heal else 1.0
    loads = [loads_of(layer, calibration, options.batch_size) for layer in layers]
    costs = [dense_cost(layer, load[0]) for layer, load in zip(layers, loads, strict=True)]
    weights, unseen = weigh_layers(layers, calibration, narrowed=options.output is not None)
    return [
        Menu(layer, load, cost, weights[layer.name] ** reach)
        for layer, load, cost in zip(layers, loads, costs, strict=True)
    ], unseen


def _spend(
    menus: Sequence[Menu],
    calibration: Calibration | None,
    budget: Budget,
    total: int,
    options: PlanOptions,
    beyond_reach: Callable[[], str],
) -> tuple[list[LayerPlan], list[str]]:
    """Choose, in finer steps of the ranks where coarse ones leave much; and a note where even these do."""
    long = options.will_heal == "long"
    offered = _with_families(menus, calibration, options, wide=long)
    clock = Clock()
    for growth in _GROWTHS:
        filled = [menu.with_candidates(growth=growth, wide=long) for menu in offered]
        chooser = Chooser(filled, budget, total, options.allow_slower, long, beyond_reach, clock)
        plans = chooser.choose()
        spent = chooser.spent(plans)
        if spent >= _SPENT * budget.limit:
            break
    full = total if budget.measure == "params" else sum(menu.dense.flops or 0 for menu in menus)
    note = unspent_note(budget, spent, full=full, slower=chooser.slower)
    return plans, [note] if note else []


def _with_families(
    menus: Sequence[Menu], calibration: Calibration | None, options: PlanOptions, *, wide: bool
) -> list[Menu]:
    for name in options.formats:
        get_format(name)  # an unknown name is an error before the work starts
    filled = []
    options.observer.on_start("candidates", len(menus))
    for k, menu in enumerate(menus):
        moments = calibration.of(menu.layer.name) if calibration is not None else LayerMoments()
        found = families(
            menu.layer,
            formats=options.formats,
            weighting=moments.weighting,
            structure=moments.structure,
            wide=wide,
        )
        moments.forget_derived()
        filled.append(replace(menu, families=found))
        options.observer.on_step(k + 1)
    options.observer.on_end()
    return filled


def _task(model: nn.Module, options: PlanOptions) -> tuple[Task | None, Iterable[Any] | None]:
    """How the model is judged, None without data; and the data, complete again where it can be read only once."""
    data = options.data
    if data is None or isinstance(options.task, Task):
        return options.known_task, data
    seen = take(data, FIRST)
    first = first_with_example(seen)
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
    total = count_params(model)
    limit = read_budget(budget, params=total, flops=_FLOPS_NOT_KNOWN_YET)
    least = total - sum(layer.weight.n_params - least_params(layer.weight, formats) for layer in layers)
    if limit.measure == "params" and limit.limit < least:
        raise BudgetError(
            f"a budget must be reachable: {limit.text} allows {limit.limit:,} parameters, but no form of this model "
            f"has fewer than {least:,}.{what_stands_in_the_way(model, layers)} Ask for more."
        )


def _calibration(
    model: nn.Module,
    layers: Sequence[FoundLayer],
    data: Iterable[Any] | None,
    task: Task | None,
    options: PlanOptions,
) -> Calibration | None:
    if data is not None:
        return calibrate(
            model,
            layers,
            data,
            n_batches=options.n_batches,
            output=options.output,
            with_labels=task is not None and task.with_labels,
            task=task,
            observer=options.observer,
        )
    if options.example_inputs is not None:
        example = [options.example_inputs]
        return calibrate(model, layers, example, n_batches=1, grams=False, observer=options.observer)
    return None
