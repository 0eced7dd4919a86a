"""The menu of one layer: formats, mode shapes and ranks, each with its parameters and predicted error."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tensortrain.compression.choose.structure import Search, better_order, more_arrangements
from tensortrain.compression.survey.layers import FoundLayer, check_finite
from tensortrain.formats import (
    PLAIN,
    FactorSpec,
    RankPoint,
    Weighting,
    WeightShape,
    even_path,
    get_format,
    rank_path,
    suggest_modes,
    suggest_padded_modes,
)
from tensortrain.formats.channel_order import NATURAL, ChannelOrder
from tensortrain.nn.embedding.layers import hottest

__all__ = [
    "HEADS",
    "NARROW",
    "NARROWING",
    "RECURRENT",
    "WHOLE_HEADS",
    "Candidate",
    "Family",
    "candidates",
    "cold_weighting",
    "default_formats",
    "factoring",
    "families",
    "formats_worth_trying",
    "least_params",
]

NARROW = "narrow"  # beside the formats: fewer hidden units, of layers that stay dense
HEADS = "heads"  # the same of attention heads; by hand, since on the sentence encoder it lost more than was predicted
RECURRENT = "recurrent"  # of recurrent layers; by hand, as on stacked LSTMs it was not chosen or lost more
WHOLE_HEADS = "whole_heads"  # by hand, as on the sentence encoder none was chosen
NARROWING = (NARROW, HEADS, RECURRENT, WHOLE_HEADS)
DEFAULT_FORMATS = ("low_rank", "tucker2", "tt", NARROW)
_MOST_SPECTRUM_POINTS = 64
_HOT_SHIFTS = (7, 6, 5, 4)  # of a table's rows 1 in 2^7 stay as they are, 1 in 2^6, ..
_PROBES = (0.6, 0.25)  # predicted errors at which a path is checked by real decompositions
# A path that reaches less than so many times what is predicted at the largest of them has a cliff above it, where it no
# longer holds the few directions that count: of 512 x 1536 rank one was taken for 0.05 and left 1.0. It is checked
# there too.
_TRUSTED, _CLIFF = 0.8, 0.95
_COARSE = 0.08  # steps of the ranks at which families are compared
# A family that is predicted to have so many times the error of the best at every size cannot win. Predictions are
# bounds; decompositions reached 0.9 to 1.1 of them on weights without structure. Of trains that contain low rank the
# prediction has the same large term as that of low rank, and a second one.
_FAR, _LIKE_LOW_RANK = 1.2, 1.0
_NEAR = 1.2  # times the best error of its size, from which a better order of the channels may take a train
# Unfoldings with both sides above this take minutes to decompose, and ranks there never pay.
_LARGEST_UNFOLDING = 2600
_LARGE_WEIGHT = 2**20  # numbers
_MUCH = 2**18  # numbers of a weight: what is kept of each mode shape for later is as large


def default_formats() -> tuple[str, ...]:
    """A name of the version before, which answers for one version more."""
    return DEFAULT_FORMATS


def factoring(formats: Sequence[str]) -> tuple[str, ...]:
    """The formats among what a plan may choose from.

    Raises:
        KindError: One is not known.
    """
    names = tuple(name for name in formats if name not in NARROWING)
    for name in names:
        get_format(name)
    return names


def formats_worth_trying(layer: FoundLayer, formats: Sequence[str], *, scarce: bool) -> Sequence[str]:
    """The formats that are tried on a layer; of a very large one low rank alone, where memory is scarce.

    Other formats are decomposed in several copies of the weight, low rank in parts of it.
    """
    if scarce and layer.weight.n_params > _LARGE_WEIGHT and "low_rank" in formats:
        return ("low_rank",)
    return formats


@dataclass(frozen=True)
class Candidate:
    """One way to store a layer: a point on the rank path of one format and mode shape.

    Attributes:
        spectra: Singular values of every cut, the first relative to the largest.
        is_last_resort: Whether it is of a family that another one beats wherever both are that large.
        hot_ids: Rows of a table that stay as they are, beside the cores; counted by ``point``.
        order: Where the channels stand in the train.
    """

    point: RankPoint
    spectra: tuple[tuple[float, ...], ...]
    is_last_resort: bool = False
    hot_ids: tuple[int, ...] = ()
    order: ChannelOrder = NATURAL

    @property
    def spec(self) -> FactorSpec:
        return self.point.spec


@dataclass(frozen=True)
class Family:
    """A format and mode shape of a layer, with what the errors at all its ranks are predicted from.

    Attributes:
        spec: The ranks do not count.
        spectra: Singular values of every cut.
        marks: Predicted errors, and what decompositions there really reached.
        below: Points of so many parameters and more cannot win against other families.
        hot_ids: Rows of a table that stay as they are.
        share: Size of what the cores stand for, of the whole weight.
        order: Where the channels stand in the train.
    """

    spec: FactorSpec
    spectra: tuple[Tensor, ...]
    marks: tuple[tuple[float, float], ...] = ()
    below: float = math.inf
    hot_ids: tuple[int, ...] = ()
    share: float = 1.0
    order: ChannelOrder = NATURAL

    @classmethod
    def of(
        cls, spec: FactorSpec, dense: Tensor, weighting: Weighting, order: ChannelOrder = NATURAL
    ) -> tuple[Family, Tensor, Weighting]:
        """A family, and the weight and what weighs it in the order that it has."""
        if order.sides is not None:
            dense, weighting = order.of_weight(dense), order.of_weighting(weighting)
        return cls(spec, tuple(_group_spectra(dense, spec, weighting)), order=order), dense, weighting

    def candidates(self, *, growth: float, wide: bool = False) -> list[Candidate]:
        """The points of its rank paths that are smaller than the dense weight; none is worse than no weight at all."""
        shown = tuple(_shown(values) for values in self.spectra)
        found = [point for point in self.points(growth=growth, wide=wide) if point.n_params < self.below]
        return [
            Candidate(
                replace(point, rel_error=min(1.0, _interpolated(point.rel_error, self.marks))),
                shown,
                self.below < math.inf,
                self.hot_ids,
                self.order,
            )
            for point in found
        ]

    def points(self, *, growth: float, wide: bool = False) -> list[RankPoint]:
        """The same with errors as predicted from the spectra alone."""
        n_hot = len(self.hot_ids) * self.spec.weight.out_features
        most = self.spec.weight.n_params - n_hot - 1
        points = rank_path(self.spec, self.spectra, max_params=most, growth=growth)
        if wide and len(self.spectra) > 1:
            points += even_path(self.spec, self.spectra, max_params=most, growth=growth)
        if not n_hot:
            return points
        return [RankPoint(one.spec, one.n_params + n_hot, one.rel_error * self.share) for one in points]


def candidates(
    layer: FoundLayer,
    *,
    formats: Sequence[str],
    weighting: Weighting = PLAIN,
    structure: Sequence[int] | None = None,
    growth: float = 0.08,
    wide: bool = False,
) -> list[Candidate]:
    """All candidates of a layer that are smaller than its dense weight.

    Args:
        formats: Names to try; those that do not serve this kind of layer are passed over.
        weighting: What errors are weighed by; with a second moment of the inputs they are those of the output.
        structure: How the inputs are made up, such as (channels, height, width) before a flattening.
        growth: How much a rank grows from one candidate to the next, as a share of itself.
        wide: Also those of equal ranks, which have larger errors but no narrow place.

    Raises:
        NonFiniteError: The weight holds NaN or Inf.

    Cost: that of ``families``.
    """
    found = families(layer, formats=formats, weighting=weighting, structure=structure, wide=wide)
    return [candidate for family in found for candidate in family.candidates(growth=growth, wide=wide)]


def families(
    layer: FoundLayer,
    *,
    formats: Sequence[str],
    weighting: Weighting = PLAIN,
    structure: Sequence[int] | None = None,
    wide: bool = False,
    search: Search | None = None,
) -> list[Family]:
    """The formats and mode shapes of a layer; what takes long about its candidates, for steps of any size.

    Arguments and errors are those of ``candidates``.

    Args:
        search: ``"structure"`` also tries more mode shapes, and orders of the channels where these may win.

    Cost: the singular values of every matricization of every mode shape tried, and two decompositions of those shapes
    that may win; with ``search`` some ten decompositions and assignments of channels for each such shape.
    """
    weight, dense = layer.weight, layer.kernel
    check_finite(layer.name, dense)
    found: list[Family] = []
    best = _Best()
    for name in factoring(formats):
        fmt = get_format(name)
        if weight.kind not in fmt.kinds:
            continue
        for outs, ins, order in _arrangements(name, weight.one_group(), structure, search):
            spec = fmt.spec(weight, rank=1, out_modes=outs, in_modes=ins)
            if _too_large(spec):
                continue
            family, placed, weighed = Family.of(spec, dense, weighting, order)
            points = family.points(growth=_COARSE, wide=wide)
            if not points:
                continue
            if search is not None and order.sides is None and best.is_near(points):
                order = better_order(points, dense, weighting)
                if order.sides is not None:
                    family, placed, weighed = Family.of(spec, dense, weighting, order)
                    points = family.points(growth=_COARSE, wide=wide)
            if not wide and best.beats(points, _LIKE_LOW_RANK if _parts_sides(spec) else _FAR):
                family = replace(family, below=best.least_params)
            else:
                family = replace(family, marks=_marks(points, placed, weighed))
                best.add(points, family.marks)
            if weight.n_params > _MUCH:
                weighting.forget_norms()
            found.append(family)
            found += _with_hot_rows(family, layer, dense, weighting)
    return found


def _with_hot_rows(family: Family, layer: FoundLayer, dense: Tensor, weighting: Weighting) -> list[Family]:
    """The same where the rows of the most frequent ids stay as they are, a few of them or some more.

    Source: Chen et al., "GroupReduce", arXiv:1806.06950, in its simplest form.
    """
    counts = weighting.inputs
    if family.spec.format != "low_rank" or layer.weight.kind != "embedding" or counts is None:
        return []
    whole = weighting.energy(dense.T)
    met = int((counts > counts.min()).sum())
    found = []
    for n in (len(counts) >> shift for shift in _HOT_SHIFTS):
        hot = hottest(counts, n, layer.module.padding_idx)  # type: ignore[arg-type]
        ids = tuple(hot[hot >= 0].tolist())
        if 0 < len(ids) <= met and whole > 0:
            cold = cold_weighting(weighting, ids)
            share = math.sqrt(cold.energy(dense.T) / whole)
            spectra = tuple(_group_spectra(dense, family.spec, cold))
            found.append(replace(family, spectra=spectra, hot_ids=ids, share=share))
    return found


def cold_weighting(weighting: Weighting, hot_ids: Sequence[int]) -> Weighting:
    """What errors of a table weigh where some rows stay as they are."""
    counts = weighting.inputs
    assert counts is not None
    return replace(weighting, inputs=counts.index_fill(0, torch.tensor(hot_ids, device=counts.device), 0.0))


class _Best:
    """The least errors found so far, by parameters."""

    def __init__(self) -> None:
        self._sizes: list[int] = []
        self._errors: list[float] = []  # falling

    @property
    def least_params(self) -> float:
        return self._sizes[0] if self._sizes else math.inf

    def add(self, points: Sequence[RankPoint], marks: Sequence[tuple[float, float]]) -> None:
        known = list(zip(self._sizes, self._errors, strict=True))
        new = [(point.n_params, _interpolated(point.rel_error, marks)) for point in points]
        self._sizes, self._errors = [], []
        for size, error in sorted(known + new):
            if not self._errors or error < self._errors[-1]:
                self._sizes.append(size)
                self._errors.append(error)

    def at(self, n_params: int) -> float:
        """Of those that are no larger."""
        k = bisect_right(self._sizes, n_params)
        return self._errors[k - 1] if k else math.inf

    def beats(self, points: Sequence[RankPoint], far: float) -> bool:
        """Whether every point by so much that its exact errors need not be known; smaller ones than all found aside."""
        rivals = [(point.rel_error, self.at(point.n_params)) for point in points if point.n_params >= self.least_params]
        return bool(rivals) and all(_is_far(error, best, far) for error, best in rivals)

    def is_near(self, points: Sequence[RankPoint]) -> bool:
        """Whether another order of the channels may make some of them the best of their size."""
        return any(one.rel_error <= _NEAR * self.at(one.n_params) for one in points)


def _is_far(error: float, best: float, far: float) -> bool:
    """Whether an error is so many times another, or explains so much less than that."""
    return error > far * best or far * max(0.0, 1 - error**2) < 1 - best**2


def _parts_sides(spec: FactorSpec) -> bool:
    """Whether every core has an output or an input mode alone: a bond then cuts the weight as low rank does."""
    return all(m == 1 or n == 1 for m, n in zip(spec.out_modes, spec.in_modes, strict=False))


def least_params(weight: WeightShape, formats: Sequence[str], search: Search | None = None) -> int:
    """No candidate of a layer, and not its dense weight, has fewer parameters than this.

    Mode shapes that follow the structure of the inputs need data; prime factors are as small as those get.
    """
    least = weight.n_params
    if {*NARROWING} & {*formats} and weight.kind != "embedding":
        least //= max(weight.out_features, weight.in_features)  # one unit is left of those that it makes or reads
    formats = factoring(formats)
    if weight.kind == "linear" and "tt" in formats:
        n_out = min(weight.out_features, sum(suggest_modes(weight.out_features, 2)))
        least = min(least, sum(_prime_factors(weight.in_features)) + n_out)
    for name in formats:
        fmt = get_format(name)
        if weight.kind in fmt.kinds:
            for outs, ins, _ in _arrangements(name, weight.one_group(), None, search):
                least = min(least, fmt.spec(weight, rank=1, out_modes=outs, in_modes=ins).n_params)
    return least


def _prime_factors(n: int) -> Iterator[int]:
    p = 2
    while p * p <= n:
        while n % p == 0:
            yield p
            n //= p
        p += 1
    yield n  # or a closing 1


def _marks(points: Sequence[RankPoint], dense: Tensor, weighting: Weighting) -> tuple[tuple[float, float], ...]:
    """Predicted errors of a few points, and what decompositions there really reach.

    The prediction is a bound, in a norm that only fits the inputs' second moment, and formats differ in how
    far that is off; unscaled, they could not be compared.
    """
    if weighting.is_plain or points[0].spec.weight.groups > 1 or points[0].spec.format == "low_rank":
        return ()
    fmt = get_format(points[0].spec.format)
    marks: list[tuple[float, float]] = []

    def probe(target: float) -> None:
        point = min(points, key=lambda p: abs(p.rel_error - target))
        if point.rel_error > 1e-3 and all(abs(point.rel_error - m) > 0.05 for m, _ in marks):
            marks.append((point.rel_error, fmt.probe(dense, point.spec, weighting)))

    for target in _PROBES:
        probe(target)
    predicted, reached = max(marks, default=(0.0, 0.0))
    if reached < _TRUSTED * predicted:
        probe(_CLIFF)
        most = max(point.rel_error for point in points)
        if most > 1 and most > max(marks)[0]:
            marks.append((most, 1.0))  # no error is larger than the weight
    return tuple(marks)


def _interpolated(error: float, marks: Sequence[tuple[float, float]]) -> float:
    """``error`` times the ratio seen at the marks, linear between them."""
    if not marks:
        return error
    marks = sorted(marks)
    ratios = [reached / predicted for predicted, reached in marks]
    if error <= marks[0][0]:
        return error * ratios[0]
    for (a, _), (b, _), left, right in zip(marks, marks[1:], ratios, ratios[1:], strict=False):
        if error <= b:
            share = (error - a) / (b - a)
            return error * (left + share * (right - left))
    return error * ratios[-1]


def _group_spectra(dense: Tensor, spec: FactorSpec, weighting: Weighting) -> list[Tensor]:
    fmt, one = get_format(spec.format), spec.one_group()
    if spec.weight.groups == 1:
        return fmt.spectra(dense, one, weighting=weighting)
    groups = [fmt.spectra(block, one) for block in dense.chunk(spec.weight.groups)]
    return [torch.stack(column).square().mean(dim=0).sqrt() for column in zip(*groups, strict=True)]


def _shown(values: Tensor) -> tuple[float, ...]:
    top = values[:_MOST_SPECTRUM_POINTS] / values[0].clamp_min(1e-300)
    return tuple(float(f"{v:.4g}") for v in top.tolist())


def _too_large(spec: FactorSpec) -> bool:
    caps = get_format(spec.format).rank_caps(spec)
    return max(caps) > _LARGEST_UNFOLDING


Modes = tuple[int, ...]


def _arrangements(
    name: str, weight: WeightShape, structure: Sequence[int] | None, search: Search | None
) -> Iterator[tuple[Modes | None, Modes | None, ChannelOrder]]:
    """The same with where the channels stand, and what a search looks through beside them."""
    usual = list(_mode_choices(name, weight, structure))
    yield from ((outs, ins, NATURAL) for outs, ins in usual)
    if search is not None and name == "tt":
        known = {(outs, ins, NATURAL) for outs, ins in usual}
        for one in dict.fromkeys(more_arrangements(weight, structure)):
            if one not in known:
                yield one


def _mode_choices(
    name: str, weight: WeightShape, structure: Sequence[int] | None
) -> Iterator[tuple[Modes | None, Modes | None]]:
    """Output and input modes worth trying for a format; ``None`` leaves it to the format."""
    if name != "tt":
        yield None, None
        return
    seen: set[tuple[Modes, Modes]] = set()
    for outs, ins in _tt_choices(weight, structure):
        if (outs, ins) not in seen and len(outs) > 0:
            seen.add((outs, ins))
            yield outs, ins


def _tt_choices(weight: WeightShape, structure: Sequence[int] | None) -> Iterator[tuple[Modes, Modes]]:
    if weight.kind == "conv":
        for d in (1, 2, 3):
            yield suggest_modes(weight.out_features, d)[::-1], suggest_modes(weight.in_features, d)
        yield (1, weight.out_features), (weight.in_features, 1)
        return
    if weight.kind == "embedding":
        for d in (3,):
            ins, outs = (
                suggest_padded_modes(weight.in_features, d),
                suggest_modes(weight.out_features, d)[::-1],
            )
            yield outs, ins
        return
    for d in (2, 3):
        yield suggest_modes(weight.out_features, d)[::-1], suggest_modes(weight.in_features, d)
    for ins in _input_structures(weight.in_features, structure):
        # Input modes one by one, then all outputs: low rank whose input factor is itself a train.
        yield (*(1 for _ in ins), weight.out_features), (*ins, 1)
        halves = suggest_modes(weight.out_features, 2)
        yield (*(1 for _ in ins), *halves), (*ins, 1, 1)


def _input_structures(n: int, structure: Sequence[int] | None) -> Iterator[Modes]:
    if structure is not None and math.prod(structure) == n:
        given = tuple(int(k) for k in structure if k > 1)
        if len(given) > 1:
            yield given
            return
    modes = suggest_modes(n, 2)
    if min(modes) > 1:
        yield modes[::-1]
