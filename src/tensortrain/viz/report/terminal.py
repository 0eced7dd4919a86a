"""Reports and layer tables for a terminal, within 100 columns."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.constrain import Constrain
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from tensortrain.compression.report.report import LatencyRow, LayerReport, MemoryRow, Report
from tensortrain.viz.report import text

__all__ = ["inspect_table", "report_table"]

_WIDTH = 100
_MAX_DECISIONS = 12


def report_table(report: Report) -> RenderableType:
    """Build what a terminal shows of a report: summary, layers, latency and memory, notes.

    Args:
        report: Sections without data are left out.

    Returns:
        A rich renderable of at most 100 columns.

    Example:
        >>> rich.print(report_table(report))  # doctest: +SKIP
    """
    parts: list[RenderableType] = [_summary(report)]
    if report.layers:
        parts += [_layer_table(report.layers), *_decisions(report.layers)]
    if report.latency:
        parts.append(_latency_table(report.latency))
    if report.memory:
        parts.append(_memory_table(report.memory))
    parts += [Text(f"• {note}", style="dim") for note in report.notes]
    return Constrain(Group(*parts), _WIDTH)


def inspect_table(rows: Sequence[Any], *, title: str | None = None) -> RenderableType:
    """Build a table of any rows: mappings or dataclasses; columns are the keys of the first.

    Args:
        rows: Values may be numbers, text, sequences of sizes, or None.
        title: Heading.

    Returns:
        A rich renderable of at most 100 columns; numbers are set right with thousands separators.
    """
    records = [_as_mapping(row) for row in rows]
    columns = list(records[0]) if records else []
    table = _table(title)
    for name in columns:
        numeric = any(_is_number(record.get(name)) for record in records)
        table.add_column(
            str(name).replace("_", " "),
            justify="right" if numeric else "left",
            no_wrap=numeric,
            overflow="fold",
        )
    for record in records:
        table.add_row(*(Text(_cell(record.get(name))) for name in columns))
    return Constrain(table, _WIDTH)


def _summary(report: Report) -> Panel:
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    for label, value in _summary_lines(report):
        grid.add_row(label, value)
    return Panel(grid, title=Text(report.title), title_align="left", border_style="blue")


def _summary_lines(report: Report) -> list[tuple[str, Text]]:
    lines = [
        ("model", Text(report.model)),
        ("budget", Text(report.budget)),
        ("parameters", _change(report.params_before, report.params_after, text.count)),
    ]
    if report.bytes_before is not None and report.bytes_after is not None:
        lines.append(("size on disk", _change(report.bytes_before, report.bytes_after, text.bytes_text)))
    if report.flops_before is not None and report.flops_after is not None:
        lines.append(("flops/example", _change(report.flops_before, report.flops_after, text.compact)))
    if report.metric_name is not None and report.metric_after is not None:
        lines.append((report.metric_name, Text(_metric_line(report))))
    for row in report.latency:
        lines.append((f"batch {row.batch}", _speed(row)))
    return lines


def _metric_line(report: Report) -> str:
    name = report.metric_name
    line = text.metric_text(name, report.metric_after)
    if report.metric_before is not None:
        change = text.metric_change(name, report.metric_before, report.metric_after, report.metric_noise)
        line = f"{text.metric_text(name, report.metric_before)} → {line}  ({change})"
    if report.metric_compressed is not None:
        line += f", {text.metric_text(name, report.metric_compressed)} before healing"
    return line


def _change(before: float, after: float, form: Any) -> Text:
    factor = before / after if after else float("nan")
    style = "bold green" if factor >= 1 else "bold red"
    return Text.assemble(f"{form(before)} → {form(after)}  ", (text.ratio(factor), style))


def _layer_table(layers: Sequence[LayerReport]) -> Table:
    table = _table("Layers")
    table.add_column("layer", overflow="fold", min_width=12)
    table.add_column("weight", overflow="fold", min_width=9)
    table.add_column("format, ranks", overflow="fold", min_width=8)
    for heading in ("params", "after", "ratio", "error"):
        table.add_column(heading, justify="right", no_wrap=True)
    for layer in layers:
        left = layer.format == "dense"
        how = "dense" if left else f"{layer.format} {text.ranks_text(layer.inner_ranks)}"
        table.add_row(
            Text(layer.name),
            Text(f"{layer.kind} {'×'.join(map(str, layer.shape))}"),
            Text(how),
            text.count(layer.params_before),
            text.count(layer.params_after),
            Text("" if left else text.ratio(layer.compression), style="green"),
            text.percent(layer.rel_error),
            style="dim" if left else "",
        )
    return table


def _decisions(layers: Sequence[LayerReport]) -> list[RenderableType]:
    """Why layers were left dense, the first few of them."""
    left = [layer for layer in layers if layer.format == "dense" and layer.decision]
    lines: list[RenderableType] = [
        Text.assemble("  ", (layer.name, "bold"), f": {layer.decision}", style="dim") for layer in left[:_MAX_DECISIONS]
    ]
    if len(left) > _MAX_DECISIONS:
        lines.append(Text(f"  and {len(left) - _MAX_DECISIONS} more left dense", style="dim"))
    return lines


def _latency_table(rows: Sequence[LatencyRow]) -> Table:
    kinds = list(dict.fromkeys(f"{row.dtype}, {row.threads} thread{'s' * (row.threads != 1)}" for row in rows))
    table = _table(f"Latency of one forward pass: median (90th percentile), {'; '.join(kinds)}")
    for heading in ("batch", "dense", "compressed", "", "95 % within"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            text.count(row.batch),
            f"{text.ms_text(row.dense_ms)} ({text.ms_text(row.dense_p90_ms)})",
            f"{text.ms_text(row.compressed_ms)} ({text.ms_text(row.compressed_p90_ms)})",
            _speed(row),
            text.between_text(row.speedup_low, row.speedup_high),
        )
    return table


def _memory_table(rows: Sequence[MemoryRow]) -> Table:
    table = _table("Memory: held + extra at the peak of one forward pass")
    for heading in ("batch", "dense", "compressed", "in all"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        dense = (row.dense_resident_bytes, row.dense_peak_bytes)
        compressed = (row.compressed_resident_bytes, row.compressed_peak_bytes)
        factor = sum(dense) / max(sum(compressed), 1)
        table.add_row(
            text.count(row.batch),
            " + ".join(map(text.bytes_text, dense)),
            " + ".join(map(text.bytes_text, compressed)),
            Text(text.ratio(factor), style="green" if factor >= 1 else "red"),
        )
    return table


def _table(title: str | None) -> Table:
    return Table(
        title=None if title is None else Text(title, style="bold"),
        title_justify="left",
        box=box.SIMPLE_HEAD,
        header_style="bold blue",
        pad_edge=False,
    )


def _speed(row: LatencyRow) -> Text:
    measured = row.speedup, row.speedup_low, row.speedup_high
    style = {"good": "green", "bad": "red", "": ""}[text.speed_tone(*measured)]
    return Text(text.speed_text(*measured), style=style)


def _as_mapping(row: Any) -> Mapping[str, Any]:
    if isinstance(row, Mapping):
        return row
    return {field.name: getattr(row, field.name) for field in dataclasses.fields(row)}


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _cell(value: Any) -> str:
    if value is None:
        return text.MISSING
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return text.count(value)
    if isinstance(value, float):
        return f"{value:.3g}"
    if isinstance(value, (list, tuple)):
        return "×".join(map(str, value)) or text.MISSING
    return str(value)
