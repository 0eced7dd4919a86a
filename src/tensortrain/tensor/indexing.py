"""NumPy's indexing on cores: every index turns a core into a matrix, a core, or part of a gathered core."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tensortrain.errors import KindError, ModeIndexError, ShapeError

__all__ = ["index_cores"]


def index_cores(cores: Sequence[Tensor], key: Any) -> tuple[list[Tensor], bool]:
    """Apply an index to a list of cores.

    Args:
        cores: ``(r, n, s)`` each.
        key: Integers, slices (any step), ``...``, ``None``, or 1-D lists (int or bool) in neighbouring modes;
            beside a list an integer counts as a list, as in NumPy.

    Returns:
        Pieces in order, matrices ``(r, s)`` for modes that are gone and cores for those that stay; and
        whether lists took every mode, so that the single core left holds plain values.

    Raises:
        ModeIndexError: Out of range, too many indices, or lists in modes that are not neighbours.
        KindError: Something that is no index.
    """
    entries = _expand_ellipsis(key if isinstance(key, tuple) else (key,), len(cores))
    lists = [_as_list(entry) for entry in entries]
    if all(found is None for found in lists):
        return _basic_pieces(cores, entries, 0), False
    return _list_pieces(cores, entries, lists)


def _expand_ellipsis(entries: tuple[Any, ...], order: int) -> list[Any]:
    """One entry for every mode, and ``None`` entries between them."""
    dots = [at for at, entry in enumerate(entries) if entry is Ellipsis]
    n_used = sum(entry is not None and entry is not Ellipsis for entry in entries)
    if len(dots) > 1 or n_used > order:
        raise ModeIndexError(
            f"an index must fit the order: the index has {n_used} entries and {len(dots)} ellipses, expected "
            f"at most "
            f"{order} and 1. Drop the surplus."
        )
    at = dots[0] if dots else len(entries)
    return [*entries[:at], *[slice(None)] * (order - n_used), *entries[at + 1 :]]


def _as_list(entry: Any) -> Tensor | None:
    """An index list as a 1-D tensor of integers, ``None`` for any other index."""
    if entry is None or isinstance(entry, (slice, bool)) or (hasattr(entry, "__index__") and _is_single(entry)):
        return None
    if not isinstance(entry, (Tensor, np.ndarray, list, tuple, range)):
        raise KindError(
            f"an index must be an int, a slice, a list, None or ...: the index has {type(entry).__name__}, "
            f"expected "
            "one of these. Convert it to a list of ints."
        )
    values = torch.as_tensor(list(entry) if isinstance(entry, range) else entry)
    if values.dtype == torch.bool:
        values = values.nonzero().squeeze(-1) if values.ndim == 1 else values
    if values.numel() == 0:
        values = values.long()
    if values.ndim != 1 or values.is_floating_point() or values.is_complex() or values.dtype == torch.bool:
        raise KindError(
            f"an index list must be 1-D and of integers or booleans: the index has shape "
            f"{tuple(values.shape)} and "
            f"{values.dtype}, expected a flat list. Flatten it, and reshape the result."
        )
    return values.long()


def _is_single(entry: Any) -> bool:
    return not isinstance(entry, (Tensor, np.ndarray)) or entry.ndim == 0


def _basic_pieces(cores: Sequence[Tensor], entries: Sequence[Any], k: int) -> list[Tensor]:
    """Pieces for entries without lists, of which the first belongs to mode ``k``."""
    pieces: list[Tensor] = []
    for entry in entries:
        if entry is None:
            rank = cores[k].shape[0] if k < len(cores) else 1
            pieces.append(torch.eye(rank, dtype=cores[0].dtype, device=cores[0].device).unsqueeze(1))
            continue
        pieces.append(_index_core(cores[k], entry, k))
        k += 1
    return pieces


def _index_core(core: Tensor, entry: Any, k: int) -> Tensor:
    n = core.shape[1]
    if isinstance(entry, slice):
        try:
            start, stop, step = entry.indices(n)
        except (TypeError, ValueError) as error:
            raise KindError(
                f"a slice must be of integers with a step other than 0: mode {k} has {entry}, expected ints. "
                "Pass whole numbers."
            ) from error
        if step > 0:
            return core[:, start : max(start, stop) : step]
        return core[:, torch.arange(start, stop, step, device=core.device)]  # torch has no negative steps
    return core[:, _checked_int(entry, n, k)]


def _checked_int(entry: Any, n: int, k: int) -> int:
    if isinstance(entry, bool):
        raise KindError(f"an index must be an integer: mode {k} has {entry}, expected an int. Use 0 or 1.")
    at = operator.index(entry)
    if not -n <= at < n:
        raise ModeIndexError(
            f"an index must lie in its mode: mode {k} has index {at}, expected {-n} to {n - 1}. Check x.shape."
        )
    return at % n


def _list_pieces(
    cores: Sequence[Tensor], entries: Sequence[Any], lists: Sequence[Tensor | None]
) -> tuple[list[Tensor], bool]:
    # Beside a list NumPy reads an integer as a list of one.
    chosen = [
        found is not None or (entry is not None and not isinstance(entry, slice))
        for entry, found in zip(entries, lists, strict=True)
    ]
    first, last = chosen.index(True), len(chosen) - chosen[::-1].index(True)
    if not all(chosen[first:last]):
        raise ModeIndexError(
            "index lists must stand in neighbouring modes: a slice or None lies between two of them, "
            "expected none. "
            "Index in two steps, or permute first."
        )
    n_before = sum(entry is not None for entry in entries[:first])
    n_after = n_before + last - first
    gathered = _gather(
        cores[n_before:n_after], list(zip(entries[first:last], lists[first:last], strict=True)), n_before
    )
    before = _basic_pieces(cores, entries[:first], 0)
    after = _basic_pieces(cores, entries[last:], n_after)
    return [*before, gathered, *after], not before and not after


def _gather(group: Sequence[Tensor], indices: Sequence[tuple[Any, Tensor | None]], first_mode: int) -> Tensor:
    """One core whose mode runs through the index lists."""
    values = [
        _checked_list(torch.tensor([operator.index(entry)]) if found is None else found, core.shape[1], first_mode + k)
        for k, (core, (entry, found)) in enumerate(zip(group, indices, strict=True))
    ]
    sizes = {len(value) for value in values} - {1}
    if len(sizes) > 1:
        raise ShapeError(
            f"index lists must have one length: the lists have {[len(value) for value in values]} entries, "
            f"expected "
            "equal lengths, or 1. Pass one index per mode and point."
        )
    state = group[0][:, values[0].to(group[0].device)]
    for core, value in zip(group[1:], values[1:], strict=True):
        picked = core[:, value.to(core.device)]
        # n r s <- n r t, n t s; a list of one broadcasts
        state = (state.transpose(0, 1) @ picked.transpose(0, 1)).transpose(0, 1)
    return state


def _checked_list(values: Tensor, n: int, k: int) -> Tensor:
    if values.numel() and not (-n <= int(values.min()) and int(values.max()) < n):
        raise ModeIndexError(
            f"an index must lie in its mode: mode {k} has indices from {int(values.min())} to "
            f"{int(values.max())}, "
            f"expected {-n} to {n - 1}. Check x.shape."
        )
    return values % n if n else values
