"""Entries replaced in a list of cores: in a box of indices, or at single points."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from tensortrain.cores.algebra import add_cores, broadcast_cores
from tensortrain.cores.decompose import decompose
from tensortrain.cores.indexing import expand_ellipsis, index_core, index_cores, resolve_lists
from tensortrain.errors import KindError, ShapeError

__all__ = ["Region", "region_of"]


class Region(Protocol):
    """Some entries of a train of given modes. Cores are ``(.., r, n, s)``."""

    def without(self, cores: Sequence[Tensor]) -> list[Tensor]:
        """The train with zeros there."""
        ...

    def filled(self, value: Any, like: Tensor) -> list[Tensor]:
        """Zeros, with a number or a tensor there; ``like`` has the batch axes, dtype and device of the cores."""
        ...

    def filled_by_train(self, cores: Sequence[Tensor]) -> list[Tensor]:
        """Zeros, with a train there."""
        ...


@dataclass(frozen=True)
class _Box:
    """A product of index sets, one for each mode; an integer is a set of one that leaves the shape.

    ``places`` says which entry of the value each index gets: of equal indices in a list the last counts.
    """

    sets: tuple[Tensor, ...]
    places: tuple[Tensor, ...]
    sizes: tuple[int, ...]
    kept: tuple[bool, ...]
    modes: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the value."""
        return tuple(n for n, kept in zip(self.sizes, self.kept, strict=True) if kept)

    def without(self, cores: Sequence[Tensor]) -> list[Tensor]:
        """Where only one mode is restricted, at no cost in rank."""
        restricted = [k for k, n in enumerate(self.modes) if self.sets[k].numel() < n]
        if len(restricted) <= 1:
            return self._masked(cores, restricted or [0], inside=False)
        return _less(cores, self._masked(cores, restricted, inside=True))

    def _masked(self, given: Sequence[Tensor], modes: list[int], *, inside: bool) -> list[Tensor]:
        cores = list(given)
        for k in modes:
            mask = torch.zeros(self.modes[k], dtype=cores[k].dtype, device=cores[k].device)
            mask[self.sets[k]] = 1
            cores[k] = cores[k] * (mask if inside else 1 - mask)[:, None]
        return cores

    def filled(self, value: Any, like: Tensor) -> list[Tensor]:
        one = like.new_ones((*like.shape[:-3], 1, 1, 1))
        if self.shape:
            return self._placed(_dense_cores(value, self.shape, one))
        number = torch.as_tensor(value, dtype=like.dtype, device=like.device).expand(like.shape[:-3])
        return self._spread([one * number[..., None, None, None], *[one] * (len(self.kept) - 1)])

    def filled_by_train(self, cores: Sequence[Tensor]) -> list[Tensor]:
        found = tuple(core.shape[-2] for core in cores)
        if found != self.shape:
            raise _misfit(found, self.shape)
        return self._placed(cores)

    def _placed(self, cores: Sequence[Tensor]) -> list[Tensor]:
        """With cores of size 1 for the modes that an integer took away."""
        given, rank = iter(cores), 1
        out: list[Tensor] = []
        for keep in self.kept:
            eye = torch.eye(rank, dtype=cores[0].dtype, device=cores[0].device)
            eye = eye.expand(*cores[0].shape[:-3], rank, rank)
            out.append(next(given) if keep else eye.unsqueeze(-2))
            rank = out[-1].shape[-1]
        return self._spread(out)

    def _spread(self, cores: Sequence[Tensor]) -> list[Tensor]:
        """Every mode at its full size, with zeros beside the set."""
        out = []
        for core, n, where, places in zip(cores, self.modes, self.sets, self.places, strict=True):
            full = core.new_zeros((*core.shape[:-2], n, core.shape[-1]))
            out.append(full.index_copy(-2, where, core.index_select(-2, places)))
        return out


@dataclass(frozen=True)
class _Points:
    """Single entries: one in each row, where it stands in the given lists, and the shape of these."""

    rows: Tensor
    places: Tensor
    shape: tuple[int, ...]
    modes: tuple[int, ...]

    def without(self, cores: Sequence[Tensor]) -> list[Tensor]:
        n_batch = cores[0].ndim - 3
        there = index_cores(cores, tuple(self.rows.unbind(-1)), n_batch).pieces[0][..., 0, :, 0]
        return _less(cores, self._indicator(there))

    def filled(self, value: Any, like: Tensor) -> list[Tensor]:
        batch = like.shape[:-3]
        values = torch.as_tensor(value, dtype=like.dtype, device=like.device)
        try:
            values = values.expand(*batch, *self.shape)
        except RuntimeError:
            raise _misfit(tuple(values.shape), self.shape) from None
        return self._indicator(values.reshape(*batch, -1)[..., self.places])

    def filled_by_train(self, cores: Sequence[Tensor]) -> list[Tensor]:
        raise KindError(
            "a train can be set in a box: value has a train and the index lists of points, expected a number or a "
            "tensor. Pass value.to_dense()."
        )

    def _indicator(self, values: Tensor) -> list[Tensor]:
        """Sum over the points of a value ``(.., P)`` times the unit tensor there; rank is the number of points."""
        d, n_points, batch = len(self.modes), len(self.rows), values.shape[:-1]
        if n_points == 0:
            return [values.new_zeros((*batch, 1, n, 1)) for n in self.modes]
        cores = []
        for k, n in enumerate(self.modes):
            unit = torch.nn.functional.one_hot(self.rows[:, k], n).to(values.dtype)  # P n
            if k == 0:
                core = unit.mT[None] * values[..., None, None, :]  # 1 n P
                core = core.sum(-1, keepdim=True) if d == 1 else core
            elif k == d - 1:
                core = unit[:, :, None].expand(*batch, n_points, n, 1)
            else:
                core = torch.eye(n_points, dtype=values.dtype, device=values.device)[:, None, :] * unit[:, :, None]
                core = core.expand(*batch, n_points, n, n_points)
            cores.append(core)
        return cores


