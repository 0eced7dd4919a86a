"""What any two sites know of each other: from samples, or from the reduced densities of a train."""

from __future__ import annotations

import torch
from torch import Tensor

from tensortrain.cores.canonical import Gauged
from tensortrain.cores.tolerance import compute_dtype
from tensortrain.errors import DataError, KindError, ShapeError
from tensortrain.tensor import TensorTrain

__all__ = ["mutual_information"]

_ROWS = 8192  # of samples that are counted at once


def mutual_information(x: Tensor | TensorTrain) -> Tensor:
    r"""Mutual information of every pair of sites, in nats.

    ============================  ==================================================================================
    x                             between sites i and j
    ============================  ==================================================================================
    integers ``(n, d)``           ``sum p(a, b) ln(p(a, b) / p(a) p(b))`` with the frequencies of the samples (plug-in)
    floats ``(n, d)``             ``-ln(1 - rho^2) / 2`` with their correlation, as if they were Gaussian
    TensorTrain of ``d`` modes    ``S_i + S_j - S_ij``, the entropies of reduced densities of the normalised train
    ============================  ==================================================================================

    Args:
        x: Samples along the first axis, or a train; a train may be complex.

    Returns:
        Tensor: ``(d, d)`` float64, symmetric, 0 or more. On the diagonal stands the entropy of the site, for floats 0.

    Raises:
        DataError: There are no samples (of floats fewer than two), or NaN or infinite ones.
        ShapeError: Samples are no matrix with columns, or the train is a batch.
        KindError: It is neither a tensor nor a train.

    Cost: samples O(n q^2) flops with q, the number of values of all sites; trains O(d^2 n^4 r^2 + d^2 n^3 r^3).

    Source: Rissler, Noack and White, Chem. Phys. 323, 2006 (trains).

    Example:
        >>> coins = torch.tensor([[0, 0, 0], [0, 0, 1], [1, 1, 0], [1, 1, 1]])
        >>> mutual_information(coins)[0].tolist()  # of site 1 ln 2 nats, of site 2 none
        [0.693..., 0.693..., 0.0]
    """
    if isinstance(x, TensorTrain):
        return _of_train(x)
    if not isinstance(x, Tensor) or x.is_complex():
        found = str(x.dtype) if isinstance(x, Tensor) else type(x).__name__
        raise KindError(
            f"mutual information is that of real samples or of a train: x has {found}, expected a tensor (n, d) or a "
            "TensorTrain. Convert it."
        )
    if x.ndim != 2 or x.shape[1] == 0:
        raise ShapeError(
            f"samples must be a matrix: x has shape {tuple(x.shape)}, expected (n, d). Put samples along axis 0."
        )
    least = 2 if x.is_floating_point() else 1
    if x.shape[0] < least:
        raise DataError(f"frequencies need samples: x has {x.shape[0]}, expected {least} or more. Pass (n, d).")
    return _of_floats(x) if x.is_floating_point() else _of_integers(x)


def _of_integers(x: Tensor) -> Tensor:
    numbers: list[Tensor] = []
    sizes: list[int] = []
    for column in x.T:
        values, number = torch.unique(column, return_inverse=True)
        numbers.append(number + sum(sizes))  # each value of each site has a number of its own
        sizes.append(len(values))
    rows = torch.stack(numbers, dim=1)
    counts = torch.zeros(sum(sizes), sum(sizes), dtype=torch.float64, device=x.device)
    for some in rows.split(_ROWS):
        seen = torch.zeros(len(some), sum(sizes), dtype=torch.float32, device=x.device).scatter_(1, some, 1.0)
        counts += seen.T @ seen  # whole numbers, exact
    terms = torch.special.entr(counts / len(x))
    site = torch.repeat_interleave(torch.tensor(sizes, device=x.device))
    joint = terms.new_zeros(x.shape[1], len(site)).index_add_(0, site, terms)
    joint = joint.new_zeros(x.shape[1], x.shape[1]).index_add_(1, site, joint)
    own = joint.diagonal()
    return _cleaned(own[:, None] + own - joint)


def _of_floats(x: Tensor) -> Tensor:
    if not bool(torch.isfinite(x).all()):
        raise DataError("samples must be finite: x has NaN or Inf, expected numbers. Leave these samples out.")
    centred = x.double() - x.double().mean(0)
    centred = centred / centred.abs().amax(0).clamp_min(torch.finfo(torch.float64).tiny)
    sizes = torch.linalg.vector_norm(centred, dim=0)
    scaled = centred / sizes.where(sizes > 0, 1.0)
    left = 1 - (scaled.T @ scaled).square()
    return _cleaned(-left.clamp_min(torch.finfo(torch.float64).eps).log() / 2).fill_diagonal_(0.0)


def _cleaned(found: Tensor) -> Tensor:
    """Symmetric and not negative, which rounding may have changed."""
    return ((found + found.T) / 2).clamp_min(0.0)


@torch.no_grad()
def _of_train(x: TensorTrain) -> Tensor:
    if x.batch_shape:
        raise ShapeError(
            f"mutual information is that of one train: x is a batch of {tuple(x.batch_shape)}, expected a single "
            "train. Take one after the other."
        )
    d, found = x.order, torch.zeros(x.order, x.order, dtype=torch.float64, device=x.device)
    wide = compute_dtype(x.dtype)
    if not all(bool(torch.isfinite(core).all()) for core in x.cores):
        raise DataError("a train must be finite: x has NaN or Inf, expected numbers. Build it anew.")
    train = Gauged.of([core.to(wide) for core in x.cores], x.center if wide == x.dtype else None)
    for i in range(d):
        core = train.local(i)
        core = core / torch.linalg.vector_norm(core).clamp_min(torch.finfo(torch.float64).tiny)
        open_at_i = torch.einsum("rns,rmt->nmst", core, core.conj())
        found[i, i] = _entropy(torch.einsum("nmss->nm", open_at_i))
        for j in range(i + 1, d):
            later = train.cores[j]  # right-orthogonal: what lies behind it is the identity
            half = torch.einsum("nmst,sau->nmtau", open_at_i, later)
            pair = torch.einsum("nmtau,tbu->namb", half, later.conj())
            found[i, j] = _entropy(pair.flatten(2).flatten(0, 1))
            open_at_i = torch.einsum("nmtau,tav->nmuv", half, later.conj())
    own = found.diagonal().clone()
    joint = found.triu(1)
    joint = joint + joint.T
    return _cleaned(own[:, None] + own - joint).fill_diagonal_(0.0) + own.diag()


def _entropy(density: Tensor) -> Tensor:
    weights = torch.linalg.eigvalsh((density + density.mH) / 2).clamp_min(0.0)
    return torch.special.entr(weights / weights.sum().clamp_min(torch.finfo(weights.dtype).tiny)).sum()
