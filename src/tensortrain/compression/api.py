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
from tensortrain.compression.choose.plan import CompressionPlan, LayerPlan
from tensortrain.compression.choose.planner import plan_compression
from tensortrain.compression.proof import apply_proven
from tensortrain.compression.report.measure import Call, batch_of, latency_rows, memory_rows, resident_bytes
from tensortrain.compression.report.report import (
    CurvePoint,
    LatencyRow,
    LayerReport,
    MemoryRow,
    Report,
    own_commit,
    provenance,
)
from tensortrain.compression.stages.heal import Heal, check_healing, heal_, task_on_data
from tensortrain.compression.survey.layers import check_module, count_params
from tensortrain.errors import CheckpointError, DataError, KindError
from tensortrain.nn import FactorizedLayer
from tensortrain.system.checkpoint import loader_generators
from tensortrain.system.observer import Observer, Silent
from tensortrain.system.storage import count_bytes
from tensortrain.train.batches import (
    Parts,
    length_of,
    map_tensors,
    n_examples,
    read_batch,
    tensors_in,
    to_device,
)
from tensortrain.train.loop import Evaluate, FitResult
from tensortrain.train.outputs import Output, check_output
from tensortrain.train.preserve import checked_copy, preserved, uncompiled
from tensortrain.train.task import Task, TaskName, check_task_name

__all__ = ["CompressionResult", "compress", "evaluate_metric"]


@dataclass(frozen=True)
class CompressionResult:
    """A compressed model with the plan that was applied and the report on what it gained."""

    model: nn.Module
    plan: CompressionPlan
    report: Report


def compress(
    model: nn.Module,
    *,
    budget: BudgetLike,
    data: Iterable[Any] | None = None,
    heal: Heal | Mapping[str, Any] | bool | None = None,
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
    observer: Observer | None = None,
) -> CompressionResult:
    """Make a trained model smaller, heal it, and report what was gained.

    Args:
        model: Trained; not changed unless ``inplace=True``.
        budget: ``"20x"``, a share such as 0.05, ``{"params": n}`` or ``{"flops": n}``.
        data: Batches as for training. They weigh errors by what the layers really see, and heal.
        heal: Settings, a mapping of them, ``False`` for none, ``None`` for one pass over ``data``.
        evaluate: ``model -> figure``, measured before, after compression and after healing.
        metric_name: What the figure is called in the report; ``"accuracy"`` is shown in per cent.
        example_inputs: A batch for shapes and measurements when there is no ``data``.
        formats, include, exclude, allow_slower, batch_size, n_batches, task, output: As ``plan_compression``.
        plan: A plan made before, in place of a new one.
        checkpoint: File for resuming a killed healing.
        measure: Time both models and measure memory for the report.
        seed: For healing; the caller's random state is put back.
        name: What the model is called in the report.

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
    observer = observer or Silent()
    settings = _heal_settings(heal, data)
    notes = _compiled_note(model)
    model = uncompiled(model)
    _check_options(data, evaluate, checkpoint, seed)
    with torch.inference_mode(False), torch.random.fork_rng(devices=[]), _generators_kept(data):
        if seed is not None:
            torch.manual_seed(seed)  # loaders that shuffle give the same batches
        judged = _judge(model, data, settings, task, output)
        original = _original(model, inplace, settings, measure)
        before, bytes_before = evaluate_metric(evaluate, model), _stored_bytes(model)
        if plan is None:
            plan = plan_compression(
                model,
                budget=budget,
                data=data,
                example_inputs=example_inputs,
                formats=formats,
                include=include,
                exclude=exclude,
                allow_slower=allow_slower,
                batch_size=batch_size,
                n_batches=n_batches,
                will_heal=_healing_to_come(settings, data, judged),
                task=judged or task,
                output=output,
                observer=observer,
            )
        with _whole_or_as_before(model, inplace):
            compressed, plan, idle = apply_proven(model, plan, inplace=inplace, observer=observer)
            notes += idle
            unhealed = _figure(evaluate, compressed, notes)
            history: FitResult | None = None
            if settings is not None and data is not None:
                history = heal_(
                    compressed,
                    original,
                    data,
                    settings,
                    task=judged,
                    output=output,
                    evaluate=evaluate,
                    checkpoint=checkpoint,
                    seed=seed,
                    observer=observer,
                )
                notes += history.notes
        after = _figure(evaluate, compressed, notes) if history is not None else unhealed
        if heal and data is None:
            notes.append("Nothing was healed: no data was given.")
        report = _report(compressed, plan, name or type(model).__name__, bytes_before, history, seed)
        report = replace(
            report,
            metric_name=metric_name if evaluate else None,
            metric_before=before,
            metric_compressed=unhealed,
            metric_after=after,
            curve=_curve(report, before, unhealed, after if history is not None else None),
        )
        if measure:
            report = _measured(report, original, compressed, plan, example_inputs, batch_size, notes)
    report = replace(report, notes=(*notes, *plan.notes, *report.notes))
    report.provenance["wall_s"] = round(perf_counter() - start, 2)
    return CompressionResult(compressed, plan, report)


def _check_options(data: object, evaluate: object, checkpoint: object, seed: object) -> None:
    """What is only used after the planning."""
    if data is not None and not isinstance(data, Iterable):
        raise DataError(
            f"data must give batches: found {type(data).__name__}, expected a list, a DataLoader or another iterable. "
            "Pass one."
        )
    if evaluate is not None and not callable(evaluate):
        raise KindError(
            f"evaluate must be a function: found {type(evaluate).__name__}, expected model -> figure. Pass one."
        )
    if checkpoint is not None and (not isinstance(checkpoint, (str, Path)) or Path(checkpoint).is_dir()):
        raise CheckpointError(
            f"a training checkpoint must be a file: checkpoint has {checkpoint!r}, expected the path of a file. "
            "Name one inside the folder."
        )
    if seed is not None and (not isinstance(seed, int) or isinstance(seed, bool)):
        raise KindError(f"a seed must be a whole number: found {seed!r}, expected an int or None. Pass 0.")


@contextlib.contextmanager
def _generators_kept(data: object) -> Iterator[None]:
    """A loader's own generators go on as if nothing had been drawn."""
    before = [(generator, generator.get_state()) for generator in loader_generators(data)]
    try:
        yield
    finally:
        for generator, state in before:
            generator.set_state(state)


