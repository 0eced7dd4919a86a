"""A report as one HTML file that needs nothing beside it: inline style, inline figures, no scripts."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import partial
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from tensortrain.compression.report.report import LatencyRow, LayerReport, Report
from tensortrain.system.files import write_text_atomic
from tensortrain.viz.draw.networks import spec_diagram
from tensortrain.viz.draw.notation import paint
from tensortrain.viz.report import figures, text
from tensortrain.viz.report.page import PAGE, STYLE

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["report_html", "write_html"]


def write_html(report: Report, path: str | os.PathLike[str]) -> Path:
    """Write a report as one self-contained page; the file appears whole or not at all.

    Args:
        report: Sections without data are left out.
        path: Usually ends in ".html".

    Returns:
        Path: ``path``.

    Example:
        >>> write_html(report, "report.html")  # doctest: +SKIP
    """
    return write_text_atomic(path, report_html(report))


def report_html(report: Report) -> str:
    """Return the page of :func:`write_html` as text."""
    sections = (_tiles, _curve, _layers, _ranks, _networks, _spectra, _speed, _memory, _healing, _decisions, _notes)
    body = "\n".join(filter(None, (section(report) for section in sections)))
    return PAGE.format(
        title=escape(report.title), style=STYLE, header=_header(report), body=body, footer=_footer(report)
    )


def _header(report: Report) -> str:
    return (
        f"<header><p class=eyebrow>tensortrain compression report</p><h1>{escape(report.title)}</h1>"
        f"<p class=lead>{escape(report.model)} · budget {escape(report.budget)}</p></header>"
    )


def _tiles(report: Report) -> str:
    counts = [f"{text.count(report.params_before)} →", text.count(report.params_after)]
    tiles = [_tile("Parameters", _fewer(report.params_before, report.params_after), counts)]
    if report.metric_after is not None:
        tiles.append(_metric_tile(report))
    if report.bytes_before is not None and report.bytes_after is not None:
        change = f"{text.bytes_text(report.bytes_before)} → {text.bytes_text(report.bytes_after)}"
        tiles.append(_tile("Size on disk", _smaller(report.bytes_before, report.bytes_after), [change]))
    if report.latency:
        first, *others = report.latency
        details = [f"batch {row.batch}: {_speed_of(row)}" for row in others[:3]]
        heading = f"Speed at batch {first.batch}"
        tiles.append(_tile(heading, _speed_of(first), details, _tone(first)))
    if report.flops_before is not None and report.flops_after is not None:
        change = f"{text.compact(report.flops_before)} → {text.compact(report.flops_after)}"
        tiles.append(_tile("Flops", _fewer(report.flops_before, report.flops_after), [change, "per example"]))
    return f"<section class=tiles aria-label='Headline figures'>{''.join(tiles)}</section>"


def _metric_tile(report: Report) -> str:
    name = report.metric_name or "metric"
    details = []
    if report.metric_before is not None:
        details.append(text.metric_change(name, report.metric_before, report.metric_after, report.metric_noise))
        details.append(f"{text.metric_text(name, report.metric_before)} dense")
    if report.metric_compressed is not None:
        details.append(f"{text.metric_text(name, report.metric_compressed)} before healing")
    return _tile(name[:1].upper() + name[1:], text.metric_text(name, report.metric_after), details)


def _speed_of(row: LatencyRow) -> str:
    return text.speed_text(row.speedup, row.speedup_low, row.speedup_high)


def _tone(row: LatencyRow) -> str:
    return text.speed_tone(row.speedup, row.speedup_low, row.speedup_high)


def _tile(heading: str, value: str, details: Sequence[str], tone: str = "") -> str:
    number, _, unit = value.partition(" ") if value[:1].isdigit() else ("", "", value)  # words are set small
    return (
        f"<div class='tile {tone}'><h2>{escape(heading)}</h2><p class=value>{escape(number)} "
        f"<small>{escape(unit)}</small></p><p class=detail>{'<br>'.join(map(escape, details))}</p></div>"
    )


def _name(name: str) -> str:
    """A layer name that may break after its dots and underscores."""
    return f"<code>{escape(name).replace('.', '.<wbr>').replace('_', '_<wbr>')}</code>"


def _sizes(sizes: Sequence[int]) -> str:
    return f"<span class=nowrap>{text.product(sizes)}</span>"


def _fewer(before: float, after: float) -> str:
    return _factor(before, after, "fewer", "more")


def _smaller(before: float, after: float) -> str:
    return _factor(before, after, "smaller", "larger")


def _factor(before: float, after: float, less: str, more: str) -> str:
    if before <= 0 or after <= 0:
        return text.MISSING
    return f"{text.ratio(before / after)} {less}" if after <= before else f"{text.ratio(after / before)} {more}"


def _curve(report: Report) -> str:
    if not report.curve:
        return ""
    name = report.metric_name or "metric"
    best = max(report.curve, key=lambda point: point.compression)
    alt = (
        f"{name} against compression on a log axis for {len({p.method for p in report.curve})} methods; "
        f"the strongest compression shown is {text.ratio(best.compression)} by {best.method} "
        f"with {text.metric_text(name, best.metric)}."
    )
    seeds = max(point.n_seeds for point in report.curve)
    caption = f"Error bars: one standard deviation over up to {seeds} seeds." if seeds > 1 else ""
    rows = [
        [
            escape(p.method),
            escape(p.label),
            text.ratio(p.compression),
            text.metric_text(name, p.metric)
            + ("" if p.metric_std is None else f" ± {text.metric_text(name, p.metric_std)}"),
            str(p.n_seeds),
        ]
        for p in report.curve
    ]
    table = _table(["Method", "Setting", "Compression", escape(name), "Seeds"], rows, numeric_from=2)
    draw = partial(figures.accuracy_curve, report.curve, metric_name=name, dense=report.metric_before)
    return _section(
        f"{name[:1].upper() + name[1:]} against compression",
        _figure(draw, "curve", alt, caption) + _details("Numbers", table),
    )


def _layers(report: Report) -> str:
    if not report.layers:
        return ""
    n_left = sum(layer.format == "dense" for layer in report.layers)
    alt = "Parameters of each layer before and after, on a log axis. " + "; ".join(
        f"{layer.name}: {text.compact(layer.params_before)} to {text.compact(layer.params_after)}"
        for layer in report.layers[:20]
    )
    rows = [
        [
            _name(layer.name),
            f"{escape(layer.kind)} {_sizes(layer.shape)}",
            escape(layer.format),
            text.count(layer.params_before),
            text.count(layer.params_after),
            text.ratio(layer.compression),
            text.compact(layer.flops_before),
            text.compact(layer.flops_after),
            text.percent(layer.rel_error),
            _share(layer.predicted_loss),
            _share(layer.measured_loss),
            text.bytes_text(layer.resident_bytes),
        ]
        for layer in report.layers
    ]
    headings = [
        "Layer",
        "Weight",
        "Format",
        "Params",
        "After",
        "Ratio",
        "Flops",
        "After",
        "Error",
        "Loss predicted",
        "Measured",
        "Held",
    ]
    caption = f"{len(report.layers) - n_left} layers compressed, {n_left} left dense."
    note = (
        "<p class=caption>Flops per example. Error: predicted, of the layer's output, relative, weighted by "
        "the calibration data. Loss: share of the model's output that the layer spoils, predicted, and measured "
        "with this layer alone replaced and nothing healed. Held: parameters, buffers and cached dense weights.</p>"
    )
    return _section(
        "Parameters by layer",
        _figure(partial(figures.params_bars, report.layers), "params", alt, caption)
        + _table(headings, rows, numeric_from=3)
        + note,
    )


def _ranks(report: Report) -> str:
    compressed = [layer for layer in report.layers if layer.ranks]
    if not compressed:
        return ""
    rows = [
        [
            _name(layer.name),
            escape(layer.format),
            _sizes(layer.out_modes),
            _sizes(layer.in_modes),
            text.ranks_text(layer.full_ranks),
            f"<b>{text.ranks_text(layer.inner_ranks)}</b>",
            escape(layer.implementation) or text.MISSING,
        ]
        for layer in compressed
    ]
    headings = ["Layer", "Format", "Output modes", "Input modes", "Full ranks", "Kept ranks", "Runs as"]
    return _section("Ranks", _table(headings, rows, numeric_from=len(headings)))


def _networks(report: Report) -> str:
    """The largest layer of each format in the graphical notation of tensor networks."""
    largest: dict[str, LayerReport] = {}
    for layer in sorted(report.layers, key=lambda layer: layer.params_before, reverse=True):
        if layer.spec is not None:
            largest.setdefault(layer.format, layer)
    if not largest:
        return ""
    svgs = "".join(_network(layer) for layer in largest.values())
    caption = (
        "The largest layer of each format: dots are cores, lines are indices with their sizes, outputs up, inputs down."
    )
    return _section("What is stored", f"<figure>{svgs}<figcaption>{caption}</figcaption></figure>")


def _network(layer: LayerReport) -> str:
    assert layer.spec is not None
    diagram = spec_diagram(layer.spec, f"{layer.name}, {layer.format}")
    figure = paint(diagram)
    alt = f"{layer.name} as {layer.format} of ranks {text.ranks_text(layer.inner_ranks)}"
    attributes = f'role="img" aria-label="{escape(alt)}" style="max-width: {96 * figure.get_figwidth():.0f}px"'
    return figures.figure_svg(figure, name=f"network-{layer.format}").replace("<svg", f"<svg {attributes}", 1)


def _spectra(report: Report) -> str:
    drawn = [layer for layer in report.layers if any(layer.spectra)]
    if not drawn:
        return ""
    alt = "Singular values at each bond, falling, with the kept rank marked, for " + ", ".join(
        layer.name for layer in drawn[:12]
    )
    caption = (
        "Singular values over the largest one, one line per bond, first bond darkest. A red dot marks the "
        "kept rank, and is missing where the rank lies beyond the values recorded."
    )
    return _section(
        "Singular spectra", _figure(partial(figures.spectra_panels, report.layers), "spectra", alt, caption)
    )


def _speed(report: Report) -> str:
    if not report.latency:
        return ""
    alt = "Latency of one forward pass. " + "; ".join(
        f"batch {row.batch}: dense {text.ms_text(row.dense_ms)}, compressed {text.ms_text(row.compressed_ms)}"
        for row in report.latency
    )
    rows = [
        [
            text.count(row.batch),
            text.ms_text(row.dense_ms),
            text.ms_text(row.dense_p90_ms),
            text.ms_text(row.compressed_ms),
            text.ms_text(row.compressed_p90_ms),
            f"<span class='{_tone(row)}'>{_speed_of(row)}</span>",
            text.between_text(row.speedup_low, row.speedup_high),
            str(row.threads),
            escape(row.dtype),
        ]
        for row in report.latency
    ]
    headings = ["Batch", "Dense", "p90", "Compressed", "p90", "Change", "95 % within", "Threads", "Type"]
    caption = (
        "Median time of one forward pass, models run in turns; whiskers reach the 90th percentile. A change is named "
        "where the 95 % interval of the ratios of paired turns leaves out 1."
    )
    return _section(
        "Latency",
        _figure(partial(figures.latency_bars, report.latency), "latency", alt, caption)
        + _table(headings, rows, numeric_from=0),
    )


def _memory(report: Report) -> str:
    if not report.memory:
        return ""
    form = text.bytes_text
    alt = "Memory held and extra memory at the peak of one forward pass. " + "; ".join(
        f"batch {row.batch}: dense {form(row.dense_resident_bytes)} + {form(row.dense_peak_bytes)}, "
        f"compressed {form(row.compressed_resident_bytes)} + {form(row.compressed_peak_bytes)}"
        for row in report.memory
    )
    rows = [
        [
            text.count(row.batch),
            form(row.dense_resident_bytes),
            form(row.dense_peak_bytes),
            form(row.compressed_resident_bytes),
            form(row.compressed_peak_bytes),
        ]
        for row in report.memory
    ]
    headings = ["Batch", "Dense held", "Dense extra at peak", "Compressed held", "Compressed extra at peak"]
    caption = "Held: parameters, buffers and cached dense weights. Extra: activations and scratch of one pass."
    return _section(
        "Memory",
        _figure(partial(figures.memory_bars, report.memory), "memory", alt, caption)
        + _table(headings, rows, numeric_from=0),
    )


def _healing(report: Report) -> str:
    if not any(row.get("loss") is not None for row in report.healing):
        return ""
    name = report.metric_name or "metric"
    steps = [row for row in report.healing if row.get("loss") is not None]
    ends = [f"{row['loss']:.4g} at step {row['step']}" for row in (steps[0], steps[-1])]
    alt = f"Loss while healing: {ends[0]}, {ends[1]}."
    figure = partial(figures.healing_curve, report.healing, metric_name=name, dense=report.metric_before)
    return _section("Healing", _figure(figure, "healing", alt, ""))


def _why(layer: LayerReport) -> str:
    return f"{layer.decision}: {layer.why}" if layer.why else layer.decision


def _share(loss: float | None) -> str:
    """A share of the output, which may be a millionth."""
    return text.MISSING if loss is None else f"{100 * loss:.2g} %"


def _decisions(report: Report) -> str:
    rows = [[_name(layer.name), escape(layer.format), escape(_why(layer))] for layer in report.layers if layer.decision]
    return _section("Decisions", _table(["Layer", "Format", "Why"], rows, numeric_from=3)) if rows else ""


def _notes(report: Report) -> str:
    items = "".join(f"<li>{escape(note)}</li>" for note in report.notes)
    return _section("Notes", f"<ul>{items}</ul>") if items else ""


def _footer(report: Report) -> str:
    entries: list[tuple[str, str]] = []
    for key, value in report.provenance.items():
        if isinstance(value, dict):
            value = ", ".join(f"{name} {version}" for name, version in value.items())
        if value is not None and value != "":
            words = f"{value:.1f}" if isinstance(value, float) else str(value)
            entries.append((key.replace("_s", " (s)") if key.endswith("_s") else key, words))
    if not entries:
        return ""
    listed = "".join(f"<dt>{escape(key)}</dt><dd>{escape(value)}</dd>" for key, value in entries)
    return f"<footer><h2>Provenance</h2><dl>{listed}</dl></footer>"


def _section(heading: str, content: str) -> str:
    return f"<section class=card><h2>{escape(heading)}</h2>{content}</section>"


def _figure(draw: Callable[..., Figure], name: str, alt: str, caption: str) -> str:
    """A figure drawn twice, for wide and for narrow screens; the style sheet shows one of them."""
    svgs = ""
    for width in ("wide", "narrow"):
        svg = figures.figure_svg(draw(narrow=width == "narrow"), name=f"{name}-{width}")
        svgs += svg.replace("<svg", f'<svg class={width} role="img" aria-label="{escape(alt)}"', 1)
    below = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    return f"<figure>{svgs}{below}</figure>"


def _details(summary: str, content: str) -> str:
    return f"<details><summary>{escape(summary)}</summary>{content}</details>"


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]], *, numeric_from: int) -> str:
    """Set a table of cells that are HTML already; columns from ``numeric_from`` on are set right."""

    def cells(tag: str, row: Sequence[str]) -> str:
        return "".join(f"<{tag}{' class=n' if k >= numeric_from else ''}>{cell}</{tag}>" for k, cell in enumerate(row))

    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    head = f"<tr>{cells('th', headings)}</tr>"
    return f"<div class=scroll><table><thead>{head}</thead><tbody>{body}</tbody></table></div>"
