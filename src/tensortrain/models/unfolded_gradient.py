"""The gradient of a loss by every weight of an exponential machine at once, as a matrix cut in the middle of the chain.

The weight of a set of features has as its gradient the mean of ``loss' prod x_k`` over samples: a matrix product of
the products of the left features with those of the right ones. Steps of one or two cores see the gradient from where
the other cores are, and a product of six signs among thirty looks like noise from there. In the matrix it stands out:
as an entry, or, where no entry does, as a singular value.

Features are brought to mean 0 and spread 1, so that products of independent ones are orthonormal and what noise does
to an entry, or to the singular values, is known.

Source of the unfolding as near to square: Montanari, Richard, "A statistical model for tensor PCA", NIPS 2014: of a
product of k features it needs about ``d^(k/2)`` samples, and a local search ``d^(k-1)``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tensortrain.cores.decompose import decompose
from tensortrain.cores.unfold import absorb_left, absorb_right
from tensortrain.errors import RankError

__all__ = ["UnfoldedGradient"]

_ROWS_AT_ONCE = 2048
_MOST_ENTRIES = 1 << 25  # of the matrix
_MOST_WEIGHTS = 1 << 22  # of one half, written out
_MOST_TERMS = 256
_ONE_IN = 20.0  # times that noise is taken for a signal


@dataclass(frozen=True)
class _Half:
    """The products of features on one side of the cut.

    Attributes:
        letters: ``(sites, components)``: the factors that there are, in the order of their sites.
        levels: For each degree from 1 on, a product of the degree before and the letter that it is multiplied by.
        words: ``(products, sites)``: which component of each site a product has; 0 is the constant.
        ends: How many products there are up to each degree.
    """

    letters: tuple[Tensor, Tensor]
    levels: tuple[tuple[Tensor, Tensor], ...]
    words: Tensor
    ends: tuple[int, ...]

    @classmethod
    def of(cls, modes: Sequence[int], order: int) -> _Half:
        sites = torch.tensor([k for k, n in enumerate(modes) for _ in range(n - 1)], dtype=torch.int64)
        components = torch.tensor([i for n in modes for i in range(1, n)], dtype=torch.int64)
        last, words = torch.tensor([-1]), torch.zeros(1, len(modes), dtype=torch.int64)
        levels, found, ends = [], [words], [1]
        for _ in range(min(order, len(modes))):
            comes_after = sites > last[:, None]
            _check_size(ends[-1] + int(comes_after.sum()), _MOST_WEIGHTS)
            parent, letter = comes_after.nonzero(as_tuple=True)
            words, last = words[parent], sites[letter]
            words[torch.arange(len(words)), last] = components[letter]
            levels.append((parent, letter))
            found.append(words)
            ends.append(ends[-1] + len(words))
        return cls((sites, components), tuple(levels), torch.cat(found), tuple(ends))

    def products(self, vectors: Sequence[Tensor]) -> Tensor:
        """``(products, b)`` of vectors ``(components, b)`` for each site."""
        sites = self.letters[0]
        if not len(sites):
            return vectors[0].new_ones(1, vectors[0].shape[1])
        letters = torch.cat([vector[1:] for vector in vectors])
        found = [letters.new_ones(1, letters.shape[1])]
        for parent, letter in self.levels:
            found.append(found[-1][parent] * letters[letter])
        return torch.cat(found)

    def n_up_to(self, degree: int) -> int:
        """How many products have this degree or a lower one."""
        return self.ends[min(degree, len(self.ends) - 1)] if degree >= 0 else 0


def _check_size(size: int, most: int) -> None:
    if size > most:
        raise RankError(
            f"the gradient by all weights must fit the memory: it would have {size} entries or more, expected at most "
            f"{most}. Pass a smaller order, or fewer features."
        )


class UnfoldedGradient:
    """How products of up to ``order`` features go with numbers that samples have: a matrix over the middle bond.

    Args:
        modes: Components of each feature, the first one constant.
        order: Features in a product at most; all when left out.
        vectors: Makes them, for each feature ``(b, components)``; called once it is known that all will fit.
    """

    def __init__(self, modes: Sequence[int], order: int | None, vectors: Callable[[], Sequence[Tensor]]) -> None:
        if len(modes) < 2:
            raise RankError("a chain must have a middle to be cut: there is one feature, expected two or more.")
        self.order = len(modes) if order is None else order
        self.middle = len(modes) // 2
        self.halves = tuple(_Half.of(part, self.order) for part in (modes[: self.middle], modes[self.middle :]))
        left, right = self.halves
        self.counts = [
            (slice(left.n_up_to(j - 1), left.n_up_to(j)), right.n_up_to(self.order - j)) for j in range(len(left.ends))
        ]
        self.n_entries = sum((rows.stop - rows.start) * n for rows, n in self.counts)
        _check_size(self.n_entries, _MOST_ENTRIES)
        self.vectors = vectors()
        self.shift = [vector.mean(0) for vector in self.vectors]
        spread = [vector.std(0, correction=0) for vector in self.vectors]
        self.scale = [torch.where(s > 1e-6, 1 / s.clamp_min(1e-6), 0.0) for s in spread]

    def blocks(self, numbers: Tensor) -> list[Tensor]:
        """The mean over samples of ``numbers`` ``(b,)`` times each product: its rows for each degree on the left.

        Cost: O(b n) flops for n entries.
        """
        left, right = self.halves
        total = [numbers.new_zeros(rows.stop - rows.start, n) for rows, n in self.counts]
        for start in range(0, len(numbers), _ROWS_AT_ONCE):
            part = slice(start, start + _ROWS_AT_ONCE)
            columns = [
                ((vector[part] - shift) * scale).T
                for vector, shift, scale in zip(self.vectors, self.shift, self.scale, strict=True)
            ]
            before = left.products(columns[: self.middle]) * numbers[part]
            after = right.products(columns[self.middle :])
            for block, (rows, n) in zip(total, self.counts, strict=True):
                block.addmm_(before[rows], after[:n].T)
        return [block / len(numbers) for block in total]

    def entries(self, numbers: Tensor) -> list[Tensor] | None:
        """Cores of the sum of all entries too large for noise: were all ``n`` noise, one in 20 times one would be kept.

        A normal number is beyond ``z`` of its spreads with a chance below ``exp(-z^2 / 2)``, and ``n`` of these make
        1 / 20.
        """
        noise = float(numbers.square().mean().sqrt()) / len(numbers) ** 0.5
        least = noise * math.sqrt(2 * math.log(_ONE_IN * self.n_entries))
        words, weights = [], []
        for block, (rows, _) in zip(self.blocks(numbers), self.counts, strict=True):
            row, column = (block.abs() > least).nonzero(as_tuple=True)
            weights.append(block[row, column])
            row, column = row.cpu() + rows.start, column.cpu()
            words.append(torch.cat((self.halves[0].words[row], self.halves[1].words[column]), dim=1))
        found = torch.cat(weights)
        if not len(found):
            return None
        largest = found.abs().argsort(descending=True)[:_MOST_TERMS]
        return self._sum_of_products(torch.cat(words)[largest.cpu()], found[largest])

    def directions(self, numbers: Tensor, max_rank: int) -> list[Tensor] | None:
        """Cores of the singular directions that are larger than those of pure noise, each half cut to the ranks too.

        What noise adds to a singular value is taken out of it.

        Source: Gavish, Donoho, IEEE Trans. Inf. Theory 63(4), 2017 (the shrinkage for the Frobenius norm).
        """
        blocks = self.blocks(numbers)
        width = max(block.shape[1] for block in blocks)
        matrix = torch.cat([torch.nn.functional.pad(block, (0, width - block.shape[1])) for block in blocks])
        unit = float(numbers.square().mean().sqrt()) / len(numbers) ** 0.5
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
        p, q = ((unit**2) * n for n in matrix.shape)
        kept = s[s > p**0.5 + q**0.5][:max_rank]
        if not len(kept):
            return None
        shrunk = ((kept.square() - p - q).square() - 4 * p * q).clamp_min(0).sqrt() / kept
        n = len(kept)
        left = self._train_of_half(0, u[:, :n] * shrunk, max_rank)
        right = self._train_of_half(1, vh[:n].T, max_rank)
        joined = [*left[:-2], absorb_right(left[-2], left[-1][..., 0])]
        return self._in_features([*joined, absorb_left(right[0][0], right[1]), *right[2:]])

    def _train_of_half(self, which: int, columns: Tensor, max_rank: int) -> list[Tensor]:
        """Columns ``(products, n)`` as a train, whose last mode on the left and first one on the right is n."""
        half = self.halves[which]
        part = self.scale[: self.middle] if which == 0 else self.scale[self.middle :]
        modes = [len(scale) for scale in part]
        _check_size(math.prod(modes) * columns.shape[1], _MOST_WEIGHTS)
        dense = columns.new_zeros(*modes, columns.shape[1])
        dense[tuple(half.words.T)] = columns
        dense = dense if which == 0 else dense.movedim(-1, 0)
        return list(decompose(dense, max_rank=max_rank).cores)

    def _sum_of_products(self, words: Tensor, weights: Tensor) -> list[Tensor]:
        """Cores of a sum of terms, of which each has its own state."""
        n, d = words.shape
        every = torch.arange(n)
        cores = []
        for k in range(d):
            core = weights.new_zeros(n, len(self.scale[k]), n)
            core[every, words[:, k], every] = 1.0
            cores.append(core)
        cores[0] = (weights[:, None, None] * cores[0]).sum(0, keepdim=True)
        cores[-1] = cores[-1].sum(2, keepdim=True)
        return self._in_features(cores)

    def _in_features(self, cores: Sequence[Tensor]) -> list[Tensor]:
        """From weights of features of mean 0 and spread 1 to those of the features as they are."""
        found = []
        for core, shift, scale in zip(cores, self.shift, self.scale, strict=True):
            weights = core[:, 1:] * scale[1:, None].to(core.dtype)
            constant = core[:, :1] - (weights * shift[1:, None].to(core.dtype)).sum(1, keepdim=True)
            found.append(torch.cat((constant, weights), dim=1))
        return found
