"""``x.at[index].set(value)``: entries replaced in a new train."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tensortrain.cores.indexing import expand_ellipsis, index_core, resolve_lists
from tensortrain.errors import KindError, ShapeError

if TYPE_CHECKING:
    from tensortrain.tensor.train import TensorTrain

__all__ = ["At"]


@dataclass(frozen=True)
class At:
    """``x.at``: waits for an index."""

    train: TensorTrain

    def __getitem__(self, key: Any) -> Place:
        return Place(self.train, key if isinstance(key, tuple) else (key,))


@dataclass(frozen=True)
class Place:
    """``x.at[index]``: waits for ``set`` or ``add``."""

    train: TensorTrain
    key: tuple[Any, ...]

    def set(self, value: Any) -> TensorTrain:
        """A train with these entries replaced.

        Args:
            value: A number, a train of the shape of ``x[index]``, or a tensor that broadcasts to it.

        Raises:
            ShapeError: The value does not fit the region.
            ModeIndexError, KindError: As for ``x[index]``.
        """
        region = _region(self.train, self.key)
        return region.without(self.train) + region.filled(value, self.train)

    def add(self, value: Any) -> TensorTrain:
        """A train with the value added to these entries; arguments as for ``set``."""
        return self.train + _region(self.train, self.key).filled(value, self.train)


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

    def without(self, x: TensorTrain) -> TensorTrain:
        """``x`` with zeros in the box; where only one mode is restricted, at no cost in rank."""
        restricted = [k for k, n in enumerate(self.modes) if self.sets[k].numel() < n]
        if len(restricted) <= 1:
            return self._masked(x, restricted or [0], inside=False)
        return x - self._masked(x, restricted, inside=True)

    def _masked(self, x: TensorTrain, modes: list[int], *, inside: bool) -> TensorTrain:
        cores = list(x.cores)
        for k in modes:
            mask = torch.zeros(self.modes[k], dtype=x.dtype, device=x.device)
            mask[self.sets[k]] = 1
            cores[k] = cores[k] * (mask if inside else 1 - mask)[:, None]
        return type(x)(tuple(cores))

    def filled(self, value: Any, x: TensorTrain) -> TensorTrain:
        """Zeros, with the value in the box."""
        shape = tuple(n for n, kept in zip(self.sizes, self.kept, strict=True) if kept)
        cores = []
        parts = zip(_box_cores(value, shape, self.kept, x), self.modes, self.sets, self.places, strict=True)
        for core, n, where, places in parts:
            full = core.new_zeros((*core.shape[:-2], n, core.shape[-1]))
            cores.append(full.index_copy(-2, where, core.index_select(-2, places)))
        return type(x)(tuple(cores))


@dataclass(frozen=True)
class _Points:
    """Single entries: one in each row, where it stands in the given lists, and the shape of these."""

    rows: Tensor
    places: Tensor
    shape: tuple[int, ...]

    def without(self, x: TensorTrain) -> TensorTrain:
        return x - self._indicator(x.points(self.rows), x)

    def filled(self, value: Any, x: TensorTrain) -> TensorTrain:
        values = torch.as_tensor(value, dtype=x.dtype, device=x.device)
        try:
            values = values.expand(*x.batch_shape, *self.shape)
        except RuntimeError:
            raise _misfit(tuple(values.shape), self.shape) from None
        return self._indicator(values.reshape(*x.batch_shape, -1)[..., self.places], x)

    def _indicator(self, values: Tensor, x: TensorTrain) -> TensorTrain:
        """Sum over the points of a value times the unit tensor there; rank is the number of points."""
        d, n_points = len(x.shape), len(self.rows)
        if n_points == 0:
            return x._zeros()
        cores = []
        for k, n in enumerate(x.shape):
            unit = torch.nn.functional.one_hot(self.rows[:, k], n).to(x.dtype)  # P n
            if k == 0:
                core = unit.mT[None] * values[..., None, None, :]  # 1 n P
                core = core.sum(-1, keepdim=True) if d == 1 else core
            elif k == d - 1:
                core = unit[:, :, None].expand(*x.batch_shape, n_points, n, 1)
            else:
                core = torch.eye(n_points, dtype=x.dtype, device=x.device)[:, None, :] * unit[:, :, None]
                core = core.expand(*x.batch_shape, n_points, n, n_points)
            cores.append(core)
        return type(x)(tuple(cores))


def _region(x: TensorTrain, key: tuple[Any, ...]) -> _Box | _Points:
    entries = [entry for entry in expand_ellipsis(key, x.shape) if entry is not None]
    is_list = [
        not isinstance(e, slice) and not (hasattr(e, "__index__") and getattr(e, "ndim", 0) == 0) for e in entries
    ]
    if sum(is_list) > 1 or (any(is_list) and not _one_flat_list(entries, is_list)):
        lists, shape = resolve_lists(entries, x.shape)
        if any(values is None for values in lists):
            raise KindError(
                "entries can be set in a box or at points: the index mixes several lists with slices, expected lists "
                "in every mode, or one list beside slices. Set them one list entry at a time."
            )
        rows = torch.stack([values.to(x.device) for values in lists if values is not None], dim=-1)
        return _Points(*_last_of_equal(rows), shape)
    sets, places, sizes = [], [], []
    for k, (entry, n) in enumerate(zip(entries, x.shape, strict=True)):
        found = (
            _flat_list(entry, n) if is_list[k] else index_core(torch.arange(n).reshape(1, n, 1), entry, k).reshape(-1)
        )
        unique, last = _last_of_equal(found.to(x.device)[:, None])
        sets.append(unique[:, 0])
        places.append(last)
        sizes.append(len(found))
    kept = tuple(found or isinstance(entry, slice) for entry, found in zip(entries, is_list, strict=True))
    return _Box(tuple(sets), tuple(places), tuple(sizes), kept, x.shape)


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


def _as_train(value: Any, shape: tuple[int, ...], x: TensorTrain) -> TensorTrain:
    """The value as a train of ``shape``, which has a mode."""
    from tensortrain.tensor.base import broadcast_batch, check_same_kind
    from tensortrain.tensor.decompose import tt_svd
    from tensortrain.tensor.train import TensorTrain, broadcast_modes

    if isinstance(value, TensorTrain):
        check_same_kind("set", x, value)
        if value.shape != shape:
            raise _misfit(value.shape, shape)
        return broadcast_batch(x, value)[1]
    tensor = torch.as_tensor(value, dtype=x.dtype, device=x.device)
    if tensor.ndim == 0:
        like = x.cores[0].new_ones((*x.batch_shape, 1, 1, 1))
        return broadcast_modes(TensorTrain((like * tensor,)), shape)
    try:
        full = tensor.expand(*x.batch_shape, *shape)
    except RuntimeError:
        raise _misfit(tuple(tensor.shape), shape) from None
    if math.prod(shape) == 0:
        return broadcast_modes(TensorTrain((x.cores[0].new_zeros((*x.batch_shape, 1, 1, 1)),)), shape)
    return tt_svd(full, batch_dims=len(x.batch_shape)).value


def _box_cores(value: Any, shape: tuple[int, ...], kept: tuple[bool, ...], x: TensorTrain) -> list[Tensor]:
    """Cores of the value, with cores of size 1 for the modes that an integer took away."""
    one = x.cores[0].new_ones((*x.batch_shape, 1, 1, 1))
    if not shape:  # a single entry
        number = torch.as_tensor(value, dtype=x.dtype, device=x.device).expand(x.batch_shape)
        return [one * number[..., None, None, None], *[one] * (len(kept) - 1)]
    given = iter(_as_train(value, shape, x).cores)
    out: list[Tensor] = []
    rank = 1
    for keep in kept:
        eye = torch.eye(rank, dtype=x.dtype, device=x.device).expand(*x.batch_shape, rank, rank)
        out.append(next(given) if keep else eye.unsqueeze(-2))
        rank = out[-1].shape[-1]
    return out


def _misfit(found: tuple[int, ...], expected: tuple[int, ...]) -> ShapeError:
    return ShapeError(
        f"a value must fit the entries it replaces: value has shape {tuple(found)}, expected {tuple(expected)} or what "
        "broadcasts to it. Compare it with x[index].shape."
    )
