"""Model surgery: every change is checked and built before the first one is made."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from time import perf_counter
from typing import Any, cast

import torch
from torch import Tensor, nn

from tensortrain.compression.carry import cannot_carry, carry
from tensortrain.compression.choose.candidates import cold_weighting
from tensortrain.compression.choose.plan import (
    CompressionPlan,
    Group,
    LayerPlan,
    Narrowed,
    NarrowedHeads,
    NarrowedRecurrent,
)
from tensortrain.compression.config import tell_configs_
from tensortrain.compression.made_up import Statistic, make_up
from tensortrain.compression.narrow import Fitted, all_or_none, check_between, check_units, fitted, narrow_
from tensortrain.compression.narrow_heads import check_heads, narrowed_heads
from tensortrain.compression.narrow_recurrent import FittedMap, check_recurrent, fitted_recurrent, narrow_recurrent_
from tensortrain.compression.narrow_whole_heads import FewerHeads, check_whole_heads, fewer_heads, narrow_whole_heads_
from tensortrain.compression.opened import close_composites, open_layers
from tensortrain.compression.retie import retie
from tensortrain.compression.survey.layers import FoundLayer, check_module, find_layers
from tensortrain.compression.survey.moments import Calibration, LayerMoments
from tensortrain.compression.survey.recurrent import RecurrentUnits
from tensortrain.compression.swap import Built, swap
from tensortrain.errors import ShapeError
from tensortrain.formats import Weighting
from tensortrain.nn import Embedding, FactorizedLayer, Linear, TiedHead, dense_twin
from tensortrain.system.observer import Observer, Silent
from tensortrain.system.offloading import is_offloaded, let_go_of_weights, offload
from tensortrain.system.parking import weights_parked

__all__ = ["apply_plan_", "apply_shapes_", "to_dense_"]

Build = Callable[[FoundLayer, LayerPlan, Weighting], FactorizedLayer]
_ANY_VALUE = 0.01  # of cores that are only run


def apply_plan_(model: nn.Module, plan: CompressionPlan, *, observer: Observer | None = None) -> nn.Module:
    """Replace layers as a plan says: all of them or none.

    Shared modules stay shared. Hooks, ``requires_grad``, mode, dtype, device and whatever hangs on a layer (attributes,
    buffers, parameters, children) carry over. Where the model holds a layer in a list, another object or a bound
    method, the new one is put there too.

    Args:
        model: Changed in place. A bare layer cannot be changed in place: its replacement is returned.
        plan: From ``plan_compression`` on this model or one of the same shapes. A plan read from JSON has no
            input statistics, so its decompositions are not weighted by them.

    Returns:
        Module: The model, or the new layer where the model is a bare layer.

    Raises:
        ShapeError: A layer of the plan is missing or has another shape; nothing was changed.
        NonFiniteError: A weight holds NaN or Inf; nothing was changed.

    Cost: one decomposition per layer.
    """
    return _applied(model, plan, lambda net: _apply(net, plan, observer or Silent()))


def apply_shapes_(model: nn.Module, plan: CompressionPlan) -> nn.Module:
    """The same with cores of the right shapes that hold any numbers: for a model that is only timed.

    Cost: none of the decompositions.
    """
    return _applied(model, plan, lambda net: _apply(net, replace(plan, calibration=None), Silent(), _unfitted))


def _applied(model: nn.Module, plan: CompressionPlan, apply: Callable[[nn.Module], nn.Module]) -> nn.Module:
    opened = open_layers(model, plan.opened)
    try:
        changed = apply(opened.model)
    except BaseException:
        opened.close()
        raise
    opened.model = changed
    return opened.close(changed_too=False)


def _apply(model: nn.Module, plan: CompressionPlan, observer: Observer, build: Build | None = None) -> nn.Module:
    found = {layer.name: layer for layer in find_layers(model)[0]}
    work = [(_checked(entry, found), entry) for entry in plan.layers if entry.spec is not None]
    for one in plan.groups:
        _check_group(model, one, plan, found)
    with weights_parked(model.parameters()) as put_aside:
        ready = _prepared(model, plan, work, found, observer, build or _build, put_aside)
        with all_or_none() as undo:
            for fit in ready.narrow:
                old = [model.get_submodule(name)._parameters["weight"] for name in fit.units.makers]
                undo.append(narrow_(model, fit.units, fit.kept, fit.weight, fit.bias_shift))
                put_aside(weight for weight in old if weight is not None)
            undo += [narrow_recurrent_(model, units, maps) for units, maps in ready.recurrent]
            undo += [narrow_whole_heads_(model, fewer) for fewer in ready.whole_heads]
            changed = swap(model, ready.built)
            if plan.groups:
                undo.append(tell_configs_(changed, plan.groups))
    for buffer, value in ready.statistics:
        buffer.copy_(value)
    retie(changed)
    return changed


@dataclass
class _Ready:
    """All that a plan puts into a model."""

    built: list[Built] = field(default_factory=list)
    narrow: list[Fitted] = field(default_factory=list)
    recurrent: list[tuple[RecurrentUnits, dict[str, FittedMap]]] = field(default_factory=list)
    whole_heads: list[FewerHeads] = field(default_factory=list)
    statistics: list[Statistic] = field(default_factory=list)


def _check_group(model: nn.Module, one: Group, plan: CompressionPlan, found: Mapping[str, FoundLayer]) -> None:
    """Raise ``ShapeError`` where a model lacks one of the layers that are narrowed together, or has another there."""
    if isinstance(one, Narrowed):
        check_units(one.units, found)
        check_between(model, one.units)
    elif isinstance(one, NarrowedHeads):
        check_heads(one.heads, found)
    elif isinstance(one, NarrowedRecurrent):
        check_recurrent(one.units, found)
    else:
        check_whole_heads(one.heads, found)
    for entry in plan.layers:
        if entry.name in one.names:
            _check_is_same(entry, found[entry.name])


def _prepared(
    model: nn.Module,
    plan: CompressionPlan,
    work: Sequence[tuple[FoundLayer, LayerPlan]],
    found: Mapping[str, FoundLayer],
    observer: Observer,
    build: Build,
    put_aside: Callable[[Iterable[Tensor]], None],
) -> _Ready:
    """All that a plan puts into a model; nothing of the model is changed yet.

    Args:
        put_aside: Is given the weights that are not needed any more but to go back after an error.
    """
    calibration = plan.calibration or Calibration()
    ready = _Ready()
    observer.on_start("decompose", len(work) + len(plan.groups))
    try:
        for k, (layer, entry) in enumerate(work):
            moments, began = calibration.of(layer.name), perf_counter()
            new = build(layer, entry, moments.weighting)
            ready.statistics += _keep_moments(model, layer, new, moments)
            moments.forget_shapes()
            ready.built.append((layer.names, layer.module, new))
            if layer.head is not None:
                ready.built.append((layer.head.names, layer.head.module, _tied(layer.head.module, new)))
            put_aside(p for name, p in layer.module.named_parameters(recurse=False) if name == "weight")
            if is_offloaded(layer.module):
                let_go_of_weights(layer.module)
                offload(new)
            observer.on_step(k + 1, seconds=perf_counter() - began)
        for k, one in enumerate(plan.groups):
            _prepare_group(ready, model, one, found, calibration)
            if isinstance(one, Narrowed):
                reader = model.get_submodule(one.units.reader)
                put_aside(p for p in [reader._parameters["weight"]] if p is not None)
                let_go_of_weights(reader)
            observer.on_step(len(work) + k + 1)
    finally:
        observer.on_end()
    return ready


def _prepare_group(
    ready: _Ready, model: nn.Module, one: Group, found: Mapping[str, FoundLayer], calibration: Calibration
) -> None:
    """What layers that are narrowed together become."""
    if isinstance(one, Narrowed):
        ready.narrow.append(fitted(model, one.units, one.kept, found, calibration.of(one.units.reader)))
        ready.statistics += ready.narrow[-1].statistics
    elif isinstance(one, NarrowedHeads):
        built, statistics = narrowed_heads(model, one.heads, one.kept, found, calibration.of(one.heads.judged))
        ready.built += built
        ready.statistics += statistics
    elif isinstance(one, NarrowedRecurrent):
        maps, statistics = fitted_recurrent(model, one.units, one.kept, found, calibration)
        ready.recurrent.append((one.units, maps))
        ready.statistics += statistics
    else:
        fewer, statistics = fewer_heads(model, one.heads, one.kept, found, calibration.of(one.heads.reader))
        ready.whole_heads.append(fewer)
        ready.statistics += statistics


def to_dense_(model: nn.Module, *, only: Collection[str] | None = None) -> nn.Module:
    """Put plain torch layers back in place of factorized ones.

    Args:
        only: Names of those; all if left out.

    Returns:
        Module: The model, or the dense layer where the model is a bare factorized layer.
    """
    check_module(model)
    aliases: dict[int, list[str]] = {}
    modules: dict[int, FactorizedLayer] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, FactorizedLayer) and (only is None or name in only):
            aliases.setdefault(id(module), []).append(name)
            modules[id(module)] = module
    built: list[Built] = []
    with torch.random.fork_rng(devices=[]):  # a fresh layer draws its first weights
        for key, module in modules.items():
            reason = cannot_carry(module, to=module.dense_type)
            if reason:
                name = aliases[key][0]
                warnings.warn(f"to_dense_ left {name!r} ({type(module).__name__}) factorized: {reason}", stacklevel=2)
                continue
            built.append((tuple(aliases[key]), module, dense_twin(module)))
            carry(module, built[-1][2])
        changed = swap(model, built)
    changed = close_composites(_untied_heads(changed))
    retie(changed)
    return changed


def _untied_heads(model: nn.Module) -> nn.Module:
    """Plain output layers in the place of tied heads whose table is torch's again; they share its weight."""
    names: dict[int, list[str]] = {}
    heads: dict[int, TiedHead] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        is_ours = isinstance(module, TiedHead) and module.made_from == "Linear"
        if is_ours and type(module.embedding) is nn.Embedding:
            names.setdefault(id(module), []).append(name)
            heads[id(module)] = module
    return swap(model, [(tuple(names[key]), head, _plain_head(head)) for key, head in heads.items()])


