"""What a model is at one point of the work: its size, and the figure that the user judges it by."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from tensortrain.compression.survey.layers import count_params
from tensortrain.errors import KindError
from tensortrain.system.storage import count_bytes
from tensortrain.train.evaluation import Evaluate
from tensortrain.train.preserve import preserved

__all__ = ["Point", "evaluate_metric", "point_of"]


@dataclass(frozen=True)
class Point:
    """A model after one stage.

    Attributes:
        name: What it is called in the report's curve: "original", "before healing", "healed", ..
        n_params, n_bytes: Parameters, and bytes of parameters and buffers; shared ones once.
        metric: The user's figure, where there is one.
    """

    name: str
    n_params: int
    n_bytes: int
    metric: float | None


def point_of(name: str, model: nn.Module, metric: float | None) -> Point:
    """Size a model up."""
    return Point(name, count_params(model), count_bytes((*model.parameters(), *model.buffers())), metric)


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
