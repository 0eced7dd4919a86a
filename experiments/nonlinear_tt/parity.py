"""Is a train with activations, a fifth of a dense network's size, as accurate? Is a linear train of its size worse?

Fashion-MNIST at 28 x 28, all 60,000 images, as 16 patches of 7 x 7 pixels: a dense network with 256 hidden units; a
train read by modes, whose first core sees each patch, whose second joins four of them below each other and whose third
the four columns; a train read by chunks, patch after patch. Beside each of the two the linear train: same cores, no
activation. Its patches end in a 1, as those of the other have it, its first cores are the same, and its rank is larger
by one, which makes up for the 1 that is appended to states. Learning rates are chosen for each on 10,000 training
images, with a seed of their own.

    python experiments/nonlinear_tt/parity.py --out runs/nonlinear_tt/parity
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
from tensortrain.compression import cross_entropy_loss, evaluate_accuracy, fit, provenance, write_text_atomic
from tensortrain.data import ImageBatches

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from study import file_name, image_loaders, once, spread  # noqa: E402

SEED_OF_TRIALS = 100


class Standard(nn.Module):
    """Images as vectors of mean 0 and variance 1 over the training set, in the order that a network reads them."""

    mean: Tensor
    std: Tensor
    order: Tensor

    def __init__(self, train: ImageBatches, kind: str) -> None:
        super().__init__()
        pixels = torch.cat([x.flatten(1) for x, _ in train])
        self.register_buffer("mean", pixels.mean())
        self.register_buffer("std", pixels.std())
        patches = torch.arange(784).reshape(4, 7, 4, 7)  # row of patches, row in it, column of patches, column in it
        orders = {"modes": (1, 3, 0, 2), "chunks": (0, 2, 1, 3)}
        self.register_buffer("order", patches.permute(orders.get(kind, (0, 1, 2, 3))).flatten())

    def forward(self, x: Tensor) -> Tensor:
        return (x.flatten(1)[:, self.order] - self.mean) / self.std


class WithOnes(nn.Module):
    """Patches with a 1 behind each."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.pad(x.unflatten(1, (16, 49)), (0, 1), value=1.0).flatten(1)


def network(given: dict[str, Any], train: ImageBatches) -> nn.Sequential:
    kind, seen = given["kind"], Standard(train, given["kind"])
    if kind == "dense":
        return nn.Sequential(seen, nn.Linear(784, given["width"]), nn.ReLU(), nn.Linear(given["width"], 10))
    options = {"rank": given["rank"], "activation": given["activation"], "reading": kind}
    if kind == "modes":
        return nn.Sequential(seen, tt.models.NonlinearTT([49, 4, 4], 10, **options))
    if given["activation"] != "identity":
        return nn.Sequential(seen, tt.models.NonlinearTT([49] * 16, 10, **options, residual=True))
    like = tt.models.NonlinearTT([49] * 16, 10, rank=given["rank"], activation="tanh")
    core = tt.models.NonlinearTT([50] * 16, 10, **options)
    with torch.no_grad():
        for mine, theirs in zip(core.cores, like.cores, strict=True):
            mine.copy_(theirs[: mine.shape[0]])
    return nn.Sequential(seen, WithOnes(), core)


def run(name: str, lr: float, seed: int, config: dict[str, Any], data: str | None, *, is_trial: bool) -> dict[str, Any]:
    train, test = image_loaders(data, config["batch_size"], seed, config["n_held"] if is_trial else 0)
    torch.manual_seed(seed)
    model = network(config["networks"][name], train)
    start = time.process_time()
    epochs = config["trial_epochs"] if is_trial else config["epochs"]
    fit(model, train, loss=cross_entropy_loss(), seed=seed, lr=lr, epochs=epochs, **config["fit"])
    return {
        "network": name,
        "lr": lr,
        "seed": seed,
        "n_params": sum(p.numel() for p in model.parameters()),
        "accuracy": evaluate_accuracy(model, test),
        "seconds": round(time.process_time() - start, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs") / HERE.name / "parity")
    parser.add_argument("--data", help="folder with the four idx files")
    parser.add_argument("--config", type=Path, default=HERE / "parity_config.json")
    parser.add_argument("--network", action="append", help="only these")
    parser.add_argument("--record", type=Path, default=HERE, help="where parity.json goes")
    given = parser.parse_args()
    config = json.loads(given.config.read_text())
    given.out.mkdir(parents=True, exist_ok=True)
    rows, runs, trials = [], [], []
    for name in given.network or config["networks"]:
        tried = []
        for lr in config["networks"][name].get("rates", config["rates"]):
            path = given.out / f"rate-{file_name(name)}-{lr}.json"
            one = once(path, lambda n=name, lr=lr: run(n, lr, SEED_OF_TRIALS, config, given.data, is_trial=True))
            print("trial", *one.values(), flush=True)
            tried.append(one)
        best = max(tried, key=lambda one: one["accuracy"])["lr"]
        found = []
        for seed in config["seeds"]:
            path = given.out / f"{file_name(name)}-{best}-{seed}.json"
            found.append(once(path, lambda n=name, s=seed, lr=best: run(n, lr, s, config, given.data, is_trial=False)))
            print(*found[-1].values(), flush=True)
        mean, std = spread(found, "accuracy")
        row = {"network": name, "n_params": found[0]["n_params"], "lr": best, "accuracy": mean, "accuracy_std": std}
        rows, runs, trials = [*rows, row], [*runs, *found], [*trials, *tried]
    if given.network:
        return
    for row in rows:
        row["share_of_dense"] = row["n_params"] / rows[0]["n_params"]
        print(row)
    found = {"rows": rows, "runs": runs, "trials": trials, "provenance": provenance()}
    write_text_atomic(given.record / "parity.json", json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
