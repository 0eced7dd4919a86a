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
sys.path[:0] = [str(HERE.parent), str(HERE.parents[1] / "examples")]
from balanced_parentheses import learnt, support, words  # noqa: E402
from study import run_tasks  # noqa: E402


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def bits_of(numbers: Tensor, n: int) -> Tensor:
    return (numbers[:, None] >> torch.arange(n - 1, -1, -1)) & 1


SHOWN = [0, 1, 2, 3, 1000, 1001, 1002, 1003]  # images to complete; the second thousand was held back


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


def languages(seed: int, options: dict[str, Any]) -> dict[str, Any]:
    """Languages of few states from a share of their words: over how many of them the law is spread."""
    n, numbers = options["bits"], torch.arange(2 ** options["bits"])
    every = {
        "balanced parentheses": (words(options["length"], options["depth"]), options["depth"] + 1),
        "divisible by three": (bits_of(numbers[numbers % 3 == 0], n), 3),
    }
    rows = []
    for name, (known, rank) in every.items():
        for share in options["shares"]:
            start, supports, inside = time.process_time(), [], []
            for shuffle in range(options["shuffles"]):
                model = learnt(known, share, rank, seeded(1000 * seed + shuffle))
                supports.append(support(model, known))
                inside.append(float(model.log_prob(known).detach().exp().sum()))
            rows.append(
                {
                    "language": name,
                    "words": len(known),
                    "rank": rank,
                    "share": share,
                    "support_mean": statistics.mean(supports),
                    "support_std": statistics.pstdev(supports),
                    "probability_of_words": statistics.mean(inside),
                    "seconds_each": (time.process_time() - start) / options["shuffles"],
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
        "independent_pixels": independent_pixels(train, test),
        "test_nll": float(model.nll(test).detach()),
        "train_nll": history.nll[-1],
        "validation_nll": history.validation_nll,
        "max_rank": max(model.ranks),
    }


def fashion_law(seed: int, options: dict[str, Any]) -> dict[str, Any]:
    """1,000 binary images of clothes at growing caps: training likelihood, and that on 1,000 others beside it.

    A cap starts where the one before it ended.
    """
    x = clothes(seed)
    model, rows = BornMachine(784, generator=seeded(seed), dtype=torch.float32), []
    for cap, n_sweeps in zip(options["caps"], options["n_sweeps"], strict=True):
        start = time.process_time()
        history = model.fit(
            x[:1000],
            max_bond=cap,
            n_sweeps=n_sweeps,
            n_steps=options["n_steps"],
            cutoff=options["cutoff"],
            validation=x[1000:],
            observer=lambda h: print(len(h), h.nll[-1], h.validation_nll[-1], flush=True),
        )
        rows.append(
            {
                "cap": cap,
                "train_nll": history.nll,
                "held_out_nll": history.validation_nll,
                "n_params": sum(core.numel() for core in model.cores),
                "processor_seconds": time.process_time() - start,
            }
        )
        rows[-1]["completed"] = completed(model, x, seed)
    return {"rows": rows, "independent_pixels": independent_pixels(x[:1000], x[1000:])}


def clothes(seed: int) -> Tensor:
    """2,000 binary images ``(2000, 784)`` of Fashion-MNIST; the first thousand are to learn from."""
    images = fashion_mnist()
    order = torch.randperm(60_000, generator=seeded(seed))[:2000]
    return (images.train_images[order].flatten(1).float() / 255 > 0.5).long()


def completed(model: BornMachine, x: Tensor, seed: int) -> list[str]:
    """The lower halves of eight images, four of them to learn from, by the law under the upper ones; in hexadecimal."""
    given = x[SHOWN].clone()
    given[:, 392:] = -1
    return [as_hex(image) for image in model.sample(len(SHOWN), given=given, generator=seeded(seed))]


def as_hex(bits: Tensor) -> str:
    return f"{int(''.join(map(str, bits.tolist())), 2):0{-(-len(bits) // 4)}x}"


def from_hex(text: str, n: int) -> Tensor:
    return torch.tensor([int(bit) for bit in f"{int(text, 16):0{n}b}"])


def draw(runs: dict[str, Any], folder: Path) -> None:
    """Completed images at two bond sizes, below what they are."""
    from matplotlib.figure import Figure

    if "fashion_law" not in runs:
        return
    rows = runs["fashion_law"][0]["rows"]
    if any("completed" not in row for row in rows):
        return
    best = min(rows, key=lambda row: row["held_out_nll"][-1])
    x = clothes(0)[SHOWN]
    half = x.clone()
    half[:, 392:] = 0
    lines = [("images", x), ("given", half)]
    for row in {best["cap"]: best, rows[-1]["cap"]: rows[-1]}.values():
        lines.append((f"bond {row['cap']}", torch.stack([from_hex(text, 784) for text in row["completed"]])))
    figure = Figure(figsize=(8, 1 + len(lines)), layout="constrained")
    axes = figure.subplots(len(lines), len(SHOWN))
    for (name, images), places in zip(lines, axes, strict=True):
        for k, (image, place) in enumerate(zip(images, places, strict=True)):
            place.imshow(image.reshape(28, 28), cmap="gray_r", vmin=0, vmax=1)
            place.set(xticks=[], yticks=[])
            if name != "images":
                place.axhline(13.5, color="tab:red", linewidth=0.8)
            if name == "images":
                place.set_title("learnt from" if k < 4 else "held out", fontsize=9)
        places[0].set_ylabel(name, fontsize=9)
    figure.savefig(folder / "completed.png", dpi=120, metadata={"Software": None})


def independent_pixels(train: Tensor, test: Tensor) -> float:
    """Likelihood of test images, in nats, if every pixel had a law of its own."""
    p = (train.double().mean(0) * len(train) + 0.5) / (len(train) + 1)
    return float(-(test * p.log() + (1 - test) * (1 - p).log()).sum(1).mean())


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
    n = options["n_train"]
    order = torch.randperm(len(y), generator=seeded(seed))[: n + options["n_validation"]]
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
    known = ("method", "max_bond", "n_sweeps", "n_steps", "lr", "batch_size", "cutoff", "ridge", "whiten", "validation")
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
        *(sequences, languages, patterns, digits_law, fashion_law),
        *(classify_all_cores, classify_two_site, classify_patches, memory),
    )
}


if __name__ == "__main__":
    run_tasks(HERE, __doc__, TASKS, draw)
