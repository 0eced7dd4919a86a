"""The order of channels before a train: which outputs and inputs of a weight stand next to each other.

A train sees a channel as digits, and is small where channels with the same digit are alike. Trained layers number
their channels at random, so the numbering is free to choose. With the cores held, the best one is an assignment of the
weight's rows, or columns, to those of what the cores make; with the numbering held, the best cores are a decomposition.
Each step lowers the error, so the two are taken in turns.

Source: the linear assignment is Kuhn's (SciPy's solver); alternating it with a low-rank fit is as in "stable ranks of
permuted matrices" (permute, quantize, fine-tune: Martinez et al., arXiv:2010.15703, who permute before codebooks).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from .spec import FactorSpec
from .weighting import Weighting, times_moment

__all__ = ["NATURAL", "ChannelOrder", "search_order"]

_ROUNDS = 12
_LEAST_GAIN = 2e-3  # of the error, for which another round is worth its time
_MOST_CHANNELS = 4096  # on one side: an assignment of so many takes half a minute


@dataclass(frozen=True)
class ChannelOrder:
    """Where the channels of a weight stand in its train: place k holds output ``outputs[k]``; None leaves them."""

    outputs: tuple[int, ...] | None = None
    inputs: tuple[int, ...] | None = None


NATURAL = ChannelOrder()
Fit = Callable[[Tensor, Weighting], Tensor]  # ordered matrix, its weighting -> the same from cores


def ordered(matrix: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    return matrix[rows][:, columns]


def ordered_weighting(weighting: Weighting, rows: Tensor, columns: Tensor) -> Weighting:
    def one(moment: Tensor | None, order: Tensor) -> Tensor | None:
        if moment is None:
            return None
        return moment[order] if moment.ndim == 1 else moment[order][:, order]

    return Weighting(one(weighting.inputs, columns), one(weighting.outputs, rows))


def assigned(gain: Tensor) -> Tensor:
    """The row for every place with the largest sum of ``gain[row, place]``."""
    rows, places = linear_sum_assignment(gain.cpu().numpy(), maximize=True)
    found = torch.empty(len(rows), dtype=torch.int64)
    found[torch.as_tensor(places)] = torch.as_tensor(rows)
    return found


def weights_of(moment: Tensor | None, n: int) -> Tensor:
    if moment is None:
        return torch.ones(n, dtype=torch.float64)
    return moment if moment.ndim == 1 else moment.diagonal()


def rows_for(matrix: Tensor, made: Tensor, columns_moment: Tensor | None, weights: Tensor) -> Tensor:
    """Which row of a matrix is best stood for by each row of another: least weighted distance."""
    half = times_moment(made, columns_moment)
    gain = 2 * matrix @ half.T - (half * made).sum(1)[None, :]
    return assigned(weights[:, None] * gain)


def search_order(
    matrix: Tensor, weighting: Weighting, fit: Fit, start: tuple[Tensor, Tensor], sides: str = "both", log=None
) -> tuple[Tensor, Tensor, float]:
    matrix = matrix.double()
    rows, columns = start
    f, h = weights_of(weighting.outputs, len(matrix)), weights_of(weighting.inputs, matrix.shape[1])
    best = (rows, columns, float("inf"))
    for n in range(_ROUNDS):
        for side in ("rows", "columns"):
            if sides not in ("both", side):
                continue
            made = fit(ordered(matrix, rows, columns), ordered_weighting(weighting, rows, columns))
            error = ordered_weighting(weighting, rows, columns).rel_error(
                ordered(matrix, rows, columns) - made, ordered(matrix, rows, columns)
            )
            if log is not None:
                log.append(round(error, 4))
            if error < best[2]:
                stop = error > (1 - _LEAST_GAIN) * best[2]
                best = (rows, columns, error)
            if side == "rows":
                placed = torch.empty_like(made)
                placed[:, columns] = made
                rows = rows_for(matrix, placed, weighting.inputs, f)
            else:
                placed = torch.empty_like(made)
                placed[rows] = made
                columns = rows_for(matrix.T, placed.T, weighting.outputs, h)
    return best
