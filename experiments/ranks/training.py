"""What the parts of this experiment share: a task, and how each method finds the ranks of a model on it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import tensortrain as tt

__all__ = ["Task", "find_ranks_", "is_grown", "search_", "start_"]


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
    """Train a model and find its ranks: the stages are "start", "search" and "finish", each ``epochs`` and ``lr``."""
    start_(model, task, method, stages)
    search_(model, task, method, stages)
    task.train(model, **stages["finish"])


def start_(model: nn.Module, task: Task, method: dict[str, Any], stages: dict[str, dict[str, Any]]) -> None:
    """First steps without a thought of ranks; where these grow, sweeps over pairs of cores."""
    if not is_grown(method):
        task.train(model, **stages["start"])
        return
    batches = itertools.chain.from_iterable(task.batches() for _ in itertools.count())

    def loss() -> Tensor:
        x, y = next(batches)
        return task.loss(model(x), y)

    for sweep in method["sweeps"]:
        tt.nn.grow_ranks_(model, loss=loss, **sweep)


def search_(model: nn.Module, task: Task, method: dict[str, Any], stages: dict[str, dict[str, Any]]) -> None:
    """Steps under a prior or behind gates, and the cut of what is dead then; for others more steps."""
    options = {key: value for key, value in method.items() if key in ("kind", "weight", "budget")}
    if method["how"] == "prior":
        n, prior = len(task.x), tt.nn.RankPrior(model, method["kind"])
        task.train(model, **stages["search"], penalty=lambda: prior.loss() / n, after=prior.update_)
    elif method["how"] == "gates":
        gates = tt.nn.RankGates(model, **options)
        task.train(model, **stages["search"], more=gates.parameters(), penalty=gates.loss)
    else:
        task.train(model, **stages["search"])
        return
    tt.nn.prune_ranks_(model)


def is_grown(method: dict[str, Any]) -> bool:
    """Whether a method starts at rank one."""
    return method["how"] == "grow"
