"""Two runs of which the version before has written checkpoints (in ``files``), killed after seven steps."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


class Killed(Exception):
    pass


def net(seed: int = 0) -> nn.Module:
    """Dropout and batch norm draw and keep what a checkpoint must hold."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 3)).double()


def batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(5)
    return [(torch.randn(8, 6, dtype=torch.float64, generator=generator), torch.arange(8) % 3) for _ in range(4)]


def dying(loss: Callable[..., Any], stop: int | None) -> Callable[..., Any]:
    """The loss, which ends the run by an error when it is called once more than ``stop`` times."""
    calls: list[int] = []

    def wrapped(model: nn.Module, batch: Any) -> Any:
        calls.append(0)
        if stop is not None and len(calls) > stop:
            raise Killed
        return loss(model, batch)

    wrapped.fingerprint = "the run that is killed"  # type: ignore[attr-defined]
    return wrapped


def train(
    *, fit: Callable[..., Any], cross_entropy_loss: Any, checkpoint: Path | None, stop: int | None, **_: Any
) -> Any:
    model, loss = net(), dying(cross_entropy_loss(), stop)
    options = {"lr": 0.02, "grad_clip": 1.0, "seed": 7, "checkpoint_every_s": 0.0}
    result = fit(model, batches(), loss=loss, epochs=3, checkpoint=checkpoint, **options)
    return model, result


class _Stop:
    """An observer that ends the run."""

    def __init__(self, stop: int | None) -> None:
        self.stop = stop

    def on_start(self, name: str, total: int | None) -> None: ...

    def on_step(self, n: int, **figures: float) -> None:
        if n == self.stop:
            raise Killed

    def on_end(self) -> None: ...

    def message(self, text: str) -> None: ...


def heal(*, heal_: Callable[..., Any], Heal: Any, checkpoint: Path | None, stop: int | None, **_: Any) -> Any:
    teacher, model = net(1), net(2)
    settings = Heal(steps=20, lr=0.01)
    result = heal_(model, teacher, batches() * 2, settings, checkpoint=checkpoint, seed=3, observer=_Stop(stop))
    return model, result


RUNS = {"fit": train, "heal": heal}
