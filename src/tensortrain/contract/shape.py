"""The shapes of a TT-matrix: all that a contraction plan needs to know of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from torch import Tensor

from tensortrain.errors import RankError, ShapeError
from tensortrain.system.tracing import sizes_of

__all__ = ["Chain", "ChainShape"]


@dataclass(frozen=True)
class ChainShape:
    """The shapes of a TT-matrix with cores ``(r, i, j, s)``.

    Args:
        out_modes: Output mode sizes ``i_1 .. i_d``, first slowest.
        in_modes: Input mode sizes ``j_1 .. j_d``, first slowest.
        ranks: ``d + 1`` ranks; the first and the last are 1.

    Raises:
        ShapeError: The two mode lists differ in length, are empty, or hold a size below 1.
        RankError: ``ranks`` has the wrong length, a boundary rank is not 1, or a rank is below 1.

    Example:
        >>> ChainShape((4, 5), (6, 7), (1, 3, 1)).core_shapes
        ((1, 4, 6, 3), (3, 5, 7, 1))
    """

    out_modes: tuple[int, ...]
    in_modes: tuple[int, ...]
    ranks: tuple[int, ...]

    def __post_init__(self) -> None:
        for name in ("out_modes", "in_modes", "ranks"):
            object.__setattr__(self, name, tuple(int(size) for size in getattr(self, name)))
        _check_modes(self.out_modes, self.in_modes)
        _check_ranks(self.ranks, len(self.out_modes))

    @classmethod
    def of(cls, cores: Sequence[Tensor]) -> ChainShape:
        """Return the chain that ``cores`` have.

        Raises:
            ShapeError: A core is not of order 4, or neighbours disagree on their rank.
        """
        _check_cores(cores)
        shapes = [sizes_of(core) for core in cores]
        ranks = (shapes[0][0], *(shape[3] for shape in shapes)) if shapes else (1,)
        return cls(tuple(shape[1] for shape in shapes), tuple(shape[2] for shape in shapes), ranks)

    @property
    def order(self) -> int:
        """How many cores."""
        return len(self.out_modes)

    @property
    def out_features(self) -> int:
        """Rows of the dense weight."""
        return prod(self.out_modes)

    @property
    def in_features(self) -> int:
        """Columns of the dense weight."""
        return prod(self.in_modes)

    @property
    def core_shapes(self) -> tuple[tuple[int, int, int, int], ...]:
        """Shape ``(r, i, j, s)`` of every core."""
        return tuple(zip(self.ranks[:-1], self.out_modes, self.in_modes, self.ranks[1:], strict=True))

    @property
    def n_params(self) -> int:
        """Entries of all cores together."""
        return sum(prod(shape) for shape in self.core_shapes)

    @property
    def dense_numel(self) -> int:
        """Entries of the dense weight."""
        return self.out_features * self.in_features


Chain = ChainShape  # its public name


def _check_modes(out_modes: tuple[int, ...], in_modes: tuple[int, ...]) -> None:
    if len(out_modes) != len(in_modes) or not out_modes:
        raise ShapeError(
            f"a chain must have one output and one input mode per core: out_modes has {len(out_modes)} and in_modes "
            f"{len(in_modes)}, expected the same number, at least 1. Pad the shorter list with modes of size 1."
        )
    for name, modes in (("out_modes", out_modes), ("in_modes", in_modes)):
        if min(modes) < 1:
            raise ShapeError(
                f"modes must be positive: {name} has {modes}, expected sizes of at least 1. Leave the empty mode out."
            )


def _check_ranks(ranks: tuple[int, ...], order: int) -> None:
    if len(ranks) != order + 1:
        raise RankError(
            f"a chain must have one rank per bond and end: ranks has {len(ranks)} entries, "
            f"expected {order + 1} for {order} cores. Give (1, r_1, .., r_{{d-1}}, 1)."
        )
    if min(ranks) < 1 or ranks[0] != 1 or ranks[-1] != 1:
        raise RankError(
            f"ranks must be positive and 1 at both ends: ranks has {ranks}, expected (1, .., 1). "
            "Set the first and the last rank to 1."
        )


def _check_cores(cores: Sequence[Tensor]) -> None:
    shapes = [sizes_of(core) for core in cores]
    for k, shape in enumerate(shapes):
        if len(shape) != 4:
            raise ShapeError(
                f"cores of a TT-matrix must have order 4: cores[{k}] has shape {shape}, "
                "expected (r, i, j, s). Reshape the core."
            )
    for k in range(1, len(cores)):
        if shapes[k - 1][3] != shapes[k][0]:
            raise ShapeError(
                f"neighbouring cores must share a rank: cores[{k - 1}] has shape {shapes[k - 1]} and cores[{k}] "
                f"{shapes[k]}, expected the last size of one to be the first of the next. Build the cores from one "
                "list of ranks."
            )
