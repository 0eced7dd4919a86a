"""Ranks: what a caller may ask for, and what the modes allow."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from fractions import Fraction

from tensortrain.errors import RankError, ShapeError

__all__ = ["RankLike", "count_params", "max_ranks", "ranks_within", "resolve_ranks"]

RankLike = int | float | str | Sequence[int]


def max_ranks(modes: Sequence[int]) -> tuple[int, ...]:
    """Largest ranks a train with these modes can need.

    Args:
        modes: ``(n_1 .. n_d)``; for a TTMatrix the merged sizes ``i_k * j_k``.

    Returns:
        Length ``d + 1``: ``min(n_1 .. n_k, n_{k+1} .. n_d)`` (products), 1 at both ends.

    Example:
        >>> max_ranks((2, 3, 4))
        (1, 2, 4, 1)
    """
    caps = [1]
    for n in modes:
        caps.append(max(1, caps[-1] * n))
    right = 1
    for k in range(len(modes) - 1, -1, -1):
        caps[k + 1] = min(caps[k + 1], right)
        right = max(1, right * modes[k])
    return tuple(caps)


def count_params(modes: Sequence[int], ranks: Sequence[int]) -> int:
    """Number of stored entries: the sum of ``r_k * n_k * r_{k+1}``."""
    return sum(r * n * s for r, n, s in zip(ranks[:-1], modes, ranks[1:], strict=True))


def resolve_ranks(modes: Sequence[int], rank: RankLike, *, clip: bool = True) -> tuple[int, ...]:
    """Turn a rank as a caller writes it into the tuple of all ranks.

    Args:
        modes: ``(n_1 .. n_d)``; for a TTMatrix the merged sizes ``i_k * j_k``.
        rank: An int for every bond; a tuple of the ``d - 1`` inner ranks, or of all ``d + 1`` with ones at
            the ends; a float in ``(0, 1]``, the share of the dense parameters (the largest uniform rank
            that fits, at least 1); ``"same"``, the uniform rank whose number of parameters is closest to that of the
            dense tensor; or ``"full"``, the largest ranks the modes can need.
        clip: Whether a tuple is cut down to what the modes allow. A number or a share always is.

    Returns:
        Ranks of length ``d + 1``, 1 at both ends.

    Raises:
        RankError: The rank is below 1, a share outside ``(0, 1]``, or a tuple of the wrong length.
        ShapeError: There are no modes.

    Example:
        >>> resolve_ranks((4, 4, 4), 8)
        (1, 4, 4, 1)
        >>> resolve_ranks((4, 4, 4), (8, 2), clip=False)
        (1, 8, 2, 1)
    """
    modes = tuple(int(n) for n in modes)
    if not modes:
        raise ShapeError("a train must have a mode: modes has length 0, expected at least 1. Pass one size or more.")
    caps = max_ranks(modes)
    if isinstance(rank, str):
        if rank not in ("same", "full"):
            raise RankError(
                f"a rank in words must be known: rank has {rank!r}, expected 'same' or 'full'. Pass a number."
            )
        return caps if rank == "full" else _same_ranks(modes, caps)
    if isinstance(rank, float):
        return _share_ranks(modes, caps, rank)
    if isinstance(rank, Sequence) and not isinstance(rank, str):
        given = _full_tuple(rank, len(modes))
        return tuple(map(min, given, caps)) if clip else given
    if isinstance(rank, bool) or not hasattr(rank, "__index__"):
        raise RankError(
            f"a rank must be an int, a tuple, a share or 'same': rank has {rank!r}, expected one of these. "
            "Pass rank=8, for instance."
        )
    return _clip_uniform(caps, _at_least_one(rank))


def _clip_uniform(caps: Sequence[int], rank: int) -> tuple[int, ...]:
    return tuple(min(rank, cap) for cap in caps)


def _at_least_one(rank: object) -> int:
    try:
        value = operator.index(rank)  # type: ignore[arg-type]
    except TypeError:
        raise RankError(
            f"every rank must be a whole number: rank has {rank!r}, expected an int. Pass integers."
        ) from None
    if value < 1:
        raise RankError(f"every rank must be at least 1: rank has {value}, expected 1 or more. Raise it.")
    return value


def _full_tuple(rank: Sequence[int], order: int) -> tuple[int, ...]:
    ranks = tuple(_at_least_one(r) for r in rank)
    if len(ranks) == order - 1:
        return (1, *ranks, 1)
    if len(ranks) != order + 1:
        raise RankError(
            f"a rank tuple must fit the order: rank has {len(ranks)} entries, expected {order - 1} inner ranks or "
            f"{order + 1} with the boundary ones. Pass one rank between each pair of neighbouring modes."
        )
    if ranks[0] != 1 or ranks[-1] != 1:
        raise RankError(
            f"boundary ranks must be 1: rank has {ranks[0]} and {ranks[-1]} at its ends, expected 1 and 1. "
            "Leave the boundary ranks out, or set them to 1."
        )
    return ranks


def _share_ranks(modes: Sequence[int], caps: Sequence[int], share: float) -> tuple[int, ...]:
    if not 0.0 < share <= 1.0:  # also catches NaN
        raise RankError(
            f"a share must lie in (0, 1]: rank has {share}, expected a fraction of the dense parameters. "
            "Pass an int for a rank itself."
        )
    allowed = Fraction(share) * math.prod(modes)  # a fraction: 2,000 modes overflow a float
    low, high = 1, max(caps)
    while low < high:
        middle = (low + high + 1) // 2
        if count_params(modes, _clip_uniform(caps, middle)) <= allowed:
            low = middle
        else:
            high = middle - 1
    return _clip_uniform(caps, low)


def _same_ranks(modes: Sequence[int], caps: Sequence[int]) -> tuple[int, ...]:
    below = _share_ranks(modes, caps, 1.0)
    above = _clip_uniform(caps, max(below) + 1)
    return min(below, above, key=lambda ranks: abs(count_params(modes, ranks) - math.prod(modes)))


def ranks_within(modes: Sequence[int], energies: Sequence[Sequence[float]], max_params: int) -> tuple[int, ...]:
    """Ranks that lose little energy among the trains of at most so many entries.

    From rank 1 on, the bond grows next that wins most energy for each entry it costs.

    Args:
        modes: ``(n_1 .. n_d)``.
        energies: Squared singular values at each of the ``d - 1`` bonds, descending.
        max_params: Largest number of stored entries, at least that of rank 1.

    Returns:
        Length ``d + 1``.
    """
    ranks = [1] * (len(modes) + 1)
    while True:
        spare = max_params - count_params(modes, ranks)
        best, best_gain = None, 0.0
        for k, energy in enumerate(energies, start=1):
            cost = ranks[k - 1] * modes[k - 1] + modes[k] * ranks[k + 1]
            reach = min(len(energy), ranks[k - 1] * modes[k - 1], modes[k] * ranks[k + 1])
            if ranks[k] < reach and cost <= spare and energy[ranks[k]] > best_gain * cost:
                best, best_gain = k, energy[ranks[k]] / cost
        if best is None:
            return tuple(ranks)
        ranks[best] += 1
