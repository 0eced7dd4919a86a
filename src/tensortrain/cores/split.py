"""A tensor of neighbouring sites becomes two pieces: one rule of truncation for swaps, sweeps and time steps.

The rule is that of rounding: the lowest rank whose discarded singular values have a root-sum-square within a share
of the norm, at least 1, and a cap that goes before it (``cores.linalg.choose_rank``).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tensortrain.cores.linalg import cut_along, cut_basis, orthonormal
from tensortrain.cores.scaling import split_pow2
from tensortrain.cores.tolerance import compute_dtype

__all__ = ["Split", "split"]


@dataclass(frozen=True)
class Split:
    """Two pieces of a local tensor, of which one is orthonormal and the other carries the norm.

    Attributes:
        left, right: ``(.., r, n_1 .., t)`` and ``(.., t, .., s)``.
        tail: Root-sum-square of what was cut, relative to the norm, for each member; 0 where nothing was.
    """

    left: Tensor
    right: Tensor
    tail: Tensor

    @property
    def rank(self) -> int:
        """Of the new bond."""
        return self.left.shape[-1]


def split(
    local: Tensor,
    *,
    n_sites: int = 2,
    to_right: bool = True,
    tol: Tensor | float = 0.0,
    max_rank: int | None = None,
    enrich: Tensor | None = None,
    n_labels: int = 0,
    metric: tuple[Tensor, Tensor] | None = None,
) -> Split:
    """Split a local tensor into a core that is orthonormal and the rest, which the sweep takes along.

    Computed in float64 or complex128, stored in the dtype of ``local``. Differentiable, once, where the rank that was
    found is that of the matrix or below it: a tall matrix of less rank that is not cut has no right derivative here.

    Args:
        local: ``(labels .., batch .., r, n_1 .., s)`` of ``n_sites`` sites; in a batch all get the same rank.
        to_right: Whether the first site is split off, left-orthogonal, or the last one, right-orthogonal.
        tol: Largest root-sum-square of what is cut, a share of the norm; one, or one for each member.
        max_rank: Cap, which goes before ``tol`` and counts the columns of ``enrich``.
        enrich: Further columns ``(batch .., r, n, c)`` (to the left: rows ``(batch .., c, n, s)``) for the basis,
            such as those of a residual or of noise; what the rest has along them stays.
        n_labels: Axes of labels, or of several vectors that share the basis; they go with the rest.
        metric: Positive matrices ``(r n, r n)`` and ``(n s, n s)``, for two sites of a chain without a batch: what is
            cut is measured with them on both sides of the cut, such as by its effect on data of these second moments.

    Returns:
        Split: of two sites two cores, of one site a core and a matrix.

    Cost: O(p q min(p, q)) flops; without a truncation, a QR.
    """
    axes = range(local.ndim)
    labels, batch, inner = axes[:n_labels], axes[n_labels : -n_sites - 2], axes[-n_sites - 2 :]
    kept, going = (inner[:2], inner[2:]) if to_right else (inner[-2:], inner[:-2])
    order = [*batch, *kept, *labels, *going]  # rows: what stays at the site; columns: what goes on, labels slowest
    moved = local.to(compute_dtype(local.dtype)).permute(order)
    matrix = moved.flatten(len(batch) + 2).flatten(-3, -2)
    if enrich is not None:
        enrich = _columns(enrich, to_right).to(matrix.dtype)
    if metric is None:
        basis, rest, tail = _factored(matrix, tol, max_rank, enrich)
    else:
        basis, rest, tail = _measured(matrix, tol, max_rank, metric if to_right else metric[::-1])
    basis, rest = basis.to(local.dtype), rest.to(local.dtype)
    sizes = [local.shape[axis] for axis in (*labels, *going)]
    rest = rest.unflatten(-1, sizes)  # batch t labels going
    rest = rest.movedim(tuple(range(len(batch) + 1, len(batch) + 1 + n_labels)), tuple(labels))
    core = basis.unflatten(-2, [local.shape[axis] for axis in kept])
    if to_right:
        return Split(core.contiguous(), rest.contiguous(), tail)
    return Split(rest.movedim(len(labels) + len(batch), -1).contiguous(), core.movedim(-1, -3).contiguous(), tail)


def _columns(rows_or_columns: Tensor, to_right: bool) -> Tensor:
    """Directions of a core as columns ``(.., r n, c)`` or ``(.., n s, c)``."""
    return rows_or_columns.flatten(-3, -2) if to_right else rows_or_columns.flatten(-2, -1).mT


def _factored(
    matrix: Tensor, tol: Tensor | float, max_rank: int | None, enrich: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """``(basis, basis^H matrix, tail)``."""
    most = min(matrix.shape[-2:])
    cap = most if max_rank is None else min(max_rank, most)
    cuts = cap < most or bool(torch.as_tensor(tol > 0).any())
    with torch.no_grad():
        found, _ = split_pow2(matrix.detach(), matrix.ndim - 2)  # ranks are chosen by squares
        norm = torch.linalg.matrix_norm(found)
        basis, tail = orthonormal(found), torch.zeros_like(norm)
        if cuts:
            basis, _, tail = cut_basis(found, tol * norm, cap)
        if enrich is not None:
            basis = _enriched(basis, enrich, matrix.shape[-2] if max_rank is None else max_rank)
    rest = basis.mH @ matrix
    is_whole = basis.shape[-1] == basis.shape[-2]  # then nothing but what it is called depends on the matrix
    if matrix.requires_grad and not is_whole:
        basis, rest = cut_along(matrix, basis)
    return basis, rest, tail / norm.where(norm > 0, 1.0)


def _measured(
    matrix: Tensor, tol: Tensor | float, max_rank: int | None, metric: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """The same with the cut that is best in a metric of rows and one of columns, labels apart."""
    (rows, back), (columns, _) = (_roots(part.to(matrix.dtype)) for part in metric)
    seen = ((rows @ matrix).unflatten(-1, (-1, columns.shape[0])) @ columns).flatten(-2)
    basis, _, tail = _factored(seen, tol, max_rank, None)
    kept = basis.mH @ (rows @ matrix)
    core = orthonormal(back @ basis)
    return core, core.mH @ (back @ (basis @ kept)), tail


def _roots(metric: Tensor) -> tuple[Tensor, Tensor]:
    """The square root of a positive matrix, and its inverse."""
    values, vectors = torch.linalg.eigh(metric)
    roots = values.clamp_min(torch.finfo(values.dtype).eps * values[-1]).sqrt()
    return (vectors * roots) @ vectors.mH, (vectors / roots) @ vectors.mH


def _enriched(basis: Tensor, columns: Tensor, cap: int) -> Tensor:
    """The basis with directions of further columns behind it, orthonormal to rounding even where these are zero."""
    n_more = max(0, min(columns.shape[-1], cap - basis.shape[-1], basis.shape[-2] - basis.shape[-1]))
    more = torch.linalg.qr(torch.cat((basis, columns[..., :n_more]), dim=-1)).Q[..., basis.shape[-1] :]
    return torch.cat((basis, more), dim=-1)
