"""Rank-one data go through a chain from both ends: the state of every sample where the two walks meet.

From the left a sample's state ``h`` becomes ``sum_i x_k[i] h A_k[:, i, :]`` behind core k, from the right likewise.
Every sample has a power of two of its own, so that thousands of sites neither overflow nor vanish. Where the compiled
kernels serve, both walks are one call, which keeps the states, and the gradients of all cores are another.

Cost: for data that are values of sites a product ``(b, r) (r, s)`` at each site there and two on the way back; ``n``
times that for vectors of n entries.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tensortrain.cores.algebra import dot_parts
from tensortrain.cores.scaling import in_dtype, split_pow2, work_dtype
from tensortrain.cores.unfold import as_left, as_right
from tensortrain.system.native import library
from tensortrain.system.tracing import can_look

__all__ = ["Halves", "Rows", "data_halves", "log_abs", "log_square_norm", "outer", "values_of_data"]

Rows = Tensor | Sequence[Tensor]


class Halves(NamedTuple):
    """Where two walks meet: ``left`` ``(b, r)`` and ``right`` ``(b, s)``, together times ``2**exponent``."""

    left: Tensor
    right: Tensor
    exponent: Tensor  # (b,) int32


def data_halves(cores: Sequence[Tensor], data: Rows, n_left: int | None = None) -> Halves:
    """Walk a batch of data from both ends of a chain.

    Args:
        cores: ``(r, n, s)`` each; boundary ranks 1. The first ``n_left`` of them and the others need not fit together:
            cores may be missing between them, whose data are passed over.
        data: Values ``(b, d)`` int64, where -1 sums a site out; or vectors, ``(d, b, n)`` or for each site ``(b, n)``.
        n_left: How many cores the walk from the left takes; all when left out.

    Returns:
        Halves: differentiable in the cores and the vectors, to any order. Half precisions are walked in float32.
    """
    wide = in_dtype(cores, work_dtype(cores[0].dtype))
    n_left = len(wide) if n_left is None else n_left
    values, vectors = _apart(data, wide[0].dtype)
    if _kernels(wide) is None:
        return _walked(wide, values, vectors, n_left)
    found: Any = _Walk.apply(values, n_left, len(wide), *wide, *vectors)
    return Halves(*found)


def _apart(data: Rows, dtype: torch.dtype) -> tuple[Tensor | None, list[Tensor]]:
    """Values, or vectors in a dtype: one tensor of three axes or one for each site."""
    if not isinstance(data, Tensor):
        return None, in_dtype(data, dtype)
    if data.ndim == 3:
        return None, in_dtype([data], dtype)
    return data.long(), []


def values_of_data(cores: Sequence[Tensor], data: Rows) -> tuple[Tensor, Tensor]:
    """``(m, e)`` with the chain's value ``m * 2**e`` for each sample ``(b,)``; arguments as for ``data_halves``."""
    found = data_halves(cores, data, len(cores) // 2)
    return (found.left * found.right).sum(-1), found.exponent


def log_abs(mantissa: Tensor, exponent: Tensor) -> Tensor:
    """``ln |m * 2**e|``: minus infinity at zero, which leaves the derivatives of the others finite."""
    size = mantissa.abs()
    is_there = ~(size <= 0)
    log = size.where(is_there, 1.0).log().where(is_there, -math.inf)
    return log + exponent.to(log.dtype) * math.log(2)


def outer(a: Tensor, b: Tensor) -> Tensor:
    """``(.., p)`` and ``(.., q)`` to ``(.., p q)``."""
    return (a.unsqueeze(-1) * b.unsqueeze(-2)).flatten(-2)


def _kernels(cores: Sequence[Tensor]) -> Any | None:
    """The compiled walks, where they may serve."""
    first = cores[0]
    if first.device.type != "cpu" or first.dtype not in (torch.float32, torch.float64):
        return None
    return library() if can_look(first) else None


class _Walk(torch.autograd.Function):
    """Both walks as one step of autograd."""

    @staticmethod
    def forward(ctx: Any, values: Tensor | None, n_left: int, order: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        left, right, exponent, *kept = library().data_walk_there(*_plain(values, n_left, order, tensors))  # type: ignore[union-attr]
        ctx.n_left, ctx.order = n_left, order
        ctx.save_for_backward(values, *kept, *tensors)
        ctx.mark_non_differentiable(exponent)
        return left, right, exponent

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        values, states, factors, *tensors = ctx.saved_tensors
        if torch.is_grad_enabled():  # derivatives of derivatives: the steps are recorded
            return (None, None, None, *_recorded(values, ctx.n_left, ctx.order, tensors, grads[:2]))
        needs = any(ctx.needs_input_grad[3 + ctx.order :])
        plain = _plain(values, ctx.n_left, ctx.order, tensors)
        of_cores, of_vectors = library().data_walk_back(*plain, states, factors, *grads[:2], needs)  # type: ignore[union-attr]
        return (None, None, None, *of_cores, *(of_vectors or [None] * (len(tensors) - ctx.order)))


def _plain(values: Tensor | None, n_left: int, order: int, tensors: Sequence[Tensor]) -> tuple[Any, ...]:
    contiguous = [tensor.contiguous() for tensor in tensors]
    return contiguous[:order], n_left, None if values is None else values.contiguous(), contiguous[order:]


def _recorded(
    values: Tensor | None, n_left: int, order: int, tensors: Sequence[Tensor], grads: Sequence[Tensor]
) -> tuple[Tensor | None, ...]:
    found = _walked(tensors[:order], values, tensors[order:], n_left)
    pairs = [(out, grad) for out, grad in zip(found[:2], grads, strict=True) if out.requires_grad]
    outs, given = [out for out, _ in pairs], [grad for _, grad in pairs]
    needed = [tensor for tensor in tensors if tensor.requires_grad]
    made = iter(torch.autograd.grad(outs, needed, given, create_graph=True, allow_unused=True))
    return tuple(next(made) if tensor.requires_grad else None for tensor in tensors)


# -- the same in steps -----------------------------------------------------------------------------------


def _walked(cores: Sequence[Tensor], values: Tensor | None, vectors: Sequence[Tensor], n_left: int) -> Halves:
    rows = vectors[0] if len(vectors) == 1 and vectors[0].ndim == 3 else vectors
    if values is not None:
        rows = values.T
    one = cores[0].new_ones(values.shape[0] if values is not None else rows[0].shape[0], 1)
    exponent = torch.zeros(one.shape[0], dtype=torch.int32, device=one.device)
    left = right = one
    for k in range(n_left):
        left, step = split_pow2(_past_left(left, cores[k], rows[k]), 1)
        exponent = exponent + step
    for k in range(1, len(cores) - n_left + 1):
        right, step = split_pow2(_past_right(right, cores[-k], rows[-k]), 1)
        exponent = exponent + step
    return Halves(left, right, exponent)


def _past_left(state: Tensor, core: Tensor, row: Tensor) -> Tensor:
    if row.is_floating_point() or row.is_complex():
        return outer(state, row) @ as_left(core)
    return _picked((state @ as_right(core)).unflatten(-1, core.shape[1:]).movedim(1, -1), row)


def _past_right(state: Tensor, core: Tensor, row: Tensor) -> Tensor:
    found = (state @ as_left(core).mT).unflatten(-1, core.shape[:2])  # b r n
    if row.is_floating_point() or row.is_complex():
        return (found * row.unsqueeze(-2)).sum(-1)
    return _picked(found, row)


def _picked(every: Tensor, values: Tensor) -> Tensor:
    """Of ``(b, r, n)`` the entry of each sample's value, the sum where it is negative."""
    index = values.clamp_min(0)[:, None, None].expand(-1, every.shape[1], 1)
    return torch.where((values < 0)[:, None], every.sum(-1), every.gather(-1, index).squeeze(-1))


# -- the norm --------------------------------------------------------------------------------------------


def log_square_norm(cores: Sequence[Tensor]) -> Tensor:
    """``ln <chain, chain>`` of cores ``(r, n, s)``, differentiable to any order; minus infinity for a zero chain."""
    wide = in_dtype(cores, work_dtype(cores[0].dtype))
    if _kernels(wide) is not None and torch.is_grad_enabled() and any(core.requires_grad for core in wide):
        found: Tensor = _LogSquareNorm.apply(*wide)
        return found
    return _log_square_norm(wide)


def _log_square_norm(cores: Sequence[Tensor]) -> Tensor:
    mantissa, exponent = dot_parts(cores, cores)
    return log_abs(mantissa, exponent)


class _LogSquareNorm(torch.autograd.Function):
    """The norm as one step of autograd."""

    @staticmethod
    def forward(ctx: Any, *cores: Tensor) -> Tensor:
        ctx.save_for_backward(*cores)
        return _log_square_norm(cores)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        cores = ctx.saved_tensors
        if torch.is_grad_enabled():
            return torch.autograd.grad(_log_square_norm(cores), cores, grads[0], create_graph=True)
        found = library().chain_norm_grads([core.contiguous() for core in cores])  # type: ignore[union-attr]
        return tuple(torch._foreach_mul(found, float(grads[0])))
