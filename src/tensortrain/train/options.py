"""The settings of a training run as one record, checked before any work."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from tensortrain.errors import DataError, KindError, RankError
from tensortrain.system.observer import Observer
from tensortrain.train.batches import length_of, no_batches
from tensortrain.train.evaluation import Evaluate
from tensortrain.train.optimizers import OptimizerFactory, OptimizerName, check_optimizer
from tensortrain.train.schedules import SCHEDULES, ScheduleName

__all__ = ["FitOptions", "Monitor", "total_steps"]


class Monitor(Protocol):
    """Somebody who watches a run, may end it, and takes its errors: what was learnt then is not lost."""

    def due(self, step: int, total: int) -> bool:
        """Whether to look at the model after this step."""

    def look(self, model: nn.Module, step: int) -> bool:
        """Look; True ends the run."""

    def failed(self, error: BaseException, step: int) -> None:
        """The run ends after this step by an error or by Ctrl-C."""

    def unsaved(self, error: Exception, step: int) -> None:
        """The checkpoint could not be written; the run goes on without one."""

    def state(self) -> dict[str, Any]:
        """What a checkpoint has to hold."""

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from there."""


@dataclass(frozen=True, kw_only=True)
class FitOptions:
    """What ``fit`` takes beside the model, the data and the loss; described there.

    Raises:
        KindError: An unknown name, or a combination that says nothing.
        RankError: A share outside of its range.
    """

    epochs: int | None
    steps: int | None
    optimizer: OptimizerName | OptimizerFactory
    lr: float
    weight_decay: float
    momentum: float
    schedule: ScheduleName
    warmup: float
    grad_clip: float | None
    param_groups: Sequence[dict[str, Any]] | None
    evaluate: Evaluate | None
    checkpoint: Path | None
    checkpoint_every_s: float
    seed: int | None
    observer: Observer
    autocast_dtype: torch.dtype | None
    label: str
    monitor: Monitor | None
    joined: bool = False

    def __post_init__(self) -> None:
        _check_length(self.epochs, self.steps)
        check_optimizer(self.optimizer)
        if self.schedule not in SCHEDULES:
            raise KindError(
                f"a schedule must be known: schedule has {self.schedule!r}, expected one of {', '.join(SCHEDULES)}. "
                "Choose one of these."
            )
        if not 0 <= self.warmup < 1:
            raise RankError(
                f"a share must lie between 0 and 1: warmup has {self.warmup}, expected [0, 1). "
                "Pass the share of the steps, such as 0.05."
            )
        if self.autocast_dtype not in (None, torch.bfloat16):
            raise KindError(
                f"mixed precision must do without loss scaling: autocast_dtype has {self.autocast_dtype}, expected "
                "torch.bfloat16 or None. Pass torch.bfloat16."
            )


def total_steps(data: Iterable[Any], epochs: int | None, steps: int | None) -> int:
    """How many steps a run over this data has.

    Raises:
        KindError: Not exactly one of ``epochs`` and ``steps`` is given, or less than nothing is asked.
        DataError: The data gives no batches, or has no length where epochs are counted.
    """
    _check_length(epochs, steps)
    n_batches = length_of(data) if steps is None else None
    if steps is None and n_batches is None:
        raise DataError(
            f"data must have a length when epochs are counted: {type(data).__name__} has no len(), expected "
            "one. Pass steps=... instead."
        )
    total = steps if epochs is None else epochs * (n_batches or 0)
    assert total is not None
    if total < 0:
        raise KindError(
            f"a run cannot be shorter than nothing: {total} steps asked, expected 0 or more. Pass a positive length."
        )
    if total == 0 and (epochs or 0) > 0:
        raise no_batches("fit")
    return total


def _check_length(epochs: int | None, steps: int | None) -> None:
    if (epochs is None) == (steps is None):
        raise KindError(
            f"a run must have one length: epochs has {epochs} and steps has {steps}, expected exactly one of "
            "them. Pass epochs=... or steps=..."
        )
