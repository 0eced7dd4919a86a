"""Walks along a whole chain in one call of the compiled kernels, where these are there and the cores are plain.

Every function gives ``None`` where that is not so: for batches, on other devices, in other dtypes, where gradients are
recorded or something looks on. Then the steps in Python do the same, core by core.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tensortrain.system.native import library
from tensortrain.system.tracing import can_look

__all__ = [
    "are_sound",
    "balanced_walk",
    "dot_walk",
    "inner_walk",
    "norm_walk",
    "orthogonal_walk",
    "product_walk",
    "rounding_walk",
    "serves",
]


def _kernels(cores: Sequence[Tensor], n_axes: int = 3) -> Any | None:
    """The kernels, if they may serve these cores at all."""
    first = cores[0]
    if first.ndim != n_axes or first.device.type != "cpu" or first.dtype not in (torch.float64, torch.float32):
        return None
    return library() if can_look(first) else None


def serves(core: Tensor) -> bool:
    """Whether walks there are for chains of such cores."""
    return _kernels([core]) is not None


def are_sound(cores: Sequence[Any], n_axes: int) -> bool:
    """Whether these are known to be sound cores without a batch: what is not may be sound all the same."""
    if not cores or not isinstance(cores[0], Tensor):
        return False
    kernels = _kernels(cores, n_axes)
    return kernels is not None and kernels.chain_is_sound(cores, n_axes)


def dot_walk(bra: Sequence[Tensor], ket: Sequence[Tensor]) -> tuple[Tensor, Tensor] | None:
    """``(m, e)`` with ``<bra, ket> = m * 2**e``."""
    kernels = _kernels(bra)
    return None if kernels is None else kernels.chain_dot(bra, ket)


def inner_walk(bra: Sequence[Tensor], ket: Sequence[Tensor], n_axes: int) -> Tensor | None:
    """``<bra, ket>`` itself, of cores with so many axes, where all axes but the ranks are the same in both."""
    kernels = _kernels(bra, n_axes)
    return None if kernels is None else kernels.chain_dot_whole(bra, ket, n_axes)


def norm_walk(cores: Sequence[Tensor]) -> tuple[Tensor, Tensor] | None:
    """``(m, e)`` with the Frobenius norm ``m * 2**e`` of these cores, by triangles."""
    kernels = _kernels(cores)
    return None if kernels is None else kernels.chain_norm(list(cores))


def orthogonal_walk(cores: Sequence[Tensor], k: int) -> tuple[list[Tensor], Tensor] | None:
    """The chain with all but core k orthonormal, the largest entry of that one near 1, and the power of two left."""
    kernels = _kernels(cores)
    return None if kernels is None else kernels.chain_orthogonal(list(cores), k)


def balanced_walk(cores: Sequence[Tensor]) -> tuple[list[Tensor], Tensor] | None:
    """The chain with bonds of like size and rows of about 1 in all cores but the first, and the power of two left."""
    kernels = _kernels(cores)
    return None if kernels is None else kernels.chain_balanced(list(cores))


def product_walk(left: Sequence[Tensor], right: Sequence[Tensor], n_axes: int = 3) -> list[Tensor] | None:
    """Cores of the product: entry by entry of cores ``(r, n, s)``, of matrices of cores ``(r, i, j, s)``."""
    kernels = _kernels(left, n_axes)
    return None if kernels is None else kernels.chain_product(list(left), list(right), n_axes == 4)


def rounding_walk(cores: Sequence[Tensor], hi: int, *, squares: bool = False) -> Any | None:
    """What lies right of each bond of a chain in float64, whose cores after ``hi`` are right-orthogonal.

    With ``squares`` by Gram matrices, which show nothing below some 1e-8 of the whole.

    Its ``norm()`` is a pair of a number and a power of two. ``cut(share, caps, needs_values)`` gives cores, kept
    singular values, tails, the least values kept, growth, and norm and largest modulus of the last core; ``None`` where
    a factorization failed. Without ``needs_values`` no values are given, and some of the least are lower bounds.
    """
    kernels = _kernels(cores)
    return None if kernels is None else kernels.chain_rounding(list(cores), hi, squares)