def _compiled_note(model: nn.Module) -> list[str]:
    if uncompiled(model) is model:
        return []
    return ["The model was compiled by torch.compile; the result is not: compile it again."]


def _judge(
    model: nn.Module,
    data: Iterable[Any] | None,
    settings: Heal | None,
    task: TaskName | Task | None,
    output: Output | None,
) -> Task | None:
    """How the model is judged; what would stop the healing later is raised now. None: left to the planning."""
    check_output(output)
    check_task_name(task.kind if isinstance(task, Task) else task)
    if data is None or settings is None or isinstance(data, Iterator):
        if data is not None and settings is not None:
            check_healing(model, data, settings)  # says what to do with an iterator
        return task if isinstance(task, Task) else None
    if settings.only_statistics:
        check_healing(model, data, settings)
        return task if isinstance(task, Task) else None
    found = task if isinstance(task, Task) else task_on_data(model, data, task=task, output=output)
    return check_healing(model, data, settings, task=found, output=output)


def _original(model: nn.Module, inplace: bool, settings: Heal | None, measure: bool) -> nn.Module:
    """What teaches and is compared with: the model, or a copy of one that will be changed.

    A model that cannot be copied is found out now, not after the planning.
    """
    if inplace:
        return checked_copy(model) if settings is not None or measure else model
    checked_copy(model)
    return model


