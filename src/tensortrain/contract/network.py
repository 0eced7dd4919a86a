"""Weights that are no chain: a tensor network given by the names of its legs, and how it multiplies.

Legs with the same name are summed over or, where an input or an output bears the name too, shared: CP's rank
is a leg of every core, and the two cores of a block tensor train share one mode of the inputs and one of the
outputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from torch import Tensor

from tensortrain._moved import names_of_before
from tensortrain.contract.products import MOST_LEGS, Legs, Sizes, contraction, contraction_flops, run
from tensortrain.errors import ShapeError

__all__ = ["BATCH", "Network"]

BATCH = "batch"  # leg of the rows; no core bears it


@dataclass(frozen=True)
class Network:
    """A weight ``(M, N)`` as a sum over products of one entry per core.

    Args:
        cores: Legs of every core, in the order in which a row meets them where no order is planned.
        out_legs: Legs that make up the outputs, first slowest.
        in_legs: Legs that make up the inputs, first slowest.
        sizes: Size of every leg; inner legs are those that are neither output nor input.

    Raises:
        ShapeError: More legs than an einsum has letters.

    Example:
        >>> cp = Network((("j", "r"), ("i", "r")), ("i",), ("j",), (("i", 5), ("j", 4), ("r", 3)))
        >>> cp.core_shapes, cp.n_paths
        (((4, 3), (5, 3)), 3)
    """

    cores: tuple[Legs, ...]
    out_legs: Legs
    in_legs: Legs
    sizes: Sizes

    def __post_init__(self) -> None:
        if len(self.sizes) >= MOST_LEGS:
            raise ShapeError(
                f"a network must have fewer than {MOST_LEGS} legs: found {len(self.sizes)}. Use fewer, larger modes."
            )

    def size(self, legs: str | Sequence[str]) -> int:
        """Size of one leg, or of several together."""
        known = dict(self.sizes)
        return known[legs] if isinstance(legs, str) else prod([known[leg] for leg in legs])  # a list: it is traced

    @property
    def core_shapes(self) -> tuple[tuple[int, ...], ...]:
        """Shape of every core."""
        return tuple(tuple(self.size(leg) for leg in legs) for legs in self.cores)

    @property
    def out_features(self) -> int:
        """Rows of the dense weight."""
        return self.size(self.out_legs)

    @property
    def in_features(self) -> int:
        """Columns of the dense weight."""
        return self.size(self.in_legs)

    @property
    def n_params(self) -> int:
        """Entries of all cores together."""
        return sum(prod(shape) for shape in self.core_shapes)

    @property
    def dense_numel(self) -> int:
        """Entries of the dense weight."""
        return self.out_features * self.in_features

    @property
    def inner_legs(self) -> Legs:
        """Legs that are summed over."""
        outer = {*self.out_legs, *self.in_legs}
        return tuple(leg for leg, _ in self.sizes if leg not in outer)

    @property
    def n_paths(self) -> int:
        """Products of one entry per core that are summed in an entry of the dense weight."""
        return self.size(self.inner_legs)

    def private_legs(self, k: int) -> Legs:
        """Output and input legs that only core ``k`` bears."""
        others = {leg for n, legs in enumerate(self.cores) for leg in legs if n != k}
        return tuple(leg for leg in self.cores[k] if leg in (*self.out_legs, *self.in_legs) and leg not in others)

    def core_fans(self) -> tuple[tuple[int, int], ...]:
        """What every core sums over, and the new legs it brings, when rows meet the cores in their order."""
        steps = contraction(
            ((BATCH, *self.in_legs), *self.cores), (BATCH, *self.out_legs), (*self.sizes, (BATCH, 1)), "forward"
        )
        return tuple((step.k, step.n) for step in steps)

    def to_dense(self, cores: Sequence[Tensor]) -> Tensor:
        """The dense weight ``(M, N)``, differentiably."""
        steps = contraction(self.cores, (*self.out_legs, *self.in_legs), self.sizes)
        return run(steps, cores).reshape(self.out_features, self.in_features)

    def squared_norm(self, cores: Sequence[Tensor]) -> Tensor:
        """``||W||^2``; without building ``W`` where that costs less."""
        direct = contraction(self.cores, (*self.out_legs, *self.in_legs), self.sizes)
        doubled, operands, sizes = self._doubled(cores)
        if len(sizes) >= MOST_LEGS:
            return self.to_dense(cores).abs().square().sum()
        steps = contraction(doubled, (), sizes)
        if contraction_flops(direct) + 2 * self.dense_numel <= contraction_flops(steps):
            return self.to_dense(cores).abs().square().sum()
        return run(steps, operands).real

    def _doubled(self, cores: Sequence[Tensor]) -> tuple[tuple[Legs, ...], list[Tensor], Sizes]:
        """The network times its conjugate; inner legs of the second copy get a prime."""
        inner = set(self.inner_legs)
        primed = tuple(tuple(leg + "'" if leg in inner else leg for leg in legs) for legs in self.cores)
        sizes = (*self.sizes, *((leg + "'", n) for leg, n in self.sizes if leg in inner))
        return (*self.cores, *primed), [*cores, *(core.conj() for core in cores)], sizes


__getattr__ = names_of_before(__name__, "contract.products", "contract.network_plan", "contract.choose")
