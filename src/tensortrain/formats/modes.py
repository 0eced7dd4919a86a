"""Mode shapes: how a size is written as a product of a few factors.

Exact: among all ways to write ``n`` as ``d`` factors, the most balanced one (smallest sum of factors), smallest
factor first. At a given rank and given modes on the other side, the parameters of a train grow with that sum.

Padded: for sizes with large prime factors (30522, 50257), the factors with the least ``sum * product`` among those
whose product reaches ``n``. A product with the train costs about ``r^2`` times that many multiply-adds, so padding
is paid for where it is used. It has to save a tenth: a size that factors well stays as it is.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch

from tensortrain.contract import ChainShape, plan_chain
from tensortrain.errors import ShapeError
from tensortrain.tensor import resolve_ranks

__all__ = ["ModeChoice", "default_order", "search_modes", "suggest_modes", "suggest_padded_modes"]

_TYPICAL_MODE = 12  # modes near this size gave the best accuracy per parameter in arXiv:1509.06569, figure 1
_MOST_LISTS = 20_000  # looked at for one padded shape: some 50 ms
_WORTHWHILE = 0.9


def default_order(n: int) -> int:
    """How many modes a size is split into when nobody says: modes come out near 8 to 20."""
    return max(2, min(6, round(math.log(max(n, 2)) / math.log(_TYPICAL_MODE))))


def suggest_modes(n: int, d: int | None = None, *, pad: bool | float = False) -> tuple[int, ...]:
    """Balanced factors of ``n``, or of a number a little above it.

    Args:
        n: Size to split, at least 1.
        d: Number of modes; ``None`` chooses it from the size.
        pad: ``False`` for factors of ``n`` itself; ``True`` lets their product exceed ``n`` where that makes the
            train cheaper; a number is also the largest share of padding, ``product <= n (1 + pad)``.

    Returns:
        tuple: ``d`` factors, ascending. Product exactly ``n`` (ones where ``n`` has too few factors), or at least
        ``n`` with ``pad``.

    Raises:
        ShapeError: ``n`` or ``d`` is below 1, or ``pad`` is negative or not a number.

    Cost: below a tenth of a second up to ``n = 10^9`` and ``d = 10``: factors by trial division, padded shapes from the
    balanced one outward, at most 20,000 of them.
    Source: padding and balance as in arXiv:1901.10787, which takes the largest entropy of the factors; at equal
    products the smallest sum is the same aim, and sums tell what the parameters are.

    Example:
        >>> suggest_modes(4096, 3), suggest_modes(768, 3), suggest_modes(10, 3)
        ((16, 16, 16), (8, 8, 12), (1, 2, 5))
        >>> suggest_modes(50257, 3), suggest_modes(50257, 3, pad=True), suggest_modes(768, 3, pad=True)
        ((1, 29, 1733), (36, 36, 39), (8, 8, 12))
    """
    if n < 1 or (d is not None and d < 1):
        raise ShapeError(f"a size and its number of modes must be at least 1: found n={n}, d={d}. Pass n >= 1.")
    if not 0 <= pad < math.inf:
        raise ShapeError(f"a share of padding must be 0 or more: found pad={pad!r}. Pass True, or for example 0.05.")
    order = default_order(n) if d is None else d
    exact = _exact(n, order)
    limit = n if pad is False else math.inf if pad is True else math.floor(n * (1 + pad))
    return exact if limit <= n else _PaddedSearch(n, limit, exact).best


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


@dataclass(frozen=True)
class ModeChoice:
    """One way to shape a linear weight, and what it costs.

    Args:
        out_modes, in_modes: As ``tensortrain.nn.Linear`` takes them.
        ranks: Clipped to what the modes allow.
        n_params: Entries of the cores.
        flops: Of one call of the planned batch, factorized.
        predicted_s: Of the same, seconds.
        padding: Share by which both sizes together exceed the weight's, 0 for exact modes.
    """

    out_modes: tuple[int, ...]
    in_modes: tuple[int, ...]
    ranks: tuple[int, ...]
    n_params: int
    flops: int
    predicted_s: float
    padding: float


def search_modes(
    out_features: int,
    in_features: int,
    *,
    rank: int = 8,
    batch: int = 1,
    pad: bool | float = False,
    orders: Sequence[int] = (2, 3, 4, 5, 6),
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> list[ModeChoice]:
    """Candidate modes of a linear weight as a train, those that nothing beats in both parameters and time.

    Args:
        out_features, in_features: Sizes of the weight.
        rank: Rank of every bond, clipped.
        batch: Rows for which the time is predicted.
        pad: As in ``suggest_modes``; a ``Linear`` pads its input and cuts its output.
        orders: Numbers of modes to try, each with output modes descending and ascending.
        dtype, device: For the prediction.

    Returns:
        list: Fewest parameters first, so the last one is the fastest. No other candidate has both fewer parameters
        and less time than one of them.

    Raises:
        ShapeError: A size, an order or ``pad`` that ``suggest_modes`` refuses.
        RankError: A rank below 1.

    Example:
        >>> search_modes(768, 3072, rank=8)[0].n_params
        3364
    """
    found: dict[tuple[tuple[int, ...], tuple[int, ...]], ModeChoice] = {}
    for d in orders:
        ins, outs = suggest_modes(in_features, d, pad=pad), suggest_modes(out_features, d, pad=pad)
        for arranged in (outs[::-1], outs):
            ranks = resolve_ranks([m * n for m, n in zip(arranged, ins, strict=True)], rank)
            chain = ChainShape(arranged, ins, ranks)
            plan = plan_chain(chain, batch=batch, dtype=dtype, device=device, force="factorized")
            padding = chain.out_features * chain.in_features / (out_features * in_features) - 1
            found[arranged, ins] = ModeChoice(
                arranged, ins, ranks, chain.n_params, plan.flops, plan.predicted_s, padding
            )
    ranked = sorted(found.values(), key=lambda one: (one.n_params, one.predicted_s))
    kept: list[ModeChoice] = []
    for one in ranked:
        if not kept or one.predicted_s < kept[-1].predicted_s:
            kept.append(one)
    return kept


# -- exact -------------------------------------------------------------------------------------------------


@lru_cache(maxsize=4096)
def _exact(n: int, d: int) -> tuple[int, ...]:
    """The ``d`` factors of ``n`` with the smallest sum (of these, the smallest large ones), ascending.

    The best list with smallest factor f is f before the best list of ``n / f``, so a table over divisors will do;
    candidates for f go down from the balanced one, until even equal factors of the rest could not make up for f.
    """
    divisors = _divisors(n)
    table: dict[tuple[int, int], tuple[int, ...]] = {}

    def best_of(m: int, k: int) -> tuple[int, ...]:
        if k == 1 or m == 1:
            return (1,) * (k - 1) + (m,)
        found = table.get((m, k))
        if found is None:
            found = table[m, k] = search(m, k)
        return found

    def search(m: int, k: int) -> tuple[int, ...]:
        best: tuple[int, ...] | None = None
        for factor in reversed(divisors):
            if factor**k > m or m % factor:
                continue
            if best is not None and factor + _least_sum(m / factor, k - 1) > sum(best) + 0.5:
                break
            found = tuple(sorted((factor, *best_of(m // factor, k - 1))))
            if best is None or (sum(found), found[::-1]) < (sum(best), best[::-1]):
                best = found
        assert best is not None  # 1 divides m
        return best

    return best_of(n, d)


def _least_sum(product: float, count: int) -> float:
    """No ``count`` factors of that product have a smaller sum: that of equal ones."""
    return count * product ** (1 / count)


@lru_cache(maxsize=4096)
def _divisors(n: int) -> tuple[int, ...]:
    small = [k for k in range(1, math.isqrt(n) + 1) if n % k == 0]
    return tuple(small + [n // k for k in reversed(small) if k * k != n])


# -- padded ------------------------------------------------------------------------------------------------


class _PaddedSearch:
    """Depth first over ascending factors, from the balanced ones outward, cut off where no list below can win."""

    def __init__(self, n: int, limit: float, exact: tuple[int, ...]) -> None:
        self.n, self.limit, self.best = n, limit, exact
        # Padding must save a tenth: below that the copies that it takes cost more.
        self._score: tuple[float, int, tuple[int, ...]] = (_WORTHWHILE * self._of(exact)[0], 0, ())
        self._n_left = _MOST_LISTS
        self._extend((), 1, len(exact))

    @staticmethod
    def _of(modes: tuple[int, ...]) -> tuple[float, int, tuple[int, ...]]:
        product = math.prod(modes)
        return sum(modes) * product, product, modes[::-1]

    def _extend(self, chosen: tuple[int, ...], product: int, count: int) -> None:
        need = -(-self.n // product)
        least = chosen[-1] if chosen else 1
        if count == 1:
            self._n_left -= 1
            modes = (*chosen, max(need, least))
            if math.prod(modes) <= self.limit and self._of(modes) < self._score:
                self.best, self._score = modes, self._of(modes)
            return
        for factor in range(_root_above(need, count), least - 1, -1):
            so_far = sum(chosen) + factor
            # The rest of the bound grows as the factor moves away from the balanced one.
            bound = (so_far + _least_sum(self.n / (product * factor), count - 1)) * self.n
            if self._n_left <= 0 or (factor * factor ** (count - 1) < need and bound > self._score[0]):
                return
            self._extend((*chosen, factor), product * factor, count - 1)


def _root_above(n: int, d: int) -> int:
    """The smallest number whose d-th power is at least ``n``."""
    root = max(1, round(n ** (1 / d)) - 1)
    while root**d < n:
        root += 1
    return root


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
