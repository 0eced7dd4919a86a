"""Tangent vectors of the manifold of trains of fixed ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from tensortrain.cores.scaling import times_pow2
from tensortrain.cores.tolerance import default_eps
from tensortrain.errors import DTypeError, KindError, ShapeError
from tensortrain.numerics.manifold.components import components_of_trains
from tensortrain.numerics.manifold.point import Point
from tensortrain.tensor.base import CoreChain, Scalar, as_scalar, check_same_place

__all__ = ["TangentVector", "as_scale", "gauged", "in_frame_of", "is_same_point"]


@dataclass(frozen=True, eq=False, repr=False)
class TangentVector:
    r"""A tangent vector at a train: ``sum_k U_1 .. U_{k-1} D_k V_{k+1} .. V_d``. Frozen.

    ``U`` and ``V`` are the orthogonal cores of the base point, and ``U_k^H D_k = 0`` in the left unfolding for
    ``k < d``. In this gauge the ``D_k`` are unique for given ``U`` and ``V``, the terms of the sum are orthogonal
    to each other, and inner products are those of the ``D_k``.

    Made by ``project``, ``riemannian_grad``, ``hvp`` and ``transport``.

    Attributes:
        point: The base with its orthogonal forms; pass it as ``at=`` to project there again.
        deltas: ``D_1 .. D_d``, ``(r, n, s)`` each, shaped as the cores of the base (modes of a TTMatrix joined).

    Operators: ``+ -`` with a tangent vector at the same point, ``*`` and ``/`` with a number, ``-v``.

    Example:
        >>> import tensortrain as tt
        >>> x, z = tt.randn((4, 5, 6), 2), tt.randn((4, 5, 6), 3)
        >>> v = tt.manifold.project(z, at=x)
        >>> v.value.ranks, (v / 2 - v).shape
        ((1, 4, 4, 1), (4, 5, 6))
    """

    point: Point
    deltas: tuple[Tensor, ...]

    __array_ufunc__: ClassVar[None] = None  # numpy scalars leave the arithmetic to us

    # -- what it is ---------------------------------------------------------------------------------

    @property
    def base(self) -> CoreChain:
        """The train at which it is tangent."""
        return self.point.base

    @property
    def value(self) -> Any:
        """The vector as a train of the kind and modes of the base, ranks ``2 r``."""
        return self.base._like(self.point.embed(self.deltas))

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of ``to_dense()``."""
        return self.base.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.deltas[0].dtype

    @property
    def device(self) -> torch.device:
        return self.deltas[0].device

    def to_dense(self) -> Tensor:
        """The full array, of ``shape``."""
        return self.value.to_dense()

    def __repr__(self) -> str:
        return f"TangentVector(at={self.base!r})"

    # -- size ---------------------------------------------------------------------------------------

    def inner(self, other: TangentVector) -> Tensor:
        """Inner product of the two tensors, 0-d; conjugates this one, as ``torch.vdot``.

        Raises:
            KindError: ``other`` is no tangent vector.
            ShapeError: It belongs to another point.

        Cost: O(d n r^2) flops where both share ``point``.
        """
        theirs = in_frame_of(self, other, "inner")
        parts = [torch.vdot(a.flatten(), b.flatten()) for a, b in zip(self.deltas, theirs, strict=True)]
        return torch.stack(parts).sum()

    def norm(self) -> Tensor:
        """Frobenius norm, a real 0-d tensor."""
        return torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(delta) for delta in self.deltas]))

    # -- algebra ------------------------------------------------------------------------------------

    def __add__(self, other: Any) -> TangentVector:
        theirs = in_frame_of(self, other, "+")
        return self._with([a + b for a, b in zip(self.deltas, theirs, strict=True)])

    def __sub__(self, other: Any) -> TangentVector:
        theirs = in_frame_of(self, other, "-")
        return self._with([a - b for a, b in zip(self.deltas, theirs, strict=True)])

    def __neg__(self) -> TangentVector:
        return self._with([-delta for delta in self.deltas])

    def __mul__(self, other: Any) -> TangentVector:
        scale = as_scale(other, self, "*")
        return self._with([delta * scale for delta in self.deltas])

    def __rmul__(self, other: Any) -> TangentVector:
        return self * other

    def __truediv__(self, other: Any) -> TangentVector:
        scale = as_scale(other, self, "/")
        return self._with([delta / scale for delta in self.deltas])

    def detach(self) -> TangentVector:
        """The same vector, cut from the autograd graph."""
        return self._with([delta.detach() for delta in self.deltas])

    def _with(self, deltas: Sequence[Tensor]) -> TangentVector:
        return replace(self, deltas=tuple(deltas))


