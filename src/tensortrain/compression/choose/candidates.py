"""The menu of one layer: formats, mode shapes and ranks, each with its parameters and predicted error."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

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

__all__ = ["Candidate", "candidates", "default_formats", "least_params"]

DEFAULT_FORMATS = ("low_rank", "tucker2", "tt")
_MOST_SPECTRUM_POINTS = 64
_PROBES = (0.6, 0.25)  # predicted errors at which a path is checked by real decompositions
_FAR = 2.0
# Unfoldings with both sides above this take minutes to decompose, and ranks there never pay.
_LARGEST_UNFOLDING = 2600


def default_formats() -> tuple[str, ...]:
    return DEFAULT_FORMATS


@dataclass(frozen=True)
class Candidate:
    """One way to store a layer: a point on the rank path of one format and mode shape."""

    point: RankPoint
    spectra: tuple[tuple[float, ...], ...]

    @property
    def spec(self) -> FactorSpec:
        return self.point.spec


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

    Cost: the singular values of every matricization of every mode shape tried.
    """
    weight = layer.weight
    dense = layer.kernel
    check_finite(layer.name, dense)
    found: list[Candidate] = []
    for name in formats:
        fmt = get_format(name)
        if weight.kind not in fmt.kinds:
            continue
        for outs, ins in _mode_choices(name, weight.one_group(), structure):
            spec = fmt.spec(weight, rank=1, out_modes=outs, in_modes=ins)
            if _too_large(spec):
                continue
            spectra = _group_spectra(dense, spec, weighting)
            shown = tuple(_shown(values) for values in spectra)
            points = rank_path(spec, spectra, max_params=weight.n_params - 1, growth=growth)
            if wide and len(spectra) > 1:
                points += even_path(spec, spectra, max_params=weight.n_params - 1, growth=growth)
            if points and (wide or not _hopeless(points, found)):
                points = _corrected(points, dense, weighting)
                found += [Candidate(point, shown) for point in points]
    return found


def least_params(weight: WeightShape, formats: Sequence[str]) -> int:
    """No candidate of a layer, and not its dense weight, has fewer parameters than this.

    Mode shapes that follow the structure of the inputs need data; prime factors are as small as those get.
    """
    least = weight.n_params
    if weight.kind == "linear" and "tt" in formats:
        n_out = min(weight.out_features, sum(suggest_modes(weight.out_features, 2)))
        least = min(least, sum(_prime_factors(weight.in_features)) + n_out)
    for name in formats:
        fmt = get_format(name)
        if weight.kind in fmt.kinds:
            for outs, ins in _mode_choices(name, weight.one_group(), None):
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


def _hopeless(points: Sequence[RankPoint], found: Sequence[Candidate]) -> bool:
    """Whether other candidates beat every point by far, so that its exact errors need not be known."""

    def best(n_params: int) -> float:
        return min((c.point.rel_error for c in found if c.point.n_params <= n_params), default=math.inf)

    return all(point.rel_error > _FAR * best(point.n_params) for point in points)


def _corrected(points: list[RankPoint], dense: Tensor, weighting: Weighting) -> list[RankPoint]:
    """Predicted errors scaled to what decompositions at a few points really reach.

    The prediction is a bound, in a norm that only fits the inputs' second moment, and formats differ in how
    far that is off; unscaled, they could not be compared.
    """
    if weighting.is_plain or points[0].spec.weight.groups > 1 or points[0].spec.format == "low_rank":
        return points
    fmt = get_format(points[0].spec.format)
    marks: list[tuple[float, float]] = []
    for target in _PROBES:
        point = min(points, key=lambda p: abs(p.rel_error - target))
        if point.rel_error > 1e-3 and all(abs(point.rel_error - m) > 0.05 for m, _ in marks):
            marks.append((point.rel_error, fmt.probe(dense, point.spec, weighting)))
    return [replace(point, rel_error=_interpolated(point.rel_error, marks)) for point in points]


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
