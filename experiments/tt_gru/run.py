"""Where does a picture drift in noisy video? A dense GRU beside one whose input map is a train of rank 4.

"Tensor-Train Recurrent Neural Networks for Video Classification" (arXiv:1707.01786) in small: 8 frames of
32 x 40 x 3 = 4 x 8 x 10 x 12 = 3,840 numbers, eight directions, GRU of 256 whose hidden map is dense in all networks,
a linear map of its last output. All train for the same number of steps with the same weight decay and dropout. The
learning rate of every network and the scale of its inputs are chosen on validation clips, for every number of clips,
before the recorded runs; a run keeps the weights that did best on the validation clips after any of its epochs.

    python experiments/tt_gru/run.py --out runs/tt_gru                 # everything in config.json
    python experiments/tt_gru/run.py --out runs/tt_gru --seed 0        # one seed
    python experiments/tt_gru/run.py --out runs/tt_gru --clips 1000    # one size of the training set
    python experiments/tt_gru/run.py --out runs/tt_gru --timing        # time per epoch alone
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import tensortrain as tt
from tensortrain.compression import CurvePoint, cross_entropy_loss, evaluate_accuracy, fit, provenance
from tensortrain.data import fashion_mnist
from tensortrain.viz.report.figures import accuracy_curve, save_figure

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
sys.path.insert(0, str(HERE))

from study import by, once, record, spread  # noqa: E402
from video import DIRECTIONS, Clips, video  # noqa: E402

Split = tuple[Clips, Clips, Clips]


class Watcher(nn.Module):
    """Clips of bytes to directions.

    Args:
        scale: Standard deviation of the inputs. At 1, a sum over 3,840 noisy numbers saturates the gates of a new
            network, which then learns from what the first weights happen to let through.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, rnn: nn.Module, hidden: int, dropout: float, scale: float, seen: Tensor) -> None:
        super().__init__()
        levels = seen[:1000].float()
        self.register_buffer("mean", levels.mean())
        self.register_buffer("std", levels.std() / scale)
        self.rnn, self.dropout, self.head = rnn, nn.Dropout(dropout), nn.Linear(hidden, len(DIRECTIONS))

    def forward(self, x: Tensor) -> Tensor:  # b 8 3840
        kept = self.dropout(self.mean.new_ones(len(x), 1, x.shape[-1]))  # one mask per clip, as published
        output, _ = self.rnn((x.float() - self.mean) * (kept / self.std))
        return self.head(self.dropout(output[:, -1]))


class BestSoFar:
    """Accuracy on validation clips after an epoch, and the weights where it was highest."""

    def __init__(self, clips: Clips) -> None:
        self.data, self.accuracy, self.state = batches(clips, 500, shuffle=False), -1.0, {}

    def __call__(self, model: nn.Module) -> float:
        accuracy = evaluate_accuracy(model, self.data)
        if accuracy > self.accuracy:
            self.accuracy = accuracy
            self.state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        return accuracy


def network(name: str, config: dict[str, Any], scale: float, train: Clips) -> Watcher:
    options, sizes = config["nets"][name], (train.pixels.shape[-1], config["hidden"])
    rnn = nn.GRU(*sizes, batch_first=True) if options is None else tt.nn.GRU(*sizes, batch_first=True, **options)
    return Watcher(rnn, config["hidden"], config["dropout"], scale, train.pixels)


def batches(clips: Clips, size: int, *, shuffle: bool) -> DataLoader[Any]:
    return DataLoader(TensorDataset(clips.pixels, clips.labels), batch_size=size, shuffle=shuffle)


def trained(
    name: str, config: dict[str, Any], split: Split, setting: dict[str, float], seed: int
) -> tuple[Any, dict[str, Any]]:
    """A network at the end of training with this learning rate and input scale, and how it went."""
    train, validation, _ = split
    torch.manual_seed(seed)
    model, best = network(name, config, setting["input_scale"], train), BestSoFar(validation)
    found = fit(
        model,
        batches(train, config["batch_size"], shuffle=True),
        loss=cross_entropy_loss(),
        lr=setting["lr"],
        seed=seed,
        evaluate=best,
        **config["fit"],
        **config["clips"][str(len(train.labels))],
    )
    model.load_state_dict(best.state)
    last = found.history[-1]
    return model, {"validation_accuracy": best.accuracy, "last_accuracy": last["metric"], "train_loss": last["loss"]}


def choose(name: str, config: dict[str, Any], split: Split) -> dict[str, Any]:
    """The learning rate and input scale with the best accuracy on the validation clips."""
    given, trials = config["choice"], []
    for lr, scale in itertools.product(given["lr"], given["input_scale"]):
        setting = {"lr": lr, "input_scale": scale}
        trials.append({**setting, **trained(name, config, split, setting, given["seed"])[1]})
    best = max(trials, key=lambda trial: trial["validation_accuracy"])
    setting = {key: best[key] for key in ("lr", "input_scale")}
    return {"net": name, "clips": len(split[0].labels), "setting": setting, "trials": trials}


def run(name: str, config: dict[str, Any], split: Split, setting: dict[str, float], seed: int) -> dict[str, Any]:
    start = time.perf_counter()
    model, found = trained(name, config, split, setting, seed)
    return {
        "net": name,
        "clips": len(split[0].labels),
        "seed": seed,
        **setting,
        "input_weights": input_weights(model),
        "n_params": sum(p.numel() for p in model.parameters()),
        "test_accuracy": evaluate_accuracy(model, batches(split[2], 500, shuffle=False)),
        **found,
        "seconds": round(time.perf_counter() - start, 1),
        "provenance": provenance(seed=seed),
    }


