"""How a model is judged, found out on the first batch with an example."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from tensortrain.errors import DataError
from tensortrain.train.batches import device_of, n_examples, take, to_device
from tensortrain.train.outputs import Output
from tensortrain.train.preserve import preserved
from tensortrain.train.task import Task, TaskName, decide_task

__all__ = ["FIRST", "first_with_example", "task_on_batch", "task_on_data"]

FIRST = 3  # batches among which the first with an example is looked for


def task_on_data(
    model: nn.Module, data: Iterable[Any], *, task: TaskName | None = None, output: Output | None = None
) -> Task:
    """Decide the task on the first batch that has an example. Nothing of the model is changed.

    Raises:
        DataError: There is no such batch, or the model does not run on it.
    """
    batch = first_with_example(take(data, FIRST))
    if batch is None:
        raise DataError(
            "data must give batches: none of the first ones has an example. Pass a re-iterable such as a list or a "
            "DataLoader, not an iterator that is used up."
        )
    return task_on_batch(model, batch, task=task, output=output)


def first_with_example(batches: Iterable[Any]) -> Any:
    """The first batch that is not empty; None where all are."""
    return next((batch for batch in batches if n_examples(batch)), None)


def task_on_batch(model: nn.Module, batch: Any, *, task: TaskName | None, output: Output | None) -> Task:
    """Decide the task on a batch. Nothing of the model is changed."""
    with torch.no_grad(), preserved(model):
        model.eval()
        return decide_task(model, to_device(batch, device_of(model)), task=task, output=output)
