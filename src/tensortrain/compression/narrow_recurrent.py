"""Take hidden units out of recurrent layers: smaller layers of torch, which are faster by themselves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tensortrain.compression.made_up import Statistic
from tensortrain.compression.narrow import Undo, fitted, put, remember, resize
from tensortrain.compression.survey.hidden import HiddenUnits
from tensortrain.compression.survey.layers import FoundLayer
from tensortrain.compression.survey.moments import Calibration
from tensortrain.compression.survey.recurrent import RecurrentUnits
from tensortrain.errors import ShapeError
from tensortrain.nn import GRUCell, LSTMCell, RNNCell, is_transformers_conv1d

__all__ = [
    "FittedMap",
    "check_recurrent",
    "cut_maps",
    "fitted_recurrent",
    "gate_rows",
    "narrow_recurrent_",
    "places_of",
]

Kept = Sequence[Sequence[int]]


@dataclass(frozen=True)
class FittedMap:
    """A map with fewer inputs or outputs, in the layout of ``torch.nn.Linear`` or of its convolution."""

    weight: Tensor
    bias: Tensor | None


def places_of(units: RecurrentUnits, kept: Kept, index: int) -> list[int]:
    """Where the units that remain of one layer stand among its outputs, all directions side by side."""
    n = units.n_directions
    return [d * units.n_units + u for d, some in enumerate(kept[index * n : index * n + n]) for u in some]


def gate_rows(n_rows: int, n_units: int, kept: Sequence[int]) -> list[int]:
    """The outputs of a map to all gates that remain."""
    return [start + unit for start in range(0, n_rows, n_units) for unit in kept]


@torch.no_grad()
def fitted_recurrent(
    model: nn.Module, units: RecurrentUnits, kept: Kept, layers: Mapping[str, FoundLayer], moments: Calibration
) -> tuple[dict[str, FittedMap], list[Statistic]]:
    """All maps around the units of a recurrent layer, those that read fitted anew to their old outputs.

    Args:
        kept: Numbers of the units that remain, by cell.
        layers: Of the model, by name.
        moments: Of what came to them; maps of which nothing is known keep their weight for the units that remain.

    Returns:
        New maps by name, and statistics of batch norms that are still to be changed.

    Raises:
        ShapeError: The model lacks one of the layers, or has other sizes.
    """
    check_recurrent(units, layers)
    found: dict[str, FittedMap] = {}
    statistics: list[Statistic] = []
    for name, places in _read(units, kept).items():
        fit = fitted(
            model, HiddenUnits((), (), name, layers[name].weight.in_features), places, layers, moments.of(name)
        )
        found[name] = FittedMap(fit.weight, _shifted(layers[name].module, fit.bias_shift))
        statistics += fit.statistics
    for cell, some in zip(units.all_cells, kept, strict=True):
        for name in (f"{cell}.ih", f"{cell}.hh"):
            map_: Any = layers[name].module
            one = found.get(name, FittedMap(map_.weight.detach(), _shifted(map_, None)))
            rows = gate_rows(len(one.weight), units.n_units, some)
            found[name] = FittedMap(one.weight[rows], None if one.bias is None else one.bias[rows])
    return found, statistics


def _read(units: RecurrentUnits, kept: Kept) -> dict[str, list[int]]:
    """Of every layer that reads units, by name: the inputs that remain."""
    found = {f"{cell}.hh": list(some) for cell, some in zip(units.all_cells, kept, strict=True)}
    for index in range(units.n_layers):
        found |= {name: places_of(units, kept, index) for name in units.readers_of(index)}
    return found


def _shifted(layer: nn.Module, shift: Tensor | None) -> Tensor | None:
    bias = layer._parameters.get("bias")
    if bias is None:
        return None
    return bias.detach() if shift is None else bias.detach() + shift.to(bias.device, bias.dtype)


@torch.no_grad()
def cut_maps(model: nn.Module, units: RecurrentUnits, kept: Kept, *, zeroed: bool) -> dict[str, FittedMap]:
    """The maps without what some units make and read, nothing fitted.

    Args:
        zeroed: Keep the sizes: nobody reads the units, who are made as they were.
    """
    found = {}
    rows = {f"{c}.{part}": some for c, some in zip(units.all_cells, kept, strict=True) for part in ("ih", "hh")}
    read = _read(units, kept)
    for name in units.names:
        layer: Any = model.get_submodule(name)
        weight = layer.weight.T if is_transformers_conv1d(layer) else layer.weight
        bias = _shifted(layer, None)
        if name in read:
            some = weight[:, read[name]]
            places = torch.tensor(read[name], device=weight.device)
            weight = torch.zeros_like(weight).index_copy(1, places, some) if zeroed else some
        if name in rows and not zeroed:
            made = gate_rows(len(weight), units.n_units, rows[name])
            weight, bias = weight[made], None if bias is None else bias[made]
        found[name] = FittedMap(weight, bias)
    return found


@torch.no_grad()
def narrow_recurrent_(model: nn.Module, units: RecurrentUnits, maps: Mapping[str, FittedMap]) -> Undo:
    """Put new maps in the place of those around the units of a recurrent layer (taken apart), in place.

    Returns:
        A function that puts everything back.
    """
    cells = {name.rpartition(".")[0] for name in maps if name not in units.readers} | set(units.all_cells)
    above = {name.rpartition(".")[0] for name in units.readers if _is_map(model, name)}
    owners = {*cells, *above, units.layer, *(name.rpartition(".")[0] for name in above)}
    undo = [remember(model.get_submodule(name)) for name in (*maps, *owners)]
    for name, one in maps.items():
        _put_map(model.get_submodule(name), one, is_inside=name not in units.readers or _is_map(model, name))
    for name in (*cells, *above):
        _resize_cell(model.get_submodule(name))
    for name in {units.layer, *(name.rpartition(".")[0] for name in above)}:
        _resize_layer(model.get_submodule(name))

    def back() -> None:
        for one in undo:
            one()

    return back


def _is_map(model: nn.Module, name: str) -> bool:
    """Whether a layer is a map of a recurrent layer."""
    return isinstance(model.get_submodule(name.rpartition(".")[0]), (GRUCell, LSTMCell, RNNCell))


def _put_map(layer: Any, new: FittedMap, *, is_inside: bool) -> None:
    old = layer.weight
    weight = new.weight.to(old.device, old.dtype)
    put(layer, "weight", weight.T if is_transformers_conv1d(layer) else weight)
    if new.bias is not None:
        put(layer, "bias", new.bias)
    if is_inside:  # the layer that it belongs to tells of its sizes
        layer.out_features, layer.in_features = weight.shape
    else:
        resize(layer, [n for n in ("in_features", "in_channels", "nx") if hasattr(layer, n)], weight.shape[1])


def _resize_cell(cell: Any) -> None:
    cell.hidden_size, cell.input_size = cell.hh.in_features, cell.ih.in_features
    vars(cell).pop("_quick", None)


def _resize_layer(layer: Any) -> None:
    first = layer.cells()["l0"]
    for size in ("hidden_size", "input_size"):
        if getattr(layer, size) != getattr(first, size):
            resize(layer, [size], getattr(first, size))
    for short_way in ("_quick", "_quick_steps"):  # at sizes that are no more
        vars(layer).pop(short_way, None)


def check_recurrent(units: RecurrentUnits, layers: Mapping[str, FoundLayer]) -> None:
    """Raise ``ShapeError`` where a model lacks one of the layers around some units, or has other sizes."""
    sizes = {f"{cell}.hh": units.n_units for cell in units.all_cells}
    for index in range(units.n_layers):
        sizes |= dict.fromkeys(units.readers_of(index), units.n_directions * units.n_units)
    for name in units.names:
        found = layers[name].weight.in_features if name in layers else None
        if found is None or found != sizes.get(name, found):
            where = "lacks it" if found is None else f"has {found}"
            raise ShapeError(
                f"a plan must fit its model: it counts {sizes.get(name, 'some')} hidden units at layer {name!r}, the "
                f"model {where}. Plan again on this model. Nothing was changed."
            )
