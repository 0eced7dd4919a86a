"""A small convolutional network on Fashion-MNIST: dense, and with its kernels as two kinds of tensor train.

After the first table of "Ultimate tensorization" (arXiv:1611.03214), at a quarter of its width: 16-16-P-32-32-P-32-32,
average pooling, one linear layer. "TT" splits the channels and pairs input with output modes; "naive" is the train of
the four kernel axes as they lie. Both get the same share of each kernel's weights; the first convolution and the
last layer stay dense, as published. All are trained from scratch but "healed", which starts from the trained dense
network of its seed and is trained as long again.

    python experiments/tt_conv/run.py --out runs/tt_conv             # everything in config.json
    python experiments/tt_conv/run.py --out runs/tt_conv --choose    # only the learning rates
    python experiments/tt_conv/run.py --out runs/tt_conv --seed 0    # one seed; the dense runs come first
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

import tensortrain as tt
from tensortrain.compression import CurvePoint, cross_entropy_loss, evaluate_accuracy, fit, provenance
from tensortrain.viz.report.figures import accuracy_curve, save_figure

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from study import best_rate, by, image_loaders, record, run_layers, spread  # noqa: E402

CHANNEL_MODES = {16: (4, 4), 32: (4, 8)}


def network() -> nn.Sequential:
    """The dense network; strided from the first layer on, which leaves a quarter of the work."""
    model = nn.Sequential(
        *block(1, 16, kernel=5, stride=2),  # 14 x 14
        *block(16, 16),
        nn.MaxPool2d(3, stride=2, padding=1),  # 7 x 7
        *block(16, 32),
        *block(32, 32),
        nn.MaxPool2d(3, stride=2, padding=1),  # 4 x 4
        *block(32, 32),
        *block(32, 32),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, 10),
    )
    return model.to(memory_format=torch.channels_last)  # a third faster on a CPU


def block(before: int, after: int, kernel: int = 3, stride: int = 1) -> list[nn.Module]:
    conv = nn.Conv2d(before, after, kernel, stride=stride, padding=kernel // 2, bias=False)
    return [conv, nn.BatchNorm2d(after), nn.ReLU()]


def factorized(dense: nn.Conv2d, layer: dict[str, Any]) -> nn.Module:
    """A convolution in another format: with fresh cores as large as torch's kernel, or near the dense kernel."""
    options: dict[str, Any] = {"format": layer["format"], "rank": layer["rank"]}
    if layer["format"] == "tt":
        options |= {"in_modes": CHANNEL_MODES[dense.in_channels], "out_modes": CHANNEL_MODES[dense.out_channels]}
    options["implementation"] = "dense"  # the kernel is rebuilt for each batch, as the published code trains
    if "from" in layer:
        return tt.nn.Conv2d.from_dense(dense, **options)
    return tt.nn.Conv2d(**tt.nn.Conv2d.arguments_of(dense), init="match", **options)


def build(layer: dict[str, Any] | None, trained: Path) -> nn.Sequential:
    model = network()
    if layer is None:
        return model
    if "from" in layer:
        model.load_state_dict(load_file(trained))
    for k, module in enumerate(model[1:], start=1):
        if isinstance(module, nn.Conv2d):
            model[k] = factorized(module, layer)
    return model


def trial(name: str, config: dict[str, Any], lr: float, data: str | None) -> dict[str, Any]:
    """A short run on a part of the training set, tested on the rest of it."""
    given = config["rates"]
    train, rest = image_loaders(data, config["batch_size"], given["seed"], given["held_out"])
    torch.manual_seed(given["seed"])
    model = build(config["layers"][name], Path())
    settings = {**config["fit"], "epochs": given["epochs"], "lr": lr}
    fit(model, train, loss=cross_entropy_loss(), seed=given["seed"], **settings)
    return {"layer": name, "lr": lr, "accuracy": evaluate_accuracy(model, rest)}


def rate(name: str, config: dict[str, Any], out: Path, data: str | None) -> float:
    """The best of the learning rates for a network."""
    name = (config["layers"][name] or {}).get("rate_of", name)
    return best_rate(name, config["rates"]["lr"], out / "rates", lambda lr: trial(name, config, lr, data))


def run(name: str, config: dict[str, Any], seed: int, lr: float, out: Path, data: str | None) -> dict[str, Any]:
    train, test = image_loaders(data, config["batch_size"], seed)
    dense = out / f"dense-{seed}.safetensors"
    torch.manual_seed(seed)
    model = build(config["layers"][name], dense)
    at_start = evaluate_accuracy(model, test)
    start = time.perf_counter()
    found = fit(model, train, loss=cross_entropy_loss(), seed=seed, lr=lr, **config["fit"])
    seconds = time.perf_counter() - start
    if name == "dense":
        save_file({key: value.contiguous() for key, value in model.state_dict().items()}, dense)
    return {
        "layer": name,
        "seed": seed,
        "lr": lr,
        "conv_weights": conv_weights(model),
        "compression": conv_weights(network()) / conv_weights(model),
        "accuracy_at_start": at_start,
        "test_accuracy": evaluate_accuracy(model, test),
        "train_loss": found.history[-1]["loss"],
        "seconds": round(seconds, 1),
        "provenance": provenance(seed=seed),
    }


def conv_weights(model: nn.Module) -> int:
    """Numbers that the kernels of all convolutions are made of, those of the dense first one included."""
    kinds = (nn.Conv2d, tt.nn.Conv2d)
    return sum(p.numel() for layer in model.modules() if isinstance(layer, kinds) for p in layer.parameters())


def summarize(runs: list[dict[str, Any]], rates: list[dict[str, Any]], target: Path) -> None:
    rows = []
    for found in by(runs, "layer").values():
        mean, std = spread(found, "test_accuracy")
        row = {key: found[0][key] for key in ("layer", "conv_weights", "compression", "lr")}
        rows.append({**row, "n": len(found), "accuracy_mean": mean, "accuracy_std": std})
    record(target, rows, runs, rates=rates)
    dense = next((row["accuracy_mean"] for row in rows if row["layer"] == "dense"), None)
    points = [
        CurvePoint(name, name.split()[0], row["compression"], row["accuracy_mean"], row["accuracy_std"], row["n"])
        for row in rows
        if (name := row["layer"]) != "dense"
    ]
    save_figure(accuracy_curve(points, metric_name="accuracy", dense=dense), target / "results.png")
    head = f"{'layer':<12} {'conv weights':>13} {'smaller':>8} {'lr':>6} {'test accuracy':>18}"
    print(f"{head} {'points lost':>12} {'n':>3}")
    for row in rows:
        lost = "" if dense is None else f"{100 * (dense - row['accuracy_mean']):.2f}"
        print(
            f"{row['layer']:<12} {row['conv_weights']:>13,} {row['compression']:>7.2f}x {row['lr']:>6} "
            f"{row['accuracy_mean']:>8.4f} +- {row['accuracy_std']:.4f} {lost:>12} {row['n']:>3}"
        )


def main() -> None:
    run_layers(HERE, __doc__, rate, run, summarize)


if __name__ == "__main__":
    main()
