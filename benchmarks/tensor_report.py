"""From a record of ``tensor_core.py`` to lines, a table on the terminal and a page of the documentation."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

__all__ = ["line", "markdown", "markdown_table", "provenance_lines", "show"]

_HEADER = ("case", "ours", "ms", "best peer", "ms", "times faster", "over floor", "over clone", "peak / input")


def line(row: dict[str, Any]) -> str:
    """One case on one line."""
    cells = [
        f"{name} {found['median_ms']:.3g} ms (error {_scientific(found['rel_error'])}"
        + (f", eps x {found['tighten']:g})" if found["tighten"] != 1 else ")")
        for name, found in sorted(row["contenders"].items(), key=lambda item: item[1]["median_ms"])
    ]
    left_out = [f"{name}: {reason}" for name, reason in row["skipped"].items()]
    text = f"{row['case']}: {'; '.join(cells) or 'nobody'}; floor {row['floor']['ms']:.3g} ms"
    return text + (f"\n    not timed: {'; '.join(left_out)}" if left_out else "")


def show(record: dict[str, Any]) -> None:
    """Print the comparison to the terminal."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"Tensor-train core, {record['threads']} threads, {record['cpu']}", show_lines=False)
    for at, name in enumerate(_HEADER):
        table.add_column(name, justify="left" if at in (0, 1, 3) else "right", overflow="fold")
    for row in record["rows"]:
        lost = _verdict(row) == "lost"
        table.add_row(*_summary(row), style="red" if lost else "")
    console = Console(width=None if os.environ.get("COLUMNS") else 150)
    console.print(table)
    for sentence in _losses(record):
        console.print(sentence, markup=False)


def markdown(record: dict[str, Any], source: str, page: str) -> str:
    """The page: what was compared, the table, where we lose, every contender of every case."""
    link = os.path.relpath(Path(source).resolve(), Path(page).resolve().parent)
    text = [
        "# Benchmarks of the tensor-train core",
        "",
        f"Written by `benchmarks/tensor_core.py --report` from [{Path(source).name}]({link}); no figure here is typed "
        "by hand.",
        "",
        *provenance_lines(record),
        "",
        "Every contender first showed that it reaches the tolerance; then all took turns. Times are medians. "
        "*Times faster* is the best peer's time over ours, for our fastest method. *Floor* is the larger of the bytes "
        "over the bandwidth and the flops over the GEMM rate of the leanest algorithm known. *Peak* is memory beyond "
        "what was resident before the call, result included, over the size of the inputs.",
        "",
        *markdown_table(_HEADER, [_summary(row) for row in record["rows"]]),
        "",
        "## Where we lose, and who is missing",
        "",
        *(f"- {sentence}" for sentence in _losses(record)),
        "",
        "## Every contender",
    ]
    for row in record["rows"]:
        text += ["", f"### {row['case']}", "", *_details(row)]
    return "\n".join(text) + "\n"


def provenance_lines(record: dict[str, Any]) -> list[str]:
    """What was compared, where, and how fast the machine is."""
    peers = ", ".join(f"{name} {version}" for name, version in record["peers"].items()) or "no peers"
    measured = record["measured"]
    rates = ", ".join(f"{rate / 1e9:.3g} GFLOP/s in {dtype}" for dtype, rate in measured["gemm_flops_per_s"].items())
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    return [
        f"- Against {peers}.",
        f"- {versions}; commit {record['commit']}.",
        f"- {record['cpu']}, {record['threads']} threads, {record['date']}, command `{record['command']}`, "
        f"{record['wall_s']:.0f} s in all.",
        f"- Measured in the same run: {measured['bandwidth_bytes_per_s'] / 1e9:.3g} GB/s, {rates}.",
        *(["- **A trial run with small inputs: the figures mean nothing.**"] if record["quick"] else []),
    ]