def input_weights(model: Any) -> int:
    """Numbers in the input map, its bias left out; torch names it ``weight_ih_l0``, we name it ``l0.ih``."""
    named = model.rnn.named_parameters()
    return sum(p.numel() for name, p in named if "ih" in name.replace("_", ".").split(".") and "bias" not in name)


def time_epochs(config: dict[str, Any], split: Split) -> dict[str, Any]:
    """Seconds of an epoch of training: the networks take turns, the first round is not counted."""
    data = batches(split[0], config["batch_size"], shuffle=True)
    options = {**config["fit"], "lr": 1e-4, "epochs": 1}
    models = {name: network(name, config, 1.0, split[0]) for name in config["nets"]}
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(1 + config["timing"]["epochs"]):
        for name, model in models.items():
            seconds[name].append(fit(model, data, loss=cross_entropy_loss(), seed=0, **options).seconds)
    medians = {name: statistics.median(values[1:]) for name, values in seconds.items()}
    return {
        "clips": len(split[0].labels),
        "threads": torch.get_num_threads(),
        "median_epoch_s": medians,
        "of_dense": {name: median / medians["dense"] for name, median in medians.items()},
        "epochs_s": seconds,
        "provenance": provenance(),
    }


def summarize(out: Path, target: Path) -> None:
    runs, choices = read(out, "run"), read(out, "choice")
    timing = next(iter(read(out, "timing")), None)
    groups, rows = by(runs, "clips", "net"), []
    for (clips, name), found in sorted(groups.items(), key=lambda item: item[0][0]):
        mean, std = spread(found, "test_accuracy")
        dense = groups.get((clips, "dense"))
        row = {key: found[0][key] for key in ("clips", "net", "lr", "input_scale", "input_weights", "n_params")}
        if dense:
            row["compression"] = dense[0]["input_weights"] / row["input_weights"]
            row["points_over_dense"] = 100 * (mean - spread(dense, "test_accuracy")[0])
        if timing:
            row["epoch_of_dense"] = timing["of_dense"][name]
        rows.append({**row, "n": len(found), "accuracy_mean": mean, "accuracy_std": std})
    record(target, rows, runs, choices=choices, timing=timing)
    draw(rows, target)
    show(rows, timing)


def draw(rows: list[dict[str, Any]], target: Path) -> None:
    points = [
        CurvePoint(
            f"{row['clips']:,}", row["net"], row["compression"], row["accuracy_mean"], row["accuracy_std"], row["n"]
        )
        for row in rows
        if "compression" in row
    ]
    if points:
        save_figure(accuracy_curve(points, metric_name="accuracy"), target / "results.png")


def show(rows: list[dict[str, Any]], timing: dict[str, Any] | None) -> None:
    print(
        f"{'clips':>6} {'net':<12} {'input map':>9} {'smaller':>9} {'lr':>6} {'scale':>6} "
        f"{'test accuracy':>18} {'points':>7} seeds"
    )
    for row in rows:
        print(
            f"{row['clips']:>6} {row['net']:<12} {row['input_weights']:>9,} {row.get('compression', 1):>8,.0f}x "
            f"{row['lr']:>6} {row['input_scale']:>6} {row['accuracy_mean']:>9.4f} +- {row['accuracy_std']:.4f} "
            f"{row.get('points_over_dense', 0):>+7.1f} {row['n']:>5}"
        )
    for name, share in timing["of_dense"].items() if timing else ():
        print(
            f"epoch of {timing['clips']} clips, {timing['threads']} thread(s): {name} "
            f"{timing['median_epoch_s'][name]:.2f} s, {share:.2f} of dense"
        )


def read(out: Path, kind: str) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted(out.glob(f"{kind}*.json"))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/tt_gru"))
    parser.add_argument("--data", help="folder with the four idx files")
    parser.add_argument("--config", type=Path, default=HERE / "config.json")
    parser.add_argument("--seed", type=int, action="append", help="only these seeds")
    parser.add_argument("--clips", type=int, action="append", help="only these numbers of training clips")
    parser.add_argument("--timing", action="store_true", help="only the time of an epoch")
    parser.add_argument("--record", type=Path, default=HERE, help="where results.json and results.png go")
    given = parser.parse_args()
    config = json.loads(given.config.read_text())
    given.out.mkdir(parents=True, exist_ok=True)
    images = fashion_mnist(given.data)
    timed = video(images, config["timing"]["clips"], config["video"])
    once(given.out / "timing.json", lambda: time_epochs(config, timed))
    for clips in () if given.timing else given.clips or map(int, config["clips"]):
        split = video(images, clips, config["video"])
        for name in config["nets"]:
            file = f"{clips}-{name.replace(' ', '-')}"
            chosen = once(given.out / f"choice-{file}.json", lambda n=name, s=split: choose(n, config, s))
            for seed in given.seed or config["seeds"]:
                result = once(
                    given.out / f"run-{file}-{seed}.json",
                    lambda n=name, s=split, chosen=chosen["setting"], seed=seed: run(n, config, s, chosen, seed),
                )
                print(
                    f"{clips} clips, seed {seed}, {name}: {result['test_accuracy']:.4f} in {result['seconds']:.0f} s",
                    flush=True,
                )
    summarize(given.out, given.record)


if __name__ == "__main__":
    main()
