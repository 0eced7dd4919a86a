"""Norms of dense weights from their cores, by Gram matrices of ranks."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["chain_squared_norm"]


def chain_squared_norm(chain: Sequence[Tensor], n_columns: int | None = None) -> Tensor:
    r"""``||W||_F^2`` of the TT-matrix of these cores, or of its first ``n_columns`` columns.

    Args:
        chain: Cores ``(.., r, i, j, s)``, all with the same leading axes, one weight for each.
        n_columns: How many columns count, first input mode slowest; all when left out.

    Returns:
        Tensor: The leading shape, real, differentiable.

    Cost: O(d r^3 m^2) flops for mode pairs of size m^2.
    """
    rest = math.prod(core.shape[-2] for core in chain) if n_columns is None else n_columns
    digits = []
    for core in reversed(chain):
        digits.append(rest % core.shape[-2])
        rest //= core.shape[-2]
    # Two Gram matrices: of the column indices that are below the bound, and of the one whose digits equal it so far.
    at = chain[0].new_ones(*chain[0].shape[:-4], 1, 1)
    below = at * rest  # all columns count when the bound is past the last one
    for core, digit in zip(chain, reversed(digits), strict=True):
        below = _step(below, core) + _step(at, core[..., :digit, :])
        at = _step(at, core[..., digit : digit + 1, :])
    return below[..., 0, 0].real if below.is_complex() else below[..., 0, 0]


def _step(state: Tensor, core: Tensor) -> Tensor:
    moved = torch.einsum("...ab,...aijc->...bijc", state, core)
    return torch.einsum("...bijc,...bijd->...cd", moved, core.conj())
