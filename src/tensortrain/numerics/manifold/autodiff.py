"""Riemannian derivatives of a function of a train, by automatic differentiation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from tensortrain.cores.scaling import times_pow2
from tensortrain.errors import KindError, NonFiniteError
from tensortrain.numerics.manifold.components import zero_deltas
from tensortrain.numerics.manifold.point import Point
from tensortrain.numerics.manifold.projection import project
from tensortrain.numerics.manifold.tangent import TangentVector, gauged
from tensortrain.tensor.base import CoreChain

__all__ = ["hvp", "riemannian_grad"]

Function = Callable[[Any], Tensor]


def riemannian_grad(f: Function, x: CoreChain | Point, *, check: bool = True) -> TangentVector:
    r"""Riemannian gradient of a function: the projection of its Euclidean gradient, which is never formed.

    One forward and one backward pass through ``f`` at the rank-2r form of ``x`` in which ``delta_k`` stands for
    core k between ``U_{<k}`` and ``V_{>k}``. The train is linear in the deltas, so the gradient by ``delta_k`` is
    ``U_{<k}^H (grad f) V_{>k}^H``, and the gauge projection makes the tangent vector of it.

    Args:
        f: From a train of the kind of ``x`` to a real 0-d tensor. It must depend on the tensor, not on its cores.
        x: The point, ranks r; ``f`` sees trains of ranks ``2 r`` and above.
        check: Whether to refuse functions that depend on the cores, which takes two more evaluations without
            derivatives. Turn it off in a loop once ``f`` has passed.

    Returns:
        TangentVector: ``g`` with ``d/dt f(x + t v) = Re <g, v>`` for tangent ``v``; complex as in torch, so the
        gradient of ``||x||^2`` is ``2 x``.

    Raises:
        KindError: ``f`` returns no real number, is not differentiable, or depends on the cores.
        NonFiniteError: ``f(x)`` is NaN or Inf.
        RankError: An unfolding of ``x`` has a lower rank than the train.

    Cost: one forward and backward pass of ``f`` at ranks ``2 r``, and O(d n r^3) flops.
    Source: Novikov, Rakhuba, Oseledets, SIAM J. Sci. Comput. 44(2), 2022, arXiv:2103.14974.

    Example:
        >>> import tensortrain as tt
        >>> x = tt.randn((4, 5, 6), 2, dtype=torch.float64)
        >>> g = tt.manifold.riemannian_grad(lambda y: tt.dot(y, y), x)
        >>> bool((g.value - 2 * x).norm() <= 1e-12 * x.norm())
        True
    """
    point = Point.of(x)
    if check:
        _refuse_dependence_on_cores(f, point)
    leaves = _leaves(point)
    return gauged(point, _gradient(_value(f, point, leaves), leaves))


def hvp(f: Function, x: CoreChain | Point, z: Any, *, check: bool = True) -> TangentVector:
    r"""Hessian-vector product ``P H P z``: ``H`` the Euclidean Hessian of ``f`` at ``x``, ``P`` the projector.

    This is the Gauss-Newton-like part of the Riemannian Hessian; the curvature of the manifold is left out.
    Differentiates ``Re <grad f, P z>`` by the deltas of ``riemannian_grad``. At complex points ``H`` is linear over
    the reals only.

    Args:
        f: As for ``riemannian_grad``, twice differentiable.
        x: The point.
        z: Whatever ``project`` takes: a dense tensor, a train, a tangent vector, a list.
        check: As for ``riemannian_grad``.

    Raises:
        KindError, NonFiniteError, RankError: As for ``riemannian_grad``.
        KindError, ShapeError, DTypeError, DeviceError: ``z`` does not match ``x``.

    Cost: about twice that of ``riemannian_grad``, and ``project(z, at=x)``.
    Source: Novikov, Rakhuba, Oseledets, arXiv:2103.14974, section 4.

    Example:
        >>> import tensortrain as tt
        >>> x, z = (tt.randn((4, 5, 6), 2, dtype=torch.float64) for _ in range(2))
        >>> v = tt.manifold.hvp(lambda y: tt.dot(y, y) / 2, x, z)
        >>> bool((v - tt.manifold.project(z, at=v.point)).norm() <= 1e-12 * v.norm())
        True
    """
    point = Point.of(x)
    along = project(z, at=point)
    if check:
        _refuse_dependence_on_cores(f, point)
    leaves = _leaves(point)
    value = _value(f, point, leaves)
    with torch.enable_grad():
        first = _gradient(value, leaves, create_graph=True)
        pairs = zip(first, along.deltas, strict=True)
        slope = torch.stack([_real_dot(g, delta.detach()) for g, delta in pairs]).sum()
    if not slope.requires_grad:  # f is linear in the tensor
        return TangentVector(point, tuple(zero_deltas(point)))
    return gauged(point, _gradient(slope, leaves))


def _leaves(point: Point) -> list[Tensor]:
    """Deltas at which the embedding is the point itself."""
    deltas = zero_deltas(point)
    deltas[-1] = times_pow2(point.last, point.exponent)
    return [delta.requires_grad_() for delta in deltas]


def _value(f: Function, point: Point, leaves: Sequence[Tensor]) -> Tensor:
    with torch.enable_grad():
        value = _checked_value(f(point.base._like(point.embed(leaves))))
    if not value.requires_grad:
        raise KindError(
            "f must be differentiable: its value at x does not depend on the cores for autograd, expected a graph. "
            "Avoid detach and no_grad inside f."
        )
    if not bool(torch.isfinite(value)):
        raise NonFiniteError(
            f"f must be finite at x: f(x) has {float(value.detach())}, expected a number. "
            "Choose another starting point."
        )
    return value


def _checked_value(value: Any) -> Tensor:
    if not isinstance(value, Tensor) or value.numel() != 1 or not value.is_floating_point():
        found = f"{value.dtype} of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise KindError(
            f"f must return a real number: f(x) has {found}, expected a real 0-d tensor. "
            "Sum what it returns, or take .real of a complex number."
        )
    return value.reshape(())


def _gradient(value: Tensor, leaves: Sequence[Tensor], *, create_graph: bool = False) -> list[Tensor]:
    found = torch.autograd.grad(value, leaves, create_graph=create_graph, allow_unused=True)
    return [torch.zeros_like(leaf) if g is None else g for leaf, g in zip(leaves, found, strict=True)]


def _real_dot(a: Tensor, b: Tensor) -> Tensor:
    product = a * b.conj()
    return (product.real if product.is_complex() else product).sum()


# -- is it a function of the tensor? -----------------------------------------------------------------


def _refuse_dependence_on_cores(f: Function, point: Point) -> None:
    """Compare ``f`` at two sets of cores that hold one tensor.

    The tensor is a random one near ``x``, since close to a minimum of ``f`` its value may be nothing but rounding.
    The second set has other, higher ranks and a random gauge that is far from unitary.
    """
    generator = torch.Generator().manual_seed(0)
    for shift in (0.25, 1e-3, 0.0):
        cores = _nearby(point, shift, generator)
        first, second = (_plain_value(f, point, each) for each in (cores, _regauged(cores, generator)))
        if bool(torch.isfinite(first) & torch.isfinite(second)):  # else f may only be defined close to x
            break
    unit = max(torch.finfo(first.dtype).eps, torch.finfo(point.last.dtype).eps)
    gap, size = float((first - second).abs()), float(torch.maximum(first.abs(), second.abs()))
    if gap > unit**0.6 * size:  # 4e-10 in float64, 7e-5 in float32
        raise KindError(
            f"f must depend on the tensor, not on its cores: two sets of cores of one tensor gave {float(first):.10g} "
            f"and {float(second):.10g}, expected equal values. Write f with operations on trains (tensortrain.dot, "
            "x.norm(), A @ x, indexing); make it deterministic if it is random; if it computes in lower precision than "
            "x, pass check=False."
        )


def _plain_value(f: Function, point: Point, cores: Sequence[Tensor]) -> Tensor:
    return _checked_value(f(point.base._like(cores))).detach()


def _nearby(point: Point, shift: float, generator: torch.Generator) -> list[Tensor]:
    deltas = [_randn(core.shape, core, generator) for core in (*point.left, point.last)]
    n = sum(delta.numel() for delta in deltas)
    scale = times_pow2(shift * torch.linalg.vector_norm(point.last) / n**0.5, point.exponent)
    deltas = [scale * delta for delta in deltas]
    deltas[-1] = deltas[-1] + times_pow2(point.last, point.exponent)
    return point.embed(deltas)


def _regauged(cores: Sequence[Tensor], generator: torch.Generator) -> list[Tensor]:
    """The same tensor with every inner rank one higher: a pair of factors of the identity at each bond."""
    out = list(cores)
    for k in range(len(out) - 1):
        p = out[k].shape[2]
        q = torch.linalg.qr(_randn((p + 1, p + 1), cores[0], generator)).Q
        scale = 2.0 ** torch.linspace(-1, 1, p, dtype=q.real.dtype, device=q.device)
        idle = q[p:].mH @ _randn((1, p), cores[0], generator)  # in the null space of the other factor
        right = q[:p].mH / scale + idle
        out[k] = torch.tensordot(out[k], scale[:, None] * q[:p], dims=1)
        out[k + 1] = torch.tensordot(right, out[k + 1], dims=1)
    return out


def _randn(shape: Sequence[int], like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(tuple(shape), generator=generator, dtype=like.dtype).to(like.device)
