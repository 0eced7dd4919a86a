"""The figures of a report, each a function from rows to a matplotlib ``Figure``.

Each takes ``narrow=True`` to be drawn for a telephone: the same data at the same size of letters, in other places.
Only the object interface is used: no pyplot, no figure registry, no change of global settings.
Colours are a fixed palette, so that a page can swap them for its own, see :func:`figure_svg`.
Matplotlib is imported when something is drawn: who only prints does not wait for it.
"""

from __future__ import annotations

import io
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

from tensortrain.compression.report.report import CurvePoint, LatencyRow, LayerReport, MemoryRow
from tensortrain.system.files import whole_file
from tensortrain.viz.report import text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "accuracy_curve",
    "figure_svg",
    "healing_curve",
    "latency_bars",
    "memory_bars",
    "params_bars",
    "save_figure",
    "spectra_panels",
]

INK, MUTED, GRID, PAPER = "#1e293b", "#64748b", "#e2e8f0", "#ffffff"
DENSE, COMPRESSED, MARK = "#94a3b8", "#2563eb", "#dc2626"
METHOD_COLOURS = ("#2563eb", "#d97706", "#059669", "#7c3aed", "#dc2626", "#0891b2", "#be185d", "#4d7c0f")
METHOD_MARKERS = "osD^vPXh"

WIDE = 10.8  # inches; 9 points then read as 12 pixels on the page
NARROW = 3.5  # 9 points read as 11 pixels where the page is 360 pixels wide
_FONT = 9.0
_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
_MAX_LAYERS = 40
_MAX_PANELS = 12
_MAX_LABELS = 10


def accuracy_curve(
    points: Sequence[CurvePoint], *, metric_name: str = "metric", dense: float | None = None, narrow: bool = False
) -> Figure:
    """Draw a metric against compression, one line per method, compression on a log axis.

    Args:
        points: ``metric_std`` draws error bars.
        metric_name: Label of the vertical axis.
        dense: Metric of the dense model, drawn as a dashed line.
    """
    points = [p for p in points if p.compression > 0 and math.isfinite(p.compression + p.metric)]
    figure, axes = _single(NARROW, 3.2) if narrow else _single(WIDE, 4.0)
    methods = list(dict.fromkeys(point.method for point in points))
    axes.set_xscale("log")
    for k, method in enumerate(methods):
        mine = sorted((p for p in points if p.method == method), key=lambda p: p.compression)
        _draw_method(axes, mine, k, labelled=len(points) <= _MAX_LABELS and not narrow)
    if dense is not None:
        axes.axhline(dense, color=MUTED, linestyle=(0, (4, 3)), linewidth=1, zorder=1, label="dense model")
    _log_axis(axes.xaxis, [p.compression for p in points], text.ratio)
    _metric_axis(axes, metric_name, [p.metric for p in points])
    axes.margins(x=0.08, y=0.16)
    axes.set_xlabel("compression (parameters before / after)")
    _legend_above(axes, narrow)
    return figure


