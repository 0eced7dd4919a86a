"""From a record of ``grid.py`` to lines and a page of the documentation with a plot of what was predicted."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from layer_peers import DENSE, OURS
from tensor_report import markdown_table, provenance_lines

from tensortrain.system.files import write_text_atomic

__all__ = ["line", "summary", "write"]

CLOSE = 1.5  # a prediction within this factor of what was measured
Row = dict[str, Any]
_TITLES = {
    "linear": "Linear layers",
    "conv": "Convolutions",
    "embedding": "Embeddings",
    "recurrent": "Recurrent layers",
    "core": "Trains",
}


# -- figures of one row -------------------------------------------------------------------------------


def times(row: Row) -> dict[str, tuple[str, float]]:
    """Library and median, ms, of everyone in a row."""
    found = row.get("contestants") or row.get("contenders") or {}
    return {name: (entry["library"], entry["median_ms"]) for name, entry in found.items()}


def best(row: Row, of: Callable[[str], bool]) -> tuple[str, float] | None:
    """The fastest of some libraries, and its milliseconds."""
    some = {name: ms for name, (library, ms) in times(row).items() if of(library)}
    name = min(some, key=lambda name: some[name], default=None)
    return None if name is None else (name, some[name])


def ours(row: Row) -> tuple[str, float] | None:
    return best(row, lambda library: library == OURS)


def dense(row: Row) -> tuple[str, float] | None:
    return best(row, lambda library: library == DENSE)


def peer(row: Row) -> tuple[str, float] | None:
    return best(row, lambda library: library not in (OURS, DENSE))


def ratio(above: tuple[str, float] | None, below: tuple[str, float] | None) -> float | None:
    return above[1] / below[1] if above and below else None


def slowest_format(row: Row) -> float | None:
    """Time of the dense layer over that of the slowest of our formats."""
    some, found = [ms for library, ms in times(row).values() if library == OURS], dense(row)
    return found[1] / max(some) if some and found else None


def points(runs: Iterable[Row]) -> Iterator[tuple[str, str, float, float]]:
    """Kind, phase, predicted and measured ms of every plan, and of every layer that has a prediction."""
    for run in runs:
        for row in run["rows"]:
            if row["kind"] == "plans":
                yield from (("linear", row["phase"], predicted, ms) for _, predicted, ms in row["plans"])
                continue
            for entry in (row.get("contestants") or {}).values():
                if entry.get("predicted_ms"):
                    yield row["kind"], row["phase"], entry["predicted_ms"], entry["median_ms"]


def share_close(some: Sequence[tuple[str, str, float, float]]) -> float | None:
    """Share of the predictions that are right within the factor."""
    right = [max(predicted / ms, ms / predicted) <= CLOSE for *_, predicted, ms in some]
    return sum(right) / len(right) if right else None


def _mean(values: Iterable[float | None]) -> float | None:
    logs = [math.log(value) for value in values if value]
    return math.exp(sum(logs) / len(logs)) if logs else None


def _least(values: Iterable[float | None]) -> float | None:
    return min((value for value in values if value), default=None)


# -- lines --------------------------------------------------------------------------------------------


def line(row: Row) -> str:
    """One case on one line."""
    if row["kind"] == "plans":
        close = share_close([("linear", "", predicted, ms) for _, predicted, ms in row["plans"]])
        return f"plans of {row['case']}, {row['phase']}: {len(row['plans'])}, {_share(close)} within {CLOSE:g}"
    named = (("dense", dense(row)), (None, ours(row)), (None, peer(row)))
    cells = [f"{name or found[0]} {found[1]:.3g} ms" for name, found in named if found]
    text = (
        f"{row['kind']} {row['case']}, {row['phase']}: {'; '.join(cells)}; {_x(ratio(dense(row), ours(row)))} dense, "
    )
    text += f"{_x(ratio(peer(row), ours(row)))} best peer, {_x(ratio(ours(row), ('', row['floor']['ms'])))} floor"
    return text + "".join(f"\n    not timed: {name}: {reason}" for name, reason in row["skipped"].items())


def summary(record: Row) -> list[str]:
    """The table of the page's beginning, as lines."""
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, _WIDTHS, strict=True)) for row in _summary(record)]


