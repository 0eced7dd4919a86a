"""Widths that recurrent layers may be narrowed to: entries on the menus of all maps around their units.

All layers and directions of one layer of torch have one size, so they keep equally many units, each its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tensortrain.compression.choose.widths import Members, Width, channel_gram
from tensortrain.compression.narrow_recurrent import FittedMap, fitted_recurrent, gate_rows, places_of
from tensortrain.compression.survey.layers import FoundLayer
from tensortrain.compression.survey.moments import Calibration
from tensortrain.compression.survey.recurrent import RecurrentUnits
from tensortrain.formats.narrowing import Narrowing, narrowing, shrunk, weighed_rows

__all__ = ["RecurrentWidths", "recurrent_widths_of", "standing_apart"]

_MOST_WIDTHS = 32  # the layers are fitted anew at each
_ROUND = 8


@dataclass(frozen=True)
class RecurrentWidths:
    """All widths of the units of a recurrent layer.

    Attributes:
        orders: In which the units of each cell go.
        menus: By name of the map, in the same order for all.
    """

    units: RecurrentUnits
    orders: tuple[Narrowing, ...]
    menus: Mapping[str, tuple[Width, ...]]

    @property
    def names(self) -> tuple[str, ...]:
        return self.units.names

    @property
    def reader(self) -> str:
        return self.units.names[0]

    def kept(self, n_units: int) -> tuple[tuple[int, ...], ...]:
        """Numbers of the units that each cell keeps at a width."""
        return tuple(tuple(order.kept(n_units).tolist()) for order in self.orders)


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

    Cost: O(n^3) flops for n units, for every cell and at every width.
    """
    n = units.n_units
    step = max(1, -(-n // _MOST_WIDTHS))
    step = -(-step // _ROUND) * _ROUND if n >= 16 * _ROUND else step
    orders = tuple(_order(units, k, layers, moments) for k in range(len(units.all_cells)))
    menus: dict[str, list[Width]] = {name: [] for name in units.names}
    for k in range(step, n, step):
        kept = tuple(tuple(order.kept(k).tolist()) for order in orders)
        fits, _ = fitted_recurrent(model, units, kept, layers, moments)
        for name, fit in fits.items():
            menus[name].append(_width(name, k, fit, units, kept, layers[name], moments))
    return RecurrentWidths(units, orders, {name: tuple(widths) for name, widths in menus.items()})


def _order(units: RecurrentUnits, k: int, layers: Members, moments: Calibration) -> Narrowing:
    """In which the units of one cell go: those first whose loss costs least at all that read them."""
    cell, index, direction = units.all_cells[k], k // units.n_directions, k % units.n_directions
    places = range(direction * units.n_units, (direction + 1) * units.n_units)
    rows, grams = [], []
    for name, block in [(f"{cell}.hh", range(units.n_units)), *((n, places) for n in units.readers_of(index))]:
        known, kernel = moments.of(name), layers[name].kernel
        outputs = known.output_gram
        gram = channel_gram(layers[name], known).to(kernel.device)
        weighs = None if outputs is None else shrunk(_full(outputs).to(kernel.device))
        rows.append(weighed_rows(kernel[:, list(block)], weighs))
        grams.append(gram[list(block)][:, list(block)])
    return narrowing(torch.cat(rows), shrunk(torch.stack(grams).mean(dim=0)))


def _full(gram: Tensor) -> Tensor:
    return torch.diag(gram) if gram.ndim == 1 else gram


def _width(
    name: str,
    k: int,
    fit: FittedMap,
    units: RecurrentUnits,
    kept: Sequence[Sequence[int]],
    layer: FoundLayer,
    moments: Calibration,
) -> Width:
    old = layer.kernel.flatten(1)
    n_gone = 0 if fit.bias is None or name in units.readers else len(old) - len(fit.bias)
    change = _change(name, fit, units, kept, old)
    weighting = moments.of(name).weighting
    whole = weighting.energy_of_weight(old)
    error = 0.0 if change is None or whole <= 0 else weighting.energy_of_weight(change) / whole
    n_params = fit.weight.numel() - n_gone
    return Width(k, fit.weight.numel() / old.numel(), n_params, error, change is not None, with_bias=True)


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
