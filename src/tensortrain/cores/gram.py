"""Norms of dense weights from their cores, by Gram matrices of ranks."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from tensortrain.cores.environments import past_pair

__all__ = ["chain_squared_norm"]


def chain_squared_norm(chain: Sequence[Tensor], n_rows: int | None = None, n_columns: int | None = None) -> Tensor:
    r"""``||W||_F^2`` of the TT-matrix of these cores, or of its first rows and columns.

    Args:
        chain: Cores ``(.., r, i, j, s)``, all with the same leading axes, one weight for each.
        n_rows, n_columns: How many count, first mode slowest; all when left out.

    Returns:
        Tensor: The leading shape, real, differentiable.

    Cost: O(d r^3 m^2) flops for mode pairs of size m^2.
    """
    rows = _digits(n_rows, [core.shape[-3] for core in chain])
    columns = _digits(n_columns, [core.shape[-2] for core in chain])
    # Gram matrices of the indices that are below a bound (or have none), and of those whose digits equal it so far.
    states = {(rows is not None, columns is not None): chain[0].new_ones(*chain[0].shape[:-4], 1, 1)}
    for k, core in enumerate(chain):
        moved: dict[tuple[bool, bool], Tensor] = {}
        for (row_at, column_at), state in states.items():
            for row_part, row_next in _parts(row_at, rows, k):
                for column_part, column_next in _parts(column_at, columns, k):
                    key = (row_next, column_next)
                    part = core[..., row_part, column_part, :].flatten(-3, -2)
                    more = past_pair(state, part, part)
                    moved[key] = moved[key] + more if key in moved else more
        states = moved
    total = states[False, False][..., 0, 0]
    return total.real if total.is_complex() else total


def _digits(count: int | None, sizes: Sequence[int]) -> list[int] | None:
    """Digits of a count in a mixed base, first slowest; ``None`` where all indices count."""
    if count is None or count >= math.prod(sizes):
        return None
    digits = []
    for size in reversed(sizes):
        digits.append(count % size)
        count //= size
    return digits[::-1]


def _parts(is_at: bool, digits: list[int] | None, k: int) -> list[tuple[slice, bool]]:
    """Which indices of a mode go on, and whether the digits still equal the bound after it."""
    if not is_at or digits is None:
        return [(slice(None), False)]
    return [(slice(digits[k]), False), (slice(digits[k], digits[k] + 1), True)]
