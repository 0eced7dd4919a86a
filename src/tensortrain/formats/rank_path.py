"""Ranks of one weight from low to high: what each further parameter buys.

The squared error of a format is at most the sum of the tails of its matricizations' spectra (Oseledets 2011,
theorem 2.2), so every rank has a price in parameters and a gain in error. Raising the rank with the best
gain per parameter, step by step, traces a path from rank one to exact.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .registry import get_format
from .spec import FactorSpec

__all__ = ["RankPoint", "even_path", "rank_path"]

_ROUNDEST = 16  # numbers in a register of the widest kind, or two or four of others
Count = Callable[[Sequence[int]], int]  # inner ranks -> parameters


@dataclass(frozen=True)
class RankPoint:
    """Ranks of one weight, their parameters, and the predicted relative error (a bound)."""

    spec: FactorSpec
    n_params: int
    rel_error: float


def rank_path(
    spec: FactorSpec, spectra: Sequence[Tensor], *, max_params: int | None = None, growth: float = 0.08
) -> list[RankPoint]:
    """Greedy path over the ranks of a format.

    Args:
        spec: Format and modes; its ranks are ignored.
        spectra: Singular values per chosen rank, from ``Format.spectra``.
        max_params: Stop before this many parameters.
        growth: A step raises a rank by about this share of itself, at least by one, to a round number.

    Returns:
        list: Points with growing ``n_params`` and falling ``rel_error``, from all ranks one.

    Cost: O(steps) evaluations of the parameter count; no tensor work.
    """
    tails = [_tails(values) for values in spectra]
    # Ranks that nothing is left for are no ranks.
    caps = [min(cap, max(1, len(tail) - 1)) for cap, tail in zip(_inner_caps(spec), tails, strict=True)]
    bonds = get_format(spec.format).tied_ranks(spec)
    count = get_format(spec.format).param_counter(spec)
    ranks = [1] * len(tails)
    points: list[RankPoint] = []
    while True:
        point = _point(spec, ranks, bonds, tails, count)
        if max_params is not None and point.n_params > max_params:
            break
        points.append(point)
        step = _best_step(spec, ranks, bonds, tails, caps, growth, count)
        if step is None:
            break
        ranks = step
    return points


def even_path(
    spec: FactorSpec, spectra: Sequence[Tensor], *, max_params: int | None = None, growth: float = 0.08
) -> list[RankPoint]:
    """The path on which all ranks are equal, up to what the shape allows.

    Arguments and points as for ``rank_path``. Its errors are larger, but no bond is narrow: the weight keeps a high
    matrix rank, which training after the decomposition can use.
    """
    tails = [_tails(values) for values in spectra]
    caps = _inner_caps(spec)
    bonds = get_format(spec.format).tied_ranks(spec)
    count = get_format(spec.format).param_counter(spec)
    points: list[RankPoint] = []
    rank = 1
    while rank <= max(caps):
        point = _point(spec, [min(rank, cap) for cap in caps], bonds, tails, count)
        if max_params is not None and point.n_params > max_params:
            break
        points.append(point)
        rank = _raised(rank, growth)
    return points


def _raised(rank: int, growth: float) -> int:
    """The next rank to look at: a round number, which products run fastest at and many layers may share."""
    step = max(1, int(growth * rank))
    round_to = min(_ROUNDEST, 1 << (step.bit_length() - 1))
    return (rank + step) // round_to * round_to


def _inner_caps(spec: FactorSpec) -> tuple[int, ...]:
    fmt = get_format(spec.format)
    return fmt.inner_ranks(replace(spec, ranks=fmt.rank_caps(spec)))


def _point(
    spec: FactorSpec, ranks: Sequence[int], bonds: Sequence[tuple[int, ...]], tails: Sequence[list[float]], count: Count
) -> RankPoint:
    current = get_format(spec.format).with_inner(spec, ranks)
    squared = sum(_tail(tails[bond[0]], ranks[bond[0]]) for bond in bonds)
    return RankPoint(current, count(ranks), math.sqrt(squared))


def _best_step(
    spec: FactorSpec,
    ranks: Sequence[int],
    bonds: Sequence[tuple[int, ...]],
    tails: Sequence[list[float]],
    caps: Sequence[int],
    growth: float,
    count: Count,
) -> list[int] | None:
    """The ranks after raising one bond, where that gains most for each parameter."""
    best: tuple[float, list[int]] | None = None
    fmt = get_format(spec.format)
    n_params = count(ranks)
    for bond in bonds:
        rank = ranks[bond[0]]
        raised = min(_raised(rank, growth), caps[bond[0]], fmt.most_rank(spec, ranks, bond))
        if raised <= rank:
            continue
        trial = [raised if k in bond else r for k, r in enumerate(ranks)]
        gain = _tail(tails[bond[0]], rank) - _tail(tails[bond[0]], raised)
        merit = gain / max(count(trial) - n_params, 1)
        if merit > 0 and (best is None or merit > best[0]):
            best = (merit, trial)
    return None if best is None else best[1]


def _tails(values: Tensor) -> list[float]:
    """``tails[r]``: share of the energy that rank ``r`` discards."""
    energy = values.double().square()
    total = energy.sum()
    if not bool(total > 0):
        return [0.0]
    tails = torch.cat([energy.flip(0).cumsum(0).flip(0), energy.new_zeros(1)]) / total
    found: list[float] = tails.tolist()
    return found[: found.index(0.0) + 1]


def _tail(tail: list[float], rank: int) -> float:
    return tail[rank] if rank < len(tail) else 0.0
