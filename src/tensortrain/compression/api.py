"""The one call: plan, apply, heal, report."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tensortrain.compression.choose.budget import BudgetLike
from tensortrain.compression.choose.candidates import DEFAULT_FORMATS
from tensortrain.compression.choose.plan import CompressionPlan
from tensortrain.compression.choose.planner import make_plans
from tensortrain.compression.choose.structure import Search
from tensortrain.compression.options import CompressOptions
from tensortrain.compression.report.make import make_report
from tensortrain.compression.report.report import Report
from tensortrain.compression.stages.base import Work, prepare_stages, run_stages, stage_of
from tensortrain.compression.stages.factorize import Factorize
from tensortrain.compression.stages.heal import Heal
from tensortrain.compression.stages.local import HealLocally
from tensortrain.compression.stages.points import point_of
from tensortrain.compression.stages.refit import Refit
from tensortrain.compression.survey.layers import check_module, count_params
from tensortrain.errors import KindError, RankError
from tensortrain.system.observer import Observer, Silent
from tensortrain.system.parking import are_large, can_park, is_parked, park
from tensortrain.system.processes import together
from tensortrain.system.provenance import own_commit
from tensortrain.system.seeds import seed_all
from tensortrain.train.evaluation import Evaluate, evaluate_metric
from tensortrain.train.options import total_steps
from tensortrain.train.outputs import Output
from tensortrain.train.preserve import checked_copy, uncompiled
from tensortrain.train.state import loader_generators
from tensortrain.train.task import Task, TaskName

__all__ = ["CompressionResult", "compress", "evaluate_metric", "plans_for"]

# Of all steps of healing in turns: on the way little is lost, and what is missing at the end is. At 240x by way of 16x
# conv-fc loses 1.3 points of validation images when one step in eight comes first, 1.8 when one in four does.
_LAST = 7 / 8
_HELD = ("_modules", "_parameters", "_buffers")  # of a module, in dicts that may be changed in place


@dataclass(frozen=True)
class CompressionResult:
    """A compressed model with the plan that was applied and the report on what it gained."""

    model: nn.Module
    plan: CompressionPlan
    report: Report


def compress(
    model: nn.Module,
    *,
    budget: BudgetLike | None,
    data: Iterable[Any] | None = None,
    heal: Heal | HealLocally | Mapping[str, Any] | Literal["local"] | bool | None = None,
    evaluate: Evaluate | None = None,
    metric_name: str = "metric",
    example_inputs: Any = None,
    formats: Sequence[str] = DEFAULT_FORMATS,
    include: Sequence[str] | str | None = None,
    exclude: Sequence[str] | str | None = None,
    allow_slower: bool = False,
    batch_size: int | None = None,
    n_batches: int = 16,
    task: TaskName | Task | None = None,
    output: Output | None = None,
    plan: CompressionPlan | None = None,
    inplace: bool = False,
    checkpoint: str | Path | None = None,
    measure: bool = True,
    seed: int | None = 0,
    name: str | None = None,
    stages: Sequence[Any] | None = None,
    n_stages: int = 1,
    search: Search | None = None,
    observer: Observer | None = None,
    work_dir: str | Path | None = None,
    measure_losses: bool = False,
) -> CompressionResult:
    """Make a trained model smaller, heal it, and report what was gained.

    Args:
        model: Trained; not changed unless ``inplace=True``.
        budget: ``"20x"``, a share such as 0.05, or a dict with some of ``"params"``, ``"flops"``, ``"bytes"``,
            ``"latency_ms"`` (with ``"batch_size"``) and ``"max_metric_drop"`` (with ``evaluate``), which all hold then;
            see ``plan_compression``. One that is missed is an error before healing begins.
        data: Batches as for training. They weigh errors by what the layers really see, and heal.
        heal: Settings, a mapping of them, ``False`` for none, ``None`` for one pass over ``data``; ``"local"`` trains
            block by block towards the original's outputs, without labels (see ``stages.HealLocally``). Where hidden
            units were taken out, healing begins with fits by least squares (see ``stages.Refit``).
        evaluate: ``model -> figure``, measured before, after compression and after healing.
        metric_name: What the figure is called in the report; ``"accuracy"`` is shown in per cent.
        example_inputs: A batch for shapes and measurements when there is no ``data``.
        formats, include, exclude, allow_slower, batch_size, n_batches, task, output, search: As ``plan_compression``.
        plan: A plan made before, in place of a new one.
        checkpoint: File for resuming a killed healing.
        measure: Time both models and measure memory for the report.
        seed: For healing; the caller's random state is put back.
        name: What the model is called in the report.
        stages: What is done, one after another, in place of ``plan`` and ``heal``: a list of settings such as
            ``[Factorize(), Heal(epochs=1)]`` of ``tensortrain.compression.stages``. Without ``Factorize`` the budget
            may be None.
        n_stages: In how many turns the model is compressed and healed, by equal ratios up to the budget. ``heal`` says
            how long each is healed in the mean; the last has seven eighths of all steps. What earlier turns factorized
            is planned again in the later ones.
        work_dir: Folder from which a killed planning goes on, see ``plan_compression``.
        measure_losses: Plan by losses that are measured, see ``plan_compression``.

    Returns:
        CompressionResult: ``model``, ``plan`` and ``report``. A bare layer comes back as the new layer.

    Raises:
        BudgetError, DataError, FilterError, NonFiniteError: Before anything is changed.

    Example:
        >>> net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
        >>> compress(net, budget="2x").report.params_after <= 2405
        True
    """
    start = perf_counter()
    own_commit()  # now, not after an hour of healing
    check_module(model)
    todo = _stages(stages, plan, heal, data) if n_stages == 1 else _in_turns(n_stages, stages, plan, heal, data)
    options = CompressOptions(
        budget=budget,  # type: ignore[arg-type]  # None is read by a stage that needs it
        data=data,
        example_inputs=example_inputs,
        formats=formats,
        include=include,
        exclude=exclude,
        allow_slower=allow_slower,
        batch_size=batch_size,
        n_batches=n_batches,
        task=task,
        output=output,
        observer=observer or Silent(),
        work_dir=work_dir,
        evaluate=evaluate,
        metric_name=metric_name,
        inplace=inplace,
        checkpoint=checkpoint,
        measure=measure,
        seed=seed,
        name=name,
        search=search,
        measure_losses=measure_losses,
    )
    return _result(model, options, todo, start)


def _result(model: nn.Module, options: CompressOptions, todo: Sequence[Any], start: float) -> CompressionResult:
    with together(_are_joined(todo, options)), _same_batches(options):
        work = _carried_out(model, options, todo)
        applied = work.plan or _no_plan(work)
        report = make_report(work, applied)
    report.provenance["wall_s"] = round(perf_counter() - start, 2)
    return CompressionResult(work.model, applied, report)


def _are_joined(todo: Sequence[Any], options: CompressOptions) -> bool:
    """Whether several processes exchange anything on the way: else each of them may compress a model by itself."""
    plans = any(isinstance(each, Factorize) and each.plan is None for each in todo)
    heals = any(isinstance(each, (Heal, HealLocally, Refit)) for each in todo)
    return plans or (heals and options.data is not None)


def plans_for(
    model: nn.Module,
    budgets: Sequence[BudgetLike],
    *,
    heal: Heal | Mapping[str, Any] | bool | None = None,
    observer: Observer | None = None,
    **keywords: Any,
) -> list[CompressionPlan]:
    """The plans that ``compress`` makes with these keywords for each of several budgets, from one calibration."""
    check_module(model)
    options = CompressOptions(budget=budgets[0], observer=observer or Silent(), **keywords)
    with together(), _same_batches(options):
        model = uncompiled(model)
        work = Work(model, model, options, task=options.known_task)
        work = prepare_stages(work, _stages(None, None, heal, options.data))
        asked = replace(options, will_heal=work.will_heal, task=work.task or options.task)
        return make_plans(model, asked, budgets)


@contextlib.contextmanager
def _same_batches(options: CompressOptions) -> Iterator[None]:
    """The same random numbers for the same call, those of loaders that shuffle among them; the user's are put back."""
    with torch.inference_mode(False), torch.random.fork_rng(devices=[]), _generators_kept(options.data):
        if options.seed is not None:
            seed_all(options.seed)
        yield


