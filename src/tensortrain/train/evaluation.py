"""How good a model is: the share of right answers, or what a function of the user's says."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tensortrain.errors import DataError, KindError
from tensortrain.train.batches import device_of, opened, read_batch, to_device
from tensortrain.train.modes import evaluating
from tensortrain.train.outputs import judged_outputs
from tensortrain.train.preserve import preserved
from tensortrain.train.task import IGNORED, task_of_outputs

__all__ = ["Evaluate", "evaluate_accuracy", "evaluate_metric"]

Evaluate = Callable[[nn.Module], "float | Mapping[str, float]"]


def evaluate_accuracy(model: nn.Module, data: Iterable[Any]) -> float:
    """Return the share of right answers, a fraction in ``[0, 1]``.

    Args:
        model: Gives logits ``(b, c)``; run in eval mode, the modes it had are put back.
        data: Gives ``(x, y)`` or dicts with ``"labels"``.

    Raises:
        DataError: The data gives no labelled batch.
    """
    device, n = device_of(model), 0
    right = torch.zeros((), dtype=torch.int64, device=device)
    with torch.no_grad(), evaluating(model), opened(data) as batches:
        for batch in batches:
            batch = to_device(batch, device)
            labels = read_batch(model, batch).labels
            if isinstance(labels, Tensor) and labels.numel():
                hits = _hits(model, batch, labels)
                right, n = right + hits.sum(), n + hits.numel()
    if n == 0:
        raise DataError(
            "accuracy must be measured on labelled examples: data has none, expected (x, y) batches. "
            "Pass a re-iterable loader with labels."
        )
    return int(right) / n


def _hits(model: nn.Module, batch: Any, labels: Tensor) -> Tensor:
    """Which labels that count are the likeliest class."""
    tensors, _ = judged_outputs(model, batch)
    task = task_of_outputs(model, batch, tensors, labels)
    y = tensors[task.main]
    if task.labels == "shares":
        labels = labels.reshape(y.shape).argmax(task.class_axis)
    found = y.argmax(task.class_axis if task.labels != "none" else -1)
    labels = labels.reshape(found.shape)
    return found[labels != IGNORED] == labels[labels != IGNORED]


def evaluate_metric(evaluate: Evaluate | None, model: nn.Module) -> float | None:
    """The first figure that ``evaluate`` gives."""
    if evaluate is None:
        return None
    with torch.no_grad(), preserved(model, as_user_runs_it=True):
        model.eval()
        figures = evaluate(model)
    figure = next(iter(figures.values()), None) if isinstance(figures, Mapping) else figures
    try:
        return float(figure)  # type: ignore[arg-type]
    except (TypeError, ValueError, RuntimeError) as error:
        raise KindError(
            f"evaluate must give a number: it gives {type(figure).__name__}, expected a float or a dict of floats. "
            "Return the figure that the model is judged by."
        ) from error
