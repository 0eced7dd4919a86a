"""Block tensor train: two cores that, unlike those of a train, also depend on the modes they do not touch.

``W[(i_1, i_2), (j_1, j_2)] = sum_a A[j_2, j_1, i_1, a] B[i_1, a, j_2, i_2]``, modes paired as in every other
format here: the block of rows ``i_1`` and columns ``j_2`` is a matrix ``(i_2, j_1)`` of its own, of rank r. So
the best approximation is one truncated SVD per block, and every weight is exact at ``r = min(m_2, n_1)``. A
train of two modes is the case in which ``A`` does not depend on ``j_2``, nor ``B`` on ``i_1``; a Monarch matrix
is the case r = 1. Source: Qiu et al., ICML 2024, arXiv:2406.06248 (whose ``m_0 m_1, n_0 n_1`` are
``n_1 n_2, m_1 m_2`` here).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor

from tensortrain.errors import KindError
from tensortrain.tensor import TTMatrix

from .fit import Fit
from .layout import paired_modes
from .network import Modes, NetworkFormat
from .registry import register
from .spec import FactorSpec, Kind, WeightShape
from .weighting import PLAIN, Weighting
from .whitening import KroneckerNorm, root_and_inverse

__all__ = ["BTT", "from_tt"]


@register
class BTT(NetworkFormat):
    """Two cores ``(n_2, n_1, m_1, r)`` and ``(m_1, r, n_2, m_2)``; ranks ``(r,)``. Full matrix rank at any r.

    Parameters and multiply-adds per row: ``r (N m_1 + M n_2)``. Kernel positions go with the first input mode.

    Source: Qiu et al., ICML 2024, arXiv:2406.06248.

    Example:
        >>> BTT().spec(WeightShape("linear", 64, 64), rank=2, out_modes=(8, 8), in_modes=(8, 8)).n_params
        2048
    """

    name: ClassVar[str] = "btt"
    kinds: ClassVar[frozenset[Kind]] = frozenset({"linear", "conv", "embedding"})
    description: ClassVar[str] = "block tensor train: a low-rank matrix per block"
    rank_words = "btt takes one rank (r,)"

    def default_modes(
        self, weight: WeightShape, out_modes: Sequence[int] | None, in_modes: Sequence[int] | None
    ) -> tuple[Modes, Modes]:
        return paired_modes(weight, out_modes, in_modes, order=2)

    def caps(self, draft: FactorSpec) -> tuple[int, ...]:
        return (min(draft.out_modes[1], draft.in_modes[0] * math.prod(draft.weight.kernel)),)

    def core_legs(self, spec: FactorSpec) -> tuple[tuple[str, ...], ...]:
        spatial = ("x",) if "x" in self.in_legs(spec) else ()
        return ("i2", *spatial, "i1", "o1", "a"), ("o1", "a", "i2", "o2")

    def rank_legs(self, spec: FactorSpec) -> dict[str, int]:
        return {"a": spec.ranks[0]}

    def max_matrix_rank(self, spec: FactorSpec) -> int:
        (m1, m2), (n1, n2), rank = spec.out_modes, spec.in_modes, spec.ranks[0]
        return min(m1 * m2, n1 * n2, m1 * n2 * rank)

    def spectra(self, dense: Tensor, spec: FactorSpec, *, weighting: Weighting = PLAIN) -> list[Tensor]:
        """The k-th singular values of all blocks pooled: their tail is the error at rank k."""
        blocks = self._blocks(self._matrix(dense, spec), spec)
        if not weighting.is_plain:
            blocks, _, _ = _whitened_blocks(blocks, self._norm(spec, weighting), spec)
        return [torch.linalg.svdvals(blocks).square().sum(dim=(0, 1)).sqrt()]

    def ranks_within(self, tensor: Tensor, spec: FactorSpec, eps: float) -> tuple[int, ...]:
        values = torch.linalg.svdvals(self._blocks(tensor, spec))
        return (_rank_within(values, eps, spec.ranks[0]),)

    def fit_tensor(self, tensor: Tensor, spec: FactorSpec) -> list[Tensor]:
        return self._cores(*_truncated(self._blocks(tensor, spec), spec.ranks[0]), spec)

    def _fitted(
        self, matrix: Tensor, spec: FactorSpec, eps: float | None, norm: KroneckerNorm | None
    ) -> tuple[tuple[int, ...], list[Tensor]]:
        if norm is None:
            return super()._fitted(matrix, spec, eps, None)
        # Block by block: exact where inputs of different blocks (different j_2) are uncorrelated.
        blocks, left_inverse, right_inverse = _whitened_blocks(self._blocks(matrix, spec), norm, spec)
        rank = spec.ranks[0] if eps is None else _rank_within(torch.linalg.svdvals(blocks), eps, spec.ranks[0])
        left, right = _truncated(blocks, rank)
        if left_inverse is not None:
            left = left_inverse @ left
        return (rank,), self._cores(left, right @ right_inverse, replace(spec, ranks=(rank,)))

    def _blocks(self, weight: Tensor, spec: FactorSpec) -> Tensor:
        """``(i_1, j_2, i_2, x j_1)`` from the weight as a matrix or a tensor."""
        (m1, m2), n2 = spec.out_modes, spec.in_modes[1]
        return weight.reshape(m1, m2, -1, n2).permute(0, 3, 1, 2)

    def _cores(self, left: Tensor, right: Tensor, spec: FactorSpec) -> list[Tensor]:
        """Stored cores from factors ``(i_1, j_2, i_2, a)`` and ``(i_1, j_2, a, x j_1)`` of every block."""
        shapes = self.network(spec).core_shapes
        return [right.permute(1, 3, 0, 2).reshape(shapes[0]), left.permute(0, 3, 1, 2).reshape(shapes[1])]


def from_tt(matrix: TTMatrix) -> Fit:
    """A TT-matrix of two modes as a block tensor train of the same rank, exactly, by repeating its cores.

    A start for training at the compute of a block tensor train from a compressed weight.

    Raises:
        KindError: The TT-matrix does not have two cores, or is a batch.

    Example:
        >>> import tensortrain as tt
        >>> a = tt.randn_matrix((4, 6), (3, 5), 2)
        >>> torch.allclose(from_tt(a).to_dense(), a.to_dense(), atol=1e-5)
        True
    """
    if len(matrix.cores) != 2 or matrix.cores[0].ndim != 4:
        raise KindError(
            f"a block tensor train comes from a TT-matrix of two cores: found {len(matrix.cores)} of order "
            f"{matrix.cores[0].ndim}. Reshape it to two modes per side first."
        )
    first, second = matrix.cores  # 1 i1 j1 a, a i2 j2 1
    weight = WeightShape("linear", math.prod(matrix.out_modes), math.prod(matrix.in_modes))
    spec = BTT().spec(weight, rank=(first.shape[3],), out_modes=matrix.out_modes, in_modes=matrix.in_modes)
    tiled = first[0].movedim(1, 0).expand(second.shape[2], -1, -1, -1)  # j2 j1 i1 a
    other = second[..., 0].movedim(1, 2).expand(first.shape[1], -1, -1, -1)  # i1 a j2 i2
    return Fit(spec, (tiled.contiguous(), other.contiguous()))


def _rank_within(values: Tensor, eps: float, cap: int) -> int:
    """Smallest rank at which what all blocks discard is at most ``eps`` of the whole."""
    energy = values.square().sum(dim=(0, 1))
    tails = energy.flip(0).cumsum(0).flip(0)
    return max(1, min(int((tails > eps**2 * energy.sum()).sum()), cap))


def _truncated(blocks: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Factors of the best rank-``rank`` matrix of every block; padded with zeros above the feasible rank."""
    u, s, vh = torch.linalg.svd(blocks, full_matrices=False)
    root = s[..., :rank].sqrt()
    left, right = u[..., :rank] * root[..., None, :], root[..., None] * vh[..., :rank, :]
    missing = rank - root.shape[-1]
    if missing > 0:
        left = torch.nn.functional.pad(left, (0, missing))
        right = torch.nn.functional.pad(right, (0, 0, 0, missing))
    return left, right


