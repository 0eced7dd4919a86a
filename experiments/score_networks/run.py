"""Score networks: is a recurrent network wider than a shallow one almost always? Does it learn better at equal size?

Ranks: a network's grid tensor has a score for every sequence of templates; a shallow network (CP) of width w gives a
tensor whose matricization, odd positions against even ones, has a rank of at most w (products), or w M T / 2
(max(x, y, 0)). So the rank of the recurrent network's tensor bounds w from below. Weights are Gaussians, rounded to 16
binary digits, and ranks are exact: scores are followed modulo a prime, by which a rank can only fall. Beside them the
numerical rank in double precision (singular values above 1000 roundings of the largest one, as LAPACK's users count).

Budgets: Fashion-MNIST as 16 patches, TT and CP at equal numbers of parameters, learning rate chosen for each on
images held back.

    python experiments/score_networks/run.py --out runs/score_networks                  # both parts
    python experiments/score_networks/run.py --out runs/score_networks --part ranks
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from tensortrain.data import fashion_mnist
from tensortrain.models import ScoreNetwork, separation_rank
from tensortrain.viz.report.figures import GRID, INK, METHOD_COLOURS, METHOD_MARKERS, save_figure

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from study import once, spread, write_part  # noqa: E402

PRIME = 67_108_859  # below 2**26: a residue times a weight, summed over a hundred terms, is exact in float64
AT_ONCE = 10  # draws that are recorded together
DIGITS = 16  # binary ones, of weights


def seeded(*numbers: int) -> torch.Generator:
    seed = 0
    for number in numbers:
        seed = 1009 * seed + number
    return torch.Generator().manual_seed(seed)


def gaussian(*shape: int, generator: torch.Generator) -> Tensor:
    """Whole numbers ``2**DIGITS`` times a normal one, as float64."""
    return (torch.randn(*shape, generator=generator, dtype=torch.float64) * 2**DIGITS).round()


# -- ranks ---------------------------------------------------------------------------------------------


def product_grids(cell: dict[str, Any], generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Residues and scores of a recurrent network of products, on m templates that have the unit vectors as features."""
    d, m, r = cell["d"], cell["m"], cell["r"]
    ranks = [1, *[r] * (d - 1), 1]
    cores = [gaussian(ranks[k], m, ranks[k + 1], generator=generator) for k in range(d)]
    if cell.get("shared"):
        cores[1:-1] = [cores[1]] * (d - 2)
    residues, scores = torch.ones(1, 1, dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64)
    for core in cores:
        flat = core.flatten(1)
        residues = (residues @ flat % PRIME).reshape(-1, core.shape[2])
        scores = (scores @ flat / 2**DIGITS).reshape(-1, core.shape[2])
    return residues.reshape((m,) * d), scores.reshape((m,) * d)


