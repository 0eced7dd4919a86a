"""What comes to a layer with one batch: what its speed is judged at."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from torch import nn

from tensortrain.compression.survey.layers import FoundLayer
from tensortrain.compression.survey.moments import Calibration, LayerMoments
from tensortrain.nn import Linear
from tensortrain.nn.recurrent.cells import Cell
from tensortrain.nn.recurrent.layers import GRU, LSTM, RNN
from tensortrain.nn.recurrent.ways import MapInCell

__all__ = ["Load", "Turn", "load_of", "loads_of"]


@dataclass(frozen=True)
class Turn:
    """How a recurrent layer goes through a batch: as sequences, or step by step where a cell is called.

    Attributes:
        n_sequences: How often it is called.
        batch, n_steps: Rows of a step, and steps, of one call.
    """

    of: MapInCell
    n_sequences: int
    batch: int
    n_steps: int

    def seconds(self, form: Linear | None) -> float:
        """Of all calls, with another form of the map."""
        return self.n_sequences * self.of.seconds(form, self.batch * self.n_steps, self.batch, self.n_steps)


@dataclass(frozen=True)
class Load:
    """What comes to a layer with one batch.

    Attributes:
        rows: Vectors, ids or images, over all calls.
        n_examples: Examples in the batch.
        spatial: Size of a convolution's input.
        seen: Inputs were seen, so that flops per example are known.
        calls: How often the layer is called, with its share of the rows each time.
        turn: For a map of a recurrent layer or cell.
    """

    rows: int
    n_examples: int
    spatial: tuple[int, ...]
    seen: bool
    calls: int = 1
    turn: Turn | None = None


def load_of(layer: FoundLayer, calibration: Calibration | None, batch_size: int | None) -> Load:
    """The load of a layer at a batch size; that of the first batch seen when None."""
    weight = layer.weight
    moments = calibration.of(layer.name) if calibration is not None else LayerMoments()
    shape = moments.input_shape
    if calibration is None or shape is None:
        batch = batch_size or 1
        return Load(batch, batch, tuple(4 * k for k in weight.kernel), calibration is not None)
    # A layer may get its rows in another shape than (examples, ..), so they are counted per example.
    entry = {"linear": 1, "embedding": 0, "conv": 1 + len(weight.kernel)}[weight.kind]
    seen = math.prod(shape[: len(shape) - entry]) * (moments.calls or 1)
    batch = batch_size or calibration.n_examples
    rows = max(1, round(seen * batch / calibration.n_examples))
    calls = moments.calls or 1
    return Load(rows, batch, tuple(shape[len(shape) - len(weight.kernel) :]), seen=True, calls=min(calls, rows))


def loads_of(
    layer: FoundLayer, calibration: Calibration | None, batch_size: int | None, model: nn.Module | None = None
) -> tuple[Load, ...]:
    """The loads that a layer is judged at: the batch size asked for; by default that of the data, and one example.

    Args:
        model: In which a map of a recurrent layer is told from other layers.
    """
    loads = [load_of(layer, calibration, batch_size)]
    if batch_size is None and calibration is not None and calibration.n_examples != 1:
        loads.append(load_of(layer, calibration, 1))
    if model is None or calibration is None:
        return tuple(loads)
    return tuple(replace(load, turn=_turn(layer, model, calibration, load)) for load in loads)


def _turn(layer: FoundLayer, model: nn.Module, calibration: Calibration, load: Load) -> Turn | None:
    """How the recurrent layer of a map goes through the batch; None where it is none, or was not seen."""
    place, _, which = layer.name.rpartition(".")
    cell = model.get_submodule(place)
    steps = calibration.of(f"{place}.hh" if place else "hh")
    if not isinstance(cell, Cell) or which not in ("ih", "hh") or not load.seen or not steps.calls:
        return None
    if steps.input_shape is None:
        return None
    outer = model.get_submodule(place.rpartition(".")[0])
    n_sequences = (calibration.of(f"{place}.ih").calls or 1) if isinstance(outer, (GRU, LSTM, RNN)) else steps.calls
    rows = math.prod(steps.input_shape[:-1])
    batch = max(1, round(rows * load.n_examples / calibration.n_examples))
    return Turn(MapInCell.of(cell, which), n_sequences, batch, max(1, steps.calls // n_sequences))
