"""What came to each layer on the calibration data, and how much its output matters: one record a layer."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tensortrain.compression.survey.span import Span
from tensortrain.formats import PLAIN, Weighting
from tensortrain.formats.whitening import DAMPING
from tensortrain.system.parking import is_parked, let_go, park, parked_zeros, tidy
from tensortrain.system.processes import n_processes
from tensortrain.train.task import Task

__all__ = ["Calibration", "LayerMoments", "expected_shares", "n_moments", "second_moment"]

LARGEST_FULL_GRAM = 4608  # features: 170 MB in float64; above, only the diagonal is kept
_MOST_UNMET = 0.5  # of all ids to come, however many of those met came once
_LEAST_UNMET = 0.05  # of what they would be if all ids were alike: positions beyond short texts may come, too
_EXACT = 1e-6  # of the mean square: what inputs bring from outside of the directions seen is rounding
_WORTH_PARKING, _AT_ONCE = 2**17, 2**19  # numbers; of those parked, how many are added to at once
_MANY_COLUMNS, _BLOCKS = 1024, 8  # of a product with itself that is made in blocks
_CONSTANT = 1e-10  # of the second moment: an input that varies less is the same for all rows


@dataclass
class LayerMoments:
    """What came to one layer; None what is not known. While the data runs, ``gram`` and ``mean`` are sums over rows.

    Attributes:
        gram: ``(N, N)`` or ``(N,)`` float64 mean second moment of the inputs, about the mean where the layer can make
            up for a shifted mean (by its bias, or a batch norm that follows); an embedding's token frequencies. None
            where no rows, or only equal ones, came.
        mean: ``(N,)`` mean input, where the moment is about it.
        output_gram: ``(M, M)`` or ``(M,)`` second moment of the gradients of the model's output with respect to the
            layer's, summed over the rows of an example: how much a change of the layer's output matters.
        norm: The batch norm that the layer's output goes straight into and nowhere else, by name.
        input_shape: Shape of the last input in the first batch (with its batch axis).
        structure: For a layer behind a flattening, the (channels, height, width) that were flattened.
        calls: How often the layer ran on the first batch.
        n_rows: Rows summed up.
        basis: ``(r, N)``: the directions that the inputs lie in, where these are few.
        outside: Share of the mean square that is to be expected in any other direction; None where there is no basis.
        span: These directions, while the data runs.
        waiting: Rows of calls, and the tables that they are rows of, which are not summed up yet: of several calls
            together it takes less to see that they lie in all directions.
        parks: Large moments lie in files, and take memory only while they are looked at.
    """

    gram: Tensor | None = None
    mean: Tensor | None = None
    output_gram: Tensor | None = None
    norm: str | None = None
    input_shape: tuple[int, ...] | None = None
    structure: tuple[int, ...] | None = None
    calls: int | None = None
    n_rows: int | None = None
    basis: Tensor | None = None
    outside: float | None = None
    span: Span | None = None
    waiting: list[tuple[Tensor, Tensor | None]] = field(default_factory=list, compare=False, repr=False)
    parks: bool = field(default=False, compare=False, repr=False)

    @property
    def weighting(self) -> Weighting:
        """What an error of the layer's weight is weighed by; the same object while the moments are the same."""
        if self.gram is None:
            return PLAIN
        known: Weighting | None = self.__dict__.get("_weighting")
        if known is None or known.inputs is not self.gram or known.outputs is not self.output_gram:
            known = Weighting(self.gram, self.output_gram, basis=self.basis, outside=self.outside or 0.0)
            self.__dict__["_weighting"] = known
        return known

    def forget_derived(self) -> None:
        """Drop what was computed from the moments on the way, and their memory where they lie in files."""
        known: Weighting | None = self.__dict__.pop("_weighting", None)
        if known is not None and self.parks:
            known.forget()
        let_go(self.gram, self.output_gram, self.basis)
        if self.parks:
            tidy()

    def forget_shapes(self) -> None:
        """Drop what formats made of the moments; where these lie in memory, what was found of the weight stays."""
        if self.parks:
            self.forget_derived()
        else:
            self.weighting.forget_shapes()

    def park(self) -> None:
        """Put large moments into files, where that is asked for."""
        self.gram, self.output_gram = self._parked(self.gram), self._parked(self.output_gram)

    def _parked(self, moment: Tensor | None) -> Tensor | None:
        if moment is None or not self._is_to_park(moment) or is_parked(moment):
            return moment
        return park(moment)

    def _is_to_park(self, moment: Tensor) -> bool:
        return self.parks and moment.numel() >= _WORTH_PARKING and moment.device.type == "cpu"

    def set_aside(self) -> None:
        """The same where the moments lie in files; else what was computed is of use later."""
        if self.parks:
            self.forget_derived()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_weighting"}

    def add(self, gram: Tensor, mean: Tensor | None, n_rows: int) -> None:
        """Take in the sums over the rows of one call."""
        self.gram = self._added(self.gram, gram)
        self._count(mean, n_rows)

    def _count(self, mean: Tensor | None, n_rows: int) -> None:
        if mean is not None:
            self.mean = mean if self.mean is None else self.mean + mean
        self.n_rows = (self.n_rows or 0) + n_rows

    def add_rows(self, rows: Tensor, table: Tensor | None = None) -> None:
        """Take in the rows of one call, ``(n, N)``.

        Args:
            table: That they are rows of, or sums of such.
        """
        if self.span is None and rows.shape[1] <= LARGEST_FULL_GRAM and n_processes() == 1:
            self.span = Span(rows.shape[1], parks=self.parks)
        if self.span is None or not self.span.is_small:
            self._sum_up([rows], exact=False)
            return
        n_waiting = sum(len(some) for some, _ in self.waiting)
        is_enough = n_waiting + len(rows) > self.span.most
        # The model may write to its activations.
        self.waiting.append((rows if is_enough else self._copied(rows), table))
        if is_enough:
            self._settle_waiting()

    def _settle_waiting(self) -> None:
        """Take in the rows that wait."""
        calls, self.waiting = self.waiting, []
        if self.span is not None and calls:
            self.span.add_all(calls)
            # Where directions are missing, rounding must not look like some.
            self._sum_up([rows for rows, _ in calls], exact=self.span.is_small)

    def _sum_up(self, calls: Sequence[Tensor], *, exact: bool) -> None:
        rows = torch.cat(list(calls)) if len(calls) > 1 else calls[0]
        self.gram = self._with_products(self.gram, rows.double() if exact else rows)
        self._count(rows.sum(dim=0, dtype=torch.float64), rows.shape[0])

    def _copied(self, rows: Tensor) -> Tensor:
        return park(rows) if self._is_to_park(rows) else rows.detach().clone()

    def add_gradients(self, rows: Tensor) -> None:
        """Take in the gradients of one call, ``(n, M)``."""
        self.output_gram = self._with_products(self.output_gram, rows)

    def _with_products(self, total: Tensor | None, rows: Tensor) -> Tensor:
        """A sum of outer products with those of some rows; of many columns, at and below the diagonal alone."""
        n = rows.shape[1]
        if not _goes_in_blocks(n):
            return self._added(total, second_moment(rows))
        rows = _at_least_float32(rows)
        if total is None:
            total = self._zeros(n, rows)
        for start, end in _blocks(n):
            total[start:end, :end].add_(rows[:, start:end].T @ rows[:, :end])
            let_go(total)
        return total

    def _zeros(self, n: int, rows: Tensor) -> Tensor:
        if self.parks and rows.device.type == "cpu" and n * n >= _WORTH_PARKING:
            return parked_zeros(torch.Size((n, n)), torch.float64)
        return torch.zeros(n, n, dtype=torch.float64, device=rows.device)

    def _added(self, total: Tensor | None, more: Tensor) -> Tensor:
        """A sum in float64, which is nobody else's."""
        if total is not None:
            step = _AT_ONCE // max(1, total[:1].numel()) if is_parked(total) else len(total)
            step = max(1, step)
            for start in range(0, len(total), step):  # what is added goes through a copy in float64
                total[start : start + step].add_(more[start : start + step])
                let_go(total)
            return total
        if self._is_to_park(more):
            return park(more, dtype=torch.float64)
        return more.to(torch.float64, copy=True)

    def finish(self, *, centred: bool, counts: bool = False) -> None:
        """Sums to means; about the mean where a shift of the layer's mean output does no harm.

        Args:
            counts: The moment is how often each id was met.

        Statistics of no rows, of NaN, or of inputs that never change say nothing about a layer: they are dropped.
        """
        self._settle_waiting()
        gram, mean, n_rows = self.gram, self.mean, self.n_rows
        self.gram = self.mean = None
        self._settle_span()
        if gram is None or not n_rows:
            return
        second = _trace(gram)
        if not math.isfinite(second) or second <= 0:
            return
        gram = expected_shares(gram) if counts else gram.div_(n_rows)
        if mean is not None and centred:
            mean = mean / n_rows
            gram = gram.sub_(mean.square()) if gram.ndim == 1 else gram.addr_(mean, mean, alpha=-1)
            if _trace(gram) <= _CONSTANT * second / n_rows:
                return
            self.mean = mean
        self.gram = _mirrored_(gram)
        let_go(gram)

    def finish_gradients(self, n: int) -> None:
        """The sum of the moments of gradients to their mean over some examples."""
        if self.output_gram is not None:
            let_go(_mirrored_(self.output_gram.div_(n)))

    def _settle_span(self) -> None:
        """How much of what is to come lies outside of the directions seen, spread over all others."""
        span, self.span = self.span, None
        basis = None if span is None else span.of_tables()
        if basis is not None:
            self.basis, self.outside = basis, 0.0
        elif span is not None and span.basis is not None and len(span.basis):
            rank, n = span.basis.shape
            unexplained = span.unexplained()
            self.basis = span.basis
            self.outside = 0.0 if unexplained <= _EXACT else min(DAMPING, unexplained * n / (n - rank))


