"""A train from samples in one pass, by reduced densities: exact where nothing is cut, and a guess of the rest where is.

The reduced density of the first k sites keeps, off its diagonal, how many endings two beginnings share. To keep only
its largest eigenvectors is what generalizes; there are no gradients and no iterations.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["cores_from_samples"]


def cores_from_samples(x: Tensor, n_values: int, max_bond: int, dtype: torch.dtype) -> list[Tensor]:
    """Cores ``(r, n, s)`` of ``sum over samples of sqrt(share) |x>``, left-orthogonal, of norm 1, ranks cut to a cap.

    Args:
        x: ``(b, d)`` int64.
        n_values: Values of a site.
        max_bond: How many eigenvectors stay at every bond.
        dtype: Of the cores; the work is done in float64.

    Cost: O(b d n r) flops and O(d (n r)^3); samples that share an ending are summed before they are multiplied.
    Source: Bradley, Stoudenmire, Terilla, arXiv:1910.07425, section 4.
    """
    strings, counts = torch.unique(x, dim=0, return_counts=True)
    endings = _endings(strings, n_values)
    one_hot = torch.eye(n_values, dtype=torch.float64, device=x.device)
    state = (counts.double() / counts.sum()).sqrt()[:, None]  # of every string: (b, r)
    cores: list[Tensor] = []
    for k in range(strings.shape[1] - 1):
        r = state.shape[1]
        state = (state[:, :, None] * one_hot[strings[:, k]][:, None]).flatten(1)
        sums = state.new_zeros(int(endings[k].max()) + 1, state.shape[1]).index_add_(0, endings[k], state)
        basis = _largest(sums, max_bond)
        cores.append(basis.unflatten(0, (r, n_values)).to(dtype))
        state = state @ basis
    last = torch.einsum("br,bn->rn", state, one_hot[strings[:, -1]])
    cores.append((last / torch.linalg.vector_norm(last))[..., None].to(dtype))
    return cores


def _endings(strings: Tensor, n_values: int) -> list[Tensor]:
    """For every site a number ``(b,)`` of what comes behind it, equal where that is equal."""
    numbers = torch.zeros(strings.shape[0], dtype=torch.int64, device=strings.device)
    found = [numbers]
    for k in range(strings.shape[1] - 1, 0, -1):
        numbers = torch.unique(numbers * n_values + strings[:, k], return_inverse=True)[1]
        found.append(numbers)
    return found[::-1]


def _largest(sums: Tensor, max_bond: int) -> Tensor:
    """The largest eigenvectors of ``sums^T sums``, each with its largest entry positive, as columns."""
    values, vectors = torch.linalg.eigh(sums.mT @ sums)
    values, vectors = values.flip(0), vectors.flip(1)
    n_kept = int((values > values[0] * len(values) * torch.finfo(values.dtype).eps).sum())
    kept = vectors[:, : max(1, min(max_bond, n_kept))]
    top = kept.gather(0, kept.abs().argmax(0, keepdim=True))
    return kept * top.sign()
