"""Alternating least squares for CP, written out: products of Gram matrices, no network to plan.

A sweep meets the tensor twice, not once per mode: the products with the factors of the other half of the modes
serve all modes of this half (a dimension tree of two leaves; Phan, Tichavsky and Cichocki, IEEE Trans. Signal
Process. 61(19), 2013, section III).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from math import prod

import torch
from torch import Tensor

from .als import solve_normal

__all__ = ["alternate_cp"]


def alternate_cp(
    target: Tensor, factors: Sequence[Tensor], *, n_sweeps: int = 50, tol: float = 1e-5, enough: float = 0.0
) -> tuple[list[Tensor], float]:
    """Fit the factors ``(n_k, rank)`` of a tensor, one after the other.

    Args:
        target: Order two or more, float64.
        factors: Where to begin.
        n_sweeps: At most so many.
        tol: Stop once a sweep lowers the squared error by less than this share of it.
        enough: Stop at this relative error, too.

    Returns:
        The factors, and the relative error.

    Accuracy: as ``alternate``: the error never rises from one sweep to the next, up to rounding.
    Cost: ``4 N rank`` flops per sweep for a tensor of ``N`` entries.
    """
    factors = list(factors)
    scale = target.square().sum()
    if not bool(scale > 0):
        return [torch.zeros_like(factor) for factor in factors], 0.0
    total, stop_at = float(scale), enough**2 * float(scale)
    halves = _halves(target)
    grams = [factor.T @ factor for factor in factors]
    before = float("inf")
    for _ in range(n_sweeps):
        for matrix, own, others in halves:
            fitted = _sweep_half(matrix @ _khatri_rao([factors[k] for k in others]), own, factors, grams)
        error = max(0.0, total - float(fitted))  # one look per sweep at whether to go on
        if error <= stop_at or before - error <= tol * max(error, 1e-14 * total):
            break
        before = error
    matrix, own, others = halves[0]
    rows, columns = (_khatri_rao([factors[k] for k in modes]) for modes in (own, others))
    lost = torch.linalg.vector_norm(torch.addmm(matrix, rows, columns.T, beta=-1))
    return factors, float(lost / scale.sqrt())


def _halves(target: Tensor) -> list[tuple[Tensor, range, range]]:
    """The tensor as a matrix of the first modes by the last and its transpose, with the modes of either side."""
    sizes, d = target.shape, target.ndim
    cut = min(range(1, d), key=lambda k: max(prod(sizes[:k]), prod(sizes[k:])))
    matrix = target.reshape(prod(sizes[:cut]), -1)
    first, last = range(cut), range(cut, d)
    return [(matrix, first, last), (matrix.T, last, first)]


def _khatri_rao(factors: Sequence[Tensor]) -> Tensor:
    """``(n_1 n_2 .., rank)``, the first mode slowest."""
    return reduce(lambda left, right: (left[:, None] * right).flatten(0, 1), factors)


def _sweep_half(weighed: Tensor, own: range, factors: list[Tensor], grams: list[Tensor]) -> Tensor:
    """Renew the factors of one half, and by how much the last lowers the squared error below that of zero."""
    weighed = weighed.unflatten(0, [len(factors[k]) for k in own]) if len(own) > 1 else weighed
    for k in own:
        right = _without(weighed, [factors[n] for n in own], k - own.start)
        normal = reduce(torch.mul, [gram for n, gram in enumerate(grams) if n != k])
        factors[k] = solve_normal(normal, right)
        grams[k] = factors[k].T @ factors[k]
    return (factors[own[-1]] * right).sum()


def _without(weighed: Tensor, factors: Sequence[Tensor], kept: int) -> Tensor:
    """Sum ``(n_1, .., n_m, rank)`` over all modes but one, weighted by their factors."""
    for factor in reversed(factors[kept + 1 :]):
        weighed = (weighed * factor).sum(-2)
    for factor in factors[:kept]:
        weighed = (weighed * factor.reshape(len(factor), *[1] * (weighed.ndim - 2), -1)).sum(0)
    return weighed