def expected_shares(counts: Tensor) -> Tensor:
    """How often each id will be met in other data of the same kind, ``(N,)`` with sum 1.

    Ids that were met once are about as many as those met once more elsewhere: their share goes to those not met at
    all, alike, and a little where there are none. In text, a sixth of the words are of these even after ten thousand.

    Source: Good, "The population frequencies of species", Biometrika 40, 1953 (Turing's estimate).

    Example:
        >>> expected_shares(torch.tensor([6.0, 1.0, 1.0, 0.0, 0.0])).tolist()
        [0.5625, 0.09375, 0.09375, 0.125, 0.125]
    """
    total, once, unmet = counts.sum(), (counts == 1).sum(), counts == 0
    if not bool(unmet.any()):
        return counts / total
    rest = (once / total).clamp(_LEAST_UNMET * float(unmet.double().mean()), _MOST_UNMET)
    return torch.where(unmet, rest / unmet.sum(), counts / total * (1 - rest))


_FIGURES = {"grams": "gram", "means": "mean", "output_grams": "output_gram", "norms": "norm"}
_FIGURES |= {"input_shapes": "input_shape", "structures": "structure", "calls": "calls"}


def _by_layer(figure: str) -> Any:
    """A property: one of the figures, of the layers that have it."""

    def known(self: Calibration) -> dict[str, Any]:
        found = ((name, getattr(moments, figure)) for name, moments in self.layers.items())
        return {name: value for name, value in found if value is not None}

    return property(known)


