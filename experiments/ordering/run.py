"""Does the order of the sites matter to a Born machine? Bars and stripes 4 x 4, and the 8 x 8 digits as bits.

Each order is found from the training samples (``tensortrain.order_sites``); "rows" is the order of the pixels,
"random" a control. Same machine, same caps on the ranks, two-site sweeps. Bars and stripes: all 30 images, loss above
ln 30 at a cap that is too small for the order of the pixels. Digits: loss on images held back, of the sweep that is
best on them.

    python experiments/ordering/run.py --out runs/ordering    # minutes on one thread
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor

import tensortrain as tt

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from study import by, once, record, spread  # noqa: E402


def bars(config: dict[str, Any]) -> tuple[Tensor, Tensor]:
    lines = torch.cartesian_prod(*[torch.arange(2)] * config["side"])
    stripes = lines[:, :, None].expand(-1, -1, config["side"])
    images = torch.cat((stripes, stripes.mT)).flatten(1).unique(dim=0)
    return images, images


def digits(config: dict[str, Any], seed: int) -> tuple[Tensor, Tensor]:
    x = (torch.from_numpy(load_digits().data) >= 8).long()
    x = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))]
    return x[: config["n_train"]], x[config["n_train"] :]


def order_of(name: str, x: Tensor, seed: int) -> tuple[int, ...]:
    if name == "rows":
        return tuple(range(x.shape[1]))
    if name == "random":
        return tuple(torch.randperm(x.shape[1], generator=torch.Generator().manual_seed(seed)).tolist())
    return tt.order_sites(x, method=name)


def run(data: str, order: str, config: dict[str, Any], seed: int) -> dict[str, Any]:
    given = config[data]
    train, rest = bars(given) if data == "bars" else digits(given, seed)
    places, start = list(order_of(order, train, seed)), time.perf_counter()
    model = tt.models.BornMachine(train.shape[1], 2, bond_dim=2, generator=torch.Generator().manual_seed(seed))
    history = model.fit(
        train[:, places],
        max_bond=given["max_bond"],
        n_sweeps=given["n_sweeps"],
        validation=rest[:, places],
        generator=torch.Generator().manual_seed(seed),
    )
    likeness = tt.mutual_information(train).fill_diagonal_(0)[places][:, places]
    at = torch.arange(len(places))
    found = min(history.columns["validation_nll"])
    return {
        "data": data,
        "order": order,
        "seed": seed,
        "test_nll": found - math.log(len(train)) if data == "bars" else found,
        "train_nll": history.columns["nll"][-1],
        "cost": float((likeness * (at[:, None] - at).abs()).sum() / 2),
        "seconds": round(time.perf_counter() - start, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs") / HERE.name)
    parser.add_argument("--config", type=Path, default=HERE / "config.json")
    parser.add_argument("--record", type=Path, default=HERE, help="where results.json goes")
    given = parser.parse_args()
    config = json.loads(given.config.read_text())
    given.out.mkdir(parents=True, exist_ok=True)
    runs = []
    for data, seed, order in itertools.product(("bars", "digits"), config["seeds"], config["orders"]):
        path = given.out / f"{data}-{order}-{seed}.json"
        runs.append(once(path, lambda data=data, order=order, seed=seed: run(data, order, config, seed)))
        print(*runs[-1].values(), flush=True)
    rows = []
    for (data, order), found in by(runs, "data", "order").items():
        mean, std = spread(found, "test_nll")
        cost, _ = spread(found, "cost")
        rows.append({"data": data, "order": order, "test_nll_mean": mean, "test_nll_std": std, "cost_mean": cost})
        print(rows[-1])
    record(given.record, rows, runs)


if __name__ == "__main__":
    main()
