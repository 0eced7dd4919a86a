"""What a layer costs to run, predicted from shapes: flops per example and seconds per batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from tensortrain.compression.choose.load import Load
from tensortrain.compression.survey.layers import FoundLayer
from tensortrain.contract import cost_model, use_cost_model
from tensortrain.formats import FactorSpec, get_format
from tensortrain.nn import ConvLayer, Embedding, FactorizedLayer, Linear, TiedHead

__all__ = ["LayerCost", "dense_cost", "empty_twin", "gather_seconds", "spec_cost"]


@dataclass(frozen=True)
class LayerCost:
    """``flops`` per example (``None`` when no inputs were seen), ``seconds`` per batch."""

    flops: int | None
    seconds: float


def dense_cost(layer: FoundLayer, load: Load) -> LayerCost:
    """Cost of the layer as it is."""
    return _layer_cost(layer, empty_twin(layer, None), load, dense=True)


def spec_cost(layer: FoundLayer, spec: FactorSpec, load: Load, *, n_hot: int = 0) -> LayerCost:
    """Cost of the layer in another format, run the fastest way that it allows.

    Args:
        n_hot: Rows of a table that stay as they are.
    """
    return _layer_cost(layer, empty_twin(layer, spec), load, dense=False, n_hot=n_hot)


def gather_seconds(layer: FoundLayer, n_channels: int, load: Load) -> float:
    """Of bringing so many channels of every row into another order."""
    weight: Any = layer.module.weight
    return cost_model(weight.device).copy_s(2 * load.rows * n_channels * weight.element_size())


def _layer_cost(layer: FoundLayer, twin: FactorizedLayer, load: Load, *, dense: bool, n_hot: int = 0) -> LayerCost:
    weight: Any = layer.module.weight
    with use_cost_model(cost_model(weight.device)):  # the twin has no device of its own
        seconds, flops = _twin_cost(twin, load, dense=dense)
        if layer.head is not None:
            head_s, head_flops = _head_cost(layer, twin, load.rows, n_hot, dense=dense)
            seconds, flops = seconds + head_s, flops + head_flops
    return LayerCost(flops // max(1, load.n_examples) if load.seen else None, seconds)


def _twin_cost(twin: FactorizedLayer, load: Load, *, dense: bool) -> tuple[float, int]:
    rows = load.rows
    with torch.no_grad():
        if isinstance(twin, ConvLayer):
            conv = twin.plan(rows, load.spatial)
            return (conv.dense_s, conv.dense_flops) if dense else (conv.predicted_s, conv.factorized_flops)
        if isinstance(twin, Embedding):
            lookup = twin.plan(rows)
            return (lookup.dense_s, 0) if dense else (lookup.predicted_s, lookup.flops)
        assert isinstance(twin, Linear)
        return _linear_s(twin, load, dense=dense), _linear_flops(twin, rows, dense=dense)


def _linear_s(twin: Linear, load: Load, *, dense: bool) -> float:
    if load.turn is not None:
        return load.turn.seconds(None if dense else twin)
    plan = twin.plan(-(-load.rows // load.calls))
    return load.calls * (plan.dense_s if dense else plan.predicted_s)


def _linear_flops(twin: Linear, rows: int, *, dense: bool) -> int:
    if dense:
        return 2 * rows * twin.out_features * twin.in_features
    forced = twin.plan(rows, force="factorized")
    return forced.flops * rows // forced.batch  # plans are made for rows rounded up


@torch.no_grad()
def _head_cost(layer: FoundLayer, twin: FactorizedLayer, rows: int, n_hot: int, *, dense: bool) -> tuple[float, int]:
    """Of the output layer that shares a table, on as many rows as are looked up."""
    if dense or twin.format.chain(twin.spec) is None:  # of other formats the dense table is used
        return TiedHead(empty_twin(layer, None)).plan(rows).dense_s, 2 * rows * twin.spec.weight.n_params
    head = TiedHead(twin)
    forced = head.plan(rows, force="factorized")
    flops = forced.flops * rows // forced.batch  # plans are made for rows rounded up
    if not n_hot:
        return head.plan(rows).predicted_s, flops
    # Rows that stay are a product of their own, whose logits are put among the others'.
    size = layer.kernel.element_size()
    model = cost_model(layer.kernel.device)
    own_s = model.gemm_s(rows, n_hot, head.in_features, dtype=layer.kernel.dtype)
    own_s += 2 * model.stream_s(2 * rows * head.out_features * size)
    return head.plan(rows).predicted_s + own_s, flops + 2 * rows * n_hot * head.in_features


def empty_twin(layer: FoundLayer, spec: FactorSpec | None) -> FactorizedLayer:
    """The factorized layer of a spec without memory for its cores (of low rank when there is no spec)."""
    if spec is None:
        spec = get_format("low_rank").spec(layer.weight, rank=1)
    weight: Any = layer.module.weight
    return layer.reader.like(layer.module, spec, device="meta", dtype=weight.dtype)
