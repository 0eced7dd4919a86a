"""Orthogonal projection onto a tangent space, of anything that can be contracted with a train."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from tensortrain.cores.scaling import times_pow2
from tensortrain.errors import KindError, ShapeError
from tensortrain.numerics.manifold.point import Point
from tensortrain.numerics.manifold.tangent import TangentVector, gauged, zero_deltas
from tensortrain.tensor.base import CoreChain, check_same_place
from tensortrain.tensor.matrix import TTMatrix, dense_to_paired

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
    terms = _checked_terms(z, point)
    totals = zero_deltas(point)
    for term in terms:
        if isinstance(term, Tensor):
            totals = _add(totals, _dense_components(term, point))
    trains = sorted((term._merged() for term in terms if isinstance(term, CoreChain)), key=_ranks)
    for _, group in groupby(trains, key=_ranks):
        stacked = [torch.stack(cores) for cores in zip(*group, strict=True)]
        totals = _add(totals, _train_components(stacked, point))
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


def _add(totals: Sequence[Tensor], parts: Sequence[Tensor]) -> list[Tensor]:
    return [total + part for total, part in zip(totals, parts, strict=True)]


def _ranks(cores: Sequence[Tensor]) -> tuple[int, ...]:
    return tuple(core.shape[0] for core in cores)


def _dense_components(z: Tensor, point: Point) -> list[Tensor]:
    """``U_{<k}^H Z V_{>k}^H`` for every k, ``(r, n, s)`` each."""
    if isinstance(point.base, TTMatrix):
        z = dense_to_paired(z, point.base.out_modes, point.base.in_modes)
    out = []
    state = z[None]  # r n_k .. n_d
    for k in range(point.order):
        component = state[..., None]  # r n_k .. n_d t
        for v in reversed(point.right[k:]):
            component = torch.tensordot(component, v.conj(), dims=([-2, -1], [1, 2]))
        out.append(component)
        if k < point.order - 1:
            state = torch.tensordot(point.left[k].conj(), state, dims=([0, 1], [0, 1]))
    return out


def _train_components(cores: Sequence[Tensor], point: Point) -> list[Tensor]:
    """The same for a sum of b trains of equal ranks, given as cores ``(b, s, n, u)``."""
    envs = _right_envs(cores, point)
    left, scale = cores[0].new_ones((len(cores[0]), 1, 1)), _no_exponent(cores[0])
    out = []
    for k, core in enumerate(cores):
        state = torch.einsum("brs,bsnu->brnu", left, core)
        right, exponent = envs[k]
        out.append(torch.einsum("brnu,btu->rnt", state, times_pow2(right, exponent + scale)))
        if k < point.order - 1:
            left, step = _split_rows(torch.einsum("rnt,brnu->btu", point.left[k].conj(), state))
            scale = scale + step
    return out


def _right_envs(cores: Sequence[Tensor], point: Point) -> list[tuple[Tensor, Tensor]]:
    """Of all right of each core: contraction with ``V^*``, ``(b, t, u)``, and its powers of two, ``(b, 1, 1)``."""
    env, exponent = cores[0].new_ones((len(cores[0]), 1, 1)), _no_exponent(cores[0])
    envs = [(env, exponent)]
    for core, v in zip(reversed(cores[1:]), reversed(point.right), strict=True):
        env, step = _split_rows(torch.einsum("bsnt,rnt->brs", torch.einsum("bsnu,btu->bsnt", core, env), v.conj()))
        exponent = exponent + step
        envs.append((env, exponent))
    return envs[::-1]


def _no_exponent(like: Tensor) -> Tensor:
    return torch.zeros((len(like), 1, 1), dtype=torch.int32, device=like.device)


def _split_rows(env: Tensor) -> tuple[Tensor, Tensor]:
    """``split_pow2`` for every member of a batch: long chains neither overflow nor vanish."""
    exponent = torch.frexp(env.detach().abs().amax(dim=(1, 2), keepdim=True)).exponent
    return times_pow2(env, -exponent), exponent


def _checked_terms(z: Any, point: Point) -> list[Tensor | CoreChain]:
    terms = [term.value if isinstance(term, TangentVector) else term for term in _as_list(z)]
    for term in terms:
        _check_term(term, point.base)
    return terms


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
