"""Widths that recurrent layers may be narrowed to: entries on the menus of all maps around their units.

All layers and directions of one layer of torch have one size, so they keep equally many units, each its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from tensortrain.compression.choose.widths import JointWidths, Members, Width, channel_gram
from tensortrain.compression.narrow_recurrent import FittedMap, fitted_recurrent, gate_rows, places_of
from tensortrain.compression.survey.layers import FoundLayer
from tensortrain.compression.survey.moments import Calibration
from tensortrain.compression.survey.recurrent import RecurrentUnits
from tensortrain.cores.linalg import gram_root
from tensortrain.formats.narrowing import Narrowing, narrowing, shrunk

__all__ = ["RecurrentWidths", "recurrent_widths_of", "standing_apart"]

_MOST_WIDTHS = 32
_ROUND = 8
# Of a layer of more units errors are looked at where these shares are left, each time with all maps fitted anew;
# between these they are taken for straight.
_ALL, _SHARES = 48, (1 / 16, 1 / 8, 1 / 4, 3 / 8, 1 / 2, 5 / 8, 3 / 4, 7 / 8, 15 / 16)


@dataclass(frozen=True)
class RecurrentWidths(JointWidths[RecurrentUnits, tuple[Narrowing, ...]]):
    """All widths of the units of a recurrent layer; ``order`` is one for each cell."""

    def kept(self, n_units: int) -> tuple[tuple[int, ...], ...]:
        """Numbers of the units that each cell keeps at a width."""
        return tuple(tuple(order.kept(n_units).tolist()) for order in self.order)


def standing_apart(found: Sequence[RecurrentUnits], layers: Members, moments: Calibration) -> list[RecurrentUnits]:
    """The units around layers that may be changed; of those that share a layer, the ones with most parameters.

    Args:
        layers: That may be changed, by name.
        moments: Of their inputs; layers of which none are known cannot be fitted anew.
    """
    fit = [one for one in found if one.n_units > 1 and all(name in layers for name in one.names)]
    fit = [one for one in fit if all(moments.of(name).gram is not None for name in one.names)]
    taken: set[str] = set()
    kept = []
    for units in sorted(fit, key=lambda one: -sum(layers[name].weight.n_params for name in one.names)):
        if not taken & {*units.names}:
            taken |= {*units.names}
            kept.append(units)
    return kept


def recurrent_widths_of(
    model: nn.Module, units: RecurrentUnits, layers: Members, moments: Calibration
) -> RecurrentWidths:
    """What every width of a recurrent layer costs and loses.

    Cost: O(n^3) flops for n units, for every cell and at every one of some nine widths.
    """
    n = units.n_units
    orders = tuple(_order(units, k, layers, moments) for k in range(len(units.all_cells)))
    probes = _probes(n)
    seen: dict[str, list[float]] = {name: [] for name in units.names}
    for k in probes:
        kept = tuple(tuple(order.kept(k).tolist()) for order in orders)
        fits, _ = fitted_recurrent(model, units, kept, layers, moments)
        for name, fit in fits.items():
            seen[name].append(_error(name, fit, units, kept, layers[name], moments))
    widths = sorted({*range(_step(n), n, _step(n)), *probes})
    menus = {}
    for name, errors in seen.items():
        between = np.interp(widths, [*probes, n], [*errors, 0.0])
        pairs = zip(widths, between.tolist(), strict=True)
        menus[name] = tuple(_width(name, k, error, units, layers[name]) for k, error in pairs)
    return RecurrentWidths(units, orders, menus)


def _step(n: int) -> int:
    step = max(1, -(-n // _MOST_WIDTHS))
    return -(-step // _ROUND) * _ROUND if n > 16 * _ROUND else step


def _probes(n: int) -> list[int]:
    """Widths at which errors are looked at, the widest ones more closely; all of a small layer."""
    if n <= _ALL:
        return list(range(_step(n), n, _step(n)))
    rounded = (round(n * share / _ROUND) * _ROUND for share in _SHARES)
    return sorted({k for k in rounded if 0 < k < n})


def _order(units: RecurrentUnits, k: int, layers: Members, moments: Calibration) -> Narrowing:
    """In which the units of one cell go: those first whose loss costs least at all that read them."""
    cell, index, direction = units.all_cells[k], k // units.n_directions, k % units.n_directions
    places = list(range(direction * units.n_units, (direction + 1) * units.n_units))
    weighed, grams = [], []
    for name, block in [(f"{cell}.hh", list(range(units.n_units))), *((n, places) for n in units.readers_of(index))]:
        kernel, outputs = layers[name].kernel[:, block].double(), moments.of(name).output_gram
        wide = kernel.movedim(1, -1).reshape(len(kernel), -1)  # a convolution's places as inputs of their own
        moved = wide if outputs is None else shrunk(_full(outputs).to(wide.device)) @ wide
        rows, others = (x.reshape(-1, len(block)) for x in (wide, moved))
        weighed.append(rows.mT @ others)
        grams.append(channel_gram(layers[name], moments.of(name)).to(wide.device)[block][:, block])
    gram = shrunk(torch.stack(grams).mean(dim=0))
    # Only W^T F W counts of what reads the units, and it is no larger than they are many.
    return narrowing(gram_root(torch.stack(weighed).sum(dim=0)).mT, gram)


def _full(gram: Tensor) -> Tensor:
    return torch.diag(gram) if gram.ndim == 1 else gram


def _error(
    name: str,
    fit: FittedMap,
    units: RecurrentUnits,
    kept: Sequence[Sequence[int]],
    layer: FoundLayer,
    moments: Calibration,
) -> float:
    """Squared error of a map's outputs that remain, relative to all of it."""
    old = layer.kernel.flatten(1)
    change = _change(name, fit, units, kept, old)
    weighting = moments.of(name).weighting
    whole = weighting.energy_of_weight(old)
    return 0.0 if change is None or whole <= 0 else weighting.energy(change) / whole


def _width(name: str, k: int, error: float, units: RecurrentUnits, layer: FoundLayer) -> Width:
    n_outputs, n_inputs = layer.weight.out_features, layer.weight.fan_in
    is_map = name not in units.readers
    rows = n_outputs // units.n_units * k if is_map else n_outputs
    reads = not (is_map and name in (f"{cell}.ih" for cell in units.cells(0)))
    columns = n_inputs // units.n_units * k if reads else n_inputs
    n_gone = 0 if layer.module._parameters.get("bias") is None else n_outputs - rows
    return Width(k, rows * columns / (n_outputs * n_inputs), rows * columns - n_gone, error, reads, with_bias=True)


def _change(
    name: str, fit: FittedMap, units: RecurrentUnits, kept: Sequence[Sequence[int]], old: Tensor
) -> Tensor | None:
    """What goes of a weight, at the outputs that remain; None for maps that read all that they read."""
    cell, _, part = name.rpartition(".")
    is_map = name not in units.readers
    at = units.all_cells.index(cell) if is_map else -1
    index = at // units.n_directions if is_map else units.n_layers
    if is_map and part == "ih" and index == 0:
        return None
    columns = list(kept[at]) if part == "hh" and is_map else places_of(units, kept, index - 1)
    rows = gate_rows(len(old), units.n_units, kept[at]) if is_map else list(range(len(old)))
    change = torch.zeros_like(old)
    change[rows] = old[rows]
    new = fit.weight.flatten(1).to(old.dtype)
    per_unit = new.shape[1] // len(columns)  # places of a convolution's kernel
    columns = [k * per_unit + place for k in columns for place in range(per_unit)]
    change[torch.tensor(rows)[:, None], torch.tensor(columns)] -= new
    return change
