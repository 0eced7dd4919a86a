"""The best of all orders, by the best order of every set of sites."""

from __future__ import annotations

import torch
from torch import Tensor

from tensortrain.errors import RankError

__all__ = ["exact_order", "least_order"]

_MOST = 20  # sites; the tables have 2^d entries


def exact_order(likeness: Tensor) -> list[int]:
    """The order with the least ``sum I_ij |place_i - place_j|``.

    That sum is, over all bonds, of what crosses the bond, which depends on the set of sites before it alone.

    Args:
        likeness: ``(d, d)`` symmetric, not negative, zero on the diagonal; ``d`` at most 20.

    Raises:
        RankError: There are more sites.
    """
    d = likeness.shape[0]
    if d > _MOST:
        raise RankError(
            f"an exact order must have few sites: x has {d}, expected {_MOST} or fewer. Take method='swap'."
        )
    crossing = likeness.new_zeros(1)
    inside = likeness.new_zeros(1, d)  # what each site shares with the set
    whole = likeness.sum(1)
    for site in range(d):  # sets of the sites before it, then these with it
        crossing = torch.cat((crossing, crossing + whole[site] - 2 * inside[:, site]))
        inside = torch.cat((inside, inside + likeness[site]))
    return least_order(crossing)


def least_order(cost: Tensor) -> list[int]:
    """The order whose sets of first sites have the least sum of costs.

    Args:
        cost: ``(2^d,)``: of the set whose members are the bits of its number, site 0 the lowest.

    Cost: O(2^d d) flops. Held and Karp, 1962.
    """
    d = len(cost).bit_length() - 1
    numbers = torch.arange(len(cost))
    sizes = sum((numbers >> site) & 1 for site in range(d))
    best = torch.full((len(cost),), torch.inf, dtype=cost.dtype)
    last = torch.zeros(len(cost), dtype=torch.long)
    best[0] = 0.0
    for size in range(1, d + 1):
        sets = numbers[sizes == size]
        for site in range(d):
            with_it = sets[(sets >> site) & 1 == 1]
            reached = best[with_it ^ (1 << site)] + cost[with_it]
            better = reached < best[with_it]
            best[with_it[better]], last[with_it[better]] = reached[better], site
    order, rest = [], len(cost) - 1
    while rest:
        order.append(int(last[rest]))
        rest ^= 1 << order[-1]
    return order[::-1]
