"""Tables and picture of the recorded cells: losses beside the rival's, and which formats were chosen how often."""

from __future__ import annotations

import itertools
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from study import by, record

from tensortrain.viz.report.figures import save_figure

__all__ = ["LOSSES", "format_rows", "loss_rows", "speed_rows", "summarize"]

Cell = dict[str, Any]
# What a model loses: the figure, and what the original has of it.
LOSSES = {
    "decoder": ("nats", None),
    "encoder": ("cosine", 1.0),
    "listener": ("hidden_cosine", 1.0),
    "phonemes": ("error", None),
    "photos": ("top1", 1.0),
    "voice": ("agreement", 1.0),
}
# What it may lose, by size; a number with a rival is a share of what whitened SVD loses.
ALLOWED: dict[str, dict[float, float]] = {
    "encoder": {1.25: 0.015, 1.5: 0.035, 2: 0.08, 3: 0.2},
    "phonemes": {1.25: 0.005, 1.5: 0.01, 2: 0.03},
    "photos": {1.5: 0.15},
    "voice": {1.5: 0.03},
}
ALLOWED_SHARES = {"decoder": 1 / 4, "listener": 1 / 3}
_LEAST_SHOWN = 1e-5
_TRIED = "tried: "  # a step with this name was taken back
_LAST = "forms tried"  # the library as it is now
_TITLES = {
    "decoder": "decoder: nats a token",
    "encoder": "encoder: 1 - cosine",
    "listener": "listener: 1 - cosine",
    "phonemes": "phonemes: error",
    "photos": "photos: other classes",
    "voice": "voice: other decisions",
}
_KINDS = {"ours": "ours", "rival": "whitened SVD"}


def summarize(out: Path, target: Path, config: Mapping[str, Any]) -> None:
    """Print the tables, and write ``results.json`` and ``results.png``."""
    found = [json.loads(path.read_text()) for path in sorted(out.glob("*.json"))]
    originals = {one["subject"]: one for one in found if "method" not in one}
    order = (list(config["subjects"]), list(config["methods"]))
    cells = sorted(
        (one for one in found if "method" in one and one["method"] in order[1]),
        key=lambda c: (
            order[0].index(c["subject"]),
            c["ratio"],
            order[1].index(c["method"]),
            c["step"] != "first",
            c["step"],
        ),
    )
    rows = loss_rows(cells, originals)
    speed = speed_rows(out)
    for row in rows:
        print(_line(row))
    formats = format_rows(cells)
    for row in formats:
        print(
            f"{row['subject']:<10} {row['format']:<10} {row['layers']:>4} layers in {row['cells']} plans, {row['step']}"
        )
    for row in speed:
        print(f"{row['model']:<50} {row['ms']:>8} ms, {row['times_faster']} times faster")
    record(target, rows, cells, originals=originals, formats=formats, speed=speed)
    if rows:
        save_figure(_picture(rows), target / "results.png")


def loss_rows(cells: Sequence[Cell], originals: Mapping[str, Cell]) -> list[Cell]:
    """A row a cell: its loss, and that over the least loss of the rivals at its size; ``None`` where it refused."""
    rows = []
    for (subject, ratio), group in by(cells, "subject", "ratio").items():
        losses = [_loss(cell, originals[subject]) for cell in group]
        rivals = [loss for cell, loss in zip(group, losses, strict=True) if _is_rival(cell) and loss is not None]
        allowed = _allowed(subject, ratio, min(rivals, default=None))
        for cell, loss in zip(group, losses, strict=True):
            share = loss / min(rivals) if rivals and loss is not None and min(rivals) > 0 else None
            names = ("step", "method", "params_after", "limit", "cpu_s", "refused")
            row = {"subject": subject, "ratio": ratio, **{name: cell.get(name) for name in names}}
            figures = {k: v for k, v in cell.items() if isinstance(v, float) and k not in ("ratio", "cpu_s")}
            kind = _KINDS[cell["settings"]["kind"]]
            rows.append({**row, "kind": kind, "loss": loss, "of_rival": share, "allowed": allowed, **figures})
    return rows


def _allowed(subject: str, ratio: float, rival: float | None) -> float | None:
    """What may be lost; ``None`` where nothing is asked, or no rival was run."""
    if subject in ALLOWED_SHARES:
        return None if rival is None else ALLOWED_SHARES[subject] * rival
    return ALLOWED.get(subject, {}).get(ratio)


