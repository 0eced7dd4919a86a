"""From a record of ``layers.py`` to lines, a table on the terminal and a page of the documentation."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from layer_cases import PHASES
from layer_peers import DENSE, OURS
from tensor_report import markdown_table, provenance_lines

from tensortrain.system.files import write_text_atomic

__all__ = ["line", "lines", "show", "write"]

PEER_TARGET, PLAN_TARGET, GRID_MEAN_TARGET = 3.0, 1.15, 1.0
EMBEDDING_TARGETS, RECURRENT_TARGET = (3.0, 100.0), 0.3
Row = dict[str, Any]


# -- figures of one row -------------------------------------------------------------------------------


def over_dense(row: Row, name: str = OURS) -> float | None:
    """Time of ``nn.Linear`` over that of a contestant; higher is better."""
    return _ratio(row, DENSE, name)


def over_peer(row: Row) -> float | None:
    """Time of the best peer over ours."""
    return _ratio(row, best_peer(row), OURS)


def over_floor(row: Row) -> float | None:
    found = row["contestants"].get(OURS)
    return found and found["median_ms"] / row["floor"]["ms"]


def best_peer(row: Row) -> str:
    """The fastest way of any peer, or ""."""
    medians = {
        name: found["median_ms"] for name, found in row["contestants"].items() if found["library"] not in (OURS, DENSE)
    }
    return min(medians, key=lambda name: medians[name], default="")


def _ratio(row: Row, above: str, below: str) -> float | None:
    found = row["contestants"]
    return found[above]["median_ms"] / found[below]["median_ms"] if above in found and below in found else None


def missed(row: Row) -> bool:
    ratio = over_dense(row)
    return ratio is None or ratio < row["target"]


def _geometric_mean(values: Iterable[float | None]) -> float | None:
    logs = [math.log(value) for value in values if value]
    return math.exp(sum(logs) / len(logs)) if logs else None


# -- lines while running ------------------------------------------------------------------------------


def line(row: Row) -> str:
    """One layer, batch size and phase on one line."""
    peer = best_peer(row)
    found = row["contestants"]
    cells = [f"{name} {found[name]['median_ms']:.3g} ms" for name in (DENSE, OURS, peer) if name in found]
    ratios = f"{_x(over_dense(row))} dense (asked {row['target']:g}), {_x(over_peer(row))} best peer"
    text = f"{row['case']}, {row['phase']}: {'; '.join(cells)}; {ratios}; {_x(over_floor(row))} floor"
    text += f"; {row['plan']['name']}" + (" - MISSED" if missed(row) else "")
    return text + "".join(f"\n    not timed: {name}: {reason}" for name, reason in row["skipped"].items())


def lines(part: str, found: Any) -> list[str]:
    """A part of the record in sentences."""
    return _PART_LINES[part](found)


def _plan_lines(rows: Sequence[Row]) -> list[str]:
    return [
        f"{row['case']}, {row['phase']}: picked {row['picked']['name']}, {row['picked']['median_ms']:.3g} ms "
        f"(predicted {row['picked']['predicted_ms']:.3g}); best of {row['n_plans']} plans {row['best']['name']}, "
        f"{row['best']['median_ms']:.3g} ms (predicted {row['best']['predicted_ms']:.3g}): {row['ratio']:.3f}"
        for row in rows
    ]


def _memory_lines(found: Row) -> list[str]:
    cases, targets = found["cases"], found["targets"]
    return [
        f"training step, 4096 rows, width 1024, rank 16: ours {_mib(cases['training, ours']['peak_bytes'])}, dense "
        f"{_mib(cases['training, dense']['peak_bytes'])} beyond input, output gradient and parameters: "
        f"{found['training_ratio']:.2f} times dense (at most {targets['training']:g} asked; "
        f"{found['training_ratio_with_inputs']:.2f} with those counted on both sides)",
        f"one image, 25088 -> 4096, no gradient: {_mib(found['image_bytes'])} beyond input and output, kept weights "
        f"counted (at most {_mib(targets['one image'])} asked)",
    ]


def _embedding_lines(found: Row) -> list[str]:
    cells = [f"{name} {entry['median_ms']:.3g} ms" for name, entry in found["contestants"].items()]
    return [
        f"{found['vocabulary']:,} x {found['dim']}, ranks {_brief(found['ranks'])}, {found['n_ids']:,} Zipf ids "
        f"({found['n_distinct']:,} distinct), forward and backward: {'; '.join(cells)}",
        f"{found['over_naive']:.2f} times as fast as gather and bmm; table {_mib(found['table_bytes'])} for "
        f"{_mib(found['dense_table_bytes'])}, {found['table_ratio']:.0f} times smaller",
    ]


def _law_lines(sweeps: Sequence[Row]) -> list[str]:
    return [
        f"{sweep['variable']} ({sweep['setting']}): slope of forward {sweep['slopes']['forward']:.2f}, backward "
        f"{sweep['slopes']['backward']:.2f}, flops counted {sweep['slopes']['flops']:.2f}, law {sweep['law']:.2f}"
        for sweep in sweeps
    ]


def _recurrent_lines(found: Row) -> list[str]:
    cells = [f"{name} {entry['median_ms']:.3g} ms" for name, entry in found["contestants"].items()]
    return [
        f"{found['n_inputs']:,} -> {found['n_hidden']}, {found['n_clips']} clips of {found['n_frames']} frames, a step "
        f"of training with Adam: {'; '.join(cells)}: {found['of_dense']:.3f} of the dense time (at most "
        f"{RECURRENT_TARGET:g} asked); input map {found['input_weights']:,} numbers for "
        f"{found['dense_input_weights']:,}",
    ]


_PART_LINES: dict[str, Callable[[Any], list[str]]] = {
    "plans": _plan_lines,
    "recurrent": _recurrent_lines,
    "memory": _memory_lines,
    "embedding": _embedding_lines,
    "laws": _law_lines,
}


# -- what was asked, and what came out ------------------------------------------------------------------


def verdicts(record: Row) -> list[tuple[str, str, str, bool]]:
    """Target, what was asked, what was measured, whether it was met."""
    rows = record.get("rows", [])
    grid, fixed = _of(rows, "grid"), _of(rows, "fixed")
    out = [_verdict(f"{row['case']}, {row['phase']}, over dense", over_dense(row), row["target"]) for row in fixed]
    for phase in PHASES:
        chosen = [row for row in grid if row["phase"] == phase]
        if not chosen:
            continue
        ratios = [over_dense(row) for row in chosen]
        n_met = sum(not missed(row) for row in chosen)
        name = f"grid, {phase}: layers with at least {chosen[0]['target']:g} times dense"
        out.append((name, f"{len(chosen)}", f"{n_met}", n_met == len(chosen)))
        asked = GRID_MEAN_TARGET if phase == PHASES[1] else None
        out.append(_verdict(f"grid, {phase}: geometric mean over dense", _geometric_mean(ratios), asked))
        mean = _geometric_mean(over_peer(row) for row in chosen)
        out.append(_verdict(f"grid, {phase}: geometric mean over the best peer", mean, PEER_TARGET))
    out += _part_verdicts(record)
    return out


def _part_verdicts(record: Row) -> list[tuple[str, str, str, bool]]:
    out = []
    plans, memory = record.get("plans"), record.get("memory")
    if plans:
        n_met = sum(row["ratio"] <= PLAN_TARGET for row in plans)
        name = f"plans: picked within {PLAN_TARGET:g} of the best (layers x phases)"
        out.append((name, f"{len(plans)}", f"{n_met}", n_met == len(plans)))
    if memory:
        ratio, most = memory["training_ratio"], memory["targets"]["training"]
        out.append(("memory: training step over dense", f"<= {most:g}", f"{ratio:.2f}", ratio <= most))
        found, most = memory["image_bytes"], memory["targets"]["one image"]
        out.append(("memory: one image beyond input and output", f"<= {_mib(most)}", _mib(found), found <= most))
    embedding, recurrent = record.get("embedding"), record.get("recurrent")
    if embedding:
        out.append(_verdict("embedding: over gather and bmm", embedding["over_naive"], EMBEDDING_TARGETS[0]))
        out.append(_verdict("embedding: table, times smaller", embedding["table_ratio"], EMBEDDING_TARGETS[1]))
    if recurrent:
        share = recurrent["of_dense"]
        name = "TT-GRU: step of training, of dense"
        out.append((name, f"<= {RECURRENT_TARGET:g}", f"{share:.3f}", share <= RECURRENT_TARGET))
    return out


def _verdict(name: str, value: float | None, target: float | None) -> tuple[str, str, str, bool]:
    asked = "-" if target is None else f">= {target:g}"
    return name, asked, _x(value), target is None or (value is not None and value >= target)


def _of(rows: Sequence[Row], group: str) -> list[Row]:
    return [row for row in rows if row["group"] == group]


def show(record: Row) -> None:
    """Print what was asked, what came out, and the other parts to the terminal."""
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if os.environ.get("COLUMNS") else 130)
    table = Table(title=f"Factorized layers, {record['threads']} threads, {record['cpu']}")
    for at, name in enumerate(("target", "asked", "measured", "")):
        table.add_column(name, justify="right" if at in (1, 2) else "left", overflow="fold")
    for name, asked, found, met in verdicts(record):
        table.add_row(name, asked, found, "met" if met else "missed", style="" if met else "red")
    if table.row_count:
        console.print(table)
    for part in _PART_LINES:
        for words in lines(part, record[part]) if record.get(part) else ():
            console.print(words, markup=False)


# -- the page -----------------------------------------------------------------------------------------

_INTRODUCTION = (
    'Ours is `tensortrain.nn.Linear` with `implementation="auto"`. Inference is a forward pass without gradients in '
    "`eval` mode; a training step is forward and backward to the input and all parameters. Every library has the same "
    "cores and bias and first showed that output and gradients agree with the dense weight; then all took turns. Times "
    "are medians. *Over dense* is the time of `nn.Linear` over ours, *over peer* that of the fastest way of any peer "
    "over ours. *Over floor* is our time over the larger of bytes over bandwidth and flops of the leanest plan over "
    "the GEMM rate."
)


def write(record: Row, source: str, page: str) -> None:
    """Write the page and, where the record has laws, their plot beside it."""
    plot = Path(page).with_name(Path(page).stem + "-laws.png")
    write_text_atomic(page, markdown(record, source, page, plot.name))
    if record.get("laws"):
        _plot(record["laws"], plot)


def markdown(record: Row, source: str, page: str, plot: str) -> str:
    """The page: targets, the layers, and the parts that the record has."""
    link = os.path.relpath(Path(source).resolve(), Path(page).resolve().parent)
    rows = record.get("rows", [])
    text = [
        "# Benchmarks of factorized layers",
        "",
        f"Written by `benchmarks/layers.py --report` from [{Path(source).name}]({link}); no figure here is typed by "
        "hand.",
        "",
        *provenance_lines(record),
        "",
        _INTRODUCTION,
        "",
        f"Kernels (`tensortrain build-kernels`): {'built' if record.get('kernels') else 'not built'}.",
        "",
        "## Asked and measured",
        "",
        *markdown_table(
            ("target", "asked", "measured", ""),
            [(name, asked, found, "" if met else "**missed**") for name, asked, found, met in verdicts(record)],
        ),
    ]
    if rows:
        text += ["", "## Layers of the papers", "", *_row_table(_of(rows, "fixed"))]
        text += ["", "## Forty layers from a fixed seed", "", *_row_table(_of(rows, "grid"))]
        text += ["", "## Where we lose, and who is missing", "", *(f"- {words}" for words in _losses(rows))]
    titles = ("plans", "Picked plans"), ("memory", "Memory"), ("embedding", "Embedding"), ("recurrent", "Recurrent")
    for part, title in (*titles, ("laws", "Laws")):
        if record.get(part):
            text += ["", f"## {title}", "", *_section(part, record[part], plot)]
    if rows:
        text += ["", "## Every contestant, ms", "", *_contestant_table(rows)]
    return "\n".join(text) + "\n"


def _row_table(rows: Sequence[Row]) -> list[str]:
    header = ("layer", "phase", "dense ms", "ours ms", "over dense", "asked", "best peer", "over peer", "over floor")
    cells = [
        (
            row["case"],
            row["phase"],
            _ms(row, DENSE),
            _ms(row, OURS),
            f"**{_x(over_dense(row))}**" if missed(row) else _x(over_dense(row)),
            f"{row['target']:g}",
            best_peer(row) or "-",
            _x(over_peer(row)),
            _x(over_floor(row)),
        )
        for row in rows
    ]
    return markdown_table(
        (*header, "plan"), [(*cell, row["plan"]["name"]) for cell, row in zip(cells, rows, strict=True)]
    )


def _losses(rows: Sequence[Row]) -> list[str]:
    out = []
    for row in rows:
        name = f"{row['case']}, {row['phase']}"
        ratio, peer = over_dense(row), over_peer(row)
        if missed(row):
            out.append(f"{name}: {_x(ratio)} times dense, {row['target']:g} asked.")
        if peer is not None and peer < 1:
            out.append(f"{name}: {best_peer(row)} is {1 / peer:.2f} times as fast as ours.")
    reasons = {f"{name} was not timed ({reason})" for row in rows for name, reason in row["skipped"].items()}
    return [*out, *(f"{reason}." for reason in sorted(reasons))] or ["No target is missed, and no peer is faster."]


def _section(part: str, found: Any, plot: str) -> list[str]:
    if part == "plans":
        return _plan_table(found)
    text = [f"- {words}." for words in lines(part, found)]
    return [*text, "", f"![Time against rank, order and size]({plot})"] if part == "laws" else text


def _plan_table(rows: Sequence[Row]) -> list[str]:
    header = ("layer", "phase", "plans", "picked", "ms", "best", "ms", "picked / best")
    cells = [
        (
            row["case"],
            row["phase"],
            str(row["n_plans"]),
            row["picked"]["name"],
            f"{row['picked']['median_ms']:.3g}",
            row["best"]["name"],
            f"{row['best']['median_ms']:.3g}",
            f"{row['ratio']:.2f}" if row["ratio"] <= PLAN_TARGET else f"**{row['ratio']:.2f}**",
        )
        for row in rows
    ]
    return markdown_table(header, cells)


def _contestant_table(rows: Sequence[Row]) -> list[str]:
    names = list(dict.fromkeys(name for row in rows for name in row["contestants"]))
    cells = [(row["case"], row["phase"], *(_ms(row, name) for name in names)) for row in rows]
    return markdown_table(("layer", "phase", *names), cells)


def _plot(sweeps: Sequence[Row], path: Path) -> None:
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullLocator

    figure = Figure(figsize=(4.2 * len(sweeps), 3.8), layout="constrained")
    for axes, sweep in zip(figure.subplots(1, len(sweeps), squeeze=False)[0], sweeps, strict=True):
        last = sweep["forward_ms"][-1] / sweep["flops"][-1]
        axes.loglog(sweep["x"], [last * flops for flops in sweep["flops"]], "--", color="0.6", label="flops, scaled")
        for name, marker in (("forward", "o"), ("backward", "s")):
            label = f"{name}, slope {sweep['slopes'][name]:.2f}"
            axes.loglog(sweep["x"], sweep[f"{name}_ms"], marker=marker, label=label)
        axes.set(xlabel=sweep["variable"], ylabel="ms", title=f"{sweep['setting']}\nlaw: slope {sweep['law']:.2f}")
        axes.title.set_fontsize(8)
        axes.set_xticks(sweep["x"], [str(x) for x in sweep["x"]], fontsize=8)
        axes.xaxis.set_minor_locator(NullLocator())
        axes.grid(True, which="both", alpha=0.25)
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)


def _ms(row: Row, name: str) -> str:
    found = row["contestants"].get(name)
    return f"{found['median_ms']:.3g}" if found else "-"


def _x(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}" if value < 100 else f"{value:.0f}"


def _mib(n_bytes: float) -> str:
    return f"{n_bytes / 2**20:.3g} MiB"


def _brief(values: Sequence[int]) -> str:
    return "(" + ", ".join(map(str, values)) + ")"