def _details(row: dict[str, Any]) -> list[str]:
    header = ("contender", "median ms", "p90 ms", "calls", "rel. error", "largest rank", "peak MB", "over floor")
    cells = [
        (
            name,
            f"{found['median_ms']:.3g}",
            f"{found['p90_ms']:.3g}",
            str(found["n_calls"]),
            _scientific(found["rel_error"]) + (f" (eps x {found['tighten']:g})" if found["tighten"] != 1 else ""),
            _or_dash(found["max_rank_found"], "d"),
            _or_dash(found["peak_bytes"] and found["peak_bytes"] / 1e6, ".3g"),
            f"{found['over_floor']:.3g}",
        )
        for name, found in sorted(row["contenders"].items(), key=lambda item: item[1]["median_ms"])
    ]
    facts = [f"{row['dtype']}", f"shape {_brief(row['shape'])}"]
    facts += [f"{key.replace('_', ' ')} {row[key]}" for key in ("batch", "rank", "operator_rank") if row.get(key)]
    facts += [f"eps {row['eps']:g}"] if row["eps"] else []
    facts += [f"max rank {row['max_rank']}"] if row["max_rank"] else []
    facts += [f"floor {row['floor']['ms']:.3g} ms"]
    facts += [f"`x.clone()` {row['clone_ms']:.3g} ms"] if row["clone_ms"] else []
    out = [", ".join(facts) + ".", "", *markdown_table(header, cells)]
    if row["skipped"]:
        out += ["", "Not timed:", "", *(f"- {name}: {reason}" for name, reason in row["skipped"].items())]
    return out


def _summary(row: dict[str, Any]) -> tuple[str, ...]:
    ours, peer = _best(row, True), _best(row, False)
    found = row["contenders"].get(ours)
    other = row["contenders"].get(peer)
    return (
        row["case"],
        _short(ours),
        _or_dash(found and found["median_ms"], ".3g"),
        peer or "-",
        _or_dash(other and other["median_ms"], ".3g"),
        _or_dash(found and other and other["median_ms"] / found["median_ms"], ".2f"),
        _or_dash(found and found["over_floor"], ".3g"),
        _or_dash(found and found.get("over_clone"), ".3g"),
        _or_dash(found and found["peak_bytes"] is not None and found["peak_bytes"] / row["input_bytes"], ".2f"),
    )


def _losses(record: dict[str, Any]) -> list[str]:
    """A sentence for every case that is lost, or has nobody on one side."""
    out = []
    for row in record["rows"]:
        ours, peer, verdict = _best(row, True), _best(row, False), _verdict(row)
        if verdict == "lost":
            ratio = row["contenders"][ours]["median_ms"] / row["contenders"][peer]["median_ms"]
            remark = _rank_remark(row, ours, peer)
            out.append(f"{row['case']}: {peer} is {ratio:.2f} times as fast as our best, {_short(ours)}{remark}.")
        elif verdict == "alone" and record["peers"]:
            out.append(f"{row['case']}: no peer reached the tolerance within the limits.")
        elif verdict == "absent":
            out.append(f"{row['case']}: none of our methods was timed.")
        out += [f"{row['case']}: {name} failed ({row['skipped'][name]})." for name in row["broken"]]
    out += [f"{name}: {reason}." for name, reason in record["absent"].items()]
    return out or ["No case is lost, and every case has a peer."]


def _rank_remark(row: dict[str, Any], ours: str, peer: str) -> str:
    """A peer may reach the error at ranks that were not needed."""
    mine, theirs = (row["contenders"][name]["max_rank_found"] for name in (ours, peer))
    return f", with a largest rank of {theirs} where {mine} suffices" if mine and theirs and theirs > mine else ""


def _verdict(row: dict[str, Any]) -> str:
    ours, peer = _best(row, True), _best(row, False)
    if not ours:
        return "absent"
    if not peer:
        return "alone"
    return "lost" if row["contenders"][ours]["median_ms"] > row["contenders"][peer]["median_ms"] else "won"


def _best(row: dict[str, Any], ours: bool) -> str:
    medians = {name: found["median_ms"] for name, found in row["contenders"].items() if found["ours"] is ours}
    return min(medians, key=lambda name: medians[name], default="")


def _short(name: str) -> str:
    return name.removeprefix("tensortrain").strip() or name or "-"


def _brief(shape: list[int]) -> str:
    return f"{shape[0]}^{len(shape)}" if len(set(shape)) == 1 else " x ".join(map(str, shape))


def _or_dash(value: Any, spec: str) -> str:
    return "-" if value is None or value is False or value == "" else format(value, spec)


def _scientific(value: float) -> str:
    return f"{value:.1e}"


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table."""
    lines = [" | ".join(header), " | ".join("---" for _ in header), *(" | ".join(row) for row in rows)]
    return [f"| {text} |" for text in lines]
