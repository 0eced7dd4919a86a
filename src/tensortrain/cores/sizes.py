"""Sizes of a train and of what is done to it: a number, or a tensor with one for each member of a batch.

Numbers of Python take a tenth of the time of tensors that hold one, most of all where the caches hold nothing of torch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["BondSizes", "Size", "any_above", "larger", "least_of", "nothing_like", "root_sum", "worst_of"]

Size = Tensor | float
BondSizes = Tensor | Sequence[Size]  # one for every bond, ``(d - 1, ..)``


def nothing_like(size: Size) -> Size:
    """Zero for every member."""
    return torch.zeros_like(size) if isinstance(size, Tensor) else 0.0


def root_sum(sizes: BondSizes) -> Size:
    """Root of the sum of squares, over the leading axis; of nothing it is 0."""
    if isinstance(sizes, Tensor):
        return sizes.square().sum(0).sqrt()
    if not any(isinstance(size, Tensor) for size in sizes):
        return math.hypot(*sizes)
    return torch.stack(_alike(sizes)).square().sum(0).sqrt()


def larger(a: BondSizes, b: BondSizes) -> BondSizes:
    """The larger of two sizes at every place."""
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return torch.maximum(*(torch.as_tensor(sizes, dtype=torch.float64) for sizes in (a, b)))
    return [max(x, y) for x, y in zip(a, b, strict=True)]


def any_above(sizes: Size | Sequence[Size], limit: float) -> bool:
    """Whether one of them is larger than the limit, for any member."""
    if isinstance(sizes, Tensor):
        return bool((sizes > limit).any())
    return sizes > limit if isinstance(sizes, float | int) else any(any_above(size, limit) for size in sizes)


def least_of(size: Size) -> float:
    """That of the member that has the least."""
    return float(size.amin()) if isinstance(size, Tensor) else size


def worst_of(sizes: Sequence[Size]) -> list[float]:
    """Each of them for the member that has the largest; 0 for a batch without members. Asks a device once."""
    if not any(isinstance(size, Tensor) for size in sizes):
        return list(sizes)  # type: ignore[arg-type]
    rows = torch.stack([size.reshape(-1) for size in _alike(sizes)])
    return rows.amax(1).tolist() if rows.shape[1] else [0.0] * len(rows)


def _alike(sizes: Sequence[Size]) -> list[Tensor]:
    like = next(size for size in sizes if isinstance(size, Tensor))
    return [size if isinstance(size, Tensor) else torch.full_like(like, size) for size in sizes]
