"""What comes to a layer with one batch: what its speed is judged at."""

from __future__ import annotations

import math
from dataclasses import dataclass

from tensortrain.compression.survey.layers import FoundLayer
from tensortrain.compression.survey.moments import Calibration, LayerMoments

__all__ = ["Load", "load_of", "loads_of"]


@dataclass(frozen=True)
class Load:
    """What comes to a layer with one batch.

    Attributes:
        rows: Vectors, ids or images, over all calls.
        n_examples: Examples in the batch.
        spatial: Size of a convolution's input.
        seen: Inputs were seen, so that flops per example are known.
    """

    rows: int
    n_examples: int
    spatial: tuple[int, ...]
    seen: bool


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
    return Load(rows, batch, tuple(shape[len(shape) - len(weight.kernel) :]), seen=True)


def loads_of(layer: FoundLayer, calibration: Calibration | None, batch_size: int | None) -> tuple[Load, ...]:
    """The loads that a layer is judged at: the batch size asked for; by default that of the data, and one example."""
    first = load_of(layer, calibration, batch_size)
    if batch_size is not None or calibration is None or calibration.n_examples == 1:
        return (first,)
    return first, load_of(layer, calibration, 1)
