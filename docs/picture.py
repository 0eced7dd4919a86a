"""Draw the picture that README.md opens with, from the recorded runs: ``python docs/picture.py``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MultipleLocator

from tensortrain.viz.report.figures import COMPRESSED, DENSE, GRID, INK, MUTED, save_figure
from tensortrain.viz.report.text import bytes_text, ratio

ROOT = Path(__file__).parents[1]
WAYS = {  # methods of the record, best known first
    "tensortrain": "tensortrain",
    "uniform-tt": "trains, one rank everywhere",
    "uniform-svd": "low rank, one rank everywhere",
    "tt-scratch": "trains, trained from scratch",
}


def picture() -> Figure:
    """Sizes as areas on the left, accuracies at 40x on the right."""
    study, demo = _read("conv_fc/results.json"), _read("demo/report.json")
    figure = Figure(figsize=(10.4, 3.6))
    _draw_sizes(figure.add_axes((0.015, 0.06, 0.36, 0.78)), demo)
    _draw_accuracies(figure.add_axes((0.58, 0.1, 0.405, 0.74)), study)
    fewer = ratio(demo["params_before"] / demo["params_after"])
    for x, words in ((0.015, f"{fewer} fewer parameters"), (0.4, "Accuracy at 40×, after the same healing, 3 seeds")):
        figure.text(x, 0.92, words, color=INK, fontsize=13)
    return figure


def _read(name: str) -> Any:
    return json.loads((ROOT / "experiments" / name).read_text(encoding="utf-8"))


def _draw_sizes(axes: Axes, report: dict[str, Any]) -> None:
    before, after = report["bytes_before"], report["bytes_after"]
    small = (after / before) ** 0.5
    axes.add_patch(Rectangle((0, 0), 1, 1, color=DENSE, linewidth=0))
    axes.add_patch(Rectangle((1.12, 0), small, small, color=COMPRESSED, linewidth=0))
    axes.text(0.5, 0.5, f"{bytes_text(before)}\nas trained", ha="center", va="center", color="white", fontsize=13)
    axes.text(
        1.12, small + 0.05, f"{bytes_text(after)}\ncompressed", ha="left", va="bottom", color=COMPRESSED, fontsize=13
    )
    axes.set_xlim(-0.02, 1.72)
    axes.set_ylim(-0.02, 1.02)
    axes.set_aspect("equal", anchor="SW")
    axes.set_axis_off()


def _draw_accuracies(axes: Axes, study: dict[str, Any]) -> None:
    rows = {row["method"]: row for row in study["rows"] if row["budget"] == "40x"}
    dense = 100 * sum(study["dense_accuracy"].values()) / len(study["dense_accuracy"])
    axes.axvline(dense, color=MUTED, linestyle=(0, (4, 3)), linewidth=1.2, zorder=1)
    axes.text(dense + 0.02, len(WAYS) - 0.65, f"as trained\n{dense:.1f} %", va="bottom", color=MUTED, fontsize=10)
    for k, method in enumerate(WAYS):
        mean, spread = 100 * rows[method]["accuracy_mean"], 100 * rows[method]["accuracy_std"]
        colour = COMPRESSED if k == 0 else DENSE
        axes.errorbar(mean, k, xerr=spread, fmt="o", color=colour, markersize=9, elinewidth=2, capsize=4, zorder=3)
        axes.annotate(
            f"{mean:.1f} %", (mean, k), xytext=(0, 9), textcoords="offset points", ha="center", fontsize=10, color=INK
        )
    axes.set_ylim(len(WAYS) - 0.6, -0.7)
    axes.set_yticks(range(len(WAYS)), list(WAYS.values()))
    axes.xaxis.set_major_locator(MultipleLocator(0.5))
    axes.xaxis.set_major_formatter("{x:g} %")
    axes.grid(True, axis="x", color=GRID)
    axes.tick_params(length=0, labelsize=10.5, labelcolor=INK)
    for spine in axes.spines.values():
        spine.set_visible(False)


if __name__ == "__main__":
    print(save_figure(picture(), ROOT / "docs" / "picture.png"))
