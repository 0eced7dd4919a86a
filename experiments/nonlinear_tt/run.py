"""How large a rank does a train with activations need, to do what a dense network with one hidden layer does?

A slide of the deck guesses "r ~ log h". Fashion-MNIST, averaged to 14 x 14 pixels, the first 20,000 images: dense
networks of h hidden units, and trains of rank r in both readings, rows as chunks. For every h the smallest r whose
test accuracy is within half a point. Everything is trained alike, at one learning rate.

    python experiments/nonlinear_tt/run.py --out runs/nonlinear_tt    # under five minutes on one thread
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import nn

import tensortrain as tt
from tensortrain.compression import cross_entropy_loss, evaluate_accuracy, fit
from tensortrain.data import ImageBatches, fashion_mnist, image_batches
from tensortrain.viz.report.figures import GRID, INK, METHOD_COLOURS, METHOD_MARKERS, save_figure

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from study import by, once, record, spread  # noqa: E402

KINDS = ("dense", "chunks", "modes")


def network(kind: str, size: int, config: dict[str, Any]) -> nn.Sequential:
    if kind == "dense":
        core: nn.Module = nn.Sequential(nn.Linear(196, size), nn.ReLU(), nn.Linear(size, 10))
    else:
        core = tt.models.NonlinearTT(config["in_modes"][kind], 10, rank=size, reading=kind)
    return nn.Sequential(nn.AvgPool2d(2), nn.Flatten(), core)


def loaders(config: dict[str, Any], seed: int, data: str | None) -> tuple[ImageBatches, ImageBatches]:
    images, n = fashion_mnist(data), config["n_train"]
    train = image_batches(images.train_images[:n], images.train_labels[:n], batch_size=config["batch_size"], seed=seed)
    return train, image_batches(images.test_images, images.test_labels, batch_size=1000, shuffle=False)


def run(kind: str, size: int, config: dict[str, Any], seed: int, data: str | None) -> dict[str, Any]:
    train, test = loaders(config, seed, data)
    torch.manual_seed(seed)
    model = network(kind, size, config)
    start = time.perf_counter()
    fit(model, train, loss=cross_entropy_loss(), seed=seed, **config["fit"])
    return {
        "kind": kind,
        "size": size,
        "seed": seed,
        "n_params": sum(p.numel() for p in model.parameters()),
        "test_accuracy": evaluate_accuracy(model, test),
        "seconds": round(time.perf_counter() - start, 1),
    }


def table(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    rows = []
    for (kind, size), found in by(runs, "kind", "size").items():
        mean, std = spread(found, "test_accuracy")
        rows.append({"kind": kind, "size": size, "n_params": found[0]["n_params"], "accuracy": mean, "std": std})
    return rows


def matches(rows: list[dict[str, Any]], within: float) -> list[dict[str, Any]]:
    """For every width and reading the smallest rank that is as accurate; none where no rank is."""
    found = []
    for dense, kind in itertools.product([row for row in rows if row["kind"] == "dense"], KINDS[1:]):
        enough = [row for row in rows if row["kind"] == kind and row["accuracy"] >= dense["accuracy"] - within]
        best = min(enough, key=lambda row: row["size"], default=None)
        found.append(
            {
                "reading": kind,
                "width": dense["size"],
                "rank": best and best["size"],
                "share_of_params": best and best["n_params"] / dense["n_params"],
            }
        )
    return found


def picture(rows: list[dict[str, Any]], found: list[dict[str, Any]]) -> Figure:
    figure = Figure(figsize=(9.0, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for k, kind in enumerate(KINDS):
        style = {"color": METHOD_COLOURS[k], "marker": METHOD_MARKERS[k]}
        mine = [row for row in rows if row["kind"] == kind]
        label = "dense, one hidden layer" if kind == "dense" else f"train, {kind}"
        left.errorbar(
            [row["n_params"] for row in mine],
            [100 * row["accuracy"] for row in mine],
            yerr=[100 * row["std"] for row in mine],
            label=label,
            **style,
        )
        pairs = [(row["width"], row["rank"]) for row in found if row["reading"] == kind and row["rank"]]
        if pairs:
            right.plot(*zip(*pairs, strict=True), label=label, **style)
    left.set(xscale="log", xlabel="parameters", ylabel="test accuracy, %")
    right.set(xlabel="hidden units h of the dense network", ylabel="smallest rank r as accurate")
    right.set_xscale("log", base=2)
    for axes in (left, right):
        axes.grid(True, color=GRID)
        axes.legend(frameon=False, labelcolor=INK)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs") / HERE.name)
    parser.add_argument("--data", help="folder with the four idx files")
    parser.add_argument("--config", type=Path, default=HERE / "config.json")
    parser.add_argument("--record", type=Path, default=HERE, help="where results.json and results.png go")
    given = parser.parse_args()
    config = json.loads(given.config.read_text())
    given.out.mkdir(parents=True, exist_ok=True)
    jobs = [(kind, size) for kind in KINDS for size in config["widths" if kind == "dense" else "ranks"]]
    runs = []
    for seed, (kind, size) in itertools.product(config["seeds"], jobs):
        path = given.out / f"{kind}-{size}-{seed}.json"
        runs.append(once(path, lambda kind=kind, size=size, seed=seed: run(kind, size, config, seed, given.data)))
        print(*runs[-1].values(), flush=True)
    rows = table(runs)
    found = matches(rows, config["within"])
    record(given.record, rows, runs, matches=found)
    save_figure(picture(rows, found), given.record / "results.png")
    for row in found:
        print(row)


if __name__ == "__main__":
    main()
