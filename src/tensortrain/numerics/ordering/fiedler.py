"""Orders by the Fiedler vector: the best of all real coordinates, sorted."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["components", "fiedler_order"]

_NOTHING = 1e-12  # of the largest entry: rounding


def fiedler_order(likeness: Tensor) -> list[int]:
    """Sort the sites of each connected part by the second eigenvector of its Laplacian, part after part.

    Coordinates ``y`` of norm 1 and sum 0 with the least ``sum I_ij (y_i - y_j)^2``.

    Args:
        likeness: ``(d, d)`` symmetric, not negative, zero on the diagonal.
    """
    order: list[int] = []
    for part in components(likeness):
        inside = likeness[part][:, part]
        laplacian = inside.sum(1).diag() - inside
        if len(part) > 2:
            vector = torch.linalg.eigh(laplacian).eigenvectors[:, 1]
            part = [part[k] for k in torch.argsort(vector, stable=True).tolist()]
        order += part
    return order


def components(likeness: Tensor) -> list[list[int]]:
    """Sites that are connected, by their lowest number; what is below rounding connects nothing."""
    is_near = (likeness > _NOTHING * likeness.max()).tolist() if likeness.numel() else []
    left, parts = set(range(len(is_near))), []
    while left:
        part, waiting = [], [min(left)]
        left.discard(waiting[0])
        while waiting:
            site = waiting.pop()
            part.append(site)
            found = [other for other in left if is_near[site][other]]
            left.difference_update(found)
            waiting += found
        parts.append(sorted(part))
    return parts