_WIDTHS = (10, 14, 8, 8, 5, 10, 10, 10, 10, 10)
_HEADER = (
    "kind", "phase", "threads", "kernels", "rows", "over dense", "least", "over peer", "least", "over floor",
)  # fmt: skip


def _summary(record: Row) -> list[tuple[str, ...]]:
    out: list[tuple[str, ...]] = [_HEADER]
    for run in record["runs"]:
        for kind in _TITLES:
            rows = [row for row in run["rows"] if row["kind"] == kind and row["group"] == "drawn"]
            for phase in dict.fromkeys(row["phase"] for row in rows):
                some = [row for row in rows if row["phase"] == phase]
                out.append((kind, phase, str(run["threads"]), run["kernels"], str(len(some)), *_means(some)))
    return out


def _means(rows: Sequence[Row]) -> tuple[str, ...]:
    over_dense = [ratio(dense(row), ours(row)) for row in rows]
    over_peer = [ratio(peer(row), ours(row)) for row in rows]
    over_floor = [ratio(ours(row), ("", row["floor"]["ms"])) for row in rows]
    figures = (_mean(over_dense), _least(over_dense), _mean(over_peer), _least(over_peer), _mean(over_floor))
    return tuple(map(_x, figures))


# -- the page -----------------------------------------------------------------------------------------

_INTRODUCTION = (
    "Sizes, ranks and batches were drawn at random, from the date as seed; nobody has tuned for them. Inference is a "
    "forward pass without gradients in `eval` mode, a training step forward and backward to the input and all "
    "parameters. Times are medians; everyone takes turns in one process, and sleeps before each turn until the thread "
    "pools of whoever came before have fallen asleep. *Over dense* is the time of torch's dense layer over ours, *over "
    "peer* that of the fastest way of any peer over ours (higher is better), in the geometric mean and in the worst "
    "row; *over floor* is our time over the larger of bytes over bandwidth and flops over GEMM rate of the leanest "
    "way known. Of a convolution the fastest of our formats at the same share of the parameters stands for us, and "
    "*slowest format* says how the slowest does beside dense. Linear layers, operations on trains and our own layers "
    "are checked against the dense answer before they are timed; peers of the other kinds hold weights of their own."
)


def write(record: Row, source: str, page: str) -> None:
    """Write the page and the plot beside it."""
    plot = Path(page).with_name(Path(page).stem + "-predictions.png")
    if list(points(record["runs"])):
        _plot(record, plot)
    write_text_atomic(page, "\n".join(_page(record, source, page, plot.name)) + "\n")


def _page(record: Row, source: str, page: str, plot: str) -> Iterator[str]:
    link = os.path.relpath(Path(source).resolve(), Path(page).resolve().parent)
    yield from ("# Benchmarks on a random grid", "")
    yield f"Written by `benchmarks/grid.py --report` from [{Path(source).name}]({link}); no figure is typed by hand."
    measured = next((run["measured"] for run in record["runs"] if run["measured"]), None)
    lines = provenance_lines({**record, "measured": measured}) if measured else []
    yield from ("", *lines, f"- Seed of the grid: {record['seed']}.", "", _INTRODUCTION, "")
    header, *cells = _summary(record)
    yield from markdown_table(header, cells)
    yield from ("", "## Predicted and measured", "", *_prediction_lines(record, plot))
    for run in record["runs"]:
        yield from ("", f"## {run['threads']} threads, {run['kernels']} kernels", "", _left_out(run))
        for kind, title in _TITLES.items():
            rows = [row for row in run["rows"] if row["kind"] == kind]
            if rows:
                yield from ("", f"### {title}", "", *_rows_table(rows))


