"""What tensor-network models learn: laws of strings, classes of images, memory.

    python experiments/tensor_models/run.py --out runs/tensor_models                    # all tasks, three seeds
    python experiments/tensor_models/run.py --out runs/tensor_models --task sequences --seeds 1
    python experiments/tensor_models/run.py --out runs/tensor_models --summary          # results.json of what is there

A run that is recorded is not repeated.
"""

from __future__ import annotations

import itertools
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

from tensortrain.data import fashion_mnist
from tensortrain.models import BornMachine, MPSClassifier, RecurrentArithmeticCircuit, ScoreNetwork

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
from study import run_tasks  # noqa: E402


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
    """Fashion-MNIST at 14 x 14 by two-site sweeps; settings were chosen on the images held back."""
    x, y, x_test, y_test = _fashion(14, 60_000)
    order, n = torch.randperm(len(y), generator=seeded(seed)), options["n_train"]
    x, y = x[order], y[order]
    model = MPSClassifier(196, 10, bond_dim=10, feature_map=options["feature_map"], generator=seeded(seed))
    keywords = options | {"method": "two-site", "max_bond": options["bond"], "validation": (x[n:], y[n:])}
    return _classified(model, x[:n], y[:n], x_test, y_test, seed, keywords)


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
    known = ("method", "max_bond", "n_sweeps", "n_steps", "lr", "batch_size", "cutoff", "ridge", "validation")
    keywords = {name: options[name] for name in known if name in options}
    history = model.fit(
        x, y, generator=seeded(seed), observer=lambda h: print(len(h), h.rows()[-1], flush=True), **keywords
    )
    with torch.no_grad():
        found = torch.cat([model(rows) for rows in x_test.split(2000)])
    return {
        "test_accuracy": float((found.argmax(1) == y_test).float().mean()),
        "train_accuracy": history.accuracy,
        "validation_accuracy": history.columns.get("validation_accuracy"),
        "n_params": sum(p.numel() for p in model.parameters()),
        "seconds": time.perf_counter() - start,
    }


# -- memory --------------------------------------------------------------------------------------------


def memory(seed: int, options: dict[str, Any]) -> dict[str, Any]:
    """What do both halves of a string share? Circuits of one and of two layers and of about equal size.

    "alike": the last half repeats the first but for a share of the bits, or has nothing to do with it. A scalar product
    tells, whose rank is one more than the bits of a half: one layer can hold it. "overlap": are the halves both 1 at an
    odd number of places? The rank is ``2**half``, and no smaller rank comes near.
    """
    found = {}
    for kind, half in options["kinds"]:
        for depth, width in options["depths"][str(half)]:
            start = time.process_time()
            (x, y), (x_test, y_test) = (_halves(kind, half, n, seed) for n in (options["n_samples"], options["n_test"]))
            model = RecurrentArithmeticCircuit(2, width, depth, n_outputs=2, generator=seeded(seed))
            model.fit(
                x,
                y,
                n_sweeps=options["n_sweeps"],
                lr=options["lr"],
                batch_size=options["batch_size"],
                generator=seeded(seed),
            )
            with torch.no_grad():
                right = (model(x_test).argmax(1) == y_test).float().mean()
            found[f"{kind} {half}, depth {depth}"] = {
                "accuracy": float(right),
                "n_params": sum(p.numel() for p in model.parameters()),
                "width": width,
                "seconds": time.process_time() - start,
            }
            print(kind, half, depth, found[f"{kind} {half}, depth {depth}"], flush=True)
    return found


def _halves(kind: str, half: int, n: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = seeded(1_000_003 * seed + n)
    first, other = torch.randint(0, 2, (2, n, half), generator=generator)
    if kind == "overlap":
        return _one_hot(first, other), (first * other).sum(1) % 2
    alike = torch.rand(n, generator=generator) < 0.5
    near = torch.where(torch.rand(n, half, generator=generator) < 0.1, 1 - first, first)
    return _one_hot(first, torch.where(alike[:, None], near, other)), alike.long()


def _one_hot(first: Tensor, last: Tensor) -> Tensor:
    return nn.functional.one_hot(torch.cat((first, last), dim=1), 2).float()


TASKS: dict[str, Callable[[int, dict[str, Any]], dict[str, Any]]] = {
    task.__name__: task
    for task in (
        *(sequences, patterns, digits_law, fashion_law, classify_all_cores, classify_two_site, classify_patches),
        memory,
    )
}


if __name__ == "__main__":
    run_tasks(HERE, __doc__, TASKS)
