"""How an exponential machine learns from all examples at once: on the manifold, and along the whole gradient."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tensortrain.cores.scaling import work_dtype
from tensortrain.models.base import only_figures
from tensortrain.models.supervised import LOSSES, Supervised
from tensortrain.models.unfolded_gradient import UnfoldedGradient
from tensortrain.numerics.manifold import TangentVector, descend, project
from tensortrain.system.checkpoint import RunFile, start_signature
from tensortrain.system.history import History
from tensortrain.tensor import TensorTrain, round_tt

if TYPE_CHECKING:
    from tensortrain.models.exponential import ExponentialMachine

__all__ = ["Descent", "WholeGradient"]

_FIGURES = ("loss", "accuracy", "validation_loss", "validation_accuracy", "ranks")
_ROWS_AT_ONCE = 8192
_MOST_DOUBLINGS = 60


class Descent:
    """Conjugate gradients on the manifold, over all examples at once."""

    def __init__(self, model: ExponentialMachine, job: Supervised, data: Any, penalty: float) -> None:
        self.model, self.job, self.penalty, self.dtype = model, job, penalty, torch.float64
        self.data = [self._wide(rows) for rows in data] if isinstance(data, list) else self._wide(data)
        self.labels = self._wide(job.y)

    def run(self, tol: float) -> History:
        start = TensorTrain(tuple(core.detach().to(self.dtype) for core in self.model.cores))
        found, done = descend(
            self._loss,
            round_tt(start, eps=0.0).value,
            n_steps=self.job.n_sweeps,
            tol=tol,
            length=self._length if self.job.loss == "squared" else None,
            figures=self._figures,
            observer=None if self.job.observer is None else self._tell,
            checkpoint=self.job.checkpoint,
            inputs=(self.job.x, self.job.y),
        )
        self.model._put(found)
        if not len(done):  # the start was as good as the arithmetic allows
            done.append(**self._figures(found))
        return only_figures(done, _FIGURES)

    def _wide(self, numbers: Tensor) -> Tensor:
        return numbers.to(self.dtype) if numbers.is_floating_point() else numbers

    def _loss(self, x: TensorTrain) -> Tensor:
        found = LOSSES[self.job.loss](self.model._values(x.cores, self.data), self.labels)
        return found + 0.5 * self.penalty * x.norm() ** 2 if self.penalty else found

    def _length(self, x: TensorTrain, direction: TangentVector) -> float:
        """Where least squares are least on the line, in the tangent space."""
        with torch.no_grad():
            residual = self.labels - self.model._values(x.cores, self.data)
            along = self.model._values(direction.value.cores, self.data)
            top = float((residual * along).mean()) - 0.5 * self.penalty * float(
                direction.inner(project(x, at=direction.point))
            )
            bottom = float(along.square().mean()) + 0.5 * self.penalty * float(direction.inner(direction))
        return top / bottom if bottom > 0 and top > 0 else 1.0

    def _figures(self, x: TensorTrain) -> dict[str, Any]:
        self.model._put(x)
        return self.job.figures() | {"ranks": self.model.ranks}

    def _tell(self, _: TensorTrain, history: History) -> None:
        assert self.job.observer is not None
        self.job.observer(only_figures(history, _FIGURES))


class WholeGradient:
    """Steps along the gradient by all weights, or by those of a few features, less what may be noise.

    Args:
        order: Features of an interaction at most, each judged by itself; None: all interactions, judged by the
            singular values of the middle unfolding.
        max_rank: Cap on the ranks.
    """

    def __init__(self, model: ExponentialMachine, job: Supervised, order: int | None, max_rank: int) -> None:
        self.model, self.job, self.order, self.max_rank = model, job, order, max_rank
        self.dtype = work_dtype(model.cores[0].dtype)
        self.gradient = UnfoldedGradient(model.tensor.shape, order, self._vectors)

    def run(self) -> History:
        """Until nothing stands above the noise, or a step leads no further down."""
        settings = {"kind": "whole gradient", "loss": self.job.loss, "order": self.order, "max_rank": self.max_rank}
        path = self.job.checkpoint
        signature = start_signature([*self.model.cores, self.job.x, self.job.y])
        file = None if path is None else RunFile(Path(path), 0.0, settings, signature)
        history = self._resumed(file)
        if history.stop == "max_sweeps":
            history.stop = None  # perhaps more are asked for than before
        while history.stop is None and len(history) < self.job.n_sweeps:
            history.stop = self._step()
            if history.stop is None:
                history.append(**self.job.figures(), ranks=self.model.ranks)
            if file is not None:
                cores = [core.detach() for core in self.model.cores]
                file.write({"cores": cores, "history": history.to_state()})
            if history.stop is None and self.job.observer is not None:
                self.job.observer(history)
        history.stop = history.stop or "max_sweeps"
        return history

    def _resumed(self, file: RunFile | None) -> History:
        if file is None or not file.path.exists():
            return History()
        content = file.read()
        device = self.model.cores[0].device
        self.model._put(TensorTrain(tuple(core.to(device) for core in content["cores"])))
        return History.from_state(content["history"])

    def _step(self) -> str | None:
        """One step; why there is none, otherwise."""
        loss, y = LOSSES[self.job.loss], self.job.y
        here = self._outputs().requires_grad_()
        before = loss(here, y)
        numbers = -len(y) * torch.autograd.grad(before, here)[0].to(self.dtype)
        with torch.no_grad():
            if self.order is None:
                cores = self.gradient.directions(numbers, self.max_rank)
            else:
                cores = self.gradient.entries(numbers)
            if cores is None:
                return "noise"
            at, added = self.model.tensor.to(self.dtype), TensorTrain(tuple(cores))
            self.model._put(added)
            along = self._outputs()
            length = _best_length(lambda t: float(loss(here + t * along, y)))
            self.model._put(round_tt(at + added * length, max_rank=self.max_rank).value)
            if float(loss(self._outputs(), y)) < float(before):
                return None
            self.model._put(at)
            return "stagnated"

    def _vectors(self) -> list[Tensor]:
        return [vector.to(self.dtype) for vector in self.model._vectors_of(self.job.x)]

    def _outputs(self) -> Tensor:
        with torch.no_grad():
            return torch.cat([self.model(rows) for rows in self.job.x.split(_ROWS_AT_ONCE)]).to(self.dtype)


def _best_length(f: Callable[[float], float]) -> float:
    """Where a convex function of a length is least, to a factor of two."""
    t, least = 1.0, f(1.0)
    for factor in (2.0, 0.5):
        for _ in range(_MOST_DOUBLINGS):
            found = f(t * factor)
            if not found < least:
                break
            t, least = t * factor, found
    return t