def _less(cores: Sequence[Tensor], others: Sequence[Tensor]) -> list[Tensor]:
    return add_cores(cores, [others[0] * -1, *others[1:]])


def region_of(key: tuple[Any, ...], modes: tuple[int, ...], device: torch.device) -> Region:
    """The entries that an index names, of a train of these modes."""
    entries = [entry for entry in expand_ellipsis(key, modes) if entry is not None]
    is_list = [not isinstance(entry, slice) and not _is_int(entry) for entry in entries]
    if sum(is_list) > 1 or (any(is_list) and not _one_flat_list(entries, is_list)):
        return _points(entries, modes, device)
    sets, places, sizes = [], [], []
    for k, (entry, n) in enumerate(zip(entries, modes, strict=True)):
        numbers = torch.arange(n).reshape(1, n, 1)
        found = _flat_list(entry, n) if is_list[k] else index_core(numbers, entry, k).reshape(-1)
        unique, last = _last_of_equal(found.to(device)[:, None])
        sets.append(unique[:, 0])
        places.append(last)
        sizes.append(len(found))
    kept = tuple(found or isinstance(entry, slice) for entry, found in zip(entries, is_list, strict=True))
    return _Box(tuple(sets), tuple(places), tuple(sizes), kept, modes)


def _points(entries: list[Any], modes: tuple[int, ...], device: torch.device) -> _Points:
    lists, shape = resolve_lists(entries, modes)
    if any(values is None for values in lists):
        raise KindError(
            "entries can be set in a box or at points: the index mixes several lists with slices, expected lists "
            "in every mode, or one list beside slices. Set them one list entry at a time."
        )
    rows = torch.stack([values.to(device) for values in lists if values is not None], dim=-1)
    return _Points(*_last_of_equal(rows), shape, modes)


def _flat_list(entry: Any, n: int) -> Tensor:
    (found,), shape = resolve_lists([entry], [n])
    if found is None or len(shape) != 1:
        raise KindError(
            f"a list beside slices must be flat to be set: the index has a list of shape {shape}, expected one axis. "
            "Flatten it and the value."
        )
    return found


def _is_int(entry: Any) -> bool:
    return hasattr(entry, "__index__") and getattr(entry, "ndim", 0) == 0


def _one_flat_list(entries: list[Any], is_list: list[bool]) -> bool:
    """Whether a single list is a set of indices of its mode: an integer beside it, or more axes, make it points."""
    others = [entry for entry, found in zip(entries, is_list, strict=True) if not found]
    if not others:
        return torch.as_tensor(entries[0]).ndim == 1
    return all(isinstance(entry, slice) for entry in others)


def _last_of_equal(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Distinct rows, and where each stands last: as in NumPy the last of equal indices wins."""
    unique, where = torch.unique(rows, dim=0, return_inverse=True)
    last = torch.zeros(len(unique), dtype=torch.long, device=rows.device)
    last = last.scatter_reduce(0, where, torch.arange(len(rows), device=rows.device), "amax")
    return unique, last


def _dense_cores(value: Any, shape: tuple[int, ...], one: Tensor) -> list[Tensor]:
    """A number or a tensor as cores of a train of ``shape``, which has a mode."""
    batch = one.shape[:-3]
    tensor = torch.as_tensor(value, dtype=one.dtype, device=one.device)
    if tensor.ndim == 0:
        return broadcast_cores([one * tensor], shape)
    try:
        full = tensor.expand(*batch, *shape)
    except RuntimeError:
        raise _misfit(tuple(tensor.shape), shape) from None
    if math.prod(shape) == 0:
        return broadcast_cores([torch.zeros_like(one)], shape)
    return list(decompose(full, n_batch=len(batch)).cores)


def _misfit(found: tuple[int, ...], expected: tuple[int, ...]) -> ShapeError:
    return ShapeError(
        f"a value must fit the entries it replaces: value has shape {tuple(found)}, expected {tuple(expected)} or what "
        "broadcasts to it. Compare it with x[index].shape."
    )
