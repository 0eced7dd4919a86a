"""What the experiments share: runs that are recorded once, and figures over seeds."""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tensortrain.compression import provenance, write_text_atomic
from tensortrain.data import ImageBatches, fashion_mnist, image_batches

__all__ = [
    "Centred",
    "best_rate",
    "by",
    "file_name",
    "image_loaders",
    "once",
    "record",
    "recorded",
    "run_layers",
    "run_tasks",
    "spread",
    "write_part",
    "write_tasks",
]

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


class Centred(nn.Module):
    """Images as vectors, less the mean image of the training set."""

    mean: Tensor

    def __init__(self, train: ImageBatches) -> None:
        super().__init__()
        total = torch.stack([x.flatten(1).sum(0) for x, _ in train]).sum(0)
        self.register_buffer("mean", total / len(train.labels))

    def forward(self, x: Tensor) -> Tensor:  # b 1 side side
        return x.flatten(1) - self.mean


def run_layers(
    here: Path,
    description: str | None,
    rate: Callable[..., float],
    run: Callable[..., dict[str, Any]],
    summarize: Callable[..., None],
) -> None:
    """The command line of an experiment: choose a learning rate for each layer, run every seed, summarize.

    Args:
        here: Its folder, with ``config.json``.
        rate: ``(name, config, out, data)`` to a learning rate.
        run: ``(name, config, seed, lr, out, data)`` to one record.
        summarize: ``(runs, rates, target)``.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs") / here.name)
    parser.add_argument("--data", help="folder with the four idx files")
    parser.add_argument("--seed", type=int, action="append", help="only these seeds")
    parser.add_argument("--config", type=Path, default=here / "config.json")
    parser.add_argument("--choose", action="store_true", help="choose the learning rates and stop")
    parser.add_argument("--record", type=Path, default=here, help="where results.json and results.png go")
    given = parser.parse_args()
    config = json.loads(given.config.read_text())
    for folder in ("rates", "runs"):
        (given.out / folder).mkdir(parents=True, exist_ok=True)
    chosen = {name: rate(name, config, given.out, given.data) for name in config["layers"]}
    print("learning rates:", ", ".join(f"{name} {lr:g}" for name, lr in chosen.items()), flush=True)
    if given.choose:
        return
    for seed in given.seed or config["seeds"]:
        for name, lr in chosen.items():
            path = given.out / "runs" / f"{file_name(name)}-{seed}.json"
            result = once(path, lambda name=name, seed=seed, lr=lr: run(name, config, seed, lr, given.out, given.data))
            print(f"seed {seed} {name}: {result['test_accuracy']:.4f} in {result['seconds']:.0f} s", flush=True)
    order = list(config["layers"])
    summarize(recorded(given.out / "runs", order), recorded(given.out / "rates", order), given.record)


def run_tasks(
    here: Path,
    description: str | None,
    tasks: Mapping[str, Callable[[int, dict[str, Any]], dict[str, Any]]],
    draw: Callable[[dict[str, Any], Path], None] | None = None,
) -> None:
    """The command line of an experiment of several tasks: run the seeds of each, write the record, draw.

    Args:
        here: Its folder; ``config.json`` has the options of every task, and ``seeds`` among them where they are others.
        description: Its help.
        tasks: ``(seed, options)`` to one record.
        draw: Draws the pictures of a record's runs into a folder.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs") / here.name)
    parser.add_argument("--config", type=Path, default=here / "config.json")
    parser.add_argument("--task", action="append", choices=list(tasks))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--summary", action="store_true")
    parser.add_argument("--record", type=Path, default=here, help="where results.json goes; other tasks in it stay")
    given = parser.parse_args()
    config = json.loads(given.config.read_text())
    given.out.mkdir(parents=True, exist_ok=True)
    for task in [] if given.summary else given.task or list(tasks):
        seeds = config[task].get("seeds", given.seeds)
        for seed in range(seeds) if isinstance(seeds, int) else seeds:
            result = once(given.out / f"{task}-{seed}.json", lambda: tasks[task](seed, config[task]))  # noqa: B023
            print(task, seed, json.dumps(result)[:400], flush=True)
    runs = {task: [json.loads(path.read_text()) for path in sorted(given.out.glob(f"{task}-*.json"))] for task in tasks}
    found = write_tasks(given.record / "results.json", {task: of for task, of in runs.items() if of}, config)
    if draw is not None:
        draw(found, given.record)


def write_tasks(path: Path, runs: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    """``results.json``: what was run, with where it comes from; of other tasks what is there already stays."""
    earlier = json.loads(path.read_text()) if path.is_file() else {"runs": {}, "provenance": None}
    before = earlier["provenance"] if isinstance(earlier["provenance"], dict) else {}
    known = before.get("command") is not None  # one for all tasks, as it was once
    came_from = {task: before if known else before[task] for task in earlier["runs"]}
    found = {
        "provenance": came_from | dict.fromkeys(runs, provenance()),
        "config": config,
        "runs": earlier["runs"] | runs,
    }
    write_text_atomic(path, json.dumps(found, indent=1) + "\n")
    return found["runs"]


def write_part(folder: Path, part: str, found: Any) -> None:
    """``results.json``: this part, with where it comes from; another part in it stays."""
    path = folder / "results.json"
    record = json.loads(path.read_text()) if path.is_file() else {"provenance": {}}
    record[part] = found
    record["provenance"][part] = provenance()
    write_text_atomic(path, json.dumps(record, indent=1) + "\n")


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
