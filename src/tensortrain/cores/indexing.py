"""NumPy's indexing on cores: every index turns a core into a matrix, a core, or part of a gathered core."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tensortrain.cores.algebra import join_pieces
from tensortrain.cores.scales import Exponents, Scale, guarded, plain_exponent
from tensortrain.cores.scaling import times_pow2, work_dtype
from tensortrain.errors import KindError, ModeIndexError, ShapeError

__all__ = ["Indexed", "checked_list", "expand_ellipsis", "index_cores", "resolve_lists"]


@dataclass(frozen=True)
class Indexed:
    """What an index leaves of the cores.

    Attributes:
        pieces: Matrices and cores, to be multiplied.
        values_shape: Where lists took every mode, so that the single core left holds plain values, their shape.
        waiting: Powers of two at the right bonds of some pieces.
    """

    pieces: list[Tensor]
    values_shape: tuple[int, ...] | None = None
    waiting: Mapping[int, Exponents] = field(default_factory=dict)


def index_cores(cores: Sequence[Tensor], key: Any, n_batch: int = 0) -> Indexed:
    """Apply an index to a list of cores.

    Args:
        cores: ``(.., r, n, s)`` each, with ``n_batch`` axes in front.
        key: Integers, slices (any step), ``...``, ``None``, and lists: integer arrays of any shape, which broadcast
            to one another, or boolean masks. Beside a list an integer counts as a list, as in NumPy.

    Returns:
        Indexed: pieces in order, matrices ``(.., r, s)`` for modes that are gone and cores for those that stay.

    Raises:
        ModeIndexError: Out of range, or too many indices.
        ShapeError: Lists that do not broadcast to one another.
        KindError: Something that is no index.
    """
    entries = expand_ellipsis(key if isinstance(key, tuple) else (key,), [core.shape[-2] for core in cores])
    if all(_as_list(entry) is None for entry in entries):
        return Indexed(_basic_pieces(cores, entries, 0, n_batch))
    lists, shape = resolve_lists(entries, [core.shape[-2] for core in cores])
    chosen = [found is not None for found in lists]
    first, last = chosen.index(True), len(chosen) - chosen[::-1].index(True)
    n_first = sum(entry is not None for entry in entries[:first])
    n_last = n_first + sum(entry is not None for entry in entries[first:last])
    after = _basic_pieces(cores, entries[last:], n_last, n_batch)
    if all(chosen[first:last]):
        before = _basic_pieces(cores, entries[:first], 0, n_batch)
        given = [found for found in lists[first:last] if found is not None]
        gathered, exponents = _gather(cores[n_first:n_last], given, n_batch)
        if not before and not after:
            return Indexed([times_pow2(gathered, exponents).to(cores[0].dtype).movedim(0, -2)], shape)
        gathered, waiting = _of_columns(gathered, exponents)
        points = _unflatten(gathered.to(cores[0].dtype).movedim(0, -2), shape)
        return Indexed([*before, *points, *after], waiting={len(before) + len(points) - 1: waiting})
    # NumPy puts the axis of lists that stand apart in front of all others.
    indexed = _apart(cores[:n_last], entries[:last], lists[:last], n_batch)
    return Indexed([*_unflatten(indexed[0], shape), *indexed[1:], *after])


def expand_ellipsis(entries: Sequence[Any], modes: Sequence[int]) -> list[Any]:
    """One entry for every mode, and ``None`` entries between them."""
    dots = [at for at, entry in enumerate(entries) if entry is Ellipsis]
    n_used = sum(entry is not None and entry is not Ellipsis for entry in entries)
    if len(dots) > 1 or n_used > len(modes):
        raise ModeIndexError(
            f"an index must fit the order: the index has {n_used} entries and {len(dots)} ellipses, expected "
            f"at most {len(modes)} and 1. Drop the surplus."
        )
    at = dots[0] if dots else len(entries)
    return [*entries[:at], *[slice(None)] * (len(modes) - n_used), *entries[at + 1 :]]


def resolve_lists(entries: Sequence[Any], modes: Sequence[int]) -> tuple[list[Tensor | None], tuple[int, ...]]:
    """The index lists among the entries, integers beside them included, as flat lists of one length.

    Returns:
        A 1-D tensor of indices ``0 .. n - 1`` or ``None`` for each entry, and the shape they broadcast to.
    """
    found: list[Tensor | None] = []
    k = 0
    for entry in entries:
        if entry is None or isinstance(entry, slice):
            found.append(None)
        else:
            values = _as_list(entry, modes[k])
            values = torch.tensor(_checked_int(entry, modes[k], k)) if values is None else values
            found.append(checked_list(values, modes[k], k))
        k += entry is not None
    given = [values for values in found if values is not None]
    try:
        shape = torch.broadcast_shapes(*(values.shape for values in given))
    except RuntimeError:
        raise ShapeError(
            f"index lists must have one length: the lists have shapes {[tuple(v.shape) for v in given]}, "
            f"expected equal ones, or sizes of 1. Pass one index per mode and point."
        ) from None
    flat = [None if values is None else values.expand(shape).reshape(-1) for values in found]
    return flat, tuple(shape)


def checked_list(values: Tensor, n: int, k: int) -> Tensor:
    """Indices into a mode of size ``n``, the negative ones made positive."""
    if values.numel():
        lowest, highest = (int(v) for v in torch.aminmax(values))
        if not (-n <= lowest and highest < n):
            raise ModeIndexError(
                f"an index must lie in its mode: mode {k} has indices from {lowest} to {highest}, "
                f"expected {-n} to {n - 1}. Check x.shape."
            )
        if lowest < 0:
            values = values % n
    return values


def _as_list(entry: Any, n: int | None = None) -> Tensor | None:
    """An index list as a tensor of integers, ``None`` for any other index. A mask must have ``n`` entries."""
    if entry is None or isinstance(entry, (slice, bool)) or (hasattr(entry, "__index__") and _is_single(entry)):
        return None
    if not isinstance(entry, (Tensor, np.ndarray, list, tuple, range)):
        raise KindError(
            f"an index must be an int, a slice, a list, None or ...: the index has {type(entry).__name__}, "
            f"expected one of these. Convert it to a list of ints."
        )
    values = torch.as_tensor(list(entry) if isinstance(entry, range) else entry)
    if values.dtype == torch.bool and values.ndim == 1:
        if n is not None and len(values) != n:
            raise ModeIndexError(
                f"a mask must have an entry for each index of its mode: the mask has {len(values)}, expected {n}. "
                "Build it from the mode's size."
            )
        values = values.nonzero().squeeze(-1)
    if values.numel() == 0:
        values = values.long()
    if values.is_floating_point() or values.is_complex() or values.dtype == torch.bool:
        raise KindError(
            f"an index list must be of integers, or a mask of one axis: the index has shape "
            f"{tuple(values.shape)} and {values.dtype}, expected integers. Convert it, or flatten the mask."
        )
    return values.long()


def _is_single(entry: Any) -> bool:
    return not isinstance(entry, (Tensor, np.ndarray)) or entry.ndim == 0


def _basic_pieces(cores: Sequence[Tensor], entries: Sequence[Any], k: int, n_batch: int) -> list[Tensor]:
    """Pieces for entries without lists, of which the first belongs to mode ``k``."""
    pieces: list[Tensor] = []
    for entry in entries:
        if entry is None:
            like = cores[min(k, len(cores) - 1)]
            rank = like.shape[-3] if k < len(cores) else like.shape[-1]
            pieces.append(_eye(rank, like).unsqueeze(-2))
            continue
        pieces.append(index_core(cores[k], entry, k))
        k += 1
    return pieces


def _eye(n: int, like: Tensor) -> Tensor:
    """The identity ``(.., n, n)`` with the batch axes of a core."""
    return torch.eye(n, dtype=like.dtype, device=like.device).expand(*like.shape[:-3], n, n)


def index_core(core: Tensor, entry: Any, k: int) -> Tensor:
    """A core of fewer entries for a slice, a matrix for an integer."""
    n = core.shape[-2]
    if isinstance(entry, slice):
        try:
            start, stop, step = entry.indices(n)
        except (TypeError, ValueError) as error:
            raise KindError(
                f"a slice must be of integers with a step other than 0: mode {k} has {entry}, expected ints. "
                "Pass whole numbers."
            ) from error
        if step > 0:
            return core[..., start : max(start, stop) : step, :]
        backwards = torch.tensor(range(start, stop, step), dtype=torch.long, device=core.device)
        return core[..., backwards, :]  # torch has no negative steps
    return core[..., _checked_int(entry, n, k), :]


def _checked_int(entry: Any, n: int, k: int) -> int:
    if isinstance(entry, bool):
        raise KindError(f"an index must be an integer: mode {k} has {entry}, expected an int. Use 0 or 1.")
    at = operator.index(entry)
    if not -n <= at < n:
        raise ModeIndexError(
            f"an index must lie in its mode: mode {k} has index {at}, expected {-n} to {n - 1}. Check x.shape."
        )
    return at % n


def _gather(group: Sequence[Tensor], lists: Sequence[Tensor], n_batch: int) -> tuple[Tensor, Exponents]:
    """Entries ``(P, .., r, s)`` at index lists in neighbouring modes, and exponents that broadcast to them, or 0."""
    wide = [core.to(work_dtype(core.dtype)) for core in group]

    def run(scale: Scale) -> tuple[Tensor, Exponents]:
        state: Tensor | None = None
        waiting: Exponents = 0
        for core, values in zip(wide, lists, strict=True):
            # A copy with the mode in front first: rows of r s entries are then gathered whole.
            picked = core.movedim(-2, 0).contiguous()[values.to(core.device)]  # P .. r s
            if state is not None:
                state, step = scale.split(state)
                waiting = waiting + step
            picked, waiting = scale.weigh(picked, waiting)
            state = picked if state is None else state @ picked
        assert state is not None
        waiting = plain_exponent(waiting)
        return state, waiting.unsqueeze(-2) if isinstance(waiting, Tensor) else waiting

    return guarded(wide, run, n_batch + 1, storage=group[0].dtype)


def _of_columns(gathered: Tensor, exponents: Exponents) -> tuple[Tensor, Exponents]:
    """The same with exponents ``(.., s)`` for all points alike, which the next piece can take over."""
    if isinstance(exponents, int) or not exponents.numel():
        return gathered, 0
    most = exponents.squeeze(-2).amax(0)
    return times_pow2(gathered, exponents - most.unsqueeze(-2)), most


def _apart(
    cores: Sequence[Tensor], entries: Sequence[Any], lists: Sequence[Tensor | None], n_batch: int
) -> list[Tensor]:
    """Pieces with the points in front, which every piece up to the last list carries along as a block index."""
    n_points = next(len(values) for values in lists if values is not None)
    if n_points == 0:
        kept = [1 if entry is None else len(range(core_n)[entry]) for entry, core_n in _kept(cores, entries, lists)]
        return [cores[0].new_zeros((*cores[0].shape[:-3], 1, n, 1)) for n in (0, *kept[:-1])] + [
            cores[-1].new_zeros((*cores[0].shape[:-3], 1, kept[-1], cores[-1].shape[-1]))
        ]
    points = torch.arange(n_points, device=cores[0].device)
    pieces: list[Tensor] = [_eye(n_points, cores[0]).unsqueeze(-3)]  # 1 P P
    k = 0
    last = len(entries) - 1
    for at, (entry, values) in enumerate(zip(entries, lists, strict=True)):
        if values is None:
            (piece,) = (
                _basic_pieces(cores[k:], [entry], 0, n_batch) if entry is None else [index_core(cores[k], entry, k)]
            )
            wide = piece.new_zeros(
                (*piece.shape[:-3], n_points, piece.shape[-3], piece.shape[-2], n_points, piece.shape[-1])
            )
            wide[..., points, :, :, points, :] = piece
            pieces.append(wide.flatten(-2, -1).flatten(-4, -3))
        else:
            picked = cores[k].movedim(-2, 0)[values.to(cores[k].device)]  # P .. r s
            if at == last:
                pieces.append(picked.movedim(0, -3).flatten(-3, -2))  # (P r) s
            else:
                wide = picked.new_zeros((*picked.shape[1:-2], n_points, picked.shape[-2], n_points, picked.shape[-1]))
                wide[..., points, :, points, :] = picked
                pieces.append(wide.flatten(-2, -1).flatten(-3, -2))
        k += entry is not None
    return join_pieces(pieces, n_batch)


def _kept(cores: Sequence[Tensor], entries: Sequence[Any], lists: Sequence[Tensor | None]) -> list[tuple[Any, int]]:
    """The entries that leave a mode, slices and ``None``, each with the size of its mode."""
    modes = iter([core.shape[-2] for core in cores])
    sized = [(entry, 1 if entry is None else next(modes)) for entry in entries]
    return [pair for pair, values in zip(sized, lists, strict=True) if values is None]


def _unflatten(core: Tensor, shape: Sequence[int]) -> list[Tensor]:
    """The single axis of a gathered core as the axes that the index lists had, without arithmetic."""
    cores = []
    for n in shape[:-1]:
        rest = core.shape[-2] // n if n else 0
        split = core.unflatten(-2, (n, rest))
        left = _eye(core.shape[-3] * n, core).unflatten(-2, (core.shape[-3], n))
        cores.append(left)
        core = split.flatten(-4, -3)
    if not shape:  # all lists were single numbers: the axis goes
        return [core[..., 0, :]]
    return [*cores, core]
