"""How an MPS classifier learns: two sites at a time by least squares, or all cores at once by cross entropy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tensortrain.cores.canonical import Gauged, orthogonalize_cores
from tensortrain.cores.environments import Data, Environments, Local
from tensortrain.cores.sweep import Cuts, sweep
from tensortrain.data.rows import RowBatches
from tensortrain.models.base import adam, only_figures, seed_from
from tensortrain.system.history import History
from tensortrain.train.loop import fit
from tensortrain.train.losses import cross_entropy_loss

if TYPE_CHECKING:
    from tensortrain.models.classifier import MPSClassifier

__all__ = ["ClassifierFit"]

_ROWS_AT_ONCE = 8192  # of an evaluation
_COLUMNS = ("loss", "accuracy", "validation_accuracy", "ranks")


@dataclass
class ClassifierFit:
    """One call of ``MPSClassifier.fit``, its arguments checked."""

    model: MPSClassifier
    x: Tensor
    y: Tensor
    validation: tuple[Tensor, Tensor] | None
    n_sweeps: int
    checkpoint: str | Path | None
    observer: Callable[[History], object] | None
    generator: torch.Generator | None

    # -- all cores at once

    def by_adam(self, lr: float, batch_size: int) -> History:
        """Steps of Adam along the gradient of all cores."""
        history = History()

        def evaluate(model: nn.Module) -> dict[str, Any]:
            figures = self._figures(with_ranks=True)
            history.append(**figures)
            if self.observer is not None:
                self.observer(history)
            return {name if name != "loss" else "fit_loss": figure for name, figure in figures.items()}

        batches = RowBatches(self.x, self.y, batch_size=batch_size, seed=seed_from(self.generator))
        done = fit(
            self.model,
            batches,
            loss=cross_entropy_loss(),
            epochs=self.n_sweeps,
            optimizer=adam,
            lr=lr,
            evaluate=evaluate,
            checkpoint=self.checkpoint,
            label="MPS classifier",
        )
        return only_figures(done.figures, ("fit_loss", *_COLUMNS[1:]), fit_loss="loss")

    # -- two sites at a time

    @torch.no_grad()
    def by_sweeps(self, max_rank: int, cutoff: float, n_steps: int, ridge: float) -> History:
        """Sweeps of two sites; the label moves along and ends at the first: elsewhere it would need higher ranks."""
        model, site = self.model, self.model.label
        assert site is not None
        vectors = model._vectors(self.x)
        state = _gauged([core.detach() for core in model.cores], site)
        target = F.one_hot(self.y, model.n_classes).T.to(vectors.dtype)  # classes, samples
        problem = _LeastSquares(target, n_steps, ridge)

        def figures(state: Gauged) -> dict[str, Any]:
            self._put(state)
            return self._figures(with_ranks=False)

        history = sweep(
            state,
            Environments(Data(list(vectors)), state.cores),
            problem.improved,
            n_sites=min(2, len(state.cores)),
            schedule=[Cuts(cutoff, max_rank)] * self.n_sweeps,
            figures=figures,
            observer=self.observer,
            checkpoint=self.checkpoint,
            inputs=(self.x, self.y),
        )
        self._put(state)
        return history

    def _put(self, state: Gauged) -> None:
        """The model takes the state over."""
        model = self.model
        cores = [core.clone() for core in state.cores]
        scale = torch.exp2(state.exponent.to(cores[state.center].dtype))
        cores[state.center] = cores[state.center] * scale
        model.label = state.center
        model._take(cores)

    def _figures(self, *, with_ranks: bool) -> dict[str, Any]:
        loss, accuracy = self._measured(self.x, self.y)
        figures: dict[str, Any] = {"loss": loss, "accuracy": accuracy}
        if self.validation is not None:
            figures["validation_accuracy"] = self._measured(*self.validation)[1]
        return figures | ({"ranks": self.model.ranks} if with_ranks else {})

    def _measured(self, x: Tensor, y: Tensor) -> tuple[float, float]:
        """Mean cross entropy and share of right answers."""
        loss = right = 0.0
        with torch.no_grad():
            for rows, labels in zip(x.split(_ROWS_AT_ONCE), y.split(_ROWS_AT_ONCE), strict=True):
                scores = self.model(rows).float()
                loss += float(F.cross_entropy(scores, labels, reduction="sum"))
                right += float((scores.argmax(1) == labels).sum())
        return loss / max(len(y), 1), right / max(len(y), 1)


def _gauged(cores: list[Tensor], site: int) -> Gauged:
    """The chain with the label's core as its center and all others orthonormal."""
    label = cores[site]
    n_classes = label.shape[0]
    joined = [*cores[:site], label.movedim(0, 1).flatten(1, 2), *cores[site + 1 :]]  # r (classes n) s
    found, exponent = orthogonalize_cores(joined, (0, len(cores) - 1), site)
    found[site] = found[site].unflatten(1, (n_classes, -1)).movedim(1, 0)
    return Gauged(found, site, exponent, n_labels=1)


@dataclass(frozen=True)
class _LeastSquares:
    """The mean of ``|f - target|^2`` over samples, plus ``ridge |B|^2``, by conjugate gradients from where ``B`` is.

    Attributes:
        target: ``(classes, samples)``.
    """

    target: Tensor
    n_steps: int
    ridge: float

    def improved(self, local: Tensor, at: Local, k: int) -> Tensor:
        """A tensor of two sites with a smaller loss; never a larger one."""
        n_samples = self.target.shape[1]
        residual = self.target - at(local)
        gradient = at.adjoint(residual) / n_samples - self.ridge * local
        direction, square = gradient, gradient.square().sum()
        for _ in range(self.n_steps):
            seen = at(direction)
            bend = seen.square().sum() / n_samples + self.ridge * direction.square().sum()
            length = torch.where(bend > 0, square / bend, 0.0)
            local, residual = local + length * direction, residual - length * seen
            gradient = at.adjoint(residual) / n_samples - self.ridge * local
            before, square = square, gradient.square().sum()
            direction = gradient + torch.where(before > 0, square / before, 0.0) * direction
        return local
