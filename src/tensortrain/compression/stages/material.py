"""What a stage that works on inputs alone begins with: both models, batches to fit on, batches to judge by."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn

from tensortrain.compression.opened import opened_for_a_while
from tensortrain.compression.stages.base import Work
from tensortrain.compression.stages.held_outputs import HeldOutputs, Judge, split_batches
from tensortrain.compression.survey.task import task_on_data
from tensortrain.system.parking import let_go_after_use
from tensortrain.system.processes import gathered
from tensortrain.train.preserve import preserved

__all__ = ["Material", "material", "running"]


@dataclass(frozen=True)
class Material:
    """Both models and the data of a fit.

    Attributes:
        original: Layers of several maps stand apart in it as they do in the compressed model.
        batches: To fit on.
        held: The original's outputs on batches held back.
        names: Of the layers that may be changed; all where None.
    """

    original: nn.Module
    small: nn.Module
    batches: list[Any]
    held: HeldOutputs
    names: frozenset[str] | None = None


@contextmanager
def material(work: Work, n_batches: int, n_held_back: int) -> Iterator[Material | str]:
    """The material of a fit; or why there is none, as the end of a sentence."""
    options = work.options
    assert options.data is not None
    if any(gathered(isinstance(options.data, Iterator))):
        yield "the data can be read only once."
        return
    batches, held = split_batches(options.data, n_batches, n_held_back, work.model, n_seen=options.n_batches)
    if not any(gathered(bool(held))) or not any(gathered(bool(batches))):
        yield "there are too few batches to hold some back."
        return
    named = options.task if isinstance(options.task, str) else None
    task = (
        work.task
        or options.known_task
        or task_on_data(work.original, [*batches, *held], task=named, output=options.output)
    )
    if not task.outputs:
        yield "the model gives whole numbers alone."
        return
    names = work.plan.opened if work.plan is not None else ()
    with opened_for_a_while(work.original, names) as opened:
        with running(opened.model):
            outputs = HeldOutputs.of(opened.model, held, Judge(task, options.output))
            if math.isnan(outputs.distance(opened.model)):
                yield "no place of the batches that are held back counts."
                return
        # What include= and exclude= left out of the plan is not to be changed.
        planned = None if work.plan is None else frozenset(name for layer in work.plan.layers for name in layer.names)
        yield Material(opened.model, work.model, batches, outputs, planned)


@contextmanager
def running(model: nn.Module) -> Iterator[None]:
    """In eval mode; all but the parameters as before afterwards. What lies in files takes no memory for long."""
    with preserved(model), let_go_after_use(model):
        model.eval()
        yield