def _left_out(run: Row) -> str:
    n = run["n_left_out"]
    text = f"{len(run['rows'])} rows in {run['wall_s']:.0f} s; "
    return text + ("the run was cut short." if n is None else f"{n} cases were left out for want of time.")


def _prediction_lines(record: Row, plot: str) -> Iterator[str]:
    """The share of good predictions per kind, and the plot."""
    found = list(points(record["runs"]))
    if not found:
        yield "Nothing was predicted in this run."
        return
    yield f"All plans of the drawn linear layers ({grid_limit(record)}), and the plans by which our other layers ran."
    yield ""
    kinds = dict.fromkeys((kind, phase) for kind, phase, *_ in found)
    cells = []
    for kind, phase in kinds:
        some = [point for point in found if point[:2] == (kind, phase)]
        cells.append((kind, phase, str(len(some)), _share(share_close(some))))
    cells.append(("all", "", str(len(found)), _share(share_close(found))))
    yield from markdown_table(("kind", "phase", "plans", f"within {CLOSE:g}x"), cells)
    yield from ("", f"![Predicted against measured time]({plot})")


def grid_limit(record: Row) -> str:
    n = sum(len(row["plans"]) for run in record["runs"] for row in run["rows"] if row["kind"] == "plans")
    return f"{n}; of layers with very many a random part"


def _rows_table(rows: Sequence[Row]) -> list[str]:
    formats = any(row["kind"] == "conv" for row in rows)
    header = ("case", "phase", "dense ms", "ours ms", "over dense", "best peer", "over peer", "over floor")
    cells = [_cells(row) + ((_name_and_slowest(row)) if formats else ()) for row in rows]
    return markdown_table((*header, *(("fastest format", "slowest format") if formats else ())), cells)


def _cells(row: Row) -> tuple[str, ...]:
    mine, theirs, plain = ours(row), peer(row), dense(row)
    name = row["case"] + (" (recorded)" if row["group"] == "recorded" else "")
    return (
        name,
        row["phase"],
        _ms(plain),
        _ms(mine),
        _x(ratio(plain, mine)),
        theirs[0] if theirs else "-",
        _x(ratio(theirs, mine)),
        _x(ratio(mine, ("", row["floor"]["ms"]))),
    )


def _name_and_slowest(row: Row) -> tuple[str, str]:
    mine = ours(row)
    return (mine[0].removeprefix(OURS).strip() if mine else "-", _x(slowest_format(row)))


def _plot(record: Row, path: Path) -> None:
    from matplotlib.figure import Figure

    found = list(points(record["runs"]))
    kinds = list(dict.fromkeys(kind for kind, *_ in found))
    figure = Figure(figsize=(4.4 * len(kinds), 4.2), layout="constrained")
    for axes, kind in zip(figure.subplots(1, len(kinds), squeeze=False)[0], kinds, strict=True):
        some = [point for point in found if point[0] == kind]
        ends = [min(min(p[2:]) for p in some), max(max(p[2:]) for p in some)]
        axes.loglog(ends, ends, color="0.4", linewidth=1)
        for factor in (CLOSE, 1 / CLOSE):
            axes.loglog(ends, [factor * end for end in ends], "--", color="0.6", linewidth=1)
        for phase in dict.fromkeys(point[1] for point in some):
            chosen = [point for point in some if point[1] == phase]
            axes.scatter(*zip(*(p[2:] for p in chosen), strict=True), s=6, alpha=0.5, label=phase)
        axes.set(xlabel="predicted, ms", ylabel="measured, ms")
        axes.set_title(f"{_TITLES[kind]}: {_share(share_close(some))} within {CLOSE:g}x", fontsize=9)
        axes.grid(True, alpha=0.25)
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)


def _ms(found: tuple[str, float] | None) -> str:
    return "-" if found is None else f"{found[1]:.3g}"


def _x(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}" if value < 100 else f"{value:.0f}"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"
