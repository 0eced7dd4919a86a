"""The figures: the data they show, corner cases, no global state."""

from __future__ import annotations

import dataclasses
import os

import fresh
import matplotlib
import numpy as np
import pytest
from viz_sample import dense, sample_report

from tensortrain.compression.report.report import CurvePoint, LatencyRow, MemoryRow
from tensortrain.viz.report import figures


def bar_widths(axes) -> list[float]:
    return [patch.get_width() for patch in axes.patches]


def test_params_bars_show_before_and_after() -> None:
    layers = sample_report().layers
    widths = bar_widths(figures.params_bars(layers).axes[0])
    assert widths == [x.params_before for x in layers] + [x.params_after for x in layers]


def test_params_bars_keep_the_largest_layers_in_model_order() -> None:
    layers = [dense(f"l{k}", "Linear", (10 + k % 50, 10), "") for k in range(50)]
    axes = figures.params_bars(layers).axes[0]
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert names == [f"l{k}" for k in range(10, 50)]
    assert "40 largest layers" in axes.get_xlabel()


def test_a_single_compression_is_named_on_the_axis() -> None:
    axes = figures.accuracy_curve([CurvePoint("a", "tt", 116.3, 0.99)]).axes[0]
    low, high = axes.get_xlim()
    assert [tick for tick in axes.get_xticks() if low <= tick <= high] == [116.3]


def test_curve_has_one_line_per_method_with_error_bars() -> None:
    points = sample_report().curve
    axes = figures.accuracy_curve(points, metric_name="accuracy", dense=0.9).axes[0]
    assert axes.get_xscale() == "log"
    assert [c.get_label() for c in axes.containers] == ["tt", "low rank"]
    line = axes.containers[0].lines[0]
    tt = sorted((p.compression, p.metric) for p in points if p.method == "tt")
    assert np.allclose(line.get_xydata(), tt)
    assert axes.containers[0].has_yerr


def test_one_point_without_spread() -> None:
    figure = figures.accuracy_curve([CurvePoint("a", "tt", 1.0, 0.5)])
    assert not figure.axes[0].containers[0].has_yerr
    assert "<svg" in figures.figure_svg(figure, name="x")


def test_spectra_mark_the_kept_rank() -> None:
    conv = sample_report().layers[1]
    axes = figures.spectra_panels([conv]).axes[0]
    marks = [line.get_xydata()[0] for line in axes.lines if line.get_marker() == "o"]
    assert [int(x) for x, _ in marks] == list(conv.inner_ranks)
    assert [y for _, y in marks] == [s[r - 1] for s, r in zip(conv.spectra, conv.inner_ranks, strict=True)]


@pytest.mark.parametrize("spectra", [((0.0, 0.0),), ((1.0, 0.0, float("nan")),), ((1.0,),), ((),)])
def test_awkward_spectra_draw(spectra: tuple) -> None:
    layers = [dataclasses.replace(sample_report().layers[1], spectra=spectra)]
    if any(spectra):
        figures.figure_svg(figures.spectra_panels(layers), name="x")
    else:
        assert figures.spectra_panels(layers).axes[0].get_visible() is False


def test_latency_and_memory_bars() -> None:
    row = LatencyRow(1, 4.0, 2.0, 5.0, 3.0, 1, "float32")
    axes = figures.latency_bars([row]).axes[0]
    assert bar_widths(axes) == [4.0, 2.0]
    assert "2× faster" in axes.get_title(loc="left")
    axes = figures.memory_bars([MemoryRow(1, 10, 20, 30, 40)]).axes[0]
    assert bar_widths(axes) == [30, 10, 40, 20]


def test_rows_without_a_finite_number_are_left_out() -> None:
    nan = float("nan")
    good = LatencyRow(1, 4.0, 2.0, 5.0, 3.0, 1, "float32")
    figure = figures.latency_bars([LatencyRow(8, nan, 2.0, nan, 3.0, 1, "float32"), good])
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["batch 1: 2× faster"]
    points = [CurvePoint("a", "tt", 2.0, nan), CurvePoint("b", "tt", 4.0, 0.5)]
    assert figures.accuracy_curve(points).axes[0].containers[0].lines[0].get_xdata().tolist() == [4.0]


def test_healing_draws_the_metric_where_there_is_one() -> None:
    healing = [{"step": 0, "loss": 2.0}, {"step": 5, "loss": 1.0, "metric": 0.5}]
    loss, metric = figures.healing_curve(healing, metric_name="accuracy").axes
    assert loss.lines[0].get_ydata().tolist() == [2.0, 1.0]
    assert metric.lines[0].get_xdata().tolist() == [5]
    assert len(figures.healing_curve(healing[:1]).axes) == 1


@pytest.mark.parametrize("n_layers", [1, 3, 8])
def test_narrow_figures_show_the_same_data(n_layers: int) -> None:
    report = sample_report()
    layers = report.layers[-n_layers:]
    drawn = [figures.params_bars(layers, narrow=narrow).axes[0] for narrow in (False, True)]
    assert bar_widths(drawn[0]) == bar_widths(drawn[1])
    names = [text.get_text() for text in drawn[1].texts]
    assert {layer.name for layer in layers} <= set(names)
    bars = [figures.latency_bars(report.latency, narrow=narrow) for narrow in (False, True)]
    assert [bar_widths(axes) for axes in bars[0].axes] == [bar_widths(axes) for axes in bars[1].axes]
    assert all(figure.get_figwidth() == figures.NARROW for figure in (drawn[1].figure, bars[1]))


def test_settings_are_left_as_they_were() -> None:
    before = dict(matplotlib.rcParams)
    figures.figure_svg(figures.params_bars(sample_report().layers), name="x")
    assert dict(matplotlib.rcParams) == before


def test_pyplot_is_never_loaded() -> None:
    code = "import sys, tensortrain.viz.report.figures; print('matplotlib.pyplot' in sys.modules)"
    done = fresh.run(code)
    assert (done.stdout.strip(), done.stderr) == ("False", "")


@pytest.mark.parametrize("ending, magic", [("png", b"\x89PNG"), ("svg", b"<?xml")])
def test_save_figure(tmp_path, ending: str, magic: bytes) -> None:
    figure = figures.latency_bars(sample_report().latency)
    path = figures.save_figure(figure, tmp_path / "sub" / f"speed.{ending}")
    assert path.read_bytes().startswith(magic)
    assert os.listdir(path.parent) == [path.name]