def _plain_head(head: TiedHead) -> nn.Linear:
    new = nn.Linear(head.in_features, head.out_features, bias=False, device="meta")
    new.weight = cast(nn.Embedding, head.embedding).weight
    new.bias = head.bias
    carry(head, new)
    return new.train(head.training)


def _checked(entry: LayerPlan, found: dict[str, FoundLayer]) -> FoundLayer:
    layer = found.get(entry.name)
    if layer is None:
        raise ShapeError(
            f"a plan must fit its model: it names layer {entry.name!r}, which the model lacks or which cannot be "
            f"factorized. Plan again with tensortrain.plan_compression on this model. Nothing was changed."
        )
    _check_is_same(entry, layer)
    head = layer.head.names[0] if layer.head is not None else ""
    if head != entry.head:
        raise ShapeError(
            f"a plan must fit its model: the output layer that shares the table {entry.name!r} is {head!r}, the plan "
            f"expects {entry.head!r}. Plan again on this model. Nothing was changed."
        )
    return layer


def _check_is_same(entry: LayerPlan, layer: FoundLayer) -> None:
    """Raise ``ShapeError`` where a layer is of another kind or shape than the plan was made for."""
    is_shape = layer.weight.dense_shape == entry.shape if entry.spec is None else layer.weight == entry.spec.weight
    if not is_shape or layer.kind != entry.kind:
        raise ShapeError(
            f"a plan must fit its model: layer {entry.name!r} is a {layer.kind} of shape {layer.weight.dense_shape}, "
            f"the plan expects a {entry.kind} of shape {entry.shape}. Plan again on this model. Nothing was changed."
        )


