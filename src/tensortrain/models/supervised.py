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
from tensortrain.models.base import adam, only_figures, seed_from
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
        penalty: Added to the loss of every batch.
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

    def by_steps(
        self,
        lr: float,
        batch_size: int | None,
        optimizer: Callable[..., torch.optim.Optimizer] = adam,
        grad_clip: float | None = None,
    ) -> History:
        """Steps along the gradient of batches; an entry of the history for every pass."""
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
