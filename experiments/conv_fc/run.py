"""Accuracy against compression of the conv-fc network on Fashion-MNIST, beside three simpler ways.

Every run starts from the same dense network of its seed, gets the same budget and the same healing, and is
tested on the 10,000 test images. A run that is recorded is not repeated; a killed one goes on where it was.

    python experiments/conv_fc/run.py --out runs/conv_fc            # everything in config.json
    python experiments/conv_fc/run.py --out runs/conv_fc --seed 0   # one seed
    python experiments/conv_fc/run.py --out runs/conv_fc --summary  # table and plot of what is recorded
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

import tensortrain as tt
from tensortrain.compression import (
    CurvePoint,
    Heal,
    count_params,
    cross_entropy_loss,
    evaluate_accuracy,
    fit,
    heal_,
    plan_uniform,
    provenance,
    reestimate_batchnorm_,
    write_text_atomic,
)
from tensortrain.data import fashion_mnist, image_batches
from tensortrain.networks import build
from tensortrain.networks.conv_fc import DENSE_RECIPE
from tensortrain.nn import FactorizedLayer
from tensortrain.viz.report.figures import accuracy_curve, save_figure

HERE = Path(__file__).parent
KEPT_DENSE = ("features.0", "classifier.6")  # as published: the first convolution and the last layer


class Experiment:
    def __init__(self, config: dict[str, Any], out: Path, data: str | None) -> None:
        self.config, self.out = config, out
        images = fashion_mnist(data)
        self.images = images
        self.test = image_batches(images.test_images, images.test_labels, batch_size=500, shuffle=False)

    def train_data(self, seed: int) -> Any:
        given = {**DENSE_RECIPE["data"], "seed": seed}
        return image_batches(self.images.train_images, self.images.train_labels, **given)

    def accuracy(self, model: nn.Module) -> float:
        return evaluate_accuracy(model, self.test)

    def dense(self, seed: int) -> tuple[nn.Module, float]:
        """The trained dense network of a seed; trained once."""
        torch.manual_seed(seed)
        model = build(self.config["model"]).to(memory_format=torch.channels_last)
        path = self.out / f"dense-{seed}.safetensors"
        if path.exists():
            model.load_state_dict(load_file(path))
        else:
            recipe = {**DENSE_RECIPE["fit"], "seed": seed}
            fit(
                model,
                self.train_data(seed),
                loss=cross_entropy_loss(),
                checkpoint=self.out / f"dense-{seed}.ckpt",
                **recipe,
            )
            save_file({k: v.contiguous() for k, v in model.state_dict().items()}, path)
        return model, self.accuracy(model)

    def run(self, method: str, budget: str, seed: int) -> dict[str, Any]:
        """One compression and its healing, recorded."""
        record = self.out / f"{method}-{budget}-{seed}.json"
        if record.exists():
            return json.loads(record.read_text())
        start = time.perf_counter()
        dense, before = self.dense(seed)
        limit = int(count_params(dense) / float(budget.rstrip("x")))
        small = BUILDERS[method](dense, limit, self.train_data(seed), self.config, seed)
        reestimate_batchnorm_(small, self.train_data(seed), n_batches=30)
        unhealed = self.accuracy(small)
        checkpoint = self.out / f"{method}-{budget}-{seed}.ckpt"
        if method == "tt-scratch":
            recipe = {**DENSE_RECIPE["fit"], "seed": seed}
            fit(small, self.train_data(seed), loss=cross_entropy_loss(), checkpoint=checkpoint, **recipe)
        else:
            heal = Heal(**self.config["heal"])
            heal_(small, dense, self.train_data(seed), heal, checkpoint=checkpoint, seed=seed)
        after = self.accuracy(small)
        result = {
            "method": method,
            "budget": budget,
            "seed": seed,
            "params_before": count_params(dense),
            "params_after": count_params(small),
            "accuracy_before": before,
            "accuracy_unhealed": unhealed,
            "accuracy_after": after,
            "loss_points": round(100 * (before - after), 3),
            "layers": [
                {"name": name, **module.spec.to_dict(), "params": module.n_params}
                for name, module in small.named_modules()
                if isinstance(module, FactorizedLayer)
            ],
            "heal": DENSE_RECIPE["fit"] if method == "tt-scratch" else self.config["heal"],
            "seconds": round(time.perf_counter() - start, 1),
            "provenance": provenance(seed=seed),
        }
        write_text_atomic(record, json.dumps(result, indent=1) + "\n")
        checkpoint.unlink(missing_ok=True)
        return result


def ours(dense: nn.Module, limit: int, data: Any, config: dict[str, Any], seed: int) -> nn.Module:
    plan = tt.plan_compression(
        dense, budget={"params": limit}, data=data, n_batches=config["calibration_batches"], will_heal="long"
    )
    return tt.apply_plan_(copy.deepcopy(dense), plan)


def uniform(dense: nn.Module, limit: int, format: str) -> nn.Module:
    """The largest rank, the same for all layers, that fits; plain decomposition of the weights."""
    plan = plan_uniform(dense, budget={"params": limit}, format=format, exclude=KEPT_DENSE)
    return tt.apply_plan_(copy.deepcopy(dense), plan)


def scratch(dense: nn.Module, limit: int, data: Any, config: dict[str, Any], seed: int) -> nn.Module:
    """The uniform TT network with fresh weights everywhere."""
    torch.manual_seed(seed)
    model = uniform(dense, limit, "tt")
    for module in model.modules():
        if isinstance(module, FactorizedLayer):
            module.reset_parameters("he")
        elif hasattr(module, "reset_parameters"):
            module.reset_parameters()
    return model


def longer(dense: nn.Module, limit: int, data: Any, config: dict[str, Any], seed: int) -> nn.Module:
    """The dense network itself, healed like the others: what the additional training alone is worth."""
    return copy.deepcopy(dense)


BUILDERS = {
    "tensortrain": ours,
    "uniform-tt": lambda dense, limit, data, config, seed: uniform(dense, limit, "tt"),
    "uniform-svd": lambda dense, limit, data, config, seed: uniform(dense, limit, "low_rank"),
    "tt-scratch": scratch,
    "dense-longer": longer,
}


def summarize(out: Path, target: Path) -> None:
    """Mean and spread over seeds as JSON, a table on the terminal, and the plot."""
    records = [json.loads(path.read_text()) for path in sorted(out.glob("*x-*.json"))]
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for record in records:
        groups.setdefault((record["method"], record["budget"]), []).append(record)
    rows = [_row(method, budget, found) for (method, budget), found in groups.items()]
    rows.sort(key=lambda row: (row["budget_ratio"], -row["accuracy_mean"]))
    dense = {record["seed"]: record["accuracy_before"] for record in records}
    summary = {
        "dense_accuracy": dense,
        "rows": rows,
        "runs": records,
        "provenance": provenance(),
    }
    write_text_atomic(target / "results.json", json.dumps(summary, indent=1) + "\n")
    points = [
        CurvePoint(
            row["budget"], row["method"], row["compression"], row["accuracy_mean"], row["accuracy_std"], row["n"]
        )
        for row in rows
    ]
    mean = statistics.mean(dense.values())
    save_figure(accuracy_curve(points, metric_name="accuracy", dense=mean), target / "results.png")
    print(f"dense accuracy {mean:.4f} over {len(dense)} seeds")
    print(f"{'method':<14} {'budget':>6} {'params':>8} {'accuracy':>18} {'loss in points':>18} {'unhealed':>9}")
    for row in rows:
        print(
            f"{row['method']:<14} {row['budget']:>6} {row['params_after']:>8,} "
            f"{row['accuracy_mean']:>9.4f} +- {row['accuracy_std']:.4f} "
            f"{row['loss_points_mean']:>9.2f} +- {row['loss_points_std']:.2f} {row['unhealed_mean']:>9.4f}"
        )


def _row(method: str, budget: str, found: list[dict[str, Any]]) -> dict[str, Any]:
    def spread(key: str) -> tuple[float, float]:
        values = [record[key] for record in found]
        return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0

    accuracy, loss = spread("accuracy_after"), spread("loss_points")
    return {
        "method": method,
        "budget": budget,
        "budget_ratio": float(budget.rstrip("x")),
        "n": len(found),
        "params_after": round(statistics.mean(r["params_after"] for r in found)),
        "compression": statistics.mean(r["params_before"] / r["params_after"] for r in found),
        "accuracy_mean": accuracy[0],
        "accuracy_std": accuracy[1],
        "loss_points_mean": loss[0],
        "loss_points_std": loss[1],
        "unhealed_mean": spread("accuracy_unhealed")[0],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/conv_fc"))
    parser.add_argument("--data", help="folder with the four idx files")
    parser.add_argument("--config", type=Path, default=HERE / "config.json")
    parser.add_argument("--seed", type=int, action="append", help="only these seeds")
    parser.add_argument("--method", action="append", help="only these methods")
    parser.add_argument("--summary", action="store_true", help="only sum up what is recorded")
    parser.add_argument("--record", type=Path, default=HERE, help="where results.json and results.png go")
    given = parser.parse_args()
    config = json.loads(given.config.read_text())
    given.out.mkdir(parents=True, exist_ok=True)
    if not given.summary:
        experiment = Experiment(config, given.out, given.data)
        for seed in given.seed or config["seeds"]:
            for run in config["runs"]:
                if given.method and run["method"] not in given.method:
                    continue
                result = experiment.run(run["method"], run["budget"], seed)
                print(
                    f"seed {seed} {run['method']} {run['budget']}: {result['params_after']:,} parameters, "
                    f"{result['accuracy_before']:.4f} -> {result['accuracy_unhealed']:.4f} -> "
                    f"{result['accuracy_after']:.4f} in {result['seconds']:.0f} s",
                    flush=True,
                )
    summarize(given.out, given.record)


if __name__ == "__main__":
    main()
