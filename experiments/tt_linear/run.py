"""One hidden layer of 1024 x 1024 on Fashion-MNIST: dense, as a tensor train of several shapes, of low rank.

The first table of "Tensorizing Neural Networks" (arXiv:1509.06569) on other images: padded to 32 x 32, the mean
image subtracted, then 1024 -> 1024, ReLU, 1024 -> 10. Only the first layer changes; all are trained from scratch.

    python experiments/tt_linear/run.py --out runs/tt_linear             # everything in config.json
    python experiments/tt_linear/run.py --out runs/tt_linear --seed 0    # one seed
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import tensortrain as tt
from tensortrain.compress import CurvePoint, cross_entropy_loss, evaluate_accuracy, fit, provenance
from tensortrain.data import fashion_mnist, image_batches
from tensortrain.viz.figures import accuracy_curve, save_figure

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from study import by, once, record, spread  # noqa: E402

SIDE = 32


class Centred(nn.Module):
    """Images as vectors, less the mean image of the training set."""

    mean: Tensor

    def __init__(self, mean: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", mean)

    def forward(self, x: Tensor) -> Tensor:  # b 1 32 32
        return x.flatten(1) - self.mean


def network(layer: dict[str, Any] | None, mean: Tensor) -> nn.Sequential:
    n = SIDE * SIDE
    if layer is None:
        hidden: nn.Module = nn.Linear(n, n)
    else:
        options = {key: value for key, value in layer.items() if key != "modes"}
        if "modes" in layer:
            options["in_modes"] = options["out_modes"] = layer["modes"]
        hidden = tt.nn.Linear(n, n, **options)
    return nn.Sequential(Centred(mean), hidden, nn.ReLU(), nn.Linear(n, 10))


def run(name: str, config: dict[str, Any], seed: int, data: str | None) -> dict[str, Any]:
    images = fashion_mnist(data)
    size = config["batch_size"]
    train = image_batches(images.train_images, images.train_labels, batch_size=size, pad_to=SIDE, seed=seed)
    test = image_batches(images.test_images, images.test_labels, batch_size=500, pad_to=SIDE, shuffle=False)
    mean = torch.cat([x.flatten(1).sum(0, keepdim=True) for x, _ in train]).sum(0) / len(images.train_labels)
    torch.manual_seed(seed)
    model = network(config["layers"][name], mean)
    start = time.perf_counter()
    found = fit(model, train, loss=cross_entropy_loss(), seed=seed, **config["fit"])
    layer: Any = model[1]
    weights = sum(p.numel() for key, p in layer.named_parameters() if key != "bias")
    return {
        "layer": name,
        "seed": seed,
        "weights": weights,
        "compression": SIDE**4 / weights,
        "test_accuracy": evaluate_accuracy(model, test),
        "train_loss": found.history[-1]["loss"],
        "seconds": round(time.perf_counter() - start, 1),
        "provenance": provenance(seed=seed),
    }


def summarize(runs: list[dict[str, Any]], target: Path) -> None:
    rows = []
    for (name,), found in by(runs, "layer").items():
        mean, std = spread(found, "test_accuracy")
        row = {"layer": name, "weights": found[0]["weights"], "compression": found[0]["compression"]}
        rows.append({**row, "n": len(found), "accuracy_mean": mean, "accuracy_std": std})
    record(target, rows, runs)
    dense = next((row for row in rows if row["layer"] == "dense"), None)
    points = [
        CurvePoint(row["layer"], row["layer"], row["compression"], row["accuracy_mean"], row["accuracy_std"], row["n"])
        for row in rows
        if row is not dense
    ]
    curve = accuracy_curve(points, metric_name="accuracy", dense=dense["accuracy_mean"] if dense else None)
    save_figure(curve, target / "results.png")
    print(f"{'layer':<20} {'weights':>9} {'smaller':>9} {'test accuracy':>18} {'seeds':>6}")
    for row in rows:
        print(
            f"{row['layer']:<20} {row['weights']:>9,} {row['compression']:>8.1f}x {row['accuracy_mean']:>9.4f} +- "
            f"{row['accuracy_std']:.4f} {row['n']:>6}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/tt_linear"))
    parser.add_argument("--data", help="folder with the four idx files")
    parser.add_argument("--seed", type=int, action="append", help="only these seeds")
    parser.add_argument("--record", type=Path, default=HERE, help="where results.json and results.png go")
    given = parser.parse_args()
    config = json.loads((HERE / "config.json").read_text())
    given.out.mkdir(parents=True, exist_ok=True)
    for seed in given.seed or config["seeds"]:
        for name in config["layers"]:
            path = given.out / f"{name.replace(' ', '-')}-{seed}.json"
            result = once(path, lambda name=name, seed=seed: run(name, config, seed, given.data))
            print(f"seed {seed} {name}: {result['test_accuracy']:.4f} in {result['seconds']:.0f} s", flush=True)
    summarize([json.loads(path.read_text()) for path in sorted(given.out.glob("*-*.json"))], given.record)


if __name__ == "__main__":
    main()
