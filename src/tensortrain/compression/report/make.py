"""A report from what the stages left: the plan's layers, the curve of the metric, and measurements of both models."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from torch import nn

from tensortrain.compression.choose.plan import CompressionPlan, LayerPlan
from tensortrain.compression.report.measure import (
    batch_of,
    call_of,
    latency_rows,
    memory_rows,
    resident_bytes,
    shares_batch_axis,
)
from tensortrain.compression.report.report import (
    CurvePoint,
    LatencyRow,
    LayerReport,
    MemoryRow,
    Report,
)
from tensortrain.compression.report.turns import Turns
from tensortrain.compression.stages.base import Work
from tensortrain.compression.stages.points import Point
from tensortrain.compression.survey.layers import part_of
from tensortrain.compression.words import in_short
from tensortrain.nn import FactorizedLayer
from tensortrain.system.offloading import resting_in_files
from tensortrain.system.parking import is_parked
from tensortrain.system.provenance import provenance
from tensortrain.train.batches import Parts, n_examples
from tensortrain.train.preserve import preserved

__all__ = ["make_report"]

_MOST_TIMING_S, _FEWEST_RUNS = 1.0, 3  # of turns per batch size: the report must not take longer than the work


def make_report(work: Work, plan: CompressionPlan) -> Report:
    """The report on a work that is done; measured too, where that was asked for."""
    options, before, after = work.options, work.points[0], work.points[-1]
    name = options.name or type(work.original).__name__
    known = bool(plan.layers) and all(layer.flops_before is not None for layer in plan.layers)
    report = Report(
        title=f"{name} at {plan.budget}" if plan.budget else name,
        model=name,
        budget=plan.budget,
        params_before=plan.params_before,
        params_after=after.n_params,
        bytes_before=before.n_bytes,
        bytes_after=after.n_bytes,
        flops_before=sum(layer.flops_before or 0 for layer in plan.layers) if known else None,
        flops_after=sum(layer.flops_after or 0 for layer in plan.layers) if known else None,
        metric_name=options.metric_name if options.evaluate else None,
        metric_before=before.metric,
        metric_compressed=_before_healing(work.points).metric,
        metric_after=after.metric,
        layers=tuple(_layer_report(layer, work) for layer in plan.layers),
        healing=tuple(dict(row) for row in work.healing),
        curve=_curve(work.points),
        provenance=provenance(seed=options.seed),
    )
    notes = list(work.notes)
    if options.measure:
        report = _measured(report, work, plan, notes)
    return replace(report, notes=(*notes, *plan.notes, *_left_alone(plan)))


def _left_alone(plan: CompressionPlan) -> list[str]:
    return [f"{layer.name or 'the model'} ({layer.kind}) was left alone: {layer.reason}." for layer in plan.left_alone]


def _before_healing(points: tuple[Point, ...]) -> Point:
    names = [point.name for point in points]
    cut = [k for k, name in enumerate(names) if name == "healed" and names[k - 1] != "healed"]
    return points[cut[-1] - 1] if cut else points[-1]  # of several stages the last


def _curve(points: tuple[Point, ...]) -> tuple[CurvePoint, ...]:
    """Metric against compression: the original, and the model after each stage."""
    ratios = [points[0].n_params / max(point.n_params, 1) for point in points]
    return tuple(
        CurvePoint(f"{ratio:.3g}x", point.name, ratio, point.metric)
        for ratio, point in zip(ratios, points, strict=True)
        if point.metric is not None
    )


def _layer_report(layer: LayerPlan, work: Work) -> LayerReport:
    module: Any = part_of(work.model, layer.name)
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
        resident_bytes=resident_bytes(module) if module is not None else 0,
        decision=layer.decision,
        spectra=layer.spectra,
        predicted_loss=layer.loss,
        why=layer.why,
        measured_loss=work.losses.get(layer.name),
    )


def _measured(report: Report, work: Work, plan: CompressionPlan, notes: list[str]) -> Report:
    """Time and memory at batch 1 and at the size of the data; what cannot be run becomes a note."""
    calibration, batch = plan.calibration, work.options.example_inputs
    if batch is None and calibration is not None and calibration.batches:
        batch = calibration.batches[0]
    if batch is None:
        return report
    with_labels = calibration is not None and calibration.with_labels
    with _one_in_memory(work) as turns:
        return _timed(report, work, batch, with_labels, notes, turns)


@contextlib.contextmanager
def _one_in_memory(work: Work) -> Iterator[Turns]:
    """Where the original lies in files, the compressed model does so too: they take turns in memory."""
    is_large = any(map(is_parked, work.original.parameters()))
    with resting_in_files(work.model) if is_large else contextlib.nullcontext():
        turns = Turns((work.original, work.model))
        try:
            yield turns
        finally:
            turns.end()


def _timed(report: Report, work: Work, batch: Any, with_labels: bool, notes: list[str], turns: Turns) -> Report:
    latency: list[LatencyRow] = []
    memory: list[MemoryRow] = []
    for size, example in _examples(work.original, batch, work.options.batch_size, with_labels, notes):
        try:
            with preserved(work.original, as_user_runs_it=True):
                how: dict[str, Any] = {"max_time_s": _MOST_TIMING_S, "fewest_runs": _FEWEST_RUNS, "turns": turns}
                times = latency_rows(work.original, work.model, example, batches=[size], **how)
                here: dict[str, Any] = {"have_run": True, "is_tidy": bool(memory), "turns": turns}
                bytes_held = memory_rows(work.original, work.model, example, batches=[size], **here)
        except Exception as error:
            notes.append(f"Not timed at batch size {size}: the model does not run there ({in_short(error)}).")
            continue
        latency, memory = [*latency, *times], [*memory, *bytes_held]
    return replace(
        report,
        latency=tuple(latency),
        memory=tuple(memory),
        layers=tuple(_with_implementation(layer, work.model) for layer in report.layers),
    )


def _examples(
    model: nn.Module, batch: Any, batch_size: int | None, with_labels: bool, notes: list[str]
) -> list[tuple[int, Parts]]:
    """Batch sizes to time at, with their inputs. Inputs are cut only along an axis that all of them share."""
    call, own = call_of(model, batch, with_labels=with_labels), max(1, n_examples(batch))
    if not shares_batch_axis(call):
        notes.append(f"Timed at the size of the data alone ({own}): its inputs share no batch axis to cut along.")
        return [(own, call)]
    sizes = sorted({1, batch_size or own})
    return [(size, call if size == own else batch_of(call, size)) for size in sizes]


def _with_implementation(layer: LayerReport, compressed: nn.Module) -> LayerReport:
    """How the layer ran and what it keeps, after both batch sizes were run."""
    module: Any = part_of(compressed, layer.name)
    if not isinstance(module, FactorizedLayer):
        return replace(layer, resident_bytes=resident_bytes(module) if module is not None else 0)
    return replace(layer, implementation=module.how_it_ran(), resident_bytes=resident_bytes(module))
