"""Back from the tangent space to the manifold."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from tensortrain.cores.canonical import left_qr
from tensortrain.cores.linalg import left_basis
from tensortrain.cores.scaling import split_pow2, spread_pow2, times_pow2
from tensortrain.errors import ConvergenceError, KindError, NonFiniteError, RankError, ShapeError
from tensortrain.numerics.manifold.point import Point
from tensortrain.numerics.manifold.tangent import TangentVector, as_scale, is_same_point
from tensortrain.tensor.base import CoreChain

__all__ = ["LineSearch", "armijo", "retract"]

AnyTrain = TypeVar("AnyTrain", bound=CoreChain)


@torch.no_grad()
def retract(x: AnyTrain, tangent: TangentVector, t: float | Tensor = 1.0) -> AnyTrain:
    r"""Move along a tangent vector and round back to the ranks of ``x``.

    ``R(x, t v)`` is ``x + t v`` rounded to the ranks of ``x``, by SVDs from the last bond to the first, so
    ``||R(x, t v) - (x + t v)|| = O(t^2)``. In the ordering ``[[U_k, t D_k], [0, V_k]]`` of the cores of ``x + t v``,
    of ranks ``2 r``, the columns ``[U_k; 0]`` are orthonormal and, by the gauge, orthogonal to the others: only r
    columns are left to orthogonalize at each core.

    Args:
        x: The base of ``tangent``, in any gauge.
        tangent: Tangent at ``x``.
        t: Step length, a number or a 0-d tensor.

    Returns:
        A train of the kind, modes and ranks of ``x``, with ``center == (0, 0)``; it carries no gradient. Where
        ``x + t v`` has lower ranks, as at ``x - x``, it is no point of the manifold any more.

    Raises:
        KindError, DTypeError: ``tangent`` is no tangent vector, or ``t`` no real number at a real point.
        ShapeError: ``tangent`` belongs to another point.
        NonFiniteError: The step holds NaN or Inf.

    Cost: O(d n r^3) flops.
    Source: Steinlechner, SIAM J. Sci. Comput. 38(5), 2016, section 3.3.
    """
    if not isinstance(tangent, TangentVector):
        raise KindError(
            f"a step goes along a tangent vector: tangent has {type(tangent).__name__}, expected TangentVector. "
            "Project a train with tensortrain.manifold.project(z, at=x)."
        )
    point = tangent.point
    if x is not point.base and not is_same_point(Point.of(x), point, "retract"):
        raise ShapeError(
            "a step starts at the base of its tangent vector: x is another train, expected tangent.base. "
            "Carry the vector over with tensortrain.manifold.transport(v, to=x)."
        )
    scale = as_scale(t, tangent, "t")
    _check_finite(tangent, scale)
    # everything in units of 2**exponent, in which the point has its norm in `last`
    steps = [times_pow2(delta * scale, -point.exponent) for delta in tangent.deltas]
    cores, first = _round_sum(point, steps)
    first, step = split_pow2(first)
    return _scaled(x, [first, *cores], int(point.exponent + step))  # one sync: where the norm can go


def _scaled(x: AnyTrain, cores: list[Tensor], exponent: int) -> AnyTrain:
    """A train like ``x``, times ``2**exponent``: all of it in the first core, or a part in each if it does not fit."""
    top = math.floor(math.log2(torch.finfo(x.dtype).max)) - 2
    if -top // 2 <= exponent <= top:
        return x._like([times_pow2(cores[0], exponent), *cores[1:]], (0, 0))
    return x._like(spread_pow2(cores, exponent))


def _check_finite(tangent: TangentVector, scale: Any) -> None:
    if not bool(torch.isfinite(tangent.norm() * scale)):  # one sync, before an SVD fails for the same reason
        raise NonFiniteError(
            f"a step must be finite: t times the norm of tangent has {float(tangent.norm()):.3g} * {scale}, expected a "
            "finite number. Lower the step size, or find where NaN or Inf come from."
        )


def _round_sum(point: Point, steps: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
    """Right-orthogonal cores ``2 .. d`` and the first core of the rounded sum."""
    if point.order == 1:
        return [], point.last + steps[0]
    tops, bottoms, carry = _orthogonal_columns(point, steps)
    state = torch.cat((point.last + steps[-1], torch.tensordot(carry, point.right[-1], dims=1)), dim=0)
    cores = []
    for k in range(point.order - 2, -1, -1):
        r = point.left[k].shape[2]
        flat = state.flatten(1)
        basis = left_basis(flat.mH)[0][:, :r]  # (n s, r)
        cores.append(basis.mH.reshape(r, *state.shape[1:]))
        upper, lower = (flat @ basis).split((r, flat.shape[0] - r))
        top = torch.tensordot(point.left[k], upper, dims=1) + torch.tensordot(tops[k], lower, dims=1)
        state = top if k == 0 else torch.cat((top, torch.tensordot(bottoms[k], lower, dims=1)), dim=0)
    return cores[::-1], state


def _orthogonal_columns(point: Point, steps: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Left-orthogonal form ``[[U_k, top_k], [0, bottom_k]]`` of the cores ``1 .. d - 1``, and the last carry."""
    tops, bottoms = [], []
    q, carry = left_qr(steps[0])
    tops.append(q)
    bottoms.append(q[:0])
    for delta, v in zip(steps[1:-1], point.right, strict=False):
        q, after = left_qr(torch.cat((delta, torch.tensordot(carry, v, dims=1)), dim=0))
        tops.append(q[: delta.shape[0]])
        bottoms.append(q[delta.shape[0] :])
        carry = after
    return tops, bottoms, carry