def params_bars(layers: Sequence[LayerReport], *, narrow: bool = False) -> Figure:
    """Draw each layer's parameters before and after as bars on a log axis; the 40 largest layers."""
    shown = sorted(layers, key=lambda layer: layer.params_before, reverse=True)[:_MAX_LAYERS]
    shown = [layer for layer in layers if layer in shown]
    figure, axes = _single(NARROW, 0.85 + 0.66 * len(shown)) if narrow else _single(WIDE, 0.85 + 0.46 * len(shown))
    thick = 0.25 if narrow else 0.34
    rows = np.arange(len(shown))
    before = [max(layer.params_before, 1) for layer in shown]
    after = [max(layer.params_after, 1) for layer in shown]
    axes.set_xscale("log")
    upper, lower = (rows - 0.02, rows + 0.26) if narrow else (rows - 0.19, rows + 0.19)
    axes.barh(upper, before, thick, color=DENSE, label="before")
    axes.barh(lower, after, thick, color=COMPRESSED, label="after")
    for row, layer in enumerate(shown):
        _bar_label(axes, before[row], upper[row], text.compact(before[row]))
        gain = "" if layer.format == "dense" else f" · {text.ratio(layer.compression)} fewer"
        _bar_label(axes, after[row], lower[row], text.compact(after[row]) + gain)
    _log_axis(axes.xaxis, before + after, text.compact)
    low = 10 ** (math.floor(math.log10(min(before + after))) - 0.5)
    axes.set_xlim(low, max(before) * (max(before) / low) ** (0.4 if narrow else 0.12))
    axes.set_ylim(len(shown) - 0.45, -0.55)
    axes.grid(False, axis="y")
    _name_bars(axes, [layer.name for layer in shown], low, narrow)
    axes.set_xlabel("parameters" + ("" if len(shown) == len(layers) else f", {len(shown)} largest layers"))
    _legend_above(axes, narrow)
    return figure


def spectra_panels(layers: Sequence[LayerReport], *, narrow: bool = False) -> Figure:
    """Draw the singular values at each bond, one panel per layer, the kept rank marked; 12 layers at most."""
    shown = [layer for layer in layers if any(layer.spectra)][:_MAX_PANELS]
    n_columns = 3 if len(shown) in (3, 5, 6, 9) else min(4, max(len(shown), 1))
    n_columns = min(2, n_columns) if narrow else n_columns
    n_rows = math.ceil(len(shown) / n_columns)
    figure, grid = _panels(n_rows, n_columns, (1.7 if narrow else 2.3) * n_rows + 0.4, sharey=True, narrow=narrow)
    for axes, layer in zip(grid, shown, strict=False):
        _draw_spectra(axes, layer, 20 if narrow else 30)
    _spectrum_axis(grid[0], shown)
    for axes in grid[::n_columns]:
        axes.set_ylabel("singular value")
    for axes in grid[len(shown) :]:
        axes.set_visible(False)
    return figure


def latency_bars(rows: Sequence[LatencyRow], *, narrow: bool = False) -> Figure:
    """Draw median latencies, one panel per row with its own scale; whiskers reach the 90th percentile."""

    def draw(axes: Axes, row: LatencyRow) -> None:
        ends = (row.dense_p90_ms, row.compressed_p90_ms)
        for y, (value, end, colour) in enumerate(
            zip((row.dense_ms, row.compressed_ms), ends, (DENSE, COMPRESSED), strict=True)
        ):
            axes.barh(y, value, 0.55, color=colour)
            axes.errorbar(value, y, xerr=np.array([[0.0], [max(end - value, 0.0)]]), color=INK, linewidth=1, capsize=3)
            _bar_label(axes, max(value, end), y, text.ms_text(value))
        axes.set_xlim(0, 1.32 * max(row.dense_ms, row.compressed_ms, *ends))
        words = text.speed_text(row.speedup, row.speedup_low, row.speedup_high)
        axes.set_title(f"batch {row.batch}: {words}", fontsize=_FONT + 0.5, loc="left", color=INK)

    return _pair_panels([row for row in rows if math.isfinite(row.speedup)], draw, narrow)


def memory_bars(rows: Sequence[MemoryRow], *, narrow: bool = False) -> Figure:
    """Draw bytes held (solid) and extra bytes at the peak of a forward pass (light), one panel per row."""

    def draw(axes: Axes, row: MemoryRow) -> None:
        dense = (row.dense_resident_bytes, row.dense_peak_bytes)
        compressed = (row.compressed_resident_bytes, row.compressed_peak_bytes)
        for y, (held, extra) in enumerate((dense, compressed)):
            colour = (DENSE, COMPRESSED)[y]
            axes.barh(y, held, 0.55, color=colour)
            axes.barh(y, extra, 0.55, left=held, color=colour, alpha=0.4)
            _bar_label(axes, held + extra, y, text.bytes_text(held + extra))
        axes.set_xlim(0, 1.36 * max(sum(dense), sum(compressed), 1))
        _title(axes, f"batch {row.batch}")

    figure = _pair_panels(rows, draw, narrow)
    from matplotlib.patches import Patch

    keys = [Patch(color=INK, label="held"), Patch(color=INK, alpha=0.4, label="extra at the peak")]
    figure.legend(handles=keys, loc="outside lower center", ncols=2, frameon=False, fontsize=_FONT, labelcolor=INK)
    return figure