def speed_rows(out: Path) -> list[Cell]:
    """What ``speed.py`` measured: a row a model."""
    rows = []
    for path in sorted((out / "speed").glob("*.json")):
        found = json.loads(path.read_text())
        own = {"subject": path.stem, "original_ms": found["times"]["original"]["ms"]}
        shared = {"date": found["provenance"]["date"], "cpu": found["provenance"]["cpu"]}
        rows += [{**own, "model": name, **one, **shared} for name, one in found["times"].items() if name != "original"]
    return rows


def _is_rival(cell: Cell) -> bool:
    return cell["settings"]["kind"] == "rival"


def _loss(cell: Cell, original: Cell) -> float | None:
    name, whole = LOSSES[cell["subject"]]
    if name not in cell:
        return None
    return cell[name] - original[name] if whole is None else whole - cell[name]


def format_rows(cells: Sequence[Cell]) -> list[Cell]:
    """How many layers of a model got which format, over all sizes, as planned from the whole menu."""
    plain = [cell for cell in cells if cell["method"] == "ours" and "formats" in cell]
    rows = []
    for (subject, step), group in by(plain, "subject", "step").items():
        total: Counter[str] = Counter()
        for cell in group:
            total.update(cell["formats"])
        own = {"subject": subject, "step": step, "cells": len(group)}
        rows += [{**own, "format": name, "layers": n} for name, n in total.most_common()]
    return rows


def _line(row: Cell) -> str:
    name = f"{row['subject']:<9} {row['ratio']:>4}x {row['method']:<34} {row['step']:<12}"
    if row["loss"] is None:
        return f"{name} refused: {str(row['refused'])[:60]}"
    share = "" if row["of_rival"] is None else f"{row['of_rival']:>7.2f} of the rival"
    if row["allowed"] is not None and row["kind"] == "ours":
        share += "" if row["loss"] <= row["allowed"] else f", allowed {row['allowed']:.2g}"
    second = next((f"{k} {row[k]:.4f}" for k in ("kl_other", "cosine_other", "agreement_other") if k in row), "")
    return f"{name} {row['params_after']:>10,} loss {row['loss']:>9.2g} {share:<36} {second} {row['cpu_s']} s"


_SHOWN = ("ours", "ours, refit", "ours, healed locally", "whitened SVD", "whitened SVD, tables too")
_COLUMNS = 3


def _picture(rows: Sequence[Cell]) -> Figure:
    """One panel a model: loss over ratio of the main methods, of ours at its last step; one legend for all."""
    subjects = list(dict.fromkeys(row["subject"] for row in rows))
    height = math.ceil(len(subjects) / _COLUMNS)
    figure = Figure(figsize=(10, 2.6 * height + 0.6), layout="constrained")
    panels = figure.subplots(height, _COLUMNS, squeeze=False).flat
    for axes, subject in itertools.zip_longest(panels, subjects):
        if subject is None:
            axes.set_axis_off()
        else:
            _panel(axes, [row for row in rows if row["subject"] == subject and row["loss"] is not None])
    lines = {label: line for axes in figure.axes for line, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    order = [label for label in (*_SHOWN, "allowed") if label in lines]
    figure.legend([lines[label] for label in order], order, loc="outside lower center", ncols=len(order), fontsize=8)
    return figure


def _panel(axes: Any, rows: Sequence[Cell]) -> None:
    for k, method in enumerate(_SHOWN):
        own = [row for row in rows if row["method"] == method and not row["step"].startswith(_TRIED)]
        own.sort(key=lambda row: row["step"] == _LAST)
        found = {row["ratio"]: row for row in own}  # of a size the last step stays
        points = [(ratio, max(row["loss"], _LEAST_SHOWN)) for ratio, row in sorted(found.items())]
        if points:
            style = "-" if method.startswith("ours") else "--"
            axes.plot(*zip(*points, strict=True), f"o{style}", color=f"C{k}", markersize=4, label=method)
    allowed = {row["ratio"]: row["allowed"] for row in rows if row["allowed"] is not None}
    if allowed:
        axes.plot(*zip(*allowed.items(), strict=True), "k_", markersize=14, label="allowed")
    sizes = sorted({row["ratio"] for row in rows})
    axes.set(title=_TITLES[rows[0]["subject"]], xlabel="times smaller", ylabel="loss", yscale="log")
    axes.set_xticks(sizes, [f"{size:g}" for size in sizes])
    axes.margins(x=0.15)
