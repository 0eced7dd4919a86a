"""Ranks of formats that are no chain: what a caller may ask for, and the tuple that comes of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from tensortrain.errors import RankError

from .spec import Rank

__all__ = ["clips", "resolve_rank_tuple"]

Ranks = tuple[int, ...]


def clips(rank: Rank, clip: bool | None) -> bool:
    """Whether ranks are cut down to the feasible ones: a tuple is taken as given, unless the caller says more."""
    return (not isinstance(rank, Sequence) or isinstance(rank, str)) if clip is None else clip


def resolve_rank_tuple(
    rank: Rank,
    caps: Ranks,
    *,
    clip: bool,
    what: str,
    dense_params: int,
    count: Callable[[Ranks], int],
    full: Ranks | None = None,
    expand: Callable[[int], Ranks] | None = None,
) -> Ranks:
    """Turn a rank as a caller writes it into one rank per entry of ``caps``.

    Args:
        rank: A number for all, a tuple, a share of the dense parameters in (0, 1], ``"same"`` (about as many parameters
            as dense), or ``"full"``.
        caps: Largest useful ranks.
        clip: Whether a tuple is cut down to ``caps``; a number or a share always is.
        what: The ranks in words, for messages, such as ``"tucker2 takes two ranks (R_in, R_out)"``.
        dense_params: What a share is a share of.
        count: Parameters at some ranks.
        full: What ``"full"`` gives, where every weight is exact as far as the format can; ``caps`` when left out.
        expand: All ranks from one number; clipped to ``caps`` when left out.

    Raises:
        RankError: A rank below one, a tuple of another length, a share outside (0, 1].
    """
    each = expand if expand is not None else lambda r: tuple(min(r, cap) for cap in caps)
    if isinstance(rank, str):
        if rank not in ("same", "full"):
            raise RankError(f"a rank must be a number, a tuple, a share or 'same': found {rank!r}. Pass one of these.")
        if rank == "full":
            return caps if full is None else full
        below = _share(1.0, each, max(caps), lambda ranks: count(ranks) <= dense_params)
        above = each(max(below) + 1)
        return min(below, above, key=lambda ranks: abs(count(ranks) - dense_params))
    if isinstance(rank, Sequence):
        given: tuple[Any, ...] = tuple(rank)
        if len(given) != len(caps) or not all(_is_rank(r) for r in given):
            raise RankError(f"{what}, each at least 1: found {given}. Pass rank={caps} or smaller.")
        return tuple(map(min, given, caps)) if clip else given
    if isinstance(rank, float):
        return _share(rank, each, max(caps), lambda ranks: count(ranks) <= rank * dense_params)
    if not _is_rank(rank):
        raise RankError(f"a rank must be at least 1: found {rank!r}. Pass a positive whole number.")
    return each(int(rank))


def _is_rank(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _share(share: float, each: Callable[[int], Ranks], most: int, fits: Callable[[Ranks], bool]) -> Ranks:
    """The largest uniform rank that fits, at least 1."""
    if not 0 < share <= 1:
        raise RankError(f"a rank given as a share must lie in (0, 1]: found {share}. Pass for example 0.25.")
    low, high = 1, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(each(middle)) else (low, middle - 1)
    return each(low)
