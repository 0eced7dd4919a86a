"""The terminal tables: every number whole, nothing wider than 100 columns."""

from __future__ import annotations

import dataclasses
import io

import pytest
from rich.console import Console, RenderableType
from viz_sample import sample_report

from tensortrain.compression.report.report import Report
from tensortrain.viz import inspect_table, report_table


def printed(renderable: RenderableType, width: int = 100) -> str:
    console = Console(file=io.StringIO(), width=width, color_system=None)
    console.print(renderable)
    return console.file.getvalue()  # type: ignore[attr-defined]


@pytest.mark.parametrize("width", [100, 180])
def test_report_fits_and_cuts_no_number(width: int) -> None:
    report = sample_report()
    lines = printed(report_table(report), width).splitlines()
    assert max(map(len, lines)) <= 100
    text = "\n".join(lines)
    assert "…" not in text
    for layer in report.layers:
        assert f"{layer.params_before:,}" in text
        assert f"{layer.params_after:,}" in text
    assert f"{report.params_before:,} → {report.params_after:,}" in text
    assert "93.12 % → 92.68 %  (−0.44 points), 87.31 % before healing" in text
    assert "1.15× slower" in text
    assert "left dense: excluded by name" in text
    assert all(note in text for note in report.notes)


def test_nothing_is_claimed_within_the_noise() -> None:
    rows = [dataclasses.replace(row, speedup_low=0.9, speedup_high=5.0) for row in sample_report().latency]
    text = printed(report_table(dataclasses.replace(sample_report(), latency=rows, metric_noise=0.01)))
    assert text.count("no difference seen") == 2 * len(rows) + 1
    assert "faster" not in text
    assert "0.9× to 5×" in text
    assert "…" not in text


def test_minimal_report_has_only_the_summary() -> None:
    report = Report(title="t", model="m", budget="2x", params_before=4, params_after=2)
    text = printed(report_table(report))
    assert "4 → 2  2×" in text
    assert "Latency" not in text
    assert "Memory" not in text


def test_names_are_no_markup() -> None:
    layers = [dataclasses.replace(sample_report().layers[0], name="blocks[red].fc", decision="[bold]why")]
    report = dataclasses.replace(sample_report(), title="[red]title", layers=layers, notes=["[link]"])
    text = printed(report_table(report))
    assert all(words in text for words in ("blocks[red].fc", "[bold]why", "[red]title", "[link]"))


def test_inspect_table_of_mappings_and_dataclasses() -> None:
    rows = [
        {"layer": "fc[0]", "shape": (6, 8), "n_params": 1234567, "gain": 3.14159, "note": None},
        {"layer": "x", "shape": (), "n_params": 8, "gain": 0.5, "note": True},
    ]
    text = printed(inspect_table(rows, title="Layers"))
    assert all(words in text for words in ("fc[0]", "6×8", "1,234,567", "3.14", "n params", "yes", "Layers"))
    assert "1,792" in printed(inspect_table(sample_report().layers[:1]), width=400)


def test_inspect_table_of_nothing() -> None:
    assert printed(inspect_table([])).strip() == ""
