"""A perceptron on Fashion-MNIST at equal flops: dense, as a wider block tensor train, as a wider one of low rank.

The question of "Compute Better Spent" (arXiv:2406.06248) at a size for one thread. All hidden layers are factorized,
the last one stays dense; the widths are such that a forward pass costs the same (to 0.1 %), the dense one never
less. Every net is initialised by the same rule, and learns at rates per core (``tensortrain.nn.param_groups``, which
for dense layers is one rate). The base rate of each net is chosen from one list, on training images kept from
training and with a seed of its own; then the net is trained on all training images.

    python experiments/btt/run.py --out runs/btt             # everything in config.json
    python experiments/btt/run.py --out runs/btt --seed 0    # the choice of rates and one seed
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import math
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

import tensortrain as tt
from tensortrain.compression import cross_entropy_loss, evaluate_accuracy, fit, provenance
from tensortrain.data import ImageBatches, fashion_mnist, image_batches
from tensortrain.viz.report.figures import save_figure

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from study import by, once, record, spread  # noqa: E402

N_PIXELS, N_CLASSES = 28 * 28, 10


def network(net: dict[str, Any]) -> nn.Sequential:
    """Hidden layers of one width with ReLU between them, then a dense layer."""
    sizes = [N_PIXELS] + [net["width"]] * net["hidden_layers"]
    layers: list[nn.Module] = [nn.Flatten()]
    for k, (n_in, n_out) in enumerate(itertools.pairwise(sizes)):
        layers += [hidden(net, k, n_in, n_out), nn.ReLU()]
    return nn.Sequential(*layers, dense(sizes[-1], N_CLASSES))


def hidden(net: dict[str, Any], k: int, n_in: int, n_out: int) -> nn.Module:
    if "format" not in net:
        return dense(n_in, n_out)
    # Always core by core: the flops that are counted are those that are spent.
    return tt.nn.Linear(
        n_in, n_out, format=net["format"], rank=net["ranks"][k], init="structured", implementation="factorized"
    )


def dense(n_in: int, n_out: int) -> nn.Linear:
    """A dense layer by the rule that ``init="structured"`` has for cores."""
    layer = nn.Linear(n_in, n_out)
    nn.init.normal_(layer.weight, std=min(1.0, math.sqrt(n_out / n_in)) / math.sqrt(n_in))
    return layer


@torch.no_grad()  # a plan for training counts the backward pass too
def flops_per_image(model: nn.Module, batch_size: int) -> int:
    """Of a forward pass through all linear layers."""
    total = 0
    for layer in model.modules():
        if isinstance(layer, tt.nn.Linear):
            plan = layer.plan(batch_size)
            total += plan.flops // plan.batch
        elif isinstance(layer, nn.Linear):
            total += 2 * layer.in_features * layer.out_features
    return total


class Images:
    """The images of the training set, whole or in two parts, and those of the test set."""

    def __init__(self, config: dict[str, Any], data: str | None) -> None:
        self.size, self.images = config["batch_size"], fashion_mnist(data)
        self.n_kept = len(self.images.train_labels) - config["selection"]["n_validation"]

    def training(self, seed: int, n: int | None = None) -> ImageBatches:
        images, labels = self.images.train_images[:n], self.images.train_labels[:n]
        return image_batches(images, labels, batch_size=self.size, seed=seed)

    def validation(self) -> ImageBatches:
        return self._in_order(self.images.train_images[self.n_kept :], self.images.train_labels[self.n_kept :])

    def test(self) -> ImageBatches:
        return self._in_order(self.images.test_images, self.images.test_labels)

    def _in_order(self, images: Tensor, labels: Tensor) -> ImageBatches:
        return image_batches(images, labels, batch_size=500, shuffle=False)


def train(
    net: dict[str, Any], lr: float, config: dict[str, Any], seed: int, data: ImageBatches
) -> tuple[nn.Module, dict[str, Any]]:
    torch.manual_seed(seed)
    model = network(net)
    start = time.perf_counter()
    groups = tt.nn.param_groups(model, lr, weight_decay=config["weight_decay"])
    done = fit(model, data, loss=cross_entropy_loss(), lr=lr, param_groups=groups, seed=seed, **config["fit"])
    return model, {
        "lr": lr,
        "seed": seed,
        "params": sum(p.numel() for p in model.parameters()),
        "flops": flops_per_image(model, config["batch_size"]),
        "train_losses": [row["loss"] for row in done.history],
        "train_loss": done.history[-1]["loss"],
        "seconds": round(time.perf_counter() - start, 1),
    }


def select(name: str, lr: float, config: dict[str, Any], images: Images) -> dict[str, Any]:
    """One rate, judged on the training images that it was not trained on."""
    seed = config["selection"]["seed"]
    model, found = train(config["nets"][name], lr, config, seed, images.training(seed, images.n_kept))
    accuracy = evaluate_accuracy(model, images.validation())
    return {"net": name, **found, "validation_accuracy": accuracy, "provenance": provenance(seed=seed)}


def all_choices(config: dict[str, Any], images: Images, out: Path) -> list[dict[str, Any]]:
    """Every net at every rate."""
    choices = []
    for name in config["nets"]:
        for lr in config["selection"]["lrs"]:
            path = out / f"select-{name.replace(' ', '_')}-{lr:g}.json"
            found = once(path, functools.partial(select, name, lr, config, images))
            accuracy, seconds = found["validation_accuracy"], found["seconds"]
            print(f"{name} lr {lr:g}: validation {accuracy:.4f} in {seconds:.0f} s", flush=True)
            choices.append(found)
    return choices


def run(name: str, lr: float, config: dict[str, Any], seed: int, images: Images) -> dict[str, Any]:
    """One training on all training images at the rate that was chosen."""
    model, found = train(config["nets"][name], lr, config, seed, images.training(seed))
    accuracy = evaluate_accuracy(model, images.test())
    return {"net": name, **found, "test_accuracy": accuracy, "provenance": provenance(seed=seed)}


def summarize(choices: list[dict[str, Any]], runs: list[dict[str, Any]], target: Path) -> None:
    rows = []
    for (name,), found in by(runs, "net").items():
        accuracy, loss, seconds = (spread(found, key) for key in ("test_accuracy", "train_loss", "seconds"))
        row = {"net": name, **{key: found[0][key] for key in ("flops", "params", "lr")}, "n": len(found)}
        row |= {"accuracy_mean": accuracy[0], "accuracy_std": accuracy[1]}
        rows.append({**row, "train_loss_mean": loss[0], "train_loss_std": loss[1], "seconds_mean": seconds[0]})
    against = next((row["accuracy_mean"] for row in rows if row["net"] == "dense"), None)
    for row in rows:
        row["points_over_dense"] = None if against is None else 100 * (row["accuracy_mean"] - against)
    record(target, rows, runs, selection=choices)
    save_figure(figure(choices, runs), target / "results.png")
    print(f"{'net':<10} {'flops':>9} {'lr':>8} {'test accuracy':>18} {'over dense':>11} {'train loss':>11} {'s':>6}")
    for row in rows:
        over = "" if row["points_over_dense"] is None else f"{row['points_over_dense']:+.2f}"
        print(
            f"{row['net']:<10} {row['flops']:>9,} {row['lr']:>8.1g} {row['accuracy_mean']:>9.4f} +- "
            f"{row['accuracy_std']:.4f} {over:>11} {row['train_loss_mean']:>11.4f} {row['seconds_mean']:>6.0f}"
        )


def figure(choices: list[dict[str, Any]], runs: list[dict[str, Any]]) -> Figure:
    """Training loss by epoch, mean over seeds; what each rate gave on the validation part."""
    drawing = Figure(figsize=(9, 3.4), layout="constrained")
    losses, rates = drawing.subplots(1, 2)
    for (name,), found in by(runs, "net").items():
        means = [statistics.mean(epoch) for epoch in zip(*(one["train_losses"] for one in found), strict=True)]
        losses.plot(range(1, len(means) + 1), means, marker="o", ms=3, label=name)
    losses.set(xlabel="epoch", ylabel="training loss", yscale="log")
    for (name,), found in by(choices, "net").items():
        found = sorted(found, key=lambda one: one["lr"])
        accuracies = [one["validation_accuracy"] for one in found]
        rates.plot([one["lr"] for one in found], accuracies, marker="o", ms=3, label=name)
    rates.set(xlabel="base learning rate", ylabel="validation accuracy", xscale="log")
    losses.legend()
    return drawing


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/btt"))
    parser.add_argument("--data", help="folder with the four idx files")
    parser.add_argument("--config", type=Path, default=HERE / "config.json")
    parser.add_argument("--seed", type=int, action="append", help="only these seeds")
    parser.add_argument("--record", type=Path, default=HERE, help="where results.json and results.png go")
    given = parser.parse_args()
    config = json.loads(given.config.read_text())
    given.out.mkdir(parents=True, exist_ok=True)
    images = Images(config, given.data)
    choices = all_choices(config, images, given.out)
    best = {
        name: max(found, key=lambda one: one["validation_accuracy"])["lr"]
        for (name,), found in by(choices, "net").items()
    }
    for seed in given.seed or config["seeds"]:
        for name, lr in best.items():
            path = given.out / f"run-{name.replace(' ', '_')}-{seed}.json"
            found = once(path, functools.partial(run, name, lr, config, seed, images))
            print(f"seed {seed} {name}: {found['test_accuracy']:.4f} in {found['seconds']:.0f} s", flush=True)
    runs = [json.loads(path.read_text()) for path in sorted(given.out.glob("run-*.json"))]
    runs.sort(key=lambda one: list(config["nets"]).index(one["net"]))
    summarize(choices, runs, given.record)


if __name__ == "__main__":
    main()
