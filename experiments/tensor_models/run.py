"""What tensor-network models learn: laws of strings, classes of images, interactions, memory.

    python experiments/tensor_models/run.py --out runs/tensor_models                    # all tasks, three seeds
    python experiments/tensor_models/run.py --out runs/tensor_models --task sequences --seeds 1
    python experiments/tensor_models/run.py --out runs/tensor_models --summary          # results.json of what is there

A run that is recorded is not repeated.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from tensortrain.compression import provenance, write_text_atomic
from tensortrain.data import fashion_mnist
from tensortrain.models import BornMachine, ExponentialMachine, MPSClassifier, RecurrentArithmeticCircuit, ScoreNetwork

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
from study import once  # noqa: E402


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def bits_of(numbers: Tensor, n: int) -> Tensor:
    return (numbers[:, None] >> torch.arange(n - 1, -1, -1)) & 1


# -- laws of strings -----------------------------------------------------------------------------------


def sequences(seed: int, options: dict[str, Any]) -> dict[str, Any]:
    """Even bits from a share of all even strings: overlap with the even state, and effective support."""
    rows = []
    for n, share, shuffles in options["cases"]:
        start = time.process_time()
        every = bits_of(torch.arange(2**n), n)
        even = every[every.sum(1) % 2 == 0]
        overlaps, supports, distances = [], [], []
        for shuffle in range(shuffles):
            order = torch.randperm(len(even), generator=seeded(1000 * seed + shuffle))[: int(share * len(even))]
            model = BornMachine.from_samples(even[order], max_bond=2, dtype=torch.float64)
            psi = model.log_prob(even).detach()
            overlap = float(torch.exp(torch.logsumexp(psi / 2, 0)) / math.sqrt(len(even)))
            overlaps.append(overlap)
            distances.append(-math.log(overlap))
            supports.append(float(1 / psi.exp().square().sum()) / len(even))
        rows.append(
            {
                "n": n,
                "share": share,
                "samples": int(share * len(even)),
                "overlap_mean": statistics.mean(overlaps),
                "overlap_std": statistics.pstdev(overlaps),
                "distance_mean": statistics.mean(distances),
                "support_mean": statistics.mean(supports),
                "seconds_each": (time.process_time() - start) / shuffles,
            }
        )
    return {"rows": rows}


def patterns(seed: int, options: dict[str, Any]) -> dict[str, Any]:
    """Bars and stripes of 4 x 4 pixels by two-site sweeps."""
    bars = {tuple(bit for bit in bits for _ in range(4)) for bits in itertools.product((0, 1), repeat=4)}
    stripes = {tuple(bits) * 4 for bits in itertools.product((0, 1), repeat=4)}
    x = torch.tensor(sorted(bars | stripes))
    model, start = BornMachine(16, generator=seeded(seed)), time.process_time()
    history = model.fit(x, n_sweeps=options["n_sweeps"])
    return {
        "above_ln_30": [value - math.log(30) for value in history.nll],
        "ranks": list(model.ranks),
        "seconds": time.process_time() - start,
    }


def digits_law(seed: int, options: dict[str, Any]) -> dict[str, Any]:
    """Binary digits of 8 x 8 pixels: likelihood on held-out images beside independent pixels."""
    x = torch.from_numpy(load_digits().data).float()
    x = (x > 7.5).long()[torch.randperm(len(x), generator=seeded(seed))]
    train, held, test = x[:1237], x[1237:1437], x[1437:]
    p = (train.double().mean(0) * len(train) + 0.5) / (len(train) + 1)
    alone = -(test * p.log() + (1 - test) * (1 - p).log()).sum(1).mean()
    model = BornMachine(64, generator=seeded(seed))
    history = model.fit(
        train,
        max_bond=options["max_bond"],
        n_sweeps=options["n_sweeps"],
        lr=options["lr"],
        cutoff=options["cutoff"],
        validation=held,
        patience=1,
    )
    return {
        "independent_pixels": float(alone),
        "test_nll": float(model.nll(test).detach()),
        "train_nll": history.nll[-1],
        "validation_nll": history.validation_nll,
        "max_rank": max(model.ranks),
    }


def fashion_law(seed: int, options: dict[str, Any]) -> dict[str, Any]:
    """1,000 binary images of clothes at several caps: training likelihood, and that on 1,000 others beside it."""
    images = fashion_mnist()
    order = torch.randperm(60_000, generator=seeded(seed))[:2000]
    x = (images.train_images[order].flatten(1).float() / 255 > 0.5).long()
    rows = []
    for cap in options["caps"]:
        model, start = BornMachine(784, generator=seeded(seed), dtype=torch.float32), time.perf_counter()
        history = model.fit(
            x[:1000], max_bond=cap, n_sweeps=options["n_sweeps"], n_steps=options["n_steps"], cutoff=options["cutoff"]
        )
        held = float(model.nll(x[1000:]).detach())
        rows.append(
            {"cap": cap, "train_nll": history.nll, "held_out_nll": held, "seconds": time.perf_counter() - start}
        )
        print(rows[-1], flush=True)
    return {"rows": rows}


# -- classes -------------------------------------------------------------------------------------------


def _fashion(side: int, n_train: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    images = fashion_mnist()

    def flat(pixels: Tensor) -> Tensor:
        x = pixels.float()[:, None] / 255
        return (nn.functional.avg_pool2d(x, 28 // side) if side < 28 else x).flatten(1)

    return (
        flat(images.train_images[:n_train]),
        images.train_labels[:n_train].long(),
        flat(images.test_images),
        images.test_labels.long(),
    )


def classify_all_cores(seed: int, options: dict[str, Any]) -> dict[str, Any]:
    """Fashion-MNIST at 28 x 28 by an MPS, all cores at once."""
    x, y, x_test, y_test = _fashion(28, options["n_train"])
    model = MPSClassifier(784, 10, bond_dim=options["bond"], feature_map="linear", generator=seeded(seed))
    return _classified(model, x, y, x_test, y_test, seed, options | {"method": "adam"})


def classify_two_site(seed: int, options: dict[str, Any]) -> dict[str, Any]:
    """Fashion-MNIST at 14 x 14 by two-site sweeps."""
    x, y, x_test, y_test = _fashion(14, options["n_train"])
    model = MPSClassifier(196, 10, bond_dim=10, generator=seeded(seed))
    return _classified(model, x, y, x_test, y_test, seed, options | {"method": "two-site", "max_bond": options["bond"]})


def classify_patches(seed: int, options: dict[str, Any]) -> dict[str, Any]:
    """Fashion-MNIST as 16 patches of 7 x 7 by a TT-network with learnt features."""
    x, y, x_test, y_test = _fashion(28, options["n_train"])

    def patches(rows: Tensor) -> Tensor:
        return rows.reshape(-1, 4, 7, 4, 7).permute(0, 1, 3, 2, 4).reshape(-1, 16, 49)

    torch.manual_seed(seed)
    # Features that sum up to 1, as (1 - x, x) do: the state keeps its size whatever the patch.
    lift = nn.Sequential(nn.Linear(49, options["n_features"]), nn.Softmax(-1))
    model = ScoreNetwork(
        16, 49, 10, rank=options["rank"], n_features=options["n_features"], feature_map=lift, generator=seeded(seed)
    )
    return _classified(model, patches(x), y, patches(x_test), y_test, seed, options)


def _classified(
    model: Any, x: Tensor, y: Tensor, x_test: Tensor, y_test: Tensor, seed: int, options: dict[str, Any]
) -> dict[str, Any]:
    start = time.perf_counter()
    known = ("method", "max_bond", "n_sweeps", "n_steps", "lr", "batch_size", "cutoff", "ridge")
    keywords = {name: options[name] for name in known if name in options}
    history = model.fit(
        x, y, generator=seeded(seed), observer=lambda h: print(len(h), h.rows()[-1], flush=True), **keywords
    )
    with torch.no_grad():
        found = torch.cat([model(rows) for rows in x_test.split(2000)])
    return {
        "test_accuracy": float((found.argmax(1) == y_test).float().mean()),
        "train_accuracy": history.accuracy,
        "n_params": sum(p.numel() for p in model.parameters()),
        "seconds": time.perf_counter() - start,
    }


# -- interactions and memory ---------------------------------------------------------------------------


def interactions(seed: int, options: dict[str, Any]) -> dict[str, Any]:
    """Products of a few signs among many: area under the curve beside linear and forest models."""
    from sklearn.ensemble import RandomForestClassifier
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import roc_auc_score

    generator = seeded(seed)
    d, n = options["n_features"], options["n_samples"]
    x = torch.randint(0, 2, (2 * n, d), generator=generator).float() * 2 - 1
    terms = torch.stack([torch.randperm(d, generator=generator)[: options["order"]] for _ in range(options["n_terms"])])
    weights = torch.rand(options["n_terms"], generator=generator) * 2 - 1
    y = ((x[:, terms].prod(-1) @ weights) > 0).float()
    model, start = ExponentialMachine(d, rank=options["rank"], generator=generator), time.perf_counter()
    history = model.fit(
        x[:n],
        y[:n],
        loss="logistic",
        method="adam",
        lr=options["lr"],
        batch_size=options["batch_size"],
        n_sweeps=options["n_sweeps"],
        generator=generator,
    )
    seconds = time.perf_counter() - start
    with torch.no_grad():
        scores = model(x[n:])
    linear = LogisticRegression(max_iter=200).fit(x[:n].numpy(), y[:n].numpy())
    forest = RandomForestClassifier(100, random_state=seed).fit(x[:n].numpy(), y[:n].numpy())
    return {
        "auc": roc_auc_score(y[n:], scores),
        "auc_linear": roc_auc_score(y[n:], linear.decision_function(x[n:].numpy())),
        "auc_forest": roc_auc_score(y[n:], forest.predict_proba(x[n:].numpy())[:, 1]),
        "train_loss": history.loss[-1],
        "seconds": seconds,
    }


def memory(seed: int, options: dict[str, Any]) -> dict[str, Any]:
    """Are both halves of a string alike? Circuits of one and of two layers of about equal size."""
    generator = seeded(seed)
    half, n = options["half"], options["n_samples"]
    first = torch.randint(0, 2, (n, half), generator=generator)
    alike = torch.rand(n, generator=generator) < 0.5
    other = torch.randint(0, 2, (n, half), generator=generator)
    near = torch.where(torch.rand(n, half, generator=generator) < 0.1, 1 - first, first)
    strings = torch.cat((first, torch.where(alike[:, None], near, other)), dim=1)
    x, y = nn.functional.one_hot(strings, 2).float(), alike.long()
    found = {}
    for depth, width in options["depths"]:
        model = RecurrentArithmeticCircuit(2, width, depth, n_outputs=2, generator=seeded(seed))
        optimizer = torch.optim.Adam(model.parameters(), lr=options["lr"])
        cut = n * 4 // 5
        for _ in range(options["n_epochs"]):
            for rows in torch.randperm(cut, generator=generator).split(128):
                loss = nn.functional.cross_entropy(model(x[rows]), y[rows])
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
        with torch.no_grad():
            right = (model(x[cut:]).argmax(1) == y[cut:]).float().mean()
        n_params = sum(p.numel() for p in model.parameters())
        found[f"depth {depth}"] = {"accuracy": float(right), "n_params": n_params, "width": width}
    return found


TASKS: dict[str, Callable[[int, dict[str, Any]], dict[str, Any]]] = {
    task.__name__: task
    for task in (
        *(sequences, patterns, digits_law, fashion_law, classify_all_cores, classify_two_site, classify_patches),
        *(interactions, memory),
    )
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs") / HERE.name)
    parser.add_argument("--config", type=Path, default=HERE / "config.json")
    parser.add_argument("--task", action="append", choices=list(TASKS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--summary", action="store_true")
    parser.add_argument("--record", type=Path, default=HERE, help="where results.json goes; other tasks in it stay")
    options = parser.parse_args()
    config = json.loads(options.config.read_text())
    options.out.mkdir(parents=True, exist_ok=True)
    for task in [] if options.summary else options.task or list(TASKS):
        seeds = config[task].get("seeds", options.seeds)
        for seed in range(seeds) if isinstance(seeds, int) else seeds:
            result = once(options.out / f"{task}-{seed}.json", lambda: TASKS[task](seed, config[task]))  # noqa: B023
            print(task, seed, json.dumps(result)[:400], flush=True)
    runs = {
        task: [json.loads(path.read_text()) for path in sorted(options.out.glob(f"{task}-*.json"))] for task in TASKS
    }
    write_record(options.record / "results.json", {task: found for task, found in runs.items() if found}, config)


def write_record(path: Path, runs: dict[str, Any], config: dict[str, Any]) -> None:
    """``results.json``: what was run, with where it comes from; of other tasks what is there already stays."""
    earlier = json.loads(path.read_text()) if path.is_file() else {"runs": {}, "provenance": None}
    before = earlier["provenance"] if isinstance(earlier["provenance"], dict) else {}
    known = before.get("command") is not None  # one for all tasks, as it was once
    came_from = {task: before if known else before[task] for task in earlier["runs"]}
    found = {
        "provenance": came_from | dict.fromkeys(runs, provenance()),
        "config": config,
        "runs": earlier["runs"] | runs,
    }
    write_text_atomic(path, json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
