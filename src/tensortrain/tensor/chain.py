"""Functions on lists of cores ``(r, n, s)``, on which both types are built.

A TTMatrix joins its two modes to one before it calls these, and splits it again.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tensortrain.tensor.scaling import split_pow2

__all__ = [
    "add_cores",
    "constant_cores",
    "contract",
    "dot_parts",
    "hadamard_cores",
    "join_pieces",
    "norm_parts",
    "orthogonalize_cores",
]

Span = tuple[int, int]


def contract(cores: Sequence[Tensor]) -> Tensor:
    """The full array ``(n_1, .., n_d)`` of a list of cores."""
    state = cores[0].flatten(0, 1)
    for core in cores[1:]:
        state = _absorb_left(state, core).flatten(0, 1)  # rows: all modes so far, slowest first
    return state.reshape([core.shape[1] for core in cores])


def join_pieces(pieces: Sequence[Tensor]) -> list[Tensor]:
    """Multiply matrices ``(r, s)`` into neighbouring cores ``(r, n, s)``, to the right where there is one.

    Without any core the result is the single 1 x 1 matrix that the chain stands for.
    """
    cores: list[Tensor] = []
    carry: Tensor | None = None
    for piece in pieces:
        if carry is not None:
            piece = carry @ piece if piece.ndim == 2 else _absorb_left(carry, piece)
        if piece.ndim == 2:
            carry = piece
        else:
            cores.append(piece)
            carry = None
    if carry is None:
        return cores
    if not cores:
        return [carry]
    cores[-1] = torch.tensordot(cores[-1], carry, dims=1)
    return cores


def constant_cores(modes: Sequence[int], value: int | float | complex | Tensor, like: Tensor) -> list[Tensor]:
    """Rank-1 cores whose every entry is ``value``."""
    cores = [like.new_ones((1, n, 1)) for n in modes]
    cores[0] = cores[0] * value
    return cores


def add_cores(left: Sequence[Tensor], right: Sequence[Tensor]) -> list[Tensor]:
    """Cores of the sum: ranks add."""
    if len(left) == 1:
        return [left[0] + right[0]]
    first = torch.cat((left[0], right[0]), dim=2)
    last = torch.cat((left[-1], right[-1]), dim=0)
    return [first, *map(_block_diagonal, left[1:-1], right[1:-1]), last]


def hadamard_cores(left: Sequence[Tensor], right: Sequence[Tensor]) -> list[Tensor]:
    """Cores of the elementwise product: ranks multiply."""
    return [torch.einsum("rns,tnu->rtnsu", a, b).flatten(3, 4).flatten(0, 1) for a, b in zip(left, right, strict=True)]


def dot_parts(left: Sequence[Tensor], right: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """``(m, e)`` with ``<left, right> = m * 2**e``; the left one is conjugated. Cost: O(d n r^3)."""
    env = left[0].new_ones((1, 1))
    exponent = torch.zeros((), dtype=torch.int32, device=env.device)
    for a, b in zip(left, right, strict=True):
        # two contractions, never r^4
        env = torch.tensordot(a.conj(), _absorb_left(env, b), dims=([0, 1], [0, 1]))
        env, step = split_pow2(env)
        exponent = exponent + step
    return env[0, 0], exponent


def norm_parts(cores: Sequence[Tensor], center: Span) -> tuple[Tensor, Tensor]:
    """``(m, e)`` with the Frobenius norm ``m * 2**e``, real, differentiable to any order.

    The value comes from orthogonalization, exact to rounding even where a sum cancels. Its derivative comes
    from the inner product, since that of a QR does not exist for cores of deficient rank.
    """
    mantissa, exponent = _norm_by_qr([core.detach() for core in cores], center)
    if torch.is_grad_enabled() and any(core.requires_grad for core in cores):
        square = dot_parts(cores, cores)[0]
        square = square.real if square.is_complex() else square
        root = square.clamp_min(torch.finfo(square.dtype).tiny).sqrt()
        mantissa = mantissa * (root / root.detach())
    return mantissa, exponent


def orthogonalize_cores(cores: Sequence[Tensor], center: Span, k: int) -> tuple[list[Tensor], Tensor]:
    """Cores with all but core ``k`` orthonormal, and the power of two taken out of core ``k``.

    Args:
        cores: ``(r, n, s)`` each.
        center: Range outside which the cores are orthonormal already.
        k: The core that keeps the norm.
    """
    out = list(cores)
    exponent = torch.zeros((), dtype=torch.int32, device=out[0].device)
    for at in range(center[0], k):
        out[at], carry = left_qr(out[at])
        carry, step = split_pow2(carry)
        out[at + 1] = _absorb_left(carry, out[at + 1])
        exponent = exponent + step
    for at in range(center[1], k, -1):
        out[at], carry = right_qr(out[at])
        carry, step = split_pow2(carry)
        out[at - 1] = torch.tensordot(out[at - 1], carry, dims=1)
        exponent = exponent + step
    out[k], step = split_pow2(out[k])
    return out, exponent + step


def left_qr(core: Tensor) -> tuple[Tensor, Tensor]:
    """``core = q . carry`` with ``q`` ``(r, n, t)`` left-orthogonal and ``carry`` ``(t, s)``."""
    q, carry = torch.linalg.qr(core.flatten(0, 1))
    return q.reshape(*core.shape[:2], q.shape[1]), carry


def right_qr(core: Tensor) -> tuple[Tensor, Tensor]:
    """``core = carry . q`` with ``q`` ``(t, n, s)`` right-orthogonal and ``carry`` ``(r, t)``."""
    q, carry = torch.linalg.qr(core.flatten(1, 2).mH)
    return q.mH.reshape(q.shape[1], *core.shape[1:]), carry.mH


def _absorb_left(carry: Tensor, core: Tensor) -> Tensor:
    """``(t, r) . (r, n, s) -> (t, n, s)``."""
    return torch.tensordot(carry, core, dims=1)


def _block_diagonal(a: Tensor, b: Tensor) -> Tensor:
    (r, n, s), (t, _, u) = a.shape, b.shape
    top = torch.cat((a, a.new_zeros((r, n, u))), dim=2)
    bottom = torch.cat((b.new_zeros((t, n, s)), b), dim=2)
    return torch.cat((top, bottom), dim=0)


def _norm_by_qr(cores: Sequence[Tensor], center: Span) -> tuple[Tensor, Tensor]:
    lo, hi = center
    state, exponent = split_pow2(cores[lo])
    for core in cores[lo + 1 : hi + 1]:
        carry = torch.linalg.qr(state.flatten(0, 1), mode="r").R
        state, step = split_pow2(_absorb_left(carry, core))
        exponent = exponent + step
    return torch.linalg.vector_norm(state), exponent
