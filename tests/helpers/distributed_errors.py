"""Several processes of which one fails, at one place after another, and what all of them raise."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fresh
import torch
from distributed_plans import made, planned, whole_batches
from small_models import mlp
from torch import Tensor, nn

import tensortrain as tt
from tensortrain.compression import Silent, alone
from tensortrain.compression.stages import Factorize, Heal, HealLocally, Refit
from tensortrain.system.processes import first_of, gathered, n_processes, own_rank, summed_, together
from tensortrain.train.loop import fit
from tensortrain.train.losses import cross_entropy_loss


class Bad(Exception):
    """What the one that fails raises."""


class Breaking(Silent):
    """An observer that ends the work at a step of one of its pieces, or at its start with step 0."""

    def __init__(self, where: str, step: int) -> None:
        self.where, self.step, self.name = where, step, ""

    def on_start(self, name: str, total: int | None) -> None:
        self.name = name
        self.on_step(0)

    def on_step(self, n: int, **figures: float) -> None:
        if self.name == self.where and n == self.step:
            raise Bad(f"observer of {self.where}")


class BreakingData:
    """Batches of which one cannot be read, in one of the passes over them."""

    def __init__(self, batches: list[Any], at: int, in_pass: int = 1) -> None:
        self.batches, self.at, self.in_pass, self.n = batches, at, in_pass, 0

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        self.n += 1
        for k, batch in enumerate(self.batches):
            if k == self.at and self.n >= self.in_pass:
                raise Bad("loader")
            yield batch


class BreakingLoss:
    """A loss that fails at one of its calls under autograd in train mode: those of the training."""

    def __init__(self, at: int, error: BaseException | None = None) -> None:
        self.at, self.n, self.inner, self.error = at, 0, cross_entropy_loss(), error or Bad("loss")

    def __call__(self, model: nn.Module, batch: Any) -> Tensor | None:
        self.n += 1
        if self.n == self.at:
            raise self.error
        return self.inner(model, batch)


def labelled(n: int = 6) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(8)
    xs = [torch.randn(9, 20, generator=generator, dtype=torch.float64) for _ in range(n)]
    return [(x, torch.randint(6, (9,), generator=generator)) for x in xs]


def _with_observer(where: str, step: int, **keywords: Any) -> Callable[[bool], Any]:
    def run(fails: bool) -> Any:
        model, data = made("units")
        observer = Breaking(where, step) if fails else Silent()
        given = {"heal": False, **keywords}
        return tt.compress(model, budget="1.5x", data=data, observer=observer, measure=False, **given)

    return run


def _with_data(at: int, in_pass: int) -> Callable[[bool], Any]:
    def run(fails: bool) -> Any:
        model, data = made("units")
        return tt.plan_compression(model, budget="1.5x", data=BreakingData(data, at, in_pass) if fails else data)

    return run


def _other_widths(fails: bool) -> Any:
    model, data = made("units")
    return tt.plan_compression(
        model, budget="1.5x", data=[data[0], (data[1][0][:, :-1], data[1][1])] if fails else data
    )


def _with_output(at: int) -> Callable[[bool], Any]:
    """The function that picks the model's output fails at one of its calls."""

    def run(fails: bool) -> Any:
        model, data = made("units")
        calls = [0]

        def output(model: nn.Module, batch: Any) -> Tensor:
            calls[0] += 1
            if fails and calls[0] == at:
                raise Bad("output")
            return model(batch[0])

        return tt.compress(model, budget="1.5x", data=data, heal=False, output=output, measure=True)

    return run


def _figure_fails(fails: bool) -> Any:
    """What is measured before anything is planned."""
    model, data = made("units")

    def evaluate(model: nn.Module) -> float:
        if fails:
            raise Bad("figure")
        return 1.0

    return tt.compress(model, budget="1.5x", data=data, heal=False, evaluate=evaluate, measure=False)


def _interrupted(fails: bool) -> Any:
    model, data = made("units")

    def output(model: nn.Module, batch: Any) -> Tensor:
        if fails:
            raise KeyboardInterrupt
        return model(batch[0])

    return tt.plan_compression(model, budget="1.5x", data=data, output=output)


def _cannot_be_sent(fails: bool) -> Any:
    return gathered(threading.Lock() if fails else None)


def _first_cannot_send(fails: bool) -> Any:
    return first_of(threading.Lock() if own_rank() == 0 else None)


def _impossible(fails: bool) -> Any:
    model, data = made("units")
    return tt.plan_compression(model, budget=1e-6, data=data)


def _joined(loss: BreakingLoss, **keywords: Any) -> Any:
    given = {"loss": loss, "steps": 6, "lr": 0.05, **keywords}
    return fit(mlp(12, 9, 5), whole_batches(), joined=True, **given)


def _figure_of_training(fails: bool) -> Any:
    def evaluate(model: nn.Module) -> float:
        if fails:
            raise Bad("figure")
        return 1.0

    return _joined(BreakingLoss(0), evaluate=evaluate)


def _many(fails: bool) -> Any:
    """One budget of several."""
    model, data = made("units")
    return tt.pareto(model, ["1.5x", "2x"], data=data, heal=False, observer=_second_decomposition(fails))


def _second_decomposition(fails: bool) -> Silent:
    class Second(Silent):
        n = 0

        def on_start(self, name: str, total: int | None) -> None:
            self.n += name == "decompose"
            if fails and self.n == 2:
                raise Bad("second budget")

    return Second()


