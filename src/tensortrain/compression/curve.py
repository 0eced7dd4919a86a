"""One calibration, many budgets: how much of a model can go at what loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from tensortrain.compression.api import CompressionResult, compress, plans_for
from tensortrain.compression.choose.budget import BudgetLike
from tensortrain.compression.report.report import CurvePoint, Report
from tensortrain.errors import BudgetError, KindError
from tensortrain.system.processes import together

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Pareto", "ParetoRow", "pareto"]

_NOT_TAKEN: dict[str, Any] = {"budget": None, "plan": None, "stages": None, "n_stages": 1, "inplace": False}


@dataclass(frozen=True)
class ParetoRow:
    """One budget in figures.

    Attributes:
        budget: As it was asked for.
        params, n_bytes: What is left.
        compression: Parameters before over parameters after.
        predicted_loss: Share of the output's mean square that the plan is predicted to spoil; None without data.
        speedup: Measured, of the largest batch size that was timed: how many times faster than the original.
        latency_ms: Of one forward pass there.
        metric_compressed, metric: The user's figure before healing, and at the end.
    """

    budget: str
    params: int
    n_bytes: int | None
    compression: float
    predicted_loss: float | None
    speedup: float | None
    latency_ms: float | None
    metric_compressed: float | None
    metric: float | None


@dataclass(frozen=True)
class Pareto:
    """Compressed models for several budgets, in the order of these. Prints as a table.

    Attributes:
        results: One a budget: ``model``, ``plan`` and ``report``.
    """

    results: tuple[CompressionResult, ...]

    @property
    def rows(self) -> tuple[ParetoRow, ...]:
        """The results in figures."""
        return tuple(map(_row, self.results))

    @property
    def report(self) -> Report:
        """The report of the smallest model, with the curve over all budgets and a note on each."""
        smallest = min((result.report for result in self.results), key=lambda report: report.params_after)
        points = dict.fromkeys(point for result in self.results for point in _points(result.report))
        notes = [f"Budget {_told(row)}." for row in self.rows]
        return replace(smallest, curve=tuple(points), notes=(*smallest.notes, *notes))

    def plot(self, path: str | Path | None = None) -> Figure:
        """Draw the curve: the user's figure against compression, or the predicted loss where there is no figure.

        Args:
            path: Where to save it too; the ending says how.
        """
        from matplotlib.figure import Figure

        figure = Figure(figsize=(6.4, 4.0), layout="constrained")
        axes = figure.add_subplot()
        axes.set_xscale("log")
        name = self._drawn_name
        for label, column in self._columns:
            found = sorted((row.compression, value) for row in self.rows if (value := column(row)) is not None)
            if found:
                axes.plot(*zip(*found, strict=True), marker="o", label=label)
        before = self.results[0].report.metric_before
        if before is not None:
            axes.axhline(before, color="0.5", linestyle="--", linewidth=1, label="original")
        axes.set_xticks([row.compression for row in self.rows], [f"{row.compression:.3g}x" for row in self.rows])
        axes.minorticks_off()
        axes.set_xlabel("compression (parameters before / after)")
        axes.set_ylabel(name)
        if axes.lines:
            axes.legend()
        if path is not None:
            figure.savefig(path)
        return figure

    @property
    def _drawn_name(self) -> str:
        return self.results[0].report.metric_name or "predicted loss"

    @property
    def _columns(self) -> list[tuple[str, Callable[[ParetoRow], float | None]]]:
        if self.results[0].report.metric_name is None:
            return [("predicted", lambda row: row.predicted_loss)]
        healed = [("healed", lambda row: row.metric)] if any(r.report.healing for r in self.results) else []
        return [("before healing", lambda row: row.metric_compressed), *healed]

    def __str__(self) -> str:
        name = self.results[0].report.metric_name or "metric"
        heads = (
            "budget",
            "params",
            "compression",
            "predicted loss",
            "ms",
            "speed-up",
            f"{name} cut",
            f"{name} at the end",
        )
        cells = [heads, *(_cells(row) for row in self.rows)]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in cells]
        return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def pareto(model: nn.Module, budgets: Sequence[BudgetLike], **keywords: Any) -> Pareto:
    """Compress a model to several budgets, with one calibration for all of them.

    Args:
        model: Trained; not changed.
        budgets: As ``compress`` takes them, such as ``["1.5x", "2x", "4x"]``.
        keywords: Those of ``compress``, but for ``plan``, ``stages``, ``n_stages`` and ``inplace``. ``checkpoint`` is
            the file of the first budget; those of the others stand beside it, numbered.

    Returns:
        Pareto: ``results``, ``rows``, ``report`` and ``plot()``.

    Raises:
        BudgetError: There is no budget, or one of them cannot be read or reached; nothing was healed by then.

    Cost: one calibration and one set of menus; for each budget an allocation, the decompositions, and the healing.

    Example:
        >>> net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
        >>> [row.compression > 1.4 for row in pareto(net, ["1.5x", "3x"], measure=False).rows]
        [True, True]
    """
    _check(budgets, keywords)
    judged = _judged_once(model, keywords)
    with together():
        plans = plans_for(model, budgets, **judged)
        files = _files(keywords.get("checkpoint"), len(budgets))
        results = [
            compress(model, budget=budget, plan=plan, **{**judged, "checkpoint": file})
            for budget, plan, file in zip(budgets, plans, files, strict=True)
        ]
    return Pareto(tuple(results))


def _check(budgets: Sequence[BudgetLike], keywords: Mapping[str, Any]) -> None:
    if isinstance(budgets, (str, Mapping)) or not isinstance(budgets, Sequence) or not budgets:
        raise BudgetError(f"budgets must be a list of them: found {budgets!r}. Pass such as ['1.5x', '2x', '4x'].")
    taken = next((name for name, usual in _NOT_TAKEN.items() if keywords.get(name, usual) != usual), None)
    if taken is not None:
        raise KindError(f"budgets of one calibration are each compressed once: {taken} is given. Leave it out.")


def _judged_once(model: nn.Module, keywords: Mapping[str, Any]) -> dict[str, Any]:
    """The keywords, with a function that judges the original once for all budgets."""
    kept = {name: value for name, value in keywords.items() if name not in _NOT_TAKEN}
    evaluate = keywords.get("evaluate")
    if not callable(evaluate):
        return kept
    known: list[Any] = []

    def once(each: nn.Module) -> Any:
        if each is not model:
            return evaluate(each)
        if not known:
            known.append(evaluate(each))
        return known[0]

    return {**kept, "evaluate": once}


def _files(checkpoint: str | Path | None, n: int) -> list[Path | None]:
    if checkpoint is None:
        return [None] * n
    path = Path(checkpoint)
    return [path, *(path.with_name(f"{path.stem}-budget-{k}{path.suffix}") for k in range(2, n + 1))]


def _row(result: CompressionResult) -> ParetoRow:
    report, timed = result.report, max(result.report.latency, key=lambda row: row.batch, default=None)
    return ParetoRow(
        budget=report.budget,
        params=report.params_after,
        n_bytes=report.bytes_after,
        compression=report.compression,
        predicted_loss=result.plan.loss,
        speedup=timed.speedup if timed else None,
        latency_ms=timed.compressed_ms if timed else None,
        metric_compressed=report.metric_compressed,
        metric=report.metric_after,
    )


def _points(report: Report) -> list[CurvePoint]:
    return [replace(point, label=report.budget) if point.method != "original" else point for point in report.curve]


def _told(row: ParetoRow) -> str:
    parts = [f"{row.params:,} parameters ({row.compression:.3g}x fewer)"]
    if row.predicted_loss is not None:
        parts.append(f"predicted to spoil {row.predicted_loss:.2%} of the output")
    if row.metric is not None:
        parts.append(f"metric {row.metric:.4g}")
    return f"{row.budget}: " + ", ".join(parts)


def _cells(row: ParetoRow) -> tuple[str, ...]:
    return (
        row.budget,
        f"{row.params:,}",
        f"{row.compression:.3g}x",
        _number(row.predicted_loss),
        _number(row.latency_ms),
        "" if row.speedup is None else f"{row.speedup:.2f}x",
        _number(row.metric_compressed),
        _number(row.metric),
    )


def _number(value: float | None) -> str:
    return "" if value is None or math.isnan(value) else f"{value:.4g}"
