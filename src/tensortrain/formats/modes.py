"""Mode shapes: how a size is written as a product of a few factors.

Rule: among all ways to write ``n`` as ``d`` factors take the most balanced one (smallest sum of factors),
smallest factor first. Sizes with large prime factors (30522, 50257) can be padded up where padding is
harmless, as in an embedding table: then the smallest padding wins among the balanced shapes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import lru_cache

from tensortrain.errors import ShapeError

__all__ = ["default_order", "suggest_modes", "suggest_padded_modes"]

_TYPICAL_MODE = 12  # modes near this size gave the best accuracy per parameter in arXiv:1509.06569, figure 1


def default_order(n: int) -> int:
    """How many modes a size is split into when nobody says: modes come out near 8 to 20."""
    return max(2, min(6, round(math.log(max(n, 2)) / math.log(_TYPICAL_MODE))))


def suggest_modes(n: int, d: int | None = None) -> tuple[int, ...]:
    """Balanced factors of ``n``.

    Args:
        n: Size to split, at least 1.
        d: Number of modes; ``None`` chooses it from the size.

    Returns:
        tuple: ``d`` factors, ascending, product exactly ``n`` (ones where ``n`` has too few factors).

    Raises:
        ShapeError: ``n`` or ``d`` is below 1.

    Example:
        >>> suggest_modes(4096, 3), suggest_modes(768, 3), suggest_modes(10, 3)
        ((16, 16, 16), (8, 8, 12), (1, 2, 5))
    """
    if n < 1 or (d is not None and d < 1):
        raise ShapeError(f"a size and its number of modes must be at least 1: found n={n}, d={d}. Pass n >= 1.")
    order = default_order(n) if d is None else d
    return min(_factorizations(n, order), key=lambda modes: (sum(modes), modes[::-1]))


def suggest_padded_modes(n: int, d: int | None = None, *, most_padding: float = 0.02) -> tuple[int, ...]:
    """Balanced factors whose product is at least ``n`` and exceeds it by a small share.

    Searched over all ascending factor lists with factors within a factor 1.6 of ``n ** (1 / d)``.

    Example:
        >>> suggest_padded_modes(30522, 3)
        (29, 31, 34)
    """
    order = default_order(n) if d is None else d
    if order <= 1 or n < 4:
        return suggest_modes(n, order)
    root = n ** (1 / order)
    low, high = max(1, math.floor(root / 1.6)), math.ceil(root * 1.6) + 1
    near = [m for m in _padded(n, order, low, high) if math.prod(m) <= n * (1 + most_padding)]
    if not near:
        near = list(_padded(n, order, low, high))
    return min(near, key=lambda modes: (sum(modes), math.prod(modes), modes))


def _factorizations(n: int, d: int, least: int = 1) -> Iterator[tuple[int, ...]]:
    """All ascending ways to write ``n`` as ``d`` factors."""
    if d == 1:
        if n >= least:
            yield (n,)
        return
    for factor in _divisors(n):
        if factor < least or factor**d > n:
            continue
        for rest in _factorizations(n // factor, d - 1, factor):
            yield (factor, *rest)


@lru_cache(maxsize=4096)
def _divisors(n: int) -> tuple[int, ...]:
    small = [k for k in range(1, math.isqrt(n) + 1) if n % k == 0]
    return tuple(small + [n // k for k in reversed(small) if k * k != n])


def _padded(n: int, d: int, low: int, high: int) -> Iterator[tuple[int, ...]]:
    """Ascending lists of ``d`` factors in ``[low, high]``, the last as small as reaches ``n``."""
    if d == 1:
        last = max(low, n)
        if last <= high:
            yield (last,)
        return
    for factor in range(low, high + 1):
        if factor**d > n * 1.6**d:
            return
        for rest in _padded(-(-n // factor), d - 1, factor, high):
            yield (factor, *rest)
