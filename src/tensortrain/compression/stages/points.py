"""What a model is at one point of the work: its size, and the figure that the user judges it by."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from tensortrain.compression.survey.layers import count_params
from tensortrain.system.storage import count_bytes

__all__ = ["Point", "point_of"]


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