# What is done, the class of the error, "" for any, and some of its words.
RAISES: dict[str, tuple[Callable[[bool], Any], str, str]] = {
    "a loader, at once": (_with_data(0, 1), "Bad", "loader"),
    "a loader, calibrating": (_with_data(2, 2), "Bad", "loader"),
    "batches that do not fit": (_other_widths, "DataError", "batch"),
    "an observer, calibrating": (_with_observer("calibrate", 2), "Bad", "observer of calibrate"),
    "an observer, of gradients": (_with_observer("gradients", 1), "Bad", "observer of gradients"),
    "an observer, of widths": (_with_observer("widths", 0), "Bad", "observer of widths"),
    "an observer, of menus": (_with_observer("candidates", 1), "Bad", "observer of candidates"),
    "an observer, decomposing": (_with_observer("decompose", 1), "Bad", "observer of decompose"),
    "an observer, refitting": (
        _with_observer("refit", 1, heal=None, stages=[Factorize(), Refit(n_batches=2, n_held_back=1)]),
        "Bad",
        "observer of refit",
    ),
    "an observer, healing": (_with_observer("heal", 2, heal={"steps": 4}), "Bad", "observer of heal"),
    "an observer, at the end of healing": (_with_observer("heal", 4, heal={"steps": 4}), "Bad", "observer of heal"),
    "an observer, at the start of healing": (_with_observer("heal", 0, heal={"steps": 4}), "Bad", "observer of heal"),
    "an observer, healing in turns": (
        _with_observer("heal", 1, heal=Heal(steps=2), n_stages=2),
        "Bad",
        "observer of heal",
    ),
    "an observer, healing locally": (
        _with_observer("heal locally", 1, heal=HealLocally(steps=2, n_batches=2, n_held_back=1)),
        "Bad",
        "observer of heal locally",
    ),
    "an output, at once": (_with_output(2), "Bad", "output"),
    "an output, calibrating": (_with_output(5), "", "output"),
    "a figure": (_figure_fails, "Bad", "figure"),
    "Ctrl-C": (_interrupted, "KeyboardInterrupt", ""),
    "what cannot be sent": (_cannot_be_sent, "TypeError", "pickle"),
    "a loss, in training": (lambda fails: _joined(BreakingLoss(3 if fails else 0)), "Bad", "loss"),
    "a figure of training": (_figure_of_training, "Bad", "figure"),
    "one of several budgets": (_many, "Bad", "second budget"),
}


def _healed(fails: bool, **keywords: Any) -> Any:
    """A compression whose training fails somewhere: as in one process, the best state is kept and a note says so."""
    torch.manual_seed(0)
    data: Any = labelled()
    given: dict[str, Any] = {"loss": BreakingLoss(10**6), "steps": 12, "lr": 1e-2, **keywords}
    if not fails:
        given["loss"] = BreakingLoss(10**6)
    elif "data" in given:
        data = BreakingData(data, 1, given["data"])
    given.pop("data", None)
    result = tt.compress(
        mlp(20, 48, 40, 6), budget="1.5x", data=data, heal=given, measure=False, n_batches=2, task="classify"
    )
    return result.model.state_dict(), result.report.notes


HEALS: dict[str, Callable[[bool], Any]] = {
    "a loss": lambda fails: _healed(fails, loss=BreakingLoss(20)),
    "Ctrl-C": lambda fails: _healed(fails, loss=BreakingLoss(21, KeyboardInterrupt())),
}


def fail_together(rank: int, n: int, folder: str, timeout_s: float) -> None:
    """What each process does; it saves what was raised."""
    torch.set_default_dtype(torch.float64)
    with fresh.process_group(rank, n, folder, timeout_s):
        torch.save(_found(rank, n), Path(folder) / f"{rank}.pt")


def _raised(run: Callable[[bool], Any], fails: bool) -> dict[str, Any] | None:
    try:
        with together():
            run(fails)
    except BaseException as error:
        own = {name: getattr(error, name, None) for name in ("rank", "kind", "text")}
        return {"class": type(error).__name__, "words": str(error), **own}
    return None


def _found(rank: int, n: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for failing in range(n):
        for case, (run, _, _) in RAISES.items():
            found[f"{case} {failing}"] = _raised(run, rank == failing)
        for case, heal in HEALS.items():
            found[f"healed: {case} {failing}"] = heal(rank == failing)
    found["impossible"] = _raised(_impossible, True)
    found["first"] = _raised(_first_cannot_send, True)
    found["caught"] = _caught(rank)
    found["levels"] = _goes_on_after_an_inner_part(rank)
    found["plan"] = planned("units", rank, n).to_json()
    return found


def _caught(rank: int) -> str:
    """One that catches the error of another does not go on as if nothing had been."""
    try:
        with together():
            if rank == 1:
                raise Bad("first")
            with contextlib.suppress(Exception):
                gathered(1)
    except Exception as error:
        return type(error).__name__
    return ""


def _goes_on_after_an_inner_part(rank: int) -> tuple[list[int], float, int]:
    with together():
        try:
            with together(), together():
                if rank == 1:
                    raise Bad("inner")
                gathered(1)
        except Exception:
            told = gathered(rank)
        with alone(), together():
            n = n_processes()
        return told, float(summed_(torch.ones(1))), n
