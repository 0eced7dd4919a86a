"""What the experiments share: runs that are recorded once, and figures over seeds."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from tensortrain.compress import provenance, write_text_atomic

__all__ = ["by", "once", "record", "spread"]

provenance()  # takes the commit down now: at the end of a long run it may be another


def once(path: Path, run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The result that lies at ``path``; without one, the run is done and recorded there, whole or not at all."""
    if path.exists():
        return json.loads(path.read_text())
    result = run()
    write_text_atomic(path, json.dumps(result, indent=1) + "\n")
    return result


def by(records: Iterable[dict[str, Any]], *keys: str) -> dict[tuple[Any, ...], list[dict[str, Any]]]:
    """Records that agree in these keys, in order of first appearance."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for one in records:
        groups.setdefault(tuple(one[key] for key in keys), []).append(one)
    return groups


def spread(records: Sequence[dict[str, Any]], key: str) -> tuple[float, float]:
    """Mean and standard deviation (of a sample; 0 for one record) of a figure."""
    values = [record[key] for record in records]
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def record(folder: Path, rows: Sequence[dict[str, Any]], runs: Sequence[dict[str, Any]], **more: Any) -> None:
    """Write ``results.json``: the table, every run behind it, and where it comes from."""
    summary = {**more, "rows": list(rows), "runs": list(runs), "provenance": provenance()}
    write_text_atomic(folder / "results.json", json.dumps(summary, indent=1) + "\n")
