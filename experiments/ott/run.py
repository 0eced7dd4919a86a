"""Orthogonal against plain tensor trains: one hidden layer of 1024 x 1024 on Fashion-MNIST.

After "Scaling Recurrent Models via Orthogonal Approximations in Tensor Trains" (ICCV 2019), on images: padded to
32 x 32, the mean image subtracted, then 1024 -> 1024, ReLU, 1024 -> 10. "OTT" keeps every slice of the interior cores
a rotation, which takes less than half of the numbers at equal ranks. Beside it: the plain train of the same shape,
one of smaller ranks with about the numbers of OTT, the two other kinds of orthogonal train that the library knows,
and the dense layer. All are trained from scratch and start with the same variance of the weight.

    python experiments/ott/run.py --out runs/ott             # everything in config.json
    python experiments/ott/run.py --out runs/ott --choose    # only the learning rates
    python experiments/ott/run.py --out runs/ott --seed 0    # one seed
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
from tensortrain.nn.shaping.orthogonal import OrthogonalCores
from tensortrain.viz.report.figures import accuracy_curve, save_figure

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from study import Centred, best_rate, by, image_loaders, record, run_layers, spread  # noqa: E402

SIDE = 32


def hidden(layer: dict[str, Any] | None, modes: list[int]) -> nn.Module:
    n = SIDE * SIDE
    if layer is None:
        return nn.Linear(n, n)
    made = tt.nn.Linear(n, n, rank=layer["rank"], in_modes=modes, out_modes=modes)
    kind = layer.get("orthogonal")
    if kind is None:
        return made
    tt.nn.orthogonal(made, kind, rank=layer.get("spectral_rank"))
    made.reset_parameters()  # a spectral layer is another train than before: it gets its own start
    return made


def network(layer: dict[str, Any] | None, modes: list[int], train: ImageBatches) -> nn.Sequential:
    return nn.Sequential(Centred(train), hidden(layer, modes), nn.ReLU(), nn.Linear(SIDE * SIDE, 10))


def trial(name: str, config: dict[str, Any], lr: float, data: str | None) -> dict[str, Any]:
    """A short run on a part of the training set, tested on the rest of it."""
    given = config["rates"]
    train, rest = image_loaders(data, config["batch_size"], given["seed"], given["held_out"], pad_to=SIDE)
    torch.manual_seed(given["seed"])
    model = network(config["layers"][name], config["modes"], train)
    settings = {**config["fit"], "epochs": given["epochs"], "lr": lr}
    fit(model, train, loss=cross_entropy_loss(), seed=given["seed"], **settings)
    return {"layer": name, "lr": lr, "accuracy": evaluate_accuracy(model, rest)}


def rate(name: str, config: dict[str, Any], out: Path, data: str | None) -> float:
    """The best of the learning rates for a network."""
    return best_rate(name, config["rates"]["lr"], out / "rates", lambda lr: trial(name, config, lr, data))


def run(name: str, config: dict[str, Any], seed: int, lr: float, out: Path, data: str | None) -> dict[str, Any]:
    train, test = image_loaders(data, config["batch_size"], seed, pad_to=SIDE)
    torch.manual_seed(seed)
    model = network(config["layers"][name], config["modes"], train)
    layer: Any = model[1]
    start = time.perf_counter()
    found = fit(model, train, loss=cross_entropy_loss(), seed=seed, lr=lr, **config["fit"])
    seconds = time.perf_counter() - start
    return {
        "layer": name,
        "seed": seed,
        "lr": lr,
        "weights": weights(layer),
        "interior_weights": interior_weights(layer),
        "compression": SIDE**4 / weights(layer),
        "state_bytes": sum(value.nbytes for value in layer.state_dict().values()),
        "orthogonality_error": orthogonality_error(layer),
        "test_accuracy": evaluate_accuracy(model, test),
        "train_loss": found.history[-1]["loss"],
        "seconds": round(seconds, 1),
        "provenance": provenance(seed=seed),
    }


def weights(layer: nn.Module) -> int:
    return sum(p.numel() for name, p in layer.named_parameters() if name != "bias")


def interior_weights(layer: nn.Module) -> int:
    """Stored numbers of the cores between the first and the last; 0 for a dense layer."""
    cores: Any = getattr(layer, "cores", [])
    stored = cores.free if isinstance(cores, OrthogonalCores) else lambda k: (cores[k],)
    return sum(p.numel() for k in range(1, len(cores) - 1) for p in stored(k))


@torch.no_grad()
def orthogonality_error(layer: nn.Module) -> float | None:
    """Largest entry of ``Q^T Q - I`` over the slices of the interior cores; None where they need not be rotations."""
    cores: Any = getattr(layer, "cores", None)
    if getattr(cores, "kind", None) != "slice":
        return None
    slices = torch.cat([core.permute(1, 2, 0, 3).flatten(0, 1) for core in list(cores)[1:-1]])  # p r r
    return float((slices.mT @ slices - torch.eye(slices.shape[-1])).abs().max())


def summarize(runs: list[dict[str, Any]], rates: list[dict[str, Any]], target: Path) -> None:
    rows = []
    for found in by(runs, "layer").values():
        mean, std = spread(found, "test_accuracy")
        same = ("layer", "weights", "interior_weights", "compression", "state_bytes", "lr")
        row = {key: found[0][key] for key in same}
        rows.append({**row, "n": len(found), "accuracy_mean": mean, "accuracy_std": std})
    record(target, rows, runs, rates=rates)
    plain = next((row for row in rows if row["layer"] == "TT"), None)
    dense = next((row["accuracy_mean"] for row in rows if row["layer"] == "dense"), None)
    points = [
        CurvePoint(row["layer"], row["layer"], row["compression"], row["accuracy_mean"], row["accuracy_std"], row["n"])
        for row in rows
        if row["layer"] != "dense"
    ]
    save_figure(accuracy_curve(points, metric_name="accuracy", dense=dense), target / "results.png")
    head = f"{'layer':<20} {'weights':>9} {'interior':>9} {'of TT':>7} {'bytes':>10} {'lr':>6} {'test accuracy':>18}"
    print(f"{head} {'below TT':>9} {'n':>3}")
    for row in rows:
        share = row["interior_weights"] / plain["interior_weights"] if plain else float("nan")
        lost = plain["accuracy_mean"] - row["accuracy_mean"] if plain else float("nan")
        print(
            f"{row['layer']:<20} {row['weights']:>9,} {row['interior_weights']:>9,} {share:>7.1%} "
            f"{row['state_bytes']:>10,} {row['lr']:>6} {row['accuracy_mean']:>8.4f} +- {row['accuracy_std']:.4f} "
            f"{100 * lost:>9.2f} {row['n']:>3}"
        )


def main() -> None:
    run_layers(HERE, __doc__, rate, run, summarize)


if __name__ == "__main__":
    main()
