"""Everything in a model that several layers can be narrowed at together, with what every width costs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from time import perf_counter
from typing import TypeAlias

from torch import nn

from tensortrain.compression.choose.candidates import HEADS, NARROW, NARROWING, RECURRENT, WHOLE_HEADS
from tensortrain.compression.choose.chooser import AnyWidths
from tensortrain.compression.choose.folder import Folder
from tensortrain.compression.choose.head_widths import HeadWidths, apart, head_widths_of
from tensortrain.compression.choose.options import PlanOptions
from tensortrain.compression.choose.recurrent_widths import RecurrentWidths, recurrent_widths_of, standing_apart
from tensortrain.compression.choose.whole_head_widths import WholeHeadWidths, apart_whole, whole_head_widths_of
from tensortrain.compression.choose.widths import Members, Widths, disjoint, widths_of
from tensortrain.compression.survey.layers import FoundLayer
from tensortrain.compression.survey.moments import Calibration
from tensortrain.compression.survey.proven import proven_units
from tensortrain.compression.survey.proven_heads import proven_heads
from tensortrain.compression.survey.proven_recurrent import proven_recurrent
from tensortrain.compression.survey.proven_whole_heads import proven_whole_heads
from tensortrain.nn import CompositeLayer, MultiheadAttention
from tensortrain.system.offloading import let_go_of_weights

__all__ = ["widths_together"]

Job: TypeAlias = tuple[Sequence[str], Callable[[], AnyWidths]]  # names of the layers whose moments are read


def widths_together(
    model: nn.Module,
    layers: Sequence[FoundLayer],
    calibration: Calibration | None,
    options: PlanOptions,
    folder: Folder,
) -> list[AnyWidths]:
    """Units and attention heads to narrow at, where that is asked for and what comes to their readers is known.

    Before a long healing they are left whole: training finds other uses for them.
    """
    asked = {*NARROWING} & {*options.formats}
    if not asked or calibration is None or not calibration.grams or options.will_heal == "long":
        return []
    jobs = list(_jobs(model, layers, calibration, options, folder))
    options.observer.on_start("widths", len(jobs))
    found = []
    for names, make in jobs:
        began = perf_counter()
        found.append(make())
        for name in names:
            calibration.of(name).set_aside()
            let_go_of_weights(model.get_submodule(name))
        options.observer.on_step(len(found), seconds=perf_counter() - began)
    options.observer.on_end()
    return [one for one in found if one.menus[one.reader]]


def _jobs(
    model: nn.Module, layers: Sequence[FoundLayer], calibration: Calibration, options: PlanOptions, folder: Folder
) -> Iterator[Job]:
    """What is found, kind after kind; a layer is narrowed at in one way."""
    known, notes = calibration.layers, calibration.notes
    every = {layer.name: layer for layer in layers}
    free = {layer.name: layer for layer in layers if not _stands_open(model, layer)}
    slow = options.allow_slower
    kept_as = "-slow" if slow else ""  # fewer widths stand on the menu where none may be slow
    if RECURRENT in options.formats:
        chosen = partial(standing_apart, layers=every, moments=calibration)
        for k, cells in enumerate(proven_recurrent(model, calibration, chosen, notes)):
            free = _without(free, cells.names)
            make = partial(recurrent_widths_of, model, cells, every, calibration)
            yield cells.names, partial(folder.widths, f"recurrent-{k}", RecurrentWidths, cells, make)
    if NARROW in options.formats:
        found = proven_units(model, calibration, partial(disjoint, layers=dict(free), moments=known), notes)
        for k, units in enumerate(found):
            free = _without(free, units.names)
            moments = calibration.of(units.reader)
            make_units = partial(widths_of, model, units, every, moments, allow_slower=slow)
            yield (units.reader,), partial(folder.widths, f"units-{k}{kept_as}", Widths, units, make_units)
    if WHOLE_HEADS in options.formats:
        whole = partial(apart_whole, layers=free | _of_attention(model, layers), moments=known)
        for k, some in enumerate(proven_whole_heads(model, calibration, whole, notes)):
            free = _without(free, some.names)
            make_whole = partial(whole_head_widths_of, some, every, calibration.of(some.reader))
            yield (some.reader,), partial(folder.widths, f"whole-heads-{k}", WholeHeadWidths, some, make_whole)
    if HEADS in options.formats:
        fit = partial(apart, layers=dict(free), moments=known, taken=set())
        for k, heads in enumerate(proven_heads(model, calibration, free, fit, notes)):
            moments = calibration.of(heads.judged)
            make_heads = partial(head_widths_of, heads, every, moments, allow_slower=slow)
            yield (heads.judged,), partial(folder.widths, f"heads-{k}{kept_as}", HeadWidths, heads, make_heads)


def _without(layers: Members, names: Sequence[str]) -> dict[str, FoundLayer]:
    return {name: layer for name, layer in layers.items() if name not in names}


def _of_attention(model: nn.Module, layers: Sequence[FoundLayer]) -> dict[str, FoundLayer]:
    """Maps of attention that stands open, by name; without positions of its own, which all heads share."""
    outer = [name for name, part in model.named_modules() if type(part) is MultiheadAttention and part.bias_k is None]
    return {one.name: one for one in layers if one.name.rpartition(".")[0] in outer}


def _stands_open(model: nn.Module, layer: FoundLayer) -> bool:
    """Whether it is a map of a layer that is put together again, where it has the size that all maps have."""
    outer = [name for name, module in model.named_modules() if isinstance(module, CompositeLayer)]
    return any(layer.name.startswith(f"{name}." if name else "") for name in outer)
