"""What lies right of each bond of a train, as a small matrix with the same products: its root.

With ``b_k`` all that lies right of bond k, a root is any ``c_k`` with ``c_k c_k^H = b_k b_k^H``: the triangle of a QR,
exact to rounding, or the root of a Gram matrix, cheaper and good to what squares resolve.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tensortrain.cores.canonical import Span, balanced
from tensortrain.cores.environments import Environments, Overlap
from tensortrain.cores.linalg import gram_root, triangle
from tensortrain.cores.scaling import balanced_pow2, keep_pow2, splitter
from tensortrain.cores.sketch import Plain
from tensortrain.cores.tolerance import Sizes
from tensortrain.cores.unfold import absorb_right, as_right
from tensortrain.cores.walks import balanced_walk

__all__ = ["Roots", "Scaled", "gram_roots", "left_sizes", "triangles"]


@dataclass(frozen=True)
class Scaled:
    """A train in the compute dtype: its cores times ``2**exponent``.

    Attributes:
        cores: ``(.., r, n, s)`` each.
        center: Range outside which they are orthonormal.
        split: Takes powers of two out of what is carried on; does nothing where numbers cannot leave the range.
        exponent: Integers, ``batch_shape``.
    """

    cores: list[Tensor]
    center: Span
    split: Callable[..., tuple[Tensor, Tensor]]
    exponent: Tensor

    @classmethod
    def of(cls, cores: list[Tensor], center: Span) -> Scaled:
        """Where numbers may leave the range, the cores that are not orthonormal are balanced first."""
        split = splitter(cores)
        total = torch.zeros(cores[0].shape[:-3], dtype=torch.int32, device=cores[0].device)
        if split is not keep_pow2:
            lo, hi = center
            inner, total = balanced_walk(cores[lo : hi + 1]) or balanced_pow2(balanced(cores[lo : hi + 1]))
            cores = [*cores[:lo], *inner, *cores[hi + 1 :]]
        return cls(cores, center, split, total)

    @property
    def n_batch(self) -> int:
        return self.cores[0].ndim - 3

    @property
    def one(self) -> Sizes:
        """What lies left of the first core, and right of the last."""
        batch, like = self.cores[0].shape[:-3], self.cores[0].real
        return like.new_ones((*batch, 1)), torch.zeros(batch, dtype=torch.int32, device=like.device)


@dataclass(frozen=True)
class Roots:
    """For every inner bond k a matrix ``c_k`` with ``c_k c_k^H = b_k b_k^H``, b_k all that lies right of it."""

    matrices: dict[int, Tensor]
    exponents: dict[int, Tensor]
    norm: Tensor
    exponent: Tensor

    def of(self, bond: int) -> tuple[Tensor | None, Tensor]:
        """The root and its power of two; ``None`` for the identity, right of the center."""
        return self.matrices.get(bond), self.exponents.get(bond, torch.zeros_like(self.exponent))

    def sizes(self, train: Scaled) -> list[Sizes]:
        """Norms of the rows of what lies right of bonds 0 to d."""
        nothing = torch.zeros_like(self.exponent)
        found = [(self.norm[..., None], self.exponent)]
        for bond, core in enumerate(train.cores[1:], start=1):
            root, exponent = self.of(bond)
            ones = self.norm.new_ones((*self.norm.shape, core.shape[-3]))
            found.append((ones if root is None else torch.linalg.vector_norm(root, dim=-1), exponent))
        return [*found, (train.one[0], nothing)]


def triangles(train: Scaled) -> Roots:
    """By QR, without an orthogonal factor."""
    return _roots(train, lambda core: triangle(as_right(core).mH).mH)


def gram_roots(train: Scaled) -> Roots:
    """By Gram matrices."""

    def root(core: Tensor) -> Tensor:
        unfolding = as_right(core)
        return gram_root(unfolding @ unfolding.mH)

    return _roots(train, root)


def _roots(train: Scaled, root_of: Callable[[Tensor], Tensor]) -> Roots:
    cores, (_, hi) = train.cores, train.center
    _, total = train.one
    matrices: dict[int, Tensor] = {}
    exponents: dict[int, Tensor] = {}
    carried = cores[hi]
    for at in range(hi, 0, -1):
        root, step = train.split(root_of(carried), train.n_batch)
        total = total + step
        matrices[at], exponents[at] = root, total
        carried = absorb_right(cores[at - 1], root)
    carried, step = train.split(carried, train.n_batch)
    norm, total = torch.linalg.vector_norm(carried, dim=(-3, -2, -1)), total + step
    return Roots(matrices, exponents, norm, total)


def left_sizes(train: Scaled, cores: Sequence[Tensor]) -> tuple[list[Sizes], Sizes]:
    """Norms of the columns of what lies left of bonds 0 to d, and the norm of the whole, from Gram matrices.

    Good to the roundings that squares resolve.
    """
    envs = Environments(Overlap(Plain(cores)), cores, split=train.split)
    sizes = [train.one]
    for bond in range(1, len(cores) + 1):
        gram, exponent = envs.left(bond)  # of the square
        squares = gram.diagonal(dim1=-2, dim2=-1).real.clamp_min(0.0)
        sizes.append(((squares * (1 + exponent % 2).unsqueeze(-1)).sqrt(), exponent // 2))
    size, power = sizes[-1]
    return sizes, (size[..., 0], power)
