"""One hidden layer of 1024 x 1024 on Fashion-MNIST: dense, as a tensor train of several shapes, of low rank.

The first table of "Tensorizing Neural Networks" (arXiv:1509.06569) on other images: padded to 32 x 32, the mean
image subtracted, then 1024 -> 1024, ReLU, 1024 -> 10. Only the first layer changes; all are trained from scratch, each
at the learning rate that short runs on a part of the training set found best for it.

    python experiments/tt_linear/run.py --out runs/tt_linear             # everything in config.json
    python experiments/tt_linear/run.py --out runs/tt_linear --seed 0    # one seed
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

import tensortrain as tt
from tensortrain.compression import CurvePoint, cross_entropy_loss, evaluate_accuracy, fit, provenance
from tensortrain.data import ImageBatches
from tensortrain.viz.report.figures import accuracy_curve, save_figure

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from study import Centred, best_rate, by, image_loaders, record, run_layers, spread  # noqa: E402

SIDE = 32


def network(layer: dict[str, Any] | None, train: ImageBatches, seed: int) -> nn.Sequential:
    n = SIDE * SIDE
    torch.manual_seed(seed)
    if layer is None:
        hidden: nn.Module = nn.Linear(n, n)
    else:
        options = {key: value for key, value in layer.items() if key != "modes"}
        if "modes" in layer:
            options["in_modes"] = options["out_modes"] = layer["modes"]
        hidden = tt.nn.Linear(n, n, **options)
    return nn.Sequential(Centred(train), hidden, nn.ReLU(), nn.Linear(n, 10))


def trial(name: str, config: dict[str, Any], lr: float, data: str | None) -> dict[str, Any]:
    """A short run on a part of the training set, tested on the rest of it."""
    given = config["rates"]
    train, rest = image_loaders(data, config["batch_size"], given["seed"], given["held_out"], pad_to=SIDE)
    model = network(config["layers"][name], train, given["seed"])
    settings = {**config["fit"], "epochs": given["epochs"], "lr": lr}
    fit(model, train, loss=cross_entropy_loss(), seed=given["seed"], **settings)
    return {"layer": name, "lr": lr, "accuracy": evaluate_accuracy(model, rest)}


def rate(name: str, config: dict[str, Any], out: Path, data: str | None) -> float:
    """The best of the learning rates for a layer."""
    return best_rate(name, config["rates"]["lr"], out / "rates", lambda lr: trial(name, config, lr, data))


def run(name: str, config: dict[str, Any], seed: int, lr: float, out: Path, data: str | None) -> dict[str, Any]:
    train, test = image_loaders(data, config["batch_size"], seed, pad_to=SIDE)
    model = network(config["layers"][name], train, seed)
    start = time.perf_counter()
    found = fit(model, train, loss=cross_entropy_loss(), seed=seed, lr=lr, **config["fit"])
    layer: Any = model[1]
    weights = sum(p.numel() for key, p in layer.named_parameters() if key != "bias")
    return {
        "layer": name,
        "seed": seed,
        "lr": lr,
        "weights": weights,
        "compression": SIDE**4 / weights,
        "test_accuracy": evaluate_accuracy(model, test),
        "train_loss": found.history[-1]["loss"],
        "seconds": round(time.perf_counter() - start, 1),
        "provenance": provenance(seed=seed),
    }


def summarize(runs: list[dict[str, Any]], rates: list[dict[str, Any]], target: Path) -> None:
    rows = []
    for (name,), found in by(runs, "layer").items():
        mean, std = spread(found, "test_accuracy")
        row = {"layer": name, **{key: found[0][key] for key in ("weights", "compression", "lr")}}
        rows.append({**row, "n": len(found), "accuracy_mean": mean, "accuracy_std": std})
    record(target, rows, runs, rates=rates)
    dense = next((row for row in rows if row["layer"] == "dense"), None)
    points = [
        CurvePoint(row["layer"], row["layer"], row["compression"], row["accuracy_mean"], row["accuracy_std"], row["n"])
        for row in rows
        if row is not dense
    ]
    curve = accuracy_curve(points, metric_name="accuracy", dense=dense["accuracy_mean"] if dense else None)
    save_figure(curve, target / "results.png")
    print(f"{'layer':<20} {'weights':>9} {'smaller':>9} {'lr':>6} {'test accuracy':>18} {'seeds':>6}")
    for row in rows:
        print(
            f"{row['layer']:<20} {row['weights']:>9,} {row['compression']:>8.1f}x {row['lr']:>6g} "
            f"{row['accuracy_mean']:>9.4f} +- "
            f"{row['accuracy_std']:.4f} {row['n']:>6}"
        )


def main() -> None:
    run_layers(HERE, __doc__, rate, run, summarize)


if __name__ == "__main__":
    main()
