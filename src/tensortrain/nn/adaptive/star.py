"""Cores that all hang on one core, as in a Tucker format: rank indices turned to singular directions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tensortrain.cores.tolerance import compute_dtype
from tensortrain.formats import Bond

__all__ = ["hub_of", "turned_star"]


def hub_of(found: Sequence[Bond]) -> int | None:
    """The core that every bond joins to a core of its own; None where there is no such core."""
    if not found or any(len(bond) != 2 for bond in found):
        return None
    hubs = set.intersection(*({core for core, _ in bond} for bond in found))
    for hub in sorted(hubs):
        leaves = [core for bond in found for core, _ in bond if core != hub]
        if len(set(leaves)) == len(found) > 1:
            return hub
    return None


@torch.no_grad()
def turned_star(cores: Sequence[Tensor], found: Sequence[Bond], hub: int) -> list[Tensor]:
    """The same tensor: outer cores orthonormal, indices by falling norm of the hub's slices, which are its singular
    values; sizes stay. Axes of groups, which outer cores and hub have in common, are turned alike in all of them.

    Source: the higher-order SVD, De Lathauwer, De Moor and Vandewalle, SIAM J. Matrix Anal. Appl. 21(4), 2000.
    """
    out = [core.to(compute_dtype(core.dtype)) for core in cores]
    ends = [(next(end for end in bond if end[0] != hub), next(end for end in bond if end[0] == hub)) for bond in found]
    for (leaf, axis), (_, hub_axis) in ends:
        rows = out[leaf].movedim(axis, -1)
        u, s, vh = torch.linalg.svd(rows.flatten(0, -2), full_matrices=False)
        _turn_(out, leaf, axis, rows, _padded(u, -1, rows.shape[-1]))
        out[hub] = _along(_padded(s[:, None] * vh, 0, rows.shape[-1]), out[hub], hub_axis)
    for (leaf, axis), (_, hub_axis) in ends:
        # All outer cores are orthonormal: what the hub's unfolding has as singular values the whole tensor has.
        slices = out[hub].movedim(hub_axis, 0).flatten(1)
        _, v = torch.linalg.eigh(slices @ slices.mH)
        v = v.flip(-1)
        rows = out[leaf].movedim(axis, -1)
        _turn_(out, leaf, axis, rows, rows.flatten(0, -2) @ v)
        out[hub] = _along(v.mH, out[hub], hub_axis)
    return [core.to(was.dtype) for core, was in zip(out, cores, strict=True)]


def _turn_(out: list[Tensor], leaf: int, axis: int, rows: Tensor, value: Tensor) -> None:
    out[leaf] = value.reshape(rows.shape).movedim(-1, axis).contiguous()


def _along(matrix: Tensor, core: Tensor, axis: int) -> Tensor:
    return torch.tensordot(matrix, core, dims=([1], [axis])).movedim(0, axis).contiguous()


def _padded(x: Tensor, axis: int, size: int) -> Tensor:
    shape = list(x.shape)
    shape[axis] = size - shape[axis]
    return torch.cat([x, x.new_zeros(shape)], dim=axis)
