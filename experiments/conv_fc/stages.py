"""One stage against several: the conv-fc network cut at once, or in turns with healing between, at equal steps.

A third of Fashion-MNIST serves, for the dense network too, so that a run takes minutes on one core. Every run starts
from the same dense network of its seed; turns share what one stage has in steps. Validation images, which no network is
trained on, are there to choose by. A run that is recorded is not repeated, and a killed one goes on where it was.

    python experiments/conv_fc/stages.py --out runs/conv_fc_stages
    python experiments/conv_fc/stages.py --out runs/conv_fc_stages --ways 0.5+1 --shares 1+7    # of the steps
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

import tensortrain as tt
from tensortrain.compression import cross_entropy_loss, evaluate_accuracy, fit, provenance, write_text_atomic
from tensortrain.compression.stages import Factorize, Heal
from tensortrain.data import fashion_mnist, image_batches
from tensortrain.networks import build
from tensortrain.networks.conv_fc import DENSE_RECIPE

HERE = Path(__file__).parent
N_TRAIN, N_VALIDATION, BATCH, DENSE_EPOCHS, LR = 20_000, 5_000, 128, 5, 3e-3
Ways = tuple[float, ...]


class Experiment:
    def __init__(self, out: Path, data: str | None) -> None:
        self.out, images = out, fashion_mnist(data)
        self.train = images.train_images[:N_TRAIN], images.train_labels[:N_TRAIN]
        aside = slice(N_TRAIN, N_TRAIN + N_VALIDATION)
        validation = images.train_images[aside], images.train_labels[aside]
        self.validation = image_batches(*validation, batch_size=500, shuffle=False)
        self.test = image_batches(images.test_images, images.test_labels, batch_size=500, shuffle=False)

    def train_data(self, seed: int) -> Any:
        return image_batches(*self.train, batch_size=BATCH, augment=True, seed=seed)

    def accuracy(self, model: nn.Module) -> float:
        return evaluate_accuracy(model, self.test)

    def dense(self, seed: int) -> nn.Module:
        """The trained dense network of a seed; trained once."""
        torch.manual_seed(seed)
        model = build("conv-fc").to(memory_format=torch.channels_last)
        path = self.out / f"dense-{seed}.safetensors"
        if path.exists():
            model.load_state_dict(load_file(path))
            return model
        recipe = {**DENSE_RECIPE["fit"], "seed": seed, "epochs": DENSE_EPOCHS}
        checkpoint = self.out / f"dense-{seed}.ckpt"
        fit(model, self.train_data(seed), loss=cross_entropy_loss(), checkpoint=checkpoint, **recipe)
        save_file({k: v.contiguous() for k, v in model.state_dict().items()}, path)
        checkpoint.unlink(missing_ok=True)
        return model

    def run(self, budget: str, epochs: int, ways: Ways, shares: Ways, seed: int) -> dict[str, Any]:
        """One compression, recorded.

        Args:
            ways: Where the stages end, as parts of the way to the budget in equal ratios.
            shares: How the steps of the epochs are shared out among them.
        """
        told = [str(len(ways)) if ways == _even(len(ways)) else "+".join(map(str, ways))]
        told += [] if len({*shares}) == 1 else ["+".join(f"{share:g}" for share in shares)]
        record = self.out / f"{budget}-{epochs}-{'-'.join(told)}-{seed}.json"
        if record.exists():
            return json.loads(record.read_text())
        dense, start = self.dense(seed), time.process_time()
        validation = evaluate_accuracy(dense, self.validation)
        result = tt.compress(
            dense,
            budget=budget,
            data=self.train_data(seed),
            stages=_turns(ways, [round(epochs * _steps_of_an_epoch() * share / sum(shares)) for share in shares]),
            evaluate=self.accuracy,
            metric_name="accuracy",
            checkpoint=self.out / f"{record.stem}.ckpt",
            measure=False,
            seed=seed,
        )
        report = result.report
        found = {
            "budget": budget,
            "n_stages": len(ways),
            "ways": list(ways),
            "shares": [share / sum(shares) for share in shares],
            "seed": seed,
            "params": report.params_after,
            "accuracy_before": report.metric_before,
            "accuracy_after": report.metric_after,
            "loss_points": round(100 * (report.metric_before - report.metric_after), 3),
            "validation_loss_points": round(100 * (validation - evaluate_accuracy(result.model, self.validation)), 3),
            "curve": [[point.method, round(point.compression, 2), point.metric] for point in report.curve],
            "epochs_in_all": epochs,
            "steps_in_all": max(row["step"] for row in report.healing),
            "layers": [[layer.name, layer.format, list(layer.ranks)] for layer in report.layers],
            "notes": list(report.notes),
            "cpu_s": round(time.process_time() - start, 1),
            "provenance": provenance(seed=seed),
        }
        write_text_atomic(record, json.dumps(found, indent=1) + "\n")
        for path in self.out.glob(f"{record.stem}*.ckpt"):
            path.unlink()
        return found


def _even(n_stages: int) -> Ways:
    """What ``n_stages`` of ``compress`` does."""
    return tuple(n / n_stages for n in range(1, n_stages + 1))


def _turns(ways: Ways, steps: Sequence[int]) -> list[Any]:
    pairs = zip(ways, steps, strict=True)
    return [each for way, n in pairs for each in (Factorize(way=way), Heal(steps=n, lr=LR))]


def _steps_of_an_epoch() -> int:
    """Of healing, which holds eight batches back."""
    return N_TRAIN // BATCH + 1 - 8


def summarize(out: Path, target: Path) -> None:
    """Mean and spread over seeds, as JSON and on the terminal."""
    runs = [json.loads(path.read_text()) for path in sorted(out.glob("*x-*.json"))]
    groups: dict[tuple[str, int, Ways, Ways], list[dict[str, Any]]] = {}
    for run in runs:
        key = run["budget"], run["epochs_in_all"], tuple(run["ways"]), tuple(run["shares"])
        groups.setdefault(key, []).append(run)
    rows = [
        {
            "budget": budget,
            "epochs_in_all": epochs,
            "n_stages": len(ways),
            "ways": list(ways),
            "shares": list(shares),
            "n": len(found),
            "accuracy_mean": statistics.mean(run["accuracy_after"] for run in found),
            "loss_points_mean": statistics.mean(run["loss_points"] for run in found),
            "loss_points_std": statistics.stdev(run["loss_points"] for run in found) if len(found) > 1 else None,
            "validation_loss_points_mean": statistics.mean(run["validation_loss_points"] for run in found),
        }
        for (budget, epochs, ways, shares), found in groups.items()
    ]
    summary = {"n_train": N_TRAIN, "dense_epochs": DENSE_EPOCHS, "rows": rows, "runs": runs, "provenance": provenance()}
    write_text_atomic(target / "stages.json", json.dumps(summary, indent=1) + "\n")
    for row in rows:
        print(row)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/conv_fc_stages"))
    parser.add_argument("--data", help="folder with the four idx files")
    parser.add_argument("--budget", action="append", help="default: 160x")
    parser.add_argument("--epochs", type=int, default=6, help="of healing, over all stages")
    parser.add_argument("--seed", type=int, action="append", help="default: 0")
    parser.add_argument(
        "--ways",
        action="append",
        type=lambda text: tuple(map(float, text.split("+"))),
        help="where stages end, as 0.75+1; default: 1 and 0.5+1",
    )
    parser.add_argument(
        "--shares",
        action="append",
        type=lambda text: tuple(map(float, text.split("+"))),
        help="of the steps, as 1+7, for stages of that number; default: the same for all",
    )
    parser.add_argument("--record", type=Path, default=HERE, help="where stages.json goes")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    experiment = Experiment(given.out, given.data)
    for seed in given.seed or [0]:
        for budget in given.budget or ["160x"]:
            for ways in given.ways or [_even(1), _even(2)]:
                for shares in [each for each in given.shares or [] if len(each) == len(ways)] or [(1.0,) * len(ways)]:
                    found = experiment.run(budget, given.epochs, ways, shares, seed)
                    print(f"seed {seed} {budget} by {ways}, {shares}: {found['curve']}", flush=True)
                    summarize(given.out, given.record)


if __name__ == "__main__":
    main()
