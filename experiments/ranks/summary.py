"""Tables and figure of what has been run so far."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from study import by, record, spread

from tensortrain.viz.report.figures import METHOD_COLOURS, METHOD_MARKERS, save_figure

__all__ = ["summarize"]


def summarize(out: Path, config: dict[str, Any], target: Path) -> None:
    """Write ``results.json`` and ``results.png`` and print the tables."""
    runs = {part: _runs(out / part, list(config[part]["methods"])) for part in config}
    tables = {
        "planted": _planted(runs["planted"]),
        "fashion": _fashion(runs["fashion"]),
        "svgd": [_without(run) for run in runs["svgd"]],
        "conv": [_without(run) for run in runs["conv"]],
    }
    every = [run for part in runs.values() for run in part]
    record(target, [{"part": part, **row} for part, rows in tables.items() for row in rows], every, config=config)
    for part, rows in tables.items():
        print(part)
        for row in rows:
            print("   ", ", ".join(f"{key} {value}" for key, value in row.items()))
    if tables["fashion"]:
        save_figure(_figure(tables["fashion"]), target / "results.png")


def _runs(folder: Path, order: list[str]) -> list[dict[str, Any]]:
    found = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    return sorted((run for run in found if run["method"] in order), key=lambda run: order.index(run["method"]))


def _without(run: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in run.items() if key not in ("provenance", "part")}


def _planted(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """How many seeds each method found, and its error over that of the true ranks, seed by seed."""
    best = {run["seed"]: run["test_error"] for run in runs if run["method"] == "true ranks"}
    rows = []
    for (name,), found in by(runs, "method").items():
        over = [run["test_error"] / best[run["seed"]] for run in found if run["seed"] in best]
        n_exact = sum(run["is_exact"] for run in found)
        rows.append(
            {"method": name, "n_exact": n_exact, "n_seeds": len(found), "error_over_true_max": max(over, default=None)}
        )
    return rows


def _fashion(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row a method and cut, means over seeds."""
    cuts = [{"method": run["method"], "seed": run["seed"], **cut} for run in runs for cut in run["cuts"]]
    rows = []
    for (name, budget), found in by(cuts, "method", "budget").items():
        row: dict[str, Any] = {"method": name, "budget": budget, "n_seeds": len(found)}
        row["ranks"] = found[0]["ranks"]
        for key in ("n_params", "accuracy", "log_likelihood"):
            row[key], row[f"{key}_std"] = spread(found, key)
        rows.append(row)
    return rows


def _figure(rows: list[dict[str, Any]]) -> Figure:
    """Parameters against accuracy: filled as each method left the net, hollow cut to the budget."""
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.add_subplot()
    for k, ((name,), found) in enumerate(by(rows, "method").items()):
        colour = "#111827" if k >= len(METHOD_COLOURS) else METHOD_COLOURS[k]  # the nets to compare with come last
        marker = METHOD_MARKERS[k % len(METHOD_MARKERS)]
        style = {"color": colour, "marker": marker, "markersize": 8}
        x, y = ([row[key] for row in found] for key in ("n_params", "accuracy"))
        axes.plot(x, [100 * value for value in y], color=colour, linewidth=1, alpha=0.5)
        for row in found:
            fill = "none" if row["budget"] else "full"
            label = name if row["budget"] is None else None
            error = 100 * row["accuracy_std"] if row["n_seeds"] > 1 else None
            axes.errorbar(
                row["n_params"], 100 * row["accuracy"], error, fillstyle=fill, label=label, capsize=2, **style
            )
    axes.axvline(4500, color="#64748b", linewidth=1, linestyle=":")
    axes.set_xscale("log")
    most = max(row["n_params"] for row in rows)
    axes.set_xticks([x for x in (4000, 6000, 10_000, 20_000, 50_000, 100_000, 500_000) if x <= 1.5 * most])
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.minorticks_off()
    axes.set_xlabel("parameters of the net, biases included")
    axes.set_ylabel("test accuracy in percent")
    axes.set_title("784-625-10 on Fashion-MNIST; hollow: cut to 4,500 parameters", loc="left", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right upper", frameon=False, fontsize=9)
    return figure