def healing_curve(
    healing: Sequence[Mapping[str, Any]],
    *,
    metric_name: str = "metric",
    dense: float | None = None,
    narrow: bool = False,
) -> Figure:
    """Draw the loss, and where it was recorded the metric, against the step of healing.

    Args:
        healing: Mappings with ``step``, ``loss`` and perhaps ``metric``.
        metric_name: Label of the metric's axis.
        dense: Metric of the dense model, drawn as a dashed line.
    """
    losses = [(row["step"], row["loss"]) for row in healing if row.get("loss") is not None]
    metrics = [(row["step"], row["metric"]) for row in healing if row.get("metric") is not None]
    curves = [curve for curve in (losses, metrics) if curve]
    n_curves = max(len(curves), 1)
    figure, grid = _panels(n_curves, 1, 2.4 * n_curves, narrow=True) if narrow else _panels(1, n_curves, 2.9)
    for axes, curve in zip(grid, curves, strict=False):
        steps, values = zip(*curve, strict=True)
        axes.plot(steps, values, color=COMPRESSED, linewidth=1.8, marker="o" if len(steps) <= 30 else "", ms=3.5)
        axes.xaxis.set_major_locator(_ticker().MaxNLocator(6, integer=True))
        axes.xaxis.set_major_formatter(_ticker().FuncFormatter(lambda value, _: text.compact(value)))
        axes.set_xlabel("healing step")
        axes.set_ylabel("loss")
        if curve is metrics:
            if dense is not None:
                axes.axhline(dense, color=MUTED, linestyle=(0, (4, 3)), linewidth=1, label="dense model")
                _legend_above(axes, narrow)
            _metric_axis(axes, metric_name, values)
    return figure


def save_figure(figure: Figure, path: str | os.PathLike[str]) -> Path:
    """Save a figure by the ending of ``path`` (png, svg, pdf); the file appears whole or not at all."""
    target = Path(path)
    with whole_file(target) as scratch, _settings({"svg.hashsalt": target.name}):
        figure.savefig(scratch, dpi=160, facecolor="white")
    return target


