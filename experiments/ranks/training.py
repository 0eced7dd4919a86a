"""What the parts of this experiment share: a task, and how each method finds the ranks of a model on it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import tensortrain as tt

__all__ = ["Task", "find_ranks_", "is_grown"]


def _nothing() -> float:
    return 0.0


@dataclass(frozen=True)
class Task:
    """Examples to train on, and the mean loss of outputs beside targets."""

    x: Tensor
    y: Tensor
    loss: Callable[[Tensor, Tensor], Tensor]
    batch_size: int

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """All examples once, in random order."""
        for rows in torch.randperm(len(self.x)).split(self.batch_size):
            yield self.x[rows], self.y[rows]

    def train(
        self,
        model: nn.Module,
        epochs: int,
        lr: float,
        more: Iterable[Tensor] = (),
        penalty: Callable[[], Tensor | float] = _nothing,
        after: Callable[[], None] | None = None,
    ) -> None:
        """Adam, with a learning rate that falls along a cosine to a fiftieth."""
        optimizer = torch.optim.Adam(itertools.chain(model.parameters(), more), lr=lr)
        n_steps = max(1, epochs * -(-len(self.x) // self.batch_size))
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, n_steps, eta_min=lr / 50)
        model.train()
        for _ in range(epochs):
            for x, y in self.batches():
                loss = self.loss(model(x), y) + penalty()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                if after is not None:
                    after()
        model.eval()


def find_ranks_(model: nn.Module, task: Task, method: dict[str, Any], stages: dict[str, dict[str, Any]]) -> None:
    """Train a model and find its ranks: the stages are "start", "search" and "finish", each ``epochs`` and ``lr``.

    Every method sees the training set equally often: "start" without a thought of ranks, "search" with them, and
    "finish" with the ranks that were found.
    """
    _HOW[method["how"]](model, task, method, stages)
    task.train(model, **stages["finish"])


def is_grown(method: dict[str, Any]) -> bool:
    """Whether a method starts at rank one."""
    return method["how"] == "grow"


def _options(method: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in method.items() if key not in ("how", "rank")}


def _fixed(model: nn.Module, task: Task, method: dict[str, Any], stages: dict[str, Any]) -> None:
    task.train(model, **stages["start"])
    task.train(model, **stages["search"])


def _prior(model: nn.Module, task: Task, method: dict[str, Any], stages: dict[str, Any]) -> None:
    task.train(model, **stages["start"])
    prior = tt.nn.RankPrior(model, **_options(method))
    n = len(task.x)
    task.train(model, **stages["search"], penalty=lambda: prior.loss() / n, after=prior.update_)
    tt.nn.prune_ranks_(model)


def _gates(model: nn.Module, task: Task, method: dict[str, Any], stages: dict[str, Any]) -> None:
    task.train(model, **stages["start"])
    gates = tt.nn.RankGates(model, **_options(method))
    task.train(model, **stages["search"], more=gates.parameters(), penalty=gates.loss)
    tt.nn.prune_ranks_(model)


def _rounded(model: nn.Module, task: Task, method: dict[str, Any], stages: dict[str, Any]) -> None:
    _fixed(model, task, method, stages)
    tt.nn.prune_ranks_(model, **_options(method))


def _grow(model: nn.Module, task: Task, method: dict[str, Any], stages: dict[str, Any]) -> None:
    """Sweeps over pairs of cores in place of "start" and "search"."""
    batches = itertools.chain.from_iterable(task.batches() for _ in itertools.count())

    def loss() -> Tensor:
        x, y = next(batches)
        return task.loss(model(x), y)

    for sweep in method["sweeps"]:
        tt.nn.grow_ranks_(model, loss=loss, **sweep)


_HOW = {"fixed": _fixed, "prior": _prior, "gates": _gates, "grow": _grow, "rounded": _rounded}