@contextlib.contextmanager
def _whole_or_as_before(model: nn.Module, inplace: bool) -> Iterator[None]:
    """Where a model is changed in place, put it back after an error: modules, values and modes."""
    if not inplace:
        yield
        return
    before = [(module, dict(module.__dict__), dict(module._modules)) for module in model.modules()]
    tensors = {id(t): (t, t.detach().clone()) for t in (*model.parameters(), *model.buffers())}
    try:
        yield
    except BaseException:
        for module, attributes, children in before:
            module.__dict__.clear()
            module.__dict__.update(attributes)
            module._modules.clear()
            module._modules.update(children)
        with torch.no_grad():
            for tensor, value in tensors.values():
                tensor.copy_(value)
        raise


def _figure(evaluate: Evaluate | None, model: nn.Module, notes: list[str]) -> float | None:
    """The metric; where it cannot be had any more, a note says so and the work goes on."""
    try:
        return evaluate_metric(evaluate, model)
    except (Exception, KeyboardInterrupt) as error:
        notes.append(f"The compressed model could not be evaluated ({_in_short(error)}).")
        return None


def _in_short(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split()):.200}"


def evaluate_metric(evaluate: Evaluate | None, model: nn.Module) -> float | None:
    """The first figure that ``evaluate`` gives."""
    if evaluate is None:
        return None
    with torch.no_grad(), preserved(model, as_user_runs_it=True):
        model.eval()
        figures = evaluate(model)
    figure = next(iter(figures.values()), None) if isinstance(figures, Mapping) else figures
    try:
        return float(figure)  # type: ignore[arg-type]
    except (TypeError, ValueError, RuntimeError) as error:
        raise KindError(
            f"evaluate must give a number: it gives {type(figure).__name__}, expected a float or a dict of floats. "
            "Return the figure that the model is judged by."
        ) from error


# Passes over the data from which healing counts as long; and steps, where values are matched rather than classes: to
# the last digit, which few steps do not make up for.
_LONG, _LONG_STEPS = 3, 500


def _healing_to_come(settings: Heal | None, data: Iterable[Any] | None, task: Task | None) -> bool | Literal["long"]:
    """What the planning may count on."""
    if settings is None or data is None or settings.only_statistics:
        return False
    epochs = settings.epochs or 0
    enough = task is None or task.softmax or epochs * (length_of(data) or 0) >= _LONG_STEPS
    return "long" if epochs >= _LONG and enough else True


def _heal_settings(heal: Heal | Mapping[str, Any] | bool | None, data: Iterable[Any] | None) -> Heal | None:
    if heal is not None and not isinstance(heal, (bool, Heal, Mapping)):
        raise KindError(
            f"healing must have known settings: heal has {heal!r}, expected a dict, a Heal, False or None. Pass "
            "heal={'epochs': 1}."
        )
    if heal is False or data is None:
        return None
    if isinstance(heal, Heal):
        return heal
    return Heal.read(heal) if isinstance(heal, Mapping) else Heal()


def _report(
    compressed: nn.Module,
    plan: CompressionPlan,
    name: str,
    bytes_before: int,
    history: FitResult | None,
    seed: int | None,
) -> Report:
    layers = tuple(_layer_report(layer, compressed) for layer in plan.layers)
    flops = [(layer.flops_before, layer.flops_after) for layer in plan.layers]
    known = all(pair[0] is not None for pair in flops)
    return Report(
        title=f"{name} at {plan.budget}",
        model=name,
        budget=plan.budget,
        params_before=plan.params_before,
        params_after=count_params(compressed),
        bytes_before=bytes_before,
        bytes_after=_stored_bytes(compressed),
        flops_before=sum(pair[0] or 0 for pair in flops) if known else None,
        flops_after=sum(pair[1] or 0 for pair in flops) if known else None,
        layers=layers,
        healing=tuple(history.history) if history is not None else (),
        notes=tuple(
            f"{layer.name or 'the model'} ({layer.kind}) was left alone: {layer.reason}." for layer in plan.left_alone
        ),
        provenance=provenance(seed=seed),
    )


def _curve(
    report: Report, before: float | None, unhealed: float | None, healed: float | None
) -> tuple[CurvePoint, ...]:
    """Metric against compression: the original, and the compressed model before and after healing."""
    ratio = report.compression
    points = [
        ("1x", "original", 1.0, before),
        (f"{ratio:.3g}x", "before healing", ratio, unhealed),
        (f"{ratio:.3g}x", "healed", ratio, healed),
    ]
    return tuple(CurvePoint(label, method, at, metric) for label, method, at, metric in points if metric is not None)


