"""How often each layer loses what is predicted of it: some forms are tried on data, and its menu scaled by that.

Predictions come from second moments, which take the positions of an example for independent, inputs for independent of
gradients, and other data for alike. Two forms of each layer, and two widths of all hidden units, are tried together, in
one pass forward and backward; menus keep their order, and get the height that was seen.

Source of the idea: predicted curves, each scaled by one measured divergence, as in github.com/lems-svd/lems.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeAlias

import torch
from torch import Tensor, nn

from tensortrain.compression.choose.chooser import AnyWidths, Menu
from tensortrain.compression.choose.heights import Heights
from tensortrain.compression.choose.options import PlanOptions
from tensortrain.compression.choose.widths import Width, Widths
from tensortrain.compression.narrow import fitted
from tensortrain.compression.survey.fisher import Metric
from tensortrain.compression.survey.layers import FoundLayer
from tensortrain.compression.survey.moments import Calibration
from tensortrain.compression.survey.tried import Trial, losses_of
from tensortrain.formats.weighted_rank import WeightedMatrix
from tensortrain.system.parking import park
from tensortrain.system.processes import gathered
from tensortrain.system.storage import count_bytes
from tensortrain.train.outputs import judged_outputs
from tensortrain.train.task import Task

__all__ = ["Times", "tried"]

# Relative errors of the forms that are tried: plans of a half to four fifths of the size choose between them. The
# smaller the error, the more of it lies where second moments see least.
_ERRORS, _NARROW_ERRORS = (0.05, 0.25), (0.02, 0.15)
_MOST_BYTES = 2**28  # of a model: of larger ones the errors at all positions take more than the plan may hold
_ALIKE = 2.0  # what is seen of all layers differs by no more: predictions tell them apart as well
_MOST, _LEAST = 1e3, 1 / 16  # times what is usual of the layers: beyond it is chance

Marks: TypeAlias = Mapping[str, Sequence[tuple[float, float]]]


@dataclass(frozen=True)
class Times:
    """How often layers lose what is predicted of them.

    Attributes:
        factored: By name of the layer.
        narrowed: By name of the layer that reads the hidden units.
        usual: Of layers of which nothing was seen.
    """

    factored: Mapping[str, Heights]
    narrowed: Mapping[str, Heights]
    usual: Heights

    @classmethod
    def of(cls, factored: Marks, narrowed: Marks) -> Times | None:
        """Within reason, from marks as ``Heights`` has them; None where there is nothing to learn."""
        seen = sorted(times for marks in (*factored.values(), *narrowed.values()) for _, times in marks)
        if not seen or seen[-1] <= _ALIKE * seen[0]:
            return None
        usual = seen[len(seen) // 2]
        return cls(_curves(factored, usual), _curves(narrowed, usual), Heights(((1.0, usual),)))

    def on(self, menu: Menu) -> Menu:
        """A menu with these losses."""
        name = menu.layer.name
        at_widths = self.narrowed.get(name, self.usual)
        widths = [replace(width, error=at_widths.of(width.error)) for width in menu.widths]
        return replace(menu, widths=widths, heights=self.factored.get(name, self.usual))


def _curves(all_marks: Marks, usual: float) -> dict[str, Heights]:
    """Without what only chance can have made."""
    least, most = _LEAST * usual, _MOST * usual
    return {
        name: Heights.through([(error, min(max(times, least), most)) for error, times in marks])
        for name, marks in all_marks.items()
    }


@torch.no_grad()
def tried(
    model: nn.Module,
    menus: Sequence[Menu],
    hidden: Sequence[AnyWidths],
    calibration: Calibration | None,
    task: Task | None,
    options: PlanOptions,
) -> list[Menu]:
    """Menus with the losses that were seen; the same where nothing was, or no other than predicted.

    Nothing is seen where the data ends with the batches of the calibration. A model that will be healed is not looked
    at, since its losses before that decide little; nor a large one.

    Cost: one decomposition of each layer, and one pass forward and some backward over two batches.
    """
    if calibration is None or options.will_heal or not _can_be_seen(model, calibration):
        return list(menus)
    layers = {menu.layer.name: menu.layer for menu in menus}
    forms = [form for menu in menus if _is_told(menu) for form in _factored(menu.layer, calibration)]
    for one in hidden:
        forms += _narrowed(model, one, layers, calibration) if isinstance(one, Widths) else []
    judge = partial(_outputs, model, options, calibration.with_labels)
    trials = [form.trial for form in forms]
    seen = losses_of(model, trials, calibration, judge, Metric(model, task), options.observer)
    marks: dict[bool, dict[str, list[tuple[float, float]]]] = {True: {}, False: {}}
    for form, loss in zip(forms, seen, strict=True):
        if loss is not None:
            mark = form.error, loss / form.predicted
            marks[form.is_narrow].setdefault(form.trial.layer.name, []).append(mark)
    enough = 2 * sum(loss is not None for loss in seen) >= len(seen)
    times = Times.of(marks[False], marks[True]) if enough else None
    return list(menus) if times is None else [times.on(menu) for menu in menus]


def _can_be_seen(model: nn.Module, calibration: Calibration) -> bool:
    is_small = count_bytes(model.parameters()) <= _MOST_BYTES
    return is_small and bool(calibration.output_grams) and any(gathered(len(calibration.held)))


def _outputs(model: nn.Module, options: PlanOptions, with_labels: bool, batch: object) -> dict[str, Tensor]:
    return judged_outputs(model, batch, options.output, with_labels=with_labels)[0]


@dataclass(frozen=True)
class _Form:
    """What is tried of a layer.

    Attributes:
        error: Relative and squared, as predicted.
        predicted: The share of the output that it would spoil.
        is_narrow: It has fewer hidden units.
    """

    trial: Trial
    error: float
    predicted: float
    is_narrow: bool


def _is_told(menu: Menu) -> bool:
    """Whether what a smaller form of a layer loses is predicted, and can be seen in the layer alone."""
    return bool(menu.families and menu.reach) and menu.layer.head is None and menu.layer.weight.groups == 1


def _factored(layer: FoundLayer, calibration: Calibration) -> list[_Form]:
    """Matrices of low rank, which stand for all formats."""
    weighting, dense = calibration.of(layer.name).weighting, layer.kernel
    if weighting.is_plain or dense.is_complex():
        return []
    old = dense.T if layer.weight.kind == "embedding" else dense.flatten(1)
    matrix = WeightedMatrix.of(dense, layer.weight, weighting.beside(dense))
    pairs = matrix.at_errors(_ERRORS)
    forms = [_form(layer, left.to(old.dtype) @ right.to(old.dtype), old, calibration) for left, right in pairs]
    calibration.of(layer.name).set_aside()
    return [form for form in forms if form is not None]


def _narrowed(
    model: nn.Module, hidden: Widths, layers: Mapping[str, FoundLayer], calibration: Calibration
) -> list[_Form]:
    """Readers of fewer hidden units."""
    menu, reader = hidden.menus[hidden.reader], layers[hidden.reader]
    old, n = reader.kernel.flatten(1), hidden.group.n_units
    forms = []
    for width in {_nearest(menu, error).n_units for error in _NARROW_ERRORS}:
        kept = list(hidden.kept(width))
        fit = fitted(model, hidden.group, kept, layers, calibration.of(hidden.reader))
        places = torch.arange(old.shape[1]).reshape(n, -1)[list(kept)].flatten().to(old.device)
        new = torch.zeros_like(old).index_copy_(1, places, fit.weight.flatten(1))
        forms.append(_form(reader, new, old, calibration, is_narrow=True))
    calibration.of(hidden.reader).set_aside()
    return [form for form in forms if form is not None]


def _nearest(menu: Sequence[Width], error: float) -> Width:
    return min(menu, key=lambda width: abs(math.sqrt(width.error) - error))


def _form(
    layer: FoundLayer, new: Tensor, old: Tensor, calibration: Calibration, *, is_narrow: bool = False
) -> _Form | None:
    """A form, ``(outputs, inputs)``; what it takes from the mean is made up for, as in the finished model."""
    moments, change = calibration.of(layer.name), new.to(old.dtype) - old
    lost, whole = moments.weighting.energy(change), moments.weighting.energy_of_weight(old)
    if not (lost > 0 and whole > 0):
        return None
    shift = None if moments.mean is None else -(change.double() @ moments.mean.to(old.device))
    trial = Trial(layer, park(change) if moments.parks else change, shift)
    return _Form(trial, lost / whole, lost / calibration.output_scale, is_narrow)
