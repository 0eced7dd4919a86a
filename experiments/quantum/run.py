"""Circuits: how far do few layers of gates reach? What does noise do to unitary classifiers?

Layers: states that shallow circuits shall prepare, by disentangling alone and with every gate polished beside the
others (``n_sweeps``); overlap and number of cx beside those of the exact circuit. A Born machine of bars and stripes,
random trains, and the ground state of a critical Ising chain.

Noise: digits of 8 x 8 pixels, 15 of the 45 pairs, five for each seed: trees of unitaries on registers of one and of two
qubits, trained without noise and under it, a chain beside them. Amplitude damping or dephasing of strength p acts on
every qubit of a register when it is made and after each unitary, and is followed exactly.

    python experiments/quantum/run.py --out runs/quantum                  # both parts
    python experiments/quantum/run.py --out runs/quantum --part layers
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
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import Tensor

import tensortrain as tt
from tensortrain.viz.report.figures import GRID, INK, METHOD_COLOURS, METHOD_MARKERS, save_figure

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from study import by, once, spread, write_part  # noqa: E402

CHANNELS = ("amplitude_damping", "dephasing")


# -- layers --------------------------------------------------------------------------------------------


def bars(seed: int) -> tt.TensorTrain:
    """A Born machine of the bars and stripes of 3 x 3 pixels."""
    lines = torch.cartesian_prod(*[torch.arange(2)] * 3)
    rows, columns = (lines.unsqueeze(k).expand(-1, 3, 3).flatten(1) for k in (2, 1))
    images = torch.cat((rows, columns)).unique(dim=0)
    generator = torch.Generator().manual_seed(seed)
    model = tt.models.BornMachine(9, bond_dim=2, dtype=torch.float64, generator=generator)
    model.fit(images, n_sweeps=10, generator=generator)
    return model.state


def random_train(seed: int) -> tt.TensorTrain:
    generator = torch.Generator().manual_seed(seed)
    return tt.randn((2,) * 10, 8, dtype=torch.float64, generator=generator)


def critical_chain(seed: int) -> tt.TensorTrain:
    """The ground state of ten spins with -ZZ between neighbours and -X on each: no seed in it."""
    n = 10
    bits = (torch.arange(2**n)[:, None] >> torch.arange(n - 1, -1, -1)) & 1
    signs = 1.0 - 2.0 * bits.double()
    energy = torch.diag(-(signs[:, :-1] * signs[:, 1:]).sum(1))
    for k in range(n):
        energy[torch.arange(2**n), torch.arange(2**n) ^ (1 << k)] -= 1.0
    ground = torch.linalg.eigh(energy)[1][:, 0]
    return tt.tt_svd(ground.reshape((2,) * n), eps=1e-8).value


STATES = {"bars and stripes 3 x 3": bars, "random train of rank 8": random_train, "critical chain": critical_chain}


def layers(state: str, seed: int, config: dict[str, Any]) -> dict[str, Any]:
    target = STATES[state](seed)
    exact, rows = tt.quantum.circuit(target), []
    for n_sweeps, n_layers in itertools.product(config["sweeps"], config["layers"]):
        start = time.process_time()
        made = tt.quantum.circuit(target, n_layers=n_layers, n_sweeps=n_sweeps)
        rows.append(
            {
                "n_layers": n_layers,
                "n_sweeps": n_sweeps,
                "fidelity": made.fidelity,
                "n_cnots": made.n_cnots,
                "depth": made.depth,
                "seconds": round(time.process_time() - start, 2),
            }
        )
    return {
        "state": state,
        "seed": seed,
        "max_rank": max(target.ranks),
        "exact_cnots": exact.n_cnots,
        "exact_depth": exact.depth,
        "circuits": rows,
    }


def layers_table(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    rows = []
    for (state,), found in by(runs, "state").items():
        made = [one | {"exact": run["exact_cnots"]} for run in found for one in run["circuits"]]
        for (n_sweeps, n_layers), some in by(made, "n_sweeps", "n_layers").items():
            mean, std = spread(some, "fidelity")
            counts = {key: statistics.mean(one[key] for one in some) for key in ("n_cnots", "exact", "seconds")}
            at = {"state": state, "n_sweeps": n_sweeps, "n_layers": n_layers}
            rows.append(at | {"fidelity": mean, "fidelity_std": std} | counts)
    return rows


def layers_figure(rows: list[dict[str, Any]]) -> Figure:
    figure = Figure(figsize=(10.0, 3.3), layout="constrained")
    groups = by(rows, "state")
    for axes, ((state,), found) in zip(figure.subplots(1, len(groups), sharey=True), groups.items(), strict=True):
        for k, ((n_sweeps,), mine) in enumerate(by(found, "n_sweeps").items()):
            axes.errorbar(
                [row["n_cnots"] for row in mine],
                [max(1 - row["fidelity"], 1e-9) for row in mine],
                label=f"polished, {n_sweeps} sweeps" if n_sweeps else "layers as they come",
                color=METHOD_COLOURS[k],
                marker=METHOD_MARKERS[k],
            )
            for row in mine:
                where = (row["n_cnots"], max(1 - row["fidelity"], 1e-9))
                axes.annotate(str(row["n_layers"]), where, (0, 5), textcoords="offset points", ha="center", fontsize=7)
        axes.axvline(found[0]["exact"], color=INK, linestyle=":", label="cx of the exact circuit")
        axes.set(yscale="log", xlabel="cx", title=state)
        axes.title.set_fontsize(10)
        axes.grid(True, color=GRID)
    figure.axes[0].set_ylabel("1 - overlap")
    figure.axes[0].legend(frameon=False, labelcolor=INK, fontsize=8)
    return figure


# -- noise ---------------------------------------------------------------------------------------------


def two_digits(first: int, second: int, seed: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    x, y = (torch.tensor(part) for part in load_digits(return_X_y=True))
    kept = torch.nonzero((y == first) | (y == second))[:, 0]
    kept = kept[torch.randperm(len(kept), generator=torch.Generator().manual_seed(seed))]
    x, y, n = x[kept].float() / 16, (y[kept] == second).long(), 4 * len(kept) // 5
    return (x[:n], y[:n]), (x[n:], y[n:])


def noise(name: str, seed: int, config: dict[str, Any]) -> dict[str, Any]:
    """A kind of network on the pairs of a seed: right answers of all, for every channel and strength."""
    start = time.process_time()
    pairs = list(itertools.combinations(range(10), 2))[seed :: config["stride"]]
    options = dict(config["networks"][name])
    learns_under = options.pop("noise", None)
    right = {channel: [0] * len(config["strengths"]) for channel in CHANNELS}
    clean, n_test = [], 0
    for first, second in pairs:
        train, (x, y) = two_digits(first, second, seed)
        generator = torch.Generator().manual_seed(seed)
        at_work = None if learns_under is None else tt.quantum.Noise(**learns_under)
        model = tt.quantum.UnitaryClassifier(64, 2, noise=at_work, generator=generator, **options)
        model.fit(*train, n_sweeps=config["n_sweeps"], generator=generator)
        n_test += len(y)
        for channel, (k, p) in itertools.product(CHANNELS, enumerate(config["strengths"])):
            with torch.no_grad():
                found = model(x, noise=tt.quantum.Noise(**{channel: p})).argmax(1) == y
            right[channel][k] += int(found.sum())
            if p == 0 and channel == CHANNELS[0]:
                clean.append(float(found.float().mean()))
    return {
        "network": name,
        "seed": seed,
        "n_pairs": len(pairs),
        "n_test": n_test,
        "n_params": sum(parameter.numel() for parameter in model.parameters()),
        "pair_mean": statistics.mean(clean),
        "pair_least": min(clean),
        "accuracy": {channel: [count / n_test for count in counts] for channel, counts in right.items()},
        "seconds": round(time.process_time() - start, 1),
    }


def noise_table(runs: list[dict[str, Any]], config: dict[str, Any]) -> list[dict[str, Any]]:
    rows = []
    for (name,), found in by(runs, "network").items():
        for channel, (k, p) in itertools.product(CHANNELS, enumerate(config["strengths"])):
            mean, std = spread([{"at": run["accuracy"][channel][k]} for run in found], "at")
            at = {"network": name, "channel": channel, "strength": p}
            rows.append(at | {"accuracy": mean, "accuracy_std": std})
    return rows


def noise_figure(rows: list[dict[str, Any]]) -> Figure:
    figure = Figure(figsize=(9.0, 3.4), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, ((channel,), found) in zip(panels, by(rows, "channel").items(), strict=True):
        for k, ((name,), mine) in enumerate(by(found, "network").items()):
            axes.errorbar(
                [row["strength"] for row in mine],
                [100 * row["accuracy"] for row in mine],
                yerr=[100 * row["accuracy_std"] for row in mine],
                label=name,
                capsize=2,
                color=METHOD_COLOURS[k],
                marker=METHOD_MARKERS[k],
            )
        axes.set_xscale("symlog", linthresh=1e-3)
        axes.set(xlabel=f"{channel.replace('_', ' ')}, probability a step", xlim=(0, None))
        axes.grid(True, color=GRID)
    panels[0].set_ylabel("accuracy on pairs of digits, %")
    panels[0].legend(frameon=False, labelcolor=INK, fontsize=8, loc="lower left")
    return figure


# -- all -----------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs") / HERE.name)
    parser.add_argument("--config", type=Path, default=HERE / "config.json")
    parser.add_argument("--part", choices=("layers", "noise"), action="append")
    parser.add_argument("--record", type=Path, default=HERE, help="where results.json and the figures go")
    given = parser.parse_args()
    config = json.loads(given.config.read_text())
    given.out.mkdir(parents=True, exist_ok=True)
    for part in given.part or ("layers", "noise"):
        settings, one = config[part], {"layers": layers, "noise": noise}[part]
        names = list(STATES) if part == "layers" else list(settings["networks"])
        runs = []
        for seed, (k, name) in itertools.product(settings["seeds"], enumerate(names)):
            path = given.out / f"{part}-{k}-{seed}.json"
            runs.append(once(path, lambda name=name, seed=seed, one=one, s=settings: one(name, seed, s)))
            print(json.dumps(runs[-1])[:600], flush=True)
        rows = layers_table(runs) if part == "layers" else noise_table(runs, settings)
        figure = layers_figure(rows) if part == "layers" else noise_figure(rows)
        save_figure(figure, given.record / f"{part}.png")
        write_part(given.record, part, {"rows": rows, "runs": runs})


if __name__ == "__main__":
    main()
