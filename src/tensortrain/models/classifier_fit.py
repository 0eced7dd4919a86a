"""How an MPS classifier learns two sites at a time, by least squares."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tensortrain.cores.canonical import Gauged
from tensortrain.cores.environments import Data, Environments
from tensortrain.cores.scaling import in_dtype, work_dtype
from tensortrain.cores.sweep import Cuts, sweep
from tensortrain.models.least_squares import LeastSquares, evened, labelled, moments
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
    bases: list[Tensor] = field(default_factory=list)  # of the vectors at each site

    @torch.no_grad()
    def by_sweeps(self, cuts: Cuts, n_steps: int, ridge: float, whiten: bool) -> History:
        """Sweeps of two sites; the label moves along and ends at the first: elsewhere it would need higher ranks."""
        model, site = self.model, self.model.label
        assert site is not None
        wide = work_dtype(model.cores[0].dtype)
        vectors = in_dtype(list(model._vectors(self.job.x)), wide)
        cores = in_dtype([core.detach() for core in model.cores], wide)
        if whiten:
            self.bases = [_even_basis(here) for here in vectors]
            vectors = [here @ basis for here, basis in zip(vectors, self.bases, strict=True)]
            cores = [torch.linalg.solve(basis, core) for basis, core in zip(self.bases, cores, strict=True)]
        state = labelled(cores, site)
        target = F.one_hot(self.job.y, model.n_classes).T.to(vectors[0].dtype)  # classes, samples
        problem = LeastSquares(target, n_steps, ridge, is_scaled=whiten)

        def figures(state: Gauged) -> dict[str, Any]:
            self._put(state)
            return self.job.figures()

        history = sweep(
            state,
            Environments(Data(vectors), state.cores),
            problem.improved,
            n_sites=min(2, len(state.cores)),
            schedule=[cuts] * self.job.n_sweeps,
            metric=moments if whiten and len(state.cores) > 1 else None,
            figures=figures,
            observer=self.job.observer,
            checkpoint=self.job.checkpoint,
            inputs=(self.job.x, self.job.y),
        )
        self._put(state)
        return history

    def _put(self, state: Gauged) -> None:
        """The model takes the state over."""
        model = self.model
        cores = [core.clone() for core in state.cores]
        scale = torch.exp2(state.exponent.to(cores[state.center].dtype))
        cores[state.center] = cores[state.center] * scale
        if self.bases:
            cores = [basis @ core for basis, core in zip(self.bases, cores, strict=True)]
        model.label = state.center
        model._take(in_dtype(cores, model.cores[0].dtype))


def _even_basis(vectors: Tensor) -> Tensor:
    """``(m, m)`` by which the vectors ``(b, m)`` of a site become about even, their common part of size 1.

    With orthonormal cores every site else takes its share of what the examples have in common: a hundred factors of
    0.7, as features 1 - x and x have, leave of the scores nothing but rounding.
    """
    wide = vectors.double()
    values, axes = torch.linalg.eigh(evened(wide.mT @ wide))
    return ((axes / (values / values[-1]).sqrt()) @ axes.mT / wide.square().sum(-1).mean().sqrt()).to(vectors.dtype)
