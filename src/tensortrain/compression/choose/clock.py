"""How long every candidate of a layer takes: found at a few ranks, and in between from these.

Within a format and mode shape, time grows with the ranks about as the parameters do. Layers of one shape under one load
share what was found.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from tensortrain.compression.choose.candidates import Candidate
from tensortrain.compression.choose.candidates import Family as Forms
from tensortrain.compression.choose.cost import dense_cost, gather_seconds, spec_cost
from tensortrain.compression.choose.load import Load
from tensortrain.compression.choose.trial import can_time, told, trial_seconds
from tensortrain.compression.survey.layers import FoundLayer

__all__ = ["Clock", "family_of"]

_PREDICTED_AT = (0.0, 0.15, 0.4, 0.7, 1.0)  # places along a family's candidates by size
_ROUGHLY_AT = (0.0, 1.0)
_MEASURED_AT = (0.25, 0.8)
_ENOUGH_S = 5e-3  # that a dense layer takes in a trial
_MUCH_SMALLER = 0.6  # of an example: not worth it for less
_FEWEST_POSITIONS = 16  # of a trial's input, times the kernel's

Family = tuple[Any, ...]  # format and modes: within them, higher ranks are not faster
Curve = list[tuple[float, float]]  # parameters and seconds


def family_of(one: Candidate | Forms) -> Family:
    """What the ranks of a candidate may vary within."""
    return (one.spec.format, one.spec.out_modes, one.spec.in_modes, len(one.hot_ids))


@dataclass
class Clock:
    """Seconds per batch, predicted or, for convolutions of some size, measured."""

    _curves: dict[Any, Curve] = field(default_factory=dict)
    _dense: dict[Any, float] = field(default_factory=dict)
    _timed: dict[Any, Load | None] = field(default_factory=dict)  # at what; None where times are predicted
    _exact: dict[Any, float] = field(default_factory=dict)
    _told: dict[int, str] = field(default_factory=dict)

    def dense(self, layer: FoundLayer, load: Load) -> float:
        """Of the layer as it is."""
        key = (self._name(layer), load)
        if key not in self._dense:
            predicted = dense_cost(layer, load).seconds
            tried = self._timed[key] = (
                _enough_of(load, layer.weight.kernel, predicted) if can_time(layer, load, predicted) else None
            )
            self._dense[key] = predicted if tried is None else trial_seconds(layer, (), tried)[0] * _times(load, tried)
        return self._dense[key]

    def _tried(self, layer: FoundLayer, load: Load) -> Load | None:
        self.dense(layer, load)
        return self._timed[self._name(layer), load]

    def exact(self, layer: FoundLayer, one: Candidate, load: Load, family: Sequence[Candidate]) -> float:
        """Of one candidate; as predicted for it, or between those measured."""
        if self._tried(layer, load) is not None:
            return _between(self._curve(layer, load, family), one.point.n_params)
        key = (self._name(layer), one.spec, len(one.hot_ids), load)
        if key not in self._exact:
            self._exact[key] = _predicted_s(layer, one, load)
        return self._with_gathers(layer, load, one, self._exact[key])

    def _with_gathers(self, layer: FoundLayer, load: Load, candidate: Candidate, seconds: float) -> float:
        """Also of bringing channels in order and back; a kept dense weight, which takes no longer, needs none of it."""
        if candidate.order.sides is None:
            return seconds
        more = gather_seconds(layer, candidate.order.n_numbers, load)
        return min(seconds + more, max(seconds, self.dense(layer, load)))

    def all(
        self, layer: FoundLayer, load: Load, candidates: Sequence[Candidate], *, roughly: bool | None = False
    ) -> list[float]:
        """Of all candidates of a layer.

        Args:
            roughly: Whether times are predicted, as a share of the dense layer's, where else they would be measured;
                None for those alone that are taken where nothing else fits, which are many and seldom taken.
        """
        families: dict[Family, list[Candidate]] = {}
        for candidate in candidates:
            families.setdefault(family_of(candidate), []).append(candidate)
        curves = {
            key: self._rough_curve(layer, load, family)
            if roughly or (roughly is None and family[0].is_last_resort)
            else self._curve(layer, load, family)
            for key, family in families.items()
        }
        times = [_between(curves[family_of(one)], one.point.n_params) for one in candidates]
        return [self._with_gathers(layer, load, one, t) for one, t in zip(candidates, times, strict=True)]

    def _rough_curve(self, layer: FoundLayer, load: Load, family: Sequence[Candidate]) -> Curve:
        if self._tried(layer, load) is None:
            return self._curve(layer, load, family)
        key = (self._name(layer), load, family_of(family[0]), "rough")
        if key not in self._curves:
            share = self.dense(layer, load) / dense_cost(layer, load).seconds
            knots = _spread(family, _ROUGHLY_AT)
            self._curves[key] = [(knot.point.n_params, share * _predicted_s(layer, knot, load)) for knot in knots]
        return self._curves[key]

    def _curve(self, layer: FoundLayer, load: Load, family: Sequence[Candidate]) -> Curve:
        key = (self._name(layer), load, family_of(family[0]))
        if key not in self._curves:
            tried = self._tried(layer, load)
            knots = _spread(family, _PREDICTED_AT if tried is None else _MEASURED_AT)
            if tried is not None:
                whole, *seconds = trial_seconds(layer, [knot.spec for knot in knots], tried)
                # As a share of the dense layer's at the same time: machines are not always equally fast.
                seconds = [self.dense(layer, load) * one / whole for one in seconds]
            else:
                seconds = [_predicted_s(layer, knot, load) for knot in knots]
            self._curves[key] = [(knot.point.n_params, one) for knot, one in zip(knots, seconds, strict=True)]
        return self._curves[key]

    def _name(self, layer: FoundLayer) -> str:
        if id(layer) not in self._told:
            self._told[id(layer)] = told(layer)
        return self._told[id(layer)]


def _predicted_s(layer: FoundLayer, one: Candidate, load: Load) -> float:
    return spec_cost(layer, one.spec, load, n_hot=len(one.hot_ids)).seconds


def _enough_of(load: Load, kernel: Sequence[int], dense_s: float) -> Load:
    """As many examples, and as large ones, as a trial needs: beyond some milliseconds, time grows as the work does."""
    few = min(load.rows, 1 << max(0, math.ceil(load.rows * _ENOUGH_S / dense_s) - 1).bit_length())
    share = load.rows * _ENOUGH_S / (few * dense_s)
    if few > 1 or share > _MUCH_SMALLER or not load.spatial:
        return replace(load, rows=few)
    side = share ** (1 / len(load.spatial))
    smaller = (max(math.ceil(side * n), _FEWEST_POSITIONS * k) for n, k in zip(load.spatial, kernel, strict=True))
    return replace(load, rows=1, spatial=tuple(map(min, load.spatial, smaller)))


def _times(load: Load, tried: Load) -> float:
    return load.rows * math.prod(load.spatial) / (tried.rows * math.prod(tried.spatial))


def _spread(family: Sequence[Candidate], places: Sequence[float]) -> list[Candidate]:
    """Candidates at some shares of the way from the smallest to the largest in parameters, each once."""
    ranked = sorted(family, key=lambda candidate: candidate.point.n_params)
    low, high = ranked[0].point.n_params, ranked[-1].point.n_params
    wanted = [low + place * (high - low) for place in places]
    found = {
        k: ranked[k]
        for aim in wanted
        for k in [min(range(len(ranked)), key=lambda k: abs(ranked[k].point.n_params - aim))]
    }
    return [found[k] for k in sorted(found)]


def _between(curve: Curve, size: float) -> float:
    """Linear between the knots, constant beyond them."""
    if size <= curve[0][0]:
        return curve[0][1]
    for (a, left), (b, right) in itertools.pairwise(curve):
        if size <= b:
            return left + (right - left) * (size - a) / (b - a)
    return curve[-1][1] if len(curve) < 2 else _beyond(curve, size)


def _beyond(curve: Curve, size: float) -> float:
    """Past the last knot, as steep as before it, and never falling."""
    (a, left), (b, right) = curve[-2:]
    return right + max(0.0, (right - left) / max(b - a, math.ulp(1.0))) * (size - b)