def _build(layer: FoundLayer, entry: LayerPlan, weighting: Weighting) -> FactorizedLayer:
    assert entry.spec is not None
    how: Any = entry.implementation  # checked where the plan was read
    more: dict[str, Any] = {}
    if entry.hot_ids:
        more["hot_ids"] = entry.hot_ids
        weighting = weighting if weighting.is_plain else cold_weighting(weighting, entry.hot_ids)
    if entry.order.sides is not None:
        more["order"] = entry.order
    new = layer.reader.from_spec(layer.module, entry.spec, weighting=weighting, implementation=how, **more)
    carry(layer.module, new)
    return new


def _tied(head: nn.Linear, table: FactorizedLayer) -> TiedHead:
    """The output layer that goes on sharing a table."""
    new = TiedHead(table)
    new.made_from = "Linear"
    new.bias = head.bias
    carry(head, new)
    return new.train(head.training)


@torch.no_grad()
def _unfitted(layer: FoundLayer, entry: LayerPlan, weighting: Weighting) -> FactorizedLayer:
    assert entry.spec is not None
    weight: Any = layer.module.weight
    how: dict[str, Any] = {"implementation": entry.implementation, "device": weight.device, "dtype": weight.dtype}
    new = layer.reader.like(layer.module, entry.spec, **how)
    if entry.hot_ids:
        cast(Embedding, new).keep_rows_(entry.hot_ids, layer.kernel)
    if entry.order.sides is not None:
        cast(Linear, new).set_order_(entry.order)
    for parameter in new.parameters():
        parameter.fill_(_ANY_VALUE)
    carry(layer.module, new)
    return new


@torch.no_grad()
def _keep_moments(model: nn.Module, layer: FoundLayer, new: FactorizedLayer, moments: LayerMoments) -> list[Statistic]:
    """Make up for what the truncation took from the mean and the variance of a layer's output.

    Returns:
        list: Statistics that are still to be changed, with their new values.
    """
    if moments.mean is None or "forward" in vars(layer.module):  # its input may not be what was seen
        return []
    kept = new.placed(new.format.to_dense(list(new.cores), new.spec)).flatten(1)  # new.weight would stay in a cache
    shift, statistics = make_up(model, layer.kernel.flatten(1), kept, moments, has_bias=new.bias is not None)
    if new.bias is not None:
        new.bias.add_(shift.to(new.bias.dtype))
    return statistics
