"""What each new layer spoils by itself, to set beside what the plan predicted of it."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from tensortrain.compression.choose.plan import CompressionPlan, Group, Narrowed
from tensortrain.compression.opened import opened_for_a_while
from tensortrain.compression.report.replay import Replay
from tensortrain.compression.report.turns import give_back
from tensortrain.compression.surgery import apply_plan_
from tensortrain.compression.survey.fisher import Metric
from tensortrain.compression.survey.layers import part_of
from tensortrain.compression.survey.task import task_on_batch
from tensortrain.nn import FactorizedLayer, TiedHead
from tensortrain.system.parking import are_large
from tensortrain.train.batches import device_of, some_of, to_device
from tensortrain.train.outputs import Output, judged_outputs
from tensortrain.train.preserve import checked_copy, preserved
from tensortrain.train.task import Task, TaskName

__all__ = ["loss_together", "losses_alone"]

_MOST_S = 10.0  # beyond it the rest goes unmeasured: a report must not take longer than the work
# Of all passes over a batch, from which on it is cut to some of its examples, and how many are left at least: more say
# little more of a layer than these, and a layer at the end that there is no time for is told of by nothing.
_MOST_FLOPS, _FEWEST = 4e11, 4
_FEW = 4  # changes: of fewer, all of the model runs
_ROUNDING = 1e-8  # of the square of an output
_STATISTICS = ("running_mean", "running_var")


def losses_alone(
    original: nn.Module,
    compressed: nn.Module,
    plan: CompressionPlan,
    output: Output | None = None,
    task: TaskName | Task | None = None,
    *,
    batches: Sequence[Any] | None = None,
) -> dict[str, float]:
    """Share of the original's output that each new layer spoils where it is the only one, on one batch of the data.

    Measured as it was predicted: class probabilities by their divergence, other outputs by squares. Layers that are
    narrowed together are changed together, and what that spoils is told of the one where errors were predicted; of
    several such it is shared out as the predictions are.

    Args:
        original: Not changed; new layers answer in the place of its own, one at a time.
        compressed: As it was cut, not healed yet.
        plan: What was applied, with its calibration.
        batches: Others than the first of the calibration; the mean over them counts, however long it takes.

    Returns:
        dict: By name of the layer; without those that there was no time for.

    Cost: one forward pass from the changed layer on for each layer or group of layers, at most some seconds: of a large
        model over a few examples; some megabytes of what the modules before it gave, by which they are not run; a
        copy of the model for each attention or recurrent layer that is narrowed.
    """
    calibration = plan.calibration
    most_s = math.inf if batches else _MOST_S  # a plan must not depend on how long it took
    batches = batches or ([_some_of(one, plan) for one in calibration.batches[:1]] if calibration is not None else [])
    if calibration is None or not batches:
        return {}
    with opened_for_a_while(original) as opened, preserved(opened.model), torch.no_grad():
        net = opened.model
        net.eval()
        task = calibration.task if task is None else task
        outputs, start = _Outputs.of(net, batches, output, task, calibration.with_labels), perf_counter()
        found = outputs.spoiled_by_each(net, list(_changes(net, compressed, plan)), start + most_s)
    for one in plan.groups:
        if isinstance(one, Narrowed) or perf_counter() - start > most_s:
            continue
        net = _with_group_alone(original, plan, one)
        with preserved(net), torch.no_grad():
            found |= _shared_out(outputs.spoiled_by(net), plan, one)
    return found


def _with_group_alone(original: nn.Module, plan: CompressionPlan, one: Group) -> nn.Module:
    """A copy of the model of which these layers alone are narrowed: the code around them has to know of it."""
    copied = checked_copy(original, parks=are_large(original.parameters())).eval()
    return apply_plan_(copied, replace(plan, layers=()).with_groups([one]))


def _shared_out(loss: float, plan: CompressionPlan, one: Group) -> dict[str, float]:
    """What a group spoils, by the names of its layers of which a loss was predicted."""
    predicted = {layer.name: layer.loss for layer in plan.layers if layer.name in one.names and layer.loss}
    whole = math.fsum(predicted.values())
    return {name: loss * each / whole for name, each in predicted.items()} if whole > 0 else {one.names[-1]: loss}


def loss_together(
    original: nn.Module,
    compressed: nn.Module,
    plan: CompressionPlan,
    output: Output | None = None,
    task: TaskName | Task | None = None,
    *,
    batches: Sequence[Any],
) -> float:
    """Share of the original's output that a compressed model spoils, measured as by ``losses_alone``."""
    with_labels = plan.calibration is not None and plan.calibration.with_labels
    with preserved(original), preserved(compressed), torch.no_grad():
        original.eval()
        compressed.eval()
        return _Outputs.of(original, batches, output, task, with_labels).spoiled_by(compressed)


