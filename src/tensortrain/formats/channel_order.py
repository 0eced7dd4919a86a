"""The order of channels before a train: which outputs and inputs of a weight stand next to each other.

A train sees a channel as digits, and is small where channels with the same digit are alike. Trained layers number
their channels at random, so the numbering is free to choose. With the cores held, the best one is an assignment of the
weight's rows, or columns, to those of what the cores make; with the numbering held, cores come from a decomposition.
The two are taken in turns.

Source: the order as a variable beside the factors, as in Martinez et al., "Permute, quantize, and fine-tune",
arXiv:2010.15703, with the assignment solved exactly (Kuhn's method in SciPy).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from tensortrain.errors import ShapeError

from .spec import WeightShape
from .weighting import Weighting, times_moment

__all__ = ["NATURAL", "ChannelOrder", "FoundOrder", "Ordered", "search_order"]

Ordered = Literal["in", "out", "both"]
Approximate = Callable[[Tensor, Weighting], Tensor]  # an ordered matrix and what weighs it -> what cores make of it
_ROUNDS = 6
_LEAST_GAIN = 0.005  # of the error, for which another round is worth its time
_MOST_CHANNELS = 2048  # of a side that is assigned: seconds


@dataclass(frozen=True)
class ChannelOrder:
    """Where the channels of a linear weight stand in a train.

    Attributes:
        outputs, inputs: Place k holds output ``outputs[k]``, or input ``inputs[k]``; None where they are as they are.

    Example:
        >>> ChannelOrder(inputs=(2, 0, 1)).of_weight(torch.tensor([[10, 11, 12]])).tolist()
        [[12, 10, 11]]
    """

    outputs: tuple[int, ...] | None = None
    inputs: tuple[int, ...] | None = None

    @classmethod
    def of(cls, outputs: Sequence[int] | None, inputs: Sequence[int] | None) -> ChannelOrder:
        """From any sequences; empty ones leave the channels as they are."""
        return cls(_numbers(outputs), _numbers(inputs))

    @property
    def sides(self) -> Ordered | None:
        """Which channels are not as they are."""
        if self.inputs is None:
            return None if self.outputs is None else "out"
        return "in" if self.outputs is None else "both"

    @property
    def n_numbers(self) -> int:
        """How many numbers it is told by."""
        return len(self.outputs or ()) + len(self.inputs or ())

    def check(self, weight: WeightShape) -> None:
        """Raise ``ShapeError`` where it is no order of the channels of a weight."""
        for name, order, n in (
            ("out_order", self.outputs, weight.out_features),
            ("in_order", self.inputs, weight.in_features),
        ):
            if order is not None and sorted(order) != list(range(n)):
                raise ShapeError(
                    f"an order must name every channel once: {name} has {len(order)} numbers, expected those from 0 to "
                    f"{n - 1}. Pass a permutation such as torch.randperm({n}).tolist()."
                )

    def of_weight(self, matrix: Tensor) -> Tensor:
        """A weight ``(outputs, inputs)`` with its channels in this order."""
        matrix = matrix if self.outputs is None else matrix[list(self.outputs)]
        return matrix if self.inputs is None else matrix[:, list(self.inputs)]

    def of_weighting(self, weighting: Weighting) -> Weighting:
        """Second moments of the same channels."""
        if self.sides is None or weighting.is_plain:
            return weighting
        return Weighting(_reordered(weighting.inputs, self.inputs), _reordered(weighting.outputs, self.outputs))


NATURAL = ChannelOrder()


@dataclass(frozen=True)
class FoundOrder:
    """An order with the relative error that it leaves, and that of the channels as they are."""

    order: ChannelOrder
    rel_error: float
    before: float


def search_order(
    matrix: Tensor, weighting: Weighting, approximate: Approximate, *, outputs: bool = True, inputs: bool = True
) -> FoundOrder:
    """An order of the channels in which cores of given ranks stand for a weight with less error.

    Two starts, the channels as they are and by their share of the first singular pair; the better one after a round is
    followed. Where outputs are weighed, assignments of inputs are exact up to correlations of the inputs, and the
    other way round; the errors that decide are those of the true norm.

    Args:
        matrix: ``(outputs, inputs)``.
        weighting: What its error is weighed by.
        approximate: What cores make of it.
        outputs, inputs: Which channels may move; a side of more than 2,048 stays.

    Cost: some ten decompositions and assignments; the latter take seconds at 2,000 channels.
    """
    work = _Search(matrix.double(), weighting, approximate)
    outputs, inputs = outputs and len(matrix) <= _MOST_CHANNELS, inputs and matrix.shape[1] <= _MOST_CHANNELS
    as_is = work.start(*(torch.arange(n, device=matrix.device) for n in matrix.shape))
    before = as_is.rel_error
    if not (outputs or inputs):
        return FoundOrder(NATURAL, before, before)
    starts = [as_is, work.start(*work.by_first_pair(outputs, inputs))]
    best = min((work.round(one, outputs, inputs) for one in starts), key=lambda one: one.rel_error)
    for _ in range(_ROUNDS - 1):
        last, best = best, work.round(best, outputs, inputs)
        if best.rel_error > (1 - _LEAST_GAIN) * last.rel_error:
            break
    if best.rel_error >= before:
        return FoundOrder(NATURAL, before, before)
    rows, columns = (tuple(order.tolist()) for order in (best.rows, best.columns))
    return FoundOrder(ChannelOrder(rows if outputs else None, columns if inputs else None), best.rel_error, before)


@dataclass(frozen=True)
class _State:
    """An order, what cores make of the weight in it, and the error of that."""

    rows: Tensor
    columns: Tensor
    made: Tensor
    rel_error: float


class _Search:
    def __init__(self, matrix: Tensor, weighting: Weighting, approximate: Approximate) -> None:
        self.matrix, self.weighting, self.approximate = matrix, weighting, approximate

    def start(self, rows: Tensor, columns: Tensor) -> _State:
        ordered, weighting = self.matrix[rows][:, columns], self._weighting(rows, columns)
        made = self.approximate(ordered, weighting).double()
        return _State(rows, columns, made, weighting.rel_error(ordered - made, ordered))

    def by_first_pair(self, outputs: bool, inputs: bool) -> tuple[Tensor, Tensor]:
        """Channels by their entries in the first singular vectors."""
        left, _, right = torch.svd_lowrank(self.matrix, q=2)
        rows, columns = (torch.arange(n, device=self.matrix.device) for n in self.matrix.shape)
        return left[:, 0].argsort() if outputs else rows, right[:, 0].argsort() if inputs else columns

    def round(self, state: _State, outputs: bool, inputs: bool) -> _State:
        """Rows assigned anew, then columns, with a decomposition after each; what is not better is not taken."""
        best = state
        if outputs:
            made = _columns_back(best.made, best.columns)
            weights = _diagonal(self.weighting.outputs, len(made))
            rows = _assigned(self.matrix, made, self.weighting.inputs, weights)
            best = min(best, self.start(rows, best.columns), key=_error)
        if inputs:
            made = _columns_back(best.made.T, best.rows)
            weights = _diagonal(self.weighting.inputs, len(made))
            columns = _assigned(self.matrix.T, made, self.weighting.outputs, weights)
            best = min(best, self.start(best.rows, columns), key=_error)
        return best

    def _weighting(self, rows: Tensor, columns: Tensor) -> Weighting:
        one = self.weighting
        if one.is_plain:
            return one
        return Weighting(_taken(one.inputs, columns), _taken(one.outputs, rows))


def _assigned(matrix: Tensor, made: Tensor, moment: Tensor | None, weights: Tensor) -> Tensor:
    """The row of a matrix for every row of another, so that the weighted distances are least together."""
    half = times_moment(made, moment)
    gain = weights[:, None] * (2 * matrix @ half.T - (half * made).sum(1))
    rows, places = linear_sum_assignment(gain.cpu().numpy(), maximize=True)
    found = torch.empty(len(rows), dtype=torch.int64)
    found[torch.from_numpy(places)] = torch.from_numpy(rows)
    return found.to(matrix.device)


def _error(state: _State) -> float:
    return state.rel_error


def _columns_back(made: Tensor, columns: Tensor) -> Tensor:
    """The columns of what was made where the matrix has them."""
    return torch.empty_like(made).index_copy_(1, columns, made)


def _diagonal(moment: Tensor | None, n: int) -> Tensor:
    if moment is None:
        return torch.ones(n, dtype=torch.float64)
    return (moment if moment.ndim == 1 else moment.diagonal()).double()


def _taken(moment: Tensor | None, order: Tensor) -> Tensor | None:
    if moment is None:
        return None
    return moment[order] if moment.ndim == 1 else moment[order][:, order]


def _reordered(moment: Tensor | None, order: Sequence[int] | None) -> Tensor | None:
    if moment is None or order is None:
        return moment
    return _taken(moment, torch.tensor(order, device=moment.device))


def _numbers(given: Sequence[int] | Tensor | None) -> tuple[int, ...] | None:
    if given is None or len(given) == 0:
        return None
    return tuple(int(n) for n in given)