def _stages(
    stages: Sequence[Any] | None,
    plan: CompressionPlan | None,
    heal: Heal | HealLocally | Mapping[str, Any] | str | bool | None,
    data: object,
) -> Sequence[Any]:
    """What is done, checked."""
    if stages is None:
        settings = _heal_settings(heal)
        trains = isinstance(settings, Heal) and (data is not None or bool(heal))
        first = [Factorize(plan), Refit()] if isinstance(settings, HealLocally) else [Factorize(plan)]
        return [*first, settings] if trains or isinstance(settings, HealLocally) else first
    if heal or plan is not None:
        given = "heal" if heal else "plan"
        raise KindError(
            f"stages must say all that is done: {given} is given beside them, expected stages alone. Put "
            "Heal(..) or Factorize(plan) into the list."
        )
    todo = list(stages) if isinstance(stages, Iterable) else [stages]
    for settings in todo:
        stage_of(settings)
    return todo


def _in_turns(
    n_stages: int,
    stages: Sequence[Any] | None,
    plan: CompressionPlan | None,
    heal: Heal | HealLocally | Mapping[str, Any] | str | bool | None,
    data: Iterable[Any] | None,
) -> Sequence[Any]:
    """Factorize and heal, several times up to the budget."""
    if not isinstance(n_stages, int) or isinstance(n_stages, bool) or n_stages < 1:
        raise RankError(f"a number of stages must be positive: n_stages has {n_stages!r}. Pass 1 or more.")
    settings = _heal_settings(heal)
    if stages is not None or plan is not None:
        given = "stages" if stages is not None else "plan"
        raise KindError(
            f"turns must be left to compress: {given} is given beside n_stages={n_stages}, expected neither. Write the "
            "turns into stages= as Factorize(way=0.5), Heal(), Factorize(), Heal(), or leave it out."
        )
    if settings is None or data is None:
        missing = "heal=False" if settings is None else "no data"
        raise KindError(
            f"between its stages a model must be healed: n_stages has {n_stages} with {missing}. Pass data and leave "
            "heal= out, or n_stages=1."
        )
    heals = _shared_out(settings, data, n_stages)
    return [each for n, heal in enumerate(heals, start=1) for each in (Factorize(way=n / n_stages), heal)]


