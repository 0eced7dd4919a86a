"""How an MPS classifier learns two sites at a time, by least squares."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional as F

from tensortrain.cores.canonical import Gauged
from tensortrain.cores.environments import Data, Environments
from tensortrain.cores.sweep import Cuts, sweep
from tensortrain.models.base import seed_from
from tensortrain.models.least_squares import LeastSquares, labelled, moments
from tensortrain.models.supervised import Supervised
from tensortrain.system.history import History

if TYPE_CHECKING:
    from tensortrain.models.classifier import MPSClassifier

__all__ = ["ClassifierFit"]


@dataclass
class ClassifierFit:
    """One call of ``MPSClassifier.fit``, its arguments checked."""

    model: MPSClassifier
    job: Supervised

    @torch.no_grad()
    def by_sweeps(self, cuts: Cuts, n_steps: int, ridge: float, batch_size: int | None) -> History:
        """Sweeps of two sites; the label moves along and ends at the first: elsewhere it would need higher ranks."""
        model, site = self.model, self.model.label
        assert site is not None
        x, y, generator = self.job.x, self.job.y, None
        if batch_size is not None and batch_size < len(y):  # samples in a random order: a part of them is a batch
            generator = torch.Generator().manual_seed(seed_from(self.job.generator))
            order = torch.randperm(len(y), generator=generator).to(y.device)
            x, y = x[order], y[order]
        vectors = model._vectors(x)
        state = labelled([core.detach() for core in model.cores], site)
        target = F.one_hot(y, model.n_classes).T.to(vectors.dtype)  # classes, samples
        problem = LeastSquares(target, n_steps, ridge, is_scaled=True, batch_size=batch_size, generator=generator)

        def figures(state: Gauged) -> dict[str, Any]:
            self._put(state)
            return self.job.figures()

        history = sweep(
            state,
            Environments(Data(list(vectors)), state.cores),
            problem.improved,
            n_sites=min(2, len(state.cores)),
            schedule=[cuts] * self.job.n_sweeps,
            metric=moments if len(state.cores) > 1 else None,
            figures=figures,
            observer=self.job.observer,
            checkpoint=self.job.checkpoint,
            inputs=(self.job.x, self.job.y),
            generator=generator,
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
