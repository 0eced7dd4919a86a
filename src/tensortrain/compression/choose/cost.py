"""What a layer costs to run, predicted from shapes: flops per example and seconds per batch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from tensortrain.compression.survey.calibrate import Calibration
from tensortrain.compression.survey.layers import FoundLayer
from tensortrain.contract import cost_model, use_cost_model
from tensortrain.formats import FactorSpec, get_format
from tensortrain.nn import ConvLayer, Embedding, FactorizedLayer, Linear

__all__ = ["LayerCost", "dense_cost", "empty_twin", "spec_cost"]


@dataclass(frozen=True)
class LayerCost:
    """``flops`` per example (``None`` when no inputs were seen), ``seconds`` per batch."""

    flops: int | None
    seconds: float


def dense_cost(layer: FoundLayer, calibration: Calibration | None, batch_size: int | None) -> LayerCost:
    """Cost of the layer as it is."""
    rows, batch, spatial = _load(layer, calibration, batch_size)
    twin = empty_twin(layer, None)
    seconds, flops = _layer_cost(layer, twin, rows, spatial, dense=True)
    return LayerCost(_per_example(flops, batch, calibration), seconds)


def spec_cost(
    layer: FoundLayer, spec: FactorSpec, calibration: Calibration | None, batch_size: int | None
) -> LayerCost:
    """Cost of the layer in another format, run the fastest way that it allows."""
    rows, batch, spatial = _load(layer, calibration, batch_size)
    seconds, flops = _layer_cost(layer, empty_twin(layer, spec), rows, spatial, dense=False)
    return LayerCost(_per_example(flops, batch, calibration), seconds)


def _per_example(flops: int, batch: int, calibration: Calibration | None) -> int | None:
    return None if calibration is None else flops // max(1, batch)


def _load(
    layer: FoundLayer, calibration: Calibration | None, batch_size: int | None
) -> tuple[int, int, tuple[int, ...]]:
    """Rows (vectors, ids or images over all calls), examples, and the size of a convolution's input."""
    weight = layer.weight
    shape = calibration.input_shapes.get(layer.name) if calibration else None
    if calibration is None or shape is None:
        batch = batch_size or 1
        return batch, batch, tuple(4 * k for k in weight.kernel)
    # A layer may get its rows in another shape than (examples, ..), so they are counted per example.
    entry = {"linear": 1, "embedding": 0, "conv": 1 + len(weight.kernel)}[weight.kind]
    seen = math.prod(shape[: len(shape) - entry]) * calibration.calls.get(layer.name, 1)
    batch = batch_size or calibration.n_examples
    rows = max(1, round(seen * batch / calibration.n_examples))
    return rows, batch, tuple(shape[len(shape) - len(weight.kernel) :])


def _layer_cost(
    layer: FoundLayer, twin: FactorizedLayer, rows: int, spatial: tuple[int, ...], *, dense: bool
) -> tuple[float, int]:
    weight: Any = layer.module.weight
    with use_cost_model(cost_model(weight.device)):  # the twin has no device of its own
        return _twin_cost(twin, rows, spatial, dense=dense)


def _twin_cost(twin: FactorizedLayer, rows: int, spatial: tuple[int, ...], *, dense: bool) -> tuple[float, int]:
    with torch.no_grad():
        if isinstance(twin, ConvLayer):
            conv = twin.plan(rows, spatial)
            return (conv.dense_s, conv.dense_flops) if dense else (conv.predicted_s, conv.factorized_flops)
        if isinstance(twin, Embedding):
            lookup = twin.plan(rows)
            return (lookup.dense_s, 0) if dense else (lookup.predicted_s, lookup.flops)
        assert isinstance(twin, Linear)
        plan = twin.plan(rows)
        if dense:
            return plan.dense_s, 2 * rows * twin.out_features * twin.in_features
        forced = twin.plan(rows, force="factorized")
        return plan.predicted_s, forced.flops * rows // forced.batch  # plans are made for rows rounded up


def empty_twin(layer: FoundLayer, spec: FactorSpec | None) -> FactorizedLayer:
    """The factorized layer of a spec without memory for its cores (of low rank when there is no spec)."""
    if spec is None:
        spec = get_format("low_rank").spec(layer.weight, rank=1)
    weight: Any = layer.module.weight
    return layer.reader.like(layer.module, spec, device="meta", dtype=weight.dtype)
