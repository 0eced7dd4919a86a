"""Exact operations on lists of cores ``(.., r, n, s)``: the full array, sums and products, inner products."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from tensortrain.cores.environments import value_parts
from tensortrain.cores.scales import Exponents, Kept, Scale, common, guarded, plain_exponent
from tensortrain.cores.scaling import split_pow2, spread_pow2, times_pow2, work_dtype
from tensortrain.cores.unfold import absorb_left, absorb_right, as_left, over_core
from tensortrain.cores.walks import product_walk

__all__ = [
    "add_cores",
    "broadcast_cores",
    "constant_cores",
    "contract",
    "deviation_parts",
    "dot_parts",
    "hadamard_core",
    "hadamard_cores",
    "join_pieces",
    "pad_zeros",
]


def contract(cores: Sequence[Tensor]) -> Tensor:
    """The full array ``(.., n_1, .., n_d)`` of a list of cores. Overflows only where an entry itself does."""
    dtype, n_batch = cores[0].dtype, cores[0].ndim - 3
    wide = [core.to(work_dtype(dtype)) for core in cores]
    state = guarded(wide, partial(_contracted, wide, n_batch), n_batch).to(dtype)
    return state.reshape(*cores[0].shape[:-3], *(core.shape[-2] for core in cores))


def _contracted(cores: Sequence[Tensor], n_batch: int, scale: Scale) -> Tensor:
    """``(.., n_1 .. n_d, 1)``: rows are all modes so far, slowest first, and each has an exponent of its own."""
    core, waiting = scale.weigh(cores[0], 0)
    state = as_left(core)
    of_rows: Exponents = 0
    for core in cores[1:]:
        state, step = scale.split(state, axis=-2)
        of_rows = plain_exponent(of_rows + step)
        state, step = scale.split(state)
        core, waiting = scale.weigh(core, waiting + step)
        state = as_left(absorb_left(state, core))
        of_rows = of_rows.repeat_interleave(core.shape[-2], -1) if isinstance(of_rows, Tensor) else of_rows
    return times_pow2(state, plain_exponent(of_rows + waiting))


def join_pieces(
    pieces: Sequence[Tensor],
    n_batch: int = 0,
    *,
    dtype: torch.dtype | None = None,
    waiting: Mapping[int, Exponents] | None = None,
) -> list[Tensor]:
    """Multiply matrices ``(.., r, s)`` into neighbouring cores ``(.., r, n, s)``, to the right where there is one.

    Args:
        pieces: Matrices and cores. Without any core the result is the single matrix that the chain stands for.
        n_batch: Number of batch axes.
        dtype: Of the result, if it is another one.
        waiting: Exponents ``(.., s)`` at the right bond of some pieces.
    """
    dtype = dtype or pieces[0].dtype
    kept = {at: exponents for at, exponents in (waiting or {}).items() if isinstance(exponents, Tensor)}
    if not kept and not any(piece.ndim == n_batch + 2 for piece in pieces):
        return [piece.to(dtype) for piece in pieces]
    wide = [piece.to(work_dtype(dtype)) for piece in pieces]
    run = partial(_joined, wide, n_batch, kept)
    joined = run(Kept(n_batch)) if kept else guarded(wide, run, n_batch, storage=dtype)
    return [core.to(dtype) for core in joined]


def _joined(pieces: Sequence[Tensor], n_batch: int, extra: Mapping[int, Exponents], scale: Scale) -> list[Tensor]:
    cores: list[Tensor] = []
    carry: Tensor | None = None
    waiting: Exponents = 0
    for at, piece in enumerate(pieces):
        piece, waiting = scale.weigh(piece, waiting)
        is_matrix = piece.ndim == n_batch + 2
        if carry is not None:
            piece = carry @ piece if is_matrix else absorb_left(carry, piece)
        if at + 1 < len(pieces) or not is_matrix:
            piece, step = scale.split(piece)
            waiting = waiting + step
        waiting = waiting + extra.get(at, 0)
        carry = piece if is_matrix else None
        if carry is None:
            cores.append(piece)
    if carry is not None and cores:
        cores[-1] = absorb_right(cores[-1], carry)
    elif carry is not None:
        cores = [carry]
    exponent = plain_exponent(waiting)
    return spread_pow2(cores, exponent[..., 0] if isinstance(exponent, Tensor) else exponent)


def constant_cores(modes: Sequence[int], value: int | float | complex | Tensor, like: Tensor) -> list[Tensor]:
    """Rank-1 cores whose every entry is ``value``, a number or one for each member of the batch of ``like``."""
    batch = like.shape[:-3]
    cores = [like.new_ones((*batch, 1, n, 1)) for n in modes]
    cores[0] = cores[0] * over_core(value)
    return cores


def add_cores(left: Sequence[Tensor], right: Sequence[Tensor]) -> list[Tensor]:
    """Cores of the sum: ranks add."""
    if len(left) == 1:
        return [left[0] + right[0]]
    first = torch.cat((left[0], right[0]), dim=-1)
    last = torch.cat((left[-1], right[-1]), dim=-3)
    return [first, *map(_block_diagonal, left[1:-1], right[1:-1]), last]


def _block_diagonal(a: Tensor, b: Tensor) -> Tensor:
    top = torch.cat((a, a.new_zeros((*a.shape[:-1], b.shape[-1]))), dim=-1)
    bottom = torch.cat((b.new_zeros((*b.shape[:-1], a.shape[-1])), b), dim=-1)
    return torch.cat((top, bottom), dim=-3)


def broadcast_cores(cores: Sequence[Tensor], shape: Sequence[int]) -> list[Tensor]:
    """Modes of size 1 repeated, and new ones in front, as NumPy broadcasts."""
    one = cores[0].new_ones((*cores[0].shape[:-3], 1, 1, 1))
    padded = [*[one] * (len(shape) - len(cores)), *cores]
    pairs = zip(padded, shape, strict=True)
    return [core if core.shape[-2] == n else core.expand(*core.shape[:-2], n, core.shape[-1]) for core, n in pairs]


def pad_zeros(cores: Sequence[Tensor], k: int, width: tuple[int, int]) -> list[Tensor]:
    """Cores with so many zeros before and after what mode k has."""
    # Zero rows leave orthonormal columns orthonormal: a canonical form is kept.
    out = list(cores)
    out[k] = torch.nn.functional.pad(out[k], (0, 0, *width)) if any(width) else out[k]
    return out


def hadamard_cores(left: Sequence[Tensor], right: Sequence[Tensor]) -> list[Tensor]:
    """Cores of the elementwise product: ranks multiply."""
    return product_walk(left, right) or [hadamard_core(a, b) for a, b in zip(left, right, strict=True)]


def hadamard_core(a: Tensor, b: Tensor) -> Tensor:
    """``(.., r, n, s)`` and ``(.., t, n, u)`` to ``(.., r t, n, s u)``."""
    product = a[..., :, None, :, :, None] * b[..., None, :, :, None, :]  # r t n s u
    return product.flatten(-2, -1).flatten(-4, -3)


def dot_parts(left: Sequence[Tensor], right: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """``(m, e)`` with ``<left, right> = m * 2**e``; the left one is conjugated. Cost: O(d n r^3)."""
    return value_parts((left, right))


def deviation_parts(cores: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """``(m, e)`` with the root-mean-square ``m * 2**e`` of the entries less their mean.

    What an index adds to the spread is what its core differs from its own mean, seen through the mean of all before it:
    nothing of the size of the mean is ever subtracted, so that a constant has no spread at all.
    """
    n_batch = cores[0].ndim - 3
    rows, exponent = guarded(cores, partial(_deviation, cores, n_batch), n_batch)
    rows, step = split_pow2(rows, n_batch)
    return torch.linalg.vector_norm(rows, dim=(-2, -1)), exponent + step


def _deviation(cores: Sequence[Tensor], n_batch: int, scale: Scale) -> tuple[Tensor, Tensor]:
    mean = cores[0].new_ones((*cores[0].shape[:-3], 1, 1))
    rows = mean[..., :0, :]  # their products with themselves are the covariance of all so far
    waiting: Exponents = 0
    for k, core in enumerate(cores):
        if k:
            state, step = scale.split(torch.cat((mean, rows), dim=-2))
            mean, rows, waiting = state[..., :1, :], state[..., 1:, :], waiting + step
        core, waiting = scale.weigh(core, waiting)
        middle = core.mean(-2, keepdim=True)
        spread = torch.cat((absorb_left(rows, core), absorb_left(mean, core - middle)), dim=-3)
        rows = torch.linalg.qr(as_left(spread) / math.sqrt(max(1, core.shape[-2])), mode="r").R
        mean = mean @ middle.squeeze(-2)
    return common(rows, waiting, n_batch)
