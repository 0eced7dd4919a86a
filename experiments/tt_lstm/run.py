"""Which of three languages is spoken: a dense LSTM beside LSTMs whose input map is 100 times smaller.

Telephone prompts of 3 s as spectrograms: 23 steps of 8 frames with 129 frequencies, 1,032 inputs. LSTM of 128,
then a linear map of its last output (the input map only as in arXiv:1707.01786, both maps as in arXiv:1802.10410).
The learning rate of every network is chosen on a part of the training prompts before any of the recorded runs.

    python experiments/tt_lstm/run.py --out runs/tt_lstm             # everything in config.json
    python experiments/tt_lstm/run.py --out runs/tt_lstm --seed 0    # one seed
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
from torch.utils.data import DataLoader, TensorDataset

import tensortrain as tt
from tensortrain.compression import CurvePoint, cross_entropy_loss, evaluate_accuracy, fit, provenance
from tensortrain.data import SpeechData, spoken_prompts
from tensortrain.viz.report.figures import accuracy_curve, save_figure

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from installed import Listener  # noqa: E402
from study import by, once, record, spread  # noqa: E402


def network(name: str, config: dict[str, Any], data: SpeechData) -> Listener:
    options, sizes = config["nets"][name], (data.features.shape[-1], config["hidden"])
    rnn = nn.LSTM(*sizes, batch_first=True) if options is None else tt.nn.LSTM(*sizes, batch_first=True, **options)
    return Listener(rnn, config["hidden"], config["dropout"], data)


def batches(data: SpeechData, index: Tensor, size: int, *, shuffle: bool) -> DataLoader[Any]:
    return DataLoader(TensorDataset(data.features[index], data.labels[index]), batch_size=size, shuffle=shuffle)


def train(name: str, config: dict[str, Any], data: SpeechData, index: Tensor, lr: float, seed: int) -> tuple[Any, Any]:
    torch.manual_seed(seed)
    model = network(name, config, data)
    found = fit(
        model,
        batches(data, index, config["batch_size"], shuffle=True),
        loss=cross_entropy_loss(),
        lr=lr,
        seed=seed,
        **config["fit"],
    )
    return model, found


def held_out(data: SpeechData, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """The training recordings in two parts, the recordings of a prompt all in one."""
    names = sorted({data.prompts[k] for k in data.train_index})
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(seed))
    out = {names[k] for k in order[: round(share * len(names))]}
    is_out = torch.tensor([data.prompts[k] in out for k in data.train_index])
    return data.train_index[~is_out], data.train_index[is_out]


def choose(name: str, config: dict[str, Any], data: SpeechData) -> dict[str, Any]:
    """The learning rate with the best accuracy on held-out training prompts; of equals, the lowest loss there."""
    seed = config["choice"]["seed"]
    kept, out = held_out(data, config["choice"]["share"], seed)
    trials = []
    for lr in config["choice"]["lr"]:
        model, _ = train(name, config, data, kept, lr, seed)
        trials.append({"lr": lr, **figures(model, data, out)})
    best = max(trials, key=lambda trial: (trial["accuracy"], -trial["loss"]))
    return {"net": name, "lr": best["lr"], "trials": trials}


@torch.no_grad()
def figures(model: nn.Module, data: SpeechData, index: Tensor) -> dict[str, float]:
    model.eval()
    loss = nn.functional.cross_entropy(model(data.features[index]), data.labels[index])
    return {"accuracy": evaluate_accuracy(model, batches(data, index, 500, shuffle=False)), "loss": loss.item()}


def run(name: str, config: dict[str, Any], data: SpeechData, lr: float, seed: int) -> dict[str, Any]:
    start = time.perf_counter()
    model, found = train(name, config, data, data.train_index, lr, seed)
    n_params = sum(p.numel() for p in model.parameters())
    return {
        "net": name,
        "seed": seed,
        "lr": lr,
        "input_weights": n_weights(model, "ih"),
        "hidden_weights": n_weights(model, "hh"),
        "n_params": n_params,
        "test_accuracy": figures(model, data, data.test_index)["accuracy"],
        "train_loss": found.history[-1]["loss"],
        "seconds": round(time.perf_counter() - start, 1),
        "provenance": provenance(seed=seed),
    }


def n_weights(model: Any, part: str) -> int:
    """Numbers in the input map (``ih``) or the hidden map (``hh``), biases left out: as torch and as we name them."""
    named = model.rnn.named_parameters()
    return sum(p.numel() for name, p in named if part in name.replace("_", ".").split(".") and "bias" not in name)


def summarize(runs: list[dict[str, Any]], choices: list[dict[str, Any]], target: Path) -> None:
    rows = []
    groups = by(runs, "net")
    dense = groups.get(("dense",))
    for found in groups.values():
        mean, std = spread(found, "test_accuracy")
        row = {key: found[0][key] for key in ("net", "lr", "input_weights", "hidden_weights", "n_params")}
        smaller = dense[0]["input_weights"] / row["input_weights"] if dense else float("nan")
        rows.append({**row, "compression": smaller, "n": len(found), "accuracy_mean": mean, "accuracy_std": std})
    record(target, rows, runs, choices=choices)
    points = [
        CurvePoint(row["net"], row["net"], row["compression"], row["accuracy_mean"], row["accuracy_std"], row["n"])
        for row in rows
        if row["net"] != "dense"
    ]
    level = spread(dense, "test_accuracy")[0] if dense else None
    save_figure(accuracy_curve(points, metric_name="accuracy", dense=level), target / "results.png")
    print(
        f"{'net':<20} {'input map':>9} {'smaller':>9} {'hidden map':>10} {'lr':>6} {'test accuracy':>18} {'seeds':>6}"
    )
    for row in rows:
        print(
            f"{row['net']:<20} {row['input_weights']:>9,} {row['compression']:>8.1f}x {row['hidden_weights']:>10,} "
            f"{row['lr']:>6} {row['accuracy_mean']:>9.4f} +- {row['accuracy_std']:.4f} {row['n']:>6}"
        )


def read(out: Path, kind: str) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted(out.glob(f"{kind}-*.json"))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/tt_lstm"))
    parser.add_argument("--data", help="folder with the folders of recordings")
    parser.add_argument("--config", type=Path, default=HERE / "config.json")
    parser.add_argument("--seed", type=int, action="append", help="only these seeds")
    parser.add_argument("--record", type=Path, default=HERE, help="where results.json and results.png go")
    given = parser.parse_args()
    config = json.loads(given.config.read_text())
    given.out.mkdir(parents=True, exist_ok=True)
    data = spoken_prompts(given.data)
    for name in config["nets"]:
        file = name.replace(" ", "-")
        chosen = once(given.out / f"choice-{file}.json", lambda name=name: choose(name, config, data))
        for seed in given.seed or config["seeds"]:
            path = given.out / f"run-{file}-{seed}.json"
            result = once(path, lambda name=name, lr=chosen["lr"], seed=seed: run(name, config, data, lr, seed))
            print(f"seed {seed} {name}: {result['test_accuracy']:.4f} in {result['seconds']:.0f} s", flush=True)
    summarize(read(given.out, "run"), read(given.out, "choice"), given.record)


if __name__ == "__main__":
    main()
