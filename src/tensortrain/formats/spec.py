"""What a dense weight is to a format, and how it is stored: plain data, which prints, compares and goes to JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from tensortrain.errors import ShapeError

from .registry import get_format

__all__ = ["Bond", "FactorSpec", "Kind", "Rank", "WeightShape"]

Kind = Literal["linear", "conv", "embedding"]
Rank = int | float | str | Sequence[int]
Bond = tuple[tuple[int, int], ...]  # (core, axis) of every place where one rank index appears


@dataclass(frozen=True)
class WeightShape:
    """The dense weight that a format stands for.

    ``out_features`` counts all outputs (rows of a linear weight, output channels, embedding dimension);
    ``in_features`` counts the inputs that one output sees (columns, input channels per group, vocabulary).
    """

    kind: Kind
    out_features: int
    in_features: int
    kernel: tuple[int, ...] = ()
    groups: int = 1

    @property
    def dense_shape(self) -> tuple[int, ...]:
        """Shape of the weight in torch's own layout."""
        if self.kind == "embedding":
            return (self.in_features, self.out_features)
        return (self.out_features, self.in_features, *self.kernel)

    @property
    def n_params(self) -> int:
        """Entries of the dense weight."""
        return math.prod(self.dense_shape)

    @property
    def fan_in(self) -> int:
        """Inputs that one output sums over, kernel positions included."""
        return self.in_features * math.prod(self.kernel)

    def one_group(self) -> WeightShape:
        """The shape of a single group's weight."""
        return replace(self, out_features=self.out_features // self.groups, groups=1)


@dataclass(frozen=True)
class FactorSpec:
    """A weight's format, modes and ranks: all that is needed to lay out its cores.

    The modes are those of one group's weight (channels for a convolution).
    """

    format: str
    weight: WeightShape
    out_modes: tuple[int, ...]
    in_modes: tuple[int, ...]
    ranks: tuple[int, ...]

    @property
    def core_shapes(self) -> tuple[tuple[int, ...], ...]:
        """Shapes of the stored cores; grouped convolutions have the group as leading axis."""
        shapes = get_format(self.format).group_core_shapes(self)
        groups = self.weight.groups
        return shapes if groups == 1 else tuple((groups, *shape) for shape in shapes)

    @property
    def n_params(self) -> int:
        """Entries of all cores."""
        return sum(math.prod(shape) for shape in self.core_shapes)

    def one_group(self) -> FactorSpec:
        """The spec of a single group's cores."""
        return replace(self, weight=self.weight.one_group())

    def keywords(self) -> dict[str, Any]:
        """The arguments that ask a layer for this spec, as plain data."""
        modes = {"in_modes": list(self.in_modes), "out_modes": list(self.out_modes)}
        return {"format": self.format, "rank": list(self.ranks), **modes}

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, strings and lists, ready for JSON; ``from_dict`` reads them back."""
        weight = self.weight
        return {
            "format": self.format,
            "kind": weight.kind,
            "out_features": weight.out_features,
            "in_features": weight.in_features,
            "kernel": list(weight.kernel),
            "groups": weight.groups,
            "out_modes": list(self.out_modes),
            "in_modes": list(self.in_modes),
            "ranks": list(self.ranks),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> FactorSpec:
        """Read a spec back and check it.

        Raises:
            ShapeError: A field is missing, or the numbers do not describe a weight.
        """
        try:
            weight = WeightShape(
                data["kind"],
                int(data["out_features"]),
                int(data["in_features"]),
                tuple(int(k) for k in data["kernel"]),
                int(data["groups"]),
            )
            modes = (tuple(int(n) for n in data["out_modes"]), tuple(int(n) for n in data["in_modes"]))
            given = tuple(int(r) for r in data["ranks"])
            name = str(data["format"])
        except (KeyError, TypeError, ValueError) as error:
            raise ShapeError(
                f"a factorization needs kind, sizes, modes and ranks as whole numbers: {error!r} in {dict(data)}. "
                "Write it again with to_dict()."
            ) from error
        return get_format(name).spec(weight, rank=given, out_modes=modes[0], in_modes=modes[1], clip=False)