def rectified_grids(cell: dict[str, Any], generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """The same with max(x, y, 0) in place of products, and a matrix of its own before it at every position.

    A state behind k positions is a whole number of ``2**-((k + 1) DIGITS)``, and so are the features beside it made.
    Scores in float64 only decide which of two numbers is the larger one.
    """
    d, m, r = cell["d"], cell["m"], cell["r"]
    maps = [gaussian(m, m, generator=generator) for _ in range(d)]
    ranks = [1, *[r] * (d - 1), 1]
    cores = [gaussian(ranks[k], m, ranks[k + 1], generator=generator) for k in range(d)]
    residues, scores = torch.zeros(1, 1, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64)
    for k, (weights, core) in enumerate(zip(maps, cores, strict=True)):
        seen = weights.T / 2**DIGITS  # template, feature
        exact = (weights.T % PRIME) * pow(2, DIGITS * k, PRIME) % PRIME
        parts = zip(residues.split(1000), scores.split(1000), strict=True)
        steps = [_step(*part, exact, seen, core.flatten(0, 1)) for part in parts]
        residues, scores = (torch.cat(part) for part in zip(*steps, strict=True))
    network = ScoreNetwork(
        d, m, 1, rank=r, n_features=m, product="rectify", feature_map=nn.Identity(), dtype=torch.float64
    )
    with torch.no_grad():  # one sequence in a thousand, by the library's own forward
        for parameter, values in zip((*network.cores, *network.maps), (*cores, *maps), strict=True):
            parameter.copy_(values / 2**DIGITS)
        rows = torch.arange(0, m**d, 997)
        digits = rows[:, None] // m ** torch.arange(d - 1, -1, -1) % m
        torch.testing.assert_close(network(torch.eye(m, dtype=torch.float64)[digits])[:, 0], scores[rows, 0])
    return residues.reshape((m,) * d), scores.reshape((m,) * d)


def _step(residues: Tensor, scores: Tensor, exact: Tensor, seen: Tensor, core: Tensor) -> tuple[Tensor, Tensor]:
    """States behind every template of the next position: ``(b, r)`` to ``(b m, s)``."""
    larger = scores[:, None, :, None] >= seen[None, :, None, :]  # b template r feature
    values = torch.where(larger, scores[:, None, :, None], seen[None, :, None, :])
    known = torch.where(larger, residues[:, None, :, None], exact[None, :, None, :])
    known = torch.where(values > 0, known, 0)
    values = values.clamp_min(0)
    return (known.flatten(2) @ core % PRIME).flatten(0, 1), (values.flatten(2) @ core / 2**DIGITS).flatten(0, 1)


def draws(cell: dict[str, Any], numbers: range) -> dict[str, Any]:
    """Exact and numerical ranks of some draws."""
    start, d = time.process_time(), cell["d"]
    make = rectified_grids if cell["product"] == "rectify" else product_grids
    exact, numerical = [], []
    for draw in numbers:
        residues, scores = make(cell, seeded(d, cell["m"], cell["r"], int(cell.get("shared", False)), draw))
        exact.append(separation_rank(residues.long(), range(0, d, 2), modulus=PRIME))
        numerical.append(separation_rank(scores, range(0, d, 2)))
    return {"exact": exact, "numerical": numerical, "seconds": time.process_time() - start}


def ranks(k: int, cell: dict[str, Any], n_draws: int, out: Path) -> dict[str, Any]:
    """Ranks of a cell's draws, and the least widths of shallow networks that follow."""
    parts = []
    for first in range(0, n_draws, AT_ONCE):
        numbers = range(first, min(first + AT_ONCE, n_draws))
        parts.append(once(out / f"ranks-{k}-{first}.json", lambda cell=cell, some=numbers: draws(cell, some)))
    exact, numerical = ([rank for part in parts for rank in part[key]] for key in ("exact", "numerical"))
    is_product, half = cell["product"] == "multiply", cell["d"] // 2
    widths = [math.ceil(rank / (1 if is_product else cell["m"] * half)) for rank in exact]
    bound = min(cell["m"], cell["r"]) ** half
    return {
        **cell,
        "draws": len(exact),
        "rank_min": min(exact),
        "rank_median": statistics.median(exact),
        "rank_max": max(exact),
        "rank_one": sum(rank <= 1 for rank in exact) / len(exact),
        "width_median": statistics.median(widths),
        "width_one": sum(width <= 1 for width in widths) / len(widths),
        "bound": bound,
        "below_bound": sum(rank < bound for rank in exact) / len(exact),
        "numerical_equal": sum(a == b for a, b in zip(exact, numerical, strict=True)) / len(exact),
        "numerical_off": max(abs(a - b) for a, b in zip(exact, numerical, strict=True)),
        "ranks": exact,
        "seconds": round(sum(part["seconds"] for part in parts), 1),
    }


def histogram(rows: list[dict[str, Any]]) -> Figure:
    """Least widths of shallow networks: with max(x, y, 0) by width, and with products as the bound that all reach."""
    figure = Figure(figsize=(9.0, 3.2), layout="constrained")
    rectified = [row for row in rows if row["product"] == "rectify"]
    panels = figure.subplots(1, len(rectified), sharex=True, sharey=True)
    for k, (axes, row) in enumerate(zip(panels, rectified, strict=True)):
        share = row["m"] * row["d"] / 2
        widths = [math.ceil(rank / share) for rank in row["ranks"]]
        most = math.ceil(row["m"] ** (row["d"] // 2) / share)
        axes.hist(widths, bins=[0.5 + 2 * j for j in range(-1, most // 2 + 2)], color=METHOD_COLOURS[k])
        axes.set_title(f"R = {row['r']}: {100 * row['width_one']:.0f} % at width 1", color=INK, fontsize=10)
        axes.grid(True, axis="y", color=GRID)
        axes.set_axisbelow(True)
    panels[0].set_ylabel(f"of {rectified[0]['draws']} random networks")
    figure.supxlabel("least width of a shallow network", fontsize=10)
    return figure


# -- budgets -------------------------------------------------------------------------------------------


def patches(n_train: int, n_held: int, data: str | None) -> list[tuple[Tensor, Tensor]]:
    """Training, held-back and test examples ``(b, 16, 49)`` with their labels."""
    images = fashion_mnist(data)

    def cut(pixels: Tensor) -> Tensor:
        return pixels.float().div(255).reshape(-1, 4, 7, 4, 7).permute(0, 1, 3, 2, 4).reshape(-1, 16, 49)

    known, labels, end = images.train_images, images.train_labels.long(), n_train + n_held
    return [
        (cut(known[:n_train]), labels[:n_train]),
        (cut(known[n_train:end]), labels[n_train:end]),
        (cut(images.test_images), images.test_labels.long()),
    ]


def network(format_: str, rank: int, config: dict[str, Any], seed: int) -> ScoreNetwork:
    torch.manual_seed(seed)
    m = config["n_features"]
    lift = nn.Sequential(nn.Linear(49, m), nn.Softmax(-1))
    return ScoreNetwork(16, 49, 10, format=format_, rank=rank, n_features=m, feature_map=lift, generator=seeded(seed))


def trained(
    format_: str, rank: int, lr: float, seed: int, config: dict[str, Any], parts: list[tuple[Tensor, Tensor]]
) -> dict[str, Any]:
    model, start = network(format_, rank, config, seed), time.process_time()
    history = model.fit(
        *parts[0], lr=lr, n_sweeps=config["n_sweeps"], batch_size=config["batch_size"], generator=seeded(seed)
    )
    seconds = time.process_time() - start
    with torch.no_grad():
        held, test = (float((model(x).argmax(1) == y).float().mean()) for x, y in parts[1:])
    return {
        "format": format_,
        "rank": rank,
        "lr": lr,
        "seed": seed,
        "loss": history.loss[-1],
        "n_params": sum(p.numel() for p in model.parameters()),
        "train_accuracy": history.accuracy[-1],
        "held_accuracy": held,
        "test_accuracy": test,
        "seconds": round(seconds, 1),
    }


def budgets(config: dict[str, Any], out: Path, data: str | None) -> dict[str, Any]:
    """Learning rates on images held back, with a seed of their own; then every seed."""
    parts = patches(config["n_train"], config["n_held"], data)
    rows, runs, trials = [], [], []
    for pair, (format_, rank) in (
        (k, one) for k, two in enumerate(config["ranks"]) for one in zip(("tt", "cp"), two, strict=True)
    ):
        tried = []
        for lr in config["rates"]:
            path = out / f"rate-{format_}-{rank}-{lr}.json"
            tried.append(once(path, lambda f=format_, r=rank, lr=lr: trained(f, r, lr, 100, config, parts)))
        best = max(tried, key=lambda one: one["held_accuracy"])["lr"]
        found = []
        for seed in config["seeds"]:
            path = out / f"{format_}-{rank}-{best}-{seed}.json"
            found.append(once(path, lambda f=format_, r=rank, s=seed, lr=best: trained(f, r, lr, s, config, parts)))
        row = {"pair": pair, "format": format_, "rank": rank, "lr": best, "n_params": found[0]["n_params"]}
        for key in ("train_accuracy", "test_accuracy"):
            row[key], row[f"{key}_std"] = spread(found, key)
        print(row, flush=True)
        rows, runs, trials = [*rows, row], [*runs, *found], [*trials, *tried]
    return {"rows": rows, "runs": runs, "trials": trials}


def curves(rows: list[dict[str, Any]]) -> Figure:
    figure = Figure(figsize=(9.0, 3.4), layout="constrained")
    for axes, key in zip(figure.subplots(1, 2), ("train_accuracy", "test_accuracy"), strict=True):
        for k, format_ in enumerate(("tt", "cp")):
            mine = [row for row in rows if row["format"] == format_]
            axes.errorbar(
                [row["n_params"] for row in mine],
                [100 * row[key] for row in mine],
                yerr=[100 * row[f"{key}_std"] for row in mine],
                label={"tt": "TT, recurrent", "cp": "CP, shallow"}[format_],
                capsize=2,
                color=METHOD_COLOURS[k],
                marker=METHOD_MARKERS[k],
            )
        axes.set(xscale="log", xlabel="parameters", ylabel=f"{key.split('_')[0]} accuracy, %")
        axes.grid(True, color=GRID)
        axes.legend(frameon=False, labelcolor=INK)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs") / HERE.name)
    parser.add_argument("--data", help="folder with the four idx files")
    parser.add_argument("--config", type=Path, default=HERE / "config.json")
    parser.add_argument("--part", choices=("ranks", "budgets"), action="append")
    parser.add_argument("--only", type=int, action="append", help="only cells, or budgets, of these numbers; no record")
    parser.add_argument("--record", type=Path, default=HERE, help="where results.json and the figures go")
    given = parser.parse_args()
    config = json.loads(given.config.read_text())
    given.out.mkdir(parents=True, exist_ok=True)
    for part in given.part or ("ranks", "budgets"):
        if part == "budgets":
            chosen = config[part]["ranks"]
            some = [chosen[k] for k in given.only or range(len(chosen))]
            found: Any = budgets(config[part] | {"ranks": some}, given.out, given.data)
            if given.only:
                continue
            save_figure(curves(found["rows"]), given.record / "budgets.png")
        else:
            found = []
            for k, cell in enumerate(config[part]["cells"]):
                if k not in (given.only or [k]):
                    continue
                row = ranks(k, cell, config[part]["draws"], given.out)
                print({key: value for key, value in row.items() if key != "ranks"}, flush=True)
                found.append(row)
            if given.only:
                continue
            save_figure(histogram(found), given.record / "ranks.png")
        write_part(given.record, part, found)


if __name__ == "__main__":
    main()
