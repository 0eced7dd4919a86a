"""Orders that grow from the closest pair."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["greedy_order"]


def greedy_order(likeness: Tensor) -> list[int]:
    """Start with the closest pair, and put the site that is closest to one of the two ends there, until none is left.

    Equal ones are told apart by what they share with all that is placed.

    Args:
        likeness: ``(d, d)`` symmetric, not negative, zero on the diagonal.
    """
    d = likeness.shape[0]
    if d < 2:
        return list(range(d))
    first = int(likeness.argmax())
    order = [first // d, first % d] if first // d != first % d else [0, 1]
    is_free = torch.ones(d, dtype=torch.bool)
    is_free[order] = False
    while len(order) < d:
        free = is_free.nonzero().flatten()
        ends = torch.stack((likeness[order[0], free], likeness[order[-1], free]))
        best = ends == ends.max()
        shared = likeness[free][:, order].sum(1).where(best, -1.0)  # 2 n
        choice = int(shared.argmax())
        site = int(free[choice % len(free)])
        order = [site, *order] if choice < len(free) else [*order, site]
        is_free[site] = False
    return order