def _stored_bytes(model: nn.Module) -> int:
    return count_bytes((*model.parameters(), *model.buffers()))


def _layer_report(layer: LayerPlan, compressed: nn.Module) -> LayerReport:
    module: Any = compressed.get_submodule(layer.name)
    spec = module.spec if isinstance(module, FactorizedLayer) else None
    return LayerReport(
        name=layer.name,
        kind=layer.kind,
        shape=layer.shape,
        format=layer.format,
        in_modes=spec.in_modes if spec else (),
        out_modes=spec.out_modes if spec else (),
        ranks=spec.ranks if spec else (),
        params_before=layer.params_before,
        params_after=module.n_params if spec else layer.params_after,
        flops_before=layer.flops_before,
        flops_after=layer.flops_after,
        rel_error=layer.rel_error,
        implementation=module.implementation if spec else "dense",
        resident_bytes=resident_bytes(module),
        decision=layer.decision,
        spectra=layer.spectra,
    )


def _measured(
    report: Report,
    original: nn.Module,
    compressed: nn.Module,
    plan: CompressionPlan,
    example_inputs: Any,
    batch_size: int | None,
    notes: list[str],
) -> Report:
    """Time and memory at batch 1 and at the size of the data; what cannot be run becomes a note."""
    batch = example_inputs
    if batch is None and plan.calibration is not None and plan.calibration.batches:
        batch = plan.calibration.batches[0]
    if batch is None:
        return report
    with_labels = plan.calibration is not None and plan.calibration.with_labels
    latency: list[LatencyRow] = []
    memory: list[MemoryRow] = []
    for size, example in _examples(original, batch, batch_size, with_labels, notes):
        try:
            with preserved(original, as_user_runs_it=True):
                times = latency_rows(original, compressed, example, batches=[size])
                bytes_held = memory_rows(original, compressed, example, batches=[size])
        except Exception as error:
            notes.append(f"Not timed at batch size {size}: the model does not run there ({_in_short(error)}).")
            continue
        latency, memory = [*latency, *times], [*memory, *bytes_held]
    return replace(
        report,
        latency=tuple(latency),
        memory=tuple(memory),
        layers=tuple(_with_implementation(layer, compressed) for layer in report.layers),
    )


def _examples(
    model: nn.Module, batch: Any, batch_size: int | None, with_labels: bool, notes: list[str]
) -> list[tuple[int, Call]]:
    """Batch sizes to time at, with their inputs. Inputs are cut only along an axis that all of them share."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    parts = read_batch(model, to_device(batch, device), with_labels=with_labels)
    # copies: a model may write into its input
    call = Call(*map_tensors(lambda tensor: tensor.detach().clone(), (parts.args, dict(parts.kwargs))))
    own = max(1, n_examples(batch))
    tensors = [t for t in tensors_in([list(parts.args), dict(parts.kwargs)]) if t.ndim]
    shared = len({t.shape[0] for t in tensors}) == 1 and _is_cut_by_axis(parts)
    if not shared:
        notes.append(f"Timed at the size of the data alone ({own}): its inputs share no batch axis to cut along.")
        return [(own, call)]
    sizes = sorted({1, batch_size or own})
    return [(size, call if size == own else batch_of(call, size)) for size in sizes]


def _is_cut_by_axis(parts: Parts) -> bool:
    return all(isinstance(value, Tensor) or not tensors_in(value) for value in (*parts.args, *parts.kwargs.values()))


def _with_implementation(layer: LayerReport, compressed: nn.Module) -> LayerReport:
    """How the layer ran and what it keeps, after both batch sizes were run."""
    module: Any = compressed.get_submodule(layer.name)
    if not isinstance(module, FactorizedLayer):
        return replace(layer, resident_bytes=resident_bytes(module))
    return replace(layer, implementation=module.how_it_ran(), resident_bytes=resident_bytes(module))
