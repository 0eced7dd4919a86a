"""Learning from examples and their labels with all parameters at once: one way for every model that predicts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tensortrain.data.rows import RowBatches
from tensortrain.errors import DataError
from tensortrain.models.base import adam, only_figures, seed_from
from tensortrain.models.checks import check_between, checked_sizes
from tensortrain.system.history import History
from tensortrain.train.loop import fit

__all__ = ["LOSSES", "Supervised"]

_ROWS_AT_ONCE = 8192  # of an evaluation


def _squared(outputs: Tensor, labels: Tensor) -> Tensor:
    return F.mse_loss(outputs, labels.to(outputs.dtype))


def _logistic(outputs: Tensor, labels: Tensor) -> Tensor:
    """Of labels 0 and 1."""
    return F.binary_cross_entropy_with_logits(outputs, labels.to(outputs.dtype))


def _huber(outputs: Tensor, labels: Tensor) -> Tensor:
    return F.huber_loss(outputs, labels.to(outputs.dtype))


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cross-entropy": F.cross_entropy,
    "huber": _huber,
    "logistic": _logistic,
    "squared": _squared,
}


@dataclass
class Supervised:
    """One call of a ``fit``, its arguments checked.

    Attributes:
        x, y: Examples and labels, along the first axis.
        loss: A name of ``LOSSES``.
        n_sweeps: Passes over the data.
        validation: Examples and labels to watch.
        penalty: Added to the loss of every batch.
        checkpoint, observer, generator: As a ``fit`` takes them.
    """

    model: nn.Module
    x: Tensor
    y: Tensor
    loss: str
    n_sweeps: int
    validation: tuple[Tensor, Tensor] | None = None
    penalty: Callable[[], Tensor] | None = None
    checkpoint: str | Path | None = None
    observer: Callable[[History], object] | None = None
    generator: torch.Generator | None = None

    @classmethod
    def of(
        cls,
        model: nn.Module,
        data: tuple[Any, ...],
        checked: Callable[..., tuple[Tensor, Tensor]],
        loss: str = "cross-entropy",
        *,
        n_sweeps: int,
        validation: Any = None,
        **options: Any,
    ) -> Supervised:
        """What a ``fit`` was given, looked at in one way for all models.

        Args:
            data: Examples and labels, and what else ``checked`` takes.
            checked: The model's own check of them and of what is held back; it gives both as they are learnt from.
            options: The other attributes.

        Raises:
            DataError: There are no examples, or what is held back is not like them.
            RankError: No passes.
        """
        (n_sweeps,) = checked_sizes(n_sweeps=n_sweeps)
        x, y = _some(checked(*data), "a fit must have data: x has no examples")
        held_back = None
        if validation is not None:
            if not isinstance(validation, (tuple, list)) or len(validation) != len(data):
                raise DataError(
                    f"what is held back must be as what is learnt: validation has {_told(validation)}, expected "
                    f"{len(data)} tensors. Pass such as (x, y)."
                )
            held_back = _some(checked(*validation), "what is held back must have data: validation has no examples")
        return cls(model, x, y, loss, n_sweeps, held_back, **options)

    def by_steps(
        self,
        lr: float,
        batch_size: int | None,
        optimizer: Callable[..., torch.optim.Optimizer] = adam,
        grad_clip: float | None = None,
    ) -> History:
        """Steps along the gradient of batches; an entry of the history for every pass."""
        check_between(0.0, lr=lr)
        if grad_clip is not None:
            check_between(0.0, grad_clip=grad_clip)
        if batch_size is not None:
            (batch_size,) = checked_sizes(batch_size=batch_size)
        history = History()

        def evaluate(model: nn.Module) -> dict[str, Any]:
            figures = self.figures()
            if ranks := getattr(model, "ranks", None):
                figures["ranks"] = ranks
            history.append(**figures)
            if self.observer is not None:
                self.observer(history)
            return {("fit_loss" if name == "loss" else name): figure for name, figure in figures.items()}

        done = fit(
            self.model,
            RowBatches(self.x, self.y, batch_size=batch_size, seed=seed_from(self.generator)),
            loss=self._of_batch(),
            epochs=self.n_sweeps,
            optimizer=optimizer,
            lr=lr,
            grad_clip=grad_clip,
            evaluate=evaluate,
            checkpoint=self.checkpoint,
            label=type(self.model).__name__,
        )
        names = ("fit_loss", "accuracy", "validation_loss", "validation_accuracy", "ranks")
        return only_figures(done.figures, names, fit_loss="loss")

    def figures(self) -> dict[str, Any]:
        """Loss and accuracy on the data, and on what is held back."""
        figures = self._measured(self.x, self.y)
        if self.validation is not None:
            figures |= {f"validation_{name}": value for name, value in self._measured(*self.validation).items()}
        return figures

    def _of_batch(self) -> Callable[[Any, Any], Tensor]:
        def loss(model: Any, batch: Any) -> Tensor:
            found = LOSSES[self.loss](model(batch[0]), batch[1])
            return found if self.penalty is None else found + self.penalty()

        loss.__qualname__ = f"supervised {self.loss}"  # tells a checkpoint of another loss
        return loss

    def _measured(self, x: Tensor, y: Tensor) -> dict[str, Any]:
        """Mean loss, and the share of right answers where there are classes."""
        total = right = 0.0
        with torch.no_grad():
            for rows, labels in zip(x.split(_ROWS_AT_ONCE), y.split(_ROWS_AT_ONCE), strict=True):
                outputs = self.model(rows)
                total += float(
                    LOSSES[self.loss](outputs.to(torch.promote_types(outputs.dtype, torch.float32)), labels)
                ) * len(rows)
                if self.loss == "cross-entropy":
                    right += float((outputs.argmax(1) == labels).sum())
                elif self.loss == "logistic":
                    right += float(((outputs > 0) == (labels > 0)).float().sum()) / max(1, outputs[0].numel())
        found = {"loss": total / max(len(y), 1)}
        return found if self.loss in ("squared", "huber") else found | {"accuracy": right / max(len(y), 1)}


def _some(pair: tuple[Tensor, Tensor], found: str) -> tuple[Tensor, Tensor]:
    if pair[0].shape[0] == 0:
        raise DataError(f"{found}, expected one or more. Pass them along axis 0.")
    return pair


def _told(value: object) -> str:
    return f"{len(value)} parts" if isinstance(value, (tuple, list)) else type(value).__name__
