"""Tables and picture of the recorded cells: losses beside the rival's, and which formats were chosen how often."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from study import by, record

from tensortrain.viz.report.figures import save_figure

__all__ = ["LOSSES", "format_rows", "loss_rows", "summarize"]

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
    for row in rows:
        print(_line(row))
    formats = format_rows(cells)
    for row in formats:
        print(
            f"{row['subject']:<10} {row['format']:<10} {row['layers']:>4} layers in {row['cells']} plans, {row['step']}"
        )
    record(target, rows, cells, originals=originals, formats=formats)
    if rows:
        save_figure(_picture(rows), target / "results.png")


def loss_rows(cells: Sequence[Cell], originals: Mapping[str, Cell]) -> list[Cell]:
    """A row a cell: its loss, and that over the least loss of the rivals at its size; ``None`` where it refused."""
    rows = []
    for (subject, ratio), group in by(cells, "subject", "ratio").items():
        losses = [_loss(cell, originals[subject]) for cell in group]
        rivals = [loss for cell, loss in zip(group, losses, strict=True) if _is_rival(cell) and loss is not None]
        for cell, loss in zip(group, losses, strict=True):
            share = loss / min(rivals) if rivals and loss is not None and min(rivals) > 0 else None
            names = ("step", "method", "params_after", "limit", "cpu_s", "refused")
            row = {"subject": subject, "ratio": ratio, **{name: cell.get(name) for name in names}}
            figures = {k: v for k, v in cell.items() if isinstance(v, float) and k not in ("ratio", "cpu_s")}
            rows.append({**row, "kind": _KINDS[cell["settings"]["kind"]], "loss": loss, "of_rival": share, **figures})
    return rows


def _is_rival(cell: Cell) -> bool:
    return cell["settings"]["kind"] == "rival"


def _loss(cell: Cell, original: Cell) -> float | None:
    name, whole = LOSSES[cell["subject"]]
    if name not in cell:
        return None
    return cell[name] - original[name] if whole is None else whole - cell[name]


def format_rows(cells: Sequence[Cell]) -> list[Cell]:
    """How many layers of a model got which format, over all sizes, for the method as it comes."""
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
    second = next((f"{k} {row[k]:.4f}" for k in ("kl_other", "cosine_other", "agreement_other") if k in row), "")
    return f"{name} {row['params_after']:>10,} loss {row['loss']:>9.2g} {share:<20} {second} {row['cpu_s']} s"


def _picture(rows: Sequence[Cell]) -> Figure:
    """One panel a model: loss over ratio of each method, the last step of ours."""
    subjects = list(dict.fromkeys(row["subject"] for row in rows))
    figure = Figure(figsize=(3.2 * len(subjects), 3), layout="constrained")
    for axes, subject in zip(figure.subplots(1, len(subjects), squeeze=False)[0], subjects, strict=True):
        own = [row for row in rows if row["subject"] == subject and row["loss"] is not None]
        for (method, step), group in by(own, "method", "step").items():
            style = "--" if group[0]["kind"] != "ours" else "-"
            label = method if step == "first" else f"{method}, {step}"
            axes.plot(
                [row["ratio"] for row in group], [max(row["loss"], 1e-6) for row in group], f"o{style}", label=label
            )
        axes.set(title=subject, xlabel="times smaller", ylabel="loss", yscale="log")
        axes.legend(fontsize=6)
    return figure