def _whitened_blocks(blocks: Tensor, norm: KroneckerNorm, spec: FactorSpec) -> tuple[Tensor, Tensor | None, Tensor]:
    """Blocks times the roots of the diagonal blocks of the second moments, and the roots' inverses."""
    m1, n2 = spec.out_modes[0], spec.in_modes[1]
    roots, inverses = _block_roots(norm.gram, n2, last=True)
    blocks = blocks @ roots  # the root of block j_2
    if norm.weighting.outputs is None:
        return blocks, None, inverses
    out_roots, out_inverses = _block_roots(norm.weighting.outputs, m1, last=False)
    return out_roots[:, None] @ blocks, out_inverses[:, None], inverses


def _block_roots(gram: Tensor, n_blocks: int, *, last: bool) -> tuple[Tensor, Tensor]:
    """Roots and inverses of the diagonal blocks, numbered by the fastest or by the slowest part of the index."""
    index = torch.arange(gram.shape[0], device=gram.device)
    rows = index.reshape(-1, n_blocks).T if last else index.reshape(n_blocks, -1)
    pairs = []
    for row in rows:
        root, inverse = root_and_inverse(gram[row] if gram.ndim == 1 else gram[row][:, row])
        pairs.append((torch.diag(root), torch.diag(inverse)) if root.ndim == 1 else (root, inverse))
    return torch.stack([root for root, _ in pairs]), torch.stack([inverse for _, inverse in pairs])
