"""Tucker decompositions of a dense tensor: HOSVD, and HOOI started from it.

Bases come from QR factorizations that form no Q, so no unfolding is ever squared and nothing much larger
than the tensor itself is held. Sources: De Lathauwer, De Moor, Vandewalle, SIAM J. Matrix Anal. Appl. 21, 2000
(HOSVD, p. 1253; HOOI, p. 1324).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tensortrain.cores.linalg import left_basis, singular_values

__all__ = ["expand", "hooi", "hosvd", "mode_spectra", "project", "tucker_ranks", "unfold"]

N_SWEEPS = 4  # HOOI gains little after a few


def unfold(tensor: Tensor, axis: int) -> Tensor:
    """``(n_axis, everything else)``."""
    return tensor.movedim(axis, 0).reshape(tensor.shape[axis], -1)


def mode_spectra(tensor: Tensor) -> list[Tensor]:
    """Singular values of the unfolding of every mode."""
    return [singular_values(unfold(tensor, k)) for k in range(tensor.ndim)]


def hosvd(tensor: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Orthonormal bases ``(n_k, min(n_k, rest))`` of every mode, most important direction first, and the values."""
    found = [left_basis(unfold(tensor, k)) for k in range(tensor.ndim)]
    return [u for u, _ in found], [s for _, s in found]


def tucker_ranks(spectra: Sequence[Tensor], eps: float) -> tuple[int, ...]:
    """Smallest ranks whose discarded tails are at most ``eps**2 / d`` of the energy in every mode."""
    ranks = []
    for values in spectra:
        energy = values.square()
        tails = energy.flip(0).cumsum(0).flip(0)  # tails[r] is what rank r discards
        kept = int((tails > eps**2 / len(spectra) * energy.sum()).sum())
        ranks.append(max(1, kept))
    return tuple(ranks)


def project(tensor: Tensor, factors: Sequence[Tensor | None]) -> Tensor:
    """Multiply every mode by the transpose of its factor ``(n_k, R_k)``; None leaves a mode alone."""
    for k, factor in enumerate(factors):
        if factor is not None:
            tensor = torch.tensordot(tensor, factor, dims=([k], [0])).movedim(-1, k)
    return tensor


def expand(core: Tensor, factors: Sequence[Tensor]) -> Tensor:
    """The tensor that a core and its factors stand for."""
    return project(core, [factor.T for factor in factors])


def hooi(
    tensor: Tensor, ranks: Sequence[int], *, start: Sequence[Tensor] | None = None, n_sweeps: int = N_SWEEPS
) -> tuple[Tensor, list[Tensor]]:
    """Core and orthonormal factors of the given multilinear ranks.

    Args:
        tensor: Order d, float64.
        ranks: One per mode. Where they are not feasible the factors have fewer columns.
        start: Factors to begin with; those of the HOSVD when left out.

    Returns:
        The core, and a factor ``(n_k, R_k)`` per mode.

    Accuracy: no worse than the HOSVD truncated to these ranks (than ``start``).
    Cost: two passes over the tensor per mode and sweep.
    """
    if start is None:
        start = [basis[:, :rank] for basis, rank in zip(hosvd(tensor)[0], ranks, strict=True)]
    factors = list(start)
    full = [k for k, factor in enumerate(factors) if factor.shape[1] == factor.shape[0]]
    for _ in range(n_sweeps if len(full) < len(factors) - 1 else 0):
        for k in range(tensor.ndim):
            if k not in full:
                others = [None if n == k or n in full else factor for n, factor in enumerate(factors)]
                factors[k] = left_basis(unfold(project(tensor, others), k))[0][:, : ranks[k]]
    return project(tensor, factors), factors
