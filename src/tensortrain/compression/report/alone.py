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
from tensortrain.compression.surgery import apply_plan_
from tensortrain.compression.survey.fisher import Metric
from tensortrain.compression.survey.layers import part_of
from tensortrain.compression.survey.task import task_on_batch
from tensortrain.nn import FactorizedLayer, TiedHead
from tensortrain.system.parking import are_large
from tensortrain.train.batches import device_of, map_tensors, n_examples, tensors_in, to_device
from tensortrain.train.outputs import Output, judged_outputs
from tensortrain.train.preserve import checked_copy, preserved
from tensortrain.train.task import Task, TaskName

__all__ = ["loss_together", "losses_alone"]

_MOST_S = 10.0  # beyond it the rest goes unmeasured: a report must not take longer than the work
# Of all passes over a batch, from which on it is cut to some of its examples, and how many are left at least: more say
# little more of a layer than these, and a layer at the end that there is no time for is told of by nothing.
_MOST_FLOPS, _FEWEST = 4e11, 4
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

    Cost: one forward pass a layer or group of layers, at most some seconds: of a large model over a few examples; a
        copy of the model for each attention or recurrent layer that is narrowed.
    """
    calibration = plan.calibration
    most_s = math.inf if batches else _MOST_S  # a plan must not depend on how long it took
    batches = batches or ([_some_of(one, plan) for one in calibration.batches[:1]] if calibration is not None else [])
    if calibration is None or not batches:
        return {}
    found: dict[str, float] = {}
    with opened_for_a_while(original) as opened, preserved(opened.model), torch.no_grad():
        net = opened.model
        net.eval()
        outputs, start = _Outputs.of(net, batches, output, task, calibration.with_labels), perf_counter()
        for name, changed in _changes(net, compressed, plan):
            if perf_counter() - start > most_s:
                break
            with changed, _statistics_of(net, compressed, calibration.of(name).norm):
                found[name] = outputs.spoiled_by(net)
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
    n, n_passes = n_examples(batch), len(plan.narrowed) + sum(layer.spec is not None for layer in plan.layers)
    flops = n_passes * sum(layer.flops_before or 0 for layer in plan.layers)
    few = max(_FEWEST, int(_MOST_FLOPS / max(1, flops)))
    tensors = tensors_in(batch)
    if few >= n or not all(tensor.layout is torch.strided and tensor.shape[:1] == (n,) for tensor in tensors):
        return batch
    cut = map_tensors(lambda tensor: tensor[:few], batch)
    return cut if n_examples(cut) == few else batch


@dataclass(frozen=True)
class _Outputs:
    """What a model gives for some batches, and how far others are from that."""

    batches: Sequence[Any]
    wanted: Sequence[Mapping[str, Tensor]]
    metric: Metric
    given: Callable[[nn.Module, Any], Mapping[str, Tensor]]

    @classmethod
    def of(
        cls, net: nn.Module, batches: Sequence[Any], output: Output | None, task: Any, with_labels: bool
    ) -> _Outputs:
        moved = [to_device(batch, device_of(net)) for batch in batches]

        def given(model: nn.Module, batch: Any) -> Mapping[str, Tensor]:
            return judged_outputs(model, batch, output, with_labels=with_labels)[0]

        known = task if isinstance(task, Task) else task_on_batch(net, moved[0], task=task, output=output)
        return cls(moved, [given(net, batch) for batch in moved], Metric(net, known), given)

    def spoiled_by(self, model: nn.Module) -> float:
        pairs = zip(self.batches, self.wanted, strict=True)
        losses = [_spoiled(self.metric, self.given(model, batch), wanted, batch) for batch, wanted in pairs]
        return sum(losses) / len(losses)


def _changes(
    net: nn.Module, compressed: nn.Module, plan: CompressionPlan
) -> Iterator[tuple[str, AbstractContextManager[None]]]:
    """What can be changed by itself, with the layer that it is told of: each new layer, each group of narrowed ones."""
    for layer in plan.layers:
        old, new = part_of(net, layer.name), part_of(compressed, layer.name)
        if layer.spec is not None and old is not None and isinstance(new, FactorizedLayer):
            yield layer.name, _all_in_place(net, compressed, old, new)
    for one in plan.narrowed:
        names = (*one.units.makers, *one.units.between, one.units.reader)
        pairs = [(part_of(net, name), part_of(compressed, name)) for name in names]
        if all(part is not None for pair in pairs for part in pair):
            yield one.units.reader, _narrowed_in_place(pairs)


@contextlib.contextmanager
def _narrowed_in_place(pairs: Sequence[tuple[Any, Any]]) -> Iterator[None]:
    """Layers answer by their narrower successors, which are given fewer channels than they could take themselves."""
    kept = [(old, vars(old).get("forward"), new, new.training) for old, new in pairs]
    for old, _, new, _ in kept:
        new.eval()
        vars(old)["forward"] = partial(type(new).forward, new)
    try:
        yield
    finally:
        for old, own, new, training in kept:
            del vars(old)["forward"]
            if own is not None:
                vars(old)["forward"] = own
            new.train(training)


def _spoiled(metric: Metric, given: Mapping[str, Tensor], wanted: Mapping[str, Tensor], batch: Any) -> float:
    return sum(metric.share(name, given[name], y, batch) for name, y in wanted.items() if name in given)


@contextlib.contextmanager
def _all_in_place(net: nn.Module, compressed: nn.Module, old: nn.Module, new: FactorizedLayer) -> Iterator[None]:
    """A new layer answers for the old one, and where it is a table, its output layer for that of the old one."""
    heads = [name for name, part in compressed.named_modules() if isinstance(part, TiedHead) and part.embedding is new]
    with contextlib.ExitStack() as stack:
        stack.enter_context(_in_place_of(old, new))
        for name in heads:
            head, own = compressed.get_submodule(name), part_of(net, name)
            if own is not None:
                stack.enter_context(_in_place_of(own, head))
        yield


@contextlib.contextmanager
def _in_place_of(old: nn.Module, new: nn.Module) -> Iterator[None]:
    """A new layer answers whenever the old one is called."""

    def answer(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        return type(new).forward(new, *args, **kwargs)

    hook: Callable[..., Any] = answer
    training = new.training
    handle = old.register_forward_hook(hook, with_kwargs=True)
    new.eval()
    try:
        yield
    finally:
        handle.remove()
        new.train(training)


@contextlib.contextmanager
def _statistics_of(net: nn.Module, compressed: nn.Module, norm: str | None) -> Iterator[None]:
    """The batch norm behind a layer with the statistics that were put right for the new one."""
    own, other = (part_of(each, norm) if norm else None for each in (net, compressed))
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
