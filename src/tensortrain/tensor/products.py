"""Products and sums of trains, rounded on the way: the large ranks in between are never formed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from tensortrain.cores.products import METHODS
from tensortrain.cores.ranks import RankLike, max_ranks, resolve_ranks
from tensortrain.cores.rounding import SQUARED_FLOOR
from tensortrain.cores.scaling import in_dtype
from tensortrain.cores.sketch import Hadamard, Matmul, Plain, Sum, Virtual
from tensortrain.cores.tolerance import checked_eps, compute_dtype
from tensortrain.cores.walks import serves
from tensortrain.errors import KindError, ShapeError
from tensortrain.tensor.approximation import Approximation
from tensortrain.tensor.base import CoreChain, check_same_kind, checked_chain
from tensortrain.tensor.matrix import TTMatrix, matched_factors
from tensortrain.tensor.rounding import round_tt

__all__ = ["hadamard", "matmul", "round_sum"]

AnyTrain = TypeVar("AnyTrain", bound=CoreChain)
ProductMethod = Literal["auto", "exact", "randomized", "zipup", "fit"]


def matmul(
    a: TTMatrix,
    b: Any,
    *,
    eps: float | None = None,
    max_rank: RankLike | None = None,
    method: ProductMethod | str = "auto",
    max_sweeps: int = 4,
) -> Approximation[Any]:
    """``a @ b`` for a train or a TTMatrix ``b``, rounded on the way.

    Args:
        a: Ranks R.
        b: A TensorTrain of modes ``a.in_modes``, or a TTMatrix of such ``out_modes``; ranks r.
        eps: Largest relative Frobenius error, a fraction in ``[0, 1)``; the default is that of ``tt_svd``.
        max_rank: Cap on the ranks, an int or a tuple.
        method: ``"exact"`` forms the product of rank ``R r`` and rounds it: its error is promised.
            ``"randomized"`` sketches the product: O(n r s (R s + R^2 ..)) for new ranks s, and the fastest where
            ``s`` is far below ``R r``. ``"zipup"`` cuts from left to right in one pass. ``"fit"`` improves a
            randomized start by alternating least squares at fixed ranks. ``"auto"`` forms small products, sketches
            large ones where ``eps`` allows that (4e-7 and more, or a cap), and forms the rest.
        max_sweeps: Of ``"fit"``.

    Returns:
        Approximation: ``rel_error_bound`` for ``"exact"``; ``None`` for the others, which have no proof but in
        expectation. ``info``: ``method``, ``eps``, and for ``"fit"`` ``n_sweeps`` and ``converged``.

    Raises:
        ShapeError, KindError, DTypeError, DeviceError: The operands do not fit together.
        RankError: ``eps`` or ``max_rank`` lies outside its range.

    Source: Stoudenmire and White, New J. Phys. 12, 2010 (zip-up); Oseledets, DAN 2011 (fit); Al Daas et al.,
        arXiv:2110.04393 (randomized).

    Example:
        >>> from tensortrain.tensor import eye, ones
        >>> matmul(2 * eye((3, 3)), ones((3, 3))).value.ranks
        (1, 1, 1)
    """
    left, right = matched_factors("matmul", a, b)
    into = right._paired()
    modes = [(x.shape[-3], y.shape[-2]) for x, y in zip(left.cores, into, strict=True)]

    def rebuild(merged: Sequence[Tensor]) -> CoreChain:
        return right._from_paired([core.unflatten(-2, pair) for core, pair in zip(merged, modes, strict=True)])

    job = _Job(Matmul(_wide(left.cores), _wide(into)), lambda: left @ right, rebuild, a.dtype)
    return _multiplied(job, eps, max_rank, method, max_sweeps)


def hadamard(
    x: AnyTrain,
    y: AnyTrain,
    *,
    eps: float | None = None,
    max_rank: RankLike | None = None,
    method: ProductMethod | str = "auto",
    max_sweeps: int = 4,
) -> Approximation[AnyTrain]:
    """``x * y``, entry by entry, rounded on the way; arguments and result as for ``matmul``.

    Args:
        x, y: Two trains, whose modes broadcast, or two matrices of equal modes.
        eps, max_rank, method, max_sweeps: As for ``matmul``.

    Example:
        >>> from tensortrain.tensor import ones
        >>> hadamard(ones((3, 3)) + 1, ones((3, 3))).value.ranks
        (1, 1, 1)
    """
    checked_chain("hadamard", x, "the left operand")
    check_same_kind("hadamard", x, y)
    left, right = x._matched(y)
    virtual = Hadamard(_wide(left._merged()), _wide(right._merged()))
    job = _Job(virtual, lambda: left * right, left._like, x.dtype)
    return _multiplied(job, eps, max_rank, method, max_sweeps)


def round_sum(
    terms: Sequence[AnyTrain],
    weights: Sequence[float] | None = None,
    *,
    eps: float | None = None,
    max_rank: RankLike | None = None,
    method: ProductMethod | str = "auto",
    max_sweeps: int = 4,
) -> Approximation[AnyTrain]:
    """The sum of many trains, rounded on the way; their ranks add up nowhere.

    Args:
        terms: Trains, or matrices, of equal modes.
        weights: A factor for each; ones if left out.
        eps, max_rank, method, max_sweeps: As for ``matmul``.

    Raises:
        ShapeError: There is no term, or modes or the number of weights differ.

    Example:
        >>> from tensortrain.tensor import ones
        >>> round_sum([ones((3, 3))] * 5).value.ranks
        (1, 1, 1)
    """
    given = list(terms)
    factors = [1.0] * len(given) if weights is None else list(weights)
    if not given or len(factors) != len(given):
        raise ShapeError(
            f"a sum needs terms and a weight for each: there are {len(given)} terms and {len(factors)} weights, "
            "expected equally many, at least 1. Pass two lists of one length."
        )
    scaled = [term * factor for term, factor in zip(given, factors, strict=True)]
    for other in scaled[1:]:
        check_same_kind("round_sum", scaled[0], other)
        if other._modes_by_name() != scaled[0]._modes_by_name() or other.batch_shape != scaled[0].batch_shape:
            raise ShapeError(
                f"terms of a sum must have equal modes: a term has {other._modes_by_name()}, expected "
                f"{scaled[0]._modes_by_name()}. Reshape or pad it."
            )
    virtual = Sum([Plain(_wide(term._merged())) for term in scaled])
    job = _Job(virtual, lambda: sum(scaled[1:], start=scaled[0]), scaled[0]._like, scaled[0].dtype)
    return _multiplied(job, eps, max_rank, method, max_sweeps)


@dataclass(frozen=True)
class _Job:
    """A product that need not exist, how to form it all the same, and the type of the result."""

    virtual: Virtual
    form: Callable[[], Any]
    rebuild: Callable[..., Any]
    dtype: torch.dtype


def _multiplied(
    job: _Job, eps: float | None, max_rank: RankLike | None, method: str, max_sweeps: int
) -> Approximation[Any]:
    if method not in ("auto", *METHODS, "exact"):
        raise KindError(
            f"a method must be known: method has {method!r}, expected one of {sorted(('auto', 'exact', *METHODS))}. "
            "Use 'auto' if in doubt."
        )
    virtual = job.virtual
    tolerance = checked_eps(eps, job.dtype, len(virtual.modes))
    caps = max_ranks(virtual.modes) if max_rank is None else resolve_ranks(virtual.modes, max_rank)
    caps = tuple(map(min, caps, virtual.ranks))
    if method == "auto":
        resolves = tolerance >= SQUARED_FLOOR or max_rank is not None
        method = "randomized" if resolves and not _is_best_formed(virtual) else "exact"
    needs_grad = torch.is_grad_enabled() and virtual.like.requires_grad
    if method == "exact" or needs_grad or len(virtual.modes) == 1:
        found = round_tt(job.form(), eps=eps, max_rank=max_rank)
        return Approximation(found.value, found.rel_error_bound, {**found.info, "method": "exact"})
    with torch.no_grad():
        cores, info = METHODS[method](virtual, tolerance, caps, max_sweeps)
    value = job.rebuild([core.to(job.dtype) for core in cores])
    return Approximation(value, None, {"method": method, "eps": tolerance, **info})


def _is_best_formed(virtual: Virtual) -> bool:
    """Whether forming a product and rounding it is faster than a sketch."""
    if not serves(virtual.like):
        return max(virtual.ranks) < _LARGE
    cheap = _CHEAP_ENTRIES if isinstance(virtual, Hadamard) else _CHEAP
    bonds = zip(virtual.modes, virtual.ranks, virtual.ranks[1:], strict=False)
    return sum(n * r * s * max(r, s) for n, r, s in bonds) <= cheap * len(virtual.modes)


_LARGE = 48  # ranks of a product from which a sketch beats forming it, on two CPU cores
# n r^3 of a core up to which rounding in one walk takes less time than the steps of a sketch, which gain more where
# both factors have ranks far below that of the product.
_CHEAP, _CHEAP_ENTRIES = 2.5e7, 8e6


def _wide(cores: Sequence[Tensor]) -> list[Tensor]:
    return in_dtype(cores, compute_dtype(cores[0].dtype))
