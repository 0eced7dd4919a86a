"""Attention heads with fewer directions: which ones each head can do without, and the map after them fitted anew.

The outputs ``z`` of the heads feed ``y = W z``. What attention does to values it does to every number of a head alike,
so that the values of a head may be taken in any basis, and a head that keeps ``k`` of its ``d`` directions is a matrix
``S`` of shape ``(k, d)``. Those that go first are, in each head, the lowest generalized eigenvectors of the head's
block of ``W^T F W`` against that of ``H^{-1}``, ``H = E[z z^T]``: for one head alone that is the best subspace beside
all that the others make up for, as the truncated SVD is for a product of two matrices.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tensortrain.cores.linalg import gram_root

__all__ = ["HeadSteps", "head_bases", "head_steps", "refit_heads", "score_bases", "score_steps"]

_ROUNDS = 64  # in which all directions go
_MOST_AT_ONCE = 4  # of one head


@dataclass(frozen=True)
class HeadSteps:
    """What each head keeps, step by step, and what that costs.

    Attributes:
        widths: One row a step, the first with all directions: how many each head of the values keeps.
        losses: ``1/2 tr(F D H D^T)`` for each row.
        worst: The same without any direction.
    """

    widths: tuple[tuple[int, ...], ...]
    losses: tuple[float, ...]
    worst: float


def head_steps(weight: Tensor, gram: Tensor, output_gram: Tensor | None, n_groups: int, n_heads: int) -> HeadSteps:
    """Take directions out of heads until each has one left.

    Args:
        weight: ``(m, n)`` of the map that reads the heads' outputs.
        gram: ``(n, n)`` second moment of these, positive definite.
        output_gram: ``(m, m)`` weight of the map's outputs; identity if left out.
        n_groups: Heads of the values; each is read by ``n_heads / n_groups`` heads in a row, which share its basis.
        n_heads: Heads of the outputs.

    Cost: O(n^3 + m n^2) flops.
    Source: per head as MoDeGPT, arXiv:2408.09632, type III; across heads the updates of arXiv:2302.04089.
    """
    state = _State.of(weight, gram, output_gram, n_groups, n_heads)
    worst = 0.5 * float((state.rows @ torch.linalg.solve(state.inverse, state.rows.mT)).diagonal().sum())
    widths, losses = [tuple(state.sizes)], [0.0]
    while any(size > 1 for size in state.sizes):
        state.take_out([1] * n_groups)
        widths.append(tuple(state.sizes))
        losses.append(state.loss)
    return HeadSteps(tuple(widths), tuple(losses), worst)


def head_bases(
    weight: Tensor, gram: Tensor, output_gram: Tensor | None, n_heads: int, widths: Sequence[int]
) -> list[Tensor]:
    """Orthonormal rows ``(k_g, d)`` of what each head keeps at the widths of a step; arguments as ``head_steps``."""
    state = _State.of(weight, gram, output_gram, len(widths), n_heads)
    while any(size > k for size, k in zip(state.sizes, widths, strict=True)):
        state.take_out(widths)
    return [_orthonormal(base) for base in state.bases]


def refit_heads(weight: Tensor, gram: Tensor, bases: Sequence[Tensor], n_heads: int) -> tuple[Tensor, Tensor]:
    """The map after the heads for what they keep, ``(m, K)``, and the matrix ``(K, n)`` that takes it out.

    Least squares of the old outputs, of all heads together.
    """
    per_group = n_heads // len(bases)
    chosen = torch.block_diag(*(base for base in bases for _ in range(per_group)))
    seen = chosen @ gram.double()
    factor = torch.linalg.cholesky(seen @ chosen.mT)
    return torch.cholesky_solve(seen @ weight.double().mT, factor).mT, chosen


def score_steps(keys: Sequence[Tensor], gradients: Sequence[Tensor]) -> HeadSteps:
    """Take directions out of what the scores ``q^T k`` of heads are sums over, until each head has one left.

    Args:
        keys: Second moment of each head's keys about their mean (which shifts all scores of a query alike), ``(d, d)``.
        gradients: Of the gradients with respect to them, ``(d, d)``.

    Cost: O(d^3) flops a head.
    """
    squares = torch.stack([_weighed(key, gradient)[0] for key, gradient in zip(keys, gradients, strict=True)])
    n_groups, d = squares.shape
    costs, order = squares[:, 1:].flatten().sort()  # the largest of each head stays
    heads = (order // (d - 1)).tolist() if d > 1 else []
    at_once, sizes = max(1, -(-n_groups * d // _ROUNDS)), [d] * n_groups
    widths, losses = [tuple(sizes)], [0.0]
    for start in range(0, len(heads), at_once):
        for head in heads[start : start + at_once]:
            sizes[head] -= 1
        widths.append(tuple(sizes))
        losses.append(losses[-1] + 0.5 * float(costs[start : start + at_once].sum()))
    return HeadSteps(tuple(widths), tuple(losses), 0.5 * float(squares.sum()))


def score_bases(
    keys: Sequence[Tensor], gradients: Sequence[Tensor], widths: Sequence[int]
) -> tuple[list[Tensor], list[Tensor]]:
    """What keys and queries of each head are to be multiplied by, ``(k, d)`` each; arguments as ``score_steps``.

    The product of both is the matrix of rank k between queries and keys that changes least of the model's output: the
    truncated SVD in the norm of the two moments.
    """
    pairs = [_score_basis(key, gradient, width) for key, gradient, width in zip(keys, gradients, widths, strict=True)]
    return [pair[0] for pair in pairs], [pair[1] for pair in pairs]


def _score_basis(key: Tensor, gradient: Tensor, width: int) -> tuple[Tensor, Tensor]:
    if width == len(key):
        whole = torch.eye(width, dtype=torch.float64, device=key.device)
        return whole, whole
    _, vectors, root = _weighed(key, gradient)
    leading = vectors[:, :width]
    basis, triangle = torch.linalg.qr(root @ leading)  # keys in an orthonormal basis, whatever the gradients' scale
    back = torch.linalg.solve_triangular(root.mT, leading, upper=True)
    return basis.mT, triangle @ back.mT


def _weighed(key: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Squared singular values of ``R^T L``, falling, left vectors and ``R``; ``R R^T`` and ``L L^T`` the moments."""
    root = torch.linalg.cholesky(gradient.double())
    values, vectors = torch.linalg.eigh(root.mT @ key.double() @ root)
    return values.flip(0).clamp_min(0), vectors.flip(1), root


