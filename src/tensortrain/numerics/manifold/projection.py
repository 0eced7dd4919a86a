"""Orthogonal projection onto a tangent space, of anything that can be contracted with a train."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from tensortrain.errors import KindError, ShapeError
from tensortrain.numerics.manifold.components import components_of_dense, components_of_trains
from tensortrain.numerics.manifold.point import Point
from tensortrain.numerics.manifold.tangent import TangentVector, gauged
from tensortrain.tensor.base import CoreChain, check_same_place

__all__ = ["project", "transport"]


def project(z: Any, *, at: CoreChain | Point) -> TangentVector:
    r"""Project orthogonally onto the tangent space at a train.

    With the left bases ``U`` and the right bases ``V`` of the point,
    ``D_k = (I - U_k U_k^H) (U_1 .. U_{k-1})^H Z (V_{k+1} .. V_d)^H``, without the subtraction for ``k = d``.
    The result depends on the tensors only, not on the cores that hold them. It is linear in ``z`` and carries its
    gradient; it carries none to ``at``.

    Args:
        z: A dense tensor of the shape of ``at``; a train of its kind and modes, ranks ``s``; a tangent vector, at
            this or another point; or a list or tuple of these, which stands for their sum. A sum of trains is
            never put into one train: its terms of equal ranks are contracted side by side.
        at: The point: a train whose ranks are those of its tensor, or ``v.point`` of a tangent vector there.

    Returns:
        TangentVector: of norm at most ``||z||``.

    Raises:
        KindError, ShapeError, DTypeError, DeviceError: ``z`` does not match ``at``.
        RankError: An unfolding of ``at`` has a lower rank than the train.

    Cost: O(d n r s (r + s)) flops for each train, O(N r) for a dense tensor of N entries, and O(d n r^3) for the
        bases where ``at`` is a train.
    Source: Lubich, Oseledets, Vandereycken, SIAM J. Numer. Anal. 53(2), 2015, theorem 3.1.

    Example:
        >>> import tensortrain as tt
        >>> x = tt.randn((4, 5, 6), 2, dtype=torch.float64)
        >>> v = tt.manifold.project([tt.ones((4, 5, 6), dtype=torch.float64)] * 3, at=x)
        >>> bool((tt.manifold.project(v, at=x) - v).norm() <= 1e-12 * v.norm())
        True
    """
    point = Point.of(at)
    if isinstance(z, TangentVector) and z.point is point:
        return z
    dense, trains = _checked_terms(z, point)
    totals = components_of_trains(trains, point)
    for term in dense:
        totals = [total + part for total, part in zip(totals, components_of_dense(term, point), strict=True)]
    return gauged(point, totals)


def transport(v: TangentVector, *, to: CoreChain | Point) -> TangentVector:
    """Carry a tangent vector to another point, by projecting it there.

    Args:
        v: Tangent at some train of the same modes; ranks may differ.
        to: The new point.

    Raises:
        KindError: ``v`` is no tangent vector.
        ShapeError, DTypeError, DeviceError, RankError: As for ``project``.

    Cost: O(d n r^3) flops.
    Source: Absil, Mahony, Sepulchre, Optimization Algorithms on Matrix Manifolds, 2008, section 8.1.3.
    """
    if not isinstance(v, TangentVector):
        raise KindError(
            f"only a tangent vector is transported: v has {type(v).__name__}, expected TangentVector. "
            "Use tensortrain.manifold.project(z, at=x)."
        )
    return project(v, at=to)


def _checked_terms(z: Any, point: Point) -> tuple[list[Tensor], list[list[Tensor]]]:
    """The dense tensors among the terms, and the cores ``(r, n, s)`` of the trains."""
    terms = [term.value if isinstance(term, TangentVector) else term for term in _as_list(z)]
    for term in terms:
        _check_term(term, point.base)
    dense = [term for term in terms if isinstance(term, Tensor)]
    return dense, [term._merged() for term in terms if not isinstance(term, Tensor)]


def _as_list(z: Any) -> list[Any]:
    return list(z) if isinstance(z, (list, tuple)) else [z]


def _check_term(term: Any, base: CoreChain) -> None:
    if isinstance(term, Tensor):
        if tuple(term.shape) != base.shape:
            raise ShapeError(
                f"a tensor must have the shape of the point: z has {tuple(term.shape)}, expected {base.shape}. "
                "Reshape it, or build the point with its modes."
            )
    elif type(term) is not type(base):
        raise KindError(
            f"only what has the kind of the point can be projected: z has {type(term).__name__}, expected "
            f"{type(base).__name__}, a tangent vector, a dense tensor, or a list of these. Use riemannian_grad(f, x) "
            "for the gradient of a function."
        )
    elif term._modes_by_name() != base._modes_by_name():
        raise ShapeError(
            f"a train must have the modes of the point: z has {term._modes_by_name()}, expected "
            f"{base._modes_by_name()}. Reshape or pad one of them."
        )
    elif any(core.ndim != 3 for core in term._merged()):
        raise ShapeError(
            f"a train to project must have no batch axis: z has cores of shape {tuple(term.cores[0].shape)}, expected "
            "one train. Pass the members of the batch as a list; it stands for their sum."
        )
    check_same_place("project", base, term)
