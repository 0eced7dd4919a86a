"""The short way through recurrent layers and cells: what an earlier input of its size left ready, after few checks.

The kernels read the maps off the modules and run them as they ran before: by sweeps over cores where these are trained,
else over matrices that are kept for as long as the cores stay, or by torch's kernel on kept dense weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tensortrain.contract.cache import n_optimizer_steps
from tensortrain.nn.composite import Map
from tensortrain.nn.cores import PLAIN_LISTS, are_plain
from tensortrain.nn.linear import Linear
from tensortrain.nn.recurrent.sequences import KINDS, Direction, MapAtWork
from tensortrain.nn.runner import trains
from tensortrain.system.native import library

if TYPE_CHECKING:
    from tensortrain.nn.recurrent.cells import Cell

__all__ = ["keep_directions", "keep_weights"]


def keep_directions(
    module: Any,
    x: Tensor,
    found: Sequence[Direction],
    guard: Mapping[str, Any],
    names: Sequence[str] = (),
    *,
    by_torch: bool = False,
) -> None:
    """Let the next input of this size run as this one did.

    Args:
        module: A layer or a cell, whose attribute ``_short_way`` the short way becomes.
        x: The input that was just served.
        found: How, direction by direction.
        guard: Attributes of the module that the way depends on.
        names: Of the cells in a layer; none: the module is a cell.
        by_torch: Whether torch's kernel did the steps, on weights that were made in the same call.
    """
    maps = []
    for one in found:
        if one.input is None:  # a module that must be called
            return
        maps += [_kept(one.cell.ih, one.input), _kept(one.cell.hh, one.hidden)]
    _keep(module, x, [one.cell for one in found], maps, guard, names, by_torch=by_torch)


def keep_weights(module: Any, x: Tensor, cells: Sequence[Cell], guard: Mapping[str, Any], names: Sequence[str]) -> None:
    """The same where torch's kernel ran on the dense weights of all cells, which are kept."""
    maps = [_kept_dense(one) for cell in cells for one in (cell.ih, cell.hh)]
    _keep(module, x, cells, maps, guard, names, by_torch=True)


def _keep(
    module: Any,
    x: Tensor,
    cells: Sequence[Cell],
    maps: Sequence[tuple[Any, ...] | None],
    guard: Mapping[str, Any],
    names: Sequence[str],
    *,
    by_torch: bool,
) -> None:
    kernels, first = library(), cells[0]
    if kernels is None or torch.are_deterministic_algorithms_enabled() or any(one is None for one in maps):
        return
    if type(x) is not Tensor or x.is_nested:
        return
    n_optimizer_steps()  # counted from now on
    kernels.know_core_lists(*PLAIN_LISTS)
    if not isinstance(module._short_way, kernels.RecurrentWay) or module._short_way_guard != guard:
        module._short_way = kernels.RecurrentWay((nn.Linear, Linear), list(names), dict(guard), first.guard())
        module._short_way_guard = guard
    n_directions = 1 + bool(guard.get("bidirectional"))
    numbers = [KINDS.index(str(first.kernel)), first.hidden_size, int(bool(guard.get("batch_first"))), n_directions]
    numbers.append(int(by_torch))
    trains = torch.is_grad_enabled() and any(p.requires_grad for cell in cells for p in cell.parameters())
    module._short_way.keep(x, trains, numbers, list(maps))


def _kept(one: Map, ran: MapAtWork) -> tuple[Any, ...] | None:
    """How a map ran, what it was made of, and what a user may set on it; None where a later call must look anew."""
    how = ran.sweep, ran.ready, ran.is_turned
    if not isinstance(one, Linear):
        return (*how, [], [], None, []) if type(one) is nn.Linear else None
    if type(one) is not Linear or not are_plain(one.cores) or (ran.is_made and trains(one)):
        return None
    options = [one.implementation, one.dense_limit_bytes, one.may_time_plans]
    if not ran.is_made:
        return *how, [], [], one.runner.cache.values, options
    return *how, ran.tensors, one.core_list(), one.runner.cache.values, options


def _kept_dense(one: Map) -> tuple[Any, ...] | None:
    nowhere = (None, None, False)
    if not isinstance(one, Linear):
        return (*nowhere, [], [], None, []) if type(one) is nn.Linear else None
    if type(one) is not Linear or one.stand_ins is not None or not are_plain(one.cores):
        return None
    cores = one.core_list()
    weight = one.runner.cache.peek(cores, "dense")
    options = [one.implementation, one.dense_limit_bytes, one.may_time_plans]
    return None if weight is None else (*nowhere, [weight], cores, one.runner.cache.values, options)