def _orthonormal(base: Tensor) -> Tensor:
    if len(base) == base.shape[1]:
        return torch.eye(len(base), dtype=base.dtype, device=base.device)
    return torch.linalg.qr(base.mT)[0].mT


@dataclass
class _State:
    """Heads on their way to fewer directions.

    Attributes:
        rows: ``C W`` with ``F = C^T C``, in the present bases, refitted.
        inverse: Of the second moment of what is kept.
        sizes: Directions of each head of the values.
        per_group: Heads of the outputs that share one.
        bases: ``(k, d)`` by head of the values.
    """

    rows: Tensor
    inverse: Tensor
    sizes: list[int]
    per_group: int
    at_once: int
    bases: list[Tensor] = field(default_factory=list)
    loss: float = 0.0

    @classmethod
    def of(cls, weight: Tensor, gram: Tensor, output_gram: Tensor | None, n_groups: int, n_heads: int) -> _State:
        rows = weight.detach().to(torch.float64, copy=True)
        if output_gram is not None:
            rows = gram_root(output_gram.double()).mT @ rows  # F = root^T root
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(gram.double()))
        d = weight.shape[1] // n_heads
        bases = [torch.eye(d, dtype=rows.dtype, device=rows.device) for _ in range(n_groups)]
        at_once = max(1, -(-n_groups * d // _ROUNDS))
        return cls(rows, inverse, [d] * n_groups, n_heads // n_groups, at_once, bases)

    def take_out(self, least: Sequence[int]) -> None:
        """One round: the directions that cost least, of heads that have more than they shall keep."""
        found = [self._lowest(g) if self.sizes[g] > least[g] else None for g in range(len(self.sizes))]
        going = [0] * len(self.sizes)
        for _, g in sorted(self._costs(found, least))[: self.at_once]:
            going[g] += 1
        for g, one in enumerate(found):
            if one is not None and going[g]:
                self._turn(g, one[1])
        self._drop(going)

    def _costs(self, found: Sequence[tuple[Tensor, Tensor] | None], least: Sequence[int]) -> list[tuple[float, int]]:
        costs = []
        for g, one in enumerate(found):
            if one is not None:
                n = min(_MOST_AT_ONCE, self.sizes[g] - least[g])
                costs += [(cost, g) for cost in one[0][:n].tolist()]
        return costs

    def _places(self, g: int) -> list[slice]:
        """Where the heads of the outputs that read a head of the values stand."""
        start = self.per_group * sum(self.sizes[:g])
        return [slice(start + k * self.sizes[g], start + (k + 1) * self.sizes[g]) for k in range(self.per_group)]

    def _lowest(self, g: int) -> tuple[Tensor, Tensor]:
        """What directions of a head cost, rising, and the directions as columns."""
        places = self._places(g)
        weighed = sum(self.rows[:, at].mT @ self.rows[:, at] for at in places)
        factor = torch.linalg.cholesky(sum(self.inverse[at, at] for at in places))
        half = torch.linalg.solve_triangular(factor, weighed, upper=False)
        costs, vectors = torch.linalg.eigh(torch.linalg.solve_triangular(factor, half.mT, upper=False))
        return costs * self.per_group, torch.linalg.solve_triangular(factor.mT, vectors, upper=True)

    def _turn(self, g: int, directions: Tensor) -> None:
        """Take a head in another basis, its columns being the directions."""
        for at in self._places(g):
            self.rows[:, at] = self.rows[:, at] @ directions
            self.inverse[:, at] = self.inverse[:, at] @ directions
            self.inverse[at] = directions.mT @ self.inverse[at]
        self.bases[g] = torch.linalg.solve(directions, self.bases[g])

    def _drop(self, going: Sequence[int]) -> None:
        """Do without the first directions of each head; what is left makes up for them."""
        stays = torch.ones(len(self.inverse), dtype=torch.bool, device=self.inverse.device)
        for g, n in enumerate(going):
            for at in self._places(g):
                stays[at.start : at.start + n] = False
        gone = ~stays
        rows, inner = self.rows[:, gone], self.inverse[gone][:, gone]
        share = torch.linalg.solve(inner, self.inverse[gone])
        self.loss += 0.5 * float((rows * torch.linalg.solve(inner, rows.mT).mT).sum())
        self.rows = self.rows[:, stays] - rows @ share[:, stays]
        self.inverse = self.inverse[stays][:, stays] - self.inverse[stays][:, gone] @ share[:, stays]
        self.bases = [base[n:] for base, n in zip(self.bases, going, strict=True)]
        self.sizes = [size - n for size, n in zip(self.sizes, going, strict=True)]
