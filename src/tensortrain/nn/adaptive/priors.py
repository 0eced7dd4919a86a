"""Priors that shrink whole rank indices: the ranks of a model follow from its training."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from tensortrain.errors import RankError, ShapeError
from tensortrain.formats import Bond
from tensortrain.nn.adaptive.indices import bond_ranks, bonds, concentrate_, layers_with_bonds, present, slice_squares
from tensortrain.nn.adaptive.prune import effective_ranks
from tensortrain.nn.base import FactorizedLayer

__all__ = ["PriorKind", "RankPrior"]

PriorKind = Literal["gamma", "half-cauchy", "log-uniform"]


class RankPrior(nn.Module):
    r"""A prior on the cores under which rank indices that the data do not need die out.

    Every index ``r`` of a bond ``k`` has a scale ``lambda_r``, the variance of the entries of its slices. Under
    ``"gamma"`` the entries of a core have the product of the scales of all its bonds as variance, and
    ``lambda ~ Gamma(a, rate b)``; under ``"half-cauchy"`` (of width ``eta``) and ``"log-uniform"``, which are priors
    of ``sqrt(lambda)``, every core has the scale of one of its bonds: in a train of the one on its right.
    Trains are turned first, in place and without a change of their weight, so that their rank indices are singular
    directions: what a train does not need is small from the start.

    Use: start from trained weights, or leave the prior out of the first epochs. In every step add
    ``prior.loss() / n_examples`` to the mean loss, where ``n_examples`` is the size of the whole training set, step the
    optimizer, and call ``prior.update_()``. At the end ``tensortrain.nn.prune_ranks_(model)`` cuts what has died.
    The loss is to be a negative log likelihood, as a cross entropy is; of a mean squared error that is
    ``n_outputs / 2 * error.log()``, with the noise that fits best.

    Args:
        model: A module with factorized layers; its parameters stay its own.
        kind: Of the prior.
        a, b: Shape and rate, of ``"gamma"``.
        eta: Width, of ``"half-cauchy"``.
        damping: Share in (0, 1] of a new scale in each update.
        floor: Smallest scale: the density is unbounded where a scale and its slices vanish together.

    Raises:
        KindError: The model has no factorized layer, or one whose format does not tell where its ranks are.
        RankError: A number that is not positive, or ``damping`` above 1.

    Cost: one pass over the cores for a loss or an update.
    Source: "gamma": Hawkins and Zhang, arXiv:1905.10478; the others: Hawkins, Liu and Zhang, arXiv:2010.08689, of
    both the form with point estimates; closed forms: the stationary points in one scale, all else held.

    Example:
        >>> layer = tensortrain.nn.Linear(64, 64, rank=8)
        >>> prior = RankPrior(layer)
        >>> (layer(torch.ones(2, 64)).square().mean() + prior.loss() / 1000).backward()
        >>> prior.update_()
        >>> list(prior.ranks())
        ['']
    """

    def __init__(
        self,
        model: nn.Module,
        kind: PriorKind = "gamma",
        *,
        a: float = 1.0,
        b: float = 5.0,
        eta: float = 0.1,
        damping: float = 1.0,
        floor: float = 1e-8,
    ) -> None:
        super().__init__()
        if kind not in get_args(PriorKind):
            raise ShapeError(f"kind must be one of {get_args(PriorKind)}: found {kind!r}. Pass 'gamma'.")
        for name, value in (("a", a), ("b", b), ("eta", eta), ("damping", damping), ("floor", floor)):
            if not 0 < value < math.inf or (name == "damping" and value > 1):
                limit = "a number in (0, 1]" if name == "damping" else "a positive number"
                raise RankError(f"{name} must be {limit}: found {value!r}. Leave it out for its default.")
        self.kind, self.a, self.b, self.eta, self.damping, self.floor = kind, a, b, eta, damping, floor
        self._layers = layers_with_bonds(model, "RankPrior")
        for index, (_, layer) in enumerate(self._layers):
            concentrate_(model, layer)
            like = layer.core_list()[0]
            for number, rank in enumerate(bond_ranks(layer)):
                dtype = torch.promote_types(like.real.dtype if like.is_complex() else like.dtype, torch.float32)
                self.register_buffer(_name(index, number), torch.ones(rank, dtype=dtype, device=like.device))
        self._set_scales()

    def extra_repr(self) -> str:
        own = {"gamma": f", a={self.a}, b={self.b}", "half-cauchy": f", eta={self.eta}"}.get(self.kind, "")
        return f"kind={self.kind!r}{own}, damping={self.damping}"

    # -- what users call -----------------------------------------------------------------------------

    def loss(self) -> Tensor:
        """The negative log prior of all cores and scales, in nats, but for constants; a scalar.

        It is a sum over entries, not a mean: beside a mean loss over examples divide it by their number.
        """
        total = torch.zeros(())
        for index, (_, layer) in enumerate(self._layers):
            part = self._layer_loss(layer, self._scales(index))
            total = part + total.to(part)
        return total

    @torch.no_grad()
    def update_(self) -> None:
        """Move every scale to where the prior, with the cores as they are, has its mode.

        For an index that lives the entries at indices of other bonds that have died do not count, as if they were cut
        already.
        """
        self._move(self.damping)

    @property
    def scale_power(self) -> float:
        """The power of a scale that the prior is a density of: of itself, or of its root."""
        return 1.0 if self.kind == "gamma" else 0.5

    def ranks(self) -> dict[str, tuple[int, ...]]:
        """By layer, the ranks that ``prune_ranks_`` would leave."""
        return {name: effective_ranks(layer) for name, layer in self._layers}

    def scales(self) -> dict[str, tuple[Tensor, ...]]:
        """By layer, the scale of every index of every bond."""
        return {name: tuple(self._scales(index)) for index, (name, _) in enumerate(self._layers)}

    # -- the prior of one layer ----------------------------------------------------------------------

    def _scales(self, index: int) -> list[Tensor]:
        layer = self._layers[index][1]
        return [getattr(self, _name(index, number)) for number in range(len(bonds(layer.spec)))]

    def _layer_loss(self, layer: FactorizedLayer, scales: Sequence[Tensor]) -> Tensor:
        found = bonds(layer.spec)
        total = scales[0].new_zeros(())
        for k, core in enumerate(layer.core_list()):
            over = self._axes_of(k, found)
            if not over:
                continue
            variance = _variance(core, [(axis, scales[bond]) for bond, axis in over])
            squares = core.to(torch.promote_types(core.dtype, variance.dtype)).abs().square()
            n_repeated = core.numel() // variance.numel()
            total = total + 0.5 * ((squares / variance).sum() + n_repeated * variance.log().sum())
        return total + sum((self._scale_loss(scale) for scale in scales), total.new_zeros(()))

    def _scale_loss(self, scale: Tensor) -> Tensor:
        if self.kind == "gamma":
            return (self.b * scale - (self.a - 1) * scale.log()).sum()
        if self.kind == "half-cauchy":
            return (self.eta**2 + scale).log().sum()
        return 0.5 * scale.log().sum()

    def _axes_of(self, core: int, found: tuple[Bond, ...]) -> list[tuple[int, int]]:
        """The bonds whose scales make up the variance of a core, and their axes in it."""
        touching = _touching(core, found)
        return touching if self.kind == "gamma" else [one for one in touching if one[0] == _owners(found)[core]]

    # -- closed forms --------------------------------------------------------------------------------

    @torch.no_grad()
    def _set_scales(self) -> None:
        """Start near the mode for the cores as they are."""
        for _ in range(3 if self.kind == "gamma" else 1):
            self._move(1.0)

    def _move(self, damping: float) -> None:
        for index, (_, layer) in enumerate(self._layers):
            scales, cores = self._scales(index), [core.detach() for core in layer.core_list()]
            alive = [present(cores, bond) for bond in bonds(layer.spec)]
            everything = [torch.ones_like(some) for some in alive]
            for number, scale in enumerate(scales):
                if not self._owned(layer, number):
                    continue
                new = self._mode(*self._evidence(layer, cores, scales, everything, number))
                if not all(bool(some.all()) for some in alive):
                    # Entries at indices of other bonds that have died do not count for those that live. Their scales
                    # fit their noise, so that each votes for the scale it sees: between two bonds that have died down
                    # no index could follow.
                    of_living = self._mode(*self._evidence(layer, cores, scales, alive, number))
                    new = torch.where(alive[number], of_living, new)
                scale.lerp_(new.clamp_min(self.floor).to(scale.dtype), damping)

    def _owned(self, layer: FactorizedLayer, number: int) -> bool:
        """Whether a scale is part of the variance of some core."""
        found = bonds(layer.spec)
        return any(bond == number for k in range(len(layer.core_list())) for bond, _ in self._axes_of(k, found))

    def _evidence(
        self,
        layer: FactorizedLayer,
        cores: Sequence[Tensor],
        scales: Sequence[Tensor],
        counted: Sequence[Tensor],
        number: int,
    ) -> tuple[Tensor, int]:
        """Sum of squares, over the other scales, of the entries at each index of a bond; and how many they are.

        ``counted`` tells which indices of the other bonds count.
        """
        size, count, found = torch.zeros_like(scales[number]), 0, bonds(layer.spec)
        for k, core in enumerate(cores):
            over = self._axes_of(k, found)
            own = [axis for bond, axis in over if bond == number]
            if not own:
                continue
            others = [(axis, counted[bond]) for bond, axis in _touching(k, found) if bond != number]
            variance = _variance(core, [(axis, scales[bond]) for bond, axis in over if bond != number])
            mask = _variance(core, [(axis, some.to(variance.dtype)) for axis, some in others])
            size += slice_squares(core * (mask / variance).sqrt(), own[0])
            n_entries = core.numel() // core.shape[own[0]]
            for axis, some in others:
                n_entries = n_entries // core.shape[axis] * int(some.sum())
            count += n_entries
        return size, count

    def _mode(self, size: Tensor, count: int) -> Tensor:
        if self.kind == "gamma":
            c = count / 2 - self.a + 1
            # Written so that nothing cancels where 2 b S is small beside c^2.
            return size / (c + (c * c + 2 * self.b * size).sqrt()) if c > 0 else _gamma_root(c, self.b, size)
        if self.kind == "log-uniform":
            return size / (count + 1)
        width = self.eta**2
        linear = size - width * count
        root = (linear.square() + 4 * (count + 2) * width * size).sqrt()
        return torch.where(linear > 0, (linear + root) / (2 * count + 4), 2 * width * size / (root - linear))


def _touching(core: int, found: tuple[Bond, ...]) -> list[tuple[int, int]]:
    """Bonds that meet in a core, and their axes in it."""
    return [(bond, axis) for bond, places in enumerate(found) for k, axis in places if k == core]


@cache
def _owners(found: tuple[Bond, ...]) -> dict[int, int]:
    """For every core one of its bonds, each bond as often as any other where that can be: the one on its right."""
    owners: dict[int, int] = {}
    owned = [0] * len(found)
    for core in sorted({k for places in found for k, _ in places}):
        here = [bond for bond, _ in _touching(core, found)]
        owners[core] = min(here, key=lambda bond: (owned[bond], -bond))
        owned[owners[core]] += 1
    return owners


def _gamma_root(c: float, b: float, size: Tensor) -> Tensor:
    return (-c + (c * c + 2 * b * size).sqrt()) / (2 * b)


def _variance(core: Tensor, factors: Sequence[tuple[int, Tensor]]) -> Tensor:
    """The product of scales along some axes of a core, to be broadcast against it."""
    variance = torch.ones([1] * core.ndim, device=core.device, dtype=torch.promote_types(_real(core), torch.float32))
    for axis, scale in factors:
        variance = variance * scale.reshape(-1, *[1] * (core.ndim - axis - 1))
    return variance


def _real(core: Tensor) -> torch.dtype:
    return core.real.dtype if core.is_complex() else core.dtype


def _name(index: int, number: int) -> str:
    return f"scale_{index}_{number}"