def gauged(point: Point, components: Sequence[Tensor]) -> TangentVector:
    """The projection of ``Z`` from ``U_{<k}^H Z V_{>k}^H`` for every k: takes out what lies in the range of ``U_k``."""
    deltas = [_off_range(delta, u) for delta, u in zip(components, point.left, strict=False)]
    return TangentVector(point, (*deltas, components[-1]))


def _off_range(delta: Tensor, u: Tensor) -> Tensor:
    basis, out = u.flatten(0, 1), delta.flatten(0, 1)
    for _ in range(2):  # once leaves 1e-16 of what was taken out, which may be large beside what is left
        out = out - basis @ (basis.mH @ out)
    return out.reshape(delta.shape)


def in_frame_of(v: TangentVector, other: Any, operation: str) -> tuple[Tensor, ...]:
    """The deltas of ``other`` with respect to the bases of ``v``.

    Both may hold the same point in different gauges; then the bases differ by unitary matrices.
    """
    if not isinstance(other, TangentVector):
        raise KindError(
            f"operands of {operation} must be tangent vectors: the right one has {type(other).__name__}, expected "
            "TangentVector. Project a train with tensortrain.manifold.project(z, at=x)."
        )
    if other.point is v.point:
        return other.deltas
    if not is_same_point(v.point, other.point, operation):
        raise ShapeError(
            f"operands of {operation} must be tangent at one point: the right one belongs to another train, "
            "expected that of the left one. Carry it over with tensortrain.manifold.transport(v, to=x)."
        )
    return gauged(v.point, components_of_trains([other.value._merged()], v.point)).deltas


def is_same_point(a: Point, b: Point, operation: str) -> bool:
    """Whether two points are one tensor, to the rounding of their dtype, whatever their gauge."""
    if a is b or a.base is b.base:
        return True
    if type(a.base) is not type(b.base) or a.base._modes_by_name() != b.base._modes_by_name():
        return False
    check_same_place(operation, a.base, b.base)
    if a.base.ranks != b.base.ranks:
        return False
    tol = default_eps(a.base.dtype, a.order)
    # normalized by hand, since the norm itself may not fit the dtype
    unit = [_at_unit_scale(p, a.exponent) for p in (a, b)]
    gap = (unit[0] - unit[1]).norm()
    return bool(gap <= tol * torch.linalg.vector_norm(a.last))


def _at_unit_scale(point: Point, exponent: Tensor) -> CoreChain:
    """The point divided by ``2**exponent``."""
    return point.base._like([*point.left, times_pow2(point.last, point.exponent - exponent)])


def as_scale(value: Any, v: TangentVector, operation: str) -> Scalar:
    """A number that keeps the dtype of ``v``."""
    scalar = as_scalar(value)
    if scalar is None:
        raise KindError(
            f"a tangent vector is scaled by a number: the right of {operation} has {type(value).__name__}, expected "
            "a number. Use v.inner(w) for inner products."
        )
    if torch.result_type(v.deltas[0], scalar) != v.dtype:
        raise DTypeError(
            f"a multiple must be tangent at the same point: the factor is complex and the point {v.dtype}, expected "
            "a real factor. Work at x.to(torch.complex128)."
        )
    return scalar