@dataclass
class Calibration:
    """Input statistics of all layers, and the batches they came from.

    Attributes:
        layers: By layer name. ``grams``, ``means``, ``norms``, ``output_grams``, ``input_shapes``, ``structures`` and
            ``calls`` give one of the figures for those layers that have it.
        n_examples: Size of the first batch.
        output_scale: Mean square of the model's output about its mean, per example, in the metric that its changes
            are measured in. Where there are several outputs, that of the first; ``output_grams`` weigh the others as
            if they had the same.
        in_nats: The (first) output holds class probabilities: half of what ``output_grams`` predict of a change is its
            Kullback-Leibler divergence per example, summed over the positions that count; else it is the squared
            change of the output.
        output_shares: By name of an output, how much a change of it counts beside one of the first.
        batches: The batches kept for measuring sensitivities.
        held: Some that came after all that were summed up; of several processes each has its own.
        unseen: Layers that no rows, or only equal ones, came to.
        unmeasured: Layers of a kind for which input moments are not taken.
        notes: What was left out.
        with_labels: The labels went into the model.
        task: How the model was judged, where that is known.
    """

    layers: dict[str, LayerMoments] = field(default_factory=dict)
    n_examples: int = 1
    output_scale: float = 1.0
    output_shares: dict[str, float] = field(default_factory=dict)
    in_nats: bool = False
    batches: list[Any] = field(default_factory=list)
    held: list[Any] = field(default_factory=list)
    unseen: list[str] = field(default_factory=list)
    unmeasured: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    with_labels: bool = False
    task: Task | None = field(default=None, compare=False, repr=False)

    grams = _by_layer("gram")
    means = _by_layer("mean")
    output_grams = _by_layer("output_gram")
    norms = _by_layer("norm")
    input_shapes = _by_layer("input_shape")
    structures = _by_layer("structure")
    calls = _by_layer("calls")

    def tidy(self) -> None:
        """Give back memory between batches, where statistics are large."""
        if any(moments.parks for moments in self.layers.values()):
            tidy()

    def forget_derived(self) -> None:
        """Drop what was computed from the moments of all layers."""
        for moments in self.layers.values():
            moments.forget_derived()

    def of(self, name: str) -> LayerMoments:
        """What is known of a layer; an empty record for one that was not there."""
        return self.layers.get(name, LayerMoments())

    def weighing(self, name: str) -> tuple[Tensor | None, Tensor | None]:
        """Second moments of a layer's inputs and of its output's gradients, as a pair."""
        weighting = self.of(name).weighting
        return weighting.inputs, weighting.outputs

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take in a pickle; one of the version before has a dict by layer for each figure."""
        layers = state.setdefault("layers", {})
        for names, figure in _FIGURES.items():
            for name, value in state.pop(names, {}).items():
                setattr(layers.setdefault(name, LayerMoments()), figure, value)
        self.__dict__.update({"in_nats": False, "held": [], "output_shares": {}, "task": None, **state})


def n_moments(*sides: int) -> int:
    """Numbers that the second moments of inputs and outputs of such sizes hold."""
    return sum(n * n if n <= LARGEST_FULL_GRAM else n for n in sides)


def second_moment(rows: Tensor) -> Tensor:
    """Sum over rows of the outer products, in float32 or float64; of wide rows the squares alone."""
    if rows.shape[1] > LARGEST_FULL_GRAM:
        return rows.double().square().sum(dim=0)
    rows = _at_least_float32(rows)
    return rows.T @ rows


def _mirrored_(moment: Tensor) -> Tensor:
    """Fill in what stands above the diagonal, where products of blocks at and below it were summed up alone."""
    if moment.ndim == 2 and _goes_in_blocks(len(moment)):
        for start, end in _blocks(len(moment)):
            moment[:start, start:end] = moment[start:end, :start].T
    return moment


def _goes_in_blocks(n: int) -> bool:
    """Whether products with itself are made in blocks: little more than half the flops, and half the sums."""
    return _MANY_COLUMNS <= n <= LARGEST_FULL_GRAM


def _blocks(n: int) -> Iterator[tuple[int, int]]:
    step = -(-n // _BLOCKS)
    return ((start, min(start + step, n)) for start in range(0, n, step))


def _at_least_float32(rows: Tensor) -> Tensor:
    return rows.float() if rows.dtype in (torch.float16, torch.bfloat16) else rows


def _trace(gram: Tensor) -> float:
    return float((gram if gram.ndim == 1 else gram.diagonal()).sum())