def figure_svg(figure: Figure, *, name: str) -> str:
    """Render a figure as an ``<svg>`` element to set into a page.

    Text stays text, the background is clear, and each palette colour ``#rrggbb`` becomes the CSS variable
    ``--c-rrggbb`` with the colour itself as fallback, so a page can restyle the figure for a dark scheme.

    Args:
        figure: The figure.
        name: Goes before every id, so that several figures can share a page.
    """
    buffer = io.StringIO()
    with _settings({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\s+xmlns(:\w+)?="[^"]*"', "", svg).replace("xlink:href", "href")
    svg = re.sub(r'(<svg[^>]*?)\s+width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?)\s+height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r'href="#', f'href="#{name}-', svg).replace("url(#", f"url(#{name}-")
    for colour in {INK, MUTED, GRID, PAPER, DENSE, COMPRESSED, MARK, *METHOD_COLOURS}:
        svg = svg.replace(colour, f"var(--c-{colour[1:]}, {colour})")
    return svg.strip()


def _ticker() -> ModuleType:
    from matplotlib import ticker

    return ticker


def _settings(values: dict[Any, Any]) -> AbstractContextManager[None]:
    """Matplotlib's settings with some others, for a while."""
    import matplotlib

    return matplotlib.rc_context(values)


def _empty(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _single(width: float, height: float) -> tuple[Figure, Axes]:
    figure = _empty(width, height)
    axes = figure.add_subplot()
    _dress(axes)
    return figure, axes


def _panels(
    n_rows: int, n_columns: int, height: float, *, sharey: bool = False, narrow: bool = False
) -> tuple[Figure, list[Axes]]:
    figure = _empty(NARROW if narrow else WIDE, height)
    figure.set_layout_engine("constrained", wspace=0.06)
    grid = list(figure.subplots(max(n_rows, 1), n_columns, sharey=sharey, squeeze=False).flat)
    for axes in grid:
        _dress(axes)
    return figure, grid


def _dress(axes: Axes) -> None:
    """Light grid behind the data, no box."""
    axes.set_axisbelow(True)
    axes.grid(True, color=GRID, linewidth=0.8)
    axes.tick_params(which="both", colors=MUTED, labelcolor=INK, labelsize=_FONT, length=0)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(DENSE)
    for label in (axes.xaxis.label, axes.yaxis.label):
        label.set_color(MUTED)
        label.set_fontsize(_FONT)


def _pair_panels(rows: Sequence[Any], draw: Callable[[Axes, Any], None], narrow: bool) -> Figure:
    """One panel per row, each holding a dense bar over a compressed one."""
    n_columns = 1 if narrow else min(3, max(len(rows), 1))
    n_rows = math.ceil(len(rows) / n_columns)
    figure, grid = _panels(n_rows, n_columns, (1.1 if narrow else 1.35) * n_rows + 0.35, narrow=narrow)
    for k, axes in enumerate(grid):
        if k >= len(rows):
            axes.set_visible(False)
            continue
        draw(axes, rows[k])
        axes.grid(False)
        axes.set_xticks([])
        axes.spines["bottom"].set_visible(False)
        axes.set_yticks([0, 1], ["dense", "compressed"] if k % n_columns == 0 else ["", ""])
        axes.set_ylim(1.6, -0.6)
    return figure


def _draw_method(axes: Axes, points: Sequence[CurvePoint], k: int, *, labelled: bool) -> None:
    colour = METHOD_COLOURS[k % len(METHOD_COLOURS)]
    axes.errorbar(
        [p.compression for p in points],
        [p.metric for p in points],
        yerr=[p.metric_std or 0.0 for p in points] if any(p.metric_std for p in points) else None,
        color=colour,
        marker=METHOD_MARKERS[k % len(METHOD_MARKERS)],
        markersize=5.5,
        linewidth=1.8,
        elinewidth=1.2,
        capsize=3,
        label=_escape(points[0].method),
        zorder=3,
    )
    for point in points if labelled else ():
        axes.annotate(
            _label(point.label, 18),
            (point.compression, point.metric),
            xytext=(7, 6) if k % 2 == 0 else (-7, -6),  # neighbouring curves label on opposite sides
            textcoords="offset points",
            ha="left" if k % 2 == 0 else "right",
            va="bottom" if k % 2 == 0 else "top",
            fontsize=_FONT - 1,
            color=colour,
            bbox={"boxstyle": "round,pad=0.1", "facecolor": PAPER, "edgecolor": "none"},
            zorder=2,
        )


def _draw_spectra(axes: Axes, layer: LayerReport, width: int) -> None:
    shades = np.linspace(1.0, 0.35, max(len(layer.spectra), 1))
    ranks = layer.inner_ranks
    for k, spectrum in enumerate(layer.spectra):
        values = np.asarray(spectrum, dtype=float)
        values = np.where(values > 0, values, np.nan)  # zero has no place on a log axis
        index = np.arange(1, len(values) + 1)
        axes.plot(index, values, color=COMPRESSED, alpha=shades[k], linewidth=1.5)
        if k < len(ranks) and 1 <= ranks[k] <= len(values):
            axes.plot(ranks[k], values[ranks[k] - 1], "o", color=MARK, markersize=5, zorder=4)
    axes.xaxis.set_major_locator(_ticker().MaxNLocator(4, integer=True, min_n_ticks=1))
    kept = text.ranks_text(ranks) if ranks else "dense"
    _title(axes, f"{_label(layer.name, width)}\nkept {text.shorten(kept, width - 2)}")


def _spectrum_axis(axes: Axes, layers: Sequence[LayerReport]) -> None:
    """One log axis for all panels, down to the smallest value but no further than nine decades."""
    values = [v for layer in layers for spectrum in layer.spectra for v in spectrum if v > 0]
    lowest = max(math.floor(math.log10(min(values, default=0.1))), -9)
    step = max(1, math.ceil(-lowest / 5))
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(_ticker().FixedLocator([10.0**k for k in range(0, lowest - 1, -step)]))
    axes.yaxis.set_minor_locator(_ticker().NullLocator())
    axes.yaxis.set_major_formatter(_ticker().FuncFormatter(lambda value, _: _power_of_ten(value)))
    axes.set_ylim(10.0**lowest, 2.0)


def _name_bars(axes: Axes, names: Sequence[str], left: float, narrow: bool) -> None:
    """Names beside the bars, or above them where there is no room beside."""
    rows = np.arange(len(names))
    if not narrow:
        axes.set_yticks(rows, [_label(name, 34) for name in names])
        return
    axes.set_yticks([])
    for row, name in enumerate(names):
        axes.annotate(
            _label(name, 40), (left, row - 0.19), xytext=(3, 0), textcoords="offset points", fontsize=_FONT, color=INK
        )


def _title(axes: Axes, words: str) -> None:
    axes.set_title(words, fontsize=_FONT, loc="left", color=INK)


def _bar_label(axes: Axes, x: float, y: float, words: str) -> None:
    axes.annotate(
        words, (x, y), xytext=(5, 0), textcoords="offset points", va="center", fontsize=_FONT - 0.5, color=INK
    )


def _metric_axis(axes: Axes, name: str, values: Sequence[float]) -> None:
    axes.set_ylabel(_escape(name))
    if all(text.is_share(name, value) for value in values):
        axes.yaxis.set_major_formatter(_ticker().FuncFormatter(lambda value, _: f"{100 * value:.4g} %"))


def _log_axis(axis: Any, values: Sequence[float], form: Callable[[float], str]) -> None:
    """Put readable ticks on a log axis: 1 2 5 steps over a short span, decades over a long one."""
    low, high = min(values, default=1.0), max(values, default=1.0)
    decades = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 1)
    steps: tuple[float, ...] = (1,)
    if high < 12 * low:
        steps = (1, 1.5, 2, 3, 5, 7)
    elif high < 500 * low:
        steps = (1, 2, 5)
    ticks = [step * 10.0**k for k in decades for step in steps]
    if not any(0.9 * low <= tick <= 1.1 * high for tick in ticks):
        ticks = sorted({low, high})  # all so close together that no round number is near
    axis.set_major_locator(_ticker().FixedLocator(ticks))
    axis.set_minor_locator(_ticker().NullLocator())
    axis.set_major_formatter(_ticker().FuncFormatter(lambda value, _: form(value)))


def _legend_above(axes: Axes, narrow: bool = False) -> None:
    axes.legend(
        loc="lower left",
        bbox_to_anchor=(0, 1.0),
        ncols=2 if narrow else 5,
        frameon=False,
        fontsize=_FONT,
        labelcolor=INK,
        borderaxespad=0.2,
        columnspacing=1.6,
    )


def _power_of_ten(value: float) -> str:
    exponent = round(math.log10(value))
    return f"{value:g}" if exponent >= -2 else "10" + str(exponent).translate(_SUPERSCRIPTS)


def _label(name: str, width: int) -> str:
    return _escape(text.shorten(name, width))


def _escape(words: str) -> str:
    return words.replace("$", r"\$")  # a pair of dollars would read as TeX
