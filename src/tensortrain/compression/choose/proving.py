"""Plans carried out on a copy of their model, which is then timed and judged: each plan once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import nn

from tensortrain.compression.choose.plan import CompressionPlan
from tensortrain.compression.proof import apply_proven
from tensortrain.compression.report.measure import batch_of, call_of, shares_batch_axis
from tensortrain.compression.surgery import apply_shapes_
from tensortrain.contract.trials import seconds_in_use, timed
from tensortrain.errors import BudgetError, KindError
from tensortrain.system.observer import Observer, Silent
from tensortrain.train.batches import Parts, device_of, n_examples
from tensortrain.train.evaluation import Evaluate, evaluate_metric
from tensortrain.train.modes import evaluating
from tensortrain.train.preserve import checked_copy, preserved

__all__ = ["Proving", "time_ms", "what_it_does"]


@dataclass
class Proving:
    """What plans of one model really give.

    Attributes:
        model: Not changed.
        evaluate: The user's figure.
        batch: One of the data, which times are taken with.
        batch_size: How many examples of it.
        with_labels: The labels go into the model.
    """

    model: nn.Module
    evaluate: Evaluate | None
    batch: Any
    batch_size: int
    with_labels: bool
    observer: Observer
    _times: dict[CompressionPlan, float] = field(default_factory=dict)
    _sketched: dict[CompressionPlan, float] = field(default_factory=dict)
    _figures: dict[CompressionPlan, float] = field(default_factory=dict)
    _last: tuple[CompressionPlan, nn.Module] | None = None
    n_built: int = 0

    def latency_ms(self, plan: CompressionPlan) -> float:
        """Milliseconds of one forward pass of the compressed model."""
        key = what_it_does(plan)
        if key not in self._times:
            self._times[key] = time_ms(self._built(plan), self._call)
        return self._times[key]

    def sketched_ms(self, plan: CompressionPlan) -> float:
        """The same of a model whose new layers hold any numbers, which spares the decompositions."""
        key = what_it_does(plan)
        if key not in self._sketched:
            self._sketched[key] = self._time_of_shapes(plan)
        return self._sketched[key]

    def _time_of_shapes(self, plan: CompressionPlan) -> float:
        try:
            self.n_built += 1
            return time_ms(apply_shapes_(checked_copy(self.model), plan), self._call)
        except (KindError, RuntimeError):  # it may choose by the numbers what to do
            return self.latency_ms(plan)

    def figure(self, plan: CompressionPlan) -> float:
        """What ``evaluate`` gives for the compressed model."""
        key = what_it_does(plan)
        if key not in self._figures:
            self._figures[key] = self._judged(self._built(plan))
        return self._figures[key]

    @cached_property
    def original_ms(self) -> float:
        return time_ms(self.model, self._call)

    @cached_property
    def original_figure(self) -> float:
        return self._judged(self.model)

    def _judged(self, model: nn.Module) -> float:
        found = evaluate_metric(self.evaluate, model)
        assert found is not None  # checked with the budget
        return found

    def _built(self, plan: CompressionPlan) -> nn.Module:
        key = what_it_does(plan)
        if self._last is None or self._last[0] != key:
            self._last = None  # room for the next one
            self.n_built += 1
            built = apply_proven(self.model, plan, inplace=False, observer=Silent())[0]
            self._last = key, built
        return self._last[1]

    @cached_property
    def _call(self) -> Parts:
        """The inputs that are timed."""
        call = call_of(self.model, self.batch, with_labels=self.with_labels)
        own = max(1, n_examples(self.batch))
        if own == self.batch_size:
            return call
        if not shares_batch_axis(call):
            raise BudgetError(
                f"a batch must be one that can be cut to the size of the budget: its inputs share no first axis, and "
                f"it has {own} examples, expected {self.batch_size}. Pass data or example_inputs of that size, or "
                f"batch_size={own} in the budget."
            )
        cut: Parts = batch_of(call, self.batch_size)
        return cut


def time_ms(model: nn.Module, call: Parts) -> float:
    """Milliseconds of one forward pass in eval mode, as in use: a few in a row, after one that wakes the threads.

    Raises:
        KindError: The model does not run on it.
    """
    device = device_of(model)
    run: Callable[[], Any] = partial(model, *call.args, **call.kwargs)
    with preserved(model, as_user_runs_it=True), evaluating(model), torch.no_grad():
        try:
            return 1e3 * seconds_in_use([run], partial(timed, device=device))[0]
        except RuntimeError as error:
            raise KindError(
                f"a model must run on the inputs that it is timed with: it fails with {error!s:.200}. Pass "
                "example_inputs that it takes, of the batch size of the budget."
            ) from error


def what_it_does(plan: CompressionPlan) -> CompressionPlan:
    """A plan without what is only told about it: two that change the same are equal then."""
    layers = tuple(replace(layer, decision="", rel_error=None, loss=None, spectra=(), why="") for layer in plan.layers)
    return replace(plan, layers=layers, budget="", notes=(), left_alone=(), calibration=None)