def _some_of(batch: Any, plan: CompressionPlan) -> Any:
    """As many examples of a batch as a pass for every change can go over in a few seconds."""
    n_passes = len(plan.narrowed) + sum(layer.spec is not None for layer in plan.layers)
    flops = n_passes * sum(layer.flops_before or 0 for layer in plan.layers)
    return some_of(batch, max(_FEWEST, int(_MOST_FLOPS / max(1, flops))))


@dataclass(frozen=True)
class _Change:
    """Of a model: new layers in the place of some of its own.

    Attributes:
        name: Of the layer that it is told of.
        parts: Modules that answer in another way.
        made: While it is entered, they do.
    """

    name: str
    parts: Sequence[nn.Module]
    made: Callable[[], AbstractContextManager[None]]


@dataclass
class _Outputs:
    """What a model gives for some batches, and how far others are from that."""

    batches: Sequence[Any]
    wanted: Sequence[Mapping[str, Tensor]]
    metric: Metric
    given: Callable[[nn.Module, Any], Mapping[str, Tensor]]
    first: Replay | None  # of the first batch

    @classmethod
    def of(
        cls, net: nn.Module, batches: Sequence[Any], output: Output | None, task: Any, with_labels: bool
    ) -> _Outputs:
        moved = [to_device(batch, device_of(net)) for batch in batches]

        def given(model: nn.Module, batch: Any) -> Mapping[str, Tensor]:
            return judged_outputs(model, batch, output, with_labels=with_labels)[0]

        known = task if isinstance(task, Task) else task_on_batch(net, moved[0], task=task, output=output)
        first, wanted = Replay.of(net, lambda: given(net, moved[0]))
        return cls(moved, [wanted, *(given(net, batch) for batch in moved[1:])], Metric(net, known), given, first)

    def spoiled_by(self, model: nn.Module) -> float:
        """By another model, the mean over the batches."""
        return sum(self._spoiled_on(k, model) for k in range(len(self.batches))) / len(self.batches)

    def spoiled_by_each(self, net: nn.Module, changes: Sequence[_Change], until: float) -> dict[str, float]:
        """By each of some changes of the model alone; of those that there is time for."""
        sums = {change.name: 0.0 for change in changes}
        for k in range(len(self.batches)):
            replay = self._replay(k, net, changes)
            for change in sorted(changes, key=lambda one: replay.place_of(one.parts), reverse=True):
                if perf_counter() > until:
                    sums.pop(change.name, None)
                if change.name in sums:
                    with change.made(), replay.up_to(change.parts):
                        sums[change.name] += self._spoiled_on(k, net)
        return {change.name: sums[change.name] / len(self.batches) for change in changes if change.name in sums}

    def _spoiled_on(self, k: int, model: nn.Module) -> float:
        return self._spoiled(k, self.given(model, self.batches[k]))

    def _spoiled(self, k: int, given: Mapping[str, Tensor]) -> float:
        wanted, batch = self.wanted[k], self.batches[k]
        return sum(self.metric.share(name, given[name], y, batch) for name, y in wanted.items() if name in given)

    def _replay(self, k: int, net: nn.Module, changes: Sequence[_Change]) -> Replay:
        """Of the model on a batch; an empty one where less than all of a run gives something else."""
        if len(changes) < _FEW:
            return Replay()
        replay = self.first if k == 0 else None
        self.first = None
        if replay is None:
            replay, _ = Replay.of(net, lambda: self.given(net, self.batches[k]))
        with replay.up_to(max((change.parts for change in changes), key=replay.place_of)):
            again = self.given(net, self.batches[k])
        is_same = again.keys() == self.wanted[k].keys() and self._spoiled(k, again) < _ROUNDING
        return replay if is_same else Replay()


