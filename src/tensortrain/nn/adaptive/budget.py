"""Ranks of all layers together that keep most of their weights within a number of parameters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tensortrain.cores.canonical import singular_values_at
from tensortrain.errors import RankError
from tensortrain.nn.adaptive.indices import bond_ranks, bonds, core_size, is_train, scores, to_train
from tensortrain.nn.base import FactorizedLayer

__all__ = ["checked_budget", "sizes_within"]


def checked_budget(layers: Sequence[FactorizedLayer], budget: float) -> float:
    """A budget in parameters; below 1 it is a share of the cores at present.

    Raises:
        RankError: Cores of rank 1 are larger.
    """
    total = sum(core_size(bond_ranks(layer), layer.spec) for layer in layers)
    least = sum(core_size([1] * len(bond_ranks(layer)), layer.spec) for layer in layers)
    goal = budget * total if budget < 1 else budget
    if goal < least:
        raise RankError(
            f"a budget must hold cores of rank 1: found {budget!r} for cores of {total} parameters, expected at least "
            f"{least}. Raise it."
        )
    return goal


def sizes_within(layers: Sequence[FactorizedLayer], goal: float) -> list[tuple[int, ...]]:
    """Sizes of the bonds of each layer, their cores together within ``goal`` parameters.

    Again and again the rank index goes whose share of its layer's squared norm is least for what it stores; what fits
    in the end comes back.
    """
    cuts = [_Cut.of(layer) for layer in layers]
    total = sum(cut.stored() for cut in cuts)
    best = [cut.cheapest() for cut in cuts]
    while total > goal and min(best)[0] < float("inf"):
        at = min(range(len(cuts)), key=lambda k: best[k][0])
        _, bond, saved = best[at]
        cuts[at].sizes[bond] -= 1
        total -= saved
        best[at] = cuts[at].cheapest()
    for cut in cuts:
        total = cut.fill(total, goal)
    return [tuple(cut.sizes) for cut in cuts]


@dataclass
class _Cut:
    """One layer on its way down."""

    layer: FactorizedLayer
    energies: list[list[float]]  # of every index of a bond, largest first, over the layer's squared norm
    sizes: list[int]

    @classmethod
    def of(cls, layer: FactorizedLayer) -> _Cut:
        return cls(layer, _energies(layer), list(bond_ranks(layer)))

    def stored(self, bond: int | None = None, by: int = 0) -> int:
        """Parameters, with one bond so much larger."""
        return core_size([n + by * (k == bond) for k, n in enumerate(self.sizes)], self.layer.spec)

    def cheapest(self) -> tuple[float, int, int]:
        """The last index that costs least: energy over what it stores, its bond, what it stores."""
        found, here = [(float("inf"), 0, 0)], self.stored()
        for bond, size in enumerate(self.sizes):
            if size > 1:
                saved = here - self.stored(bond, -1)
                found.append((self.energies[bond][size - 1] / max(saved, 1), bond, saved))
        return min(found)

    def fill(self, total: int, goal: float) -> int:
        """Take back what fits, the largest first."""
        while True:
            fits, here = [], self.stored()
            for bond, size in enumerate(self.sizes):
                added = self.stored(bond, 1) - here
                if size < len(self.energies[bond]) and total + added <= goal:
                    fits.append((self.energies[bond][size], bond, added))
            if not fits:
                return total
            _, bond, added = max(fits)
            self.sizes[bond] += 1
            total += added


def _energies(layer: FactorizedLayer) -> list[list[float]]:
    cores = [core.detach() for core in layer.core_list()]
    if is_train(layer):
        train = to_train(layer, layer.spec, cores)
        values = [singular_values_at(train, (0, len(train) - 1), bond)[0] for bond in range(1, len(train))]
    else:
        values = [scores(cores, bond).sort(descending=True).values for bond in bonds(layer.spec)]
    sizes = bond_ranks(layer)
    squares = [(some / some.square().sum().sqrt().clamp_min(1e-30)).square().tolist() for some in values]
    return [some + [0.0] * (n - len(some)) for some, n in zip(squares, sizes, strict=True)]
