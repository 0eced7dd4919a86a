"""A chain of cores drawn with characters, as tensor networks are drawn on paper."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["draw_chain"]

_LONGEST = 24  # cores drawn; a longer chain is cut in the middle


def draw_chain(ranks: Sequence[int], legs: Sequence[Sequence[int]]) -> str:
    """Dots for cores, joined by their ranks; one leg down for a train, one up and one down for a matrix.

    Args:
        ranks: Length ``d + 1`` with the ends, which are not drawn.
        legs: For each of the ``d`` cores the sizes of its one or two modes; of two the first points up.
    """
    d = len(legs)
    chosen = list(range(d)) if d <= _LONGEST else [*range(_LONGEST // 2), *range(d - _LONGEST // 2, d)]
    columns = [
        _column(legs[k], ranks[k + 1] if k + 1 < d else None, d > _LONGEST and k == chosen[_LONGEST // 2 - 1])
        for k in chosen
    ]
    return "\n".join("".join(parts).rstrip() for parts in zip(*columns, strict=True))


def _column(sizes: Sequence[int], rank: int | None, is_cut: bool) -> list[str]:
    """The lines of one core with the bond to its right, all of one width."""
    bond = "" if rank is None else f"─{rank}─ ·· ─" if is_cut else f"─{rank}─"
    down = ["│", str(sizes[-1])]
    lines = [f"●{bond}", *down] if len(sizes) == 1 else [str(sizes[0]), "│", f"●{bond}", *down]
    width = max(map(len, lines)) + (rank is not None and max(map(len, down)) >= 1 + len(bond))
    return [line.ljust(width, "─" if line.startswith("●") and rank is not None else " ") for line in lines]