class LineSearch(NamedTuple):
    """Outcome of ``armijo``: the new train, the step length, the value of the function there, evaluations used."""

    value: Any
    t: float
    f: float
    n_evals: int


def armijo(
    f: Callable[[Any], Tensor],
    x: CoreChain,
    gradient: TangentVector,
    *,
    direction: TangentVector | None = None,
    t: float = 1.0,
    shrink: float = 0.5,
    c1: float = 1e-4,
    max_evals: int = 40,
) -> LineSearch:
    """Shorten a step until the retracted point lies low enough: ``f(R(x, t v)) <= f(x) + c1 t Re<gradient, v>``.

    Sixteen roundings of ``f(x)`` are let pass, so that a descent that has arrived does not fail.

    Args:
        f: From a train to a real 0-d tensor.
        x: Where the step starts.
        gradient: Riemannian gradient of ``f`` at ``x``.
        direction: ``v``; the negative gradient if left out.
        t: First step length tried; ``shrink`` times that is the next.
        shrink: In ``(0, 1)``.
        c1: Share of the predicted decrease that is asked for.
        max_evals: Steps tried at most.

    Raises:
        KindError: The direction is not one of descent.
        RankError: ``shrink`` lies outside ``(0, 1)``.
        ConvergenceError: No step was short enough.

    Cost: one retraction and one evaluation of ``f`` for each step tried.
    Source: Armijo, Pacific J. Math. 16(1), 1966; with the retracted point: Novikov et al., arXiv:1605.03795.
    """
    v = -gradient if direction is None else direction
    slope = float(gradient.inner(v).real)
    if not 0.0 < shrink < 1.0:
        raise RankError(f"shrink must shorten a step: shrink has {shrink}, expected a number in (0, 1). Pass 0.5.")
    if not slope <= 0.0:
        raise KindError(
            f"a direction must lead down: Re<gradient, direction> has {slope:.3g}, expected a negative number. "
            "Use -gradient."
        )
    with torch.no_grad():
        start = float(f(x))
        slack = 16 * torch.finfo(x.dtype).eps * abs(start)
        for n_evals in range(1, max_evals + 1):
            y = retract(x, v, t)
            value = float(f(y))
            if value <= start + c1 * t * slope + slack:
                return LineSearch(y, t, value, n_evals)
            t *= shrink
    raise ConvergenceError(
        f"a short enough step must lower f: the last of {max_evals} steps had length {t / shrink:.3g} and f "
        f"{value:.6g}, expected at most {start:.6g}. Check the gradient, or stop: x may be as good as "
        "the arithmetic allows."
    )
