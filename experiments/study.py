"""What the experiments share: runs that are recorded once, and figures over seeds."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from tensortrain.compress import provenance, write_text_atomic
from tensortrain.data import ImageBatches, fashion_mnist, image_batches

__all__ = ["best_rate", "by", "file_name", "image_loaders", "once", "record", "recorded", "spread"]

provenance()  # takes the commit down now: at the end of a long run it may be another


def once(path: Path, run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The result that lies at ``path``; without one, the run is done and recorded there, whole or not at all."""
    if path.exists():
        return json.loads(path.read_text())
    result = run()
    write_text_atomic(path, json.dumps(result, indent=1) + "\n")
    return result


def image_loaders(
    data: str | None, size: int, seed: int, held_out: int = 0, **options: Any
) -> tuple[ImageBatches, ImageBatches]:
    """What to train on and what to test on; with ``held_out``, that many training images stand in for the test set."""
    images = fashion_mnist(data)
    known, labels = images.train_images, images.train_labels
    unknown, answers = images.test_images, images.test_labels
    if held_out:
        known, unknown = known[:-held_out], known[-held_out:]
        labels, answers = labels[:-held_out], labels[-held_out:]
    train = image_batches(known, labels, batch_size=size, seed=seed, **options)
    return train, image_batches(unknown, answers, batch_size=500, shuffle=False, **options)


def best_rate(name: str, rates: Sequence[float], folder: Path, trial: Callable[[float], dict[str, Any]]) -> float:
    """The learning rate whose trial, recorded in the folder, had the best ``"accuracy"``."""
    found = [once(folder / f"{file_name(name)}-{lr}.json", lambda lr=lr: trial(lr)) for lr in rates]
    return max(found, key=lambda one: one["accuracy"])["lr"]


def file_name(name: str) -> str:
    """A name without the characters that a shell minds."""
    return name.replace(",", "").replace(" ", "-")


def recorded(folder: Path, order: Sequence[str]) -> list[dict[str, Any]]:
    """All that lies in a folder of runs, in the order of their layers."""
    found = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    return sorted(found, key=lambda one: list(order).index(one["layer"]))


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
