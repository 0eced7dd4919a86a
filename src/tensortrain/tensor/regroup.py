"""The same entries under other modes: merge and split, and put in another order."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor

from tensortrain.cores.canonical import orthogonalize_cores
from tensortrain.cores.linalg import choose_rank, cut, left_basis
from tensortrain.cores.scaling import place_pow2
from tensortrain.cores.tolerance import checked_eps, compute_dtype
from tensortrain.cores.unfold import absorb_left, as_left
from tensortrain.errors import ModeIndexError, ShapeError
from tensortrain.tensor.base import CoreChain
from tensortrain.tensor.matrix import TTMatrix
from tensortrain.tensor.rounding import round_tt
from tensortrain.tensor.train import TensorTrain

Chain = TypeVar("Chain", bound=CoreChain)

__all__ = ["permuted", "reshaped", "reshaped_matrix"]

_ROUNDING = 1e-15  # relative size of singular values that an SVD in float64 makes where there are none


def reshaped(x: TensorTrain, shape: Sequence[int], eps: float | None) -> TensorTrain:
    """See ``TensorTrain.reshape``."""
    modes = _inferred(tuple(int(n) for n in shape), x.numel)
    if math.prod(modes) != x.numel or not modes or min(modes) < 1:
        raise ShapeError(
            f"a reshape must keep the number of entries: shape has {modes} with product {math.prod(modes)}, expected "
            f"{x.numel} (x has shape {x.shape}). Choose factors of it."
        )
    cores, has_split = _regroup([core.unsqueeze(-2) for core in x.cores], [(n, 1) for n in modes])
    out = TensorTrain(tuple(core[..., 0, :] for core in cores))
    return _tightened(out, has_split, eps)


def reshaped_matrix(a: TTMatrix, out_modes: Sequence[int], in_modes: Sequence[int], eps: float | None) -> TTMatrix:
    """See ``TTMatrix.reshape``."""
    out, into = tuple(int(n) for n in out_modes), tuple(int(n) for n in in_modes)
    fits = len(out) == len(into) and out and min(out + into) >= 1
    if not fits or (math.prod(out), math.prod(into)) != a.shape:
        raise ShapeError(
            f"a reshape must keep rows and columns: out_modes has {out} and in_modes {into}, expected equally many, "
            f"with products {a.shape[0]} and {a.shape[1]}. Pad the shorter one with modes of size 1."
        )
    cores, has_split = _regroup(list(a.cores), list(zip(out, into, strict=True)))
    return _tightened(TTMatrix(tuple(cores)), has_split, eps)


def permuted(x: TensorTrain, dims: Sequence[int], eps: float | None) -> TensorTrain:
    """See ``TensorTrain.permute``."""
    d = x.order
    order = [int(k) % d if -d <= k < d else d for k in dims]
    if sorted(order) != list(range(d)):
        raise ModeIndexError(
            f"dims must name every mode once: dims has {tuple(dims)}, expected a permutation of {tuple(range(d))}. "
            "Check x.order."
        )
    swaps = _swaps(order)
    if not swaps:
        return x
    wide = compute_dtype(x.dtype)
    # The cut of one swap is not orthogonal to that of the next: the tolerances add up.
    share = max(checked_eps(eps, x.dtype, d) / len(swaps), _ROUNDING)
    cores, at = [core.to(wide) for core in x.cores], 0
    center = x.center if wide == x.dtype else (0, d - 1)
    total = torch.zeros((), dtype=torch.int32, device=x.device)
    for k in swaps:
        cores, step = orthogonalize_cores(cores, center, k)
        total = total + step
        cores[k], cores[k + 1] = _swapped(cores[k], cores[k + 1], share)
        center = (k + 1, k + 1)
        at = k + 1
    placed, single = place_pow2(cores, total, at, x.dtype)
    return TensorTrain(tuple(core.to(x.dtype) for core in placed), center if single else (0, -1))


def _inferred(modes: tuple[int, ...], numel: int) -> tuple[int, ...]:
    if modes.count(-1) != 1:
        return modes
    rest = math.prod(n for n in modes if n != -1)
    return tuple(numel // max(1, rest) if n == -1 else n for n in modes)


def _regroup(cores: Sequence[Tensor], pairs: Sequence[tuple[int, int]]) -> tuple[list[Tensor], bool]:
    """Cores ``(.., r, i, j, s)`` with new modes, without arithmetic but for merging; and whether ranks grew.

    From the left: what lies pending is split where the next modes divide it, and else merged with the next core.
    """
    waiting = list(cores)[::-1]
    pending = waiting.pop()
    out: list[Tensor] = []
    has_split = False
    for at, (i, j) in enumerate(pairs):
        while pending.shape[-3] % i or pending.shape[-2] % j or (at == len(pairs) - 1 and waiting):
            if not waiting:
                raise ShapeError(
                    f"new modes must arise from the old ones by merging and splitting: mode {at} has size {(i, j)}, "
                    f"expected divisors of {tuple(pending.shape[-3:-1])}. Merge all modes to one first."
                )
            pending = _merge(pending, waiting.pop())
        if at == len(pairs) - 1:
            out.append(pending)
            break
        if pending.shape[-3:-1] == (i, j) and waiting:
            out.append(pending)
            pending = waiting.pop()
            continue
        left, pending = _split(pending, i, j)
        has_split = has_split or (i * j > 1 and math.prod(pending.shape[-3:-1]) > 1)
        out.append(left)
    if out[-1].shape[-3:-1] != tuple(pairs[-1]):
        raise ShapeError(
            f"new modes must arise from the old ones by merging and splitting: the last modes come to "
            f"{tuple(out[-1].shape[-3:-1])}, expected {pairs[-1]}. Merge all modes to one first."
        )
    return out, has_split


def _merge(a: Tensor, b: Tensor) -> Tensor:
    """``(.., r, i, j, s)`` and ``(.., s, k, l, t)`` to ``(.., r, i k, j l, t)``."""
    (i, j), following = a.shape[-3:-1], b.shape[-3:-1]
    product = a.flatten(-4, -2) @ b.flatten(-3, -1)  # (r i j) (k l t)
    split = product.unflatten(-2, (-1, i, j)).unflatten(-1, (*following, -1))  # r i j k l t
    return split.transpose(-4, -3).flatten(-3, -2).flatten(-4, -3)


def _split(core: Tensor, i: int, j: int) -> tuple[Tensor, Tensor]:
    """``(.., r, i k, j l, s)`` to ``(.., r, i, j, t)`` and ``(.., t, k, l, s)``, one of them a reshaped identity."""
    r, s = core.shape[-4], core.shape[-1]
    rest = k, m = core.shape[-3] // i, core.shape[-2] // j
    parts = core.unflatten(-3, (i, k)).unflatten(-2, (j, m)).transpose(-4, -3)  # r i j k m s
    matrix = parts.flatten(-3, -1).flatten(-4, -2)  # (r i j) (k m s)
    rows, columns = matrix.shape[-2:]
    if rows <= columns:
        eye = torch.eye(rows, dtype=core.dtype, device=core.device).expand(*core.shape[:-4], rows, rows)
        return eye.unflatten(-2, (r, i, j)), matrix.unflatten(-1, (*rest, s))
    eye = torch.eye(columns, dtype=core.dtype, device=core.device).expand(*core.shape[:-4], columns, columns)
    return matrix.unflatten(-2, (r, i, j)), eye.unflatten(-1, (*rest, s))


def _tightened(x: Chain, has_split: bool, eps: float | None) -> Chain:
    return round_tt(x, eps=eps).value if has_split and eps != 0 else x


def _swaps(order: Sequence[int]) -> list[int]:
    """Places of neighbours to swap, in turn, that bring ``0 .. d - 1`` into the given order."""
    current, swaps = list(range(len(order))), []
    for place, wanted in enumerate(order):
        for k in range(current.index(wanted) - 1, place - 1, -1):
            current[k], current[k + 1] = current[k + 1], current[k]
            swaps.append(k)
    return swaps


def _swapped(a: Tensor, b: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """``(.., r, n, s)``, ``(.., s, m, t)`` to left-orthogonal ``(.., r, m, u)`` and ``(.., u, n, t)``."""
    (r, n), (m, t) = a.shape[-3:-1], b.shape[-2:]
    pair = absorb_left(as_left(a), b).unflatten(-3, (r, n)).transpose(-3, -2)  # r m n t
    matrix = pair.flatten(-2, -1).flatten(-3, -2)
    with torch.no_grad():
        s = left_basis(matrix)[1]
        rank, _ = choose_rank(s, share * torch.linalg.vector_norm(s, dim=-1), s.shape[-1])
    u, rest = cut(matrix, rank)
    return u.unflatten(-2, (r, m)), rest.unflatten(-1, (n, t))