def _shared_out(settings: Heal | HealLocally, data: Iterable[Any], n_stages: int) -> list[Heal | HealLocally]:
    """The healing of every turn: together as long as if all were alike."""
    if n_stages == 1 or not isinstance(settings, Heal) or settings.only_statistics:
        return [settings] * n_stages
    settings = settings.with_length(data)
    total = n_stages * total_steps(data, settings.epochs, settings.steps)
    early = max(1, round((1 - _LAST) * total / (n_stages - 1)))
    last = max(1, total - (n_stages - 1) * early)
    return [replace(settings, epochs=None, steps=n) for n in (*(n_stages - 1) * [early], last)]


def _heal_settings(heal: Heal | HealLocally | Mapping[str, Any] | str | bool | None) -> Heal | HealLocally | None:
    if heal is False:
        return None
    if heal == "local":
        return HealLocally()
    if heal is None or heal is True:
        return Heal()
    if isinstance(heal, Mapping):
        return Heal.read(heal)
    if not isinstance(heal, (Heal, HealLocally)):
        raise KindError(
            f"healing must have known settings: heal has {heal!r}, expected a dict, a Heal, 'local', False or None. "
            "Pass heal={'epochs': 1}."
        )
    return heal


def _carried_out(model: nn.Module, options: CompressOptions, todo: Sequence[Any]) -> Work:
    """All stages, or the model as before."""
    notes = _compiled_note(model)
    model = uncompiled(model)
    work = prepare_stages(Work(model, model, options, task=options.known_task, is_own=options.inplace), todo)
    compares = options.measure or any(stage_of(each).needs_data and not stage_of(each).is_idle(work) for each in todo)
    original = _original(model, options.inplace, compares)
    before = point_of("original", model, evaluate_metric(options.evaluate, model))
    work = replace(work, original=original, notes=notes, points=(before,))
    with _whole_or_as_before(model, options.inplace):
        return run_stages(work, todo)


def _no_plan(work: Work) -> CompressionPlan:
    """What there is to tell of layers where no stage made a plan."""
    return CompressionPlan((), "", count_params(work.original), count_params(work.model))


@contextlib.contextmanager
def _generators_kept(data: object) -> Iterator[None]:
    """A loader's own generators go on as if nothing had been drawn."""
    before = [(generator, generator.get_state()) for generator in loader_generators(data)]
    try:
        yield
    finally:
        for generator, state in before:
            generator.set_state(state)


def _compiled_note(model: nn.Module) -> tuple[str, ...]:
    if uncompiled(model) is model:
        return ()
    return ("The model was compiled by torch.compile; the result is not: compile it again.",)


def _original(model: nn.Module, inplace: bool, compares: bool) -> nn.Module:
    """What teaches and is compared with: the model, or a copy of one that will be changed.

    A model that cannot be copied is found out now, not after the planning.
    """
    if inplace:
        return checked_copy(model, parks=are_large(model.parameters())) if compares else model
    checked_copy(model, parks=are_large(model.parameters()))
    return model


@contextlib.contextmanager
def _whole_or_as_before(model: nn.Module, inplace: bool) -> Iterator[None]:
    """Where a model is changed in place, put it back after an error: modules, values and modes."""
    if not inplace:
        yield
        return
    before = [(module, dict(vars(module)), [dict(vars(module)[kind]) for kind in _HELD]) for module in model.modules()]
    large = are_large(model.parameters())
    tensors = {id(t): (t, _copied(t, parks=large)) for t in (*model.parameters(), *model.buffers())}
    try:
        yield
    except BaseException:
        for module, attributes, held in before:
            vars(module).clear()
            vars(module).update(attributes)
            for kind, entries in zip(_HELD, held, strict=True):
                vars(module)[kind].clear()
                vars(module)[kind].update(entries)
        with torch.no_grad():
            for tensor, value in tensors.values():
                if is_parked(tensor):  # in memory it was
                    tensor.data = value.clone()
                else:
                    tensor.copy_(value)
        raise


def _copied(tensor: Tensor, *, parks: bool) -> Tensor:
    return park(tensor) if parks and can_park(tensor) else tensor.detach().clone()
