"""A few copies of a model that together stand for its posterior."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn

from tensortrain.errors import RankError
from tensortrain.nn.adaptive.priors import RankPrior

__all__ = ["SVGD"]

Output = TypeVar("Output")


class SVGD:
    r"""Stein variational gradient descent: particles that follow the posterior and keep apart from each other.

    A particle is one setting of all trained parameters of a model and of all scales of its prior. They start around
    the model as it is (train it first), and each step moves them by
    ``1/n sum_j [K(j, i) grad_j log p(j) + grad_j K(j, i)]`` with a Gaussian kernel of the median width, scaled as Adam
    does.

    Args:
        model: Trained so far; its parameters are what the particles start around, and lend them their place.
        prior: On its factorized layers.
        n_particles: At least 2.
        lr: Of Adam; an attribute that can be set.
        spread: Standard deviation of the start, over the root-mean-square of each parameter. What particles gain over
            one model comes from how far they lie apart: with 0.6 and a dozen passes to come back it was 6 %.
        generator: Of the start.

    Raises:
        RankError: Fewer than two particles.

    Cost: ``n_particles`` times the memory of the parameters, and as many forward and backward passes a step.
    Source: Liu and Wang, arXiv:1608.04471; for factorized layers: Hawkins and Zhang, arXiv:1905.10478.

    Example:
        >>> layer = tensortrain.nn.Linear(16, 4, rank=2)
        >>> posterior = SVGD(layer, RankPrior(layer), n_particles=3)
        >>> x, y = torch.ones(8, 16), torch.zeros(8, dtype=torch.long)
        >>> loss = posterior.step(lambda model: torch.nn.functional.cross_entropy(model(x), y), n_examples=100)
        >>> posterior.log_prob(lambda model: model(x)).shape
        torch.Size([8, 4])
    """

    def __init__(
        self,
        model: nn.Module,
        prior: RankPrior,
        n_particles: int = 10,
        *,
        lr: float = 1e-3,
        spread: float = 1e-2,
        generator: torch.Generator | None = None,
    ) -> None:
        if n_particles < 2:
            raise RankError(f"particles keep apart from each other: found n_particles={n_particles}. Pass at least 2.")
        self.model, self.prior = model, prior
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self._scales = [scale for scales in prior.scales().values() for scale in scales]
        center = self._gather()
        noise = torch.randn(n_particles, len(center), generator=generator, dtype=center.dtype)
        self.particles = center + noise.to(center.device) * self._spreads(spread)
        self._optimizer = torch.optim.Adam([self.particles], lr=lr)

    @property
    def n_particles(self) -> int:
        """How many there are."""
        return len(self.particles)

    @property
    def lr(self) -> float:
        """Of Adam; set it lower while training goes on: particles that still jump about are each worse than need be."""
        return float(self._optimizer.param_groups[0]["lr"])

    @lr.setter
    def lr(self, value: float) -> None:
        self._optimizer.param_groups[0]["lr"] = value

    def step(self, loss: Callable[[nn.Module], Tensor], n_examples: int) -> float:
        """Move all particles once.

        Args:
            loss: Of the model, its mean negative log likelihood (nats) over some examples.
            n_examples: Size of the whole training set, which the log likelihood counts.

        Returns:
            float: The mean of ``loss`` over the particles before the step; the model is as before afterwards.
        """
        before, losses, slopes = self._gather(), [], []
        try:
            for particle in self.particles.detach():
                self._take(particle)
                value, slope = self._slope(loss, n_examples)
                losses.append(value)
                slopes.append(slope)
        finally:
            self._take(before)
        # Over the number of examples, as the loss is.
        self.particles.grad = -_direction(self.particles.detach(), torch.stack(slopes)) / n_examples
        self._optimizer.step()
        return sum(losses) / len(losses)

    @torch.no_grad()
    def outputs(self, run: Callable[[nn.Module], Tensor]) -> Tensor:
        """What ``run(model)`` gives for every particle, ``(n_particles, ..)``; the model is as before afterwards."""
        before, found = self._gather(), []
        try:
            for particle in self.particles.detach():
                self._take(particle)
                found.append(run(self.model))
        finally:
            self._take(before)
        return torch.stack(found)

    def log_prob(self, run: Callable[[nn.Module], Tensor]) -> Tensor:
        """Log of the mean probability of each class, for logits ``(.., classes)`` that ``run(model)`` gives."""
        return self.outputs(run).log_softmax(dim=-1).logsumexp(dim=0) - math.log(self.n_particles)

    # -- one particle --------------------------------------------------------------------------------

    def _gather(self) -> Tensor:
        """The model and its prior as one vector; scales by their logarithms, since they are positive."""
        parts = [parameter.detach().flatten() for parameter in self._parameters]
        return torch.cat([*parts, *(scale.detach().log().to(parts[0].device) for scale in self._scales)])

    @torch.no_grad()
    def _take(self, particle: Tensor) -> None:
        sizes = [tensor.numel() for tensor in (*self._parameters, *self._scales)]
        pieces = iter(particle.split(sizes))
        for parameter in self._parameters:
            parameter.copy_(next(pieces).reshape(parameter.shape))
        for scale in self._scales:
            scale.copy_(next(pieces).exp())

    def _spreads(self, spread: float) -> Tensor:
        parts = [p.detach().square().mean().sqrt().clamp_min(1e-3).expand(p.numel()) for p in self._parameters]
        return spread * torch.cat([*parts, *(torch.ones_like(scale) for scale in self._scales)])

    def _slope(self, loss: Callable[[nn.Module], Tensor], n_examples: int) -> tuple[float, Tensor]:
        """The mean loss, and the gradient of the log posterior."""
        scales = [scale.requires_grad_() for scale in self._scales]
        try:
            with torch.enable_grad():
                value = loss(self.model)
                # The density of a logarithm: that of a power of the scale, times that power.
                logs = sum(scale.log().sum() for scale in scales)
                negative = n_examples * value + self.prior.loss() - self.prior.scale_power * logs
                wanted = [*self._parameters, *scales]
                grads = torch.autograd.grad(negative, wanted, allow_unused=True, materialize_grads=True)
        finally:
            for scale in scales:
                scale.requires_grad_(False)
        n = len(self._parameters)
        of_logs = [grad * scale.detach() for grad, scale in zip(grads[n:], scales, strict=True)]
        return float(value.detach()), -torch.cat([grad.flatten() for grad in (*grads[:n], *of_logs)])


def _direction(particles: Tensor, slopes: Tensor) -> Tensor:
    """Where each particle goes: along the slopes of those near it, and away from them."""
    n = len(particles)
    squares = torch.cdist(particles, particles).square()
    median = squares[~torch.eye(n, dtype=torch.bool, device=particles.device)].median()
    width = (median / math.log(n + 1)).clamp_min(torch.finfo(particles.dtype).tiny)
    kernel = torch.exp(-squares / width)
    apart = (particles * kernel.sum(dim=1, keepdim=True) - kernel @ particles) * (2 / width)
    return (kernel @ slopes + apart) / n
