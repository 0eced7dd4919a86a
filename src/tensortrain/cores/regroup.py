"""The same entries under other modes: merged and split, put in another order, rows and columns paired."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from tensortrain.cores.canonical import Gauged, Span
from tensortrain.cores.split import split
from tensortrain.cores.tolerance import checked_eps, compute_dtype
from tensortrain.errors import ModeIndexError, ShapeError

__all__ = ["dense_to_paired", "paired_to_dense", "permuted", "reshaped", "reshaped_matrix", "swap_neighbours"]

_ROUNDING = 1e-15  # relative size of singular values that an SVD in float64 makes where there are none


def reshaped(cores: Sequence[Tensor], shape: Sequence[int]) -> tuple[list[Tensor], bool]:
    """Cores ``(.., r, n, s)`` under other modes of the same product, and whether ranks grew."""
    modes = _checked_modes(shape, [core.shape[-2] for core in cores])
    out, has_split = _regroup([core.unsqueeze(-2) for core in cores], [(n, 1) for n in modes])
    return [core[..., 0, :] for core in out], has_split


def reshaped_matrix(
    cores: Sequence[Tensor], out_modes: Sequence[int], in_modes: Sequence[int]
) -> tuple[list[Tensor], bool]:
    """Cores ``(.., r, i, j, s)`` under other row and column modes of the same products, and whether ranks grew."""
    out, into = tuple(int(n) for n in out_modes), tuple(int(n) for n in in_modes)
    rows, columns = (math.prod(core.shape[axis] for core in cores) for axis in (-3, -2))
    fits = len(out) == len(into) and out and min(out + into) >= 1
    if not fits or (math.prod(out), math.prod(into)) != (rows, columns):
        raise ShapeError(
            f"a reshape must keep rows and columns: out_modes has {out} and in_modes {into}, expected equally many, "
            f"with products {rows} and {columns}. Pad the shorter one with modes of size 1."
        )
    return _regroup(cores, list(zip(out, into, strict=True)))


def permuted(
    cores: Sequence[Tensor], center: Span, dims: Sequence[int], eps: float | None
) -> tuple[Sequence[Tensor], Span]:
    """Cores ``(.., r, n, s)`` with their modes in another order, and the range outside which they are orthonormal."""
    swaps = _swaps(_checked_order(dims, len(cores)))
    if not swaps:
        return cores, center
    dtype, wide = cores[0].dtype, compute_dtype(cores[0].dtype)
    # The cut of one swap is not orthogonal to that of the next: the tolerances add up.
    share = checked_eps(eps, dtype, len(cores)) / len(swaps)
    x = Gauged.of([core.to(wide) for core in cores], center if wide == dtype else None, center=swaps[0])
    for k in swaps:
        swap_neighbours(x, k, share)
    return x.stored(dtype)


def swap_neighbours(x: Gauged, k: int, tol: float) -> None:
    """Exchange modes k and k + 1, in place: cut to a share of the norm, with the center at core k + 1 afterwards."""
    found = split(x.local(k, 2).transpose(-3, -2), tol=max(tol, _ROUNDING))
    x.put(k, (found.left, found.right), center=k + 1)


def _checked_modes(shape: Sequence[int], modes: Sequence[int]) -> tuple[int, ...]:
    numel = math.prod(modes)
    new = _inferred(tuple(int(n) for n in shape), numel)
    if math.prod(new) != numel or not new or min(new) < 1:
        raise ShapeError(
            f"a reshape must keep the number of entries: shape has {new} with product {math.prod(new)}, expected "
            f"{numel} (x has shape {tuple(modes)}). Choose factors of it."
        )
    return new


def _inferred(modes: tuple[int, ...], numel: int) -> tuple[int, ...]:
    if modes.count(-1) != 1:
        return modes
    rest = math.prod(n for n in modes if n != -1)
    return tuple(numel // max(1, rest) if n == -1 else n for n in modes)


def _checked_order(dims: Sequence[int], d: int) -> list[int]:
    order = [int(k) % d if -d <= k < d else d for k in dims]
    if sorted(order) != list(range(d)):
        raise ModeIndexError(
            f"dims must name every mode once: dims has {tuple(dims)}, expected a permutation of {tuple(range(d))}. "
            "Check x.order."
        )
    return order


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


def _swaps(order: Sequence[int]) -> list[int]:
    """Places of neighbours to swap, in turn, that bring ``0 .. d - 1`` into the given order."""
    current, swaps = list(range(len(order))), []
    for place, wanted in enumerate(order):
        for k in range(current.index(wanted) - 1, place - 1, -1):
            current[k], current[k + 1] = current[k + 1], current[k]
            swaps.append(k)
    return swaps


def dense_to_paired(w: Tensor, out_modes: Sequence[int], in_modes: Sequence[int]) -> Tensor:
    """``(.., M, N)`` to ``(.., i_1 j_1, .., i_d j_d)``."""
    d, batch = len(out_modes), w.shape[:-2]
    n = len(batch)
    order = [axis for k in range(d) for axis in (n + k, n + d + k)]
    paired = w.reshape(*batch, *out_modes, *in_modes).permute([*range(n), *order])  # i_1 j_1 .. i_d j_d
    return paired.reshape(*batch, *(i * j for i, j in zip(out_modes, in_modes, strict=True)))


def paired_to_dense(paired: Tensor, out_modes: Sequence[int], in_modes: Sequence[int]) -> Tensor:
    """``(.., i_1 j_1, .., i_d j_d)`` to ``(.., M, N)``."""
    d = len(out_modes)
    batch = paired.shape[: paired.ndim - d]
    n = len(batch)
    split = paired.reshape(*batch, *(m for pair in zip(out_modes, in_modes, strict=True) for m in pair))
    order = [*range(n), *range(n, n + 2 * d, 2), *range(n + 1, n + 2 * d, 2)]
    return split.permute(order).reshape(*batch, math.prod(out_modes), math.prod(in_modes))
