"""Least squares for a chain that meets rank-one data and has an axis of labels: what two-site sweeps solve."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tensortrain.cores.canonical import Gauged, orthogonalize_cores
from tensortrain.cores.environments import Local

__all__ = ["LeastSquares", "labelled"]


def labelled(cores: list[Tensor], site: int) -> Gauged:
    """The chain with the label's core as its center and all others orthonormal."""
    label = cores[site]
    n_classes = label.shape[0]
    joined = [*cores[:site], label.movedim(0, 1).flatten(1, 2), *cores[site + 1 :]]  # r (classes n) s
    found, exponent = orthogonalize_cores(joined, (0, len(cores) - 1), site)
    found[site] = found[site].unflatten(1, (n_classes, -1)).movedim(1, 0)
    return Gauged(found, site, exponent, n_labels=1)


@dataclass(frozen=True)
class LeastSquares:
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
