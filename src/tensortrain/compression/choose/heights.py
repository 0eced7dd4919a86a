"""How often a layer loses what is predicted of it, by how large the error is: what was seen of a few of its forms."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["AS_PREDICTED", "Heights"]


@dataclass(frozen=True)
class Heights:
    """Of one layer. Without marks predictions are taken as they are.

    Attributes:
        marks: Relative squared errors as predicted, and how many times as much was seen; the smallest error first.

    Example:
        >>> Heights(((0.01, 8.0), (0.04, 4.0))).of(0.02)
        0.11313708498984761
    """

    marks: tuple[tuple[float, float], ...] = ()

    @classmethod
    def through(cls, marks: Sequence[tuple[float, float]]) -> Heights:
        """Marks in order; of two the larger error never spoils less."""
        kept: list[tuple[float, float]] = []
        for error, times in sorted(marks):
            least = kept[-1][0] * kept[-1][1] / error if kept else 0.0
            if not kept or error > kept[-1][0]:
                kept.append((error, max(times, least)))
        return cls(tuple(kept))

    def of(self, error: float) -> float:
        """The squared error that one stands for: between marks on a power law, beyond them as often as there."""
        if not self.marks:
            return error
        if error <= self.marks[0][0]:
            return error * self.marks[0][1]
        for (a, low), (b, high) in zip(self.marks, self.marks[1:], strict=False):
            if error <= b:
                share = math.log(error / a) / math.log(b / a)
                return error * low ** (1 - share) * high**share
        return error * self.marks[-1][1]


AS_PREDICTED = Heights()
