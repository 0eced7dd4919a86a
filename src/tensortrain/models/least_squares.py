"""Least squares for a chain that meets rank-one data and has an axis of labels: what two-site sweeps solve."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tensortrain.cores.canonical import Gauged, orthogonalize_cores
from tensortrain.cores.environments import Local

__all__ = ["LeastSquares", "evened", "labelled", "moments"]

_EVEN = 0.1  # weight of all directions alike in second moments, whose trace is 1: what few samples show counts less


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
        n_steps: Steps of conjugate gradients.
        is_scaled: Whether they go in a space where what the samples show is about even in all directions. The features
            of neighbouring sites are far from even, and without that few steps do little.
    """

    target: Tensor
    n_steps: int
    ridge: float
    is_scaled: bool = False

    def improved(self, local: Tensor, at: Local, k: int) -> Tensor:
        """A tensor of two sites with a smaller loss; never a larger one."""
        n_samples = self.target.shape[1]
        scale = _Scale.of(at, local.dtype) if self.is_scaled else _as_it_is
        seen = at(local)
        ridge = self._weight(local, seen)
        residual = self.target - seen
        gradient = at.adjoint(residual) / n_samples - ridge * local
        direction = step = scale(gradient)
        square = (step * gradient).sum()
        for _ in range(self.n_steps):
            seen = at(direction)
            bend = seen.square().sum() / n_samples + ridge * direction.square().sum()
            length = torch.where(bend > 0, square / bend, 0.0)
            local, residual = local + length * direction, residual - length * seen
            gradient = at.adjoint(residual) / n_samples - ridge * local
            step = scale(gradient)
            before, square = square, (step * gradient).sum()
            direction = step + torch.where(before > 0, square / before, 0.0) * direction
        return local

    def _weight(self, local: Tensor, seen: Tensor) -> Tensor | float:
        """Of the squared norm: scaled, a share of what the present tensor gives for its own."""
        if not self.is_scaled:
            return self.ridge
        norm = local.square().sum()
        return self.ridge * torch.where(norm > 0, seen.square().sum() / seen.shape[1] / norm, 0.0)


def moments(at: Local, k: int = 0) -> tuple[Tensor, Tensor]:
    """Second moments of what the samples show left and right of the cut between two sites, as a metric of ``split``."""
    left, right = at.grams()
    return evened(left.double()), evened(right.double())


def evened(gram: Tensor) -> Tensor:
    """Second moments of trace 1 with some weight in every direction."""
    trace = gram.diagonal().sum()
    share = torch.where(trace > 0, gram / trace, 0.0)
    return share + _EVEN / len(gram) * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)


def _as_it_is(gradient: Tensor) -> Tensor:
    return gradient


@dataclass(frozen=True)
class _Scale:
    """The inverse of the second moments of both factors, in place of that of their product."""

    left: Tensor
    right: Tensor

    @classmethod
    def of(cls, at: Local, dtype: torch.dtype) -> _Scale:
        left, right = (torch.linalg.inv(moment).to(dtype) for moment in moments(at))
        return cls(left, right)

    def __call__(self, gradient: Tensor) -> Tensor:
        matrix = gradient.reshape(gradient.shape[0], len(self.left), len(self.right))
        return (self.left @ matrix @ self.right).reshape(gradient.shape)
