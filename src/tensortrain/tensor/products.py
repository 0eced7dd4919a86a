"""Products and sums of trains, rounded on the way: the large ranks in between are never formed."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from tensortrain.cores.canonical import left_qr, orthogonalize_cores, right_qr
from tensortrain.cores.linalg import cut_basis
from tensortrain.cores.ranks import RankLike, max_ranks, resolve_ranks
from tensortrain.cores.scaling import place_pow2, split_pow2
from tensortrain.cores.sketch import OVERSAMPLING, Hadamard, Matmul, Plain, Sum, Virtual, sketched_cores
from tensortrain.cores.tolerance import checked_eps, compute_dtype
from tensortrain.cores.unfold import absorb_right, as_left, as_right
from tensortrain.errors import KindError, ShapeError
from tensortrain.tensor.approximation import Approximation
from tensortrain.tensor.base import CoreChain, broadcast_batch, check_same_kind, check_same_place
from tensortrain.tensor.matrix import TTMatrix
from tensortrain.tensor.rounding import SQUARED_FLOOR, round_tt
from tensortrain.tensor.train import TensorTrain

__all__ = ["hadamard", "matmul", "round_sum"]

Chain = TypeVar("Chain", bound=CoreChain)
Method = Literal["auto", "exact", "randomized", "zipup", "fit"]
_Made = tuple[list[Tensor], dict[str, Any]]


def matmul(
    a: TTMatrix,
    b: Any,
    *,
    eps: float | None = None,
    max_rank: RankLike | None = None,
    method: Method | str = "auto",
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
    if not isinstance(a, TTMatrix) or not isinstance(b, (TTMatrix, TensorTrain)):
        raise KindError(
            f"matmul multiplies a TTMatrix by a TTMatrix or a train: the operands are {type(a).__name__} and "
            f"{type(b).__name__}, expected TTMatrix and one of both. Use @ for dense tensors."
        )
    theirs = b.out_modes if isinstance(b, TTMatrix) else b.shape
    if a.in_modes != theirs:
        raise ShapeError(
            f"operands of matmul must share modes: the right one has {theirs}, expected {a.in_modes} (the in_modes of "
            "the left one). Build both with the same modes."
        )
    check_same_place("matmul", a, b)
    left, right = broadcast_batch(a, b)
    into = [core if isinstance(b, TTMatrix) else core.unsqueeze(-2) for core in right.cores]

    def rebuild(merged: Sequence[Tensor], center: tuple[int, int] = (0, -1)) -> TensorTrain | TTMatrix:
        if not isinstance(b, TTMatrix):
            return TensorTrain(tuple(merged), center)
        pairs = zip(a.out_modes, b.in_modes, strict=True)
        return TTMatrix(tuple(c.unflatten(-2, pair) for c, pair in zip(merged, pairs, strict=True)), center)

    job = _Job(Matmul(_wide(left.cores), _wide(into)), lambda: left @ right, rebuild, a.dtype)
    return _multiplied(job, eps, max_rank, method, max_sweeps)


def hadamard(
    x: Chain,
    y: Chain,
    *,
    eps: float | None = None,
    max_rank: RankLike | None = None,
    method: Method | str = "auto",
    max_sweeps: int = 4,
) -> Approximation[Chain]:
    """``x * y``, entry by entry, rounded on the way; arguments and result as for ``matmul``.

    Args:
        x, y: Two trains, whose modes broadcast, or two matrices of equal modes.
        eps, max_rank, method, max_sweeps: As for ``matmul``.

    Example:
        >>> from tensortrain.tensor import ones
        >>> hadamard(ones((3, 3)) + 1, ones((3, 3))).value.ranks
        (1, 1, 1)
    """
    if not isinstance(x, CoreChain):
        raise KindError(
            f"hadamard multiplies trains: the left operand has {type(x).__name__}, expected TensorTrain or TTMatrix. "
            "Decompose a dense tensor with tensortrain.tt_svd."
        )
    check_same_kind("hadamard", x, y)
    left, right = x._matched(y)
    virtual = Hadamard(_wide(left._merged()), _wide(right._merged()))
    job = _Job(virtual, lambda: left * right, left._like, x.dtype)
    return _multiplied(job, eps, max_rank, method, max_sweeps)


def round_sum(
    terms: Sequence[Chain],
    weights: Sequence[float] | None = None,
    *,
    eps: float | None = None,
    max_rank: RankLike | None = None,
    method: Method | str = "auto",
    max_sweeps: int = 4,
) -> Approximation[Chain]:
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
    if method not in ("auto", *_METHODS, "exact"):
        raise KindError(
            f"a method must be known: method has {method!r}, expected one of {sorted(('auto', 'exact', *_METHODS))}. "
            "Use 'auto' if in doubt."
        )
    virtual = job.virtual
    tolerance = checked_eps(eps, job.dtype, len(virtual.modes))
    caps = max_ranks(virtual.modes) if max_rank is None else resolve_ranks(virtual.modes, max_rank)
    caps = tuple(map(min, caps, virtual.ranks))
    if method == "auto":
        resolves = tolerance >= SQUARED_FLOOR or max_rank is not None
        method = "randomized" if max(virtual.ranks) >= _LARGE and resolves else "exact"
    needs_grad = torch.is_grad_enabled() and virtual.like.requires_grad
    if method == "exact" or needs_grad or len(virtual.modes) == 1:
        found = round_tt(job.form(), eps=eps, max_rank=max_rank)
        return Approximation(found.value, found.rel_error_bound, {**found.info, "method": "exact"})
    with torch.no_grad():
        cores, info = _METHODS[method](virtual, tolerance, caps, max_sweeps)
    value = job.rebuild([core.to(job.dtype) for core in cores])
    return Approximation(value, None, {"method": method, "eps": tolerance, **info})


def _randomized(
    virtual: Virtual, eps: float, caps: Sequence[int], max_sweeps: int
) -> tuple[list[Tensor], dict[str, Any]]:
    """Sketches of growing rank until the singular values left over show that nothing above ``eps`` was missed."""
    guess = 16
    while True:
        widths = [min(r, cap + OVERSAMPLING, guess + OVERSAMPLING) for r, cap in zip(virtual.ranks, caps, strict=True)]
        sketched, exponent = sketched_cores(virtual, widths)
        last = len(sketched) - 1
        placed, single = place_pow2(sketched, exponent, last, virtual.like.dtype)
        wide = TensorTrain(tuple(placed), (last, last) if single else (0, -1))
        found = round_tt(wide, eps=eps, max_rank=caps[1:-1] if len(caps) > 2 else None)
        ranks = found.value.ranks
        full = [w >= min(r, cap + OVERSAMPLING) for w, r, cap in zip(widths, virtual.ranks, caps, strict=True)]
        # A rank that came near the width may have been held down by it.
        if all(done or rank + OVERSAMPLING // 2 <= w for done, rank, w in zip(full, ranks, widths, strict=True)):
            return list(found.value.cores), {"sketch_ranks": tuple(widths)}
        guess *= 2


def _zipped(virtual: Virtual, eps: float, caps: Sequence[int], max_sweeps: int) -> _Made:
    """One pass from the left: each core of the product is cut as soon as it is known, then all are rounded."""
    virtual = virtual.balanced()
    like, d = virtual.like, len(virtual.modes)
    # What lies right of a bond is near orthonormal, not quite: hence a margin, and no proof.
    share = 0.1 * eps / math.sqrt(max(1, d - 1))
    most = max_ranks(virtual.modes)
    limits = [4 * cap + OVERSAMPLING if cap < top else _NO_LIMIT for cap, top in zip(caps, most, strict=True)]
    carry = like.new_ones((*like.shape[:-3], 1, 1))
    exponent = torch.zeros(like.shape[:-3], dtype=torch.int32, device=like.device)
    cores = []
    for k in range(d - 1):
        full = virtual.pass_left(k, carry)
        rows = as_left(full)
        size = torch.linalg.matrix_norm(rows)
        basis, _, _ = cut_basis(rows, share * size, limits[k + 1])
        cores.append(basis.unflatten(-2, full.shape[-3:-1]))
        carry, step = split_pow2(basis.mH @ rows, like.ndim - 3)
        exponent = exponent + step
    last, step = split_pow2(virtual.pass_left(d - 1, carry), like.ndim - 3)
    placed, single = place_pow2([*cores, last], exponent + step, d - 1, like.dtype)
    train = TensorTrain(tuple(placed), (d - 1, d - 1) if single else (0, -1))
    found = round_tt(train, eps=eps, max_rank=caps[1:-1])
    return list(found.value.cores), {}


def _fitted(virtual: Virtual, eps: float, caps: Sequence[int], max_sweeps: int) -> _Made:
    """Alternating least squares at the ranks of a randomized start.

    With orthonormal cores beside it, the best core k is the product seen through them; one pass to the left and one
    to the right are a sweep, and the norm of the core grows until it settles.
    """
    cores, _ = _randomized(virtual, eps, caps, max_sweeps)
    d, n_batch = len(cores), virtual.like.ndim - 3
    cores, _ = orthogonalize_cores(cores, (0, d - 1), 0)
    one = virtual.like.new_ones((*virtual.like.shape[:-3], 1, 1))
    right = [one] * (d + 1)
    right_exponent = [torch.zeros(virtual.like.shape[:-3], dtype=torch.int32, device=one.device)] * (d + 1)
    for k in range(d - 1, 0, -1):
        seen = virtual.pass_right(k, right[k + 1])
        right[k], step = split_pow2(as_right(seen) @ as_right(cores[k]).mH, n_batch)
        right_exponent[k] = right_exponent[k + 1] + step
    sizes: list[float] = []
    exponent = right_exponent[0]
    for n_sweeps in range(1, max_sweeps + 1):
        left, left_exponent = [one] * (d + 1), [right_exponent[d]] * (d + 1)
        for k in range(d):
            cores[k] = absorb_right(virtual.pass_left(k, left[k]), right[k + 1])
            exponent = left_exponent[k] + right_exponent[k + 1]
            if k < d - 1:
                cores[k] = left_qr(cores[k])[0]
                seen = virtual.pass_left(k, left[k])
                left[k + 1], step = split_pow2(as_left(cores[k]).mH @ as_left(seen), n_batch)
                left_exponent[k + 1] = left_exponent[k] + step
        sizes.append(float((torch.linalg.vector_norm(cores[-1], dim=(-3, -2, -1)).log2() + exponent).amax()))
        # The square of the error is the square of the norm lost: a norm that stands still means the fit does.
        if len(sizes) > 1 and abs(sizes[-1] - sizes[-2]) <= 0.1 * eps**2 + 1e-14:
            break
        if n_sweeps == max_sweeps:
            break
        last = cores[-1]
        for k in range(d - 1, 0, -1):
            cores[k] = right_qr(last if k == d - 1 else absorb_right(virtual.pass_left(k, left[k]), right[k + 1]))[0]
            seen = virtual.pass_right(k, right[k + 1])
            right[k], step = split_pow2(as_right(seen) @ as_right(cores[k]).mH, n_batch)
            right_exponent[k] = right_exponent[k + 1] + step
    placed, _ = place_pow2(cores, exponent, d - 1, virtual.like.dtype)
    converged = len(sizes) > 1 and abs(sizes[-1] - sizes[-2]) <= 0.1 * eps**2 + 1e-14
    return placed, {"n_sweeps": len(sizes), "converged": converged}


_METHODS: dict[str, Callable[[Virtual, float, Sequence[int], int], _Made]] = {
    "randomized": _randomized,
    "zipup": _zipped,
    "fit": _fitted,
}

_NO_LIMIT = 1 << 62
_LARGE = 48  # ranks of a product from which a sketch beats forming it, on two CPU cores


def _wide(cores: Sequence[Tensor]) -> list[Tensor]:
    return [core.to(compute_dtype(core.dtype)) for core in cores]
