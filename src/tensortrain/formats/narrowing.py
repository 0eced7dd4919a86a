"""Which units between two layers to keep, and the layer after them fitted anew: one pass gives every width.

The units' activations ``a`` feed ``y = W a``. Of a set S of them the best second layer is
``W H_{:,S} H_{S,S}^{-1}`` with ``H = E[a a^T]``, and the output error ``1/2 tr(F D H D^T)``, ``D`` the change of
``W``, weighs outputs by ``F``. Units are taken away one block after another, each time those that cost least beside
what the others make up for (optimal brain surgeon).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from tensortrain.cores.linalg import gram_root
from tensortrain.errors import RankError

__all__ = ["SHRINKAGE", "Narrowing", "narrowing", "narrowing_of_blocks", "refitted", "shrunk"]

Array: TypeAlias = "np.ndarray[Any, Any]"

LEAST_SHRINKAGE = 1e-6  # where no data will come
SHRINKAGE = 1e-3  # of the mean diagonal: what few rows of data say about rare directions is not to be believed
_POOL = 4  # times as many units are looked at as go at once
_ROWS = 128  # that are moved at once
_SPARSE = 0.875  # when fewer of the units are left, they are moved together
_BLOCK = 8  # units taken away at once: as good as one at a time, at the speed of matrix products


@dataclass(frozen=True)
class Narrowing:
    """The order in which units go, and what every width costs.

    Attributes:
        order: Numbers of the units, the first to go first.
        losses: ``losses[k]`` is the error once the first k are gone, ``1/2 tr(F D H D^T)``; n + 1 of them.
    """

    order: Tensor
    losses: Tensor

    def kept(self, width: int) -> Tensor:
        """The units that remain at a width, in their old order."""
        n = len(self.order)
        if not 1 <= width <= n:
            raise RankError(f"a width must lie between 1 and the number of units: found {width} of {n}. Choose one.")
        return self.order[n - width :].sort().values

    def loss(self, width: int) -> float:
        """The error at a width."""
        return float(self.losses[len(self.order) - width])


def narrowing(
    weight: Tensor, gram: Tensor, output_gram: Tensor | None = None, *, block: int = _BLOCK, protected: int = 1
) -> Narrowing:
    """Order the units of a hidden layer by what it costs to do without them.

    Args:
        weight: ``(m, n)`` of the layer after them, or ``(m, n, ..)`` of a convolution, whose positions count as
            outputs of their own.
        gram: ``E[a a^T]``, ``(n, n)``, shrunk so that it is positive definite (of deviations from the mean, where
            the layer after has a bias to take up the rest).
        output_gram: Weight of the outputs, ``(m, m)``; identity if left out.
        block: How many go at once.
        protected: How many remain in any case.

    Cost: O(n^3 + m n^2) flops.
    Source: Kurtic, Frantar and Alistarh, arXiv:2302.04089, equations 3 and 4; blocks: Frantar and Alistarh,
    arXiv:2208.11580.

    Example:
        >>> w, h = torch.tensor([[1.0, 2.0, 0.1]]), torch.eye(3)
        >>> narrowing(w, h, block=1).order.tolist()
        [2, 0, 1]
    """
    device = gram.device
    rows = _weighed_rows(weight, output_gram).mT.clone(memory_format=torch.contiguous_format)  # a unit each
    lower = torch.linalg.cholesky(gram.double())
    del gram  # of many units it is as large as the layer
    inverse = torch.cholesky_inverse(lower).mT.contiguous()  # symmetric: in columns, as it comes, is as good
    del lower
    here = torch.arange(len(inverse), device=device)
    is_here = torch.ones(len(inverse), dtype=torch.bool, device=device)
    order, losses = [], [torch.zeros(1, dtype=torch.float64, device=device)]
    n_left = len(here)
    while n_left > protected:
        going = _next_to_go(rows, inverse, is_here, min(block, n_left - protected))
        order.append(here[going])
        losses.append(losses[-1][-1] + _costs(rows[going], inverse[going][:, going]))
        _take_away(rows, inverse, going)
        is_here[going] = False
        n_left -= len(going)
        if n_left < _SPARSE * len(here):
            stay = is_here.nonzero().flatten()
            rows, inverse, here, is_here = rows[stay], _moved_together(inverse, stay), here[stay], is_here[stay]
    stay = is_here.nonzero().flatten()
    rest = _costs(rows[stay], inverse[stay][:, stay])
    return Narrowing(torch.cat([*order, here[stay]]), torch.cat([*losses, losses[-1][-1] + rest]))


def _take_away(rows: Tensor, inverse: Tensor, going: Tensor) -> None:
    """Let the other units take over what some did; of these, nothing is left but ones on the diagonal."""
    less = inverse[going]
    share = torch.linalg.solve(less[:, going], less)  # what the others take over
    rows.addmm_(share.mT, rows[going], alpha=-1)
    inverse.addmm_(less.mT, share, alpha=-1)
    rows[going], inverse[going], inverse[:, going] = 0.0, 0.0, 0.0
    inverse[going, going] = 1.0


def narrowing_of_blocks(
    weight: Tensor, gram: Tensor, output_gram: Tensor | None, blocks: Sequence[Sequence[int]]
) -> Narrowing:
    """The same where units go in blocks that stand together, as the numbers of an attention head do.

    Args:
        weight, gram, output_gram: As ``narrowing``.
        blocks: Numbers of the units of each.

    Returns:
        Narrowing: Of the blocks.

    Cost: O(n^3 + m n^2) flops for n units.
    """
    rows = _weighed_rows(weight, output_gram)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(gram.double()))
    here = [torch.tensor(list(block), device=gram.device) for block in blocks]
    left, order, losses = list(range(len(blocks))), [], [0.0]
    while left:
        costs = [float(_costs(rows[:, here[k]].mT, inverse[here[k]][:, here[k]])[-1]) for k in left]
        best = min(range(len(left)), key=costs.__getitem__)
        going = here[left[best]]
        share = torch.linalg.solve(inverse[going][:, going], inverse[going])  # what the others take over
        rows = rows - rows[:, going] @ share
        inverse = inverse - inverse[:, going] @ share
        order.append(left.pop(best))
        losses.append(losses[-1] + costs[best])
    return Narrowing(torch.tensor(order), torch.tensor(losses, dtype=torch.float64))


def _moved_together(square: Tensor, stay: Tensor) -> Tensor:
    """The rows and columns that stay, in their order, at the front of the same memory; what was there is gone."""
    n, flat = len(stay), square.view(-1)
    for start in range(0, n, _ROWS):  # a row never goes where one lies that is still to come
        some = square[stay[start : start + _ROWS]][:, stay]
        flat[start * n : start * n + some.numel()] = some.reshape(-1)
    return flat[: n * n].view(n, n)


def shrunk(gram: Tensor, outside: float | None = None) -> Tensor:
    """A second moment with a little of the identity, so that directions without data cost something too.

    Args:
        outside: Share of the mean square that is to be expected there, where that is known.
    """
    share = SHRINKAGE if outside is None else min(SHRINKAGE, max(outside, LEAST_SHRINKAGE))
    mean = gram.diagonal().mean()
    found = gram.clone()
    found.diagonal().add_(share * mean)
    return found


def _weighed_rows(weight: Tensor, output_gram: Tensor | None) -> Tensor:
    """``C W`` with ``F = C^T C``: errors of outputs as plain squares, ``(rows, n)``."""
    wide = weight.detach().double()
    if output_gram is not None:
        root = gram_root(output_gram.double()).mT  # F = root^T root
        wide = torch.tensordot(root, wide, dims=1)
    return wide.movedim(1, -1).reshape(-1, weight.shape[1])


def _next_to_go(rows: Tensor, inverse: Tensor, is_here: Tensor, n_going: int) -> Tensor:
    """Units that cost least, one after another: when one of two like units has gone, the other is worth more.

    They are looked for among some more that seem to cost least at first.
    """
    scores = torch.linalg.vector_norm(rows, dim=1).square_() / inverse.diagonal()
    scores[~is_here] = torch.inf
    pool = scores.topk(min(_POOL * n_going, int(is_here.sum())), largest=False).indices
    some = rows[pool]
    products, inner = some @ some.mT, inverse[pool][:, pool]
    going = _one_after_another(products.cpu().numpy(), inner.cpu().numpy(), n_going)
    return pool[torch.from_numpy(going).to(pool.device)]


def _one_after_another(products: Array, inner: Array, n_going: int) -> Array:
    """Numbers of those that cost least, each beside what those before it left to the others.

    What one takes away is of rank one: of the matrices, only the diagonals and a row each time are brought up to date.

    Args:
        products: Of all pairs of rows, ``(p, p)``.
        inner: The inverse moment, ``(p, p)``.
    """
    n = len(inner)
    above, below = products.diagonal().copy(), inner.diagonal().copy()
    shares, lost, pivots = np.empty((n_going, n)), np.empty((n_going, n)), np.empty(n_going)
    going = np.empty(n_going, dtype=np.int64)
    for i in range(n_going):
        k = going[i] = (above / below).argmin()
        given, taken = shares[:i, k], lost[:i, k]
        row = inner[k] - (pivots[:i] * given) @ shares[:i]
        pivots[i] = row[k]
        shares[i] = share = row / row[k]
        row = products[k] - given @ lost[:i] - taken @ shares[:i]
        lost[i] = row - 0.5 * row[k] * share
        above -= 2 * share * lost[i]
        below -= pivots[i] * share**2
        above[going[: i + 1]], below[going[: i + 1]] = np.inf, 1.0
    return going


def _costs(rows: Tensor, inverse: Tensor) -> Tensor:
    """Error of doing without some units, the first one, the first two, .., all of them; a row is a unit's."""
    lower = torch.linalg.cholesky(inverse)
    # Row k of the whitened rows is what unit k costs once those before it are gone.
    whitened = torch.linalg.solve_triangular(lower, rows, upper=False)
    return 0.5 * whitened.square().sum(dim=1).cumsum(dim=0)


def refitted(weight: Tensor, gram: Tensor, kept: Tensor) -> Tensor:
    """The weight of the layer after, for the units that remain: the least squares of the old outputs.

    Args:
        weight: ``(m, n)``, or ``(m, n, ..)`` of a convolution (each position by itself).
        gram: ``(n, n)``, positive definite.
        kept: Units that remain, ``(k,)``.

    Source: arXiv:2408.09632, the Nystroem form of type I.
    """
    some = gram[kept].double()  # of many units every copy counts
    wide = weight.double().movedim(1, -1)  # m .. n
    crossed = some @ wide.reshape(-1, wide.shape[-1]).T
    lower = torch.linalg.cholesky(some[:, kept])
    del some
    new = torch.cholesky_solve(crossed, lower).T
    return new.reshape(*wide.shape[:-1], len(kept)).movedim(-1, 1).to(weight.dtype)
