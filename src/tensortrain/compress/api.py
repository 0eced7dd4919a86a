"""The one call: plan, apply, heal, report."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any, Literal

import torch
from torch import nn

from tensortrain.nn import FactorizedLayer

from .apply import apply_plan_
from .budget import BudgetLike
from .candidates import DEFAULT_FORMATS
from .copying import copy_model
from .heal import Heal, check_healing, heal_
from .layers import check_module, count_params
from .measure import latency_rows, memory_rows, resident_bytes
from .observer import Observer, Silent
from .output_weights import OutputFunction
from .plan import CompressionPlan, LayerPlan, plan_compression
from .report import CurvePoint, LayerReport, Report, own_commit, provenance
from .storage import count_bytes
from .training import Evaluate, FitResult

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
    output: OutputFunction | None = None,
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
        formats, include, exclude, allow_slower, batch_size, n_batches, output: As ``plan_compression``.
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
    if settings is not None and data is not None:
        check_healing(model, data, settings, output=output)
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
            will_heal=_healing_to_come(settings) if data is not None else False,
            output=output,
            observer=observer,
        )
    before, bytes_before = evaluate_metric(evaluate, model), _stored_bytes(model)
    original = model if not inplace else _original(model, settings, measure)
    compressed = apply_plan_(model if inplace else copy_model(model), plan, observer=observer)
    unhealed = evaluate_metric(evaluate, compressed)
    history: FitResult | None = None
    if settings is not None and data is not None:
        history = heal_(
            compressed,
            original,
            data,
            settings,
            output=output,
            evaluate=evaluate,
            checkpoint=checkpoint,
            seed=seed,
            observer=observer,
        )
    after = evaluate_metric(evaluate, compressed) if history is not None else unhealed
    report = _report(compressed, plan, name or type(model).__name__, bytes_before, history, seed)
    report = replace(
        report,
        metric_name=metric_name if evaluate else None,
        metric_before=before,
        metric_compressed=unhealed,
        metric_after=after,
        curve=_curve(report, before, unhealed, after if history is not None else None),
    )
    if heal and data is None:
        report = replace(report, notes=(*report.notes, "Nothing was healed: no data was given."))
    if measure:
        report = _measured(report, original, compressed, plan, example_inputs, batch_size)
    report.provenance["wall_s"] = round(perf_counter() - start, 2)
    return CompressionResult(compressed, plan, report)


def evaluate_metric(evaluate: Evaluate | None, model: nn.Module) -> float | None:
    """The first figure that ``evaluate`` gives."""
    if evaluate is None:
        return None
    modes = [(module, module.training) for module in model.modules()]
    try:
        with torch.no_grad():
            model.eval()
            figures = evaluate(model)
    finally:
        for module, mode in modes:
            module.training = mode
    return float(next(iter(figures.values()))) if isinstance(figures, Mapping) else float(figures)


_LONG = 3  # passes over the data from which healing counts as long


def _healing_to_come(settings: Heal | None) -> bool | Literal["long"]:
    """What the planning may count on."""
    if settings is None or settings.only_statistics:
        return False
    return "long" if (settings.epochs or 0) >= _LONG else True


def _heal_settings(heal: Heal | Mapping[str, Any] | bool | None, data: Iterable[Any] | None) -> Heal | None:
    if heal is False or data is None:
        return None
    if isinstance(heal, Heal):
        return heal
    return Heal.read(heal) if isinstance(heal, Mapping) else Heal()


def _original(model: nn.Module, settings: Heal | None, measure: bool) -> nn.Module:
    """A copy to teach and to compare with, where somebody will ask for it."""
    return copy_model(model) if settings is not None or measure else model


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
        notes=tuple(f"{layer.name} ({layer.kind}) was left alone: {layer.reason}." for layer in plan.left_alone),
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
) -> Report:
    example = _inputs_of(example_inputs)
    if example is None and plan.calibration is not None and plan.calibration.batches:
        example = _inputs_of(plan.calibration.batches[0])
    if example is None:
        return report
    batches = sorted({1, batch_size or _batch_axis(example)})
    latency = latency_rows(original, compressed, example, batches=batches)
    memory = memory_rows(original, compressed, example, batches=batches)
    return replace(
        report,
        latency=tuple(latency),
        memory=tuple(memory),
        layers=tuple(_with_implementation(layer, compressed) for layer in report.layers),
    )


def _with_implementation(layer: LayerReport, compressed: nn.Module) -> LayerReport:
    """How the layer ran and what it keeps, after both batch sizes were run."""
    module: Any = compressed.get_submodule(layer.name)
    if not isinstance(module, FactorizedLayer):
        return replace(layer, resident_bytes=resident_bytes(module))
    return replace(layer, implementation=module.how_it_ran(), resident_bytes=resident_bytes(module))


def _inputs_of(batch: Any) -> Any:
    if isinstance(batch, Mapping):
        return {name: value for name, value in batch.items() if name != "labels"}
    return batch[0] if isinstance(batch, (tuple, list)) else batch


def _batch_axis(example: Any) -> int:
    if isinstance(example, Mapping):
        example = next(iter(example.values()))
    if isinstance(example, (tuple, list)):
        example = example[0]
    return int(example.shape[0])