def _changes(net: nn.Module, compressed: nn.Module, plan: CompressionPlan) -> Iterator[_Change]:
    """What can be changed by itself, with the layer that it is told of: each new layer, each group of narrowed ones."""
    for layer in plan.layers:
        old, new = part_of(net, layer.name), part_of(compressed, layer.name)
        if layer.spec is not None and old is not None and isinstance(new, FactorizedLayer):
            yield _with_statistics(net, compressed, plan, layer.name, _own_pairs(net, compressed, old, new))
    for one in plan.narrowed:
        names = (*one.units.makers, *one.units.between, one.units.reader)
        pairs = [(part_of(net, name), part_of(compressed, name)) for name in names]
        if all(part is not None for pair in pairs for part in pair):
            yield _with_statistics(net, compressed, plan, one.units.reader, pairs)


def _own_pairs(
    net: nn.Module, compressed: nn.Module, old: nn.Module, new: FactorizedLayer
) -> Sequence[tuple[Any, Any]]:
    """A layer and its new form; and where that is a table, its output layers."""
    heads = [name for name, part in compressed.named_modules() if isinstance(part, TiedHead) and part.embedding is new]
    pairs = [(old, new), *((part_of(net, name), compressed.get_submodule(name)) for name in heads)]
    return [(one, other) for one, other in pairs if one is not None]


def _with_statistics(
    net: nn.Module, compressed: nn.Module, plan: CompressionPlan, name: str, pairs: Sequence[tuple[Any, Any]]
) -> _Change:
    """New layers, and the batch norm behind that of the name with the statistics that were put right for it."""
    assert plan.calibration is not None
    norm = plan.calibration.of(name).norm
    own, other = (part_of(each, norm) if norm else None for each in (net, compressed))

    @contextlib.contextmanager
    def made() -> Iterator[None]:
        with _in_place(pairs), _statistics_of(own, other):
            yield

    parts = [old for old, _ in pairs]
    return _Change(name, parts if own is None else [*parts, own], made)


@contextlib.contextmanager
def _in_place(pairs: Sequence[tuple[Any, Any]]) -> Iterator[None]:
    """Layers answer by their successors. Narrower ones are given fewer channels than they could take themselves."""
    kept = [(old, vars(old).get("forward"), new, new.training) for old, new in pairs]
    timing = [(new, new.may_time_plans) for _, new in pairs if isinstance(new, FactorizedLayer)]
    # Torch's transformers run past their layers, in one kernel, unless these have hooks.
    handles = [old.register_forward_hook(_nothing) for old, _ in pairs]
    for old, _, new, _ in kept:
        new.eval()
        vars(old)["forward"] = partial(type(new).forward, new)
    for new, _ in timing:
        new.may_time_plans = False  # it runs once at this size
    try:
        yield
    finally:
        for new, may_time in timing:
            new.may_time_plans = may_time
        for handle in handles:
            handle.remove()
        for old, own, new, training in kept:
            del vars(old)["forward"]
            if own is not None:
                vars(old)["forward"] = own
            new.train(training)
            give_back(new)  # no hook has seen it run


def _nothing(module: nn.Module, args: Any, output: Any) -> None:
    pass


@contextlib.contextmanager
def _statistics_of(own: Any, other: Any) -> Iterator[None]:
    """A batch norm with the statistics of another one, if there are any."""
    pairs = [
        (getattr(own, name), getattr(other, name)) for name in _STATISTICS if own is not None and other is not None
    ]
    kept = [(mine, mine.clone()) for mine, _ in pairs if mine is not None]
    for mine, theirs in pairs:
        if mine is not None:
            mine.copy_(theirs)
    try:
        yield
    finally:
        for mine, value in kept:
            mine.copy_(value)
